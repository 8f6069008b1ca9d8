"""The NequIP family of networks: what SevenNet and NequIP have in common, and everything that knows NequIP's files."""

from forcetune.backbones.nequip.backbone import NequIPBackbone

__all__ = ["NequIPBackbone"]
