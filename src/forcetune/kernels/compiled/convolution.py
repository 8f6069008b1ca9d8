"""The convolution by compiled loops, with first and second derivatives: :mod:`forcetune.kernels.convolution` on a CPU.

The sums over edges are operations of PyTorch, so that a recorded step has them, too.
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

from forcetune.kernels.compiled import assembly, convolution_code, convolution_form, threads
from forcetune.kernels.compiled.convolution_code import TOGETHER
from forcetune.kernels.compiled.convolution_form import SLOTS, Shape, Slot
from forcetune.kernels.compiled.machine import Machine, compiled, source_hash, target
from forcetune.kernels.convolution import Path, Paths
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.phase import Phase

_Flags = tuple[bool, bool, bool]


# ---- operations ------------------------------------------------------------------------------------------------------


class Structure:
    """The paths of a convolution, with what the tables of its functions have in common."""

    def __init__(self, flat: tuple[int, ...]) -> None:
        rows = [flat[start : start + 7] for start in range(0, len(flat), 7)]
        self.paths = [Path(s, c, n, k, bool(odd), group, column) for s, c, n, k, odd, group, column in rows]
        groups = max(path.group for path in self.paths) + 1
        self.groups = [
            (
                next(path.dim_out for path in self.paths if path.group == group),
                max(path.column + path.channels for path in self.paths if path.group == group),
            )
            for group in range(groups)
        ]
        self.sources = np.array([path.source for path in self.paths])
        self.members = np.array([path.group for path in self.paths])
        self.columns = np.array([path.column for path in self.paths])
        self.radial_places = np.cumsum([0, *(path.channels for path in self.paths)])[:-1]
        self.angular_places = np.cumsum([0, *(path.dim_in * path.dim_out for path in self.paths)])[:-1]
        self.work = sum(path.dim_in * path.dim_out * path.channels for path in self.paths)

    @functools.lru_cache(maxsize=64)  # noqa: B019 (structures are few, and live as long as the process)
    def machine(
        self,
        dtype: str,
        moved: tuple[_Flags, ...] | None,
        wanted: tuple[_Flags, ...] | None,
        splined: bool = False,
    ) -> Any:
        """The function of all paths, and the addresses of the paths' own."""
        shapes = [
            Shape(
                path.dim_in,
                path.dim_out,
                path.channels,
                path.odd,
                None if moved is None else moved[index],
                None if wanted is None else wanted[index],
                splined,
            )
            for index, path in enumerate(self.paths)
        ]
        own = target(dtype)

        def text() -> str:
            functions = [convolution_code.write(shape, own) for shape in dict.fromkeys(shapes)]
            driver = convolution_code.driver() if splined else convolution_code.driver(TOGETHER)
            return assembly.module_text(functions) + driver

        sources = source_hash(*(str(file.__file__) for file in (assembly, convolution_code, convolution_form)))
        machine: Machine = compiled(repr((sources, own, sorted({shape.name for shape in shapes}))), text)
        addresses = np.array([machine.address(shape.name) for shape in shapes], dtype=np.int64)
        return threads.function(machine.address("run")), addresses


@functools.lru_cache(maxsize=256)
def get_structure(flat: tuple[int, ...]) -> Structure:
    return Structure(flat)


def dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


