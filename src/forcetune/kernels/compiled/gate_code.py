"""The loops of a gate: its value, its gradients, and the gradients of its derivative along a direction.

With h the even scalars that drive it, y the blocks that it changes, p = h D + b, z = σ(p), q = z U + c:

    value    y + q for shifts, y φ(q) for gains.
    pull     of Σ g out: ē = g for shifts, φ′(q) Σ_m g y for gains; p̄ = σ′(p) (ē Uᵀ); then p̄ Dᵀ by h, g φ by y.
    moved    the same for Σ g (∂ out along (h_h, h_y)), and that derivative itself, which is the gradient by g.

Tiles of atoms go through all of it while they are in the cache. Matrices lie padded with zeros to whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from forcetune.kernels.compiled.assembly import Target
from forcetune.kernels.compiled.routine import Routine

TILE = 16
"""Atoms that go through all steps together."""

PANEL = 2
"""Vectors of columns that a matrix product has in registers."""


class Slot(IntEnum):
    """Places in the table of a call; strides and sizes count numbers. Behind them stand addresses of blocks."""

    ENTRIES = 0  # blocks that are changed
    N_IN = 1
    RANK = 2
    COLUMNS = 3  # of all entries, each padded to whole vectors
    INPUT_PADDED = 4
    RANK_PADDED = 5
    COLUMNS_PADDED = 6
    ENTRY_TABLE = 7
    SCRATCH = 8
    DRIVER = 9  # h, (atoms, n_in)
    BEFORE = 10  # p, (atoms, rank padded)
    CHANGES = 11  # q, (atoms, columns padded)
    DOWN = 12  # (rank, n_in); bias, shift, bias, gain, bias follow
    TO_DOWN = 18  # 0 where no gradients by weights are wanted; the other five follow
    TO_DRIVER = 24  # 0 where it is not wanted
    MOVED_DRIVER = 25
    LAYER = 26  # of the functions for whole layers
    ZEROS = 27  # for them
    BLOCKS = 28  # first address of the first kind


class Blocks(IntEnum):
    """Kinds of blocks, (atoms, dim, channels) each; a call has the first ones."""

    Y = 0
    OUTER = 1  # what ``value`` writes, and the g that the others read
    TO_Y = 2
    TO_OUTER = 3
    MOVED_Y = 4


class Entry(IntEnum):
    """Places in the table of an entry, which is the same for all calls."""

    IS_GAIN = 0
    DIM = 1
    CHANNELS = 2
    PLACE = 3  # first column
    FIRST = 4  # first row of the weights of its kind, which are (rows, rank)


ENTRY_SLOTS = max(Entry) + 1


class Layer(IntEnum):
    """Places in the table of a layer with constant weights; rows of its products follow."""

    PRODUCTS = 0
    DOWN = 1  # D, (n_in, rank padded)
    UP = 2  # U, (rank, columns padded)
    DOWN_BACK = 3  # Dᵀ, (rank, n_in padded)
    UP_BACK = 4  # Uᵀ, (columns, rank padded)
    DOWN_BIAS = 5
    UP_BIAS = 6
    ROWS = 7


class Product(IntEnum):
    """Places in the row of a product y = x w; matrices lie panel by panel of columns.

    Behind the addresses of a call's blocks stand, for each product, those of x and y, or of the gradients by y and x.
    """

    DIM = 0
    FAN_IN = 1
    FAN_OUT = 2
    MATRIX = 3
    TRANSPOSED = 4
    ADDS = 5  # whether its gradient by x is added to what is there


PRODUCT_SLOTS = max(Product) + 1


@dataclass(frozen=True, slots=True)
class Form:
    """What functions are written for.

    Attributes:
        activation: whether σ is a SiLU or the identity.
        gain: φ(x), ``exp`` or ``linear`` (1 + x).
        largest_exponent: beyond which ``exp`` goes on as its tangent.
    """

    activation: bool
    gain: str
    largest_exponent: float

    @property
    def name(self) -> str:
        return f"gate_{int(self.activation)}_{self.gain}_{self.largest_exponent!r}"


def padded(count: int, lanes: int) -> int:
    return -(-count // lanes) * lanes


def scratch_size(n_in: int, rank: int, columns: int, lanes: int) -> int:
    """Numbers of scratch memory for one thread."""
    wide = PANEL * lanes
    n, r, c = padded(n_in, wide), padded(rank, wide), padded(columns, wide)
    matrices = n_in * r + rank * c + rank * n + columns * r
    tiles = TILE * (2 * n + 7 * r + 3 * c + 1)
    # a product may read a panel beyond the last column
    return matrices + tiles + n + 2 * r + 2 * c + 2 * wide


def module_text(form: Form, target: Target) -> str:
    """``value``, ``pull`` and ``moved`` of a form; ``layer_value`` and ``layer_pull`` with the layer's own products."""
    routines = [_product(target), _Value(form, target).routine, _Pull(form, target).routine]
    routines.append(_Moved(form, target).routine)
    routines += [kind(form, target, whole_layer=True).routine for kind in (_Value, _Pull)]
    v, lanes = f"<{target.lanes} x {target.real}>", target.lanes
    kind = routines[0].kind
    return "".join(
        [
            f"declare {v} @llvm.fmuladd.{kind}({v}, {v}, {v})\n",
            f"declare {v} @llvm.masked.load.{kind}.p0(ptr, i32, <{lanes} x i1>, {v})\n",
            f"declare void @llvm.masked.store.{kind}.p0({v}, ptr, i32, <{lanes} x i1>)\n",
            *(routine.text() for routine in routines),
        ]
    )


