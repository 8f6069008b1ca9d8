"""What the modules of a file say of themselves, compared with what is expected."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from forcetune.backbones.mace.module_spec import UNKNOWN, Node, canonical, irreps_text
from forcetune.backbones.safe_unpickle.reader import Record
from forcetune.irreps import irreps_text as blocks_text
from forcetune.irreps import merge_neighbours, parse_irreps
from forcetune.kernels.tensors import UnfitError

_ALWAYS = frozenset(("training", "_is_torch_compile"))


def refuse_unknown(node: Node, known: frozenset[str], where: str) -> None:
    """
    Raises:
        UnfitError: a module has an attribute that is not among those known, and is neither empty nor off.
    """
    for name, value in node.attributes.items():
        if name in known or name in _ALWAYS or value is None or value is False:
            continue
        if isinstance(value, (list, tuple, dict, set)) and not value:
            continue
        plain = canonical(name, value)
        if name.startswith("_") and name.endswith("_str") and isinstance(plain, str):
            continue  # descriptions for profilers
        description = "something" if plain is UNKNOWN else repr(plain)
        raise UnfitError(f"{where} ({node.kind}) has {name} = {description}, which forcetune does not know")


def differs(where: str, what: str, value: object, expected: object) -> UnfitError:
    """The error that an attribute has another value than the one that is computed with."""
    return UnfitError(f"{where} has {what} = {value!r} where {expected!r} was expected")


def compare_irreps(node: Node, name: str, expected: str | None, where: str) -> None:
    """Irreps that a file names, equal neighbours counted as one; files that name none are taken as they are.

    Raises:
        UnfitError: they are others.
    """
    if name not in node.attributes or expected is None:
        return
    irreps = irreps_text(node.attributes[name])
    if merged(irreps) != merged(expected):
        raise differs(where, name, irreps, expected)


def merged(text: str) -> str:
    """Irreps with equal neighbours as one.

    Raises:
        UnfitError: they are written in an unknown way.
    """
    try:
        return blocks_text(merge_neighbours(parse_irreps(text)))
    except ValueError as error:
        raise UnfitError(f"its irreps {text!r} are written in an unknown way") from error


def compare_value(node: Node, name: str, expected: Any, where: str) -> None:
    """An attribute of a file, where it has it.

    Raises:
        UnfitError: it has another value.
    """
    if name not in node.attributes:
        return
    value = canonical(name, node.attributes[name])
    same = value == expected
    if isinstance(expected, float) and isinstance(value, (int, float)):
        same = math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    if not same:
        raise differs(where, name, None if value is UNKNOWN else value, expected)


def instructions(node: Node, where: str) -> list[tuple[Any, ...]]:
    """Paths of a layer of e3nn, one tuple each.

    Raises:
        UnfitError: they are stored in an unknown way.
    """
    stored = node.attributes.get("instructions")
    rows = [canonical("instructions", entry) for entry in entries(stored)]
    if any(not isinstance(row, tuple) for row in rows):
        raise UnfitError(f"{where} stores its paths in an unknown way")
    return rows  # pyright: ignore[reportReturnType]


def entries(value: Any) -> Iterable[Any]:
    """Members of a list in either form of a model."""
    if isinstance(value, Record):
        return value.args
    return value if isinstance(value, (list, tuple)) else ()


def same_rows(rows: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], tolerance: float) -> bool:
    """Whether paths of tensor products are the same, their factors within a relative tolerance."""
    return len(rows) == len(expected) and all(
        (*one[:5], tuple(one[6])) == (*other[:5], other[6]) and math.isclose(one[5], other[5], rel_tol=tolerance)
        for one, other in zip(rows, expected, strict=True)
    )


def find_module(network: nn.Module, path: str, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> Any:
    """The network's module of the same name.

    Raises:
        UnfitError: it has none of this kind there.
    """
    try:
        module = network.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, kind):
        raise UnfitError(f"{path} is a layer in an unknown place")
    return module


def parent_path(path: str, levels: int) -> str:
    """The path of the module so many levels above."""
    return ".".join(path.split(".")[:-levels])
