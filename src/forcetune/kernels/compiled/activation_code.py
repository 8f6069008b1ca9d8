"""The loops over the hidden numbers of a radial network: SiLU with its slopes, and what its second derivative wants.

Everything goes element by element through arrays of equal size, f being the SiLU times a factor:

    value    f(z) and f′(z), and f″(z) where there is a place for it.
    bend     v f′ + u h f″: the gradient by z of v f(z) + u h f′(z).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from forcetune.kernels.compiled.assembly import Target
from forcetune.kernels.compiled.routine import Routine


class Slot(IntEnum):
    """Places in the table of a call."""

    Z = 0  # value: z, f, f′, f″ or 0, the factor
    F = 1
    SLOPE = 2
    CURVATURE = 3
    FACTOR = 4
    OUT = 0  # bend: the result, v or 0, f′, u, h, f″
    V = 1
    BEND_SLOPE = 2
    U = 3
    H = 4
    BEND_CURVATURE = 5


SLOTS = max(Slot) + 1

_TABLE = "ptr noalias %table, i64 %first, i64 %last"


def module_text(target: Target) -> str:
    """``value`` and ``bend`` of elements from the first to before the last."""
    routines = [_value(target, curved=curved) for curved in (False, True)]
    routines += [_bend(target, both=both) for both in (False, True)]
    v, lanes, kind = f"<{target.lanes} x {target.real}>", target.lanes, routines[0].kind
    return "".join(
        [
            f"declare {v} @llvm.fmuladd.{kind}({v}, {v}, {v})\n",
            f"declare {v} @llvm.masked.load.{kind}.p0(ptr, i32, <{lanes} x i1>, {v})\n",
            f"declare void @llvm.masked.store.{kind}.p0({v}, ptr, i32, <{lanes} x i1>)\n",
            *(routine.text() for routine in routines),
        ]
    )


def _value(target: Target, *, curved: bool) -> Routine:
    w = Routine("value_curved" if curved else "value", target, _TABLE)
    slots = (Slot.Z, Slot.F, Slot.SLOPE, *([Slot.CURVATURE] if curved else []))
    pointers = [w.offset(w.address(slot), "%first") for slot in slots]
    factor = w.load_spread(w.address(Slot.FACTOR))

    def vector(place: str, masks: Sequence[str | None]) -> None:
        z, one = w.read(pointers[0], place, masks[0]), w.constant(1)
        s = w.sigmoid(z)
        rest = w.subtract(one, s)
        scaled = w.multiply(factor, s)
        results = [w.multiply(z, scaled), w.multiply(scaled, w.multiply_add(z, rest, one))]
        if curved:
            inner = w.multiply_add(z, w.subtract(rest, s), w.constant(2))
            results.append(w.multiply(w.multiply(scaled, rest), inner))
        for pointer, result in zip(pointers[1:], results, strict=True):
            w.write(result, pointer, place, masks[0])

    w.columns(w.minus("%last", "%first"), 1, vector)
    return w


def _bend(target: Target, *, both: bool) -> Routine:
    w = Routine("bend_both" if both else "bend", target, _TABLE)
    slots = (Slot.OUT, Slot.BEND_SLOPE, Slot.U, Slot.H, Slot.BEND_CURVATURE, *([Slot.V] if both else []))
    out, slope, u, h, curvature, *v = [w.offset(w.address(slot), "%first") for slot in slots]

    def vector(place: str, masks: Sequence[str | None]) -> None:
        def read(pointer: str) -> str:
            return w.read(pointer, place, masks[0])

        result = w.multiply(w.multiply(read(u), read(h)), read(curvature))
        if both:
            result = w.multiply_add(read(v[0]), read(slope), result)
        w.write(result, out, place, masks[0])

    w.columns(w.minus("%last", "%first"), 1, vector)
    return w
