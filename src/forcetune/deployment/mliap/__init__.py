"""The potential inside LAMMPS by its ML-IAP package, and a stand-in for LAMMPS to check it with."""