def _product(target: Target) -> Routine:
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


class _Entry:
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


class _Gate:
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

    def _each_entry(self, body: Callable[[_Entry], object]) -> None:
        w, table = self.w, self.entry_table
        self._each_row(
            self.entries,
            lambda e: body(_Entry(w, e, w.value(f"getelementptr i64, ptr {table}, i64 {w.times(e, ENTRY_SLOTS)}"))),
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
        own_g, own_x = w.offset(g, w.times(before, fan_out)), w.offset(to_x, w.times(before, fan_in))
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

        def entry(e: _Entry) -> None:
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

        def entry(e: _Entry) -> None:
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
        capped = w.least(q, self.form.largest_exponent)
        slope = w.exponential(capped)
        results = [w.multiply_add(slope, w.subtract(q, capped), slope)]
        if derivatives:
            results.append(slope)
        if derivatives > 1:
            beyond = w.value(f"fcmp ogt {w.vector} {q}, {w.constant(self.form.largest_exponent)}")
            results.append(w.choose(beyond, w.zero, slope))
        return results

    def _per_channel(
        self, e: _Entry, a: str, count: str, is_gain: bool, body: Callable[[_Places, str | None], object]
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
                body(_Places(i, w.plus(block, c), w.plus(column, c), dim, channels), masks[0])

            w.columns(channels, 1, vectors)

        self._each_row(w.times(count, wanted), row)


@dataclass(frozen=True, slots=True)
class _Places:
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


class _Value(_Gate):
    name = "value"

    def _prepare(self) -> None:
        w = self.w
        self.matrices = self._forward_matrices()
        self.hidden = self._rows(self.r)
        self.driver = w.address(Slot.DRIVER)
        self.before, self.changes = w.address(Slot.BEFORE), w.address(Slot.CHANGES)
        if self.whole_layer:
            self.bias, self.up_bias = self._constant(Layer.DOWN_BIAS), self._constant(Layer.UP_BIAS)
            return
        self.bias = self._zeroed(self.r)
        self._copied(self.down_bias, self.rank, "1", self.bias, self.r)
        self.up_bias = self._zeroed(self.c)

        def entry(e: _Entry) -> None:
            target = w.offset(self.up_bias, e.integer(Entry.PLACE))

            def part(c: str, masks: Sequence[str | None]) -> None:
                w.write(w.read(e.bias(Slot.DOWN), c, masks[0]), target, c, masks[0])

            w.columns(e.integer(Entry.CHANNELS), 1, part)

        self._each_entry(entry)

    def _tile(self, a: str, count: str) -> None:
        w, (down, up) = self.w, self.matrices
        if self.whole_layer:
            self._each_product(lambda row, x, y: self._layer_product(row, x, y, a, count), kinds=2)
        before = w.offset(self.before, w.times(a, self.r))
        changes = w.offset(self.changes, w.times(a, self.c))
        driver = w.offset(self.driver, w.times(a, self.n_in))
        w.call(
            "product",
            *(f"ptr {self.bias}", 0, f"ptr {driver}", self.n_in, 1, count),
            *(f"ptr {down}", self.r, 1, self.n_in, self.r, f"ptr {before}", self.r),
        )

        def activate(place: str) -> None:
            w.store(self._activated(w.load(before, place), 0)[0], self.hidden, place)

        self._each(w.times(count, self.r), activate)
        w.call(
            "product",
            *(f"ptr {self.up_bias}", 0, f"ptr {self.hidden}", self.r, 1, count),
            *(f"ptr {up}", self.c, 1, self.rank, self.c, f"ptr {changes}", self.c),
        )

        def entry(e: _Entry) -> None:
            y, out = e.block(Blocks.Y), e.block(Blocks.OUTER)

            def shift(places: _Places, mask: str | None) -> None:
                q = w.load(changes, w.plus(w.times(places.row, self.c), places.column))
                w.write(w.add(w.read(y, places.block, mask), q), out, places.block, mask)

            def gain(places: _Places, mask: str | None) -> None:
                q = w.load(changes, w.plus(w.times(places.row, self.c), places.column))
                (factor,) = self._gains(q, 0)

                def component(m: str) -> None:
                    place = w.plus(places.block, w.times(m, places.step))
                    w.write(w.multiply(w.read(y, place, mask), factor), out, place, mask)

                self._each_row(places.dim, component)

            self._per_channel(e, a, count, False, shift)
            self._per_channel(e, a, count, True, gain)

        self._each_entry(entry)


class _Backward(_Gate):
    """What both gradients have in common."""

    def _prepare(self) -> None:
        w = self.w
        self.down_back, self.up_back = self._backward_matrices()
        self.by_changes = self._rows(self.c)
        self.hidden, self.by_hidden, self.by_before = (self._rows(self.r) for _ in range(3))
        self.wide = self._zeroed(w.times(self.n, TILE))
        self.ones = self._ones()
        self.driver, self.to_driver = w.address(Slot.DRIVER), w.address(Slot.TO_DRIVER)
        self.to_down, self.to_down_bias = w.address(Slot.TO_DOWN), w.address(Slot.TO_DOWN + 1)
        self.before, self.changes = w.address(Slot.BEFORE), w.address(Slot.CHANGES)

    def _finish_driver(self, a: str, count: str) -> None:
        """p̄ Dᵀ where it is wanted."""
        w = self.w

        def product() -> None:
            target = w.offset(self.to_driver, w.times(a, self.n_in))
            self._product(
                *(self.by_before, self.r, count, self.down_back, self.n, self.rank, self.n_in, target, self.n_in)
            )

        w.if_not_zero(w.argument(Slot.TO_DRIVER), product)

    def _finish_weights(self, count: str, driver: str, hidden: str, by_changes: str, by_before: str) -> None:
        """Add ēᵀ z to the gradient of the weights of every entry, and p̄ᵀ h to that of W↓."""
        w = self.w

        def entry(e: _Entry) -> None:
            columns = w.offset(by_changes, e.integer(Entry.PLACE))
            self._added_outer(
                *(columns, self.c, e.integer(Entry.CHANNELS), hidden, self.r, count, self.rank),
                e.weight(Slot.TO_DOWN),
            )

        self._each_entry(entry)
        self._copied(driver, self.n_in, count, self.wide, self.n)
        self._added_outer(by_before, self.r, self.rank, self.wide, self.n, count, self.n_in, self.to_down)

    def _finish_biases(self, count: str, by_changes: str, by_before: str) -> None:
        w = self.w

        def entry(e: _Entry) -> None:
            columns = w.offset(by_changes, e.integer(Entry.PLACE))
            channels, target = e.integer(Entry.CHANNELS), e.bias(Slot.TO_DOWN)
            self._added_sums(self.ones, columns, self.c, count, channels, target)

        self._each_entry(entry)
        self._added_sums(self.ones, by_before, self.r, count, self.rank, self.to_down_bias)

    def _over_components(self, places: _Places, carried: int, body: Callable[[str, list[str]], list[str]]) -> list[str]:
        """A loop over the components of a block that sums vectors up; the body has the place in the block's tensor."""
        w = self.w
        return w.loop(
            0,
            places.dim,
            1,
            [w.zero] * carried,
            lambda m, sums: body(w.plus(places.block, w.times(m, places.step)), sums),
        )


class _Pull(_Backward):
    name = "pull"

    def _tile(self, a: str, count: str) -> None:
        w = self.w
        before = w.offset(self.before, w.times(a, self.r))
        changes = w.offset(self.changes, w.times(a, self.c))
        self._each_entry(lambda e: self._entry(e, a, count, changes))
        self._product(
            *(self.by_changes, self.c, count, self.up_back, self.r, self.n_columns, self.r, self.by_hidden, self.r)
        )

        def slope(place: str) -> None:
            hidden, rise = self._activated(w.load(before, place), 1)
            w.store(hidden, self.hidden, place)
            w.store(w.multiply(w.load(self.by_hidden, place), rise), self.by_before, place)

        self._each(w.times(count, self.r), slope)
        self._finish_driver(a, count)

        def weights() -> None:
            driver = w.offset(self.driver, w.times(a, self.n_in))
            self._finish_weights(count, driver, self.hidden, self.by_changes, self.by_before)
            self._finish_biases(count, self.by_changes, self.by_before)

        if self.whole_layer:
            self._each_product(lambda row, g, to_x: self._layer_gradient(row, g, to_x, a, count), kinds=3)
        else:
            w.if_not_zero(w.argument(Slot.TO_DOWN), weights)

    def _entry(self, e: _Entry, a: str, count: str, changes: str) -> None:
        w = self.w
        g, y, to_y = (e.block(kind) for kind in (Blocks.OUTER, Blocks.Y, Blocks.TO_Y))

        def shift(places: _Places, mask: str | None) -> None:
            place = w.plus(w.times(places.row, self.c), places.column)
            w.store(w.read(g, places.block, mask), self.by_changes, place)

        def gain(places: _Places, mask: str | None) -> None:
            column = w.plus(w.times(places.row, self.c), places.column)
            factor, slope = self._gains(w.load(changes, column), 1)

            def component(place: str, sums: list[str]) -> list[str]:
                pulled = w.read(g, place, mask)
                w.write(w.multiply(pulled, factor), to_y, place, mask)
                return [w.multiply_add(pulled, w.read(y, place, mask), sums[0])]

            (total,) = self._over_components(places, 1, component)
            w.store(w.multiply(total, slope), self.by_changes, column)

        self._per_channel(e, a, count, False, shift)
        self._per_channel(e, a, count, True, gain)


class _Moved(_Backward):
    name = "moved"

    def _prepare(self) -> None:
        super()._prepare()
        w = self.w
        self.down_matrix, self.up_matrix = self._forward_matrices()
        self.moved_changes, self.by_moved_changes = self._rows(self.c), self._rows(self.c)
        # derivatives of p and z along the direction, and the gradients by them
        self.moved_before, self.moved_hidden, self.by_moved = (self._rows(self.r) for _ in range(3))
        self.moved_driver = w.address(Slot.MOVED_DRIVER)

    def _tile(self, a: str, count: str) -> None:
        w = self.w
        before = w.offset(self.before, w.times(a, self.r))
        changes = w.offset(self.changes, w.times(a, self.c))
        driver, moved = (w.offset(p, w.times(a, self.n_in)) for p in (self.driver, self.moved_driver))
        size = w.times(count, self.r)
        self._product(
            *(moved, self.n_in, count, self.down_matrix, self.r, self.n_in, self.r, self.moved_before, self.r)
        )

        def rise(place: str) -> None:
            _, slope = self._activated(w.load(before, place), 1)
            w.store(w.multiply(w.load(self.moved_before, place), slope), self.moved_hidden, place)

        self._each(size, rise)
        self._product(
            *(self.moved_hidden, self.r, count, self.up_matrix, self.c, self.rank, self.c, self.moved_changes, self.c)
        )
        self._each_entry(lambda e: self._entry(e, a, count, changes))
        for values, results in ((self.by_changes, self.by_hidden), (self.by_moved_changes, self.by_moved)):
            self._product(values, self.c, count, self.up_back, self.r, self.n_columns, self.r, results, self.r)

        def back(place: str) -> None:
            hidden, slope, bend = self._activated(w.load(before, place), 2)
            w.store(hidden, self.hidden, place)
            by_moved = w.load(self.by_moved, place)
            bent = w.multiply(w.multiply(bend, by_moved), w.load(self.moved_before, place))
            w.store(w.multiply_add(slope, w.load(self.by_hidden, place), bent), self.by_before, place)
            w.store(w.multiply(slope, by_moved), self.by_moved, place)

        self._each(size, back)
        self._finish_driver(a, count)

        def weights() -> None:
            self._finish_weights(count, driver, self.hidden, self.by_changes, self.by_before)
            self._finish_weights(count, moved, self.moved_hidden, self.by_moved_changes, self.by_moved)
            self._finish_biases(count, self.by_changes, self.by_before)

        w.if_not_zero(w.argument(Slot.TO_DOWN), weights)

    def _entry(self, e: _Entry, a: str, count: str, changes: str) -> None:
        w = self.w
        kinds = (Blocks.OUTER, Blocks.Y, Blocks.MOVED_Y, Blocks.TO_OUTER, Blocks.TO_Y)
        g, y, moved_y, out, to_y = (e.block(kind) for kind in kinds)

        def shift(places: _Places, mask: str | None) -> None:
            column = w.plus(w.times(places.row, self.c), places.column)
            w.write(w.load(self.moved_changes, column), out, places.block, mask)
            w.store(w.zero, self.by_changes, column)
            w.store(w.read(g, places.block, mask), self.by_moved_changes, column)

        def gain(places: _Places, mask: str | None) -> None:
            column = w.plus(w.times(places.row, self.c), places.column)
            factor, slope, bend = self._gains(w.load(changes, column), 2)
            step = w.load(self.moved_changes, column)
            change = w.multiply(slope, step)

            def component(place: str, sums: list[str]) -> list[str]:
                pulled, plain, moved = (w.read(p, place, mask) for p in (g, y, moved_y))
                w.write(w.multiply_add(moved, factor, w.multiply(plain, change)), out, place, mask)
                w.write(w.multiply(pulled, change), to_y, place, mask)
                return [w.multiply_add(pulled, moved, sums[0]), w.multiply_add(pulled, plain, sums[1])]

            along, total = self._over_components(places, 2, component)
            curved = w.multiply(w.multiply(total, bend), step)
            w.store(w.multiply_add(along, slope, curved), self.by_changes, column)
            w.store(w.multiply(total, slope), self.by_moved_changes, column)

        self._per_channel(e, a, count, False, shift)
        self._per_channel(e, a, count, True, gain)
