"""The convolution's loops, written for the shape of each path.

``gather`` sums at receivers: out[i, k, c] = Σ_{e → i} Σ_m T[e, m, k] R[e, c] x[j, m, c]. ``pull`` has, pair by pair,
the gradients of Σ g out by R, T and x. Both have a ``moved`` form, the derivative of the plain one when R, T and x move
along directions h_R, h_T and h_x: the sum of the plain form with each of them in turn in the place of its own.
Both forms have a ``splined`` variant, in which R is not read but computed from the distance of a pair: the sum of
some neighbouring rows of a table, each times its weight. The plain ``pull`` then has the gradient by the distance, not
by R; in the moved form the distance has a direction, which R follows by its slope, and there is no gradient by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forcetune.kernels.compiled.assembly import Target, Writer
from forcetune.kernels.compiled.convolution_form import SLOTS, Form, Shape, Slot

AHEAD = 6
"""How many edges ahead memory is asked for; pairs of a receiver lie apart from one another."""

TOGETHER = 4
"""Receivers or pairs of which all paths are computed before the following ones: their radial weights lie side by side.
Splines, whose tables are read again for every pair, are computed path by path instead."""


def write(shape: Shape, target: Target) -> Writer:
    """The function of a shape."""
    writer = Writer(shape.name, target.dividing(shape.channels))
    (_Gather if shape.wanted is None else _Pull)(writer, shape).write()
    return writer


def driver(together: int = 1 << 40) -> str:
    """``run``: calls the functions of all tables for a range; tables lie one after another, their number first.

    Args:
        together: receivers or pairs of which all paths are computed before the following ones.
    """
    return f"""