class Table:
    """The tables of all paths, for one call."""

    def __init__(self, structure: Structure, angular: Tensor, addresses: np.ndarray) -> None:
        self.structure, self.size = structure, angular.element_size()
        self.whole = np.zeros(1 + SLOTS * len(structure.paths), dtype=np.int64)
        self.whole[0] = len(structure.paths)
        self.rows = self.whole[1:].reshape(-1, SLOTS)
        self.rows[:, Slot.FUNCTION] = addresses
        self.rows[:, Slot.ANGULAR_STRIDE] = angular.shape[1]
        self.pairwise(Slot.ANGULAR, angular, structure.angular_places)

    def radial(self, values: Tensor) -> None:
        self.rows[:, Slot.RADIAL_STRIDE] = values.shape[1]
        self.pairwise(Slot.RADIAL, values, self.structure.radial_places)

    def pairwise(self, slot: Slot, tensor: Tensor | None, places: np.ndarray) -> None:
        if tensor is not None:
            self.rows[:, slot] = tensor.data_ptr() + places * self.size

    def features(self, slot: Slot, tensors: Sequence[Tensor | None]) -> None:
        addresses = np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        self.rows[:, slot] = addresses[self.structure.sources]

    def outer(self, tensors: Sequence[Tensor]) -> None:
        widths = np.array([width for _, width in self.structure.groups])
        strides = np.array([dim * width for dim, width in self.structure.groups])
        addresses = np.array([tensor.data_ptr() for tensor in tensors])
        members, columns = self.structure.members, self.structure.columns
        self.rows[:, Slot.OUTER] = addresses[members] + columns * self.size
        self.rows[:, Slot.OUTER_WIDTH], self.rows[:, Slot.OUTER_STRIDE] = widths[members], strides[members]

    def moved(self, values: Sequence[Tensor | None]) -> None:
        self.pairwise(Slot.MOVED_RADIAL, values[0], self.structure.radial_places)
        self.pairwise(Slot.MOVED_ANGULAR, values[1], self.structure.angular_places)
        self.features(Slot.MOVED_FEATURES, values[2:])


