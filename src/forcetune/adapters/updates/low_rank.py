"""Low-rank update of every path of a weight (ELoRA, ICML 2025), and refinements of it that keep what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from forcetune.adapters.updates.base import OUT, Axis, Rank, Update, WeightUpdate, channel_axis
from forcetune.backbones.protocol import Site, WeightPath
from forcetune.config import LARGEST_RANK


def as_matrix(flat: Tensor, path: WeightPath) -> Tensor:
    """The path's block of a flat weight as the matrix that is factorised, (everything but channels, channels)."""
    return flat[path.start : path.start + path.size].view(-1, path.shape[-1])


class LowRankWeight(WeightUpdate):
    """W' = W + s A B on each path, with B = 0 at the start, so that W' = W.

    With ``norms`` every output channel of W + s A B is brought to a trained norm, which starts at that of W.
    """

    def __init__(self, site: Site, weight: Tensor, spec: LowRank) -> None:
        super().__init__()
        self.paths = site.paths
        self.spec = spec
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        self.norm = nn.ParameterDict()
        self.scales: dict[str, float] = {}
        options = {"dtype": weight.dtype, "device": weight.device}
        for path in site.paths:
            rank = spec.rank_at(site, path)
            if rank == 0:
                continue
            *fan_in, fan_out = path.shape
            self.A[path.name] = nn.Parameter(torch.randn(*fan_in, rank, **options))
            self.B[path.name] = nn.Parameter(torch.zeros(rank, fan_out, **options))
            # ELoRA divides the contraction's A, of shape (elements, couplings, r), by the number of couplings
            couplings = fan_in[1] if len(fan_in) == 2 else 1
            self.scales[path.name] = spec.scale / couplings
            if spec.norms:
                block = as_matrix(weight.detach().reshape(-1), path)
                self.norm[path.name] = nn.Parameter(torch.linalg.vector_norm(block, dim=self._fan_in_axis(path)))

    def _fan_in_axis(self, path: WeightPath) -> int:
        """The axis of a path as a matrix that the norm of a channel sums over."""
        return 1 if channel_axis(path, self.spec.axis) == 0 else 0

    @torch.no_grad()
    def start_from(self, gradient: Tensor) -> None:
        """Let A span what the loss pulls at most: the leading left singular vectors of the gradient by the weight.

        B stays zero, so that the model is unchanged, and its first step is the best one of this rank. Columns of A
        have the length that random ones have on average.

        Args:
            gradient: of the loss, with the shape of the weight.
        """
        flat = gradient.detach().reshape(-1)
        for path in self.paths:
            if path.name in self.A:
                factor = self.A[path.name]
                left = torch.linalg.svd(as_matrix(flat, path), full_matrices=False)[0][:, : factor.shape[-1]]
                rows = factor.view(-1, factor.shape[-1])
                rows[:, : left.shape[1]] = left.to(rows) * math.sqrt(len(rows))

    @torch.no_grad()
    def leave_elements(self, absent: Sequence[int], count: int) -> None:
        """A = 0 in the rows of elements that nothing is trained on, where it has no gradient and stays.

        They would move with B by random amounts. With ``norms`` they still follow the norms of the channels, which go
        over the rows of all elements.

        Args:
            absent: their places in the model's table.
            count: elements in the table.
        """
        for path in self.paths:
            if path.name in self.A and path.by_element is not None and path.by_element[1] == count:
                outer, _, inner = path.by_element
                # where channels come last, the rows of A have the order of the weight
                if inner % path.shape[-1] == 0:
                    self.A[path.name].view(outer, count, -1)[:, list(absent)] = 0

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(-1)
        parts = []
        for path in self.paths:
            block = flat[path.start : path.start + path.size]
            if path.name in self.scales:
                block = block + (self.scales[path.name] * (self.A[path.name] @ self.B[path.name])).reshape(-1)
                if path.name in self.norm:
                    matrix = block.view(-1, path.shape[-1])
                    # a channel without weights has no norm to keep: it stays zero
                    axis = self._fan_in_axis(path)
                    length = torch.linalg.vector_norm(matrix, dim=axis).clamp(min=torch.finfo(matrix.dtype).tiny)
                    block = (matrix * (self.norm[path.name] / length).unsqueeze(axis)).reshape(-1)
            parts.append(block)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(weight.shape)