define void @run(ptr noalias %tables, i64 %first, i64 %last) nounwind {{
entry:
  %count = load i64, ptr %tables, align 8
  %start = getelementptr i64, ptr %tables, i64 1
  br label %range
range:
  %from = phi i64 [ %first, %entry ], [ %to, %head ]
  %left = icmp slt i64 %from, %last
  br i1 %left, label %few, label %end
few:
  %far = add i64 %from, {together}
  %over = icmp sgt i64 %far, %last
  %to = select i1 %over, i64 %last, i64 %far
  br label %head
head:
  %n = phi i64 [ 0, %few ], [ %next, %body ]
  %table = phi ptr [ %start, %few ], [ %following, %body ]
  %inside = icmp slt i64 %n, %count
  br i1 %inside, label %body, label %range
body:
  %place = load i64, ptr %table, align 8
  %function = inttoptr i64 %place to ptr
  call void %function(ptr %table, i64 %from, i64 %to)
  %next = add i64 %n, 1
  %following = getelementptr i64, ptr %table, i64 {SLOTS}
  br label %head
end:
  ret void
}}
"""


class _Gather(Form):
    def write(self) -> None:
        w, shape = self.w, self.shape
        starts, edges = w.address(Slot.STARTS), w.address(Slot.EDGES)
        names = (Slot.RADIAL, Slot.ANGULAR, Slot.FEATURES, Slot.OUTER)
        radial, angular, features, outer = (w.address(name) for name in names)
        radial_stride, angular_stride = w.argument(Slot.RADIAL_STRIDE), w.argument(Slot.ANGULAR_STRIDE)
        outer_stride, outer_width = w.argument(Slot.OUTER_STRIDE), w.argument(Slot.OUTER_WIDTH)
        moved = [w.address(name) for name in (Slot.MOVED_RADIAL, Slot.MOVED_ANGULAR, Slot.MOVED_FEATURES)]
        count = self.blocks(shape.dim_out + 2)
        size = shape.dim_in * shape.channels

        def receiver(i: str, _: list[str]) -> list[str]:
            first, last = w.integer(starts, i), w.integer(starts, w.plus(i, 1))
            out = w.offset(outer, w.times(i, outer_stride))

            def block(c: str, _: list[str]) -> list[str]:
                end = w.plus(last, -1)

                def edge(e: str, sums: list[str]) -> list[str]:
                    row = w.times(e, 3)
                    later = w.integer(edges, w.times(w.least(w.plus(e, AHEAD), end), 3))
                    for table in (angular, *([moved[1]] if self.moved_angular else [])):
                        w.prefetch(table, w.times(later, angular_stride), shape.dim_in * shape.dim_out)
                    if not shape.splined:
                        later_place = w.plus(w.times(later, radial_stride), c)
                        for table in (radial, *([moved[0]] if self.moved_radial else [])):
                            w.prefetch(table, later_place, count * self.lanes)
                    pair, sender = w.integer(edges, row), w.integer(edges, w.plus(row, 1))
                    r_place = w.plus(w.times(pair, radial_stride), c)
                    x_place = w.plus(w.times(sender, size), c)
                    if shape.splined:
                        r = self.interpolated(Slot.WEIGHTS, pair, w.offset(radial, c), count)
                    else:
                        r = self.vectors(w.offset(radial, r_place), count)
                    if self.moved_radial and shape.splined:
                        hr = self.moved_along(pair, w.offset(radial, c), moved[0], count)
                    else:
                        hr = self.vectors(w.offset(moved[0], r_place), count) if self.moved_radial else []
                    if shape.odd:
                        sign = w.spread(w.number_from(w.integer(edges, w.plus(row, 2))))
                        r, hr = [w.multiply(v, sign) for v in r], [w.multiply(v, sign) for v in hr]
                    t_place = w.times(pair, angular_stride)
                    t, ht = w.offset(angular, t_place), w.offset(moved[1], t_place)
                    x, hx = w.offset(features, x_place), w.offset(moved[2], x_place)
                    for m in range(shape.dim_in):
                        by_t, by_ht = self.products(r, hr, x, hx, m, count)
                        for table, values in ((t, by_t), (ht, by_ht)):
                            if values:
                                sums = self._added(sums, table, values, m)
                    return sums

                results = w.loop(first, last, 1, [w.zero] * (shape.dim_out * count), edge)
                for k in range(shape.dim_out):
                    place = w.offset(out, w.plus(w.times(k, outer_width), c))
                    for number in range(count):
                        w.store(results[k * count + number], place, number * self.lanes)
                return []

            w.loop(0, shape.channels, count * self.lanes, [], block)
            return []

        w.loop("%first", "%last", 1, [], receiver)

    def _added(self, sums: list[str], table: str, values: list[str], m: int) -> list[str]:
        w, dim_out = self.w, self.shape.dim_out
        result: list[str] = []
        for k in range(dim_out):
            factor = w.load_spread(table, m * dim_out + k)
            own = sums[k * len(values) : (k + 1) * len(values)]
            result += [w.multiply_add(factor, value, before) for value, before in zip(values, own, strict=True)]
        return result


class _Pull(Form):
    def write(self) -> None:
        w, shape = self.w, self.shape
        assert shape.wanted is not None
        directions, senders, receivers = (w.address(s) for s in (Slot.DIRECTIONS, Slot.SENDER, Slot.RECEIVER))
        self.radial_stride, self.angular_stride = w.argument(Slot.RADIAL_STRIDE), w.argument(Slot.ANGULAR_STRIDE)
        self.outer_stride, self.outer_width = w.argument(Slot.OUTER_STRIDE), w.argument(Slot.OUTER_WIDTH)
        base = {
            slot: w.address(slot)
            for slot in (
                *(Slot.RADIAL, Slot.ANGULAR, Slot.FEATURES, Slot.OUTER),
                *(Slot.MOVED_RADIAL, Slot.MOVED_ANGULAR, Slot.MOVED_FEATURES),
                *(Slot.TO_RADIAL, Slot.TO_ANGULAR, Slot.TO_FEATURES),
            )
        }

        scratch = w.scratch(shape.channels) if shape.splined else ""
        moved_scratch = w.scratch(shape.channels) if shape.splined and self.moved_radial else ""
        table, moved = base[Slot.RADIAL], base[Slot.MOVED_RADIAL]

        def pair(a: str, _: list[str]) -> list[str]:
            count, i, j = w.integer(directions, a), w.integer(receivers, a), w.integer(senders, a)
            radial, angular = w.times(a, self.radial_stride), w.times(a, self.angular_stride)
            self._ask_for_next(base, a)
            here = dict(base)
            for slot in (Slot.RADIAL, Slot.MOVED_RADIAL, Slot.TO_RADIAL):
                here[slot] = w.offset(base[slot], radial)
            for slot in (Slot.ANGULAR, Slot.MOVED_ANGULAR, Slot.TO_ANGULAR):
                here[slot] = w.offset(base[slot], angular)
            if shape.splined:
                here[Slot.RADIAL] = scratch
                self._write_radial(lambda c, n: self.interpolated(Slot.WEIGHTS, a, w.offset(table, c), n), scratch)
            if moved_scratch:
                here[Slot.MOVED_RADIAL] = moved_scratch
                self._write_radial(lambda c, n: self.moved_along(a, w.offset(table, c), moved, n), moved_scratch)
            if shape.wanted is not None and (shape.wanted[0] or shape.wanted[2]):
                self._channelwise(here, count, i, j, a, table)
            if shape.wanted is not None and shape.wanted[1]:
                self._summed(here, count, i, j)
            return []

        w.loop("%first", "%last", 1, [], pair)

    def _ask_for_next(self, base: dict[Slot, str], a: str) -> None:
        """Have what the following pair reads at hand; its rows lie far behind those of this one."""
        w, shape = self.w, self.shape
        following = w.plus(a, 1)
        angular, radial = w.times(following, self.angular_stride), w.times(following, self.radial_stride)
        for slot in (Slot.ANGULAR, *([Slot.MOVED_ANGULAR] if self.moved_angular else [])):
            w.prefetch(base[slot], angular, shape.dim_in * shape.dim_out)
        if not shape.splined:
            for slot in (Slot.RADIAL, *([Slot.MOVED_RADIAL] if self.moved_radial else [])):
                w.prefetch(base[slot], radial, shape.channels)

    def _ends(self, here: dict[Slot, str], d: str, i: str, j: str) -> tuple[dict[Slot, str], str | None]:
        """Addresses at the sender and the receiver in a direction, and the sign of T there."""
        w, size = self.w, self.shape.dim_in * self.shape.channels
        back = w.value(f"icmp ne i64 {d}, 0")
        receiver = w.value(f"select i1 {back}, i64 {j}, i64 {i}")
        sender = w.value(f"select i1 {back}, i64 {i}, i64 {j}")
        place = w.times(sender, size)
        addresses = {
            slot: w.offset(here[slot], place) for slot in (Slot.FEATURES, Slot.MOVED_FEATURES, Slot.TO_FEATURES)
        }
        addresses[Slot.OUTER] = w.offset(here[Slot.OUTER], w.times(receiver, self.outer_stride))
        if not self.shape.odd:
            return addresses, None
        real = w.target.real
        return addresses, w.spread(w.value(f"select i1 {back}, {real} -1.0, {real} 1.0"))

    def _write_radial(self, values_from: Callable[[str, int], list[str]], scratch: str) -> None:
        """R of all channels of a pair, or its direction, from what gives so many vectors from a channel on."""
        w = self.w
        count = self.blocks(2)

        def block(c: str, _: list[str]) -> list[str]:
            for number, value in enumerate(values_from(c, count)):
                w.store(value, w.offset(scratch, c), number * self.lanes)
            return []

        w.loop(0, self.shape.channels, count * self.lanes, [], block)

    def _channelwise(self, here: dict[Slot, str], directions: str, i: str, j: str, pair: str, table: str) -> None:
        """Gradients by R (or the distance) and x."""
        w, shape = self.w, self.shape
        assert shape.wanted is not None
        to_radial, _, to_features = shape.wanted
        to_length = to_radial and shape.splined
        count = self.blocks(shape.dim_out + 4)

        def block(c: str, totals: list[str]) -> list[str]:
            r = self.vectors(w.offset(here[Slot.RADIAL], c), count)
            hr = self.vectors(w.offset(here[Slot.MOVED_RADIAL], c), count) if self.moved_radial else []

            def direction(d: str, sums: list[str]) -> list[str]:
                ends, sign = self._ends(here, d, i, j)
                outer = w.offset(ends[Slot.OUTER], c)
                g: list[list[str]] = []
                for k in range(shape.dim_out):
                    row = self.vectors(w.offset(outer, w.times(k, self.outer_width)), count)
                    g.append(row if sign is None else [w.multiply(v, sign) for v in row])
                x, hx, gx = (w.offset(ends[slot], c) for slot in (Slot.FEATURES, Slot.MOVED_FEATURES, Slot.TO_FEATURES))
                for m in range(shape.dim_in):
                    place = m * shape.channels
                    plain = self.shape.moved is None or self.moved_radial or self.moved_features
                    pulled = self._pulled(here[Slot.ANGULAR], g, m) if plain else None
                    turned = self._pulled(here[Slot.MOVED_ANGULAR], g, m) if self.moved_angular else None
                    if to_features:
                        factors = [(pulled, r)] if shape.moved is None else []
                        factors += [(pulled, hr)] if self.moved_radial else []
                        factors += [(turned, r)] if self.moved_angular else []
                        if factors:
                            self._add_at(w.offset(gx, place), factors, count)
                    if to_radial:
                        pairs = [(pulled, x)] if shape.moved is None else []
                        pairs += [(pulled, hx)] if self.moved_features else []
                        pairs += [(turned, x)] if self.moved_angular else []
                        for values, features in pairs:
                            assert values is not None
                            rows = self.vectors(w.offset(features, place), count)
                            sums = [w.multiply_add(v, f, s) for v, f, s in zip(values, rows, sums, strict=True)]
                return sums

            sums = w.loop(0, directions, 1, [w.zero] * (count if to_radial else 0), direction)
            if to_length:
                slopes = self.interpolated(Slot.SLOPES, pair, w.offset(table, c), count)
                for value, slope in zip(sums, slopes, strict=True):
                    totals = [w.multiply_add(value, slope, totals[0])]
            elif to_radial:
                place = w.offset(here[Slot.TO_RADIAL], c)
                for number, value in enumerate(sums):
                    w.store(value, place, number * self.lanes)
            return totals

        totals = w.loop(0, shape.channels, count * self.lanes, [w.zero] * to_length, block)
        if to_length:
            w.store_sums(totals, w.offset(self.spline[Slot.TO_LENGTHS], pair))

    def _pulled(self, table: str, g: list[list[str]], m: int) -> list[str]:
        """Σ_k T[m, k] g[k]."""
        w, dim_out = self.w, self.shape.dim_out
        sums: list[str | None] = [None] * len(g[0])
        for k, row in enumerate(g):
            factor = w.load_spread(table, m * dim_out + k)
            sums = [w.multiply_add(factor, v, before) for v, before in zip(row, sums, strict=True)]
        return [value for value in sums if value is not None]

    def _add_at(self, pointer: str, factors: Sequence[tuple[list[str] | None, Sequence[str]]], count: int) -> None:
        w = self.w
        values = self.vectors(pointer, count)
        for left, right in factors:
            assert left is not None
            values = [w.multiply_add(a, b, v) for a, b, v in zip(left, right, values, strict=True)]
        for number, value in enumerate(values):
            w.store(value, pointer, number * self.lanes)

    def _summed(self, here: dict[Slot, str], directions: str, i: str, j: str) -> None:
        """Gradient by T, a sum over the channels; of the moved form the part that has no h_T."""
        w, shape = self.w, self.shape
        together = max(1, (self.w.target.registers - 8) // shape.dim_out)
        for start in range(0, shape.dim_in, together):
            rows = range(start, min(start + together, shape.dim_in))
            sums = self._write_sums(here, directions, i, j, rows)
            w.store_sums(sums, w.offset(here[Slot.TO_ANGULAR], start * shape.dim_out))

    def _write_sums(self, here: dict[Slot, str], directions: str, i: str, j: str, rows: range) -> list[str]:
        w, shape = self.w, self.shape

        def direction(d: str, sums: list[str]) -> list[str]:
            ends, sign = self._ends(here, d, i, j)

            def block(c: str, sums: list[str]) -> list[str]:
                r = self.vectors(w.offset(here[Slot.RADIAL], c), 1)
                hr = self.vectors(w.offset(here[Slot.MOVED_RADIAL], c), 1) if self.moved_radial else []
                if sign is not None:
                    r, hr = [w.multiply(v, sign) for v in r], [w.multiply(v, sign) for v in hr]
                x, hx = w.offset(ends[Slot.FEATURES], c), w.offset(ends[Slot.MOVED_FEATURES], c)
                outer = w.offset(ends[Slot.OUTER], c)
                g = [w.load(outer, w.times(k, self.outer_width)) for k in range(shape.dim_out)]
                result: list[str] = []
                for number, m in enumerate(rows):
                    values, _ = self.products(r, hr, x, hx, m, 1)
                    own = sums[number * shape.dim_out : (number + 1) * shape.dim_out]
                    result += [w.multiply_add(values[0], v, s) if values else s for v, s in zip(g, own, strict=True)]
                return result

            return w.loop(0, shape.channels, self.lanes, sums, block)

        return w.loop(0, directions, 1, [w.zero] * (len(rows) * shape.dim_out), direction)
