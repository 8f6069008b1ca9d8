"""Files cut into pieces of some frames, which can be read apart from each other and by other processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import ase.db
import numpy as np
from ase import Atoms

from forcetune.errors import InputError
from forcetune.frames.defects import guarded, no_frames, read_structure, refusing
from forcetune.frames.frame import Origin
from forcetune.frames.sources import iterate
from forcetune.frames.store import aselmdb, hdf5
from forcetune.frames.xyz import PIECE, PIECE_TEXT, XYZ_FORMATS, xyz_pieces, xyz_structures
from forcetune.utils.processes import WorkerDiedError, map_in_order

Item = TypeVar("Item")

CHUNK = PIECE
"""Frames of a chunk, at most."""
_CHUNK_TEXT = PIECE_TEXT
_LEAST_UNPACKED = 2**28
_RATIO = 200

DANGEROUS = frozenset({"hdf5", "aselmdb"})
"""Formats whose libraries may crash on a damaged file: they are read in another process."""


@dataclass(frozen=True, slots=True)
class FileChunk:
    """Some neighbouring frames of a file.

    Attributes:
        path, format_name: of the file.
        start: number of the first frame.
        count: frames in it.
        content: by format: the text of the frames; first and last id of rows (the end not included); name of a batch
            with first frame and end; or the structures themselves.
    """

    path: Path
    format_name: str
    start: int
    count: int
    content: Any

    def structures(self) -> Iterator[Atoms]:
        """
        Raises:
            InputError: a frame is damaged, or there are not as many as were announced.
        """
        count = 0
        with refusing(self.path):
            for atoms in self._structures():
                count += 1
                if count > self.count:
                    break
                yield atoms
        if count != self.count:
            # frames that are dropped or repeated would go unnoticed in a set of many
            raise InputError(
                f"{Origin(str(self.path), self.start)}: here are {'more' if count > self.count else 'fewer'} frames "
                f"than the {self.count} that were counted before; the file is damaged or was changed while it was "
                "read, write it again."
            )

    def _structures(self) -> Iterator[Atoms]:
        if self.format_name in XYZ_FORMATS:
            return guarded(self.path, xyz_structures(self.content, self.format_name), self.start)
        if self.format_name == "db":
            return guarded(self.path, _rows(self.path, *self.content), self.start)
        if self.format_name == "aselmdb":
            return aselmdb.read_rows(self.path, *self.content, start=self.start)
        if self.format_name == "hdf5":
            return hdf5.read_groups(self.path, *self.content, start=self.start)
        return iter(self.content)


def iterate_chunks(path: Path, format_name: str, type_map: Sequence[str] = ()) -> Iterator[FileChunk]:
    """The chunks of a file in order.

    Raises:
        InputError: the file is damaged or holds no frames.
    """
    start = 0
    with refusing(path):
        for count, content in _contents(path, format_name, type_map):
            yield FileChunk(path, format_name, start, count, content)
            start += count
    if start == 0:
        raise no_frames(path, format_name)


def iterate_structures(path: Path, format_name: str, type_map: Sequence[str] = ()) -> Iterator[Atoms]:
    """All structures of a file; those of a dangerous format are read by another process.

    Raises:
        InputError: as :func:`forcetune.frames.sources.iterate`.
    """
    if format_name not in DANGEROUS:
        yield from iterate(path, format_name, type_map)
        return
    size, most = 0, max(_LEAST_UNPACKED, _RATIO * path.stat().st_size)
    for structures in safely(path, map_in_order(_listed, iterate_chunks(path, format_name), 1)):
        size += sum(map(_count_bytes, structures))
        if size > most:
            raise InputError(f"{path}: its frames unpack to more than {most:,} bytes; write it again.")
        yield from structures


def safely(path: Path, results: Iterator[Any]) -> Iterator[Any]:
    """The results of workers that read a file of a dangerous format.

    Raises:
        InputError: the file made its reader die.
    """
    try:
        yield from results
    except WorkerDiedError as error:
        if error.killed:
            raise crashed(path) from error
        raise


def crashed(path: Path) -> InputError:
    """Of a file of a dangerous format that made its reader die."""
    return InputError(f"{path}: its reader crashed; the file is damaged, copy or write it again.")


def _count_bytes(atoms: Atoms) -> int:
    """What arrays of a structure take in memory."""
    results = {} if atoms.calc is None else atoms.calc.results
    values = (*atoms.arrays.values(), *atoms.info.values(), *results.values())
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def _listed(chunk: FileChunk) -> list[Atoms]:
    return list(chunk.structures())


def _contents(path: Path, format_name: str, type_map: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """The content of every chunk with its number of frames."""
    if format_name in XYZ_FORMATS:
        yield from xyz_pieces(path, _CHUNK_TEXT)
    elif format_name == "db":
        for some in _some(guarded(path, _ids(path))):
            yield len(some), (some[0], some[-1] + 1)
    elif format_name == "aselmdb":
        (ranges,) = safely(path, map_in_order(aselmdb.row_ids, [path], 1))
        for first, end in ranges:
            for low in range(first, end, CHUNK):
                high = min(low + CHUNK, end)
                yield high - low, (low, high)
    elif format_name == "hdf5":
        (groups,) = safely(path, map_in_order(hdf5.frame_groups, [path], 1))
        for batch, names in groups:
            for low in range(0, len(names), CHUNK):
                some = names[low : low + CHUNK].tolist()
                yield len(some), (batch, some)
    else:
        for some in _some(iterate(path, format_name, type_map)):
            yield len(some), some


def _some(items: Iterable[Item]) -> Iterator[list[Item]]:
    left = iter(items)
    while batch := list(islice(left, CHUNK)):
        yield batch


def _connection(path: Path) -> Any:
    return ase.db.connect(str(path), type="db", serial=True)


def _ids(path: Path) -> Iterator[Any]:
    """Of all rows of an SQLite database."""
    # within the context all rows share one connection; unsorted, SQLite answers in the order of an index of its choice
    with _connection(path) as database:
        for row in database.select(columns=["id"], include_data=False, sort="id"):
            yield row.id


def _rows(path: Path, first: int, end: int) -> Iterator[Atoms]:
    """Rows of an SQLite database with ids in a range."""
    with _connection(path) as database:
        for row in database.select([("id", ">=", first), ("id", "<", end)], sort="id"):
            yield read_structure(row)
