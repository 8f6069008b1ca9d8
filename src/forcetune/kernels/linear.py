"""Equivariant linear layers and their variant with one matrix for each species, as plain matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """One matrix of the flat weight.

    Attributes:
        source, target: which input and which output.
        row: first channel of the input it reads.
        fan_in, fan_out: channels.
        start: first element of the flat weight.
        factor: normalisation.
    """

    source: int
    target: int
    row: int
    fan_in: int
    fan_out: int
    start: int
    factor: float


def _pieces(weight: Tensor, starts: Sequence[int]) -> tuple[Tensor, ...]:
    """The flat weight cut at ``starts``, the first of which is 0; one cut is cheaper to differentiate than slices."""
    if not starts:
        return ()
    ends = [*starts[1:], weight.numel()]
    return weight.split([end - start for start, end in zip(starts, ends, strict=True)])


def matrices(blocks: Sequence[Block], weight: Tensor) -> list[Tensor]:
    """(fan in, fan out) of each block, without its factor."""
    pieces = _pieces(weight, [block.start for block in blocks])
    return [piece.view(block.fan_in, block.fan_out) for block, piece in zip(blocks, pieces, strict=True)]


def equivariant_linear(
    blocks: Sequence[Block], weight: Tensor, inputs: Sequence[Tensor], outputs: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """out[n, k, w] = Σ_u x[n, k, u] W[u, w] for each irrep.

    Args:
        blocks: of the weight, in its order, without gaps.
        weight: flat.
        inputs: (atoms, dim, channels) of each input irrep.
        outputs: (dim, channels) of each output irrep; those that no block reaches are 0.

    Returns:
        (atoms, dim, channels) of each output irrep.
    """
    sums: list[Tensor | None] = [None] * len(outputs)
    for block, piece in zip(blocks, _pieces(weight, [block.start for block in blocks]), strict=True):
        matrix = piece.view(block.fan_in, block.fan_out) * block.factor
        x = inputs[block.source]
        if block.fan_in != x.shape[2]:
            x = x[:, :, block.row : block.row + block.fan_in]
        part = (x.reshape(-1, block.fan_in) @ matrix).view(*x.shape[:2], block.fan_out)
        before = sums[block.target]
        sums[block.target] = part if before is None else before + part
    atoms = len(inputs[0])
    return [
        inputs[0].new_zeros(atoms, *shape) if part is None else part for part, shape in zip(sums, outputs, strict=True)
    ]


def species_linear(
    blocks: Sequence[Block],
    weight: Tensor,
    n_species: int,
    inputs: Sequence[Tensor],
    outputs: Sequence[tuple[int, int]],
    present: Tensor,
    counts: Sequence[int],
) -> list[Tensor]:
    """out[n, k, w] = Σ_u x[n, k, u] W[u, s(n), w]: a matrix for each species, found by index.

    Args:
        blocks: of the weight, each (fan in, species, fan out), in its order, without gaps.
        weight: flat.
        n_species: species of the weight.
        inputs: (atoms, dim, channels) of each input irrep, atoms grouped by species.
        outputs: (dim, channels) of each output irrep.
        present: (species present,) their indices.
        counts: atoms of each.

    Returns:
        (atoms, dim, channels) of each output irrep.
    """
    sums: list[Tensor | None] = [None] * len(outputs)
    for block, flat in zip(blocks, _pieces(weight, [block.start for block in blocks]), strict=True):
        x = inputs[block.source]
        whole = flat.view(block.fan_in, n_species, block.fan_out)
        chosen = whole.index_select(1, present).transpose(0, 1) * block.factor
        parts = [
            (piece.reshape(-1, block.fan_in) @ matrix).view(*piece.shape[:2], block.fan_out)
            for piece, matrix in zip(x.split(list(counts)), chosen.unbind(0), strict=True)
        ]
        part = parts[0] if len(parts) == 1 else torch.cat(parts)
        before = sums[block.target]
        sums[block.target] = part if before is None else before + part
    atoms = len(inputs[0])
    return [
        inputs[0].new_zeros(atoms, *shape) if part is None else part for part, shape in zip(sums, outputs, strict=True)
    ]
