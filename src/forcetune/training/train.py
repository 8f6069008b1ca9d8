"""Training an attached adapter from graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from forcetune.backbones.protocol import Backbone
from forcetune.config import TrainingConfig
from forcetune.errors import InputError
from forcetune.evaluation.metrics import EVALUATION_ATOMS, Errors
from forcetune.graphs.graph import Batch
from forcetune.graphs.loader import BatchLoader
from forcetune.graphs.stored_graphs import StoredGraphs, any_label, measure_graphs
from forcetune.kernels.precision import full_precision
from forcetune.training.callbacks import Checkpoint, MetricsTable, ProgressBar
from forcetune.training.hessian import HessianLoss
from forcetune.training.module import FineTuning, Observer
from forcetune.training.outcome import TrainingOutcome
from forcetune.training.penalty import Penalty
from forcetune.training.replay import Replay
from forcetune.utils import distributed


def train(
    backbone: Backbone,
    config: TrainingConfig,
    learning_rate: float,
    training: Sequence[Batch],
    validation: Sequence[Batch],
    folder: Path,
    save_best: Callable[[Errors], None],
    *,
    trackers: Sequence[Observer] = (),
    state: dict[str, Any] | None = None,
    save_state: Callable[[dict[str, Any]], None] | None = None,
    observe: Callable[[int, Errors], None] | None = None,
    console: Console | None = None,
    replay: Replay | None = None,
    penalty: Penalty | None = None,
    hessian: HessianLoss | None = None,
    frame_name: Callable[[int], str] | None = None,
) -> TrainingOutcome:
    """Train the adapter attached to ``backbone``.

    Args:
        backbone: carries the adapter.
        config: the optimisation.
        learning_rate: of the first stage.
        training, validation: graphs with labels.
        folder: run folder; ``metrics.csv`` goes there.
        save_best: called with the validation errors whenever the validation loss is the lowest so far (of the
            stage), while the adapter has the weights that count.
        trackers: further observers (:func:`forcetune.training.trackers.start_trackers`).
        state: of an earlier training that is to go on, as ``save_state`` was given it.
        save_state: called after every epoch that was validated.
        observe: called with epoch and errors of every validation; what it raises ends the training.
        console: where progress is printed; standard error by default.
        replay: graphs that every epoch has some of between those of ``training``.
        penalty: what changes of the foundation model cost in every step.
        hessian: the term of Hessian labels, where the loss has one.
        frame_name: what to call the frame of a number among ``training``, for messages.

    Raises:
        InputError: a graph exceeds the batch budget, or labels for the loss are missing.
        ForcetuneError: the loss is no longer finite.
    """
    check_trainable_labels(config, training)
    loader, valid_loader = _loaders(backbone, config, training, validation, replay)
    head = None if replay is None else replay.head
    module = FineTuning(backbone, config, learning_rate, loader, save_best, observe, head, penalty, hessian)
    module.shares_validation = _shares_validation(validation)
    module.keeps_validation = not isinstance(validation, StoredGraphs)
    module.frame_name = frame_name
    module.tell = _teller(console)
    if state is not None:
        _restore(module, state, folder)
    observers: list[Observer] = [MetricsTable(folder), ProgressBar(console), *trackers]
    if save_state is not None:
        observers.append(Checkpoint(save_state))
    return _run_timed(module, valid_loader, observers)


def _run_timed(module: FineTuning, validation: BatchLoader, observers: Sequence[Observer]) -> TrainingOutcome:
    """Train what is left to train."""
    began, steps_before = time.monotonic(), module.steps_done
    if module.is_over:
        status = _status(module)
    else:
        module.compile_steps(module.tell)
        status = _run(module, validation, observers)
    seconds = time.monotonic() - began
    return TrainingOutcome(
        status=status,
        epochs_done=module.epochs_done,
        steps=module.steps_done,
        best_epoch=module.best_epoch,
        best_valid_loss=module.best_loss,
        seconds=seconds,
        seconds_per_step=seconds / max(1, module.steps_done - steps_before),
        traced_operations=0 if module.compiled is None else module.compiled.operations,
        untraced=module.eager_reason,
        epochs_skipped=module.skipped,
    )


def _restore(module: FineTuning, state: dict[str, Any], folder: Path) -> None:
    """
    Raises:
        InputError: the state is of a run with other options, or of another version.
    """
    try:
        module.load_training_state(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder}: its checkpoint does not fit config.yaml, which has changed since the run began (or forcetune "
            "has); undo the changes, or start a new run with `fit`."
        ) from error


def _teller(console: Console | None) -> Callable[[str], None]:
    console_used = console or Console(stderr=True, soft_wrap=True, emoji=False)
    return lambda text: console_used.print(text, highlight=False)


def _loaders(
    backbone: Backbone,
    config: TrainingConfig,
    training: Sequence[Batch],
    validation: Sequence[Batch],
    replay: Replay | None,
) -> tuple[BatchLoader, BatchLoader]:
    loader = BatchLoader(
        training,
        config.batch_size,
        batch_atoms=config.batch_atoms,
        batch_edges=config.batch_edges,
        shuffle=True,
        seed=config.seed,
        replay=() if replay is None else replay.graphs,
        replay_ratio=0.0 if replay is None else replay.ratio,
    )
    budget = max(EVALUATION_ATOMS, int(measure_graphs(validation)[:, 0].max()))
    mine = distributed.select_part(validation) if _shares_validation(validation) else validation
    return loader, BatchLoader(mine, len(mine), batch_atoms=budget)


def _shares_validation(validation: Sequence[Batch]) -> bool:
    """With fewer frames than processes each validates on all."""
    return len(validation) >= distributed.place().count


def _run(module: FineTuning, validation: BatchLoader, observers: Sequence[Observer]) -> str:
    """Train to an end, whichever it is; says which."""
    try:
        with full_precision():
            module.run(validation, observers)
    except KeyboardInterrupt:
        if module.best_epoch == 0:
            raise
        return "interrupted"
    return _status(module)


def _status(module: FineTuning) -> str:
    return "stopped early" if module.stopped and module.epochs_done < module.epochs else "finished"


def check_trainable_labels(config: TrainingConfig, graphs: Sequence[Batch]) -> None:
    """
    Raises:
        InputError: a term of the loss has a weight but no frame has its label.
    """
    stages = [config.loss] + ([config.second_stage.loss] if config.second_stage.start is not None else [])
    for name in ("energy", "forces", "stress", "moments", "magforces"):
        weight = max(getattr(stage, name) or 0.0 for stage in stages)
        if weight > 0 and not any_label(graphs, name):
            raise InputError(
                f"the loss weighs {name} by {weight:g}, but no training frame has {name} labels; "
                f"set data.{name}_key, or training.loss.{name}=0."
            )
    if all(
        max(stage.energy, stage.forces, stage.stress_weight, stage.moments, stage.magforces_weight, stage.hessian) == 0
        for stage in stages
    ):
        raise InputError("every weight of the loss is zero; set training.loss.energy or training.loss.forces.")
