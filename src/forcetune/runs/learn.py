"""Dynamics, selection, labels and training in turns, until the potential is sure wherever its dynamics go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from rich.console import Console

from forcetune.config import RunConfig, load_config
from forcetune.errors import ForcetuneError, InputError
from forcetune.frames.dataset import Dataset, read_dataset
from forcetune.frames.frame import Frame
from forcetune.frames.sources import expand
from forcetune.reports.learn_page import write_learn_page
from forcetune.runs.fit import as_texts
from forcetune.runs.folder import CONFIG_NAME as RUN_CONFIG_NAME
from forcetune.runs.folder import input_files
from forcetune.runs.labelling import LabelError, Labeller, compare_label, compute_label, labeller_name, load_labeller
from forcetune.runs.learn_checks import (
    CONFIG_NAME,
    check_folder,
    check_model,
    check_options,
    check_starts,
    read_starts,
)
from forcetune.runs.learn_results import (
    LEARN_NAME,
    ROUND_NAME,
    LearnRecord,
    RoundRecord,
    Status,
    read_round,
    write_record,
)
from forcetune.runs.learn_round import (
    LABELLED_NAME,
    RUN_NAME,
    Round,
    default_bound,
    label_structures,
    measure_new_frames,
    read_errors,
    run_dynamics,
    select_structures,
    train_round,
)
from forcetune.runs.runtime import limited_threads
from forcetune.utils.file_lock import FolderLock
from forcetune.utils.files import is_inside, write_json

ROUNDS_NAME = "rounds"
CHECK_NAME = "check.json"
TARGET = "forces_mae_mev_per_ang"


@dataclass(frozen=True, slots=True)
class Learned:
    """A loop that ended.

    Attributes:
        folder: holds ``rounds/00`` and so on, ``learn.json``, ``learn.html`` and ``learn.yaml``.
        record: what is in ``learn.json``.
        run: folder of the last run, with the potential that has seen all labels.
        page: the report.
    """

    folder: Path
    record: LearnRecord
    run: Path
    page: Path


def learn(
    train: str | Path | Sequence[str | Path] | None = None,
    *,
    start: str | Path | Sequence[str | Path] | None = None,
    labeller: str | Labeller | None = None,
    model: str | Path | None = None,
    method: str | None = None,
    valid: str | Path | Sequence[str | Path] | float | int | None = None,
    test: str | Path | Sequence[str | Path] | None = None,
    epochs: int | None = None,
    out: str | Path = "learned",
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Learned:
    """Tune a potential, run dynamics with it, label where it is not sure, and tune on, round after round.

    A first fit to the frames that there are is followed by rounds: Langevin dynamics from the start structures collect
    those on which the calibrated uncertainty of the force on some atom is beyond a bound; of these the most uncertain
    and most different are labelled; with them the training goes on from the last adapter. The validation frames stay
    the same. Called again with the same options it goes on where it was interrupted, and computes no label twice.

    Args:
        train: files or patterns of the frames that are labelled already.
        start: files of structures that dynamics start from.
        labeller: what makes an ASE calculator: ``package.module:name``, ``file.py:name``, or a callable.
        model, method, valid, test, epochs: as :func:`forcetune.fit`; of the first fit and all others.
        out: folder.
        config: YAML file with any of the options; arguments come first.
        settings: any option by its dotted name, ``{"learn.rounds": 10, "learn.final_temperature": 600}``.
        console: where progress is printed; standard error by default.

    Raises:
        InputError: bad input, a labeller that cannot be used or is of another level of theory, or a folder of
            something else.
        ForcetuneError: a fit failed, or too many labels did; what was done stays.
    """
    options: dict[str, Any] = {
        "data": {"train": as_texts(train), "valid": as_texts(valid), "test": as_texts(test)},
        "model": {"model": None if model is None else str(model)},
        "method": {"name": method},
        "training": {"epochs": epochs},
        "output": {"run": str(out)},
        "learn": {"start": as_texts(start), "labeller": None if labeller is None else labeller_name(labeller)},
    }
    resolved = load_config(config, given=options, overrides=settings)
    inputs = () if config is None else (config,)
    callable_ = labeller if labeller is not None and not isinstance(labeller, str) else None
    return run_learn(resolved, labeller=callable_, inputs=inputs, console=console)


def run_learn(
    config: RunConfig,
    *,
    labeller: Labeller | None = None,
    inputs: Sequence[str | Path] = (),
    console: Console | None = None,
) -> Learned:
    """Carry out a complete configuration; the command line and :func:`learn` come here.

    Args:
        config: what to do; ``config.output.run`` is the folder.
        labeller: instead of importing ``config.learn.labeller``.
        inputs: further files that the configuration came from; a folder with one of them is refused.
        console: where progress is printed; standard error by default.

    Raises:
        InputError, ForcetuneError: as :func:`learn`.
    """
    console = console or Console(stderr=True, soft_wrap=True, emoji=False)
    check_options(config)
    folder = Path(config.output.run)
    with FolderLock(folder) as lock:
        return _learn(config, folder, lock, labeller, inputs, console)


def _learn(
    config: RunConfig,
    folder: Path,
    lock: FolderLock,
    labeller: Labeller | None,
    inputs: Sequence[str | Path],
    console: Console,
) -> Learned:
    """As :func:`run_learn`, in a folder that no other command writes to."""
    options = config.learn
    check_folder(folder, config)
    starts = read_starts(options)
    make = load_labeller(labeller or str(options.labeller), options.labeller_options)
    dataset = read_dataset(config.data, config.magnetism)
    check_starts(starts, dataset.train.elements)
    for file in (*input_files(config, inputs), *expand(options.start)):
        if is_inside(file, folder):
            raise InputError(f"{folder}: holds {file}, which is read here; choose another folder with --out.")
    loop = _Loop(config, folder, [start for _, start in starts], make, dataset, console)
    begins, existed = not (folder / CONFIG_NAME).is_file(), folder.is_dir()
    check = None
    if not (folder / CHECK_NAME).is_file():  # also where the first command was killed before it was written
        check_model(config, dataset)
        check = loop.check_labeller()
    lock.create()
    check_folder(folder, config)
    config.save(folder / CONFIG_NAME)
    if check is not None:
        write_json(folder / CHECK_NAME, check)
    with limited_threads(config.training.threads):
        try:
            return loop.run()
        except InputError:
            if begins and not (folder / ROUNDS_NAME / "00" / RUN_NAME / RUN_CONFIG_NAME).is_file():
                _remove_beginning(folder, existed)
            raise


def _remove_beginning(folder: Path, existed: bool) -> None:
    """Remove the options of a loop whose first fit refused them, so that the command can be repeated with others."""
    for name in (CONFIG_NAME, CHECK_NAME):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / ROUNDS_NAME, ignore_errors=True)
    if not existed:
        folder.rmdir()


class _Loop:
    """Round after round; everything that is done is in the folder."""

    def __init__(
        self, config: RunConfig, folder: Path, starts: list[Atoms], make: Any, dataset: Dataset, console: Console
    ) -> None:
        self.config, self.options, self.folder = config, config.learn, folder
        self.starts, self.make, self.keys = starts, make, dataset.train.keys
        self.first_frame: Frame | None = next(
            (frame for frame in dataset.train.frames if frame.forces is not None), None
        )
        self.console = console
        self.bound: float | None = None
        self.rounds: list[RoundRecord] = []

    def say(self, text: str) -> None:
        """One line of progress."""
        self.console.print(text, markup=False, highlight=False)

    def check_labeller(self) -> dict[str, Any]:
        """Compute a training frame with the labeller; what was compared.

        Raises:
            InputError: it is labelled differently.
        """
        frame = self.first_frame
        if self.options.check == "off" or frame is None:
            return {"checked": False}
        atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
        atoms.info |= {
            name: value for name, value in (("charge", frame.charge), ("spin", frame.multiplicity)) if value is not None
        }
        self.say(f"computing {frame.origin} with the labeller, to compare it with its label")
        try:
            label = compute_label(atoms, self.make, stress=False, largest_force=float("inf"))
        except LabelError as error:
            raise InputError(f"{frame.origin}: the labeller {self.options.labeller} fails on it ({error}).") from error
        compare_label(frame, label, str(self.options.labeller))
        return {"checked": True, "frame": str(frame.origin), "energy_ev": label["energy"]}

    def run(self) -> Learned:
        """All rounds that are left."""
        while True:
            current = self._next()
            stored = record = read_round(current.folder / ROUND_NAME)
            if record is None:
                record = self._first(current) if current.number == 0 else self._round(current)
                write_record(current.folder / ROUND_NAME, record)
                self._say_round(record)
            self.rounds.append(record)
            self.bound = self.rounds[0].bound
            ended = self._ended()
            if ended is not None:
                return self._write(*ended)
            if stored is None:
                self._write("running", "")

    def _next(self) -> Round:
        number = len(self.rounds)
        trained = [self._folder(record.number) / RUN_NAME for record in self.rounds if record.train_frames]
        labelled = [self._folder(record.number) / LABELLED_NAME for record in self.rounds if record.labelled]
        return Round(number, self._folder(number), trained[-1] if trained else None, tuple(labelled))

    def _folder(self, number: int) -> Path:
        return self.folder / ROUNDS_NAME / f"{number:02d}"

    def _first(self, current: Round) -> RoundRecord:
        """The fit to the frames that there are, and the bound where the options have none."""
        self.say("round 0: fit to the frames that there are")
        train_round(self.config, current, self._quiet())
        errors, count = read_errors(self.config, current)
        bound = self.options.forces_std
        if bound is None:
            bound = default_bound(current.run, self.config)
            self.say(f"bound of the uncertainty: {bound:.3g} eV/Å, from the validation frames")
        return RoundRecord(number=0, bound=bound, errors=errors, train_frames=count)

    def _round(self, current: Round) -> RoundRecord:
        """Dynamics, selection, labels and a fit.

        Raises:
            ForcetuneError: too many labels failed.
        """
        assert self.bound is not None
        assert current.previous is not None
        options = self.options
        dynamics = run_dynamics(self.config, current, self.starts, self.bound, self.say)
        left = options.batch if options.labels is None else min(options.batch, options.labels - self._spent())
        structures = select_structures(self.config, current, dynamics, left)
        record = RoundRecord(
            number=current.number,
            dynamics=dynamics,
            collected=sum(trajectory.collected for trajectory in dynamics),
            selected=len(structures),
        )
        if not structures:
            return record
        self.say(f"round {current.number}: {len(structures)} of {record.collected} structures to label")
        failed = label_structures(self.config, current, structures, self.make, self.keys, self.say)
        done = sum(current.labels.labelled(number).is_file() for number in range(1, len(structures) + 1))
        record = record.model_copy(update={"failed": failed, "labelled": done})
        if len(failed) > options.failures:
            self._give_up(current, record)
        file = current.folder / LABELLED_NAME
        new = measure_new_frames(current.previous, file, self.keys, self.config.model.device)
        self.say(f"round {current.number}: fit with {record.labelled} new frames")
        with_new = Round(current.number, current.folder, current.previous, (*current.labelled, file))
        train_round(self.config, with_new, self._quiet())
        errors, count = read_errors(self.config, current)
        return record.model_copy(update={"new": new, "errors": errors, "train_frames": count})

    def _give_up(self, current: Round, record: RoundRecord) -> None:
        """
        Raises:
            ForcetuneError: always.
        """
        reason = f"{len(record.failed)} labels of round {current.number} failed, the last as {record.failed[-1].reason}"
        self.rounds.append(record)
        page = self._write("failures", reason).page
        raise ForcetuneError(
            f"{reason}; {self.options.failures} are allowed (learn.failures). {page} has all of them. Remove "
            f"{current.labels.folder}/*.failed.json to try them again."
        )

    def _spent(self) -> int:
        return sum(record.labelled + len(record.failed) for record in self.rounds)

    def _ended(self) -> tuple[Status, str] | None:
        """Status and reason where the loop is over."""
        options, last = self.options, self.rounds[-1]
        if last.number and not last.selected:
            if all(trajectory.ended == "length" for trajectory in last.dynamics) and not last.collected:
                return "sure everywhere", f"no structure of the dynamics of round {last.number} is beyond the bound"
            if not last.collected:
                reasons = dict.fromkeys(trajectory.reason for trajectory in last.dynamics if trajectory.reason)
                return "nothing new", (
                    f"the dynamics of round {last.number} ended before a structure could be collected: "
                    f"{'; '.join(reasons)}"
                )
            return "nothing new", (
                f"the dynamics of round {last.number} reached nothing that is not labelled already, within learn.apart"
            )
        if options.target_forces is not None:
            tests = [errors.get(TARGET) for name, errors in last.errors.items() if name.startswith("test")]
            measured = [value for value in tests or [last.new.get(TARGET)] if value is not None]
            if measured and max(measured) <= options.target_forces:
                where = "the test frames" if tests else "the new frames before they were trained on"
                return "target reached", f"force error {max(measured):.3g} meV/Å on {where}"
        if options.labels is not None and self._spent() >= options.labels:
            return "labels", f"all {options.labels} labels are spent"
        if last.number >= options.rounds:
            return "rounds", f"{options.rounds} rounds are done"
        return None

    def _write(self, status: Status, reason: str) -> Learned:
        record = LearnRecord(
            status=status,
            reason=reason,
            labeller=str(self.options.labeller),
            bound=self.bound,
            labels=self._spent(),
            rounds=self.rounds,
        )
        write_record(self.folder / LEARN_NAME, record)
        page = write_learn_page(self.folder, record, self.config)
        run = self._folder(max(entry.number for entry in self.rounds if entry.train_frames)) / RUN_NAME
        return Learned(self.folder, record, run, page)

    def _say_round(self, record: RoundRecord) -> None:
        texts = [
            f"{name} {errors[TARGET]:.3g}"
            for name, errors in {**record.errors, "new frames before": record.new}.items()
            if name != "train" and errors.get(TARGET) is not None
        ]
        if texts:
            self.say(f"round {record.number}: force errors, meV/Å: {', '.join(texts)}")

    def _quiet(self) -> Console:
        """For fits, whose lines would bury those of the loop."""
        return Console(quiet=True)


def to_json(learned: Learned) -> str:
    """As ``forcetune learn --json`` prints it."""
    return json.dumps(learned.record.model_dump() | {"run": str(learned.run)})
