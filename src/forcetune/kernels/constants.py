"""Constants that follow the precision and the device of whom they meet."""

from __future__ import annotations

import torch
from torch import Tensor


class Constant:
    """A tensor of constants; its copies in other precisions and on other devices are made once."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._copies: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, other: Tensor) -> Tensor:
        """In the precision of ``other`` and where it is."""
        key = (other.dtype, other.device)
        if key not in self._copies:
            self._copies[key] = self.value.to(dtype=other.dtype, device=other.device)
        return self._copies[key]

    def on(self, device: torch.device) -> Tensor:
        """On a device, in its own precision."""
        key = (self.value.dtype, device)
        if key not in self._copies:
            self._copies[key] = self.value.to(device)
        return self._copies[key]
