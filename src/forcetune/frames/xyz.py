"""Extended XYZ as text: its frames one at a time, every defect reported with its line, and atoms by their names."""

from __future__ import annotations

import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import ase.io
from ase import Atoms
from ase.data import atomic_numbers

from forcetune.errors import InputError, warn
from forcetune.frames.comment_line import parse_comment
from forcetune.frames.elements import parse_element
from forcetune.frames.frame import Origin
from forcetune.frames.text import decoded, open_text
from forcetune.utils.parsing import check_archive, check_unpacked, first_line

XYZ_FORMATS = frozenset({"extxyz", "xyz"})
ARCHIVE = ".zip"
"""Ending of archives of extended-XYZ files, which are read one after another as if they were one."""
COMPRESSED = frozenset({".gz", ".bz2", ".xz"})

PIECE = 128
"""Frames of a piece, at most."""
PIECE_TEXT = 4 * 2**20
"""Characters of a piece, at most, but for its last frame."""

_LONGEST_LINE = 16 * 2**20
_LARGEST_FRAME = 512 * 2**20
_MOST_LINES = 10_000_000
_MOST_COLUMNS = 10_000
_MARK = "\ufeff"
_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eEdD][-+]?\d+)?"
_ATOM = re.compile(rf"\s*[A-Za-z0-9]\S*(\s+{_NUMBER}){{3}}")
_PLAIN = frozenset(atomic_numbers)


def is_xyz(head: str) -> bool:
    """Whether a text that begins so is XYZ: a number of atoms, a comment, and atoms with positions."""
    lines = head.split("\n", 3)
    if len(lines) < 3 or not re.fullmatch(r"\s*[0-9]{1,9}\s*", lines[0]):
        return False
    return re.search(r"\bProperties\s*=", lines[1]) is not None or _ATOM.match(lines[2]) is not None


def xyz_structures(text: str, format_name: str) -> Iterator[Atoms]:
    """The structures in the text of an XYZ file."""
    options: dict[str, Any] = {"properties_parser": parse_comment} if format_name == "extxyz" else {}
    structures: Any = ase.io.iread(io.StringIO(text), ":", format=format_name, parallel=False, **options)
    return iter(structures)


def xyz_pieces(path: Path, most: int = PIECE_TEXT) -> Iterator[tuple[int, str]]:
    """The text of some frames at a time with their number.

    Args:
        path: the file.
        most: characters, of which a piece has hardly more.

    Raises:
        InputError: as :func:`xyz_texts`.
    """
    lines_of_piece: list[str] = []
    size = 0
    for text in xyz_texts(path):
        lines_of_piece.append(text)
        size += len(text)
        if len(lines_of_piece) == PIECE or size > most:
            yield len(lines_of_piece), "".join(lines_of_piece)
            lines_of_piece, size = [], 0
    if lines_of_piece:
        yield len(lines_of_piece), "".join(lines_of_piece)


def xyz_texts(path: Path) -> Iterator[str]:
    """The text of each frame of an XYZ file, one at a time, every atom named by the symbol of its element.

    Raises:
        InputError: a frame is cut short, something else stands where a number of atoms is expected, an atom has no
            element, or the text of one frame is larger than any frame is.
    """
    pending: list[str] = []
    size = frame = 0
    said: set[str] = set()

    def keep(line: str) -> None:
        nonlocal size
        size += len(line)
        if size > _LARGEST_FRAME or len(pending) > _MOST_LINES:
            raise ValueError("it has a frame that is larger than memory should hold")
        pending.append(line)

    for _ in _walk(path, keep):
        # the first line of the next frame, if there is one, was kept, too
        *frame_lines, following = pending
        yield "".join(_named(path, frame, frame_lines, said))
        pending, size, frame = [following], len(following), frame + 1
    if pending:
        yield "".join(_named(path, frame, pending, said))


def _named(path: Path, frame: int, lines: list[str], said: set[str]) -> list[str]:
    """The lines of a frame with symbols of elements for the names of its atoms; warns once about each other name.

    Raises:
        InputError: a name that is no element.
    """
    column = _column_of_names(lines[1]) if len(lines) > 1 else None
    if column is None:
        return lines
    end = 2 + int(lines[0])
    words = [line.split(None, column + 1)[column : column + 1] for line in lines[2:end]]
    strange: dict[str, str] = {}
    for name in {word[0] for word in words if word} - _PLAIN:
        try:
            strange[name], remark = parse_element(name)
        except ValueError as error:
            atom = next(index for index, word in enumerate(words) if word == [name])
            raise InputError(f"{Origin(str(path), frame)}: atom {atom} has {error}.") from error
        if remark is not None and remark not in said:
            said.add(remark)
            warn(f"{path}: {remark}.")
    if not strange:
        return lines
    place = re.compile(rf"(\s*(?:\S+\s+){{{column}}})(\S+)", re.ASCII)
    atoms = [place.sub(lambda m: m[1] + strange.get(m[2], m[2]), line, count=1) for line in lines[2:end]]
    return [*lines[:2], *atoms, *lines[end:]]


def _column_of_names(comment: str) -> int | None:
    """Which column has the names of atoms; None where atomic numbers stand for them."""
    match = re.search(r"\bProperties\s*=\s*[\"']?([^\s\"']+)", comment)
    if match is None:
        return 0
    column = 0
    fields = match[1].split(":")
    for name, _, count in zip(fields[::3], fields[1::3], fields[2::3], strict=False):
        if name.lower() in ("species", "symbols"):
            return column
        column += int(count) if count.isdecimal() else 1
    return None


def _walk(path: Path, keep: Callable[[str], None]) -> Iterator[None]:
    """Walk through an XYZ file; yields where a frame ends and the first line of the next has been read.

    Args:
        path: the file.
        keep: called with every line that belongs to a frame.

    Raises:
        InputError: as :func:`xyz_texts`.
    """
    try:
        if path.suffix == ARCHIVE:
            yield from _walk_xyz(path, enumerate(_lines_of_members(path), start=1), keep)
            return
        with open_text(path) as stream:
            yield from _walk_xyz(path, enumerate(_lines(path, stream), start=1), keep)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); copy the file again.") from error
    except (zipfile.BadZipFile, RuntimeError) as error:
        # encrypted members and unknown ways to compress are a RuntimeError
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}); copy it again, or unpack it and name what is in it."
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
            with decoded(archive.open(member)) as stream:
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
        # files that were put one behind the other may have a mark in the middle
        line = line.removeprefix(_MARK)
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
        for _, (_, atom_line) in zip(range(atoms), lines, strict=False):
            keep(atom_line)
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
            f"{Origin(str(path), frame)}: the comment line announces more than {_MOST_COLUMNS:,} columns; fix its "
            "Properties."
        )
