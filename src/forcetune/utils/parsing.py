"""Text from files of unknown origin: read within limits, and printed without surprises."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import yaml

MOST_YAML_NODES = 100_000
"""Values of a configuration, aliases written out."""
_LONGEST_NUMBER = 400

_NUMBER = re.compile(
    r"(?P<integer>[-+]?[0-9]+)|(?P<prefixed>0o[0-7]+|0x[0-9a-fA-F]+)|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
)
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


def read_number(text: str) -> int | float | None:
    """The number that a text is in YAML 1.2's core schema, infinities left out; None where it is none.

    Python and YAML 1.1 read more than people mean: ``1_000``, ``infinity``, ``1:30``, and ``010`` as 8.
    """
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > _LONGEST_NUMBER:
        return None
    if match["integer"]:
        return int(text)
    return int(text, 0) if match["prefixed"] else float(text)


class _Reader(yaml.SafeLoader):
    """Counts what is read; an alias counts as often as what it stands for.

    Numbers are what YAML 1.1 and YAML 1.2 agree on. The rest stays text (:func:`read_number`), so that a name such as
    ``1e-3`` that was written without quotes stays a name.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count(node, {}, 0)
        return node


for _tag, _pattern, _first in (
    ("int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*([eE][-+][0-9]+)?|\.[0-9]+([eE][-+][0-9]+)?|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
        "-+.0123456789",
    ),
):
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


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
