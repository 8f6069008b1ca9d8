"""The symmetric contraction by compiled loops, with first and second derivatives, on a CPU.

As :mod:`forcetune.kernels.contraction`, of whose bilinear form only the terms that are not 0 are left.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forcetune.kernels.compiled import assembly, contraction_code, threads, unrolled_contraction
from forcetune.kernels.compiled.assembly import Target
from forcetune.kernels.compiled.contraction_code import ATOMS, SLOTS, Form, Slot
from forcetune.kernels.compiled.convolution import contiguous, dtype_name, spread_out
from forcetune.kernels.compiled.machine import compiled, source_hash, target
from forcetune.kernels.compiled.sparse_form import SparseForm
from forcetune.kernels.compiled.unrolled_contraction import Lists
from forcetune.kernels.phase import Phase


def count_lanes(channels: int, dtype: torch.dtype) -> int:
    """Channels that are treated at once."""
    return target(str(dtype).removeprefix("torch.")).dividing(channels).lanes


# ---- operations ------------------------------------------------------------------------------------------------------


MOST_UNROLLED = 1000
"""Terms up to which polynomials have functions of their own, up to a second each to compile, then cached."""


@functools.lru_cache(maxsize=256)
def _function(form: Form, own: Target, lists: Lists | None) -> Any:
    """The function of some polynomials, or without lists that of all."""

    def text() -> str:
        if lists is None:
            return assembly.module_text([contraction_code.write(form, own)])
        return assembly.module_text([unrolled_contraction.write(form, own, lists)])

    files = (assembly, contraction_code, *([] if lists is None else [unrolled_contraction]))
    sources = source_hash(*(str(file.__file__) for file in files))
    machine = compiled(repr((sources, own, form.name, lists)), text)
    return threads.function(machine.address(form.name))


@functools.lru_cache(maxsize=64)
def _lists(components: int, outputs: int, *tables: bytes) -> Lists:
    return Lists(components, outputs, *(tuple(np.frombuffer(table, dtype=np.int64).tolist()) for table in tables))


def _lines(blocks: Sequence[Tensor]) -> np.ndarray:
    """Address and stride from atom to atom of every component."""
    lines = []
    for block in blocks:
        step = block.shape[2] * block.element_size()
        lines += [(block.data_ptr() + k * step, block.shape[1] * block.shape[2]) for k in range(block.shape[1])]
    return np.array(lines, dtype=np.int64)


def _run(
    form: Form,
    structure: list[Tensor],
    counts: list[int],
    coefficients: Tensor,
    blocks: Mapping[Slot, Sequence[Tensor]],
    to_coefficients: Tensor | None,
) -> None:
    species, tiles, terms, lanes = coefficients.shape
    factors, first_row, rows, *_ = structure
    n_monomials, n_outputs, n_rows = len(factors) // 2, len(first_row) - 1, len(rows) // 3
    arrays = {slot: _lines(value) for slot, value in blocks.items()}
    lists = None
    # channels that do not fill vectors are rare, and not worth compiling for
    if terms <= MOST_UNROLLED and lanes == target(dtype_name(coefficients)).lanes:
        lists = _lists(len(arrays[Slot.X]), n_outputs, *(threads.integers(table).tobytes() for table in structure))
    function = _function(form, Target(*_target_key(coefficients, lanes)), lists)
    atoms = np.cumsum([0, *counts], dtype=np.int64)
    table = np.zeros(SLOTS, dtype=np.int64)
    n_components = len(arrays[Slot.X])
    table[: Slot.TILES + 1] = n_components, n_monomials, n_outputs, terms, species, tiles
    table[Slot.FIRST_ATOM] = atoms.ctypes.data
    table[Slot.FACTORS : Slot.USES + 1] = [tensor.data_ptr() for tensor in structure]
    table[Slot.COEFFICIENTS] = coefficients.data_ptr()
    for slot, array in arrays.items():
        table[slot] = array.ctypes.data
    if to_coefficients is not None:
        table[Slot.TO_COEFFICIENTS] = to_coefficients.data_ptr()
    sizes = {
        **dict.fromkeys((Slot.Y, Slot.HY, Slot.TO_Y), n_components + 1),
        **dict.fromkeys((Slot.M, Slot.HM, Slot.PULLED, Slot.HPULLED), n_monomials),
        **dict.fromkeys((Slot.SEED, Slot.HSEED), n_rows),
        Slot.GS: n_outputs,
    }
    before = np.cumsum([0, *np.tile(counts, tiles)])
    passes = {"value": 1, "pull": 3, "moved": 6}[form.kind]
    count = threads.thread_count(float(before[-1]) * terms * lanes * passes)
    bounds = threads.balanced(before, count)
    scratch = coefficients.new_empty(count, sum(sizes.values()) * ATOMS * lanes if lists is None else 0)
    calls, tables = [], []
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        own = table.copy()
        place = scratch[number].data_ptr()
        for slot, size in sizes.items():
            own[slot] = place
            place += size * ATOMS * lanes * coefficients.element_size()
        tables.append(own)
        calls.append((function, own.ctypes.data, first, last))
    threads.run(calls)


def _target_key(coefficients: Tensor, lanes: int) -> tuple[str, int, int]:
    own = target(dtype_name(coefficients))
    return own.real, lanes, own.registers


def _outputs_like(x: list[Tensor], dims: list[int]) -> list[Tensor]:
    return [x[0].new_empty(x[0].shape[0], dim, x[0].shape[2]) for dim in dims]


def _value(
    structure: list[Tensor], dims: list[int], counts: list[int], x: list[Tensor], coefficients: Tensor
) -> list[Tensor]:
    outputs = _outputs_like(x, dims)
    _run(Form("value", True, False, False), structure, counts, coefficients, {Slot.X: x, Slot.OUT: outputs}, None)
    return outputs


def _pull(
    structure: list[Tensor],
    counts: list[int],
    g: list[Tensor],
    x: list[Tensor],
    coefficients: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    to_x = [torch.empty_like(block) for block in x] if wanted[0] else []
    to_coefficients = torch.zeros_like(coefficients) if wanted[1] else None
    blocks = {Slot.X: x, Slot.G: g} | ({Slot.TO_X: to_x} if to_x else {})
    _run(Form("pull", False, wanted[0], wanted[1]), structure, counts, coefficients, blocks, to_coefficients)
    return [*to_x, *([] if to_coefficients is None else [to_coefficients])]


def _moved(
    structure: list[Tensor],
    counts: list[int],
    g: list[Tensor],
    x: list[Tensor],
    coefficients: Tensor,
    h: list[Tensor],
    wanted: list[bool],
) -> list[Tensor]:
    outer = [torch.empty_like(block) for block in g] if wanted[0] else []
    to_x = [torch.empty_like(block) for block in x] if wanted[1] else []
    to_coefficients = torch.zeros_like(coefficients) if wanted[2] else None
    blocks = {Slot.X: x, Slot.H: h, Slot.G: g} | ({Slot.TO_X: to_x} if to_x else {})
    blocks |= {Slot.OUT: outer} if outer else {}
    _run(Form("moved", *wanted), structure, counts, coefficients, blocks, to_coefficients)
    return [*outer, *to_x, *([] if to_coefficients is None else [to_coefficients])]


def _value_meta(
    structure: list[Tensor], dims: list[int], counts: list[int], x: list[Tensor], coefficients: Tensor
) -> list[Tensor]:
    return _outputs_like(x, dims)


def _pull_meta(
    structure: list[Tensor],
    counts: list[int],
    g: list[Tensor],
    x: list[Tensor],
    coefficients: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (*(x if wanted[0] else ()), *([coefficients] if wanted[1] else ()))]


def _moved_meta(
    structure: list[Tensor],
    counts: list[int],
    g: list[Tensor],
    x: list[Tensor],
    coefficients: Tensor,
    h: list[Tensor],
    wanted: list[bool],
) -> list[Tensor]:
    outer = [torch.empty_like(t) for t in g] if wanted[0] else []
    return outer + _pull_meta(structure, counts, g, x, coefficients, wanted[1:])


_LIBRARY = torch.library.Library("forcetune", "FRAGMENT")
_LIBRARY.define(
    "contraction_value(Tensor[] structure, int[] dims, int[] counts, Tensor[] x, Tensor coefficients) -> Tensor[]"
)
_LIBRARY.define(
    "contraction_pull(Tensor[] structure, int[] counts, Tensor[] g, Tensor[] x, Tensor coefficients, bool[] wanted) "
    "-> Tensor[]"
)
_LIBRARY.define(
    "contraction_moved(Tensor[] structure, int[] counts, Tensor[] g, Tensor[] x, Tensor coefficients, Tensor[] h, "
    "bool[] wanted) -> Tensor[]"
)
for _name, _function_of, _meta in (
    ("contraction_value", _value, _value_meta),
    ("contraction_pull", _pull, _pull_meta),
    ("contraction_moved", _moved, _moved_meta),
):
    _LIBRARY.impl(_name, _function_of, "CPU")
    _LIBRARY.impl(_name, _meta, "Meta")


# ---- derivatives -----------------------------------------------------------------------------------------------------


def polynomial(
    form: SparseForm,
    x: Sequence[Tensor],
    coefficients: Tensor,
    counts: Sequence[int],
    *,
    phase: Phase | None = None,
    trains: bool = True,
) -> tuple[Tensor, ...]:
    """Every output irrep, (atoms, dim, channels).

    Args:
        form: of the polynomials.
        x: (atoms, dim, channels) of each input irrep, atoms grouped by species.
        coefficients: as :meth:`SparseForm.fold` returns them, for the species in the order of the groups.
        counts: atoms of each species; sums to the number of atoms.
        phase: which derivatives are wanted.
        trains: whether x depends on trainable weights.

    Returns:
        Differentiable twice, but for second derivatives by the coefficients.
    """
    return run(Setting(form, tuple(counts), phase or Phase(), trains), x, coefficients)


def run(setting: Setting, x: Sequence[Tensor], coefficients: Tensor) -> tuple[Tensor, ...]:
    """The contraction in a setting; arguments and result as :func:`polynomial`."""
    result: tuple[Tensor, ...] = _Polynomial.apply(setting, coefficients, *x)  # pyright: ignore[reportAssignmentType]
    return result


@dataclass(frozen=True, slots=True)
class Setting:
    """Polynomials and their atoms; subclasses compute them in another way.

    Attributes:
        form: of the polynomials.
        counts: atoms of each species.
        phase: which derivatives are wanted.
        trains: whether x depends on trainable weights.
    """

    form: SparseForm
    counts: tuple[int, ...]
    phase: Phase
    trains: bool

    def wanted(self, needs: Sequence[bool]) -> tuple[bool, bool]:
        """Which gradients by x and the coefficients are wanted, of those that can be had (coefficients first)."""
        of_x = self.phase.wants(geometric=True, trains=self.trains)
        of_weights = self.phase.wants(geometric=False, trains=True)
        return any(needs[1:]) and of_x, needs[0] and of_weights

    def value(self, x: list[Tensor], coefficients: Tensor) -> list[Tensor]:
        """The polynomials."""
        form = self.form
        return torch.ops.forcetune.contraction_value(form.tensors, form.dims, self.counts, x, coefficients)

    def pull(self, g: list[Tensor], x: list[Tensor], coefficients: Tensor, wanted: list[bool]) -> list[Tensor]:
        """Gradients of Σ g out by x and the coefficients, those that are wanted."""
        return torch.ops.forcetune.contraction_pull(self.form.tensors, self.counts, g, x, coefficients, wanted)

    def moved(
        self, g: list[Tensor], x: list[Tensor], coefficients: Tensor, h: list[Tensor], wanted: list[bool]
    ) -> list[Tensor]:
        """Gradients of Σ h ∂_x Σ g out by g, x and the coefficients, those that are wanted."""
        return torch.ops.forcetune.contraction_moved(self.form.tensors, self.counts, g, x, coefficients, h, wanted)


class _Polynomial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: Setting, coefficients: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        ctx.setting = setting
        ctx.save_for_backward(coefficients, *x)
        return tuple(setting.value(contiguous(x), coefficients.contiguous()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        setting: Setting = ctx.setting
        wanted = setting.wanted(ctx.needs_input_grad[1:])
        return (None, *_Pull.apply(setting, wanted, len(grads), *grads, *ctx.saved_tensors))  # pyright: ignore[reportGeneralTypeIssues]


class _Pull(torch.autograd.Function):
    """Gradients of Σ g out by the coefficients and x."""

    @staticmethod
    def forward(
        ctx: Any, setting: Setting, wanted: tuple[bool, bool], n_grads: int, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.setting, ctx.n_grads = setting, n_grads
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        g, coefficients, x = tensors[:n_grads], tensors[n_grads], tensors[n_grads + 1 :]
        if not any(wanted):
            return (None,) * (1 + len(x))
        gradients = setting.pull(contiguous(g), contiguous(x), coefficients.contiguous(), list(wanted))
        *of_x, of_coefficients = spread_out(gradients, [wanted[0]] * len(x) + [wanted[1]])
        return (of_coefficients, *of_x)

    @staticmethod
    def _twice(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        setting: Setting = ctx.setting
        n: int = ctx.n_grads
        g, coefficients, x = ctx.saved_tensors[:n], ctx.saved_tensors[n], ctx.saved_tensors[n + 1 :]
        of_coefficients, *moved = tangents
        if of_coefficients is not None:
            raise RuntimeError("gradients of gradients with respect to contraction weights are not provided")
        by_x, by_coefficients = setting.wanted(ctx.needs_input_grad[3 + n :])
        wanted = [any(ctx.needs_input_grad[3 : 3 + n]), by_x, by_coefficients]
        if all(tangent is None for tangent in moved) or not any(wanted):
            return (None,) * (4 + n + len(x))
        h = [torch.zeros_like(t) if d is None else d for d, t in zip(moved, x, strict=True)]
        gradients = setting.moved(contiguous(g), contiguous(x), coefficients.contiguous(), contiguous(h), wanted)
        flags = [wanted[0]] * n + [wanted[1]] * len(x) + [wanted[2]]
        *others, to_coefficients = spread_out(gradients, flags)
        return (None, None, None, *others[:n], to_coefficients, *others[n:])

    backward: Any = staticmethod(once_differentiable(_twice))
