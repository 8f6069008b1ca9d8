"""How a training and a refinement went, and what changes cost, in numbers, as ``results.json`` holds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainingOutcome:
    """How a training went.

    Attributes:
        status: ``finished``, ``stopped early`` or ``interrupted`` (by Ctrl-C; the best adapter so far is kept).
        epochs_done, steps: what was done.
        epochs_skipped: of the first stage, which early stopping ended; the second one was whole.
        best_epoch, best_valid_loss: of the adapter that was kept.
        seconds, seconds_per_step: wall time of the training, validation included, and its share of one step.
        traced_operations: of the graph that computed the steps; 0 where they were eager.
        untraced: why they were.
    """

    status: str
    epochs_done: int
    steps: int
    best_epoch: int
    best_valid_loss: float
    seconds: float
    seconds_per_step: float
    traced_operations: int = 0
    untraced: str | None = None
    epochs_skipped: int = 0


@dataclass(frozen=True, slots=True)
class Refinement:
    """What a refinement did.

    Attributes:
        iterations: of L-BFGS, done.
        best_iteration: after which the validation loss was lowest; 0 is the adapter as training left it.
        train_loss_before, train_loss_after: over all training frames, at the start and after ``best_iteration``.
        valid_loss_before, valid_loss_after: the same on the validation frames.
    """

    iterations: int
    best_iteration: int
    train_loss_before: float
    train_loss_after: float
    valid_loss_before: float
    valid_loss_after: float


@dataclass(frozen=True, slots=True)
class PenaltyTerms:
    """Values of the terms, in units of the loss; None for those that are left out.

    Attributes:
        l2sp, ewc, gates: λ/2 · (…) of each.
        source, n_frames: frames that ``ewc`` and ``gates`` looked at; empty and 0 where neither is set.
    """

    l2sp: float | None
    ewc: float | None
    gates: float | None
    source: str = ""
    n_frames: int = 0
