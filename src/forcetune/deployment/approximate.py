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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from forcetune.adapters.attach import attach, check_mergeable, detach, fold_weights, merge_weights, require_adapter
from forcetune.adapters.methods import Method, elora, full
from forcetune.backbones.protocol import Backbone
from forcetune.config import DataConfig, LossConfig, RunConfig, TrainingConfig, load_config
from forcetune.deployment.gate_regression import GateRegression
from forcetune.deployment.loading import deploy_copy
from forcetune.deployment.merge import Merged, check_merged_output, write_plain
from forcetune.deployment.parity import probe_frames
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import Errors, Predictions, build_graphs, predict
from forcetune.frames.dataset import read_dataset
from forcetune.frames.frame import Frame
from forcetune.graphs.graph import Batch
from forcetune.graphs.stored_graphs import any_label
from forcetune.training.refine import refine
from forcetune.utils.files import write_text

ITERATIONS = 40
"""Of L-BFGS, at most."""

COPIES = 1
"""Shaken copies of each frame."""

SHAKEN = 0.05
"""Å; standard deviation of each coordinate of a shaken copy."""

STRAINED = 0.01
"""Standard deviation of the strain of a shaken copy with a cell."""

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
    def between(one: Predictions, other: Predictions) -> Difference:
        """Of predictions for the same frames."""
        stress = None
        if one.stress is not None and other.stress is not None and one.stress.any():
            stress = 1e3 * float(np.abs(one.stress - other.stress).mean())
        return Difference(
            1e3 * float(np.abs((one.energy - other.energy) / one.atoms).mean()),
            1e3 * float(np.abs(one.forces - other.forces).mean()),
            stress,
        )


