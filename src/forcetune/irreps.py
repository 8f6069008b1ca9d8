"""Irreps as text, read without any equivariance library: ``128x0e+128x1o``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_BLOCK = re.compile(r"\s*(?:(\d+)\s*x\s*)?(\d+)([eo])\s*")


class Block(NamedTuple):
    """``multiplicity`` copies of one irrep of order ``order``, and where they lie in the feature vector.

    Features of a block are laid out multiplicity first: element ``start + channel * dim + component``.
    """

    multiplicity: int
    order: int
    parity: str
    start: int

    @property
    def dim(self) -> int:
        """Components of one copy, 2 l + 1."""
        return 2 * self.order + 1

    @property
    def stop(self) -> int:
        return self.start + self.multiplicity * self.dim

    @property
    def is_even_scalar(self) -> bool:
        """Whether the block is invariant under all of O(3); an odd scalar (``0o``) is not."""
        return self.order == 0 and self.parity == "e"

    @property
    def irrep(self) -> str:
        return f"{self.order}{self.parity}"


def parse_irreps(text: str) -> tuple[Block, ...]:
    """Blocks of an irreps string, in order; blocks without copies are left out.

    Raises:
        ValueError: the text is no irreps string.
    """
    blocks: list[Block] = []
    start = 0
    for part in text.split("+") if text.strip() else []:
        match = _BLOCK.fullmatch(part)
        if match is None:
            raise ValueError(f"{text!r} is not an irreps string such as '128x0e+128x1o'")
        block = Block(int(match[1] or 1), int(match[2]), match[3], start)
        start = block.stop
        if block.multiplicity:
            blocks.append(block)
    return tuple(blocks)


def merge_neighbours(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The same features with neighbouring blocks of one irrep as one block."""
    merged: list[Block] = []
    for block in blocks:
        if merged and merged[-1].irrep == block.irrep:
            merged[-1] = merged[-1]._replace(multiplicity=merged[-1].multiplicity + block.multiplicity)
        else:
            merged.append(block)
    return tuple(merged)


def irreps_text(blocks: Sequence[Block]) -> str:
    """Blocks written as text."""
    return "+".join(f"{block.multiplicity}x{block.irrep}" for block in blocks)
