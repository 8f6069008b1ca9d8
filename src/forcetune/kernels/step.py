"""What the layers of one forward pass share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.phase import Phase


@dataclass(frozen=True, slots=True)
class Step:
    """Atoms and pairs are those of the plan, in its order.

    Attributes:
        plan: of the batch.
        phase: which derivatives are wanted.
        harmonics: (pairs, Σ 2 l + 1) spherical harmonics.
        radial: (pairs, basis) radial features.
        cutoff: (pairs, 1) envelope to be applied to radial weights, or None.
        attributes: (atoms, species) one-hot.
    """

    plan: Plan
    phase: Phase
    harmonics: Tensor
    radial: Tensor
    cutoff: Tensor | None
    attributes: Tensor


def can_train(module: nn.Module) -> bool:
    """Whether a weight of the module requires a gradient, or a gate or hook may bring one in."""
    return any(parameter.requires_grad for parameter in module.parameters()) or any(
        part._forward_hooks or part._forward_pre_hooks or part.__dict__.get("gated_by") is not None
        for part in module.modules()
    )
