"""Text from files of unknown origin: read within limits, and printed without surprises."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import yaml

MOST_YAML_NODES = 100_000
"""Values of a configuration, aliases written out."""

_LEAST_UNPACKED = 256 * 2**20
_RATIO = 200


def short(value: Any, depth: int = 0) -> str:
    """``repr`` cut to some words: values of a file may share parts, so that written out they would fill any memory."""
    if isinstance(value, str | bytes):
        return repr(value[:60]) + ("…" if len(value) > 60 else "")
    if type(value) is int and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    if isinstance(value, list | tuple | dict | set | frozenset):
        if depth == 2:
            return "…"
        parts = [short(part, depth + 1) for _, part in zip(range(4), value, strict=False)]
        return f"{type(value).__name__}({', '.join(parts)}{', …' if len(value) > 4 else ''})"
    return repr(value)[:60] if value is None or isinstance(value, int | float) else type(value).__name__


class _Reader(yaml.SafeLoader):
    """Counts what is read; an alias counts as often as what it stands for."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, 0)
        return node


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    if depth > 50:
        raise yaml.YAMLError("it is nested too deeply, or in itself")
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in flat)
    if known[id(node)] > MOST_YAML_NODES:
        raise yaml.YAMLError(f"with its aliases written out it has more than {MOST_YAML_NODES:,} values")
    return known[id(node)]


def parse_yaml(text: str) -> Any:
    """Read plain values from YAML.

    Raises:
        yaml.YAMLError: no YAML, something else than plain values, or built to exhaust memory.
    """
    try:
        return yaml.load(text, _Reader)
    except yaml.YAMLError:
        raise
    except Exception as error:
        # impossible dates, numbers of 5000 digits, deep nesting: PyYAML lets through whatever Python raises
        raise yaml.YAMLError(f"it holds a value that cannot be read ({type(error).__name__})") from error


def printable(text: str) -> str:
    """With control characters written out, so that text of a file cannot steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def check_unpacked(path: Path, sizes: int) -> None:
    """
    Args:
        path: a compressed file.
        sizes: bytes that it unpacks to.

    Raises:
        ValueError: that is out of proportion.
    """
    packed = path.stat().st_size
    if sizes > max(_LEAST_UNPACKED, _RATIO * packed):
        raise ValueError(f"its {packed:,} bytes unpack to more than {max(_LEAST_UNPACKED, _RATIO * packed):,}")


def check_archive(path: Path) -> None:
    """
    Raises:
        ValueError: a zip archive unpacks to more than its size can account for.
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        check_unpacked(path, sum(member.file_size for member in archive.infolist()))


def first_line(error: BaseException) -> str:
    """The first line of an exception of another library, short enough for a sentence."""
    if isinstance(error, KeyError) and error.args:
        return f"unknown element or key '{error.args[0]}'"
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__
