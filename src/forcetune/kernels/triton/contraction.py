"""The symmetric contraction by Triton's kernels, with first and second derivatives: operators and launches.

The autograd functions are those of :mod:`forcetune.kernels.compiled.contraction`. No operation asks the device for a
value.
"""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forcetune.kernels.compiled.contraction import Setting, run
from forcetune.kernels.compiled.sparse_form import SparseForm
from forcetune.kernels.constants import Constant
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.phase import Phase
from forcetune.kernels.triton.convolution import channel_block

ATOMS = 4
"""Atoms that a program treats at once, which share the loads of coefficients where they are of one species."""


class TermTables:
    """The terms of a form as the kernels read them, in 32-bit integers.

    Attributes:
        components: of the features.
        terms: their number.
        dims: components of each output irrep.
        first_row: (outputs + 1,) first row of each component of the outputs.
        rows: (rows, 4) both factors of the row's monomial, first term, term behind the last.
        columns: (terms, 2) both factors of the term's other monomial.
        entries: (terms, 5) component of the outputs, and all four factors.
        first_use: (components + 1,) first use of each component of the features.
        uses: (uses, 6) term, component of the outputs, how often the term has the component, the three other factors.
    """

    def __init__(self, form: SparseForm) -> None:
        factors, first_row, rows, columns, *_ = (tensor.numpy() for tensor in form.tensors)
        factors, rows = factors.reshape(-1, 2), rows.reshape(-1, 3)
        self.components, self.terms, self.dims = form.components, form.terms, form.dims
        outputs = np.repeat(np.arange(len(first_row) - 1), np.diff(first_row))
        whole = np.zeros((form.terms, 5), dtype=np.int64)
        for output, (monomial, start, stop) in zip(outputs, rows, strict=True):
            whole[start:stop, 0] = output
            whole[start:stop, 1:3] = factors[monomial]
        whole[:, 3:] = factors[columns]
        uses: list[list[tuple[int, ...]]] = [[] for _ in range(form.components)]
        for term, (output, *members) in enumerate(whole.tolist()):
            for component, times in Counter(members).items():
                if component < form.components:
                    others = list(members)
                    others.remove(component)
                    uses[component].append((term, output, times, *others))
        self.first_row, self.rows = (
            _constant(first_row),
            _constant(np.concatenate((factors[rows[:, 0]], rows[:, 1:]), 1)),
        )
        self.columns, self.entries = _constant(whole[:, 3:]), _constant(whole)
        self.first_use = _constant(np.cumsum([0, *map(len, uses)]))
        self.uses = _constant(np.array(list(itertools.chain(*uses)), dtype=np.int64).reshape(-1, 6))


def _constant(values: np.ndarray) -> Constant:
    return Constant(torch.from_numpy(np.ascontiguousarray(values).astype(np.int32)))


