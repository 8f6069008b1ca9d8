"""The steps of one round of `forcetune learn`: dynamics, selection, labels, a fit. What is done stays done."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from rich.console import Console

from forcetune.adapters.file import read_adapter_config
from forcetune.config import RunConfig, load_config
from forcetune.deployment.calculator import ForcetuneCalculator
from forcetune.deployment.environments import Environments
from forcetune.deployment.exploration import Exploration, explore
from forcetune.deployment.loading import deploy
from forcetune.deployment.watch import Watch
from forcetune.errors import ForcetuneError
from forcetune.evaluation.metrics import Predictions, build_graphs
from forcetune.frames.dataset import read_dataset
from forcetune.frames.frame import FloatArray, Frame, LabelKeys
from forcetune.frames.read import read_frames
from forcetune.runs.fit import resume, run_fit
from forcetune.runs.folder import ADAPTER_NAME, CONFIG_NAME, FINISHED, read_status
from forcetune.runs.labelling import LabelFolder, compute_label
from forcetune.runs.learn_results import DynamicsRecord, FailedLabel, read_dynamics, write_record
from forcetune.runs.results import read_results
from forcetune.runs.select import NothingToChoose, select
from forcetune.runs.uncertainty import MOST_FRAMES, calibrate
from forcetune.uncertainty.file import has_calibration, load_uncertainty
from forcetune.uncertainty.last_layer import predict_deviations
from forcetune.utils.files import atomic_path

BOUND_SHARE, BOUND_FACTOR = 0.95, 1.5
"""The bound by default: so many times what this share of the validation frames stays below."""
SELECTED_NAME, LABELLED_NAME, RUN_NAME = "selected.xyz", "labelled.xyz", "run"


@dataclass(frozen=True, slots=True)
class Round:
    """One round, and what it goes on from.

    Attributes:
        number: of the round; 0 is the fit to the frames that there were.
        folder: of the round.
        previous: run of the round before; None in the first.
        labelled: files of the frames labelled in rounds before.
    """

    number: int
    folder: Path
    previous: Path | None
    labelled: tuple[Path, ...]

    @property
    def run(self) -> Path:
        """The run folder of its fit."""
        return self.folder / RUN_NAME

    @property
    def labels(self) -> LabelFolder:
        """Its labels, one by one."""
        return LabelFolder(self.folder / "labels")


def train_round(config: RunConfig, current: Round, console: Console) -> None:
    """Fit and calibrate, or whatever of this is left to do.

    Args:
        config: of the loop.
        current: the round; its own labelled frames are among ``labelled`` here.
        console: of the fit.

    Raises:
        InputError, ForcetuneError: as :func:`forcetune.runs.fit.run_fit`; the fit was interrupted.
    """
    if not (current.run / CONFIG_NAME).is_file():
        shutil.rmtree(current.run, ignore_errors=True)  # nothing but the beginning of a fit
        run_fit(_fit_config(config, current), console=console)
    elif read_status(current.run) not in FINISHED:
        resume(current.run, console=console)
    if read_status(current.run) not in FINISHED:
        raise KeyboardInterrupt
    if not has_calibration(current.run):
        calibrate(current.run, device=config.model.device, console=console)


def _fit_config(config: RunConfig, current: Round) -> RunConfig:
    """The options of one fit: those of the loop, with the new frames and the last adapter."""
    content = config.model_dump(exclude_unset=True)
    content.pop("learn", None)
    content["data"]["train_only"] = [*config.data.train_only, *map(str, current.labelled)]
    content["output"] = (
        {"forgetting": False, "phonons": "off"}
        | content.get("output", {})
        | {"run": str(current.run), "overwrite": False}
    )
    if current.previous is not None:
        adapter = current.previous / ADAPTER_NAME
        training = content.setdefault("training", {})
        training["start_from"] = str(adapter)
        if config.learn.epochs is not None:
            training["epochs"] = config.learn.epochs
        # the adapter belongs to these
        content["references"] = {"mode": "table", "table": read_adapter_config(adapter).reference_energies_ev}
    return RunConfig.model_validate(content)


def read_errors(config: RunConfig, current: Round) -> tuple[dict[str, Any], int]:
    """Errors of the run of a round by split, and the number of frames that it was trained on."""
    results = read_results(current.run, config)
    errors = {name: pair.after or {} for name, pair in results.errors.items() if pair is not None}
    train = results.data.get("train")
    return errors, 0 if train is None else train.n_frames or 0


def default_bound(run: Path, config: RunConfig) -> float:
    """The bound of the uncertainty by default, eV/Å, from the validation frames of the first run."""
    frames = read_dataset(config.data.model_copy(update={"test": []}), config.magnetism).valid.frames
    predictions, deviations = _predict_with_deviations(run, frames[:MOST_FRAMES], config.model.device)
    of_atoms = np.split(np.linalg.norm(deviations, axis=1), np.cumsum(predictions.atoms)[:-1])
    return BOUND_FACTOR * float(np.quantile([part.max() for part in of_atoms], BOUND_SHARE))


def measure_new_frames(run: Path, file: Path, keys: LabelKeys, device: str) -> dict[str, Any]:
    """Errors of a run on frames it was not trained on, and what it expected: ``forces_std_mev_per_ang``."""
    named: dict[str, Any] = {f"{label}_key": getattr(keys, label) or "auto" for label in ("energy", "forces", "stress")}
    frames = read_frames(file, **named, require=(), name="new frames").frames
    predictions, deviations = _predict_with_deviations(run, frames, device)
    expected = 1000 * float(np.sqrt(np.mean(deviations**2)))
    return predictions.errors().to_json() | {"forces_std_mev_per_ang": expected}


def _predict_with_deviations(run: Path, frames: Sequence[Frame], device: str) -> tuple[Predictions, FloatArray]:
    """Predictions, and calibrated standard deviations of the forces, (atoms, 3), eV/Å."""
    backbone = deploy(run, device=device).backbone
    uncertainty = load_uncertainty(run, [run / ADAPTER_NAME])
    assert uncertainty.posterior is not None
    graphs = build_graphs(backbone, frames)
    predictions, _, forces = predict_deviations(backbone, graphs, uncertainty.posterior)
    assert forces is not None
    return predictions, forces * (uncertainty.scale("forces") or 1.0)


def run_dynamics(
    config: RunConfig, current: Round, starts: Sequence[Atoms], bound: float, say: Callable[[str], None]
) -> list[DynamicsRecord]:
    """All trajectories of a round; those that are written already are not repeated.

    Args:
        config: of the loop.
        current: the round.
        starts: structures that dynamics start from, in turns.
        bound: of the uncertainty, eV/Å.
        say: called with a line for every trajectory.
    """
    paths = [current.folder / "dynamics" / f"{number:03d}.json" for number in range(1, config.learn.walkers + 1)]
    records = [read_dynamics(path) for path in paths]
    assert current.previous is not None
    explorer = None
    for index, path in enumerate(paths):
        if records[index] is None:
            explorer = explorer or _Explorer(config, current.previous, bound)
            start = ((current.number - 1) * len(paths) + index) % len(starts)
            seed = [config.training.seed, current.number, index]
            exploration = explorer.run(starts[start], path.with_name(f"{path.stem}-flagged.xyz"), seed)
            record = _record(exploration, config, index + 1, start)
            path.parent.mkdir(parents=True, exist_ok=True)
            if exploration.collected:
                with atomic_path(path.with_suffix(".xyz")) as temporary:
                    ase.io.write(temporary, exploration.collected, format="extxyz")
            write_record(path, record)
            records[index] = record
            say(
                f"round {current.number}: dynamics {record.number} of {len(paths)}, {record.picoseconds:.3g} ps to "
                f"{record.final_temperature_k:.0f} K, {record.collected} collected"
                + (f"; ended: {record.reason}" if record.reason else "")
            )
    return [record for record in records if record is not None]


def _record(exploration: Exploration, config: RunConfig, number: int, start: int) -> DynamicsRecord:
    options = config.learn
    final = options.temperature if options.final_temperature is None else options.final_temperature
    picoseconds = exploration.steps * options.timestep / 1000
    return DynamicsRecord(
        number=number,
        start=start,
        ended=exploration.ended,
        reason=exploration.reason,
        picoseconds=picoseconds,
        final_temperature_k=options.temperature
        + (final - options.temperature) * min(1.0, picoseconds / options.picoseconds),
        looks=exploration.looks,
        beyond=exploration.beyond,
        collected=len(exploration.collected),
        mean_std=exploration.mean_std,
        largest_std=exploration.largest_std,
    )


class _Explorer:
    """A run ready for dynamics: a fast calculator and one with uncertainties on the same model, and the watch."""

    def __init__(self, config: RunConfig, run: Path, bound: float) -> None:
        self.options, self.bound = config.learn, bound
        backbone = deploy(run, device=config.model.device).backbone
        for parameter in backbone.model.parameters():
            parameter.requires_grad_(False)
        calibration = load_uncertainty(run, [run / ADAPTER_NAME])
        self.plain = ForcetuneCalculator(backbone)
        self.sure = ForcetuneCalculator(backbone, compile="off", uncertainty=calibration)
        self.environments = None
        if self.options.novelty is not None:
            self.environments = Environments(_training_frames(run))

    def run(self, start: Atoms, flagged: Path, seed: list[int]) -> Exploration:
        """One trajectory; structures at which the watch ends it are written to ``flagged``."""
        watch = Watch(
            frames=self.environments,
            novelty=self.options.novelty or 1.0,
            largest_force=self.options.largest_force,
            file=flagged,
        )
        return explore(start, self.plain, self.sure, watch, self.bound, self.options, seed)


def _training_frames(run: Path) -> list[Frame]:
    """Frames that a run was trained on, as many at random as a calibration looks at where there are more."""
    frames = read_dataset(load_config(run / CONFIG_NAME).data.model_copy(update={"test": []})).train.frames
    if len(frames) <= MOST_FRAMES:
        return list(frames)
    return [frames[int(index)] for index in np.random.default_rng(0).choice(len(frames), MOST_FRAMES, replace=False)]


def select_structures(config: RunConfig, current: Round, dynamics: Sequence[DynamicsRecord], most: int) -> list[Atoms]:
    """What to label of what was collected: uncertain, new, and no two alike; none where nothing is new.

    Args:
        config: of the loop.
        current: the round.
        dynamics: of the round.
        most: structures.
    """
    path = current.folder / SELECTED_NAME
    if path.is_file():
        return _read_structures(path)
    files = [current.folder / "dynamics" / f"{record.number:03d}.xyz" for record in dynamics if record.collected]
    if not files:
        return []
    assert current.previous is not None
    try:
        selection = select(
            files,
            n=most,
            model=current.previous,
            strategy=config.learn.strategy,
            uncertainty="forces",
            apart=config.learn.apart,
            seed=config.training.seed,
            device=config.model.device,
            console=Console(quiet=True),
        )
    except NothingToChoose:
        return []
    if selection.structures:
        with atomic_path(path) as temporary:
            ase.io.write(temporary, selection.structures, format="extxyz")
    # as the file gives them, so that a label does not depend on when it is computed
    return _read_structures(path) if selection.structures else []


def _read_structures(path: Path) -> list[Atoms]:
    structures = ase.io.read(path, index=":", format="extxyz")
    assert isinstance(structures, list)
    return structures


def label_structures(
    config: RunConfig,
    current: Round,
    structures: Sequence[Atoms],
    make: Callable[[], Any],
    keys: LabelKeys,
    say: Callable[[str], None],
) -> list[FailedLabel]:
    """Label the structures of a round one by one, and put those with labels into one file.

    Returns:
        what failed; no more is labelled once these are more than allowed.

    Raises:
        ForcetuneError: none could be labelled.
    """
    failed: list[FailedLabel] = []
    for number, structure in enumerate(structures, 1):
        current.labels.label(
            number,
            structure,
            keys,
            lambda atoms: compute_label(
                atoms, make, stress=keys.stress is not None, largest_force=config.learn.largest_force
            ),
        )
        reason = current.labels.failure(number)
        if reason is not None:
            failed.append(FailedLabel(number=number, reason=reason))
            say(f"round {current.number}: structure {number} could not be labelled: {reason}")
            if len(failed) > config.learn.failures:
                return failed
    done = [path for number in range(1, len(structures) + 1) if (path := current.labels.labelled(number)).is_file()]
    if done and not (current.folder / LABELLED_NAME).is_file():
        with atomic_path(current.folder / LABELLED_NAME) as temporary:
            ase.io.write(temporary, [atoms for path in done for atoms in _read_structures(path)], format="extxyz")
    if not done:
        raise ForcetuneError(
            f"{current.folder}: none of {len(structures)} structures could be labelled, the first as "
            f"{failed[0].reason}. Remove {current.labels.folder}/*.failed.json to try again."
        )
    return failed
