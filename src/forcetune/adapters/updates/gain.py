"""A static gain of every output channel, which merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from forcetune.adapters.updates.base import OUT, Axis, Update, WeightUpdate, channel_axis
from forcetune.backbones.protocol import Site, WeightPath


class GainWeight(WeightUpdate):
    """W' = W (1 + g) on each path, with one g for each output channel (and element), zero at the start."""

    def __init__(self, site: Site, weight: Tensor, spec: Gain) -> None:
        super().__init__()
        self.paths = site.paths
        options = {"dtype": weight.dtype, "device": weight.device}
        self.gains = nn.ParameterDict(
            {path.name: nn.Parameter(torch.zeros(spec.shape_for(path), **options)) for path in site.paths}
        )

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(-1)
        parts = [
            (flat[path.start : path.start + path.size].view(path.shape) * (1 + self.gains[path.name])).reshape(-1)
            for path in self.paths
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(weight.shape)


@dataclass(frozen=True)
class Gain(Update):
    """One static factor for each path and output channel: the part of a gate that does not depend on the input.

    It costs nothing at inference, since it merges, and keeps equivariance: channels are scaled, never mixed.

    Attributes:
        per_element: contractions have a factor for each element, too.
        axis: ``last`` only in adapters of earlier versions, where the factor of a transposed radial layer belongs to
            an input.
    """

    per_element: bool = True
    axis: Axis = OUT
    name: ClassVar[str] = "Gain"
    internal: ClassVar[frozenset[str]] = frozenset({"axis"})

    @classmethod
    def earlier_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {"axis": "last"} | options

    def shape_for(self, path: WeightPath) -> tuple[int, ...]:
        """Shape of g on ``path``, to be broadcast against it."""
        shape = [1] * len(path.shape)
        channels = channel_axis(path, self.axis)
        shape[channels] = path.shape[channels]
        if len(path.shape) == 3 and self.per_element:
            shape[0] = path.shape[0]
        return tuple(shape)

    def build(self, site: Site, weight: Tensor) -> GainWeight:
        return GainWeight(site, weight, self)
