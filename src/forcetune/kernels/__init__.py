"""Exact, faster equivalents of the hot layers of a backbone, for energies, forces and the gradients of both."""
