"""Whether the linear, radial and tensor-product layers of a file are those of a network of ours."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from forcetune.backbones.mace.compare import (
    compare_irreps,
    compare_value,
    differs,
    find_module,
    instructions,
    same_rows,
)
from forcetune.backbones.mace.module_spec import Node, irreps_text
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.irreps import parse_irreps
from forcetune.kernels.layers import Convolution, EquivariantLinear, SpeciesLinear
from forcetune.kernels.radial import RadialLayer
from forcetune.kernels.tensors import UnfitError


def check_linear(node: Node, network: MaceNetwork, where: str) -> None:
    """A linear layer's irreps, paths, and factors of paths are ours.

    Raises:
        UnfitError: it differs.
    """
    if node.package == "torch":
        find_module(network, where, nn.Linear)  # its sizes are those of its tensors
        return
    module = find_module(network, where, EquivariantLinear)
    compare_irreps(node, "irreps_in", module.irreps_in, where)
    compare_irreps(node, "irreps_out", module.irreps_out, where)
    if "instructions" not in node.attributes:
        return
    inputs, outputs = (parse_irreps(irreps_text(node.attributes[name])) for name in ("irreps_in", "irreps_out"))
    start, pieces = 0, []
    for source, target, shape, weight in instructions(node, where):
        if source < 0 and weight != 1:
            raise differs(where, "a factor of its bias", weight, 1)
        if source < 0 or math.prod(shape) == 0:
            continue
        pieces.append((inputs[source].irrep, outputs[target].irrep, shape[0], shape[1], start, float(weight)))
        start += shape[0] * shape[1]
    if not _same_pieces(pieces, _list_pieces(module)):
        raise UnfitError(f"{where} has paths, or factors of paths, other than those of its irreps")


def _list_pieces(module: EquivariantLinear) -> list[tuple[Any, ...]]:
    inputs, outputs = parse_irreps(module.irreps_in), parse_irreps(module.irreps_out)
    return [
        (inputs[b.source].irrep, outputs[b.target].irrep, b.fan_in, b.fan_out, b.start, b.factor) for b in module.blocks
    ]


def _same_pieces(pieces: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> bool:
    """The same matrices, where pieces of one matrix that follow one another count as one."""
    joined: list[tuple[Any, ...]] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        together = last is not None and (*last[:2], last[3]) == (*piece[:2], piece[3])
        if last is not None and together and math.isclose(last[5], piece[5], rel_tol=1e-9):
            joined[-1] = (*last[:2], last[2] + piece[2], *last[3:])
        else:
            joined.append(piece)
    return len(joined) == len(expected) and all(
        piece[:5] == other[:5] and math.isclose(piece[5], other[5], rel_tol=1e-9)
        for piece, other in zip(joined, expected, strict=True)
    )


def check_skip_connection(node: Node, network: MaceNetwork, where: str) -> None:
    """A linear layer for each species has our irreps, paths, and factors of paths.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, where, SpeciesLinear)
    compare_irreps(node, "irreps_in1", module.irreps_in, where)
    compare_irreps(node, "irreps_in2", f"{module.n_species}x0e", where)
    compare_irreps(node, "irreps_out", module.irreps_out, where)
    inputs = parse_irreps(module.irreps_in)
    rows = instructions(node, where) if "instructions" in node.attributes else None
    expected = []
    for block in module.blocks:
        irrep = inputs[block.source]
        factor = math.sqrt(irrep.dim) * block.factor
        shape = (block.fan_in, module.n_species, block.fan_out)
        expected.append((block.source, 0, block.target, "uvw", True, factor, shape))
    if rows is not None and not same_rows(rows, expected, 1e-6):
        raise UnfitError(f"{where} has paths, or factors of paths, other than those of its irreps")


def check_convolution(node: Node, network: MaceNetwork, where: str) -> None:
    """A convolution's irreps, paths, and factors of paths are ours.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, where, Convolution)
    compare_irreps(node, "irreps_in1", module.irreps_in, where)
    compare_irreps(node, "irreps_in2", module.harmonics, where)
    compare_irreps(node, "irreps_out", module.irreps_out, where)
    if "instructions" not in node.attributes:
        return
    rows = instructions(node, where)
    factors = [math.sqrt(path.dim_out) for path in module.structure.paths]
    same = len(rows) == len(module.paths) and all(
        row[:2] == (path.source, path.harmonic)
        and row[2] == path.target
        and row[3] == "uvu"
        and row[4] is True
        and math.isclose(row[5], factor, rel_tol=1e-6)
        for row, path, factor in zip(rows, module.paths, factors, strict=True)
    )
    if not same:
        raise UnfitError(f"{where} has paths, or factors of paths, other than those of its irreps")


def check_radial_layer(node: Node, network: MaceNetwork, where: str) -> None:
    """A layer of a radial network is normalized as ours, with an activation where ours has one.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, where, RadialLayer)
    for name in ("var_in", "var_out"):
        compare_value(node, name, 1, where)
    if (node.children.get("act") is None) != (module.activation is None):
        raise UnfitError(f"{where} has an activation where there should be none, or none where there should be one")


def check_sequence(node: Node, network: MaceNetwork, where: str) -> None:
    """A sequence has the same layers as ours.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, where, nn.Sequential)
    expected = {name: type(child).__name__ for name, child in module.named_children()}
    kinds = {name: None if child is None else child.kind for name, child in node.children.items()}
    if kinds != expected:
        raise differs(where, "the layers", list(kinds.values()), list(expected.values()))
