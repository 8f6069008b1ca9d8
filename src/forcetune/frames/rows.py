"""Rows of arrays on disk: one row for each frame, with some named arrays of any length.

A folder has ``rows.bin`` (the rows one after another), ``ends.bin`` (where each ends), small arrays of one number a row
by their name (``NAME.npy``) and ``index.json``. A row is the lengths of its arrays and then their bytes, each from a
multiple of 8. Rows are read and not mapped, so that pages of a large file do not count as memory of the process.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forcetune.errors import ForcetuneError

INDEX_NAME = "index.json"
_ROWS, _ENDS = "rows.bin", "ends.bin"
_STEP = 8


@dataclass(frozen=True, slots=True)
class Column:
    """What one array of every row has in common.

    Attributes:
        name: of the array.
        dtype: NumPy's name for the type of its numbers.
        shape: after the first dimension.
        scalar: it is one number and no array.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    scalar: bool = False

    @property
    def numbers(self) -> int:
        """In one entry."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of one entry."""
        return np.dtype(self.dtype).itemsize * self.numbers


def packed(columns: Sequence[Column], row: Mapping[str, Any]) -> bytes:
    """The bytes of one row; None stands for an array that is not there, as one without entries does."""
    arrays = []
    for column in columns:
        value = row[column.name]
        shape = (0 if value is None else -1, *column.shape)
        arrays.append(np.ascontiguousarray([] if value is None else value, dtype=column.dtype).reshape(shape))
    parts = [np.array([len(array) for array in arrays], dtype=np.int64).tobytes()]
    for array in arrays:
        content = array.tobytes()
        parts.append(content + bytes(-len(content) % _STEP))
    return b"".join(parts)


class RowWriter:
    """Writes rows in order into a new folder; nothing can be read before :meth:`close`."""

    def __init__(self, folder: Path, columns: Sequence[Column]) -> None:
        self.folder = folder
        self.columns = tuple(columns)
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = (folder / _ROWS).open("wb")
        self._ends = (folder / _ENDS).open("wb")
        self._end = 0

    def write(self, rows: Sequence[bytes]) -> None:
        """Append rows as :func:`packed` gives them."""
        ends = self._end + np.cumsum([len(row) for row in rows], dtype=np.int64)
        self._rows.write(b"".join(rows))
        self._ends.write(ends.tobytes())
        self._end = int(ends[-1]) if len(rows) else self._end

    def close(self, facts: Mapping[str, Any], numbers: Mapping[str, np.ndarray]) -> None:
        """Write facts (plain values) and arrays of one number a row, and bring everything to the disk."""
        for stream in (self._rows, self._ends):
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        for name, values in numbers.items():
            np.save(self.folder / f"{name}.npy", values)
        index = {"columns": [asdict(column) for column in self.columns], "facts": dict(facts)}
        (self.folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")

    def abandon(self) -> None:
        """Close what is open; the folder is thrown away."""
        self._rows.close()
        self._ends.close()


class RowReader:
    """Reads rows at random; may be used by several threads, and pickled.

    Attributes:
        folder: where the rows are.
        facts: as they were written.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ForcetuneError: the folder is damaged.
        """
        self.folder = folder
        try:
            index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
            self.facts: dict[str, Any] = index["facts"]
            columns = [Column(**{**column, "shape": tuple(column["shape"])}) for column in index["columns"]]
            self._columns = [(one, one.numbers, one.width, np.dtype(one.dtype)) for one in columns]
            self._ends = np.memmap(folder / _ENDS, dtype=np.int64, mode="r")
            self._stream = (folder / _ROWS).open("rb", buffering=0)
            whole = (folder / _ROWS).stat().st_size == self._ends[-1]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged() from error
        if not whole:
            raise self._damaged()
        self._lock = threading.Lock()

    def _damaged(self) -> ForcetuneError:
        return ForcetuneError(f"{self.folder}: stored frames are damaged; remove this folder, it is made again.")

    def __reduce__(self) -> tuple[Any, ...]:
        return RowReader, (self.folder,)

    def __len__(self) -> int:
        return len(self._ends)

    def numbers(self, name: str) -> np.ndarray:
        """(rows,) the array of one number a row, on disk."""
        try:
            found = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise self._damaged() from error
        if found.shape != (len(self),):
            raise self._damaged()
        return found

    def row(self, index: int) -> dict[str, Any]:
        """The arrays of one row; those without entries are empty, numbers that are not there None.

        Raises:
            ForcetuneError: the file is damaged.
        """
        begin = int(self._ends[index - 1]) if index else 0
        content = bytearray(max(0, int(self._ends[index]) - begin))
        with self._lock:
            self._stream.seek(begin)
            self._stream.readinto(content)
        try:
            return self._unpacked(content)
        except ValueError as error:
            raise self._damaged() from error

    def _unpacked(self, content: bytearray) -> dict[str, Any]:
        lengths = np.frombuffer(content, np.int64, len(self._columns))
        place, found = lengths.nbytes, {}
        for (column, numbers, width, dtype), length in zip(self._columns, lengths.tolist(), strict=True):
            values = np.frombuffer(content, dtype, length * numbers, place).reshape(length, *column.shape)
            found[column.name] = (values[0].item() if length else None) if column.scalar else values
            place += length * width + (-length * width) % _STEP
        return found
