"""The numbers of ``metrics.csv``, epoch by epoch, in programs that show many runs: TensorBoard, W&B, MLflow.

Each needs its own package, keeps its own settings (``WANDB_MODE``, ``WANDB_DIR``, ``MLFLOW_TRACKING_URI`` …) and is off
unless ``output.trackers`` names it. A further program is one class here that derives from :class:`Tracker`.
"""

from __future__ import annotations

import importlib.util
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from forcetune.errors import InputError, warn
from forcetune.training.callbacks import metrics_row
from forcetune.training.module import FineTuning, Observer
from forcetune.utils.files import write_json
from forcetune.utils.optional import missing_package

TENSORBOARD_NAME = "tensorboard"
"""Folder of its logs, in the run folder."""
TRACKERS_NAME = "trackers.json"
"""File of the run folder with the names that the programs gave the run, so that a resumed run continues there."""
LONGEST_VALUE = 500
"""Characters of an option that MLflow takes."""


class Tracker(ABC):
    """A program that shows the numbers of a run.

    Attributes:
        package: to import.
        extra: of forcetune, which brings the package.
    """

    package: ClassVar[str]
    extra: ClassVar[str]

    @abstractmethod
    def start(self, folder: Path, project: str, options: Mapping[str, Any], identity: str | None) -> str | None:
        """Begin a run, or resume one.

        Args:
            folder: run folder; its name is that of the run.
            project: what runs are grouped under, where the program groups them.
            options: of the run, by dotted name.
            identity: what an earlier call returned, to resume that run.

        Returns:
            what names the run; None where nothing is needed to resume it.
        """

    @abstractmethod
    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Numbers of one epoch, by the columns of ``metrics.csv``."""

    @abstractmethod
    def close(self) -> None:
        """The training has ended."""


class TensorBoard(Tracker):
    """Event files in the folder ``tensorboard`` of the run."""

    package, extra = "tensorboard", "tensorboard"

    def start(self, folder: Path, project: str, options: Mapping[str, Any], identity: str | None) -> str | None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / TENSORBOARD_NAME))
        return None

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it on this machine."""

    package, extra = "wandb", "wandb"

    def start(self, folder: Path, project: str, options: Mapping[str, Any], identity: str | None) -> str | None:
        self.run = import_module("wandb").init(
            project=project, name=folder.name, config=dict(options), id=identity, resume="allow" if identity else None
        )
        # epochs of a resumed run may come twice, which its own counter of steps would refuse
        self.run.define_metric("*", step_metric="epoch")
        return self.run.id

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.run.log({**values, "epoch": epoch})

    def close(self) -> None:
        self.run.finish()


class MLflow(Tracker):
    """A run of MLflow, in the store that ``MLFLOW_TRACKING_URI`` names."""

    package, extra = "mlflow", "mlflow"

    def start(self, folder: Path, project: str, options: Mapping[str, Any], identity: str | None) -> str | None:
        self.client = import_module("mlflow").MlflowClient()
        if identity is not None:
            self.run_id = identity
            self.client.update_run(identity, status="RUNNING")
            return identity
        experiment = self.client.get_experiment_by_name(project)
        number = self.client.create_experiment(project) if experiment is None else experiment.experiment_id
        self.run_id = str(self.client.create_run(number, run_name=folder.name).info.run_id)
        for name, value in options.items():
            self.client.log_param(self.run_id, name, str(value)[:LONGEST_VALUE])
        return self.run_id

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run_id, name, value, step=epoch)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


class TrackerLog(Observer):
    """Passes the numbers of every epoch to a tracker; one that fails is left out, and the training continues."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name = name
        self.tracker: Tracker | None = tracker
        self.start_time = time.monotonic()

    def on_epoch(self, training: FineTuning) -> None:
        row = metrics_row(training, time.monotonic() - self.start_time)
        values = {key: float(value) for key, value in row.items() if value not in (None, "")}
        del values["epoch"]
        if self.tracker is None:
            return
        try:
            self.tracker.log(values, training.epoch)
        except Exception as error:
            training.tell(f"warning: {self.name} failed ({error}); from epoch {training.epoch} on it is left out.")
            failed, self.tracker = self.tracker, None
            with suppress(Exception):  # which was reported already
                failed.close()

    def close(self) -> None:
        tracker, self.tracker = self.tracker, None
        if tracker is None:
            return
        try:
            tracker.close()
        except Exception as error:
            warn(f"{self.name} failed at the end ({error}); what it shows of this run may be incomplete.")


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        InputError: one is not.
    """
    for name in names:
        tracker = TRACKERS[name]
        try:
            if importlib.util.find_spec(tracker.package) is None:
                raise ImportError(f"no module named {tracker.package!r}")
        except (ImportError, ValueError) as error:
            raise missing_package(tracker.package, tracker.extra, ImportError(str(error))) from error


def start_trackers(
    names: Sequence[str], folder: Path, project: str, options: Mapping[str, Any], *, resumed: bool
) -> list[TrackerLog]:
    """Observers that log to the trackers of these names.

    Args:
        names: of :data:`TRACKERS`.
        folder: run folder.
        project: what runs are grouped under.
        options: of the run, nested.
        resumed: the run is resumed, in the trackers as well.

    Raises:
        InputError: a tracker cannot be started.
    """
    identities = _read_identities(folder / TRACKERS_NAME) if resumed else {}
    flat = dict(_flatten(options))
    logs = []
    for name in names:
        tracker = TRACKERS[name]()
        try:
            identity = tracker.start(folder, project, flat, identities.get(name))
        except Exception as error:
            for log in logs:
                log.close()
            raise InputError(
                f"output.trackers: {name} cannot be started ({error}); leave it out, or set it up."
            ) from error
        if identity is not None:
            identities[name] = identity
        logs.append(TrackerLog(name, tracker))
    if identities:
        write_json(folder / TRACKERS_NAME, identities)
    return logs


def _read_identities(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # a new run there is no loss
    return {name: text for name, text in content.items() if isinstance(text, str)} if isinstance(content, dict) else {}


def _flatten(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in options.items():
        pairs += _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return pairs
