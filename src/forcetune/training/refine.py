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
        progress: called with the number of each iteration.
        batch_atoms: atoms whose loss is differentiated at once, which takes memory.
    """
    adapter = require_adapter(backbone)
    loss = config.loss if config.second_stage.start is None else config.second_stage.loss
    parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    batches = _Weighted(training, replay, backbone, batch_atoms)
    head = None if replay is None else replay.head

    validating = evaluation_batches(validation, backbone.device, batch_atoms)

    wholes = _label_weights(backbone, loss, batches)

    def closure() -> Tensor:
        """The loss of all frames, batch by batch, with its gradient."""
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=backbone.device)
        for batch in batches:
            # means over the labels of all batches, not of this one
            of_terms = iter(wholes)
            part = objective(backbone, head, loss, batch, total=lambda _, of_terms=of_terms: next(of_terms))
            part.backward()
            total += part.detach()
        return total

    def valid_loss() -> float:
        pairs = ((b, backbone.predict(b, stress=loss.stress_weight > 0).detached()) for b in validating)
        if isinstance(validation, StoredGraphs):
            sums = LossSums(loss)
            for batch, validation_loss in pairs:
                sums.add(validation_loss, batch)
            return sums.loss()
        batch, validation_loss = gather(list(pairs))
        return float(compute_loss(loss, validation_loss, batch))

    def kept() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in parameters]

    # by default a single iteration has one evaluation, which leaves the line search none
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=1, max_eval=1 + EVALUATIONS, history_size=HISTORY, line_search_fn="strong_wolfe"
    )
    before = valid_loss()
    losses: list[float] = []
    best, best_loss, best_iteration, iteration = kept(), before, 0, 0
    while iteration < (config.refine or 0) and iteration - best_iteration < PATIENCE:
        losses.append(float(optimizer.step(closure)))  # pyright: ignore[reportArgumentType]
        iteration += 1
        validation_loss = valid_loss()
        if not math.isfinite(validation_loss):
            break
        if validation_loss < best_loss:
            best, best_loss, best_iteration = kept(), validation_loss, iteration
        if progress is not None:
            progress(iteration)
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    # a step tells the loss that it began with
    after = losses[best_iteration] if best_iteration < len(losses) else float(closure())
    optimizer.zero_grad()
    return Refinement(iteration, best_iteration, losses[0], after, before, best_loss)


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
