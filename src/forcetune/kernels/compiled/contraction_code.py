"""The loops of the symmetric contraction: sparse polynomials, for all channels and species the same but coefficients.

With y = (x, 1) the monomials are m_q = y_i y_j, and every output is Σ_ρ m_r(ρ) T_ρ over its rows ρ, where T_ρ is the
sum of A_e m_q(e) over the row's terms e. Which components, rows and terms there are stands in tables, so that one
function does for all models. Atoms of a species are treated four at a time, channels a vector at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from forcetune.kernels.compiled.assembly import Target, Writer

ATOMS = 4
"""Atoms treated at once: a coefficient is read once for all of them."""


class Slot(IntEnum):
    """Places in the table; all are addresses but the first few, which are numbers."""

    COMPONENTS = 0
    MONOMIALS = 1
    OUTPUTS = 2
    TERMS = 3
    SPECIES = 4
    TILES = 5  # vectors of channels
    FIRST_ATOM = 6  # of each species, and the number of atoms
    FACTORS = 7  # i and j of each monomial
    FIRST_ROW = 8  # of each output, and the number of rows
    ROWS = 9  # monomial, first term and end of its terms of each row
    COLUMNS = 10  # monomial of each term
    FIRST_USE = 11  # of each monomial in USES, and their number
    USES = 12  # row and term, sorted by monomial
    COEFFICIENTS = 13  # [species][tile][term][lane]
    X = 14  # address and stride of each component
    H = 15
    OUT = 16  # address and stride of each output
    G = 17
    TO_X = 18
    TO_COEFFICIENTS = 19
    # scratch of this thread, [item][atom][lane]
    Y = 20
    HY = 21
    M = 22
    HM = 23
    GS = 24
    SEED = 25
    HSEED = 26
    PULLED = 27
    HPULLED = 28
    TO_Y = 29


SLOTS = max(Slot) + 1


@dataclass(frozen=True, slots=True)
class Form:
    """Which function: the values, their gradients (``pull``), or the derivative of the gradients along h (``moved``).

    Attributes:
        kind: one of the three.
        outer, x, coefficients: which results are written: by g (values, where the kind is ``value``), x, A.
    """

    kind: str
    outer: bool
    x: bool
    coefficients: bool

    @property
    def name(self) -> str:
        return self.kind + "".join("01"[flag] for flag in (self.outer, self.x, self.coefficients))


def write(form: Form, target: Target) -> Writer:
    """The function; its range are tiles of species, species first."""
    writer = Writer(form.name, target)
    _Function(writer, form).write()
    return writer


class _Function:
    def __init__(self, writer: Writer, form: Form) -> None:
        self.w, self.form = writer, form
        self.moved = form.kind == "moved"
        self.lanes = writer.target.lanes
        # atoms treated at once, first channel and coefficients of the tile that is being written
        self.count, self.channel, self.a, self.to_a = ATOMS, "", "", ""

    def write(self) -> None:
        w = self.w
        self.numbers = {slot: w.argument(slot) for slot in Slot if slot <= Slot.TILES}
        self.places = {slot: w.address(slot) for slot in Slot if slot > Slot.TILES}

        def tile(index: str, _: list[str]) -> list[str]:
            species = w.value(f"srem i64 {index}, {self.numbers[Slot.SPECIES]}")
            number = w.value(f"sdiv i64 {index}, {self.numbers[Slot.SPECIES]}")
            self.channel = w.times(number, self.lanes)
            flat = w.plus(w.times(species, self.numbers[Slot.TILES]), number)
            start = w.times(w.times(flat, self.numbers[Slot.TERMS]), self.lanes)
            self.a = w.offset(self.places[Slot.COEFFICIENTS], start)
            self.to_a = w.offset(self.places[Slot.TO_COEFFICIENTS], start)
            first = w.integer(self.places[Slot.FIRST_ATOM], species)
            last = w.integer(self.places[Slot.FIRST_ATOM], w.plus(species, 1))
            left = w.value(f"srem i64 {w.value(f'sub i64 {last}, {first}')}, {ATOMS}")
            whole = w.value(f"sub i64 {last}, {left}")
            w.loop(first, whole, ATOMS, [], lambda n, _: self._atoms(n, ATOMS))
            w.loop(whole, last, 1, [], lambda n, _: self._atoms(n, 1))
            return []

        w.loop("%first", "%last", 1, [], tile)

    # ---- pieces ----------------------------------------------------------------------------------------------------

    def _at(self, slot: Slot, item: str) -> str:
        """Address of an item's vectors in the scratch."""
        return self.w.offset(self.places[slot], self.w.times(item, self.count * self.lanes))

    def _read(self, place: str) -> list[str]:
        return [self.w.load(place, number * self.lanes) for number in range(self.count)]

    def _write(self, place: str, values: Sequence[str]) -> None:
        for number, value in enumerate(values):
            self.w.store(value, place, number * self.lanes)

    def _each(self, count: str, body: Callable[[str], None]) -> None:
        def turn(index: str, _: list[str]) -> list[str]:
            body(index)
            return []

        self.w.loop(0, count, 1, [], turn)

    def _fused(self, one: Sequence[str], other: Sequence[str], third: Sequence[str] | None = None) -> list[str]:
        thirds = [None] * len(one) if third is None else third
        return [self.w.multiply_add(a, b, c) for a, b, c in zip(one, other, thirds, strict=True)]

    def _outside(self, slot: Slot, item: str, n: str) -> list[str]:
        """Addresses of a component's vectors for all atoms, outside of the scratch."""
        w = self.w
        row = w.times(item, 2)
        base = w.value(f"inttoptr i64 {w.integer(self.places[slot], row)} to ptr")
        stride = w.integer(self.places[slot], w.plus(row, 1))
        return [
            w.offset(base, w.plus(w.times(w.plus(n, number), stride), self.channel)) for number in range(self.count)
        ]

    def _bring(self, source: Slot, scratch: Slot, count: str, n: str) -> None:
        def item(index: str) -> None:
            self._write(self._at(scratch, index), [self.w.load(place) for place in self._outside(source, index, n)])

        self._each(count, item)

    def _factors(self, q: str) -> tuple[str, str]:
        w, row = self.w, self.w.times(q, 2)
        return w.integer(self.places[Slot.FACTORS], row), w.integer(self.places[Slot.FACTORS], w.plus(row, 1))

    # ---- a block of atoms ------------------------------------------------------------------------------------------

    def _atoms(self, n: str, count: int) -> list[str]:
        w, self.count = self.w, count
        components, monomials = self.numbers[Slot.COMPONENTS], self.numbers[Slot.MONOMIALS]
        one = "1.0"
        self._bring(Slot.X, Slot.Y, components, n)
        self._write(self._at(Slot.Y, components), [w.spread(one)] * count)
        if self.moved:
            self._bring(Slot.H, Slot.HY, components, n)
            self._write(self._at(Slot.HY, components), [w.zero] * count)
        self._each(monomials, self._monomial)
        if self.form.kind != "value":
            self._bring(Slot.G, Slot.GS, self.numbers[Slot.OUTPUTS], n)
        self._each(self.numbers[Slot.OUTPUTS], lambda k: self._output(k, n))
        if self.form.x:
            self._each(monomials, self._column)
            self._each(w.plus(components, 1), lambda i: self._write(self._at(Slot.TO_Y, i), [w.zero] * count))
            self._each(monomials, self._separate)

            def finish(i: str) -> None:
                values = self._read(self._at(Slot.TO_Y, i))
                for value, place in zip(values, self._outside(Slot.TO_X, i, n), strict=True):
                    w.store(value, place)

            self._each(components, finish)
        return []

    def _monomial(self, q: str) -> None:
        i, j = self._factors(q)
        left, right = self._read(self._at(Slot.Y, i)), self._read(self._at(Slot.Y, j))
        self._write(self._at(Slot.M, q), self._fused(left, right))
        if self.moved:
            moved = self._fused(self._read(self._at(Slot.HY, i)), right)
            self._write(self._at(Slot.HM, q), self._fused(left, self._read(self._at(Slot.HY, j)), moved))
        if self.form.x:
            for slot in (Slot.PULLED, *([Slot.HPULLED] if self.moved else [])):
                self._write(self._at(slot, q), [self.w.zero] * self.count)

    def _output(self, k: str, n: str) -> None:
        w = self.w
        first = w.integer(self.places[Slot.FIRST_ROW], k)
        last = w.integer(self.places[Slot.FIRST_ROW], w.plus(k, 1))
        g = [] if self.form.kind == "value" else self._read(self._at(Slot.GS, k))
        total = [w.zero] * (self.count if self.form.outer else 0)
        total = w.loop(first, last, 1, total, lambda row, sums: self._row(row, sums, g))
        if self.form.outer:
            for value, place in zip(total, self._outside(Slot.OUT, k, n), strict=True):
                w.store(value, place)

    def _row(self, row: str, sums: list[str], g: list[str]) -> list[str]:
        w, form = self.w, self.form
        place = w.times(row, 3)
        r, first, last = (w.integer(self.places[Slot.ROWS], w.plus(place, index)) for index in range(3))
        m = self._read(self._at(Slot.M, r))
        hm = self._read(self._at(Slot.HM, r)) if self.moved else []
        if form.outer or form.x:
            t, ht = self._row_sums(first, last)
            if form.outer and self.moved:
                sums = self._fused(m, ht, self._fused(hm, t, sums))
            elif form.outer:
                sums = self._fused(m, t, sums)
            if form.x:
                for slot, values in ((Slot.PULLED, t), *([(Slot.HPULLED, ht)] if self.moved else [])):
                    at = self._at(slot, r)
                    self._write(at, self._fused(g, values, self._read(at)))
        if form.kind == "value":
            return sums
        seed = self._fused(g, m)
        hseed = self._fused(g, hm) if self.moved else []
        if form.x:
            self._write(self._at(Slot.SEED, row), seed)
            if self.moved:
                self._write(self._at(Slot.HSEED, row), hseed)
        if form.coefficients:
            self._add_outer(first, last, seed, hseed)
        return sums

    def _row_sums(self, first: str, last: str) -> tuple[list[str], list[str]]:
        """T of a row, and its derivative along h."""
        w, count = self.w, self.count

        def term(e: str, sums: list[str]) -> list[str]:
            q = w.integer(self.places[Slot.COLUMNS], e)
            a = [w.load(self.a, w.times(e, self.lanes))] * count
            new_sums = self._fused(a, self._read(self._at(Slot.M, q)), sums[:count])
            if self.moved:
                new_sums += self._fused(a, self._read(self._at(Slot.HM, q)), sums[count:])
            return new_sums

        sums = w.loop(first, last, 1, [w.zero] * (count * (1 + self.moved)), term)
        return sums[:count], sums[count:]

    def _add_outer(self, first: str, last: str, seed: list[str], hseed: list[str]) -> None:
        """Add seed · m (or its derivative) to the gradient of a row's coefficients."""
        w = self.w

        def term(e: str, _: list[str]) -> list[str]:
            q = w.integer(self.places[Slot.COLUMNS], e)
            place = w.offset(self.to_a, w.times(e, self.lanes))
            total = w.load(place)
            pairs = [(seed, Slot.HM), (hseed, Slot.M)] if self.moved else [(seed, Slot.M)]
            for left, slot in pairs:
                for one, other in zip(left, self._read(self._at(slot, q)), strict=True):
                    total = w.multiply_add(one, other, total)
            w.store(total, place)
            return []

        w.loop(first, last, 1, [], term)

    def _column(self, q: str) -> None:
        """Add what comes from the rows to the gradient of a monomial."""
        w, count = self.w, self.count
        first = w.integer(self.places[Slot.FIRST_USE], q)
        last = w.integer(self.places[Slot.FIRST_USE], w.plus(q, 1))
        slots = [(Slot.SEED, Slot.PULLED), *([(Slot.HSEED, Slot.HPULLED)] if self.moved else [])]
        start = [value for _, slot in slots for value in self._read(self._at(slot, q))]

        def use(index: str, sums: list[str]) -> list[str]:
            row = w.times(index, 2)
            line, e = w.integer(self.places[Slot.USES], row), w.integer(self.places[Slot.USES], w.plus(row, 1))
            a = [w.load(self.a, w.times(e, self.lanes))] * count
            result: list[str] = []
            for number, (slot, _) in enumerate(slots):
                own = sums[number * count : (number + 1) * count]
                result += self._fused(a, self._read(self._at(slot, line)), own)
            return result

        sums = w.loop(first, last, 1, start, use)
        for number, (_, slot) in enumerate(slots):
            self._write(self._at(slot, q), sums[number * count : (number + 1) * count])

    def _separate(self, q: str) -> None:
        """Hand the gradient of a monomial on to its factors."""
        i, j = self._factors(q)
        pulled = self._read(self._at(Slot.PULLED, q))
        hpulled = self._read(self._at(Slot.HPULLED, q)) if self.moved else []
        for here, other in ((i, j), (j, i)):
            at = self._at(Slot.TO_Y, here)
            values = self._read(at)
            if self.moved:
                values = self._fused(hpulled, self._read(self._at(Slot.Y, other)), values)
                values = self._fused(pulled, self._read(self._at(Slot.HY, other)), values)
            else:
                values = self._fused(pulled, self._read(self._at(Slot.Y, other)), values)
            self._write(at, values)
