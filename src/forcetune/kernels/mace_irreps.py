"""Irreps, instructions and flat weights of the library's layers, as the kernels lay them out."""

from __future__ import annotations

from typing import Any

import torch

from forcetune.kernels.features import Layout
from forcetune.kernels.linear import Block
from forcetune.kernels.swap import UnknownLayerError


def merged(irreps: Any) -> tuple[Layout, list[tuple[int, int]]]:
    """Layout with equal neighbours merged, and for each irrep of the original its place: (block, first channel)."""
    layout: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    last = None
    for mul, ir in irreps:
        if layout and last == ir:
            places.append((len(layout) - 1, layout[-1][1]))
            layout[-1] = (ir.dim, layout[-1][1] + mul)
        else:
            places.append((len(layout), 0))
            layout.append((ir.dim, mul))
        last = ir
    return tuple(layout), places


def linear_blocks(module: Any) -> tuple[list[Block], Layout, Layout]:
    """Matrices of an equivariant linear layer over merged inputs, with its inputs and outputs.

    Raises:
        UnknownLayerError: it has outputs that are not merged.
    """
    layout_in, places_in = merged(module.irreps_in)
    layout_out, places_out = merged(module.irreps_out)
    if len(layout_out) != len(places_out):
        raise UnknownLayerError("its output names one irrep twice in a row")
    blocks: list[Block] = []
    start = 0
    for ins in module.instructions:
        if ins.i_in < 0:
            continue
        fan_in, fan_out = ins.path_shape
        if fan_in * fan_out == 0:
            continue
        source, row = places_in[ins.i_in]
        target = places_out[ins.i_out][0]
        last = blocks[-1] if blocks else None
        if (
            last is not None
            and (last.source, last.target, last.row + last.fan_in) == (source, target, row)
            and last.factor == float(ins.path_weight)
        ):
            blocks[-1] = Block(source, target, last.row, last.fan_in + fan_in, fan_out, last.start, last.factor)
        else:
            blocks.append(Block(source, target, row, fan_in, fan_out, start, float(ins.path_weight)))
        start += fan_in * fan_out
    return blocks, layout_in, layout_out


def skip_blocks(module: Any) -> tuple[list[Block], Layout, Layout]:
    """Matrices of a tensor product with one-hot species.

    Raises:
        UnknownLayerError: it is another tensor product.
    """
    second = list(module.irreps_in2)
    if len(second) != 1 or second[0].ir.dim != 1 or not module.internal_weights:
        raise UnknownLayerError("its second input is not one-hot")
    layout_in, layout_out = tuple((ir.dim, mul) for mul, ir in module.irreps_in1), merged(module.irreps_out)[0]
    if len(layout_out) != len(module.irreps_out):
        raise UnknownLayerError("its output names one irrep twice in a row")
    blocks: list[Block] = []
    start = 0
    for ins in module.instructions:
        if ins.connection_mode != "uvw" or not ins.has_weight:
            raise UnknownLayerError("it has paths of another kind")
        fan_in, species, fan_out = ins.path_shape
        factor = float(ins.path_weight) / layout_out[ins.i_out][0] ** 0.5
        blocks.append(Block(ins.i_in1, ins.i_out, 0, fan_in, fan_out, start, factor))
        start += fan_in * species * fan_out
    return blocks, layout_in, layout_out


def reflection_labels(irrep: Any) -> list[int]:
    """For each component of an irrep a bit for each axis whose reflection changes its sign."""
    labels = [0] * irrep.dim
    for axis in range(3):
        reflection = torch.eye(3, dtype=torch.float64)
        reflection[axis, axis] = -1
        matrix = irrep.D_from_matrix(reflection)
        if not torch.allclose(matrix.abs(), torch.eye(irrep.dim, dtype=matrix.dtype), atol=1e-6):
            raise UnknownLayerError("its irreps are not in the basis of real spherical harmonics")
        for component, sign in enumerate(matrix.diagonal().tolist()):
            labels[component] |= (sign < 0) << axis
    return labels
