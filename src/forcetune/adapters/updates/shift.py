"""A constant added to the even scalars that a layer puts out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from forcetune.adapters.updates.base import ActivationUpdate, Update
from forcetune.backbones.protocol import Site
from forcetune.irreps import parse_irreps
from forcetune.kernels.features import Features


class ShiftActivation(ActivationUpdate):
    """out + b on even scalars, one b for each channel, zero at the start."""

    def __init__(self, site: Site, weight: Tensor) -> None:
        super().__init__()
        assert site.irreps_out is not None
        self.blocks = parse_irreps(site.irreps_out)
        self._layout = tuple((block.dim, block.multiplicity) for block in self.blocks)
        width = sum(block.multiplicity for block in self.blocks if block.is_even_scalar)
        self.shift = nn.Parameter(torch.zeros(width, dtype=weight.dtype, device=weight.device))

    def forward(self, inputs: Tensor, outputs: Tensor | Any, species: Tensor | None = None) -> Tensor | Any:
        if isinstance(outputs, Features) and outputs.layout == self._layout:
            parts = self._shifted(outputs.blocks)
            return Features(parts, geometric=outputs.geometric, trains=True)
        return torch.cat(self._shifted([outputs[..., b.start : b.stop] for b in self.blocks]), dim=-1)

    def _shifted(self, parts: Any) -> list[Tensor]:
        result, start = [], 0
        for block, part in zip(self.blocks, parts, strict=True):
            if block.is_even_scalar:
                part = part + self.shift[start : start + block.multiplicity]
                start += block.multiplicity
            result.append(part)
        return result


@dataclass(frozen=True)
class Shift(Update):
    """The bias of a layer: equivariant layers have none, since only even scalars may have one.

    It does not merge: the library's layers have no place to keep it.
    """

    name: ClassVar[str] = "Shift"
    mergeable: ClassVar[bool] = False

    def unsupported_reason(self, site: Site) -> str | None:
        if site.irreps_out is None:
            return "its module has no irreps"
        if not any(block.is_even_scalar for block in parse_irreps(site.irreps_out)):
            return "its output has no even scalars to shift"
        return None

    def build(self, site: Site, weight: Tensor) -> ShiftActivation:
        return ShiftActivation(site, weight)
