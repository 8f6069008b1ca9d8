"""The conventional bottleneck adapter, which breaks rotational symmetry: a baseline, never to be deployed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from forcetune.adapters.updates.base import ActivationUpdate, Rank, Update
from forcetune.backbones.protocol import Site
from forcetune.irreps import parse_irreps
from forcetune.kernels.features import Features


class BottleneckActivation(ActivationUpdate):
    """out + W↑ SiLU(W↓ out + b↓) + b↑ on the whole feature vector, components of vectors mixed like channels."""

    def __init__(self, site: Site, weight: Tensor, spec: Bottleneck) -> None:
        super().__init__()
        assert site.irreps_out is not None
        width = parse_irreps(site.irreps_out)[-1].stop
        options: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.down = nn.Linear(width, spec.rank, **options)
        self.up = nn.Linear(spec.rank, width, **options)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, inputs: Tensor, outputs: Tensor, species: Tensor | None = None) -> Tensor:
        flat = outputs.flat if isinstance(outputs, Features) else outputs
        return flat + self.up(functional.silu(self.down(flat)))


@dataclass(frozen=True)
class Bottleneck(Update):
    """The adapter of language and vision models after an equivariant linear layer. It is not equivariant.

    Attributes:
        rank: width of the bottleneck.
    """

    rank: Rank = 16
    name: ClassVar[str] = "Bottleneck"
    mergeable: ClassVar[bool] = False
    equivariant: ClassVar[bool] = False

    def unsupported_reason(self, site: Site) -> str | None:
        return "its module has no irreps" if site.irreps_out is None else None

    def build(self, site: Site, weight: Tensor) -> BottleneckActivation:
        return BottleneckActivation(site, weight, self)
