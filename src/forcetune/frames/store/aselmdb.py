"""Frames of ASE's LMDB databases (``.aselmdb``): one compressed JSON row for each id.

LMDBs of pickled objects are refused: reading them would run whatever they say. LMDB's own code trusts the pages of a
file, so these functions are called in a process that may die (:mod:`forcetune.frames.store.chunks`).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.db.row import AtomsRow
from ase.io.jsonio import fix_int_keys_in_dicts, numpyfy, object_hook

from forcetune.errors import InputError
from forcetune.frames.defects import guarded, read_structure, refusing
from forcetune.frames.frame import Origin

_LARGEST_ROW = 64 * 2**20
_LEAST_UNPACKED = 2**20
_RATIO = 100
_LARGEST_NUMBER = 32  # bytes; a complex one of long doubles
_LARGEST_TEXTS = 2**22


def row_ids(path: Path) -> list[tuple[int, int]]:
    """The ids of all rows, in order, as ranges (first, end).

    Raises:
        InputError: this is no LMDB, or one of something else than rows of ASE.
    """
    with refusing(path), _opened(path) as read:
        announced = _value(path, read(b"nextid"))
        deleted = _value(path, read(b"deleted_ids"))
        deleted = [] if deleted is None else np.asarray(deleted).tolist()  # ASE's reader makes arrays of lists
        if announced is None:
            raise _other_content(path, read(None))
        if not isinstance(announced, int) or not isinstance(deleted, list):
            raise InputError(f"{path}: its table of rows is damaged; write it again.")
        gaps = sorted({gap for gap in deleted if isinstance(gap, int) and 0 < gap < announced})
        bounds = [0, *gaps, announced]
        ranges = [(low + 1, high) for low, high in pairwise(bounds) if low + 1 < high]
        rows, entries = sum(end - first for first, end in ranges), int(read("entries"))
        if rows > entries:
            raise InputError(f"{path}: announces {rows:,} rows but holds {entries:,}; write it again.")
    return ranges


def read_rows(path: Path, first: int, end: int, start: int) -> Iterator[Atoms]:
    """The rows with these ids, of which the first is frame ``start``.

    Raises:
        InputError: a row is missing, damaged, or unpacks to more than a frame has.
    """
    with refusing(path), _opened(path) as read:
        yield from guarded(path, (_atoms(path, read(str(i).encode()), i) for i in range(first, end)), start)


def _atoms(path: Path, packed: bytes | None, identity: int) -> Atoms:
    content = _value(path, packed)
    if not isinstance(content, dict):
        raise ValueError(f"row {identity} is missing")
    for key in all_properties:
        if isinstance(content.get(key), list):
            content[key] = np.array(content[key])
    return read_structure(AtomsRow(content | {"id": identity}))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A function that gives the bytes under a key, ``entries`` their number and None the first value."""
    try:
        import lmdb
    except ImportError as error:
        raise InputError(f"{path}: reading LMDB needs a package that is not here; pip install lmdb.") from error
    try:
        environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, max_readers=1)
    except lmdb.Error as error:
        raise InputError(f"{path}: no LMDB database ({str(error)[:120]}); write it again.") from error
    try:
        with environment.begin() as transaction:

            def read(key: Any) -> Any:
                if key == "entries":
                    return environment.stat()["entries"]
                if key is None:
                    return next((bytes(value) for _, value in transaction.cursor()), b"")
                return transaction.get(key)

            yield read
    except lmdb.Error as error:
        raise InputError(f"{path}: cannot be read ({str(error)[:120]}); copy or write it again.") from error
    finally:
        environment.close()


def _value(path: Path, packed: bytes | None) -> Any:
    """What ASE wrote: JSON, compressed.

    Raises:
        InputError: a pickle.
        ValueError: it unpacks to more than a frame has.
    """
    if packed is None:
        return None
    if packed[:1] == b"\x80":
        raise _other_content(path, packed)
    unpacker = zlib.decompressobj()
    most = min(_LARGEST_ROW, max(_LEAST_UNPACKED, _RATIO * len(packed)))
    try:
        text = unpacker.decompress(packed, most)
        if unpacker.unconsumed_tail:
            raise InputError(f"{path}: a row of {len(packed):,} bytes unpacks to more than {most:,}; write it again.")
        if not unpacker.eof:
            raise InputError(f"{path}: a row is cut short; copy the file again.")
        return numpyfy(fix_int_keys_in_dicts(_decode(text.decode("utf-8"))))
    except (zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: a row is damaged ({str(error)[:80]}); copy the file again.") from error


def _hook(content: dict[str, Any]) -> Any:
    """ASE's, which makes room for an array of any shape before it looks at the numbers.

    Raises:
        ValueError: an array has another number of entries than its shape says, or such as no frame has.
    """
    if "__ndarray__" in content:
        shape, name, entries = content["__ndarray__"]
        dtype = np.dtype(name)
        count = math.prod(shape) * (2 if dtype.kind == "c" else 1)
        if not isinstance(entries, list) or count != len(entries) or min(shape, default=0) < 0:
            raise ValueError("an array has another number of entries than its shape says")
        number = dtype.kind in "biufc" and dtype.itemsize <= _LARGEST_NUMBER
        if not number and not (dtype.kind in "SU" and dtype.itemsize * count <= _LARGEST_TEXTS):
            raise ValueError("an array has entries that are no numbers")
    return object_hook(content)


_decode = json.JSONDecoder(object_hook=_hook).decode


def _other_content(path: Path, value: bytes) -> InputError:
    if value[:1] == b"\x80":
        return InputError(
            f"{path}: holds pickled objects, which can run code when they are read; write the frames as an ASE "
            "database (.aselmdb or .db) or as extended XYZ."
        )
    return InputError(
        f"{Origin(str(path), 0)}: holds no rows of an ASE database; write the frames by ase.db (.aselmdb, .db)."
    )
