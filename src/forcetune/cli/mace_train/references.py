"""Reference energies and elements: ``--E0s``, ``--statistics_file``, ``--atomic_numbers``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forcetune.cli.mace_train.literals import read_elements, read_energies, read_json
from forcetune.cli.mace_train.parsing import Arguments
from forcetune.errors import InputError

_MODES = {"average": "average", "estimated": "estimate", "foundation": "model"}
_ISOLATED = b"IsolatedAtom"
_CHUNK = 2**20


def translate_references(arguments: Arguments, train: Sequence[str], notes: list[str]) -> dict[str, Any]:
    """Section ``references``: isolated atoms of the training file first, then the statistics, then ``--E0s``.

    Args:
        arguments: of the command line.
        train: training files.
        notes: takes what overrules what.

    Raises:
        InputError: an energy or a file that cannot be read.
    """
    e0s = arguments["E0s"]
    if e0s is None and "statistics_file" not in arguments:
        return {"mode": "isolated"}
    marked = [file for file in train if _marks_isolated_atoms(file)]
    if marked:
        option = "--E0s" if e0s is not None else "--statistics_file"
        notes.append(
            f"{marked[0]}: has frames with config_type=IsolatedAtom, which are taken as reference energies before "
            f"{option}, as in mace"
        )
        return {"mode": "isolated"}
    if "statistics_file" in arguments:
        e0s = read_statistics(arguments["statistics_file"])["atomic_energies"]
    if isinstance(e0s, str) and e0s.lower() in _MODES:
        return {"mode": _MODES[e0s.lower()]}
    if isinstance(e0s, str) and e0s.endswith(".json"):
        e0s = read_json("E0s", e0s)
    return {"mode": "table", "table": read_energies("E0s", e0s)}


def translate_elements(arguments: Arguments) -> str | list[str]:
    """``model.elements``.

    Raises:
        InputError: no list of elements, or a statistics file that cannot be read.
    """
    if arguments["foundation_model_elements"]:
        return "keep"
    if "statistics_file" in arguments:
        return read_elements("statistics_file", read_statistics(arguments["statistics_file"])["atomic_numbers"])
    if arguments["atomic_numbers"] is not None:
        return read_elements("atomic_numbers", arguments["atomic_numbers"])
    return "data"


def read_statistics(path: str) -> Mapping[str, Any]:
    """A statistics file of ``mace_prepare_data``.

    Raises:
        InputError: it is none.
    """
    content = read_json("statistics_file", path)
    if not isinstance(content, Mapping) or not {"atomic_energies", "atomic_numbers"} <= set(content):
        raise InputError(f"{path}: has no atomic_energies and atomic_numbers, as a file of mace_prepare_data has.")
    return content


def _marks_isolated_atoms(file: str) -> bool:
    """Whether an XYZ file has frames that mace takes as isolated atoms."""
    path = Path(file)
    if path.suffix.lower() not in (".xyz", ".extxyz") or not path.is_file():
        return False
    overlap = b""
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            if _ISOLATED in overlap + chunk:
                return True
            overlap = chunk[-len(_ISOLATED) :]
    return False
