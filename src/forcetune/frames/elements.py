"""Elements by the names that files give to atoms: symbols, isotopes, and labels such as ``C1`` or ``Fe3+``."""

from __future__ import annotations

import re
from functools import lru_cache

from ase.data import atomic_numbers, chemical_symbols

ISOTOPES = {"D": "H", "T": "H", "2H": "H", "3H": "H"}

_PROTEIN_LABELS = {"CA": "C", "CD": "C", "CE": "C", "HE": "H", "HG": "H", "ND": "N", "NE": "N", "SG": "S"}
"""Names of atoms in proteins that are also symbols of elements written in capitals."""


@lru_cache(maxsize=4096)
def parse_element(label: str) -> tuple[str, str | None]:
    """The element that an atom of this name is.

    Args:
        label: as it stands in a file.

    Returns:
        the symbol, and what is to be said about taking the label for it; None for a plain symbol.

    Raises:
        ValueError: it names no element; the message says what to write.
    """
    symbol = label.capitalize()
    if symbol in atomic_numbers:
        if label in _PROTEIN_LABELS:
            return symbol, (
                f"atoms named '{label}' are read as the element {symbol}; where this is a label of "
                f"{_PROTEIN_LABELS[label]}, write '{_PROTEIN_LABELS[label]}'"
            )
        return symbol, None
    if label in ISOTOPES:
        return ISOTOPES[label], (
            f"atoms named '{label}' are read as {ISOTOPES[label]}: the potential energy is the same for all isotopes"
        )
    if label.isdecimal() and 0 < int(label[:9]) < len(chemical_symbols):
        symbol = chemical_symbols[int(label)]
        return symbol, f"atoms named '{label}' are read as {symbol}, the element of this atomic number"
    decorated = re.match(r"([A-Za-z]{1,2})[^A-Za-z]", label)
    if decorated is not None and decorated[1] not in _PROTEIN_LABELS:
        symbol = ISOTOPES.get(decorated[1], decorated[1].capitalize())
        if symbol in atomic_numbers:
            return symbol, f"atoms named '{label[:20]}' are read as {symbol}, the element before the label"
    hint = next(
        (candidate for candidate in (label[:2].capitalize(), label[:1].upper()) if candidate in atomic_numbers), None
    )
    advice = "write the symbol of the element" + (f", such as '{hint}'" if hint else "")
    raise ValueError(f"the name '{label[:20]}', which is no element; {advice}")
