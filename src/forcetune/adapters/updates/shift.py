"""A constant added to the even scalars that a layer puts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from forcetune.adapters.updates.base import ActivationUpdate, Update
from forcetune.backbones.protocol import Site
from forcetune.irreps import parse_irreps
from forcetune.kernels.features import Features

Watcher = Callable[[Tensor | None, Tensor | None, Sequence[Tensor]], None]


class ShiftActivation(ActivationUpdate):
    """out + b on even scalars, one b for each channel, zero at the start.

    Attributes:
        blocks_out: of the output.
        watcher: called as that of a gate, with shifts (1, scalars), None for gains and the blocks of the output.
    """

    def __init__(self, site: Site, weight: Tensor) -> None:
        super().__init__()
        assert site.irreps_out is not None
        self.blocks_out = parse_irreps(site.irreps_out)
        self._layout = tuple((block.dim, block.multiplicity) for block in self.blocks_out)
        width = sum(block.multiplicity for block in self.blocks_out if block.is_even_scalar)
        self.shift = nn.Parameter(torch.zeros(width, dtype=weight.dtype, device=weight.device))
        self.watcher: Watcher | None = None

    def forward(self, inputs: Tensor, outputs: Tensor | Any, species: Tensor | None = None) -> Tensor | Any:
        if isinstance(outputs, Features) and outputs.layout == self._layout:
            parts = self._shifted(outputs.blocks)
            return Features(parts, geometric=outputs.geometric, trains=True)
        return torch.cat(self._shifted([outputs[..., b.start : b.stop] for b in self.blocks_out]), dim=-1)

    def _shifted(self, parts: Sequence[Tensor]) -> list[Tensor]:
        if self.watcher is not None:
            self.watcher(self.shift.unsqueeze(0), None, parts)
        by_block = self.per_block(self.shift)
        return [part if shift is None else part + shift for part, (shift, _) in zip(parts, by_block, strict=True)]

    def per_block(self, shifts: Tensor | None, gains: Tensor | None = None) -> list[tuple[Tensor | None, None]]:
        """The shift of each block of the output, as :meth:`GateActivation.per_block` gives shift and gain.

        Args:
            shifts: (..., scalars) of all even scalars.
            gains: there are none.
        """
        by_block: list[tuple[Tensor | None, None]] = []
        start = 0
        for block in self.blocks_out:
            if block.is_even_scalar and shifts is not None:
                by_block.append((shifts[..., start : start + block.multiplicity], None))
                start += block.multiplicity
            else:
                by_block.append((None, None))
        return by_block


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
