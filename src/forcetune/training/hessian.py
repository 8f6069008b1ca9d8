"""The loss of Hessian labels: forces of displaced copies against products of the labels with random directions.

For a direction z with |z|² = 3N, r = (H z − H_ref z) / √(3N) has mean squares that average to those of the entries of
H − H_ref. H z comes from central differences of forces (:mod:`forcetune.evaluation.hessian`), so that the second
derivatives that a training by forces needs are enough.

The form of the loss applies to each component of r: ``universal`` is ``huber`` here, with ``huber_delta`` in eV/Å², and
``l1l2`` is ``mae``, since what sets these two apart is defined for forces. The weight of a label in the file multiplies
the result in every form.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from forcetune.backbones.protocol import Backbone
from forcetune.config import LossConfig
from forcetune.evaluation.hessian import hessian_products
from forcetune.frames.frame import FloatArray, Frame
from forcetune.training.losses import pointwise_loss
from forcetune.utils import distributed

_VALIDATION = 0
"""Epochs of the training count from 1."""


class HessianLoss:
    """The Hessian term of a run, eager also where the rest of the step is recorded.

    Directions depend on the seed, the epoch and the number of the frame alone, so that a resumed run has the same.

    Attributes:
        training, validation: frames by their number, of which those with a label count.
    """

    def __init__(self, backbone: Backbone, training: Sequence[Frame], validation: Sequence[Frame], seed: int) -> None:
        self.backbone = backbone
        self.seed = seed
        self.training, self.validation = (
            {number: frame for number, frame in enumerate(frames) if frame.hessian is not None}
            for frames in (training, validation)
        )

    def compute(self, config: LossConfig, numbers: Sequence[int], epoch: int) -> Tensor | None:
        """This process's share of the term of a step, a scalar in float64; None where there is none.

        Args:
            config: weight, number of directions, and form.
            numbers: of the frames in the whole batch; those behind the training frames are replay frames.
            epoch: counted from 1.
        """
        labelled = [number for number in numbers if number in self.training]
        if not config.hessian or not labelled:
            return None
        here = distributed.place()
        mine = labelled[here.rank :: here.count] if distributed.joined() else labelled
        if not mine:
            return torch.zeros((), dtype=torch.float64, device=self.backbone.device)
        whole = sum(3 * len(self.training[number]) for number in labelled) * config.hessian_directions
        frames = [(number, self.training[number]) for number in mine]
        return config.hessian * self._sum(config, frames, epoch, create_graph=True) / whole

    def validate(self, config: LossConfig) -> float:
        """The term over all validation frames, each in the same directions every time; 0 where none has a label."""
        if not config.hessian or not self.validation:
            return 0.0
        sums = [
            float(self._sum(config, [(number, frame)], _VALIDATION).detach())
            for number, frame in self.validation.items()
        ]
        whole = sum(3 * len(frame) for frame in self.validation.values()) * config.hessian_directions
        return config.hessian * sum(sums) / whole

    def _sum(
        self, config: LossConfig, frames: Sequence[tuple[int, Frame]], epoch: int, *, create_graph: bool = False
    ) -> Tensor:
        """Over frames, directions and components."""
        displaced = [
            (frame, direction)
            for number, frame in frames
            for direction in self._directions(config.hessian_directions, len(frame), epoch, number)
        ]
        parts = []
        products = hessian_products(self.backbone, displaced, create_graph=create_graph)
        for (frame, _), (direction, product) in zip(displaced, products, strict=True):
            assert frame.hessian is not None
            reference = torch.as_tensor(frame.hessian @ direction, device=product.device)
            errors = (product - reference) / len(direction) ** 0.5
            parts.append(frame.hessian_weight * pointwise_loss(config, errors).sum())
        return torch.stack(parts).sum()

    def _directions(self, count: int, atoms: int, epoch: int, number: int) -> FloatArray:
        """(count, atoms, 3), of length √(3 atoms)."""
        values = np.random.default_rng((self.seed, epoch, number, 2)).standard_normal((count, 3 * atoms))
        values *= (3 * atoms) ** 0.5 / np.linalg.norm(values, axis=1, keepdims=True)
        return values.reshape(count, atoms, 3)
