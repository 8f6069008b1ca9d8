"""Comment lines of extended XYZ as people write them, for ASE's reader.

ASE takes ``stress`` and ``virial`` only as nine numbers without brackets. Six numbers (xx, yy, zz, yz, xz, xy) and
nested rows are brought to that form; a value of ``None`` stands for a label that is not there.
"""

from __future__ import annotations

import re
from typing import Any

from ase.io.extxyz import key_val_str_to_dict

_QUOTED = r""""[^"]*"|'[^']*'|\{[^}]*\}|\[\s*\[.*?\]\s*\]|\[[^\]]*\]|[^\s]*"""
_TENSOR = re.compile(rf"(?<![^\s])(stress|virial)\s*=\s*({_QUOTED})")
_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf)"
NUMBERS = re.compile(rf"\s*{_NUMBER}(?:\s+{_NUMBER})*\s*", re.IGNORECASE)
_VOIGT = (0, 5, 4, 5, 1, 3, 4, 3, 2)


def parse_comment(line: str) -> dict[str, Any]:
    """As ASE's own parser, for more forms of ``stress`` and ``virial``."""
    values: dict[str, Any] = key_val_str_to_dict(_TENSOR.sub(_nine_numbers, line))
    return values


def numbers_in(text: str) -> list[float] | None:
    """The numbers of a text that holds nothing else but brackets, commas and the mark of JSON; None otherwise."""
    plain = re.sub(r"[\[\]{}(),\"']", " ", text.replace("_JSON", " "))
    return [float(word) for word in plain.split()] if NUMBERS.fullmatch(plain) else None


def _nine_numbers(match: re.Match[str]) -> str:
    key, value = match[1], match[2]
    if value.strip("\"'{}[] ").lower() in ("none", "null"):
        return ""
    words = re.sub(r"[\[\]{}(),\"']", " ", value.replace("_JSON", " ")).split()
    if len(words) == 6:
        words = [words[place] for place in _VOIGT]
    return f'{key}="{" ".join(words)}"' if len(words) == 9 else match[0]
