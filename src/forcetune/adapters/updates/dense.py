"""Train the whole weight, or none of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from forcetune.adapters.updates.base import Update, WeightUpdate
from forcetune.backbones.protocol import Site


class DenseWeight(WeightUpdate):
    """W' is a parameter of its own that starts at W; the frozen W stays as it was."""

    weight_shaped: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(self, site: Site, weight: Tensor) -> None:
        super().__init__()
        self.paths = site.paths
        self.value = nn.Parameter(weight.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        return self.value

    def tensors(self) -> dict[str, Tensor]:
        flat = self.value.data.view(-1)
        return {path.name: flat[path.start : path.start + path.size].view(path.shape) for path in self.paths}


@dataclass(frozen=True)
class Dense(Update):
    """Every element of the weight is trained: W' = W + ΔW."""

    name: ClassVar[str] = "Dense"

    def build(self, site: Site, weight: Tensor) -> DenseWeight:
        return DenseWeight(site, weight)


@dataclass(frozen=True)
class Frozen(Update):
    """The weight stays what it is."""

    name: ClassVar[str] = "Frozen"

    def build(self, site: Site, weight: Tensor) -> None:
        return None
