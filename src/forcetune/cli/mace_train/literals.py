"""Values that mace writes as Python or JSON in one argument."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers, chemical_symbols

from forcetune.errors import InputError
from forcetune.utils.parsing import short


def read_literal(option: str, text: Any) -> Any:
    """Plain Python values from a text.

    Raises:
        InputError: the text is none; names the option.
    """
    if not isinstance(text, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"--{option} {short(text)}: is no Python value such as {{1: -13.6}} or [1, 8].") from error


def read_json(option: str, path: str) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); --{option} names a JSON file.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not valid JSON, which --{option} asks for.") from error


def read_files(option: str, value: Any) -> list[str]:
    """One file, or a list of them.

    Raises:
        InputError: the list has something else.
    """
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and text.startswith("["):
        text = read_literal(option, text)
    files = text if isinstance(text, list) else [text]
    if not files or not all(isinstance(file, str) for file in files):
        raise InputError(f"--{option} {short(value)}: name a file.")
    return files


def read_symbol(option: str, value: Any) -> str:
    """The symbol of an element by its number or symbol.

    Raises:
        InputError: there is no such element.
    """
    text = str(value).strip()
    if text.isdecimal() and 0 < int(text) < len(chemical_symbols):
        return chemical_symbols[int(text)]
    if text in atomic_numbers and text != "X":
        return text
    raise InputError(f"--{option}: there is no element {short(value)}; write atomic numbers, such as 8.")


def read_elements(option: str, value: Any) -> list[str]:
    """Symbols of a list of atomic numbers.

    Raises:
        InputError: no list of elements.
    """
    numbers = read_literal(option, value)
    if not isinstance(numbers, list | tuple) or not numbers:
        raise InputError(f"--{option} {short(value)}: write a list of atomic numbers, such as [1, 6, 8].")
    return [read_symbol(option, number) for number in numbers]


def read_energies(option: str, value: Any) -> dict[str, float]:
    """Symbol → energy, eV, of a dictionary by atomic number or symbol.

    Raises:
        InputError: no such dictionary.
    """
    table = read_literal(option, value)
    if not isinstance(table, Mapping) or not table:
        raise InputError(f"--{option} {short(value)}: write atomic numbers with energies in eV, such as {{1: -13.6}}.")
    energies: dict[str, float] = {}
    for key, energy in table.items():
        if isinstance(energy, bool) or not isinstance(energy, int | float):
            raise InputError(f"--{option}: the energy of {short(key)} is {short(energy)}; write one number in eV.")
        energies[read_symbol(option, key)] = float(energy)
    return energies
