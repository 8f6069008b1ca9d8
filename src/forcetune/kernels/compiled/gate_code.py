"""The loops of a gate: its value, its gradients, and the gradients of its derivative along a direction.

With h the even scalars that drive it, y the blocks that it changes, p = h D + b, z = σ(p), q = z U + c:

    value    y + q for shifts, y φ(q) for gains.
    pull     of Σ g out: ē = g for shifts, φ′(q) Σ_m g y for gains; p̄ = σ′(p) (ē Uᵀ); then p̄ Dᵀ by h, g φ by y.
    moved    the same for Σ g (∂ out along (h_h, h_y)), and that derivative itself, which is the gradient by g.

A layer with constant weights has first derivatives only: ``layer_value`` leaves σ′(p) and φ(q) in the places of p and
q, so that ``layer_pull`` computes no exponentials, and where φ is one ē = Σ_m g out, so that no y are saved.

Tiles of atoms go through all of it while they are in the cache. Matrices lie padded with zeros to whole vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from forcetune.kernels.compiled.assembly import Target
from forcetune.kernels.compiled.gate_loops import ChannelPlaces, EntryCode, GateLoops, write_product
from forcetune.kernels.compiled.gate_tables import TILE, Blocks, Entry, Form, Layer, Slot


def module_text(form: Form, target: Target) -> str:
    """``value``, ``pull`` and ``moved`` of a form; ``layer_value`` and ``layer_pull`` with the layer's own products."""
    routines = [write_product(target), _Value(form, target).routine, _Pull(form, target).routine]
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


class _Value(GateLoops):
    name = "value"

    def _prepare(self) -> None:
        w = self.w
        self.matrices = self._forward_matrices()
        self.hidden = self._rows(self.r)
        self.plain_hidden = self._rows(self.r)
        self.driver = w.address(Slot.DRIVER)
        self.before, self.changes = w.address(Slot.BEFORE), w.address(Slot.CHANGES)
        if self.whole_layer:
            self.bias, self.up_bias = self._constant(Layer.DOWN_BIAS), self._constant(Layer.UP_BIAS)
            return
        self.bias = self._zeroed(self.r)
        self._copied(self.down_bias, self.rank, "1", self.bias, self.r)
        self.up_bias = self._zeroed(self.c)

        def entry(e: EntryCode) -> None:
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
        p = self.plain_hidden if self.whole_layer else before
        w.call(
            "product",
            *(f"ptr {self.bias}", 0, f"ptr {driver}", self.n_in, 1, count),
            *(f"ptr {down}", self.r, 1, self.n_in, self.r, f"ptr {p}", self.r),
        )

        def activate(place: str) -> None:
            hidden, *slope = self._activated(w.load(p, place), int(self.whole_layer))
            w.store(hidden, self.hidden, place)
            if self.whole_layer:
                w.store(slope[0], before, place)

        self._each(w.times(count, self.r), activate)
        w.call(
            "product",
            *(f"ptr {self.up_bias}", 0, f"ptr {self.hidden}", self.r, 1, count),
            *(f"ptr {up}", self.c, 1, self.rank, self.c, f"ptr {changes}", self.c),
        )

        def entry(e: EntryCode) -> None:
            y, out = e.block(Blocks.Y), e.block(Blocks.OUTER)

            def shift(places: ChannelPlaces, mask: str | None) -> None:
                q = w.load(changes, w.plus(w.times(places.row, self.c), places.column))
                w.write(w.add(w.read(y, places.block, mask), q), out, places.block, mask)

            def gain(places: ChannelPlaces, mask: str | None) -> None:
                column = w.plus(w.times(places.row, self.c), places.column)
                (factor,) = self._gains(w.load(changes, column), 0)
                if self.whole_layer:
                    w.store(factor, changes, column)

                def component(m: str) -> None:
                    place = w.plus(places.block, w.times(m, places.step))
                    w.write(w.multiply(w.read(y, place, mask), factor), out, place, mask)

                self._each_row(places.dim, component)

            self._per_channel(e, a, count, False, shift)
            self._per_channel(e, a, count, True, gain)

        self._each_entry(entry)


