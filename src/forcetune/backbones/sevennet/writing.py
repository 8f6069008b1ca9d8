"""SevenNet checkpoints into files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forcetune.backbones.sevennet.content import SevenNetContent
from forcetune.utils.files import atomic_path


def write_checkpoint(content: SevenNetContent, path: str | Path) -> None:
    """Write a checkpoint, atomically.

    Configuration, version, names and layout of the tensors stay those of the file it came from, so that it loads
    wherever that did: whatever sevenn does to files of that version, it does to this one. Arrays become lists and
    devices text, so that ``torch.load(weights_only=True)`` opens it.

    Raises:
        InputError: the folder cannot be written.
    """
    state = OrderedDict((name, tensor.detach().cpu().clone()) for name, tensor in content.state.items())
    config = {key: plain(value) for key, value in content.config.items()}
    with atomic_path(path) as temporary:
        torch.save({"config": config, "model_state_dict": state, "epoch": 0}, temporary)


def plain(value: Any) -> Any:
    """Lists and text instead of arrays, tensors and devices."""
    if isinstance(value, (np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(entry) for entry in value)
    return value
