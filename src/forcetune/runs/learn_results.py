"""``round.json`` and ``learn.json``: the one schema by which `forcetune learn` writes and reads what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from forcetune._version import __version__
from forcetune.errors import InputError
from forcetune.utils.files import write_json

ROUND_NAME = "round.json"
LEARN_NAME = "learn.json"
Errors = dict[str, int | float | None]
Record = TypeVar("Record", bound=BaseModel)
Status = Literal["running", "target reached", "sure everywhere", "nothing new", "rounds", "labels", "failures"]


class _Part(BaseModel):
    """Keys of later versions are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class DynamicsRecord(_Part):
    """One trajectory; uncertainties are those of the force on one atom, eV/Å.

    Attributes:
        number: from 1.
        start: place of its start structure among all of them, from 0.
        ended, reason: as :class:`forcetune.deployment.exploration.Exploration`.
        picoseconds: simulated.
        final_temperature_k: of the thermostat at the end.
        looks, beyond, collected: structures looked at, of these beyond the bound, and collected.
        mean_std, largest_std: over the looks.
    """

    number: int
    start: int
    ended: Literal["length", "uncertainty", "watch", "broken"]
    reason: str = ""
    picoseconds: float
    final_temperature_k: float
    looks: int
    beyond: int
    collected: int
    mean_std: float
    largest_std: float


class FailedLabel(_Part):
    """A structure that could not be labelled: its number in ``selected.xyz`` from 1, and why."""

    number: int
    reason: str


class RoundRecord(_Part):
    """One round; the first, number 0, is the fit to the frames that there were.

    Attributes:
        number: of the round.
        dynamics: in their order, with the model of the round before.
        collected, selected, labelled: numbers of structures.
        failed: structures that were left out.
        new: errors of the model of the round before on the new frames (as ``forcetune evaluate --json``), and beside
            them ``forces_std_mev_per_ang``, root mean square of the calibrated standard deviations of the components.
        bound: of the uncertainty, eV/Å; with the first round.
        train_frames: that the model of this round was trained on.
        errors: of the model of this round, by split.
    """

    number: int
    dynamics: list[DynamicsRecord] = []
    collected: int = 0
    selected: int = 0
    labelled: int = 0
    failed: list[FailedLabel] = []
    new: Errors = {}
    bound: float | None = None
    train_frames: int = 0
    errors: dict[str, Errors] = {}


class LearnRecord(_Part):
    """All of ``learn.json``.

    Attributes:
        status, reason: why it ended, or ``running``.
        labeller: name.
        bound: of the uncertainty, eV/Å; None before it is known.
        labels: spent in all rounds, failed ones included.
        rounds: that are finished.
    """

    forcetune: str = __version__
    status: Status = "running"
    reason: str = ""
    labeller: str
    bound: float | None = None
    labels: int = 0
    rounds: list[RoundRecord] = []


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record as JSON, atomically."""
    write_json(path, record.model_dump())


def read_round(path: Path) -> RoundRecord | None:
    """A round that is finished; None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    return _read(path, RoundRecord)


def read_learn(path: Path) -> LearnRecord | None:
    """What ``learn.json`` holds; None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    return _read(path, LearnRecord)


def read_dynamics(path: Path) -> DynamicsRecord | None:
    """A trajectory that is finished; None where there is none.

    Raises:
        InputError: the file is damaged.
    """
    return _read(path, DynamicsRecord)


def _read(path: Path, kind: type[Record]) -> Record | None:
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError, RecursionError) as error:
        what = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be read ({what}); remove it to do this part again.") from error
