"""A short second-order refinement of a trained adapter: L-BFGS on all training frames at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from forcetune.adapters.attach import require_adapter
from forcetune.backbones.protocol import Backbone
from forcetune.config import LossConfig, TrainingConfig
from forcetune.evaluation.metrics import EVALUATION_ATOMS, evaluation_batches, gather
from forcetune.graphs.graph import Batch
from forcetune.graphs.stored_graphs import StoredGraphs
from forcetune.training.losses import LossSums, compute_loss, label_weights
from forcetune.training.outcome import Refinement
from forcetune.training.penalty import Penalty
from forcetune.training.replay import Replay
from forcetune.training.replay_head import objective

PATIENCE = 5
HISTORY = 20
EVALUATIONS = 25
"""Of the loss, at most, along one line."""


def refine(
    backbone: Backbone,
    config: TrainingConfig,
    training: Sequence[Batch],
    validation: Sequence[Batch],
    *,
    replay: Replay | None = None,
    penalty: Penalty | None = None,
    progress: Callable[[int], None] | None = None,
    batch_atoms: int = EVALUATION_ATOMS,
) -> Refinement:
    """Go on from a trained adapter by L-BFGS with strong-Wolfe line searches (Nocedal & Wright, algorithm 7.5).

    The adapter ends with the parameters of the lowest validation loss, which may be those it came with. The loss is
    that of the last stage. It stops after :data:`PATIENCE` iterations without a lower validation loss.

    Args:
        backbone: carries the adapter, changed in place.
        config: ``refine`` iterations at most, and the loss.
        training, validation: graphs with labels.
        replay: graphs that count as they do in training, all of them here; their head is no longer trained.
        penalty: counts beside the loss of the training frames, and is part of the losses reported for them.
        progress: called with the number of each iteration.
        batch_atoms: atoms whose loss is differentiated at once, which takes memory.
    """
    adapter = require_adapter(backbone)
    loss = config.loss if config.second_stage.start is None else config.second_stage.loss
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    # by default a single iteration has one evaluation, which leaves the line search none
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=1, max_eval=1 + EVALUATIONS, history_size=HISTORY, line_search_fn="strong_wolfe"
    )
    training_loss = _TrainingLoss(backbone, loss, _Weighted(training, replay, backbone, batch_atoms), replay, penalty)
    validation_loss = _ValidationLoss(backbone, loss, validation, batch_atoms)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return training_loss.differentiate()

    before = validation_loss.compute()
    losses: list[float] = []
    best, best_loss, best_iteration, iteration = _copies(parameters), before, 0, 0
    while iteration < (config.refine or 0) and iteration - best_iteration < PATIENCE:
        losses.append(float(optimizer.step(closure)))  # pyright: ignore[reportArgumentType]
        iteration += 1
        current = validation_loss.compute()
        if not math.isfinite(current):
            break
        if current < best_loss:
            best, best_loss, best_iteration = _copies(parameters), current, iteration
        if progress is not None:
            progress(iteration)
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    # a step returns the loss that it began with
    after = losses[best_iteration] if best_iteration < len(losses) else float(closure())
    optimizer.zero_grad()
    return Refinement(iteration, best_iteration, losses[0], after, before, best_loss)


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


class _TrainingLoss:
    """The loss of all training frames, batch by batch, and the penalty."""

    def __init__(
        self,
        backbone: Backbone,
        loss: LossConfig,
        batches: Iterable[Batch],
        replay: Replay | None,
        penalty: Penalty | None,
    ) -> None:
        self.backbone, self.loss, self.batches, self.penalty = backbone, loss, batches, penalty
        self.head = None if replay is None else replay.head
        self.label_weights = _label_weights(backbone, loss, batches)

    def differentiate(self) -> Tensor:
        """The loss; its gradient is added to those of the parameters."""
        total = torch.zeros((), dtype=torch.float64, device=self.backbone.device)
        for batch in self.batches:
            # means over the labels of all batches, not of this one
            of_terms = iter(self.label_weights)
            part = objective(
                self.backbone, self.head, self.loss, batch, total=lambda _, of_terms=of_terms: next(of_terms)
            )
            part.backward()
            total += part.detach()
        if self.penalty is not None:
            cost = self.penalty.compute()
            cost.backward()
            total += cost.detach()
        return total


class _ValidationLoss:
    """The loss of all validation frames; of streamed ones as sums, otherwise of all predictions at once."""

    def __init__(self, backbone: Backbone, loss: LossConfig, validation: Sequence[Batch], atoms: int) -> None:
        self.backbone, self.loss = backbone, loss
        self.batches = evaluation_batches(validation, backbone.device, atoms)
        self.streams = isinstance(validation, StoredGraphs)

    def compute(self) -> float:
        stress = self.loss.stress_weight > 0
        pairs = ((batch, self.backbone.predict(batch, stress=stress).detached()) for batch in self.batches)
        if self.streams:
            sums = LossSums(self.loss)
            for batch, prediction in pairs:
                sums.add(prediction, batch)
            return sums.loss()
        batch, prediction = gather(list(pairs))
        return float(compute_loss(self.loss, prediction, batch))


def _label_weights(backbone: Backbone, loss: LossConfig, batches: Iterable[Batch]) -> list[Tensor]:
    """The sum of the weights of each term's labels over all batches."""
    if not loss.moments:
        of_batches = [torch.stack(label_weights(loss, batch)) for batch in batches]
        return list(torch.stack(of_batches).sum(0).unbind())
    # moments are labelled in the shape of what is predicted
    labels = LossSums(loss)
    for batch in batches:
        labels.add(backbone.predict(batch, stress=loss.stress_weight > 0).detached(), batch)
    return [whole.to(backbone.device) for whole in labels.wholes()]


class _Weighted:
    """Batches of all frames, each with the weight that it has in an epoch."""

    def __init__(self, training: Sequence[Batch], replay: Replay | None, backbone: Backbone, atoms: int) -> None:
        self.kinds = [(evaluation_batches(training, backbone.device, atoms), 1.0)]
        if replay is not None:
            often = replay.ratio * len(training) / len(replay.graphs)
            self.kinds.append((evaluation_batches(replay.graphs, backbone.device, atoms), often))

    def __iter__(self) -> Iterator[Batch]:
        for batches, often in self.kinds:
            for batch in batches:
                yield replace(batch, weight=often * batch.weight)