def spread_out(values: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    """Tensors at the places where there is one."""
    left = iter(values)
    return [next(left) if here else None for here in present]


def spread_flags(structure: Structure, present: Sequence[bool]) -> tuple[_Flags, ...]:
    """For each path whether something is there for R, T and x."""
    return tuple((present[0], present[1], present[2 + path.source]) for path in structure.paths)


def _gather(
    paths: list[int],
    starts: Tensor,
    edges: Tensor,
    radial: Tensor,
    angular: Tensor,
    features: list[Tensor],
    moved: list[Tensor],
    present: list[bool],
) -> list[Tensor]:
    structure = get_structure(tuple(paths))
    n_atoms = len(starts) - 1
    outputs = [radial.new_empty(n_atoms, dim, width) for dim, width in structure.groups]
    flags = spread_flags(structure, present) if present else None
    run, addresses = structure.machine(dtype_name(radial), flags, None)
    table = Table(structure, angular, addresses)
    table.radial(radial)
    table.rows[:, Slot.STARTS], table.rows[:, Slot.EDGES] = starts.data_ptr(), edges.data_ptr()
    table.features(Slot.FEATURES, features)
    table.outer(outputs)
    if present:
        table.moved(spread_out(moved, present))
    before = threads.integers(starts)
    count = threads.thread_count(structure.work * float(before[-1]) * (2 if present else 1))
    bounds = threads.balanced(before, count) if count > 1 else [0, n_atoms]
    pointer = table.whole.ctypes.data
    threads.run([(run, pointer, first, last) for first, last in itertools.pairwise(bounds)])
    return outputs


def _pull(
    paths: list[int],
    directions: Tensor,
    senders: Tensor,
    receivers: Tensor,
    outer: list[Tensor],
    radial: Tensor,
    angular: Tensor,
    features: list[Tensor],
    moved: list[Tensor],
    present: list[bool],
    wanted: list[bool],
) -> list[Tensor]:
    structure = get_structure(tuple(paths))
    to_radial = torch.empty_like(radial) if wanted[0] else None
    to_angular = torch.empty_like(angular) if wanted[1] else None
    sizes = [x.numel() if want else 0 for x, want in zip(features, wanted[2:], strict=True)]
    n_pairs = len(radial)
    count = threads.thread_count(structure.work * 2.0 * n_pairs * (1 + wanted[1]) * (2 if present else 1))
    # each thread adds to features of its own, as both ends of a pair may belong to other threads' pairs, too
    sums = radial.new_zeros(count, sum(sizes))
    flags = spread_flags(structure, present) if present else None
    run, addresses = structure.machine(dtype_name(radial), flags, spread_flags(structure, wanted))
    calls = []
    tables = []
    for number in range(count):
        table = Table(structure, angular, addresses)
        table.radial(radial)
        table.rows[:, Slot.DIRECTIONS] = directions.data_ptr()
        table.rows[:, Slot.SENDER], table.rows[:, Slot.RECEIVER] = senders.data_ptr(), receivers.data_ptr()
        table.features(Slot.FEATURES, features)
        table.outer(outer)
        if present:
            table.moved(spread_out(moved, present))
        table.pairwise(Slot.TO_RADIAL, to_radial, structure.radial_places)
        table.pairwise(Slot.TO_ANGULAR, to_angular, structure.angular_places)
        own = sums[number].split(sizes)
        table.features(Slot.TO_FEATURES, own)
        tables.append(table)
        calls.append((run, table.whole.ctypes.data, n_pairs * number // count, n_pairs * (number + 1) // count))
    threads.run(calls)
    total = sums[0] if count == 1 else sums.sum(0)
    parts = total.split(sizes)
    to_features = [part.view(x.shape) for part, x, want in zip(parts, features, wanted[2:], strict=True) if want]
    return [value for value in (to_radial, to_angular) if value is not None] + to_features


def _gather_meta(paths: list[int], starts: Tensor, edges: Tensor, radial: Tensor, *others: Any) -> list[Tensor]:
    return [radial.new_empty(len(starts) - 1, dim, width) for dim, width in get_structure(tuple(paths)).groups]


def _pull_meta(
    paths: list[int],
    directions: Tensor,
    senders: Tensor,
    receivers: Tensor,
    outer: list[Tensor],
    radial: Tensor,
    angular: Tensor,
    features: list[Tensor],
    moved: list[Tensor],
    present: list[bool],
    wanted: list[bool],
) -> list[Tensor]:
    return [torch.empty_like(x) for x, want in zip((radial, angular, *features), wanted, strict=True) if want]


_LIBRARY = torch.library.Library("forcetune", "FRAGMENT")
_LIBRARY.define(
    "convolution_gather(int[] paths, Tensor starts, Tensor edges, Tensor radial, Tensor angular, Tensor[] features, "
    "Tensor[] moved, bool[] present) -> Tensor[]"
)
_LIBRARY.define(
    "convolution_pull(int[] paths, Tensor directions, Tensor senders, Tensor receivers, Tensor[] outer, Tensor radial, "
    "Tensor angular, Tensor[] features, Tensor[] moved, bool[] present, bool[] wanted) -> Tensor[]"
)
_LIBRARY.impl("convolution_gather", _gather, "CPU")
_LIBRARY.impl("convolution_pull", _pull, "CPU")
_LIBRARY.impl("convolution_gather", _gather_meta, "Meta")
_LIBRARY.impl("convolution_pull", _pull_meta, "Meta")


# ---- derivatives -----------------------------------------------------------------------------------------------------


def flat_paths(paths: Paths) -> list[int]:
    """The paths as the operations take them."""
    return [
        number
        for p in paths.paths
        for number in (p.source, p.channels, p.dim_in, p.dim_out, int(p.odd), p.group, p.column)
    ]


def contiguous(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.contiguous() for value in values]


@dataclass(frozen=True, slots=True)
class Setting:
    """A convolution and its batch; subclasses compute the sums in another way.

    Attributes:
        paths: as :func:`flat_paths` gives them.
        plan: of the batch.
        phase: which derivatives are wanted.
        geometric: whether the features depend on the geometry.
        trains: whether R and whether the features depend on trainable weights.
    """

    paths: list[int]
    plan: Plan
    phase: Phase
    geometric: bool
    trains: tuple[bool, bool]

    def wanted(self, needs: Sequence[bool]) -> list[bool]:
        """Which gradients by R, T and x are wanted."""
        radial = self.phase.wants(geometric=True, trains=self.trains[0])
        angular = self.phase.wants(geometric=True, trains=False)
        features = self.phase.wants(geometric=self.geometric, trains=self.trains[1])
        waits = [radial, angular, *[features] * (len(needs) - 2)]
        return [need and wait for need, wait in zip(needs, waits, strict=True)]

    def pull(
        self,
        outer: Sequence[Tensor],
        values: Sequence[Tensor],
        wanted: Sequence[bool],
        moved: Sequence[Tensor] = (),
        present: Sequence[bool] = (),
    ) -> list[Tensor | None]:
        """Gradients by R, T and x, None where they are not wanted."""
        if not any(wanted):
            return [None] * len(values)
        return spread_out(self.pull_wanted(outer, values, wanted, moved, present), wanted)

    def gather(
        self, values: Sequence[Tensor], moved: Sequence[Tensor] = (), present: Sequence[bool] = ()
    ) -> list[Tensor]:
        """Messages of R, T and x; with directions of those that are present, how they change along these."""
        plan, (radial, angular, *features) = self.plan, contiguous(values)
        return torch.ops.forcetune.convolution_gather(
            self.paths, plan.starts, plan.edges, radial, angular, features, contiguous(moved), list(present)
        )

    def pull_wanted(
        self,
        outer: Sequence[Tensor],
        values: Sequence[Tensor],
        wanted: Sequence[bool],
        moved: Sequence[Tensor],
        present: Sequence[bool],
    ) -> list[Tensor]:
        """Those gradients that are wanted."""
        plan, (radial, angular, *features) = self.plan, contiguous(values)
        return torch.ops.forcetune.convolution_pull(
            self.paths,
            *(plan.directions, plan.sender, plan.receiver, contiguous(outer)),
            *(radial, angular, features, contiguous(moved), list(present), list(wanted)),
        )


def convolve(
    paths: Paths,
    plan: Plan,
    radial: Tensor,
    angular: Tensor,
    features: Sequence[Tensor],
    *,
    phase: Phase | None = None,
    geometric: bool = True,
    trains: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, ...]:
    """As :func:`forcetune.kernels.convolution.convolve`, but for ``angular``.

    Args:
        paths, plan, radial, features, phase, geometric, trains: as there; on a CPU.
        angular: T of all paths side by side, (pairs, Σ dim_in · dim_out).
    """
    return run(Setting(flat_paths(paths), plan, phase or Phase(), geometric, trains), radial, angular, features)


def run(setting: Setting, radial: Tensor, angular: Tensor, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The convolution in a setting, differentiable twice; arguments as :func:`convolve`."""
    result: tuple[Tensor, ...] = _Convolution.apply(setting, radial, angular, *features)  # pyright: ignore[reportAssignmentType]
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: Setting, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.setting = setting
        ctx.save_for_backward(*values)
        return tuple(setting.gather(values))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        setting: Setting = ctx.setting
        needs = setting.wanted(ctx.needs_input_grad[1:])
        return (None, *_Pull.apply(setting, tuple(needs), len(grads), *grads, *ctx.saved_tensors))  # pyright: ignore[reportGeneralTypeIssues]


class _Pull(torch.autograd.Function):
    """Gradients of Σ g out by R, T and x."""

    @staticmethod
    def forward(
        ctx: Any, setting: Setting, needs: tuple[bool, ...], n_grads: int, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.setting, ctx.n_grads = setting, n_grads
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(setting.pull(tensors[:n_grads], tensors[n_grads:], needs))

    @staticmethod
    def _twice(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of Σ (h_R ∂_R + h_T ∂_T + h_x ∂_x) Σ g out by g, R, T and x, for directions h."""
        setting: Setting = ctx.setting
        n_grads: int = ctx.n_grads
        grads, values = ctx.saved_tensors[:n_grads], ctx.saved_tensors[n_grads:]
        present = [tangent is not None for tangent in tangents]
        if not any(present):
            return (None,) * (3 + n_grads + len(values))
        moved = [tangent for tangent in tangents if tangent is not None]
        outer: list[Tensor | None] = [None] * n_grads
        if any(ctx.needs_input_grad[3 : 3 + n_grads]):
            outer = [*setting.gather(values, moved, present)]
        wanted = setting.wanted(ctx.needs_input_grad[3 + n_grads :])
        return (None, None, None, *outer, *setting.pull(grads, values, wanted, moved, present))

    backward: Any = staticmethod(once_differentiable(_twice))
