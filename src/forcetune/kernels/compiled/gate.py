"""A gate on the blocks of a layer's output by compiled loops, with first and second derivatives, on a CPU.

Its operations are operations of PyTorch where a step is recorded. Otherwise Python calls them directly: the dispatcher
takes longer than they do for a molecule.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forcetune.kernels.compiled import assembly, gate_code, threads
from forcetune.kernels.compiled.convolution import dtype_name, spread_out
from forcetune.kernels.compiled.gate_code import Form, padded
from forcetune.kernels.compiled.machine import compiled, source_hash, target
from forcetune.kernels.gain import LARGEST_EXPONENT

_GAINS = ("exp", "linear")


@dataclass(frozen=True, slots=True)
class GateShape:
    """What a gate does to blocks.

    Attributes:
        activation: whether a SiLU follows W↓.
        gain: φ, ``exp`` or ``linear``.
        rank: of the bottleneck.
        n_in: even scalars that drive it.
        blocks: for each block that is changed whether by a gain, its components and its channels. Blocks with a shift
            have one component. Shifts and gains of the weights lie in the order of their blocks.
    """

    activation: bool
    gain: str
    rank: int
    n_in: int
    blocks: tuple[tuple[bool, int, int], ...]

    @property
    def flat(self) -> list[int]:
        """As the operations take it."""
        head = [int(self.activation), _GAINS.index(self.gain), self.rank, self.n_in]
        return head + [int(number) for block in self.blocks for number in block]


# ---- operations ------------------------------------------------------------------------------------------------------


class _Layout:
    """Where the numbers of a gate lie, for one precision, and the functions for it."""

    def __init__(self, flat: tuple[int, ...], dtype: str) -> None:
        activation, gain, self.rank, self.n_in, *rest = flat
        own = target(dtype)
        self.form = Form(bool(activation), _GAINS[gain], LARGEST_EXPONENT)
        wide = gate_code.PANEL * own.lanes
        rows = [tuple(rest[start : start + 3]) for start in range(0, len(rest), 3)]
        self.size = 8 if dtype == "float64" else 4
        self.gains = [bool(is_gain) for is_gain, _, _ in rows]
        self.has_shifts, self.has_gains = not all(self.gains), any(self.gains)
        column, first = 0, [0, 0]
        # of each block: is a gain, dim, channels, first column, first of its own kind
        self.rows: list[tuple[int, int, int, int, int]] = []
        for is_gain, dim, channels in rows:
            self.rows.append((is_gain, dim, channels, column, first[is_gain]))
            column += padded(channels, own.lanes)
            first[is_gain] += channels
        self.n_shifts, self.n_gains = first
        self.n_weights = 2 + 2 * self.has_shifts + 2 * self.has_gains
        self.rank_padded, self.columns_padded = padded(self.rank, wide), padded(column, wide)
        self.head = [
            *(len(rows), 0, self.n_in, self.rank, column),
            *(padded(self.n_in, wide), self.rank_padded, self.columns_padded),
        ]
        self.scratch = gate_code.scratch_size(self.n_in, self.rank, column, own.lanes)
        self.work = self.n_in * self.rank + self.rank * column
        sources = source_hash(str(assembly.__file__), str(gate_code.__file__))
        machine = compiled(repr((sources, own, self.form.name)), lambda: gate_code.module_text(self.form, own))
        names = ("value", "pull", "moved")
        self.value, self.pull, self.moved = (threads.function(machine.address(name)) for name in names)
        pairs = [(self.rank, self.n_in), (self.rank,)]
        for count in (self.n_shifts, self.n_gains):
            pairs += [(count, self.rank), (count,)] if count else []
        self.weight_shapes = pairs
        self.weight_sizes = [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in pairs]
        self.weight_total = sum(self.weight_sizes)

    def places(self, weights: Sequence[int]) -> list[tuple[int, int]]:
        """Addresses of weights and biases of each block.

        Args:
            weights: addresses of the weights in their order.
        """
        pairs = iter(zip(weights[2::2], weights[3::2], strict=True))
        shifts = next(pairs) if self.has_shifts else (0, 0)
        gains = next(pairs) if self.has_gains else (0, 0)
        found = []
        for is_gain, _, _, _, first in self.rows:
            weight, bias = gains if is_gain else shifts
            found.append((weight + first * self.rank * self.size, bias + first * self.size))
        return found

    def addresses_of_sums(self, start: int) -> list[int]:
        """Where the gradients of the weights lie one after another."""
        return [start + before * self.size for before in itertools.accumulate([0, *self.weight_sizes[:-1]])]


@functools.lru_cache(maxsize=256)
def _layout(flat: tuple[int, ...], dtype: str) -> _Layout:
    return _Layout(flat, dtype)


@dataclass(slots=True)
class _Call:
    """One call of a function; a block's tensors are None where it takes none."""

    layout: _Layout
    h: Tensor
    weights: Sequence[Tensor]
    p: Tensor
    q: Tensor
    y: Sequence[Tensor]
    out: Sequence[Tensor] = ()
    g: Sequence[Tensor] = ()
    to_y: Sequence[Tensor | None] = ()
    moved_y: Sequence[Tensor | None] = ()
    moved_h: Tensor | None = None
    to_h: Tensor | None = None

    def run(self, function: Any, passes: int, sums: Callable[[int], Tensor] | None = None) -> Tensor | None:
        """
        Args:
            function: to call.
            passes: how many times the work of a plain value it is.
            sums: memory for the gradients of the weights, a row for each thread; None where none are wanted.

        Returns:
            Gradients of the weights, one after another.
        """
        layout, n_atoms = self.layout, self.h.shape[0]
        count = threads.thread_count(float(n_atoms) * layout.work * passes)
        scratch = self.h.new_empty(count, layout.scratch)
        totals = None if sums is None else sums(count)
        weights = [tensor.data_ptr() for tensor in self.weights]
        own_places = layout.places(weights)
        pointers = [self._pointers(tensors) for tensors in (self.y, self.out, self.g, self.to_y, self.moved_y)]
        head = [
            *(*layout.head, self.h.data_ptr(), weights[0], weights[1], self.p.data_ptr(), self.q.data_ptr()),
            *(0, _pointer(self.to_h), 0, 0, _pointer(self.moved_h)),
        ]
        calls, tables = [], []
        for number in range(count):
            to_weights = [0] * layout.n_weights
            if totals is not None:
                to_weights = layout.addresses_of_sums(totals.data_ptr() + number * layout.weight_total * layout.size)
            entries: list[int] = []
            for row, place, to_place, *tensors in zip(
                layout.rows, own_places, layout.places(to_weights), *pointers, strict=True
            ):
                entries += (*row[:4], *place, *tensors, *to_place)
            entry_array = (ctypes.c_int64 * len(entries))(*entries)
            table = list(head)
            table[gate_code.Slot.ENTRY_TABLE] = ctypes.addressof(entry_array)
            table[gate_code.Slot.SCRATCH] = scratch.data_ptr() + number * layout.scratch * layout.size
            table[gate_code.Slot.TO_DOWN : gate_code.Slot.TO_DOWN_BIAS + 1] = to_weights[:2]
            array = (ctypes.c_int64 * len(table))(*table)
            tables += (entry_array, array)
            first, last = n_atoms * number // count, n_atoms * (number + 1) // count
            calls.append((function, ctypes.addressof(array), first, last))
        threads.run(calls)
        if totals is None:
            return None
        return totals[0] if count == 1 else totals.sum(0)

    def _pointers(self, tensors: Sequence[Tensor | None]) -> list[int]:
        if not tensors:
            return [0] * len(self.layout.rows)
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _value(shape: list[int], h: Tensor, weights: list[Tensor], y: list[Tensor]) -> list[Tensor]:
    layout = _layout(tuple(shape), dtype_name(h))
    p, q = (h.new_empty(h.shape[0], width) for width in (layout.rank_padded, layout.columns_padded))
    out = [torch.empty_like(block) for block in y]
    _Call(layout, h, weights, p, q, y, out=out).run(layout.value, 1)
    return [p, q, *out]


