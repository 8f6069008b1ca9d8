"""Which derivatives are wanted at the moment: those for the forces, or those of a loss by the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Phase:
    """Shared by the kernels of one forward pass, read when they are differentiated.

    An autograd function knows which of its inputs can have gradients, not which gradients are asked for.
    While forces are computed those by the weights are not, and when a loss is differentiated by the weights
    those by the geometry are not.

    Attributes:
        geometry: gradients by distances, directions and all that depends on them are wanted.
        weights: gradients by weights, and by features that do not depend on the geometry, are wanted.
        twice: gradients may be differentiated again.
        curved: gradients by the geometry may be differentiated by the geometry again, as for Hessians.
    """

    __slots__ = ("curved", "geometry", "twice", "weights")

    def __init__(self, *, twice: bool = True, curved: bool | None = None) -> None:
        self.geometry = True
        self.weights = True
        self.twice = twice
        self.curved = twice if curved is None else curved

    def wants(self, *, geometric: bool, trains: bool) -> bool:
        """Whether the gradient by something that depends on the geometry, or on weights, is asked for."""
        return (self.geometry and geometric) or (self.weights and trains)

    @contextmanager
    def forces(self) -> Iterator[None]:
        """While forces are computed."""
        before, self.weights = self.weights, False
        try:
            yield
        finally:
            self.weights = before

    def forces_are_done(self) -> None:
        """From now on only gradients by the weights are wanted."""
        self.geometry = False


class Cut(torch.autograd.Function):
    """The identity; its gradient is passed on only while those by the geometry are wanted."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, phase: Phase) -> Tensor:
        ctx.phase = phase
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return (grads[0] if ctx.phase.geometry else None), None
