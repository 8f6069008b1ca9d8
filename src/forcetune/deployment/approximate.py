"""A plain model near one with gates: fitted layer by layer, then distilled, and refused where it is too far.

A gate multiplies and shifts what a linear layer puts out by functions of the layer's input, which no weights do. On
the frames that the model is for, though, there are weights that come nearest. Two steps find them:

1. Every layer with a gate gets the weights W' that minimise Σ |gate(W x) − W' x|² + λ |W' − W|² over the atoms of the
   frames and of shaken copies, with x of the model with gates. Of several λ that counts whose forces on held-out
   copies are nearest; where all are farther than without gates, W stays.
2. All weights together are trained by L-BFGS on energies, forces and stresses that the model with gates predicts for
   the training frames and shaken copies of them.

Before and after the second step, reference energies take up what they can of the energies that are missing.

How far the result is from the model with gates is measured on test frames, which neither step has seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forcetune.adapters.attach import attach, check_mergeable, detach, fold_weights, merge_weights, require_adapter
from forcetune.adapters.methods import Method, elora, full
from forcetune.backbones.protocol import Backbone
from forcetune.config import LossConfig, TrainingConfig
from forcetune.deployment.approximation_frames import (
    ApproximationFrames,
    label_frames,
    read_frames,
    with_shaken_copies,
)
from forcetune.deployment.gate_regression import GateRegression
from forcetune.deployment.loading import deploy_copy
from forcetune.deployment.merge import Merged, check_merged_output, write_plain
from forcetune.deployment.parity import probe_frames
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import Errors, Predictions, build_graphs, predict
from forcetune.graphs.graph import Batch
from forcetune.graphs.stored_graphs import any_label
from forcetune.training.refine import refine
from forcetune.utils.files import write_text

ITERATIONS = 40
"""Of L-BFGS, at most."""

RIDGES = (1e-6, 1e-4, 1e-2, 1.0)
"""λ, relative to the mean square of a layer's inputs. A small one fits features, and may spoil their derivatives."""

BATCH_ATOMS = 128
"""Differentiated twice at once."""

SHARE = 0.2
"""Of the model's own error of forces on test frames: what may be added where no bound is named."""

UNLABELLED_BOUND = 5.0
"""meV/Å; what may be added where test frames have no forces."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean absolute differences between two models on the same frames.

    Attributes:
        energy_mev_per_atom, forces_mev_per_ang, stress_mev_per_ang3: the last None where no frame has a volume.
    """

    energy_mev_per_atom: float
    forces_mev_per_ang: float
    stress_mev_per_ang3: float | None

    @staticmethod
    def between(first: Predictions, second: Predictions) -> Difference:
        """Of predictions for the same frames."""
        stress = None
        if first.stress is not None and second.stress is not None and first.stress.any():
            stress = 1e3 * float(np.abs(first.stress - second.stress).mean())
        return Difference(
            1e3 * float(np.abs((first.energy - second.energy) / first.atoms).mean()),
            1e3 * float(np.abs(first.forces - second.forces).mean()),
            stress,
        )


@dataclass(frozen=True, slots=True)
class Approximation:
    """A plain model near one with gates, and what it costs.

    Attributes:
        merged: what was written, and how it compares with the plain model in memory.
        n_train, n_test: frames that it was fitted to (shaken copies not counted), and measured on.
        test_files: that the latter are from; empty where they were held out from the training frames.
        regressed, distilled: differences from the model with gates on test frames after each step.
        dropped: the same of the model without its gates, to compare with.
        before, after: errors against the labels of the test frames, with gates and without.
        bound: of the mean absolute difference of forces, meV/Å.
        iterations: of L-BFGS, to the best model on frames held out.
        method: what was trained in the second step.
    """

    merged: Merged
    n_train: int
    n_test: int
    test_files: tuple[str, ...]
    regressed: Difference
    distilled: Difference
    dropped: Difference
    before: Errors
    after: Errors
    bound: float
    iterations: int
    method: str

    def to_json(self) -> dict[str, Any]:
        """As it is stored beside the merged model."""
        return asdict(self) | {
            "merged": str(self.merged.path),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }


def note_path(output: str | Path) -> Path:
    """Where the errors of an approximate merge are stored: beside the merged model."""
    return Path(f"{output}.approximation.json")