def _sums(layout: _Layout, h: Tensor, wanted: bool) -> Callable[[int], Tensor] | None:
    return (lambda count: h.new_zeros(count, layout.weight_total)) if wanted else None


def _weight_gradients(layout: _Layout, total: Tensor | None) -> list[Tensor]:
    if total is None:
        return []
    pieces = total.split(layout.weight_sizes)
    return [piece.view(shape) for piece, shape in zip(pieces, layout.weight_shapes, strict=True)]


def _pull(
    shape: list[int],
    h: Tensor,
    weights: list[Tensor],
    y: list[Tensor],
    p: Tensor,
    q: Tensor,
    g: list[Tensor],
    wanted: list[bool],
) -> list[Tensor]:
    layout = _layout(tuple(shape), dtype_name(h))
    to_h = torch.empty_like(h) if wanted[0] else None
    to_y = [torch.empty_like(block) if is_gain else None for block, is_gain in zip(y, layout.gains, strict=True)]
    call = _Call(layout, h, weights, p, q, y, g=g, to_y=to_y, to_h=to_h)
    total = call.run(layout.pull, 1 + wanted[1], _sums(layout, h, wanted[1]))
    found = [to_h, *_weight_gradients(layout, total), *to_y]
    return [tensor for tensor in found if tensor is not None]


