"""``metrics.csv``: the table of every epoch, read while the run writes it and after."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forcetune.runs.results import damaged

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Metrics:
    """The columns of ``metrics.csv``.

    Attributes:
        columns: name to (rows,) values, NaN where the file has none.
        stages: (rows,) names of the training stage.
    """

    columns: Mapping[str, FloatArray]
    stages: Sequence[str]

    def __getitem__(self, name: str) -> FloatArray:
        return self.columns.get(name, np.full(len(self.stages), np.nan))

    @property
    def second_stage(self) -> float | None:
        """Epoch at which the second stage starts, None when there is none."""
        changed = [i for i, stage in enumerate(self.stages) if stage and stage != self.stages[0]]
        return float(self["epoch"][changed[0]]) if changed else None


def read_metrics(path: Path) -> Metrics | None:
    """Read ``metrics.csv``; None when it is absent or has no rows yet.

    A last line without its end is left out: the run is writing it just now, or was stopped while it did.

    Raises:
        InputError: not a table with an ``epoch`` column, or a value that is no number.
    """
    if not path.exists():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, "it cannot be read as text") from error
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    try:
        table = list(csv.reader(lines))
    except csv.Error as error:
        raise damaged(path, f"it is no table ({error})") from error
    if not table:
        return None
    head, *rows = table
    if "epoch" not in head:
        raise damaged(path, "it has no column 'epoch'")
    for line, row in enumerate(rows, start=2):
        if len(row) != len(head):
            raise damaged(path, f"line {line} has {len(row)} values for {len(head)} columns")
    if not rows:
        return None
    columns: dict[str, FloatArray] = {}
    stages = [""] * len(rows)
    for name, texts in zip(head, zip(*rows, strict=True), strict=True):
        if name == "stage":
            stages = [text.strip() for text in texts]
            continue
        try:
            columns[name] = np.array([float(text) if text.strip() else np.nan for text in texts])
        except ValueError as error:
            raise damaged(path, f"column {name!r} holds something that is no number") from error
    return Metrics(columns, stages)
