"""The loops of the symmetric contraction: sparse polynomials, for all channels and species the same but coefficients.

With y = (x, 1) the monomials are m_q = y_i y_j, and every output is Σ_ρ m_r(ρ) T_ρ over its rows ρ, where T_ρ is the
sum of A_e m_q(e) over the row's terms e. Which components, rows and terms there are stands in tables, so that one
function does for all models. Atoms of a species are treated four at a time, channels a vector at a time.

:mod:`forcetune.kernels.compiled.unrolled_contraction` writes the same for polynomials that are known, without tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from forcetune.kernels.compiled.assembly import Target, Writer

Index = str | int
"""An integer: the name of one that is read from a table, or one that is known when the function is written."""

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
    """The function; its range is over tiles of species, species first."""
    writer = Writer(form.name, target)
    Function(writer, form).write()
    return writer


class Function:
    """Writes a function.

    Attributes:
        w, form: what it is written to, and which it is.
        atoms: that are treated at once, if there are as many.
    """

    atoms = ATOMS

    def __init__(self, writer: Writer, form: Form) -> None:
        self.w, self.form = writer, form
        self.moved = form.kind == "moved"
        self.lanes = writer.target.lanes
        # atoms treated at once, first channel and coefficients of the tile that is being written
        self.count, self.channel, self.a, self.to_a = self.atoms, "", "", ""

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
            left = w.value(f"srem i64 {w.value(f'sub i64 {last}, {first}')}, {self.atoms}")
            whole = w.value(f"sub i64 {last}, {left}")
            w.loop(first, whole, self.atoms, [], lambda n, _: self._atoms(n, self.atoms))
            if self.atoms > 1:
                w.loop(whole, last, 1, [], lambda n, _: self._atoms(n, 1))
            return []

        w.loop("%first", "%last", 1, [], tile)

    # ---- what depends on whether the polynomials are known -----------------------------------------------------------

    def sizes(self) -> tuple[Index, Index, Index]:
        """Numbers of components, monomials and outputs."""
        return self.numbers[Slot.COMPONENTS], self.numbers[Slot.MONOMIALS], self.numbers[Slot.OUTPUTS]

    def entry(self, slot: Slot, index: Index) -> Index:
        """An entry of one of the tables of the polynomials."""
        return self.w.integer(self.places[slot], index)

    def times(self, one: Index, other: int) -> Index:
        return self.w.times(one, other)

    def plus(self, one: Index, other: int) -> Index:
        return self.w.plus(one, other)

    def loop(
        self, first: Index, last: Index, carried: list[str], body: Callable[[Index, list[str]], list[str]]
    ) -> list[str]:
        """A loop by ones; arguments and result as :meth:`Writer.loop`."""
        return self.w.loop(first, last, 1, carried, body)

    def read(self, slot: Slot, item: Index) -> list[str]:
        """An item's vectors in the scratch, one for each atom."""
        place = self._at(slot, item)
        return [self.w.load(place, number * self.lanes) for number in range(self.count)]

    def write_to(self, slot: Slot, item: Index, values: Sequence[str]) -> None:
        """An item's vectors to the scratch."""
        place = self._at(slot, item)
        for number, value in enumerate(values):
            self.w.store(value, place, number * self.lanes)

    def _at(self, slot: Slot, item: Index) -> str:
        return self.w.offset(self.places[slot], self.w.times(item, self.count * self.lanes))

    # ---- pieces ----------------------------------------------------------------------------------------------------

    def _each(self, count: Index, body: Callable[[Index], None]) -> None:
        def turn(index: Index, _: list[str]) -> list[str]:
            body(index)
            return []

        self.loop(0, count, [], turn)

    def _fused(self, one: Sequence[str], other: Sequence[str], third: Sequence[str] | None = None) -> list[str]:
        thirds = [None] * len(one) if third is None else third
        return [self.w.multiply_add(a, b, c) for a, b, c in zip(one, other, thirds, strict=True)]

    def _outside(self, slot: Slot, item: Index, n: str) -> list[str]:
        """Addresses of a component's vectors for all atoms, outside of the scratch."""
        w = self.w
        row = self.times(item, 2)
        base = w.value(f"inttoptr i64 {w.integer(self.places[slot], row)} to ptr")
        stride = w.integer(self.places[slot], self.plus(row, 1))
        return [
            w.offset(base, w.plus(w.times(w.plus(n, number), stride), self.channel)) for number in range(self.count)
        ]

    def _bring(self, source: Slot, scratch: Slot, count: Index, n: str) -> None:
        following = self.w.plus(n, self.count)

        def item(index: Index) -> None:
            self.write_to(scratch, index, [self.w.load(place) for place in self._outside(source, index, n)])
            # a tile takes one line of a component's row: no pattern that a processor would foresee
            for place in self._outside(source, index, following):
                self.w.prefetch(place, 0, self.lanes)

        self._each(count, item)

    def _ask_for(self, slot: Slot, count: Index, n: str) -> None:
        """Have the lines at hand that results will be written to."""

        def item(index: Index) -> None:
            for place in self._outside(slot, index, n):
                self.w.prefetch(place, 0, self.lanes, write=True)

        self._each(count, item)

    def _factors(self, q: Index) -> tuple[Index, Index]:
        row = self.times(q, 2)
        return self.entry(Slot.FACTORS, row), self.entry(Slot.FACTORS, self.plus(row, 1))

    def _range(self, slot: Slot, index: Index) -> tuple[Index, Index]:
        """An entry and the following one: first and end of what belongs to an index."""
        return self.entry(slot, index), self.entry(slot, self.plus(index, 1))

    # ---- a block of atoms ------------------------------------------------------------------------------------------

    def _atoms(self, n: str, count: int) -> list[str]:
        w, form = self.w, self.form
        self.count = count
        components, monomials, outputs = self.sizes()
        self._bring(Slot.X, Slot.Y, components, n)
        self.write_to(Slot.Y, components, [w.spread("1.0")] * count)
        if self.moved:
            self._bring(Slot.H, Slot.HY, components, n)
            self.write_to(Slot.HY, components, [w.zero] * count)
        if form.x:
            self._ask_for(Slot.TO_X, components, n)
        if form.outer:
            self._ask_for(Slot.OUT, outputs, n)
        self._each(monomials, self._monomial)
        if form.kind != "value":
            self._bring(Slot.G, Slot.GS, outputs, n)
        self._each(outputs, lambda k: self._output(k, n))
        if form.x:
            self._each(monomials, self._column)
            self._each(self.plus(components, 1), lambda i: self.write_to(Slot.TO_Y, i, [w.zero] * count))
            self._each(monomials, self._separate)

            def finish(i: Index) -> None:
                for value, place in zip(self.read(Slot.TO_Y, i), self._outside(Slot.TO_X, i, n), strict=True):
                    w.store(value, place)

            self._each(components, finish)
        return []

    def _monomial(self, q: Index) -> None:
        i, j = self._factors(q)
        left, right = self.read(Slot.Y, i), self.read(Slot.Y, j)
        self.write_to(Slot.M, q, self._fused(left, right))
        if self.moved:
            moved = self._fused(self.read(Slot.HY, i), right)
            self.write_to(Slot.HM, q, self._fused(left, self.read(Slot.HY, j), moved))
        if self.form.x:
            for slot in (Slot.PULLED, *([Slot.HPULLED] if self.moved else [])):
                self.write_to(slot, q, [self.w.zero] * self.count)

    def _output(self, k: Index, n: str) -> None:
        w = self.w
        first, last = self._range(Slot.FIRST_ROW, k)
        g = [] if self.form.kind == "value" else self.read(Slot.GS, k)
        total = [w.zero] * (self.count if self.form.outer else 0)
        total = self.loop(first, last, total, lambda row, sums: self._row(row, sums, g))
        if self.form.outer:
            for value, place in zip(total, self._outside(Slot.OUT, k, n), strict=True):
                w.store(value, place)

    def _row(self, row: Index, sums: list[str], g: list[str]) -> list[str]:
        form = self.form
        place = self.times(row, 3)
        r, first, last = (self.entry(Slot.ROWS, self.plus(place, index)) for index in range(3))
        m = self.read(Slot.M, r)
        hm = self.read(Slot.HM, r) if self.moved else []
        if form.outer or form.x:
            t, ht = self._row_sums(first, last)
            if form.outer and self.moved:
                sums = self._fused(m, ht, self._fused(hm, t, sums))
            elif form.outer:
                sums = self._fused(m, t, sums)
            if form.x:
                for slot, values in ((Slot.PULLED, t), *([(Slot.HPULLED, ht)] if self.moved else [])):
                    self.write_to(slot, r, self._fused(g, values, self.read(slot, r)))
        if form.kind == "value":
            return sums
        seed = self._fused(g, m)
        hseed = self._fused(g, hm) if self.moved else []
        if form.x:
            self.write_to(Slot.SEED, row, seed)
            if self.moved:
                self.write_to(Slot.HSEED, row, hseed)
        if form.coefficients:
            self._add_outer(first, last, seed, hseed)
        return sums

    def _coefficient(self, e: Index) -> list[str]:
        """A of a term, for all atoms the same."""
        return [self.w.load(self.a, self.times(e, self.lanes))] * self.count

    def _row_sums(self, first: Index, last: Index) -> tuple[list[str], list[str]]:
        """T of a row, and its derivative along h."""
        count = self.count

        def term(e: Index, sums: list[str]) -> list[str]:
            q, a = self.entry(Slot.COLUMNS, e), self._coefficient(e)
            new_sums = self._fused(a, self.read(Slot.M, q), sums[:count])
            if self.moved:
                new_sums += self._fused(a, self.read(Slot.HM, q), sums[count:])
            return new_sums

        sums = self.loop(first, last, [self.w.zero] * (count * (1 + self.moved)), term)
        return sums[:count], sums[count:]

    def _add_outer(self, first: Index, last: Index, seed: list[str], hseed: list[str]) -> None:
        """Add seed · m (or its derivative) to the gradient of a row's coefficients."""
        w = self.w

        def term(e: Index, _: list[str]) -> list[str]:
            q = self.entry(Slot.COLUMNS, e)
            place = w.offset(self.to_a, self.times(e, self.lanes))
            total = w.load(place)
            pairs = [(seed, Slot.HM), (hseed, Slot.M)] if self.moved else [(seed, Slot.M)]
            for left, slot in pairs:
                for one, other in zip(left, self.read(slot, q), strict=True):
                    total = w.multiply_add(one, other, total)
            w.store(total, place)
            return []

        self.loop(first, last, [], term)

    def _column(self, q: Index) -> None:
        """Add what comes from the rows to the gradient of a monomial."""
        count = self.count
        first, last = self._range(Slot.FIRST_USE, q)
        slots = [(Slot.SEED, Slot.PULLED), *([(Slot.HSEED, Slot.HPULLED)] if self.moved else [])]
        start = [value for _, slot in slots for value in self.read(slot, q)]

        def use(index: Index, sums: list[str]) -> list[str]:
            place = self.times(index, 2)
            line, e = self.entry(Slot.USES, place), self.entry(Slot.USES, self.plus(place, 1))
            a = self._coefficient(e)
            result: list[str] = []
            for number, (slot, _) in enumerate(slots):
                own = sums[number * count : (number + 1) * count]
                result += self._fused(a, self.read(slot, line), own)
            return result

        sums = self.loop(first, last, start, use)
        for number, (_, slot) in enumerate(slots):
            self.write_to(slot, q, sums[number * count : (number + 1) * count])

    def _separate(self, q: Index) -> None:
        """Hand the gradient of a monomial on to its factors."""
        i, j = self._factors(q)
        pulled = self.read(Slot.PULLED, q)
        hpulled = self.read(Slot.HPULLED, q) if self.moved else []
        for here, other in ((i, j), (j, i)):
            values = self.read(Slot.TO_Y, here)
            if self.moved:
                values = self._fused(hpulled, self.read(Slot.Y, other), values)
                values = self._fused(pulled, self.read(Slot.HY, other), values)
            else:
                values = self._fused(pulled, self.read(Slot.Y, other), values)
            self.write_to(Slot.TO_Y, here, values)