def _moved(
    shape: list[int],
    h: Tensor,
    weights: list[Tensor],
    y: list[Tensor],
    p: Tensor,
    q: Tensor,
    g: list[Tensor],
    moved_h: Tensor,
    moved_y: list[Tensor],
    wanted: list[bool],
) -> list[Tensor]:
    layout = _layout(tuple(shape), dtype_name(h))
    out = [torch.empty_like(block) for block in y]
    to_h = torch.empty_like(h) if wanted[0] else None
    to_y = [torch.empty_like(block) if is_gain else None for block, is_gain in zip(y, layout.gains, strict=True)]
    moves = spread_out(moved_y, layout.gains)
    call = _Call(layout, h, weights, p, q, y, out=out, g=g, to_y=to_y, moved_y=moves, moved_h=moved_h, to_h=to_h)
    total = call.run(layout.moved, 3 + 2 * wanted[1], _sums(layout, h, wanted[1]))
    found = [*out, to_h, *_weight_gradients(layout, total), *to_y]
    return [tensor for tensor in found if tensor is not None]


def _value_meta(shape: list[int], h: Tensor, weights: list[Tensor], y: list[Tensor]) -> list[Tensor]:
    layout = _layout(tuple(shape), dtype_name(h))
    kept = [h.new_empty(h.shape[0], width) for width in (layout.rank_padded, layout.columns_padded)]
    return kept + [torch.empty_like(block) for block in y]


def _pull_meta(
    shape: list[int], h: Tensor, weights: list[Tensor], y: list[Tensor], p: Tensor, q: Tensor, g: Any, wanted: Any
) -> list[Tensor]:
    layout = _layout(tuple(shape), dtype_name(h))
    found = [h] * wanted[0] + weights * wanted[1]
    found += [block for block, is_gain in zip(y, layout.gains, strict=True) if is_gain]
    return [torch.empty_like(tensor) for tensor in found]


def _moved_meta(
    shape: list[int],
    h: Tensor,
    weights: list[Tensor],
    y: list[Tensor],
    p: Tensor,
    q: Tensor,
    g: Any,
    moved_h: Any,
    moved_y: Any,
    wanted: Any,
) -> list[Tensor]:
    return [torch.empty_like(block) for block in y] + _pull_meta(shape, h, weights, y, p, q, g, wanted)


