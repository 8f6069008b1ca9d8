"""Low-rank update of every path of a weight (ELoRA, ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from forcetune.adapters.updates.base import Update, WeightUpdate
from forcetune.backbones.protocol import Site, WeightPath


class LowRankWeight(WeightUpdate):
    """W' = W + (α / r) A B on each path, with A ~ N(0, 1) and B = 0, so that W' = W at the start."""

    def __init__(self, site: Site, weight: Tensor, spec: LowRank) -> None:
        super().__init__()
        self.paths = site.paths
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        self.scales: list[float] = []
        options = {"dtype": weight.dtype, "device": weight.device}
        for path in site.paths:
            *fan_in, fan_out = path.shape
            rank = spec.rank_for(path)
            self.A[path.name] = nn.Parameter(torch.randn(*fan_in, rank, **options))
            self.B[path.name] = nn.Parameter(torch.zeros(rank, fan_out, **options))
            # ELoRA divides the contraction's A, of shape (elements, couplings, r), by the number of couplings
            couplings = fan_in[1] if len(fan_in) == 2 else 1
            self.scales.append(spec.alpha / spec.rank / couplings)

    def forward(self, weight: Tensor) -> Tensor:
        deltas = [
            (scale * (self.A[path.name] @ self.B[path.name])).reshape(-1)
            for path, scale in zip(self.paths, self.scales, strict=True)
        ]
        delta = deltas[0] if len(deltas) == 1 else torch.cat(deltas)
        return weight + delta.view(weight.shape)


@dataclass(frozen=True)
class LowRank(Update):
    """ELoRA: per path W' = W + (α / r) A B, inside the path's normalisation.

    For an equivariant linear layer A is (multiplicity in, r) and B (r, multiplicity out); for a tensor product
    A is (m₁ m₂, r); for a radial layer (inputs, r); for a contraction A is (elements, couplings, r) divided by the
    number of couplings and B (r, channels). All act on multiplicities only, so equivariance is untouched.

    Attributes:
        rank: r.
        alpha: α.
        cap_rank: cap r at what a path can use, min(fan in, fan out). Off, as published, a path narrower than r
            only costs parameters.
    """

    rank: int = 16
    alpha: float = 16.0
    cap_rank: bool = False
    name: ClassVar[str] = "LowRank"

    def rank_for(self, path: WeightPath) -> int:
        """Rank used on ``path``."""
        if not self.cap_rank:
            return self.rank
        fan_in = path.size // path.shape[-1]
        return min(self.rank, fan_in, path.shape[-1])

    def reason_against(self, site: Site) -> str | None:
        if any(len(path.shape) < 2 for path in site.paths):
            return "a vector has no low-rank factors"
        return None

    def build(self, site: Site, weight: Tensor) -> LowRankWeight:
        return LowRankWeight(site, weight, self)
