"""What the convolution's loops are written from: the table of a path, its shape, and what both forms have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from forcetune.kernels.compiled.assembly import Writer


class Slot(IntEnum):
    """Places in the table of a path; addresses are those of the path's first number."""

    FUNCTION = 0
    STARTS = 1  # gather: first edge of each receiver
    EDGES = 2  # gather: pair, sender, ±1 of each edge
    DIRECTIONS = 1  # pull: edges of each pair, 0 to 2
    SENDER = 2
    RECEIVER = 3
    RADIAL = 4
    ANGULAR = 5
    FEATURES = 6
    OUTER = 7  # what gather writes, and the g that pull reads
    MOVED_RADIAL = 8  # splined: direction of each distance
    MOVED_ANGULAR = 9
    MOVED_FEATURES = 10
    TO_RADIAL = 11
    TO_ANGULAR = 12
    TO_FEATURES = 13
    RADIAL_STRIDE = 14
    ANGULAR_STRIDE = 15
    OUTER_STRIDE = 16  # from atom to atom
    OUTER_WIDTH = 17  # from component to component
    PLACES = 18  # splined: first row of each pair, in a table whose address is RADIAL
    WEIGHTS = 19  # of its rows
    SLOPES = 20  # their derivatives
    TO_LENGTHS = 21


SPLINE_ROWS = 8
"""Rows of the table that a radial weight is made of: those of a spline of degree 7."""

SLOTS = max(Slot) + 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What a function is written for.

    Attributes:
        dim_in, dim_out, channels, odd: of the path.
        moved: which of R, T and x have directions; None for the plain form.
        wanted: which gradients by R (or the distance), T and x are written; None for ``gather``.
        splined: whether R comes from a table.
    """

    dim_in: int
    dim_out: int
    channels: int
    odd: bool
    moved: tuple[bool, bool, bool] | None
    wanted: tuple[bool, bool, bool] | None
    splined: bool = False

    @property
    def name(self) -> str:
        def letters(flags: tuple[bool, bool, bool] | None) -> str:
            return "p" if flags is None else "".join("01"[flag] for flag in flags)

        kind = "gather" if self.wanted is None else f"pull{letters(self.wanted)}"
        sizes = f"{self.dim_in}_{self.dim_out}_{self.channels}"
        ending = "_splined" if self.splined else ""
        return f"{kind}_{letters(self.moved)}_{sizes}_{'odd' if self.odd else 'even'}{ending}"


class Form:
    """What both forms have in common."""

    def __init__(self, writer: Writer, shape: Shape) -> None:
        self.w, self.shape = writer, shape
        lanes = writer.target.lanes
        self.lanes = lanes
        self.moved_radial, self.moved_angular, self.moved_features = shape.moved or (False, False, False)
        slots = (Slot.PLACES, Slot.WEIGHTS, Slot.SLOPES, Slot.TO_LENGTHS) if shape.splined else ()
        self.spline = {slot: writer.address(slot) for slot in slots}

    def blocks(self, most: int) -> int:
        """Vectors that are treated at once, so that ``most`` vectors of each fit into the registers."""
        vectors = self.shape.channels // self.lanes
        fits = max(1, (self.w.target.registers - 4) // max(1, most))
        return next(n for n in (4, 2, 1) if n <= fits and vectors % n == 0)

    def vectors(self, pointer: str, count: int) -> list[str]:
        """Neighbouring vectors."""
        return [self.w.load(pointer, block * self.lanes) for block in range(count)]

    def interpolated(self, slot: Slot, pair: str, table: str, count: int) -> list[str]:
        """Neighbouring vectors of R of a pair, or by its slopes of the derivative of R.

        Args:
            slot: of the weights or the slopes.
            pair: its number.
            table: address of the first of the channels in the first row.
            count: of vectors.
        """
        w = self.w
        place = w.integer(self.spline[Slot.PLACES], pair)
        rows = w.offset(table, w.times(place, self.shape.channels))
        factors = w.offset(self.spline[slot], w.times(pair, SPLINE_ROWS))
        sums: list[str | None] = [None] * count
        for row in range(SPLINE_ROWS):
            factor, start = w.load_spread(factors, row), row * self.shape.channels
            values = [w.load(rows, start + number * self.lanes) for number in range(count)]
            sums = [w.multiply_add(factor, value, s) for value, s in zip(values, sums, strict=True)]
        return [value for value in sums if value is not None]

    def moved_along(self, pair: str, table: str, directions: str, count: int) -> list[str]:
        """Neighbouring vectors of the direction of R, from that of the pair's distance."""
        along = self.w.load_spread(directions, pair)
        return [self.w.multiply(along, slope) for slope in self.interpolated(Slot.SLOPES, pair, table, count)]

    def products(
        self, radial: Sequence[str], moved: Sequence[str], x: str, hx: str, m: int, count: int
    ) -> tuple[list[str], list[str]]:
        """For a component m: what T is multiplied with, and what h_T is multiplied with."""
        w, step = self.w, m * self.shape.channels
        features = [w.load(x, step + block * self.lanes) for block in range(count)]
        plain: list[str] = []
        if self.shape.moved is None or self.moved_angular:
            plain = [w.multiply(r, f) for r, f in zip(radial, features, strict=True)]
        if self.shape.moved is None:
            return plain, []
        change: list[str | None] = [None] * count
        if self.moved_radial:
            change = [w.multiply(r, f) for r, f in zip(moved, features, strict=True)]
        if self.moved_features:
            steps = [w.load(hx, step + block * self.lanes) for block in range(count)]
            change = [w.multiply_add(r, h, c) for r, h, c in zip(radial, steps, change, strict=True)]
        return [c for c in change if c is not None], plain