_LIBRARY = torch.library.Library("forcetune", "FRAGMENT")
_COMMON = "int[] shape, Tensor h, Tensor[] weights, Tensor[] y"
_LIBRARY.define(f"gate_value({_COMMON}) -> Tensor[]")
_LIBRARY.define(f"gate_pull({_COMMON}, Tensor p, Tensor q, Tensor[] g, bool[] wanted) -> Tensor[]")
_LIBRARY.define(
    f"gate_moved({_COMMON}, Tensor p, Tensor q, Tensor[] g, Tensor moved_h, Tensor[] moved_y, bool[] wanted) "
    "-> Tensor[]"
)
_DIRECT: dict[str, Callable[..., list[Tensor]]] = {"gate_value": _value, "gate_pull": _pull, "gate_moved": _moved}
for _name, _meta in (("gate_value", _value_meta), ("gate_pull", _pull_meta), ("gate_moved", _moved_meta)):
    _LIBRARY.impl(_name, _DIRECT[_name], "CPU")
    _LIBRARY.impl(_name, _meta, "Meta")


def _call(name: str, *arguments: Any) -> list[Tensor]:
    if torch._C._len_torch_dispatch_stack():  # a recording, which has to see the operation
        return getattr(torch.ops.forcetune, name)(*arguments)
    return _DIRECT[name](*arguments)


