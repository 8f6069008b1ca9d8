"""Where a selection may be written: never over what it is made from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from forcetune.errors import InputError
from forcetune.utils.files import as_path

ENDINGS = (".xyz", ".extxyz")


def check_selection_output(output: str | Path, inputs: Iterable[Path]) -> Path:
    """The file to write, as a path.

    Args:
        output: extended XYZ to write.
        inputs: files of the pool, of labelled frames, and of the run.

    Raises:
        InputError: a folder, another ending than that of extended XYZ, a folder around it that is not there, or one
            of the inputs, links followed.
    """
    target = as_path(output)
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file, such as {target / 'chosen.xyz'}.")
    if target.suffix.lower() not in ENDINGS:
        raise InputError(f"{target}: extended XYZ is written; choose a name that ends in {' or '.join(ENDINGS)}.")
    if not target.parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.parent}; make it, or choose another place.")
    for file in inputs:
        if target.resolve() == file.resolve() or (target.exists() and target.samefile(file)):
            raise InputError(f"{target}: is read by this selection and would be replaced; choose another --output.")
    return target