@dataclass(frozen=True)
class LowRank(Update):
    """ELoRA: per path W' = W + (α / r) A B, inside the path's normalisation, A ~ N(0, 1).

    For an equivariant linear layer A is (multiplicity in, r) and B (r, multiplicity out); for a tensor product
    A is (m₁ m₂, r); for a radial layer (inputs, r); for a contraction A is (elements, couplings, r) divided by the
    number of couplings and B (r, channels). All act on multiplicities only, so equivariance is untouched.

    Attributes:
        rank: r.
        alpha: α.
        cap_rank: cap r at what a path can use, min(fan in, fan out). Off, as published, a path narrower than r
            only costs parameters.
        norms: train the norm of every output channel apart from its direction (DoRA, arXiv 2402.09353, on
            multiplicities).
        init: A at random, or from the gradient of the first batches (``gradient``; compare arXiv 2407.05000).
        ranks: ranks of single paths, by ``site/path``; 0 leaves a path frozen. Others have ``rank``.
        axis: ``last`` only in adapters of earlier versions, where the norms of a transposed radial layer belong to its
            inputs.
    """

    rank: Rank = 16
    alpha: Annotated[float, Field(gt=0)] = 16.0
    cap_rank: bool = False
    norms: bool = False
    init: Literal["normal", "gradient"] = "normal"
    ranks: Mapping[str, Annotated[int, Field(ge=0, le=LARGEST_RANK)]] | None = None
    axis: Axis = OUT
    name: ClassVar[str] = "LowRank"
    internal: ClassVar[frozenset[str]] = frozenset({"ranks", "axis"})

    def __hash__(self) -> int:
        return hash((self.rank, self.alpha, self.cap_rank, self.norms, self.init, self.axis))

    @classmethod
    def earlier_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {"axis": "last"} | options if options.get("norms") else options

    def to_json(self) -> dict[str, Any]:
        content = super().to_json()
        if not self.norms:
            del content["axis"]  # earlier versions read it as it is
        return content

    def n_norms(self, path: WeightPath) -> int:
        """Norms that are trained on ``path``."""
        return path.shape[channel_axis(path, self.axis)] if self.norms else 0

    @property
    def scale(self) -> float:
        """The factor in front of A B, but for the contraction's couplings; the same for every path."""
        return self.alpha / self.rank

    def rank_at(self, site: Site, path: WeightPath) -> int:
        """Rank used on a path of a site."""
        if self.ranks is not None:
            return self.ranks.get(f"{site.name}/{path.name}", self.rank)
        return self.rank_for(path)

    def rank_for(self, path: WeightPath) -> int:
        """Rank used on ``path`` where it has none of its own."""
        return min(self.rank, full_rank(path)) if self.cap_rank else self.rank

    def cost(self, path: WeightPath) -> int:
        """Parameters for each unit of rank."""
        return path.size // path.shape[-1] + path.shape[-1]

    def unsupported_reason(self, site: Site) -> str | None:
        if any(len(path.shape) < 2 for path in site.paths):
            return "a vector has no low-rank factors"
        if self.ranks is not None and not any(self.rank_at(site, path) for path in site.paths):
            return "the budget gives it no rank"
        return None

    def build(self, site: Site, weight: Tensor) -> LowRankWeight:
        return LowRankWeight(site, weight, self)

    def describe(self) -> str:
        if self.ranks is None:
            return super().describe()
        used = [rank for rank in self.ranks.values() if rank]
        return f"LowRank(ranks {min(used, default=0)} to {max(used, default=0)}, alpha={self.alpha:g})"


def full_rank(path: WeightPath) -> int:
    """The largest rank a path can use, min(fan in, fan out)."""
    return min(path.size // path.shape[-1], path.shape[-1])
