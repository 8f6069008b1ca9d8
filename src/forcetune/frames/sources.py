"""From file names and patterns to ASE structures, every failure on the way told in one sentence."""

from __future__ import annotations

import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any

import ase.db
import ase.io
from ase import Atoms
from ase.db.row import AtomsRow
from ase.io.formats import UnknownFileTypeError, filetype, open_with_compression

from forcetune.errors import ForcetuneError, InputError, warn
from forcetune.files import path_of
from forcetune.frames import mptrj
from forcetune.frames.comment_line import parse_comment
from forcetune.frames.frame import Origin
from forcetune.frames.mptrj import is_mptrj
from forcetune.parsing import check_archive, check_unpacked

XYZ_FORMATS = frozenset({"extxyz", "xyz"})
ENDINGS = {".h5": "hdf5", ".hdf5": "hdf5", ".aselmdb": "aselmdb", ".lmdb": "aselmdb", ".mdb": "aselmdb"}
DATABASE_FORMATS = frozenset({"db", "json"})


_LONGEST_LINE = 16 * 2**20
_LARGEST_FRAME = 512 * 2**20
_MOST_LINES = 10_000_000
_MOST_COLUMNS = 10_000
COMPRESSED = frozenset({".gz", ".bz2", ".xz"})
ARCHIVE = ".zip"
"""Ending of archives of extended-XYZ files, which are read one after another as if they were one."""


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
        for path in _matches(path_of(source)):
            _check_readable(path)
            if path.resolve() in files:
                warn(f"{path}: named more than once; its frames are used once.")
            files.setdefault(path.resolve(), path)
    return tuple(files.values())


