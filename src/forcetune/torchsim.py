"""The potential in torch-sim; see :mod:`forcetune.deployment.torchsim`."""

from forcetune.deployment.torchsim import ForcetuneModel, mixed_state

__all__ = ["ForcetuneModel", "mixed_state"]
