"""From file names and patterns to ASE structures, every failure on the way reported in one sentence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import ase.db
import ase.io
from ase import Atoms
from ase.io.formats import UnknownFileTypeError, filetype

from forcetune.errors import ForcetuneError, InputError, warn
from forcetune.frames import formats
from forcetune.frames.defects import guarded, no_frames, read_structure
from forcetune.frames.store import mptrj
from forcetune.frames.store.mptrj import is_mptrj
from forcetune.frames.text import read_head
from forcetune.frames.xyz import ARCHIVE, XYZ_FORMATS, is_xyz, xyz_pieces, xyz_structures
from forcetune.utils.files import as_path, compute_sha256
from forcetune.utils.parsing import first_line

ENDINGS = {".h5": "hdf5", ".hdf5": "hdf5", ".aselmdb": "aselmdb", ".lmdb": "aselmdb", ".mdb": "aselmdb"}
DATABASE_FORMATS = frozenset({"db", "json"})


def expand(sources: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """The files that names and patterns stand for, in the order given; matches of a pattern are sorted.

    A file that is named twice is read once, and a warning says so.

    Raises:
        InputError: nothing was named, a pattern matches no file, or a file is missing, a folder or empty.
    """
    named = [sources] if isinstance(sources, str | Path) else list(sources)
    if not named:
        raise InputError("No data file was named; name at least one.")
    files: dict[Path, Path] = {}
    for source in named:
        for path in _matches(as_path(source)):
            _check_readable(path)
            if path.resolve() in files:
                warn(f"{path}: named more than once; its frames are used once.")
            files.setdefault(path.resolve(), path)
    return tuple(files.values())


def _matches(path: Path) -> list[Path]:
    """The path itself, the data folders in it, or the files and data folders that match it where it is a pattern."""
    if path.exists() or not any(character in str(path) for character in "*?["):
        return (formats.data_folders(path) or [path]) if path.is_dir() else [path]
    start = Path(path.anchor) if path.anchor else Path()
    pattern = str(path.relative_to(path.anchor)) if path.anchor else str(path)
    try:
        matches = sorted(start.glob(pattern))
    except ValueError as error:
        raise InputError(f"{path}: not a pattern that can be followed ({error}).") from error
    folders = {folder for match in matches if match.is_dir() for folder in formats.data_folders(match)}
    files = {match for match in matches if match.is_file()}
    # what stands in a data folder is read with it
    sorted_matches = sorted(match for match in files | folders if not folders & set(match.parents))
    if not sorted_matches:
        raise InputError(f"{path}: no file matches this pattern; check the folder and the ending.")
    return sorted_matches


def _check_readable(path: Path) -> None:
    if path.is_dir():
        if formats.recognize(path, ""):
            return
        raise InputError(
            f"{path}: a folder, not a file, and none of deepmd data (type.raw and set.000); name a file in it or a "
            f"pattern such as {path}/*.xyz."
        )
    if not path.exists():
        raise InputError(f"{path}: there is no such file; check its name and folder.")
    try:
        with path.open("rb") as stream:
            empty = not stream.read(1)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check its permissions.") from error
    if empty:
        raise InputError(f"{path}: the file is empty; copy or write it again.")


def file_format(path: Path) -> str:
    """Our name for a format of ours (:mod:`forcetune.frames.formats`, ``hdf5``, ``aselmdb``, …), or ASE's for others.

    What a file holds goes before its ending.

    Raises:
        InputError: it is no known format.
    """
    if path.suffix in ENDINGS:
        return ENDINGS[path.suffix]
    if path.suffix == ARCHIVE:
        return "extxyz"
    try:
        head = "" if path.is_dir() else read_head(path)
        if name := formats.recognize(path, head):
            return name
        if is_mptrj(path):
            return mptrj.FORMAT
        return "extxyz" if is_xyz(head) else filetype(str(path))
    except UnknownFileTypeError as error:
        raise _unknown_format(path) from error
    except ForcetuneError:
        raise
    except Exception as error:
        # a damaged compressed file raises whatever its library raises
        raise InputError(f"{path}: cannot be read ({first_line(error)}); copy the file again.") from error


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of all files that are read with what is named."""
    parts = formats.list_files(path)
    if parts == [path]:
        return compute_sha256(path)
    named = "".join(f"{part.name}:{compute_sha256(part)}\n" for part in parts)
    return hashlib.sha256(named.encode()).hexdigest()


def content_size(path: Path) -> int:
    """Bytes of a file, or of all files that are read with what is named."""
    return sum(part.stat().st_size for part in formats.list_files(path))


def iterate(path: Path, format_name: str, type_map: Sequence[str] = ()) -> Iterator[Atoms]:
    """The structures of one file, one at a time; ``format_name`` is what :func:`file_format` says.

    Args:
        path: the file.
        format_name: of it.
        type_map: elements of numbered types, for formats that have them.

    Raises:
        InputError: the file is damaged, cut short or holds no frames; the message has the frame reached.
    """
    if format_name == mptrj.FORMAT:
        yield from mptrj.iterate_mptrj(path)
        return
    count = 0
    for atoms in _structures(path, format_name, type_map):
        yield atoms
        count += 1
    if count == 0:
        raise no_frames(path, format_name)


def _structures(path: Path, format_name: str, type_map: Sequence[str]) -> Iterator[Atoms]:
    if format_name in XYZ_FORMATS:
        start = 0
        for count, text in xyz_pieces(path):
            yield from guarded(path, xyz_structures(text, format_name), start)
            start += count
        return
    if format_name in formats.FORMATS:
        structures: Iterable[Atoms] = formats.FORMATS[format_name].read(path, type_map)
    elif format_name in DATABASE_FORMATS:
        structures = _database_rows(path, format_name)
    else:
        # '@' splits names in ASE, and parallel=True would let one MPI rank read for all
        structures = ase.io.iread(str(path), ":", format=format_name, parallel=False, do_not_split_by_at_sign=True)
    try:
        yield from guarded(path, iter(structures))
    except UnknownFileTypeError as error:
        raise _unknown_format(path) from error


def _database_rows(path: Path, format_name: str) -> Iterator[Atoms]:
    return (read_structure(row) for row in ase.db.connect(str(path), type=format_name, serial=True).select())


def _unknown_format(path: Path) -> InputError:
    return InputError(
        f"{path}: not a format that ASE can read, nor one of {', '.join(formats.FORMATS)}; "
        "convert it to extended XYZ (.xyz)."
    )