def _launch(name: str, grid: tuple[int, int], coefficients: Tensor, tensors: dict[str, Any], **sizes: int) -> None:
    """Launch a kernel for all channels."""
    channels = coefficients.shape[2]
    block = channel_block(channels, coefficients.element_size())
    kernel = getattr(importlib.import_module("forcetune.kernels.triton.contraction_kernels"), name)
    options = {"channels": channels, "ATOMS": ATOMS, "BLOCK": block, "num_warps": 1}
    kernel[(*grid, -(-channels // block))](**tensors, **sizes, **options)


def _joined(blocks: Sequence[Tensor], last: float) -> Tensor:
    """All components and a constant, (atoms, components + 1, channels)."""
    return torch.cat([*blocks, torch.full_like(blocks[0][:, :1], last)], dim=1)


# ---- operations ------------------------------------------------------------------------------------------------------


def _value(
    structure: list[Tensor], dims: list[int], kinds: Tensor, x: list[Tensor], coefficients: Tensor, h: list[Tensor]
) -> list[Tensor]:
    factors = _joined(x, 1.0)
    n_atoms, size, channels = factors.shape
    out = factors.new_empty(n_atoms, sum(dims), channels)
    first_row, rows, columns = structure
    if out.numel():
        tensors = {"first_row": first_row, "rows": rows, "columns": columns, "coefficients": coefficients, "out": out}
        tensors |= {"kinds": kinds, "y": factors, "h": _joined(h, 0.0) if h else factors}
        sizes = {"n_atoms": n_atoms, "terms": coefficients.shape[1], "size": size, "moved": bool(h)}
        _launch("value", (-(-n_atoms // ATOMS), sum(dims)), coefficients, tensors, **sizes)
    return [part.contiguous() for part in out.split(dims, dim=1)]


def _pull(
    structure: list[Tensor],
    kinds: Tensor,
    first_atom: Tensor,
    g: list[Tensor],
    x: list[Tensor],
    coefficients: Tensor,
    h: list[Tensor],
    wanted: list[bool],
) -> list[Tensor]:
    factors, outer = _joined(x, 1.0), torch.cat(g, dim=1)
    n_atoms, size, channels = factors.shape
    first_use, uses, entries = structure
    species, terms, _ = coefficients.shape
    tensors = {"y": factors, "h": _joined(h, 0.0) if h else factors, "g": outer}
    sizes = {"terms": terms, "outputs": outer.shape[1], "size": size, "moved": bool(h)}
    results: list[Tensor] = []
    if wanted[0]:
        result = factors.new_empty(n_atoms, size - 1, channels)
        if result.numel():
            own = {"kinds": kinds, "first_use": first_use, "uses": uses, "coefficients": coefficients, "result": result}
            _launch(
                "to_features", (-(-n_atoms // ATOMS), size - 1), coefficients, tensors | own, n_atoms=n_atoms, **sizes
            )
        results += [part.contiguous() for part in result.split([block.shape[1] for block in x], dim=1)]
    if wanted[1]:
        result = torch.empty_like(coefficients)
        if result.numel():
            own = {"first_atom": first_atom, "entries": entries, "result": result}
            _launch("to_coefficients", (terms, species), coefficients, tensors | own, **sizes)
        results.append(result)
    return results


def _value_meta(structure: list[Tensor], dims: list[int], kinds: Tensor, x: list[Tensor], *others: Any) -> list[Tensor]:
    return [x[0].new_empty(x[0].shape[0], dim, x[0].shape[2]) for dim in dims]


def _pull_meta(structure: list[Tensor], kinds: Tensor, first_atom: Tensor, *others: Any) -> list[Tensor]:
    _, x, coefficients, _, wanted = others
    return [torch.empty_like(t) for t in (*(x if wanted[0] else ()), *([coefficients] if wanted[1] else ()))]


_LIBRARY = torch.library.Library("forcetune", "FRAGMENT")
_LIBRARY.define(
    "triton_contraction_value(Tensor[] structure, int[] dims, Tensor kinds, Tensor[] x, Tensor coefficients, "
    "Tensor[] h) -> Tensor[]"
)
_LIBRARY.define(
    "triton_contraction_pull(Tensor[] structure, Tensor kinds, Tensor first_atom, Tensor[] g, Tensor[] x, "
    "Tensor coefficients, Tensor[] h, bool[] wanted) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):  # on a CPU for Triton's interpreter
    _LIBRARY.impl("triton_contraction_value", _value, _key)
    _LIBRARY.impl("triton_contraction_pull", _pull, _key)
_LIBRARY.impl("triton_contraction_value", _value_meta, "Meta")
_LIBRARY.impl("triton_contraction_pull", _pull_meta, "Meta")


@dataclass(frozen=True, slots=True)
class _TritonSetting(Setting):
    """
    Attributes:
        tables: of the form.
        kinds: (atoms,) the row of each atom among the coefficients.
        first_atom: (species + 1,) first atom of each row.
    """

    tables: TermTables
    kinds: Tensor
    first_atom: Tensor

    def value(self, x: list[Tensor], coefficients: Tensor) -> list[Tensor]:
        return self._values(x, coefficients, [])

    def _values(self, x: list[Tensor], coefficients: Tensor, h: list[Tensor]) -> list[Tensor]:
        tables = self.tables
        structure = [one.on(x[0].device) for one in (tables.first_row, tables.rows, tables.columns)]
        return torch.ops.forcetune.triton_contraction_value(structure, tables.dims, self.kinds, x, coefficients, h)

    def pull(self, g: list[Tensor], x: list[Tensor], coefficients: Tensor, wanted: list[bool]) -> list[Tensor]:
        return self._pulled(g, x, coefficients, [], wanted)

    def _pulled(
        self, g: list[Tensor], x: list[Tensor], coefficients: Tensor, h: list[Tensor], wanted: list[bool]
    ) -> list[Tensor]:
        tables = self.tables
        structure = [one.on(x[0].device) for one in (tables.first_use, tables.uses, tables.entries)]
        return torch.ops.forcetune.triton_contraction_pull(
            structure, self.kinds, self.first_atom, g, x, coefficients, h, wanted
        )

    def moved(
        self, g: list[Tensor], x: list[Tensor], coefficients: Tensor, h: list[Tensor], wanted: list[bool]
    ) -> list[Tensor]:
        by_g, *others = wanted
        outer = self._values(x, coefficients, h) if by_g else []
        return [*outer, *(self._pulled(g, x, coefficients, h, others) if any(others) else [])]


def contract(
    tables: TermTables,
    form: SparseForm,
    plan: Plan,
    x: Sequence[Tensor],
    coefficients: Tensor,
    *,
    phase: Phase | None = None,
    trains: bool = True,
) -> tuple[Tensor, ...]:
    """Every output irrep, (atoms, dim, channels), on a CUDA device.

    Args:
        tables: of
        form: the polynomials.
        plan: of the batch, whose atoms are grouped by species.
        x: (atoms, dim, channels) of each input irrep.
        coefficients: (species present, 1, terms, channels), or of one species for a contraction that knows none.
        phase: which derivatives are wanted.
        trains: whether x depends on trainable weights.

    Returns:
        Differentiable twice, but for second derivatives by the coefficients.
    """
    folded = coefficients.squeeze(1)
    shared = len(folded) == 1
    kinds = torch.zeros_like(plan.species) if shared else torch.searchsorted(plan.present, plan.species)
    bounds = torch.arange(len(folded) + 1, device=kinds.device)
    setting = _TritonSetting(
        form, plan.counts, phase or Phase(), trains, tables, kinds, torch.searchsorted(kinds, bounds)
    )
    return run(setting, x, folded)