def _matches(path: Path) -> list[Path]:
    """The path itself, or the files that match it where it is a pattern."""
    if path.exists() or not any(character in str(path) for character in "*?["):
        return [path]
    start = Path(path.anchor) if path.anchor else Path()
    pattern = str(path.relative_to(path.anchor)) if path.anchor else str(path)
    try:
        found = sorted(match for match in start.glob(pattern) if match.is_file())
    except ValueError as error:
        raise InputError(f"{path}: not a pattern that can be followed ({error}).") from error
    if not found:
        raise InputError(f"{path}: no file matches this pattern; check the folder and the ending.")
    return found


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a file; name a file in it or a pattern such as {path}/*.xyz.")
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
    """ASE's name for the format of a file, or ``hdf5`` or ``aselmdb``, which are read without ASE.

    Raises:
        InputError: ASE does not know it.
    """
    if path.suffix in ENDINGS:
        return ENDINGS[path.suffix]
    if path.suffix == ARCHIVE:
        return "extxyz"
    if is_mptrj(path):
        return mptrj.FORMAT
    try:
        return filetype(str(path))
    except UnknownFileTypeError as error:
        raise _unknown_format(path) from error
    except Exception as error:
        # a damaged compressed file raises whatever its library raises
        raise InputError(f"{path}: cannot be read ({_told(error)}); copy the file again.") from error


def iterate(path: Path, format_name: str) -> Iterator[Atoms]:
    """The structures of one file, one at a time; ``format_name`` is what :func:`file_format` says.

    Raises:
        InputError: the file is damaged, cut short or holds no frames; the message has the frame reached.
    """
    if format_name == mptrj.FORMAT:
        yield from mptrj.iterate_mptrj(path)
        return
    if format_name in XYZ_FORMATS:
        check_xyz(path)
    count = 0
    for atoms in guarded(path, _structures(path, format_name)):
        yield atoms
        count += 1
    if count == 0:
        raise no_frames(path, format_name)


def no_frames(path: Path, format_name: str) -> InputError:
    """Of a file that is none, or has none."""
    return InputError(f"{path}: holds no frames ({format_name} format); write it again.")


def guarded(path: Path, structures: Iterator[Atoms], start: int = 0) -> Iterator[Atoms]:
    """The structures of a reader of another library, of which the first is frame ``start`` of the file.

    Raises:
        InputError: whatever the reader raises, told in one sentence with the frame reached.
    """
    count = start
    while True:
        try:
            atoms = next(structures)
        except StopIteration:
            break
        except UnknownFileTypeError as error:
            raise _unknown_format(path) from error
        except ForcetuneError:
            raise
        except Exception as error:
            # ASE's readers raise KeyError, ValueError, OSError, sqlite3 and json errors, … for a damaged file
            raise InputError(
                f"{Origin(str(path), count)}: cannot be read ({_told(error)}); "
                "the file is cut short or damaged here, mend or remove this frame."
            ) from error
        yield atoms
        count += 1


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Within this context whatever another library raises for a file of many frames is told in one sentence.

    Raises:
        InputError: anything but an error of ours was raised.
    """
    try:
        yield
    except ForcetuneError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read ({_told(error)}); it is damaged, copy or write it again.") from error


def _structures(path: Path, format_name: str) -> Iterator[Atoms]:
    if format_name in DATABASE_FORMATS:
        return _database_rows(path, format_name)
    if path.suffix == ARCHIVE:
        return chain.from_iterable(xyz_structures(text, format_name) for text in xyz_texts(path))
    # '@' splits names in ASE, and parallel=True would let one MPI rank read for all
    found: Iterable[Atoms] = ase.io.iread(
        str(path), ":", format=format_name, parallel=False, do_not_split_by_at_sign=True, **_options(format_name)
    )
    return iter(found)


def _database_rows(path: Path, format_name: str) -> Iterator[Atoms]:
    return (structure_of(row) for row in ase.db.connect(str(path), type=format_name, serial=True).select())


def structure_of(row: AtomsRow) -> Atoms:
    """A row of an ASE database with its key-value pairs and data, which ``ase.io`` leaves behind."""
    atoms = row.toatoms()
    atoms.info.update(row.data)
    atoms.info.update(row.key_value_pairs)
    return atoms


def xyz_structures(text: str, format_name: str) -> Iterator[Atoms]:
    """The structures in the text of an XYZ file."""
    found: Any = ase.io.iread(io.StringIO(text), ":", format=format_name, parallel=False, **_options(format_name))
    return iter(found)


def _options(format_name: str) -> dict[str, Any]:
    """Of ASE's reader of this format."""
    return {"properties_parser": parse_comment} if format_name == "extxyz" else {}


def check_xyz(path: Path) -> None:
    """Walk the skeleton of an XYZ file: ASE stops silently at a blank line and reports no position.

    Raises:
        InputError: a frame is cut short, or something else stands where a number of atoms is expected.
    """
    for _ in _walk(path, lambda _: None):
        pass


def xyz_texts(path: Path) -> Iterator[str]:
    """The text of each frame of an XYZ file, one at a time.

    Raises:
        InputError: as :func:`check_xyz`, or the text of one frame is larger than any frame is.
    """
    kept: list[str] = []
    size = 0

    def keep(line: str) -> None:
        nonlocal size
        size += len(line)
        if size > _LARGEST_FRAME or len(kept) > _MOST_LINES:
            raise ValueError("it has a frame that is larger than memory should hold")
        kept.append(line)

    for _ in _walk(path, keep):
        # the first line of the next frame, if there is one, was kept, too
        *own, following = kept
        yield "".join(own)
        kept, size = [following], len(following)
    if kept:
        yield "".join(kept)


def _walk(path: Path, keep: Callable[[str], None]) -> Iterator[None]:
    """Walk through an XYZ file; yields where a frame ends and the first line of the next has been read.

    Args:
        path: the file.
        keep: called with every line that belongs to a frame.

    Raises:
        InputError: as :func:`check_xyz`.
    """
    try:
        if path.suffix == ARCHIVE:
            yield from _walk_xyz(path, enumerate(_lines_of_members(path), start=1), keep)
            return
        with open_with_compression(str(path), "rt") as stream:
            yield from _walk_xyz(path, enumerate(_lines(path, stream), start=1), keep)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be read ({_told(error)}); copy the file again.") from error
    except (zipfile.BadZipFile, RuntimeError) as error:
        # encrypted members and unknown ways to compress are a RuntimeError
        raise InputError(
            f"{path}: cannot be read ({_told(error)}); copy it again, or unpack it and name what is in it."
        ) from error


def _lines_of_members(path: Path) -> Iterator[str]:
    """The lines of all XYZ files in a ZIP archive, without blank ones at their ends.

    Raises:
        InputError: there are none.
        ValueError: as :func:`_lines`.
        OSError, RuntimeError, zipfile.BadZipFile: it cannot be read.
    """
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        # what macOS adds to an archive begins with a dot
        names = [PurePosixPath(name) for name in archive.namelist()]
        members = [str(name) for name in names if name.suffix in (".xyz", ".extxyz") and name.name[0] != "."]
        if not members:
            raise InputError(f"{path}: has no .xyz or .extxyz files in it; unpack it and name what is to be read.")
        for member in members:
            blank: list[str] = []
            with io.TextIOWrapper(archive.open(member), encoding="utf-8") as stream:
                for line in _lines(path, stream):
                    if line.strip():
                        yield from (*blank, line if line.endswith("\n") else line + "\n")
                        blank = []
                    elif len(blank) < 2:  # within a frame it can be one, its comment
                        blank.append(line)


def _lines(path: Path, stream: IO[Any]) -> Iterator[str]:
    """The lines of a text file, which may be compressed.

    Raises:
        ValueError: a line without end, or a file that unpacks to far more than frames do.
    """
    done = 0
    while line := stream.readline(_LONGEST_LINE):
        done += len(line)
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"it has a line of more than {_LONGEST_LINE:,} characters")
        if path.suffix in COMPRESSED:
            check_unpacked(path, done)
        yield line


def _walk_xyz(path: Path, lines: Iterator[tuple[int, str]], keep: Callable[[str], None]) -> Iterator[None]:
    frame, vectors = 0, 3  # no lattice vectors before the first frame
    for line_number, line in lines:
        words = line.split()
        if not words:
            trailing = next(((n, rest) for n, rest in lines if rest.strip()), None)
            if trailing is None:
                return
            raise InputError(
                f"{Origin(str(path), frame)}: line {line_number} is blank where a number of atoms is "
                "expected, and more follows; remove the blank line."
            )
        if words[0].startswith("VEC") and vectors < 3:
            vectors += 1
            keep(line)
            continue
        if len(words) > 1 or not re.fullmatch("[0-9]{1,18}", words[0]):
            raise InputError(
                f"{Origin(str(path), frame)}: line {line_number} should be a number of atoms but is "
                f"'{line.strip()[:40]}'; the frame before it has more lines than it announces, "
                "or this is no XYZ file."
            )
        atoms = int(words[0])
        keep(line)
        if frame:
            yield
        comment = next(lines, (0, ""))[1]
        _check_columns(path, frame, comment)
        keep(comment)
        missing = atoms
        for _, (_, own) in zip(range(atoms), lines, strict=False):
            keep(own)
            missing -= 1
        if missing > 0 and atoms > 0:
            raise InputError(
                f"{Origin(str(path), frame)}: the file ends after {atoms - missing} of the frame's "
                f"{atoms} atoms; it was cut short, copy it again or remove this frame."
            )
        frame, vectors = frame + 1, 0


def _check_columns(path: Path, frame: int, comment: str) -> None:
    """
    Raises:
        InputError: the comment line announces more columns than any frame has; ASE would make room for all of them.
    """
    announced = re.findall(r":[A-Za-z]:([0-9]+)", comment)
    if len(announced) > _MOST_COLUMNS or sum(int(count[:9]) for count in announced) > _MOST_COLUMNS:
        raise InputError(
            f"{Origin(str(path), frame)}: the comment line announces more than {_MOST_COLUMNS:,} columns; mend its "
            "Properties."
        )


def _unknown_format(path: Path) -> InputError:
    return InputError(f"{path}: not a format that ASE can read; convert it to extended XYZ (.xyz).")


def _told(error: BaseException) -> str:
    """The first line of an exception of another library, short enough for a sentence."""
    if isinstance(error, KeyError) and error.args:
        return f"unknown element or key '{error.args[0]}'"
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__
