"""MACE: everything that knows mace-torch lives in this folder."""

from forcetune.backbones.mace.backbone import MaceBackbone

__all__ = ["MaceBackbone"]
