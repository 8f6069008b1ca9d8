"""A gate on the blocks of a layer's output by compiled loops, with first and second derivatives, on a CPU.

Its operations are operations of PyTorch where a step is recorded. Otherwise Python calls them directly: the dispatcher
takes longer than they do for a molecule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forcetune.kernels.compiled.convolution import spread_out
from forcetune.kernels.compiled.gate_layout import GateShape, layout_for, list_addresses

# ---- operations ------------------------------------------------------------------------------------------------------


def _value(shape: Sequence[int], h: Tensor, weights: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    layout = layout_for(tuple(shape), h.dtype)
    kept = h.new_empty(h.shape[0] * layout.kept_width)
    out = [torch.empty_like(block) for block in y]
    layout.run(layout.value, h, weights, kept, list_addresses(y, out), passes=1)
    return [kept, *out]


def _pull(
    shape: Sequence[int],
    h: Tensor,
    weights: Sequence[Tensor],
    y: Sequence[Tensor],
    kept: Tensor,
    g: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    layout = layout_for(tuple(shape), h.dtype)
    to_h = torch.empty_like(h) if wanted[0] else None
    to_y = [torch.empty_like(block) if is_gain else None for block, is_gain in zip(y, layout.gains, strict=True)]
    by_weights = layout.run(
        *(layout.pull, h, weights, kept, list_addresses(y, g, to_y)),
        passes=1 + wanted[1],
        by_weights=wanted[1],
        to_h=to_h,
    )
    return _present(to_h, *by_weights, *to_y)


def _moved(
    shape: Sequence[int],
    h: Tensor,
    weights: Sequence[Tensor],
    y: Sequence[Tensor],
    kept: Tensor,
    g: Sequence[Tensor],
    moved_h: Tensor,
    moved_y: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    layout = layout_for(tuple(shape), h.dtype)
    to_g = [torch.empty_like(block) for block in y]
    to_h = torch.empty_like(h) if wanted[0] else None
    to_y = [torch.empty_like(block) if is_gain else None for block, is_gain in zip(y, layout.gains, strict=True)]
    by_weights = layout.run(
        *(layout.moved, h, weights, kept, list_addresses(y, g, to_y, to_g, spread_out(moved_y, layout.gains))),
        passes=3 + 2 * wanted[1],
        by_weights=wanted[1],
        to_h=to_h,
        moved_h=moved_h,
    )
    return [*to_g, *_present(to_h, *by_weights, *to_y)]


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _value_meta(shape: Sequence[int], h: Tensor, weights: Any, y: Sequence[Tensor]) -> list[Tensor]:
    kept = h.new_empty(h.shape[0] * layout_for(tuple(shape), h.dtype).kept_width)
    return [kept, *(torch.empty_like(block) for block in y)]


def _pull_meta(
    shape: Sequence[int], h: Tensor, weights: list[Tensor], y: Any, kept: Any, g: Any, wanted: Sequence[bool]
) -> list[Tensor]:
    layout = layout_for(tuple(shape), h.dtype)
    pulled = [h] * wanted[0] + weights * wanted[1]
    pulled += [block for block, is_gain in zip(y, layout.gains, strict=True) if is_gain]
    return [torch.empty_like(tensor) for tensor in pulled]


def _moved_meta(
    shape: Sequence[int],
    h: Tensor,
    weights: list[Tensor],
    y: Any,
    kept: Any,
    g: Any,
    moved_h: Any,
    moved_y: Any,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(block) for block in y] + _pull_meta(shape, h, weights, y, kept, g, wanted)


_LIBRARY = torch.library.Library("forcetune", "FRAGMENT")
_COMMON = "int[] shape, Tensor h, Tensor[] weights, Tensor[] y"
_LIBRARY.define(f"gate_value({_COMMON}) -> Tensor[]")
_LIBRARY.define(f"gate_pull({_COMMON}, Tensor kept, Tensor[] g, bool[] wanted) -> Tensor[]")
_LIBRARY.define(
    f"gate_moved({_COMMON}, Tensor kept, Tensor[] g, Tensor moved_h, Tensor[] moved_y, bool[] wanted) -> Tensor[]"
)
_DIRECT: dict[str, Callable[..., list[Tensor]]] = {"gate_value": _value, "gate_pull": _pull, "gate_moved": _moved}
for _name, _meta in (("gate_value", _value_meta), ("gate_pull", _pull_meta), ("gate_moved", _moved_meta)):
    _LIBRARY.impl(_name, _DIRECT[_name], "CPU")
    _LIBRARY.impl(_name, _meta, "Meta")


def is_recorded() -> bool:
    """Whether operations are written down, which have to be PyTorch's for that."""
    return torch._C._len_torch_dispatch_stack() > 0


def _call(name: str, *arguments: Any) -> list[Tensor]:
    if is_recorded():
        return getattr(torch.ops.forcetune, name)(*arguments)
    return _DIRECT[name](*arguments)


