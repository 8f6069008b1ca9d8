"""Sparsity-promoting update (arXiv 2606.18691, ICLR 2026)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from forcetune.adapters.updates.base import ParameterOptions, Update, WeightUpdate
from forcetune.backbones.protocol import Site


def logit(probability: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(probability / (1 - probability))


class SparseWeight(WeightUpdate):
    """W' = W + S(ΔW, δ) with S(x, δ) = sign(x) · ReLU(|x| − δ) and δ = σ(τ), τ learnable.

    ΔW starts as noise, since an entry below the threshold has no gradient: at zero nothing would ever start. A fresh
    adapter therefore changes the model a little.
    """

    elementwise: ClassVar[tuple[str, ...]] = ("change",)

    def __init__(self, site: Site, weight: Tensor, spec: SoftThreshold) -> None:
        super().__init__()
        self.paths = site.paths
        self.spec = spec
        self.change = nn.Parameter(spec.std * torch.randn_like(weight))
        n_thresholds = len(site.paths) if spec.per_path else 1
        start = logit(spec.threshold)
        self.tau = nn.Parameter(torch.full((n_thresholds,), start, dtype=weight.dtype, device=weight.device))

    @property
    def thresholds(self) -> Tensor:
        """δ, one for the site or one for each path."""
        return torch.sigmoid(self.tau)

    def update(self) -> Tensor:
        """S(ΔW, δ), in the shape of the weight."""
        delta = self.thresholds
        if len(delta) > 1:
            sizes = torch.tensor([path.size for path in self.paths], device=delta.device)
            delta = delta.repeat_interleave(sizes).view(self.change.shape)
        return torch.sign(self.change) * torch.relu(self.change.abs() - delta)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.update()

    @torch.no_grad()
    def n_changed(self) -> int:
        """Number of weights whose update is not zero."""
        return int(torch.count_nonzero(self.update()))

    @torch.no_grad()
    def leave_elements(self, absent: Sequence[int], count: int) -> None:
        """ΔW = 0, where it has no gradient and stays, for elements that nothing is trained on.

        They would keep the noise that ΔW starts as.

        Args:
            absent: their places in the model's table.
            count: elements in the table.
        """
        flat = self.change.view(-1)
        for path in self.paths:
            if path.by_element is not None and path.by_element[1] == count:
                flat[path.start : path.start + path.size].view(path.by_element)[:, list(absent)] = 0

    def options(self) -> dict[str, ParameterOptions]:
        """τ has a learning rate and a decay of its own: the decay pulls δ up, towards σ(0) = ½.

        ΔW decays everywhere, decoupled from its gradient, by the run's weight decay λ_Δ.
        """
        spec = self.spec
        shrink = None
        if spec.final_threshold is not None:
            shrink = logit(spec.final_threshold) / logit(spec.threshold)
        return {
            "change": ParameterOptions(decay=None),
            "tau": ParameterOptions(rate=spec.threshold_rate, decay=spec.threshold_decay, shrink=shrink),
        }

    def packed(self) -> dict[str, Tensor]:
        """τ, and of every path the places and values of the changed weights."""
        flat = self.update().detach().view(-1)
        tensors = {"tau": self.tau.detach()}
        for path in self.paths:
            part = flat[path.start : path.start + path.size]
            places = part.nonzero()[:, 0]
            tensors[f"{path.name}/index"] = places.to(torch.int32)
            tensors[f"{path.name}/value"] = part[places]
        return tensors

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """ΔW such that its thresholded values are the stored ones, and zero elsewhere."""
        self._copy("tau", self.tau, tensors["tau"])
        flat = torch.zeros_like(self.change).view(-1)
        delta = self.thresholds.expand(len(self.paths)) if len(self.tau) == 1 else self.thresholds
        for path, threshold in zip(self.paths, delta, strict=True):
            index, value = tensors[f"{path.name}/index"], tensors[f"{path.name}/value"]
            if index.dtype != torch.int32 or index.ndim != 1 or index.shape != value.shape:
                raise ValueError(f"{path.name}: places and values do not belong together")
            if len(index) and (int(index.min()) < 0 or int(index.max()) >= path.size):
                raise ValueError(f"{path.name}: a place lies outside of the weight")
            value = value.to(flat)
            flat[path.start + index.long().to(flat.device)] = value + torch.sign(value) * threshold
        self.change.copy_(flat.view(self.change.shape))


@dataclass(frozen=True)
class SoftThreshold(Update):
    """Only weights that want to change by more than a learned threshold do.

    The threshold's own weight decay λ_τ is the knob: more decay, fewer changed weights. Decays are meant to be
    decoupled from the gradients, as schedule-free AdamW does it. What a decay does depends on the number of steps:
    alone it brings τ to τ₀ exp(−η_τ λ_τ T), so that the published ones belong to runs of some thousand steps.
    ``final_threshold`` says instead where it shall lead, in a run of any length.

    Attributes:
        std: standard deviation of ΔW at the start.
        threshold: δ at the start.
        threshold_decay: λ_τ.
        final_threshold: δ to which decay alone would bring the thresholds by the end of the run (of schedule-free
            averages: those averages); λ_τ follows from it, and ``threshold_decay`` does not count.
        threshold_rate: learning rate of τ in units of that of ΔW.
        per_path: one threshold for each path instead of one for the site.
    """

    std: Annotated[float, Field(gt=0)] = 0.01
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.001
    threshold_decay: Annotated[float, Field(ge=0)] = 0.01
    final_threshold: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    threshold_rate: Annotated[float, Field(gt=0)] = 1.0
    per_path: bool = False
    name: ClassVar[str] = "SoftThreshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_threshold is not None and self.final_threshold < self.threshold:
            raise ValueError(
                f"final_threshold: {self.final_threshold:g} is below the threshold at the start ({self.threshold:g}), "
                "and decay only raises it; name a larger one"
            )

    def build(self, site: Site, weight: Tensor) -> SparseWeight:
        return SparseWeight(site, weight, self)