def merge_approximately(
    run: str | Path,
    output: str | Path,
    *,
    model: str | Path | Backbone | None = None,
    train: str | Path | Sequence[str | Path] | None = None,
    test: str | Path | Sequence[str | Path] | None = None,
    bound: float | None = None,
    rank: int | None = None,
    iterations: int = ITERATIONS,
    trust: bool = False,
    seed: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Approximation:
    """Write the plain model that comes nearest to a run with gates, unless it is too far.

    What it adds is stored beside it (:func:`note_path`).

    Args:
        run: run folder or adapter folder.
        output: file to write, such as ``tuned.model``.
        model: the base, when it is no longer where it was in the run.
        train: frames to fit it to; by default the run's training frames, validation frames included.
        test: frames to measure it on; by default the run's test frames, or every fifth frame to train on where the
            run has none, which is then left out.
        bound: largest mean absolute difference of forces from the run on test frames, meV/Å; by default a fifth of
            the run's own error on them (5 meV/Å without labels).
        rank: of low-rank updates in the second step; by default every weight is trained.
        iterations: of L-BFGS, at most.
        trust: allow the base's file to run its own code where it cannot be rebuilt without.
        seed: of the shaken copies and of initial low-rank factors.
        progress: called with the number of each iteration.

    Raises:
        InputError: the run merges as it is, has a magnetic layer, no frames are left, or the nearest plain model
            exceeds the bound.
        ForcetuneError: the written model differs from that in memory.
    """
    gated = deploy_copy(model, run, trust=trust).backbone
    _check_needed(gated, run)
    check_merged_output(Path(output), gated.base)
    frames = read_frames(run, train, test)
    fold_weights(gated)
    plain = deploy_copy(model, run, trust=trust).backbone
    _drop_gates(plain)
    method = full() if rank is None else elora(rank=rank)
    fit = _fit(gated, plain, frames, method, iterations, seed, progress)
    before = fit.target.errors()
    error = before.forces_mae_mev_per_ang
    allowed = bound if bound is not None else UNLABELLED_BOUND if error is None else SHARE * error
    if not fit.distilled.forces_mev_per_ang <= allowed:
        raise InputError(_too_far(run, before, fit.distilled, fit.dropped, allowed))
    approximation = _write(plain, output, frames, fit, before, allowed, method)
    write_text(note_path(output), json.dumps(approximation.to_json(), indent=1) + "\n")
    return approximation


def _write(
    plain: Backbone,
    output: str | Path,
    frames: ApproximationFrames,
    fit: _Fit,
    before: Errors,
    allowed: float,
    method: Method,
) -> Approximation:
    """Write the plain model and compare the file with it."""
    probes = probe_frames(plain.elements, plain.cutoff)
    return Approximation(
        merged=write_plain(plain, output, predict(plain, build_graphs(plain, probes), stress=True), probes),
        n_train=len(frames.train),
        n_test=len(frames.test),
        test_files=frames.test_files,
        regressed=fit.regressed,
        distilled=fit.distilled,
        dropped=fit.dropped,
        before=before,
        after=fit.predictions.errors(),
        bound=allowed,
        iterations=fit.iterations,
        method=method.name,
    )


@dataclass(frozen=True, slots=True)
class _Fit:
    """Predictions for test frames, with gates (``target``) and fitted, and how far each step is off."""

    target: Predictions
    predictions: Predictions
    dropped: Difference
    regressed: Difference
    distilled: Difference
    iterations: int


def _fit(
    gated: Backbone,
    plain: Backbone,
    frames: ApproximationFrames,
    method: Method,
    iterations: int,
    seed: int,
    progress: Callable[[int], None] | None,
) -> _Fit:
    """Both steps: changes the weights and reference energies of ``plain``."""
    labelled = label_frames(gated, with_shaken_copies(frames.train, seed))
    target = predict(gated, build_graphs(gated, frames.test), stress=True)
    test_graphs = build_graphs(plain, frames.test)
    dropped = Difference.between(target, predict(plain, test_graphs, stress=True))
    training, validation = _split_graphs(build_graphs(plain, labelled))
    _regress(gated, plain, training, validation)
    _align_references(plain, [*training, *validation])
    regressed = Difference.between(target, predict(plain, test_graphs, stress=True))
    best = _distill(plain, training, validation, method, iterations, seed, progress)
    _align_references(plain, [*training, *validation])
    predictions = predict(plain, test_graphs, stress=True)
    distilled = Difference.between(target, predictions)
    return _Fit(target, predictions, dropped, regressed, distilled, best)


def _too_far(run: str | Path, error: Errors, distilled: Difference, dropped: Difference, allowed: float) -> str:
    run_error = error.forces_mae_mev_per_ang
    comparison = "" if run_error is None else f", where the run's own error is {run_error:.1f}"
    return (
        f"{run}: the nearest plain model differs from the run by {distilled.forces_mev_per_ang:.2f} meV/Å in forces on "
        f"test frames{comparison} (without its gates: {dropped.forces_mev_per_ang:.1f}), and at most {allowed:.2f} is "
        "allowed; nothing was written. Export with gates (forcetune export --to lammps-mliap), allow more by --bound, "
        "or train with a method that merges, as elora does."
    )


def _check_needed(backbone: Backbone, run: str | Path) -> None:
    """
    Raises:
        InputError: there is no adapter, it merges exactly, or it has a magnetic layer.
    """
    adapter = require_adapter(backbone)
    if adapter.magnetic is not None:
        check_mergeable(backbone)
    try:
        check_mergeable(backbone)
    except InputError:
        return
    raise InputError(f"{run}: method {adapter.method.name} merges exactly; leave --approximate out.")


def _drop_gates(backbone: Backbone) -> None:
    """Fold what merges, and take out what does not; reference energies stay as tuned."""
    tuned = backbone.reference_energies
    fold_weights(backbone)
    detach(backbone)
    backbone.set_reference_energies(tuned)


# ---- the two steps ---------------------------------------------------------------------------------------------------


def _split_graphs(graphs: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Graphs to fit, and every fifth to choose by; with fewer than five all are both."""
    if len(graphs) < 5:
        return list(graphs), list(graphs)
    return [graph for index, graph in enumerate(graphs) if index % 5 != 2], list(graphs[2::5])


def _regress(gated: Backbone, plain: Backbone, training: Sequence[Batch], validation: Sequence[Batch]) -> None:
    """The first step: layer by layer, with the ridge that is best on validation graphs."""
    regression = GateRegression(gated, training)
    start = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}

    def distance() -> float:
        prediction = predict(plain, validation, stress=False)
        error = float(np.abs(prediction.forces - prediction.forces_label).mean())
        return error if np.isfinite(error) else np.inf

    best, best_distance = start, distance()
    for ridge in RIDGES:
        plain.model.load_state_dict(start)
        regression.apply(plain, ridge)
        if (new_distance := distance()) < best_distance:
            best_distance = new_distance
            best = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    plain.model.load_state_dict(best)


def _align_references(plain: Backbone, graphs: Sequence[Batch]) -> None:
    """Reference energies that bring energies nearest to the labels: the smallest changes that do (least squares)."""
    prediction = predict(plain, graphs, stress=False)
    frame = np.repeat(np.arange(len(prediction.atoms)), prediction.atoms)
    counts = np.stack(
        [np.bincount(frame[prediction.numbers == z], minlength=len(prediction.atoms)) for z in plain.elements], axis=1
    )
    missing = prediction.energy_label - prediction.energy
    # frames of one composition say nothing about single elements: their part is shared out evenly
    change = np.linalg.lstsq(counts / prediction.atoms[:, None], missing / prediction.atoms, rcond=1e-6)[0]
    references = plain.reference_energies
    plain.set_reference_energies({z: references[z] + float(d) for z, d in zip(plain.elements, change, strict=True)})


def _distill(
    plain: Backbone,
    training: Sequence[Batch],
    validation: Sequence[Batch],
    method: Method,
    iterations: int,
    seed: int,
    progress: Callable[[int], None] | None,
) -> int:
    """The second step: all weights on the predictions of the model with gates.

    Returns:
        The iteration that was best on validation graphs.
    """
    stresses = any_label(training, "stress")
    loss = LossConfig(energy=10.0, forces=1000.0, stress=1e6 if stresses else 0.0, energy_per_atom=True)
    attach(plain, method, seed=seed)
    config = TrainingConfig(refine=iterations, loss=loss)
    refinement = refine(plain, config, training, validation, progress=progress, batch_atoms=BATCH_ATOMS)
    merge_weights(plain)
    if not np.isfinite(refinement.valid_loss_after):
        raise ForcetuneError("the distillation gave no finite loss; look for atoms on top of each other in the frames.")
    return refinement.best_iteration
