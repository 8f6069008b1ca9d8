"""SevenNet checkpoints into files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forcetune.backbones.sevennet.content import SevenNetContent, present_name
from forcetune.files import atomic_path


def write_checkpoint(content: SevenNetContent, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a checkpoint with other numbers, atomically.

    Configuration, version, names and layout of the tensors stay those of the file it came from, so that it loads
    wherever that did. Arrays become lists and devices text: ``torch.load(weights_only=True)`` opens it.

    Args:
        content: of the checkpoint.
        tensors: those that were replaced, by their names in the file.
        path: to write.

    Raises:
        InputError: the folder cannot be written.
    """
    state = OrderedDict()
    for name, tensor in content.state.items():
        state[name] = tensors.get(name, tensor).detach().cpu().clone()
    config = {key: plain(value) for key, value in content.config.items()}
    for key in ("shift", "scale"):
        found = next((t for name, t in state.items() if present_name(name) == f"rescale_atomic_energy.{key}"), None)
        if found is not None and key in config:
            values = found.tolist()
            config[key] = values[0] if isinstance(values, list) and len(values) == 1 and found.ndim == 1 else values
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