class _Backward(GateLoops):
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

        def entry(e: EntryCode) -> None:
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

        def entry(e: EntryCode) -> None:
            columns = w.offset(by_changes, e.integer(Entry.PLACE))
            channels, target = e.integer(Entry.CHANNELS), e.bias(Slot.TO_DOWN)
            self._added_sums(self.ones, columns, self.c, count, channels, target)

        self._each_entry(entry)
        self._added_sums(self.ones, by_before, self.r, count, self.rank, self.to_down_bias)

    def _over_components(
        self, places: ChannelPlaces, carried: int, body: Callable[[str, list[str]], list[str]]
    ) -> list[str]:
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
            if self.whole_layer:
                rise = w.load(before, place)
            else:
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

    def _entry(self, e: EntryCode, a: str, count: str, changes: str) -> None:
        w = self.w
        g, y, to_y = (e.block(kind) for kind in (Blocks.OUTER, Blocks.Y, Blocks.TO_Y))

        def shift(places: ChannelPlaces, mask: str | None) -> None:
            place = w.plus(w.times(places.row, self.c), places.column)
            w.store(w.read(g, places.block, mask), self.by_changes, place)

        # what the products of a layer go on with is that of a tile
        skipped = w.times(a, w.times(e.integer(Entry.DIM), e.integer(Entry.CHANNELS))) if self.whole_layer else "0"

        def gain(places: ChannelPlaces, mask: str | None) -> None:
            column = w.plus(w.times(places.row, self.c), places.column)
            change = w.load(changes, column)
            factor, slope = (change, None) if self.whole_layer else self._gains(change, 1)

            def component(place: str, sums: list[str]) -> list[str]:
                pulled = w.read(g, place, mask)
                w.write(w.multiply(pulled, factor), to_y, w.minus(place, skipped), mask)
                return [w.multiply_add(pulled, w.read(y, place, mask), sums[0])]

            (total,) = self._over_components(places, 1, component)
            w.store(total if slope is None else w.multiply(total, slope), self.by_changes, column)
            if self.whole_layer and self.form.by_result:
                self._correct_tangent(total, factor, column)

        self._per_channel(e, a, count, False, shift)
        self._per_channel(e, a, count, True, gain)

    def _correct_tangent(self, total: str, factor: str, column: str) -> None:
        """φ′ / φ times Σ_m g out, where the exponential goes on as its tangent; else it is 1."""
        w = self.w
        largest = w.constant(math.exp(self.form.largest_exponent))
        beyond = w.value(f"fcmp ogt {w.vector} {factor}, {largest}")

        def correct() -> None:
            ratio = w.value(f"fdiv {w.vector} {largest}, {factor}")
            w.store(w.multiply(total, w.choose(beyond, ratio, w.constant(1))), self.by_changes, column)

        bits = w.value(f"bitcast <{self.lanes} x i1> {beyond} to i{self.lanes}")
        w.if_not_zero(w.value(f"zext i{self.lanes} {bits} to i64"), correct)


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

    def _entry(self, e: EntryCode, a: str, count: str, changes: str) -> None:
        w = self.w
        kinds = (Blocks.OUTER, Blocks.Y, Blocks.MOVED_Y, Blocks.TO_OUTER, Blocks.TO_Y)
        g, y, moved_y, out, to_y = (e.block(kind) for kind in kinds)

        def shift(places: ChannelPlaces, mask: str | None) -> None:
            column = w.plus(w.times(places.row, self.c), places.column)
            w.write(w.load(self.moved_changes, column), out, places.block, mask)
            w.store(w.zero, self.by_changes, column)
            w.store(w.read(g, places.block, mask), self.by_moved_changes, column)

        def gain(places: ChannelPlaces, mask: str | None) -> None:
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
