"""Radial networks with SiLU, with first and second derivatives in as few passes as there are, on a CPU.

Matrix products are PyTorch's; what lies between them are compiled loops, each of which does at once what would be five
to ten operations of PyTorch. A layer is a_k = f(z_k), z_k = a_{k−1} W_k with a_0 = x, and the last one z_n = R alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forcetune.kernels.compiled import activation_code, assembly, routine, threads
from forcetune.kernels.compiled.activation_code import SLOTS, Slot
from forcetune.kernels.compiled.gate import will_go_on
from forcetune.kernels.compiled.machine import compiled, source_hash, target

WORK = 20
"""Multiply-adds that an element costs."""


# ---- operations ------------------------------------------------------------------------------------------------------


@functools.cache
def _functions(dtype: torch.dtype) -> dict[str, Any]:
    own = target(str(dtype).removeprefix("torch."))
    sources = source_hash(*(str(module.__file__) for module in (assembly, routine, activation_code)))
    machine = compiled(repr((sources, own)), lambda: activation_code.module_text(own))
    return {name: threads.function(machine.address(name)) for name in ("value", "value_curved", "bend", "bend_both")}


def _run(name: str, like: Tensor, entries: dict[Slot, int]) -> None:
    table = np.zeros(SLOTS, dtype=np.int64)
    for slot, address in entries.items():
        table[slot] = address
    size, function, pointer = like.numel(), _functions(like.dtype)[name], table.ctypes.data
    count = threads.thread_count(size * WORK)
    bounds = [size * number // count for number in range(count + 1)]
    threads.run([(function, pointer, first, last) for first, last in itertools.pairwise(bounds)])


def _silu(z: Tensor, factor: float, curved: bool) -> list[Tensor]:
    """f(z), f′(z), and f″(z) on request, of f = factor · SiLU."""
    z = z.contiguous()
    results = [torch.empty_like(z) for _ in range(3 if curved else 2)]
    number = np.array([factor], dtype=np.float64 if z.dtype == torch.float64 else np.float32)
    slots = (Slot.F, Slot.SLOPE, Slot.CURVATURE)
    entries = {slot: tensor.data_ptr() for slot, tensor in zip(slots, results, strict=False)}
    name = "value_curved" if curved else "value"
    _run(name, z, entries | {Slot.Z: z.data_ptr(), Slot.FACTOR: number.ctypes.data})
    return results


def _bend(v: Tensor | None, slope: Tensor, u: Tensor, h: Tensor, curvature: Tensor) -> Tensor:
    """v f′ + u h f″."""
    slope, u, h, curvature = (x.contiguous() for x in (slope, u, h, curvature))
    v = None if v is None else v.contiguous()
    out = torch.empty_like(u)
    slots = (Slot.OUT, Slot.BEND_SLOPE, Slot.U, Slot.H, Slot.BEND_CURVATURE)
    entries = {slot: x.data_ptr() for slot, x in zip(slots, (out, slope, u, h, curvature), strict=True)}
    _run("bend" if v is None else "bend_both", u, entries | ({} if v is None else {Slot.V: v.data_ptr()}))
    return out


def _silu_meta(z: Tensor, factor: float, curved: bool) -> list[Tensor]:
    return [torch.empty_like(z) for _ in range(3 if curved else 2)]


def _bend_meta(v: Tensor | None, slope: Tensor, u: Tensor, h: Tensor, curvature: Tensor) -> Tensor:
    return torch.empty_like(u)


_LIBRARY = torch.library.Library("forcetune", "FRAGMENT")
_LIBRARY.define("radial_silu(Tensor z, float factor, bool curved) -> Tensor[]")
_LIBRARY.define("radial_bend(Tensor? v, Tensor slope, Tensor u, Tensor h, Tensor curvature) -> Tensor")
for _name, _cpu, _meta in (("radial_silu", _silu, _silu_meta), ("radial_bend", _bend, _bend_meta)):
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _meta, "Meta")


# ---- derivatives -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Setting:
    factors: tuple[float, ...]
    twice: bool

    @property
    def layers(self) -> int:
        return len(self.factors) + 1

    def parts(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        """Matrices of all layers; a_k, f′(z_k) and, for second derivatives, f″(z_k) of the hidden ones."""
        n, hidden = self.layers, self.layers - 1
        places = [0, n, *(n + hidden * count for count in (1, 2, 3))]
        return tuple(tensors[first:last] for first, last in itertools.pairwise(places))


def radial_network(x: Tensor, matrices: Sequence[Tensor], factors: Sequence[float], *, twice: bool = True) -> Tensor:
    """R of all pairs; differentiable twice.

    Args:
        x: (pairs, inputs).
        matrices: (inputs, outputs) of each layer, normalisation included.
        factors: of the SiLU behind each layer but the last.
        twice: whether second derivatives may be wanted.

    Returns:
        (pairs, outputs of the last layer).
    """
    result: Tensor = _Network.apply(_Setting(tuple(factors), twice), x, *matrices)  # pyright: ignore[reportAssignmentType]
    return result


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: _Setting, x: Tensor, *matrices: Tensor) -> Tensor:
        a, hidden = x, []
        for matrix, factor in zip(matrices[:-1], setting.factors, strict=True):
            hidden.append(torch.ops.forcetune.radial_silu(a @ matrix, factor, setting.twice))
            a = hidden[-1][0]
        ctx.setting = setting
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *matrices, *itertools.chain(*zip(*hidden, strict=True)))
        return a @ matrices[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        setting: _Setting = ctx.setting
        needs: tuple[bool, ...] = ctx.needs_input_grad[1:]
        if grads[0] is None:
            return (None,) * (1 + len(needs))
        # gradients by weights are not wanted while forces are computed
        wanted = [need and will_go_on([edge]) for need, edge in zip(needs, ctx.next_functions, strict=True)]
        x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, *_Pull.apply(setting, wanted, grads[0], x, *tensors))  # pyright: ignore[reportGeneralTypeIssues]
        return (None, *_pull(setting, wanted, grads[0], x, tensors)[0])


def _pull(
    setting: _Setting, wanted: Sequence[bool], g: Tensor, x: Tensor, tensors: Sequence[Tensor], *, whole: bool = False
) -> tuple[list[Tensor | None], list[Tensor], list[Tensor]]:
    """Gradients of Σ g R by x and the matrices.

    Args:
        setting: of the network.
        wanted: which of them are.
        g, x: as in the sum.
        tensors: as :meth:`_Setting.parts` takes them.
        whole: whether to go on to the first layer in any case.

    Returns:
        The gradients, None where they are not wanted; then u_k, those by the a_k, and d_k, those by the z_k, of the
        layers that were reached, the last one last.
    """
    matrices, values, slopes, _ = setting.parts(tensors)
    first = 0 if whole or wanted[0] else [*wanted[1:], True].index(True)
    pulled: list[Tensor] = []
    by_z = [g]
    for number in range(setting.layers - 1, first, -1):
        pulled.insert(0, by_z[0] @ matrices[number].t())
        by_z.insert(0, pulled[0] * slopes[number - 1])
    gradients: list[Tensor | None] = [by_z[0] @ matrices[0].t() if wanted[0] else None]
    for number, (a, want) in enumerate(zip((x, *values), wanted[1:], strict=True)):
        gradients.append(a.t() @ by_z[number - setting.layers] if want else None)
    return gradients, pulled, by_z


class _Pull(torch.autograd.Function):
    """:func:`_pull`, to be differentiated once more."""

    @staticmethod
    def forward(
        ctx: Any, setting: _Setting, wanted: Sequence[bool], g: Tensor, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradients, pulled, by_z = _pull(setting, wanted, g, x, tensors, whole=True)
        ctx.setting = setting
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *pulled, *by_z, *tensors)
        return tuple(gradients)

    @staticmethod
    def _twice(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of Σ g Ṙ by g, x and the matrices, Ṙ being R's change along the tangents of x and the matrices."""
        setting: _Setting = ctx.setting
        needs: tuple[bool, ...] = ctx.needs_input_grad[2:]
        if all(tangent is None for tangent in tangents):
            return (None,) * (2 + len(needs))
        n = setting.layers
        x, *rest = ctx.saved_tensors
        pulled, by_z, tensors = rest[: n - 1], rest[n - 1 : 2 * n - 1], rest[2 * n - 1 :]
        matrices, values, slopes, curvatures = setting.parts(tensors)
        inputs, along = [x, *values], tangents[1:]
        # ȧ_k, from that of x on, and ż_k
        moved, steps = [tangents[0]], []
        for number, matrix in enumerate(matrices):
            steps.append(_sum(_product(moved[-1], matrix), _product(inputs[number], along[number])))
            if number < n - 1:
                moved.append(_scaled(steps[-1], slopes[number]))
        edges = ctx.next_functions[1 : n + 2]
        wanted = [need and will_go_on([edge]) for need, edge in zip(needs[1 : n + 2], edges, strict=True)]
        gradients: list[Tensor | None] = [None] * (len(needs) - 1)
        # gradients by ȧ_k and ż_k are the u_k and d_k of the pull; those by z_k and a_k follow from the last layer on
        bent: Tensor | None = None
        for number in range(n - 1, -1, -1) if any(wanted) else ():
            if wanted[1 + number]:
                gradients[1 + number] = _outer_sum((moved[number], by_z[number]), (inputs[number], bent))
            by_a = _sum(_product(bent, matrices[number].t()), _product(by_z[number], _transposed(along[number])))
            if number == 0:
                gradients[0] = by_a if wanted[0] else None
                break
            slope, step = slopes[number - 1], steps[number - 1]
            if step is None:
                bent = _scaled(by_a, slope)
            else:
                arguments = (by_a, slope, pulled[number - 1], step, curvatures[number - 1])
                bent = torch.ops.forcetune.radial_bend(*arguments)
        return (None, None, steps[-1] if needs[0] else None, *gradients)

    backward: Any = staticmethod(once_differentiable(_twice))


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one @ other


def _transposed(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.t()


def _scaled(one: Tensor | None, other: Tensor) -> Tensor | None:
    return None if one is None else one * other


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _outer_sum(*pairs: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """Σ aᵀ b of those pairs that there are."""
    total: Tensor | None = None
    for a, b in pairs:
        if a is not None and b is not None:
            total = a.t() @ b if total is None else torch.addmm(total, a.t(), b)
    return total
