"""The potential in LAMMPS; see :mod:`forcetune.deployment.lammps`."""

from forcetune.deployment.lammps import Coupling, couple, start

__all__ = ["Coupling", "couple", "start"]