@dataclass(frozen=True, slots=True)
class Approximation:
    """A plain model near one with gates, and what it costs.

    Attributes:
        merged: what was written, and how it compares with the plain model in memory.
        n_train, n_test: frames to find it on (shaken copies not counted), and to measure it on.
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
        model: the base, when it is no longer where the run found it.
        train: frames to find it on; by default the run's training frames, validation frames included.
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
    frames = _frames_of(run, train, test)
    fold_weights(gated)
    plain = deploy_copy(model, run, trust=trust).backbone
    _drop_gates(plain)
    labelled = _labelled_by(gated, _shaken(frames.train, seed))
    wanted, measured = predict(gated, build_graphs(gated, frames.test), stress=True), _Measured(plain, frames.test)
    dropped = Difference.between(wanted, measured.predictions())
    training, held = _parted(build_graphs(plain, labelled))
    _regress(gated, plain, training, held)
    _align_references(plain, [*training, *held])
    regressed = Difference.between(wanted, measured.predictions())
    method = full() if rank is None else elora(rank=rank)
    best = _distill(plain, training, held, method, iterations, seed, progress)
    _align_references(plain, [*training, *held])
    after = measured.predictions()
    distilled = Difference.between(wanted, after)
    error = wanted.errors().forces_mae_mev_per_ang
    allowed = bound if bound is not None else UNLABELLED_BOUND if error is None else SHARE * error
    if not distilled.forces_mev_per_ang <= allowed:
        raise InputError(_too_far(run, wanted.errors(), distilled, dropped, allowed))
    probes = probe_frames(plain.elements, plain.cutoff)
    merged = write_plain(plain, output, predict(plain, build_graphs(plain, probes), stress=True), probes)
    approximation = Approximation(
        merged=merged,
        n_train=len(frames.train),
        n_test=len(frames.test),
        test_files=frames.test_files,
        regressed=regressed,
        distilled=distilled,
        dropped=dropped,
        before=wanted.errors(),
        after=after.errors(),
        bound=allowed,
        iterations=best,
        method=method.name,
    )
    write_text(note_path(output), json.dumps(approximation.to_json(), indent=1) + "\n")
    return approximation


def _too_far(run: str | Path, error: Errors, distilled: Difference, dropped: Difference, allowed: float) -> str:
    own = error.forces_mae_mev_per_ang
    against = "" if own is None else f", where the run's own error is {own:.1f}"
    return (
        f"{run}: the nearest plain model differs from the run by {distilled.forces_mev_per_ang:.2f} meV/Å in forces on "
        f"test frames{against} (without its gates: {dropped.forces_mev_per_ang:.1f}), and at most {allowed:.2f} is "
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


# ---- frames ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Frames:
    train: list[Frame]
    test: list[Frame]
    test_files: tuple[str, ...]


def _frames_of(run: str | Path, train: Any, test: Any) -> _Frames:
    """
    Raises:
        InputError: there is no configuration and no frames were named, or too few are left.
    """
    named = _named(train), _named(test)
    data = _data_of(run)
    if data is None:
        if named[0] is None:
            raise InputError(f"{run}: the adapter alone has no frames to find a plain model on; name some with --data.")
        data = DataConfig(train=named[0])
    changes: dict[str, Any] = {"train": named[0] or data.train, "test": data.test if named[1] is None else named[1]}
    if named[0] is not None:
        changes["valid"] = 0.1
    dataset = read_dataset(data.model_copy(update=changes))
    training = [*dataset.train.frames, *dataset.valid.frames]
    tests = [frame for part in dataset.tests.values() for frame in part.frames]
    files = tuple(file for part in dataset.tests.values() for file in part.files)
    if not tests:
        tests, training = training[::5], [frame for index, frame in enumerate(training) if index % 5]
    if not training or not tests:
        raise InputError(f"{run}: too few frames to find a plain model on and to measure it; name some with --data.")
    return _Frames(training, tests, files)


def _named(value: Any) -> list[str] | None:
    if value is None:
        return None
    return [str(value)] if isinstance(value, (str, Path)) else [str(item) for item in value]


def _data_of(run: str | Path) -> DataConfig | None:
    """The frames of the run around an adapter; None where it stands alone."""
    for folder in (Path(run), Path(run).parent):
        if (folder / "config.yaml").is_file():
            config: RunConfig = load_config(folder / "config.yaml")
            return config.data
    return None


def _shaken(frames: Sequence[Frame], seed: int) -> list[Frame]:
    """The frames, and copies with displaced atoms and strained cells."""
    rng = np.random.default_rng(seed)
    copies = list(frames)
    for frame in frames:
        for _ in range(COPIES):
            moved = frame.positions + SHAKEN * rng.standard_normal(frame.positions.shape)
            cell = frame.cell
            if frame.pbc.all():
                strain = STRAINED * rng.standard_normal((3, 3))
                change = np.eye(3) + (strain + strain.T) / 2
                moved, cell = moved @ change, cell @ change
            copies.append(replace(frame, positions=moved, cell=cell))
    return copies


def _labelled_by(backbone: Backbone, frames: Sequence[Frame]) -> list[Frame]:
    """The frames with what a model predicts as their labels, all of the same weight."""
    prediction = predict(backbone, build_graphs(backbone, frames), stress=True)
    forces = np.split(prediction.forces, np.cumsum(prediction.atoms)[:-1])
    assert prediction.stress is not None
    weights = dict.fromkeys(("energy_weight", "forces_weight", "stress_weight"), 1.0)
    return [
        replace(
            frame,
            energy=float(prediction.energy[index]),
            forces=forces[index],
            stress=prediction.stress[index] if frame.has_volume else None,
            **weights,
        )
        for index, frame in enumerate(frames)
    ]


class _Measured:
    """A model on the test frames, again after each step."""

    def __init__(self, backbone: Backbone, frames: Sequence[Frame]) -> None:
        self.backbone = backbone
        self.graphs = build_graphs(backbone, frames)

    def predictions(self) -> Predictions:
        return predict(self.backbone, self.graphs, stress=True)


# ---- the two steps ---------------------------------------------------------------------------------------------------


def _parted(graphs: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Graphs to fit, and every fifth to choose by; with fewer than five all are both."""
    if len(graphs) < 5:
        return list(graphs), list(graphs)
    return [graph for index, graph in enumerate(graphs) if index % 5 != 2], list(graphs[2::5])


def _regress(gated: Backbone, plain: Backbone, training: Sequence[Batch], held: Sequence[Batch]) -> None:
    """The first step: layer by layer, with the ridge that is best on held-out graphs."""
    regression = GateRegression(gated, training)
    start = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}

    def distance() -> float:
        prediction = predict(plain, held, stress=False)
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
    held: Sequence[Batch],
    method: Method,
    iterations: int,
    seed: int,
    progress: Callable[[int], None] | None,
) -> int:
    """The second step: all weights on the predictions of the model with gates.

    Returns:
        The iteration that was best on held-out graphs.
    """
    stresses = any_label(training, "stress")
    loss = LossConfig(energy=10.0, forces=1000.0, stress=1e6 if stresses else 0.0, energy_per_atom=True)
    attach(plain, method, seed=seed)
    config = TrainingConfig(refine=iterations, loss=loss)
    refinement = refine(plain, config, training, held, progress=progress, batch_atoms=BATCH_ATOMS)
    merge_weights(plain)
    if not np.isfinite(refinement.valid_loss_after):
        raise ForcetuneError("the distillation gave no finite loss; look for atoms on top of each other in the frames.")
    return refinement.best_iteration
