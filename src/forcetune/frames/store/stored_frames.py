"""Frames that stay on disk: sequences that read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, overload

import numpy as np

from forcetune.config import SpinInputs
from forcetune.frames.frame import Frame, Origin
from forcetune.frames.spins import with_spins
from forcetune.frames.store.rows import Column, RowReader, packed

_KINDS: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "IntArray": ("int64", (), False),
    "FloatArray": ("float64", (3,), False),
    "npt.NDArray[np.bool_]": ("bool", (), False),
    "float": ("float64", (), True),
}
"""Type of a frame's field → dtype, shape after the first dimension, and whether it is one number."""


def _column(name: str, annotation: str) -> Column:
    dtype, shape, scalar = _KINDS[annotation.removesuffix(" | None")]
    return Column(name, dtype, shape, scalar)


_NOT_STORED = frozenset({"origin", "hessian", "hessian_weight"})
_FIELDS = tuple(_column(field.name, str(field.type)) for field in fields(Frame) if field.name not in _NOT_STORED)
FRAME_COLUMNS = (*_FIELDS, Column("file", "int64", scalar=True), Column("index", "int64", scalar=True))
"""What is stored of a frame: its fields but Hessians, and for its origin the numbers of the file and in the file."""

LABEL_FIELDS = tuple(
    field.name for field in fields(Frame) if field.name not in _NOT_STORED and str(field.type).endswith("None")
)
"""Fields of a stored frame that may be None."""


def packed_frame(frame: Frame, file: int) -> bytes:
    """A frame as a row, with the number of its file among those of the store."""
    row: dict[str, Any] = {column.name: getattr(frame, column.name) for column in _FIELDS}
    return packed(FRAME_COLUMNS, row | {"file": file, "index": frame.origin.index})


class StoredFrames(Sequence[Frame]):
    """Frames of a store, or some of them in any order; each is read when it is asked for.

    Attributes:
        rows: the store.
        indices: (frames,) numbers of the frames in it.
        inputs: the magnetic state that frames are read with (:func:`forcetune.frames.spins.with_spins`); None
            leaves what is stored.
    """

    def __init__(self, rows: RowReader, indices: np.ndarray | None = None, *, inputs: SpinInputs | None = None) -> None:
        self.rows = rows
        self.indices = np.arange(len(rows)) if indices is None else indices
        self.inputs: SpinInputs | None = inputs

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Frame: ...
    @overload
    def __getitem__(self, index: slice) -> StoredFrames: ...
    def __getitem__(self, index: int | slice) -> Frame | StoredFrames:
        if isinstance(index, slice):
            return self.take(self.indices[index])
        row = self.rows.row(int(self.indices[index]))
        try:
            origin = Origin(self.rows.facts["files"][row.pop("file")], row.pop("index"))
        except (IndexError, TypeError) as error:
            raise self.rows.damaged() from error
        for name in LABEL_FIELDS:
            value = row[name]
            row[name] = None if isinstance(value, np.ndarray) and not len(value) else value
        frame = Frame(**row, origin=origin)
        return frame if self.inputs is None else with_spins([frame], self.inputs)[0]

    def __iter__(self) -> Iterator[Frame]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: np.ndarray) -> StoredFrames:
        """Frames with these numbers in the store."""
        return StoredFrames(self.rows, indices, inputs=self.inputs)

    def with_spins(self, inputs: SpinInputs) -> StoredFrames:
        """The same frames, read with this magnetic state."""
        return StoredFrames(self.rows, self.indices, inputs=inputs)

    @property
    def atoms(self) -> np.ndarray:
        """(frames,) number of atoms of each."""
        return np.asarray(self.rows.numbers("atoms")[self.indices])

    @property
    def alone(self) -> np.ndarray:
        """(frames,) whether each is an isolated atom."""
        return np.asarray(self.rows.numbers("alone")[self.indices])

    @property
    def stress_without_cell(self) -> np.ndarray:
        """(frames,) whether each has a stress but no cell that it could belong to."""
        return np.asarray(self.rows.numbers("stress_without_cell")[self.indices])

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        sets = self.rows.facts["element_sets"]
        return tuple(sorted({z for kind in np.unique(self.rows.numbers("kind")[self.indices]) for z in sets[kind]}))

    def any_label(self, name: str) -> bool:
        """Whether some frame has a value in this field."""
        count = self.rows.facts["labelled"][name]
        if count in (0, len(self.rows)):
            return bool(count) and len(self) > 0
        return any(getattr(frame, name) is not None for frame in self)

    def all_have(self, name: str) -> bool:
        """Whether every frame of the store has a value in this field; False may be wrong for some of them."""
        return self.rows.facts["labelled"][name] == len(self.rows)


def list_elements(frames: Sequence[Frame]) -> tuple[int, ...]:
    """Atomic numbers that occur, ascending."""
    if isinstance(frames, StoredFrames):
        return frames.elements
    return tuple(sorted({int(z) for frame in frames for z in frame.numbers}))


def count_atoms(frames: Sequence[Frame]) -> np.ndarray:
    """(frames,) number of atoms of each."""
    return frames.atoms if isinstance(frames, StoredFrames) else np.array([len(frame) for frame in frames], dtype=int)


def has_label(frames: Sequence[Frame], name: str) -> bool:
    """Whether some frame has a value in this field."""
    if isinstance(frames, StoredFrames):
        return frames.any_label(name)
    return any(getattr(frame, name) is not None for frame in frames)