def value(shape: Sequence[int], h: Tensor, weights: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    """Without derivatives.

    Args:
        shape: :attr:`GateShape.flat`.
        h: (atoms, n_in).
        weights: W and b of the bottleneck, of shifts and of gains, as far as there are some; outputs first.
        y: (atoms, dim, channels) of each block.

    Returns:
        p and q in one tensor, which :func:`pull` wants, and the changed blocks.
    """
    return _call("gate_value", shape, h, _contiguous(weights), _contiguous(y))


def pull(
    shape: Sequence[int],
    h: Tensor,
    weights: Sequence[Tensor],
    y: Sequence[Tensor],
    kept: Tensor,
    g: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients by h, by the weights, and by blocks with a gain; those by blocks with a shift are ``g``.

    Args:
        shape, h, weights, y: as for :func:`value`.
        kept: from :func:`value`.
        g: gradients by the results.
        wanted: whether those by h and by the weights are; others are not returned.
    """
    return _call("gate_pull", shape, h, _contiguous(weights), _contiguous(y), kept, _contiguous(g), wanted)


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
    flat: tuple[int, ...]
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
        kept, *out = value(gate.flat, h, *_parts(gate, tensors))
        ctx.gate = gate
        ctx.save_for_backward(kept, h, *tensors)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate: Gate = ctx.gate
        needs: tuple[bool, ...] = ctx.needs_input_grad[1:]
        n_weights = len(needs) - 1 - gate.n_blocks
        # while forces are computed nobody waits for gradients by weights
        edges = ctx.next_functions
        wanted = (will_go_on(edges[:1]), will_go_on(edges[1 : 1 + n_weights]))
        kept, h, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = _Pull.apply(gate, wanted, kept, h, *tensors, *grads)
        else:
            weights, y = _parts(gate, tensors)
            flags = _pulled_flags(gate, wanted, n_weights)
            gradients = spread_out(pull(gate.flat, h, weights, y, kept, grads, wanted), flags)
        result: list[Tensor | None] = [None, *gradients]  # pyright: ignore[reportGeneralTypeIssues]
        for number, (is_gain, _, _) in enumerate(gate.shape.blocks):
            if not is_gain:
                result[2 + n_weights + number] = grads[number]
        return tuple(result)


def will_go_on(edges: Sequence[tuple[Any, int]]) -> bool:
    """Whether the differentiation under way goes on to what lies behind any of these edges."""
    try:
        return any(node is not None and torch._C._will_engine_execute_node(node) for node, _ in edges)
    except RuntimeError:  # PyTorch does not say for leaves that gradients are asked for by name
        return True


def _pulled_flags(gate: Gate, wanted: tuple[bool, bool], n_weights: int) -> list[bool]:
    """For h, weights and blocks whether :func:`pull` returns a gradient."""
    return [wanted[0], *[wanted[1]] * n_weights, *(is_gain for is_gain, _, _ in gate.shape.blocks)]


class _Pull(torch.autograd.Function):
    """Gradients of Σ g out by h, the weights, and blocks with a gain."""

    @staticmethod
    def forward(
        ctx: Any, gate: Gate, wanted: tuple[bool, bool], kept: Tensor, h: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.gate = gate
        ctx.save_for_backward(kept, h, *tensors)
        ctx.set_materialize_grads(False)
        g = tensors[-gate.n_blocks :]
        weights, y = _parts(gate, tensors[: -gate.n_blocks])
        gradients = pull(gate.flat, h, weights, y, kept, g, wanted)
        return tuple(spread_out(gradients, _pulled_flags(gate, wanted, len(weights))))

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gate: Gate = ctx.gate
        kept, h, *tensors = ctx.saved_tensors
        n = gate.n_blocks
        g = tensors[-n:]
        weights, y = _parts(gate, tensors[:-n])
        needs: tuple[bool, ...] = ctx.needs_input_grad[3:]
        by_weights = tangents[1 : 1 + len(weights)]
        if torch.is_grad_enabled() or any(tangent is not None for tangent in by_weights):
            return (None,) * 3 + _by_reference(gate, h, weights, y, g, tangents, needs)
        if all(tangent is None for tangent in tangents):
            return (None,) * (3 + len(needs))
        gains = [is_gain for is_gain, _, _ in gate.shape.blocks]
        moved_h = torch.zeros_like(h) if tangents[0] is None else tangents[0].contiguous()
        moved_y = [
            torch.zeros_like(block) if tangent is None else tangent.contiguous()
            for tangent, block, is_gain in zip(tangents[1 + len(weights) :], y, gains, strict=True)
            if is_gain
        ]
        wanted = [needs[0], any(needs[1 : 1 + len(weights)])]
        gradients = _call(
            "gate_moved",
            *(gate.flat, h, _contiguous(weights), _contiguous(y), kept, _contiguous(g), moved_h, moved_y, wanted),
        )
        rest = spread_out(gradients[n:], [wanted[0], *[wanted[1]] * len(weights), *gains])
        return (None, None, None, *rest, *gradients[:n])


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
