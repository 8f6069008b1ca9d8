"""SevenNet: everything that knows its checkpoints lives in this folder."""

from forcetune.backbones.sevennet.backbone import SevenNetBackbone

__all__ = ["SevenNetBackbone"]
