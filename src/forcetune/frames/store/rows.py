"""Rows of arrays on disk: one row for each frame, with some named arrays of any length.

A folder has ``rows.bin`` (the rows one after another), ``ends.bin`` (where each ends), small arrays of one number a row
by their name (``NAME.npy``) and ``index.json``, whose second line is the SHA-256 of the first. A row is the lengths of
its arrays and then their bytes, each from a multiple of 8. Rows are read and not mapped, so that pages of a large file
do not count as memory of the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forcetune.errors import ForcetuneError, InputError

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


class WriteError(OSError):
    """A folder for rows cannot be written, or there is no room."""


@contextmanager
def writing() -> Iterator[None]:
    """Within this context rows are written and nothing else is done, so that every OSError is a :class:`WriteError`."""
    try:
        yield
    except OSError as error:
        raise WriteError(*error.args[:2]) from error


def bring_to_disk(path: Path) -> None:
    """Return when a file, or the entries of a folder, outlive a loss of power."""
    folder = path.is_dir()
    # not every system can do this with folders
    with suppress(OSError) if folder else nullcontext():
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class RowWriter:
    """Writes rows in order into a new folder; nothing can be read before :meth:`close`.

    Its methods raise :class:`WriteError`.
    """

    def __init__(self, folder: Path, columns: Sequence[Column]) -> None:
        self.folder = folder
        self.columns = tuple(columns)
        with writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._rows = (folder / _ROWS).open("wb")
            self._ends = (folder / _ENDS).open("wb")
        self._end = 0

    def write(self, rows: Sequence[bytes]) -> None:
        """Append rows as :func:`packed` gives them."""
        ends = self._end + np.cumsum([len(row) for row in rows], dtype=np.int64)
        with writing():
            self._rows.write(b"".join(rows))
            self._ends.write(ends.tobytes())
        self._end = int(ends[-1]) if len(rows) else self._end

    def close(self, facts: Mapping[str, Any], numbers: Mapping[str, np.ndarray]) -> None:
        """Write facts (plain values) and arrays of one number a row, and bring everything to the disk."""
        with writing():
            self._rows.close()
            self._ends.close()
            for name, values in numbers.items():
                np.save(self.folder / f"{name}.npy", values)
            for name in (_ROWS, _ENDS, *(f"{name}.npy" for name in numbers)):
                bring_to_disk(self.folder / name)
            _write_index(self.folder, {"columns": [asdict(column) for column in self.columns], "facts": dict(facts)})

    def abandon(self) -> None:
        """Close what is open; the folder is thrown away."""
        for stream in (self._rows, self._ends):
            with suppress(OSError):  # what is still to be written may find no room
                stream.close()


def add_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to those of rows that are complete.

    Raises:
        WriteError: it is so.
    """
    with writing():
        index = _read_index(folder)
        _write_index(folder, index | {"facts": index["facts"] | facts})


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    text = json.dumps(index)
    hashed = hashlib.sha256(text.encode()).hexdigest()
    (folder / INDEX_NAME).write_text(f"{text}\n{hashed}\n", encoding="utf-8")
    bring_to_disk(folder / INDEX_NAME)


def _read_index(folder: Path) -> dict[str, Any]:
    """
    Raises:
        OSError, ValueError: it is damaged.
    """
    text, _, hashed = (folder / INDEX_NAME).read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != hashed.strip():
        raise ValueError("it was changed since it was written")
    return json.loads(text)


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
            index = _read_index(folder)
            self.facts: dict[str, Any] = index["facts"]
            columns = [Column(**{**column, "shape": tuple(column["shape"])}) for column in index["columns"]]
            self._columns = [(one, one.numbers, one.width, np.dtype(one.dtype)) for one in columns]
            self._ends = np.memmap(folder / _ENDS, dtype=np.int64, mode="r")
            self._stream = (folder / _ROWS).open("rb", buffering=0)
            self._size = os.fstat(self._stream.fileno()).st_size
        except PermissionError as error:
            raise InputError(
                f"{folder}: stored frames cannot be opened ({error.strerror}); set data.store to another folder."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged() from error
        if self._size != self._ends[-1]:
            raise self.damaged()
        self._lock = threading.Lock()

    def damaged(self) -> ForcetuneError:
        """What to raise where something else stands here than was written."""
        return ForcetuneError(f"{self.folder}: stored frames are damaged; remove this folder, it is made again.")

    def __reduce__(self) -> tuple[Any, ...]:
        return RowReader, (self.folder,)

    def __len__(self) -> int:
        return len(self._ends)

    def numbers(self, name: str) -> np.ndarray:
        """(rows,) the array of one number a row, on disk."""
        try:
            # np.load would take an archive or a pickle, too
            column = np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="r")
        except (OSError, ValueError) as error:
            raise self.damaged() from error
        if column.shape != (len(self),):
            raise self.damaged()
        return column

    def row(self, index: int) -> dict[str, Any]:
        """The arrays of one row; those without entries are empty, numbers that are not there None.

        Raises:
            ForcetuneError: the file is damaged.
        """
        begin, end = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        if not 0 <= begin <= end <= self._size:
            raise self.damaged()
        try:
            return self._unpacked(self._bytes(begin, end))
        except (OSError, ValueError) as error:
            raise self.damaged() from error

    def _bytes(self, begin: int, end: int) -> bytearray:
        """
        Raises:
            OSError, ValueError: they cannot be read, or the file has become shorter.
        """
        content = bytearray(end - begin)
        left = memoryview(content)
        with self._lock:
            self._stream.seek(begin)
            while left:
                done = self._stream.readinto(left)
                if not done:
                    raise ValueError("the file ends before the row does")
                left = left[done:]
        return content

    def _unpacked(self, content: bytearray) -> dict[str, Any]:
        lengths = np.frombuffer(content, np.int64, len(self._columns))
        if (lengths < 0).any():
            raise ValueError("a length is negative")
        place, columns = lengths.nbytes, {}
        for (column, numbers, width, dtype), length in zip(self._columns, lengths.tolist(), strict=True):
            values = np.frombuffer(content, dtype, length * numbers, place).reshape(length, *column.shape)
            columns[column.name] = (values[0].item() if length else None) if column.scalar else values
            place += length * width + (-length * width) % _STEP
        return columns
