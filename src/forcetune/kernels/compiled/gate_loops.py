"""What the functions of :mod:`forcetune.kernels.compiled.gate_code` have in common: products, memory, activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forcetune.kernels.compiled.assembly import Target
from forcetune.kernels.compiled.gate_tables import (
    ENTRY_SLOTS,
    PANEL,
    PRODUCT_SLOTS,
    TILE,
    Blocks,
    Entry,
    Form,
    Layer,
    Product,
    Slot,
)
from forcetune.kernels.compiled.routine import Routine


def write_product(target: Target) -> Routine:
    """``product``: out = start + x w, of any strides; w is padded to whole panels of columns.

    Panels of w are apart by ``w_column`` for each column: 1 where rows are whole, their number where panels are.
    """
    names = "ptr %start, i64 %start_row, ptr %x, i64 %x_row, i64 %x_k, i64 %rows, ptr %w, i64 %w_row, i64 %w_column, "
    w = Routine("product", target, names + "i64 %inner, i64 %width, ptr %out, i64 %out_row")
    lanes = target.lanes
    together = 8 if target.registers >= 32 else 4

    def panel(c: str, masks: Sequence[str | None]) -> None:
        columns = w.offset("%w", w.times(c, "%w_column"))

        def rows(count: int) -> Callable[[str, list[str]], list[str]]:
            def body(i: str, _: list[str]) -> list[str]:
                places = [w.plus(i, number) for number in range(count)]
                x = [w.offset("%x", w.times(place, "%x_row")) for place in places]
                sums: list[str] = []
                for place in places:
                    start = w.offset("%start", w.plus(w.times(place, "%start_row"), c))
                    sums += [w.read(start, number * lanes, mask) for number, mask in enumerate(masks)]

                def inner(k: str, sums: list[str]) -> list[str]:
                    line = w.offset(columns, w.times(k, "%w_row"))
                    step = w.times(k, "%x_k")
                    vectors = [w.load(line, number * lanes) for number in range(PANEL)]
                    factors = [w.load_spread(row, step) for row in x]
                    return [
                        w.multiply_add(factor, vector, sums[row * PANEL + number])
                        for row, factor in enumerate(factors)
                        for number, vector in enumerate(vectors)
                    ]

                results = w.loop(0, "%inner", 1, sums, inner)
                for row, place in enumerate(places):
                    out = w.offset("%out", w.plus(w.times(place, "%out_row"), c))
                    for number, mask in enumerate(masks):
                        w.write(results[row * PANEL + number], out, number * lanes, mask)
                return []

            return body

        full = w.minus("%rows", w.value(f"srem i64 %rows, {together}"))
        w.loop(0, full, together, [], rows(together))
        w.loop(full, "%rows", 1, [], rows(1))

    w.columns("%width", PANEL, panel)
    return w


class EntryCode:
    """A block that is changed.

    Attributes:
        index: among the entries.
        table: of what is the same for all calls.
    """

    def __init__(self, w: Routine, index: str, table: str) -> None:
        self.w, self.index, self.table = w, index, table

    def integer(self, place: Entry) -> str:
        return self.w.integer(self.table, place)

    def block(self, kind: Blocks) -> str:
        """Its tensor."""
        w = self.w
        before = w.times(w.argument(Slot.ENTRIES), int(kind))
        return self._pointer(w.plus(w.plus(before, self.index), int(Slot.BLOCKS)))

    def weight(self, first: Slot) -> str:
        """Its rows of shifts' or gains' weights (``DOWN``), or of the gradients by them (``TO_DOWN``)."""
        rows = self.w.times(self.integer(Entry.FIRST), self.w.argument(Slot.RANK))
        return self.w.offset(self._pointer(self._of_kind(first + 2)), rows)

    def bias(self, first: Slot) -> str:
        return self.w.offset(self._pointer(self._of_kind(first + 3)), self.integer(Entry.FIRST))

    def _of_kind(self, place: int) -> str:
        """The place for shifts, or the one for gains two behind it."""
        return self.w.plus(self.w.times(self.integer(Entry.IS_GAIN), 2), place)

    def _pointer(self, place: str) -> str:
        return self.w.value(f"inttoptr i64 {self.w.integer('%table', place)} to ptr")


class GateLoops:
    """What the three functions have in common."""

    name = ""

    def __init__(self, form: Form, target: Target, *, whole_layer: bool = False) -> None:
        self.form, self.lanes, self.whole_layer = form, target.lanes, whole_layer
        name = f"layer_{self.name}" if whole_layer else self.name
        w = self.routine = self.w = Routine(name, target, "ptr noalias %table, i64 %first, i64 %last")
        self.entries, self.entry_table = w.argument(Slot.ENTRIES), w.address(Slot.ENTRY_TABLE)
        self.n_in, self.rank, self.n_columns = (w.argument(s) for s in (Slot.N_IN, Slot.RANK, Slot.COLUMNS))
        sizes = (Slot.INPUT_PADDED, Slot.RANK_PADDED, Slot.COLUMNS_PADDED)
        self.n, self.r, self.c = (w.argument(slot) for slot in sizes)
        self.down, self.down_bias = w.address(Slot.DOWN), w.address(Slot.DOWN + 1)
        self._free = w.address(Slot.SCRATCH)
        self.zeros = self._zeros()
        self.layer = w.address(Slot.LAYER)
        self._prepare()

        def tile(a: str, _: list[str]) -> list[str]:
            self._tile(a, w.smaller(TILE, w.minus("%last", a)))
            return []

        w.loop("%first", "%last", TILE, [], tile)

    def _zeros(self) -> str:
        """As many as the widest product starts from."""
        w = self.w
        size = w.plus(self.n, w.plus(self.r, self.c))
        return w.address(Slot.ZEROS) if self.whole_layer else self._zeroed(size)

    def _constant(self, place: Layer) -> str:
        """A matrix of a layer with constant weights."""
        return self.w.value(f"inttoptr i64 {self.w.integer(self.layer, place)} to ptr")

    def _prepare(self) -> None:
        """What all tiles need."""
        raise NotImplementedError

    def _tile(self, a: str, count: str) -> None:
        """Atoms from ``a`` on."""
        raise NotImplementedError

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _taken(self, size: str) -> str:
        """Scratch memory for so many numbers."""
        pointer = self._free
        self._free = self.w.offset(pointer, size)
        return pointer

    def _zeroed(self, size: str) -> str:
        pointer = self._taken(size)
        self._each(size, lambda place: self.w.store(self.w.zero, pointer, place))
        return pointer

    def _rows(self, width: str) -> str:
        return self._taken(self.w.times(width, TILE))

    def _each(self, size: str, body: Callable[[str], object]) -> None:
        """A loop over whole vectors."""

        def turn(place: str, _: list[str]) -> list[str]:
            body(place)
            return []

        self.w.loop(0, size, self.lanes, [], turn)

    def _each_row(self, count: str, body: Callable[[str], object]) -> None:
        def turn(row: str, _: list[str]) -> list[str]:
            body(row)
            return []

        self.w.loop(0, count, 1, [], turn)

    def _copied(self, source: str, width: str, rows: str, target: str, stride: str) -> None:
        """Rows into wider ones; what is beyond them is 0 already or made so by masks."""
        w = self.w

        def row(i: str) -> None:
            here, there = w.offset(source, w.times(i, width)), w.offset(target, w.times(i, stride))

            def part(c: str, masks: Sequence[str | None]) -> None:
                for number, mask in enumerate(masks):
                    place = w.plus(c, number * self.lanes)
                    w.store(w.read(here, place, mask), there, place)

            w.columns(width, PANEL, part)

        self._each_row(rows, row)

    def _transposed(self, source: str, rows: str, columns: str, target: str, stride: str) -> None:
        """(rows, columns) to (columns, rows)."""
        w, real, size = self.w, self.w.target.real, self.w.bits // 8

        def row(i: str) -> None:
            here = w.offset(source, w.times(i, columns))

            def one(k: str) -> None:
                number = w.value(f"load {real}, ptr {w.offset(here, k)}, align {size}")
                w.store_number(number, target, w.plus(w.times(k, stride), i))

            self._each_row(columns, one)

        self._each_row(rows, row)

    def _each_entry(self, body: Callable[[EntryCode], object]) -> None:
        w, table = self.w, self.entry_table
        self._each_row(
            self.entries,
            lambda e: body(EntryCode(w, e, w.value(f"getelementptr i64, ptr {table}, i64 {w.times(e, ENTRY_SLOTS)}"))),
        )

    def _each_product(self, body: Callable[[str, str, str], object], kinds: int) -> None:
        """From each product's row and its two blocks.

        Args:
            body: writes what is done.
            kinds: of blocks that stand before those of the products.
        """
        w = self.w
        count = w.integer(self.layer, Layer.PRODUCTS)
        start = w.plus(w.times(self.entries, kinds), int(Slot.BLOCKS))

        def product(number: str) -> None:
            place = w.plus(w.times(number, PRODUCT_SLOTS), int(Layer.ROWS))
            row = w.value(f"getelementptr i64, ptr {self.layer}, i64 {place}")
            first = w.plus(start, number)
            blocks = [w.integer("%table", index) for index in (first, w.plus(first, count))]
            body(row, *(w.value(f"inttoptr i64 {block} to ptr") for block in blocks))

        self._each_row(count, product)

    def _layer_product(self, row: str, x: str, y: str, a: str, count: str) -> None:
        """y = x w for the atoms of a tile."""
        w = self.w
        dim, fan_in, fan_out = (w.integer(row, place) for place in (Product.DIM, Product.FAN_IN, Product.FAN_OUT))
        matrix = w.value(f"inttoptr i64 {w.integer(row, Product.MATRIX)} to ptr")
        before = w.times(a, dim)
        own_x, own_y = w.offset(x, w.times(before, fan_in)), w.offset(y, w.times(before, fan_out))
        w.call(
            "product",
            *(f"ptr {self.zeros}", 0, f"ptr {own_x}", fan_in, 1, w.times(count, dim)),
            *(f"ptr {matrix}", PANEL * self.lanes, fan_in, fan_in, fan_out, f"ptr {own_y}", fan_out),
        )

    def _layer_gradient(self, row: str, g: str, to_x: str, a: str, count: str) -> None:
        """The gradient by x, or its part of this product."""
        w = self.w
        dim, fan_in, fan_out = (w.integer(row, place) for place in (Product.DIM, Product.FAN_IN, Product.FAN_OUT))
        matrix = w.value(f"inttoptr i64 {w.integer(row, Product.TRANSPOSED)} to ptr")
        before, adds = w.times(a, dim), w.integer(row, Product.ADDS)
        skipped = w.times(w.minus(1, w.integer(row, Product.IN_TILE)), before)
        own_g, own_x = w.offset(g, w.times(skipped, fan_out)), w.offset(to_x, w.times(before, fan_in))
        added = w.value(f"icmp ne i64 {adds}, 0")
        start = w.value(f"select i1 {added}, ptr {own_x}, ptr {self.zeros}")
        w.call(
            "product",
            *(f"ptr {start}", w.times(adds, fan_in), f"ptr {own_g}", fan_out, 1, w.times(count, dim)),
            *(f"ptr {matrix}", PANEL * self.lanes, fan_out, fan_out, fan_in, f"ptr {own_x}", fan_in),
        )

    def _forward_matrices(self) -> tuple[str, str]:
        """D (n_in, rank) and U (rank, columns)."""
        w = self.w
        if self.whole_layer:
            return self._constant(Layer.DOWN), self._constant(Layer.UP)
        down = self._zeroed(w.times(self.n_in, self.r))
        self._transposed(self.down, self.rank, self.n_in, down, self.r)
        up = self._zeroed(w.times(self.rank, self.c))

        def entry(e: EntryCode) -> None:
            weight, channels = e.weight(Slot.DOWN), e.integer(Entry.CHANNELS)
            self._transposed(weight, channels, self.rank, w.offset(up, e.integer(Entry.PLACE)), self.c)

        self._each_entry(entry)
        return down, up

    def _backward_matrices(self) -> tuple[str, str]:
        """Dᵀ (rank, n_in) and Uᵀ (columns, rank)."""
        w = self.w
        if self.whole_layer:
            return self._constant(Layer.DOWN_BACK), self._constant(Layer.UP_BACK)
        down = self._zeroed(w.times(self.rank, self.n))
        self._copied(self.down, self.n_in, self.rank, down, self.n)
        up = self._zeroed(w.times(self.n_columns, self.r))

        def entry(e: EntryCode) -> None:
            weight, channels = e.weight(Slot.DOWN), e.integer(Entry.CHANNELS)
            target = w.offset(up, w.times(e.integer(Entry.PLACE), self.r))
            self._copied(weight, self.rank, channels, target, self.r)

        self._each_entry(entry)
        return down, up

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def _product(
        self, x: str, x_row: str, count: str, w_matrix: str, w_row: str, inner: str, width: str, out: str, out_row: str
    ) -> None:
        """out = x w."""
        self.w.call(
            "product",
            *(f"ptr {self.zeros}", 0, f"ptr {x}", x_row, 1, count),
            *(f"ptr {w_matrix}", w_row, 1, inner, width, f"ptr {out}", out_row),
        )

    def _added_outer(self, x: str, x_row: str, rows: str, y: str, y_row: str, count: str, width: str, out: str) -> None:
        """out += xᵀ y, (rows, width), sums over atoms."""
        self.w.call(
            "product",
            *(f"ptr {out}", width, f"ptr {x}", 1, x_row, rows),
            *(f"ptr {y}", y_row, 1, count, width, f"ptr {out}", width),
        )

    def _added_sums(self, ones: str, y: str, y_row: str, count: str, width: str, out: str) -> None:
        """out += Σ y over atoms."""
        self.w.call(
            "product",
            *(f"ptr {out}", 0, f"ptr {ones}", 0, 1, 1),
            *(f"ptr {y}", y_row, 1, count, width, f"ptr {out}", 0),
        )

    def _ones(self) -> str:
        w = self.w
        pointer = self._taken(str(TILE))
        for place in range(TILE):
            w.store_number("1.0", pointer, place)
        return pointer

    def _activated(self, p: str, derivatives: int) -> list[str]:
        """σ(p) and so many of its derivatives."""
        w = self.w
        one = w.constant(1)
        if not self.form.activation:
            return [p, one, w.zero][: 1 + derivatives]
        s = w.sigmoid(p)
        rest = w.subtract(one, s)
        results = [w.multiply(p, s)]
        if derivatives:
            results.append(w.multiply(s, w.multiply_add(p, rest, one)))
        if derivatives > 1:
            inner = w.multiply_add(p, w.subtract(rest, s), w.constant(2))
            results.append(w.multiply(w.multiply(s, rest), inner))
        return results

    def _gains(self, q: str, derivatives: int) -> list[str]:
        """φ(q) and so many of its derivatives."""
        w = self.w
        if self.form.gain == "linear":
            return [w.add(q, w.constant(1)), w.constant(1), w.zero][: 1 + derivatives]
        capped = w.at_most(q, self.form.largest_exponent)
        slope = w.exponential(capped)
        results = [w.multiply_add(slope, w.subtract(q, capped), slope)]
        if derivatives:
            results.append(slope)
        if derivatives > 1:
            beyond = w.value(f"fcmp ogt {w.vector} {q}, {w.constant(self.form.largest_exponent)}")
            results.append(w.choose(beyond, w.zero, slope))
        return results

    def _per_channel(
        self, e: EntryCode, a: str, count: str, is_gain: bool, body: Callable[[ChannelPlaces, str | None], object]
    ) -> None:
        """For every atom of the tile and every vector of channels of an entry of this kind."""
        w = self.w
        kind = e.integer(Entry.IS_GAIN)
        wanted = kind if is_gain else w.minus(1, kind)
        channels, dim = e.integer(Entry.CHANNELS), e.integer(Entry.DIM)
        column = e.integer(Entry.PLACE)

        def row(i: str) -> None:
            block = w.times(w.plus(a, i), w.times(dim, channels))

            def vectors(c: str, masks: Sequence[str | None]) -> None:
                body(ChannelPlaces(i, w.plus(block, c), w.plus(column, c), dim, channels), masks[0])

            w.columns(channels, 1, vectors)

        self._each_row(w.times(count, wanted), row)


@dataclass(frozen=True, slots=True)
class ChannelPlaces:
    """Where a vector of channels lies.

    Attributes:
        row: of the tile.
        block: in a block's tensor, of the first component.
        column: among the columns of all entries.
        dim: components.
        step: from one to the next.
    """

    row: str
    block: str
    column: str
    dim: str
    step: str
