"""A magnetic layer as a part of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from forcetune.adapters.methods import Method
from forcetune.adapters.updates.base import ParameterOptions, TrainablePart
from forcetune.backbones.protocol import Backbone, Extra
from forcetune.config import MagnetismConfig
from forcetune.frames.frame import Frame, LabelKeys
from forcetune.frames.spins import resolved_inputs
from forcetune.graphs.graph import Batch
from forcetune.magnetism.options import Magnetism


class MagneticPart(TrainablePart):
    """The layer that an adapter adds to its backbone.

    Attributes:
        layer: :class:`forcetune.magnetism.layer.SpinLayer` or ``MagnitudeLayer``.
    """

    def __init__(self, options: Magnetism, backbone: Backbone) -> None:
        super().__init__()
        self.layer = options.build(backbone.n_scalars, backbone.cutoff, dtype=backbone.dtype, device=backbone.device)
        self._rate = options.learning_rate
        self._directions = options.layer == "spin" and options.takes_directions

    def forward(self, scalars: Tensor, vectors: Tensor, batch: Batch) -> Extra:
        if self._directions:
            # lengths make no difference, so that the derivative by a direction is what turns it
            batch = replace(batch, spins=_unit(batch.spins))
        return self.layer(scalars, vectors, batch)

    def options(self) -> dict[str, ParameterOptions]:
        """It starts from nothing and learns at its own rate, whatever that of the run is."""
        return {name: ParameterOptions(learning_rate=self._rate) for name, _ in self.named_parameters()}


def _unit(spins: Tensor) -> Tensor:
    """(atoms, 3) with length 1; zero, and without a derivative, where they are zero or not known."""
    # what is not known must not meet a product: 0 · NaN would reach the weights by second derivatives
    spins = torch.nan_to_num(spins)
    squared = spins.square().sum(dim=1, keepdim=True)
    known = squared > 0
    return spins * torch.where(known, torch.rsqrt(torch.where(known, squared, 1.0)), 0.0)


def with_magnetism(method: Method, config: MagnetismConfig, keys: LabelKeys, frames: Sequence[Frame]) -> Method:
    """The method with the magnetic layer that a configuration asks for, if it does.

    Args:
        method: the table of updates.
        config: the layer.
        keys: what the training frames have.
        frames: those, with the state that the layer is given.
    """
    if config.layer == "off":
        return method
    inputs = resolved_inputs(config.inputs, keys, frames)
    options = Magnetism.model_validate(config.model_dump() | {"inputs": inputs})
    return replace(method, magnetism=options)
