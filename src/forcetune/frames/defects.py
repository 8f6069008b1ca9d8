"""Defects of files, met by readers of other libraries and reported in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ase import Atoms
from ase.db.row import AtomsRow
from ase.io.formats import UnknownFileTypeError

from forcetune.errors import ForcetuneError, InputError
from forcetune.frames.frame import Origin
from forcetune.utils.parsing import first_line


def no_frames(path: Path, format_name: str) -> InputError:
    """Of a file that is none, or has none."""
    return InputError(f"{path}: holds no frames ({format_name} format); write it again.")


def guarded(path: Path, structures: Iterator[Atoms], start: int = 0) -> Iterator[Atoms]:
    """The structures of a reader of another library, of which the first is frame ``start`` of the file.

    Raises:
        InputError: whatever the reader raises, in one sentence with the frame reached.
    """
    count = start
    while True:
        try:
            atoms = next(structures)
        except StopIteration:
            break
        except (ForcetuneError, UnknownFileTypeError):
            raise
        except Exception as error:
            # ASE's readers raise KeyError, ValueError, OSError, sqlite3 and json errors, … for a damaged file
            raise InputError(
                f"{Origin(str(path), count)}: cannot be read ({first_line(error)}); "
                "the file is cut short or damaged here, fix or remove this frame."
            ) from error
        yield atoms
        count += 1


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Within this context whatever another library raises for a file of many frames is reported in one sentence.

    Raises:
        InputError: anything but an error of ours was raised.
    """
    try:
        yield
    except ForcetuneError:
        raise
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}); it is damaged, copy or write it again."
        ) from error


def read_structure(row: AtomsRow) -> Atoms:
    """A row of an ASE database with its key-value pairs and data, which ``ase.io`` leaves behind."""
    atoms = row.toatoms()
    atoms.info.update(row.data)
    atoms.info.update(row.key_value_pairs)
    return atoms
