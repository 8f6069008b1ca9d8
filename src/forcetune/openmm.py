"""The potential in OpenMM; see :mod:`forcetune.deployment.openmm`."""

from forcetune.deployment.openmm import create_force, create_mixed_system, create_system

__all__ = ["create_force", "create_mixed_system", "create_system"]