def value(shape: list[int], h: Tensor, weights: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    """Without derivatives.

    Args:
        shape: :attr:`GateShape.flat`.
        h: (atoms, n_in).
        weights: W and b of the bottleneck, of shifts and of gains, as far as there are some; outputs first.
        y: (atoms, dim, channels) of each block.

    Returns:
        p and q, which :func:`pull` wants, and the changed blocks.
    """
    return _call("gate_value", shape, h, _contiguous(weights), _contiguous(y))


def pull(
    shape: list[int],
    h: Tensor,
    weights: Sequence[Tensor],
    y: Sequence[Tensor],
    kept: Sequence[Tensor],
    g: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients by h, by the weights, and by blocks with a gain; those by blocks with a shift are ``g``.

    Args:
        shape, h, weights, y: as for :func:`value`.
        kept: p and q.
        g: gradients by the results.
        wanted: whether those by h and by the weights are; others are not returned.
    """
    return _call("gate_pull", shape, h, _contiguous(weights), _contiguous(y), *kept, _contiguous(g), list(wanted))


def _contiguous(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.contiguous() for value in values]


# ---- derivatives -----------------------------------------------------------------------------------------------------

Reference = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate that is differentiated.

    Attributes:
        shape: of it.
        flat: the same for the operations.
        reference: from h, weights and y to the changed blocks, by operations of PyTorch; for third derivatives, and
            second ones by the weights alone.
    """

    shape: GateShape
    flat: list[int]
    reference: Reference

    @property
    def n_blocks(self) -> int:
        return len(self.shape.blocks)


def apply_gate(gate: Gate, h: Tensor, weights: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The changed blocks; differentiable as often as wanted.

    Args:
        gate: what is applied.
        h, weights, y: as for :func:`value`.
    """
    return _Gate.apply(gate, h.contiguous(), *weights, *y)  # pyright: ignore[reportReturnType]


def _parts(gate: Gate, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Weights and blocks."""
    n = len(tensors) - gate.n_blocks
    return tensors[:n], tensors[n:]


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Gate, h: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        p, q, *out = value(gate.flat, h, *_parts(gate, tensors))
        ctx.gate = gate
        ctx.save_for_backward(p, q, h, *tensors)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate: Gate = ctx.gate
        needs: tuple[bool, ...] = ctx.needs_input_grad[1:]
        n_weights = len(needs) - 1 - gate.n_blocks
        wanted = (needs[0], any(needs[1 : 1 + n_weights]))
        p, q, h, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _Pull.apply(gate, wanted, p, q, h, *tensors, *grads)
        else:
            weights, y = _parts(gate, tensors)
            flags = _pulled_flags(gate, wanted, n_weights)
            found = spread_out(pull(gate.flat, h, weights, y, (p, q), grads, wanted), flags)
        result: list[Tensor | None] = [None, *found]  # pyright: ignore[reportGeneralTypeIssues]
        for number, (is_gain, _, _) in enumerate(gate.shape.blocks):
            if not is_gain:
                result[2 + n_weights + number] = grads[number]
        return tuple(result)


def _pulled_flags(gate: Gate, wanted: tuple[bool, bool], n_weights: int) -> list[bool]:
    """For h, weights and blocks whether :func:`pull` returns a gradient."""
    return [wanted[0], *[wanted[1]] * n_weights, *(is_gain for is_gain, _, _ in gate.shape.blocks)]


class _Pull(torch.autograd.Function):
    """Gradients of Σ g out by h, the weights, and blocks with a gain."""

    @staticmethod
    def forward(
        ctx: Any, gate: Gate, wanted: tuple[bool, bool], p: Tensor, q: Tensor, h: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.gate = gate
        ctx.save_for_backward(p, q, h, *tensors)
        ctx.set_materialize_grads(False)
        g = tensors[-gate.n_blocks :]
        weights, y = _parts(gate, tensors[: -gate.n_blocks])
        found = pull(gate.flat, h, weights, y, (p, q), g, wanted)
        return tuple(spread_out(found, _pulled_flags(gate, wanted, len(weights))))

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gate: Gate = ctx.gate
        p, q, h, *tensors = ctx.saved_tensors
        n = gate.n_blocks
        g = tensors[-n:]
        weights, y = _parts(gate, tensors[:-n])
        needs: tuple[bool, ...] = ctx.needs_input_grad[4:]
        by_weights = tangents[1 : 1 + len(weights)]
        if torch.is_grad_enabled() or any(tangent is not None for tangent in by_weights):
            return (None,) * 4 + _by_reference(gate, h, weights, y, g, tangents, needs)
        if all(tangent is None for tangent in tangents):
            return (None,) * (4 + len(needs))
        gains = [is_gain for is_gain, _, _ in gate.shape.blocks]
        moved_h = torch.zeros_like(h) if tangents[0] is None else tangents[0].contiguous()
        moved_y = [
            torch.zeros_like(block) if tangent is None else tangent.contiguous()
            for tangent, block, is_gain in zip(tangents[1 + len(weights) :], y, gains, strict=True)
            if is_gain
        ]
        wanted = [needs[0], any(needs[1 : 1 + len(weights)])]
        found = _call(
            "gate_moved",
            *(gate.flat, h, _contiguous(weights), _contiguous(y), p, q, _contiguous(g), moved_h, moved_y, wanted),
        )
        rest = spread_out(found[n:], [wanted[0], *[wanted[1]] * len(weights), *gains])
        return (None, None, None, None, *rest, *found[:n])


def _by_reference(
    gate: Gate,
    h: Tensor,
    weights: Sequence[Tensor],
    y: Sequence[Tensor],
    g: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of Σ tangents · (gradients of Σ g out), by operations that PyTorch differentiates again."""
    values = [h, *weights, *y, *g]
    goes_on = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, so that what is differentiated is this gate and not what lies before it
        inner = [value.view_as(value) if value.requires_grad else value for value in values]
        inputs, pulled_by = inner[: -len(g)], inner[-len(g) :]
        n = 1 + len(weights)
        out = gate.reference(inputs[0], inputs[1:n], inputs[n:])
        reached = [value for value in inputs if value.requires_grad]
        gradients = iter(torch.autograd.grad(out, reached, pulled_by, create_graph=True, allow_unused=True))
        by_value = [next(gradients) if value.requires_grad else None for value in inputs]
        pairs = [(one, two) for one, two in zip(by_value, tangents, strict=True) if one is not None and two is not None]
        pairs = [(one, two) for one, two in pairs if one.requires_grad]
        wanted = [value for value, need in zip(inner, needs, strict=True) if need]
        if not pairs:
            return (None,) * len(needs)
        results = iter(
            torch.autograd.grad(
                [one for one, _ in pairs],
                wanted,
                [two for _, two in pairs],
                create_graph=goes_on,
                allow_unused=True,
            )
        )
    return tuple(next(results) if need else None for need in needs)
