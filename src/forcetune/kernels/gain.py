"""What gates multiply channels by."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GainKind = Literal["exp", "linear"]

LARGEST_EXPONENT = 10.0
"""Beyond this argument the exponential goes on as its tangent: gains of e^10 are met in no sane run, and neither the
gain nor its derivative can overflow, in float32 either."""


def gain_and_slope(kind: GainKind, x: Tensor) -> tuple[Tensor, Tensor]:
    """φ(x) and φ′(x).

    ``exp``: eˣ, continued by its tangent beyond :data:`LARGEST_EXPONENT`; once continuously differentiable, positive.
    ``linear``: 1 + x.
    """
    if kind == "linear":
        return 1 + x, torch.ones_like(x)
    capped = x.clamp(max=LARGEST_EXPONENT)
    slope = capped.exp()
    return torch.addcmul(slope, slope, x - capped), slope
