"""Runs: a folder that ``fit`` makes, ``resume`` continues, and all other commands read."""
