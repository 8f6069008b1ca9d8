"""The convolution with radial weights from splines, by compiled loops; for radial networks that do not train.

Neither radial weights nor their gradients are written to memory: each is made where it is needed, from the distance of
its pair and a table that fits into the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forcetune.kernels.compiled import threads
from forcetune.kernels.compiled.convolution import (
    Table,
    dtype_name,
    flat_paths,
    get_structure,
    spread_flags,
    spread_out,
)
from forcetune.kernels.compiled.convolution_form import SPLINE_ROWS, Slot
from forcetune.kernels.convolution import Paths
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.phase import Phase

SPLINE_WORK = 2.0
"""Multiply-adds for a radial weight, in components of a path."""


@dataclass(frozen=True, slots=True)
class SplinedWeights:
    """Radial weights of a convolution as functions of the distance of each pair.

    Attributes:
        lengths: (pairs, 1); the gradient goes to them.
        table: for each path its rows of (channels,) numbers, one path after another, flat.
        places: (pairs,) the first row that a pair needs.
        weights: (pairs, rows needed) of the rows.
        slopes: their derivatives by the lengths.
    """

    lengths: Tensor
    table: Tensor
    places: Tensor
    weights: Tensor
    slopes: Tensor


# ---- operations ------------------------------------------------------------------------------------------------------


def _move(table: Table, moved: list[Tensor], present: list[bool]) -> None:
    """Directions of the lengths, T and x, as far as there are some."""
    if present:
        lengths, angular, *features = spread_out(moved, present)
        table.rows[:, Slot.MOVED_RADIAL] = 0 if lengths is None else lengths.data_ptr()
        table.pairwise(Slot.MOVED_ANGULAR, angular, table.structure.angular_places)
        table.features(Slot.MOVED_FEATURES, features)


def _spline(table: Table, values: Tensor, places: Tensor, weights: Tensor, slopes: Tensor) -> None:
    structure = table.structure
    rows = values.numel() // sum(path.channels for path in structure.paths)
    table.pairwise(Slot.RADIAL, values, structure.radial_places * rows)
    table.rows[:, Slot.PLACES], table.rows[:, Slot.WEIGHTS] = places.data_ptr(), weights.data_ptr()
    table.rows[:, Slot.SLOPES] = slopes.data_ptr()


def _gather(
    paths: list[int],
    starts: Tensor,
    edges: Tensor,
    table: Tensor,
    places: Tensor,
    weights: Tensor,
    slopes: Tensor,
    angular: Tensor,
    features: list[Tensor],
    moved: list[Tensor],
    present: list[bool],
) -> list[Tensor]:
    structure = get_structure(tuple(paths))
    n_atoms = len(starts) - 1
    outputs = [angular.new_empty(n_atoms, dim, width) for dim, width in structure.groups]
    flags = spread_flags(structure, present) if present else None
    run, addresses = structure.machine(dtype_name(angular), flags, None, True)
    own = Table(structure, angular, addresses)
    own.rows[:, Slot.STARTS], own.rows[:, Slot.EDGES] = starts.data_ptr(), edges.data_ptr()
    _spline(own, table, places, weights, slopes)
    own.features(Slot.FEATURES, features)
    own.outer(outputs)
    _move(own, moved, present)
    before = threads.integers(starts)
    count = threads.thread_count(SPLINE_WORK * structure.work * float(before[-1]) * (2 if present else 1))
    bounds = threads.balanced(before, count) if count > 1 else [0, n_atoms]
    pointer = own.whole.ctypes.data
    threads.run([(run, pointer, first, last) for first, last in itertools.pairwise(bounds)])
    return outputs


def _pull(
    paths: list[int],
    directions: Tensor,
    senders: Tensor,
    receivers: Tensor,
    outer: list[Tensor],
    table: Tensor,
    places: Tensor,
    weights: Tensor,
    slopes: Tensor,
    angular: Tensor,
    features: list[Tensor],
    moved: list[Tensor],
    present: list[bool],
    wanted: list[bool],
) -> list[Tensor]:
    if present and wanted[0]:
        raise RuntimeError("splines of radial weights have no second derivatives by the distances")
    structure = get_structure(tuple(paths))
    n_pairs = len(places)
    # one row for each path, each of which writes its own
    to_lengths = angular.new_empty(len(structure.paths), n_pairs) if wanted[0] else None
    to_angular = torch.empty_like(angular) if wanted[1] else None
    sizes = [x.numel() if want else 0 for x, want in zip(features, wanted[2:], strict=True)]
    count = threads.thread_count(SPLINE_WORK * structure.work * 2.0 * n_pairs * (1 + wanted[1]) * (2 if present else 1))
    # each thread adds to features of its own, as both ends of a pair may belong to other threads' pairs, too
    sums = angular.new_zeros(count, sum(sizes))
    flags = spread_flags(structure, present) if present else None
    run, addresses = structure.machine(dtype_name(angular), flags, spread_flags(structure, wanted), True)
    calls, tables = [], []
    for number in range(count):
        own = Table(structure, angular, addresses)
        own.rows[:, Slot.DIRECTIONS] = directions.data_ptr()
        own.rows[:, Slot.SENDER], own.rows[:, Slot.RECEIVER] = senders.data_ptr(), receivers.data_ptr()
        _spline(own, table, places, weights, slopes)
        own.features(Slot.FEATURES, features)
        own.outer(outer)
        _move(own, moved, present)
        if to_lengths is not None:
            own.rows[:, Slot.TO_LENGTHS] = [row.data_ptr() for row in to_lengths.unbind()]
        own.pairwise(Slot.TO_ANGULAR, to_angular, structure.angular_places)
        own.features(Slot.TO_FEATURES, sums[number].split(sizes))
        tables.append(own)
        calls.append((run, own.whole.ctypes.data, n_pairs * number // count, n_pairs * (number + 1) // count))
    threads.run(calls)
    total = sums[0] if count == 1 else sums.sum(0)
    to_features = [p.view(x.shape) for p, x, want in zip(total.split(sizes), features, wanted[2:], strict=True) if want]
    by_length = None if to_lengths is None else to_lengths.sum(0).unsqueeze(1)
    return [value for value in (by_length, to_angular) if value is not None] + to_features


def _gather_meta(paths: list[int], starts: Tensor, *others: Any) -> list[Tensor]:
    angular: Tensor = others[5]
    return [angular.new_empty(len(starts) - 1, dim, width) for dim, width in get_structure(tuple(paths)).groups]


def _pull_meta(paths: list[int], *others: Any) -> list[Tensor]:
    places, angular, features, wanted = others[5], others[8], others[9], others[12]
    shapes = [(len(places), 1), angular.shape, *(x.shape for x in features)]
    return [angular.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


_LIBRARY = torch.library.Library("forcetune", "FRAGMENT")
_LIBRARY.define(
    "splined_convolution_gather(int[] paths, Tensor starts, Tensor edges, Tensor table, Tensor places, Tensor weights, "
    "Tensor slopes, Tensor angular, Tensor[] features, Tensor[] moved, bool[] present) -> Tensor[]"
)
_LIBRARY.define(
    "splined_convolution_pull(int[] paths, Tensor directions, Tensor senders, Tensor receivers, Tensor[] outer, "
    "Tensor table, Tensor places, Tensor weights, Tensor slopes, Tensor angular, Tensor[] features, "
    "Tensor[] moved, bool[] present, bool[] wanted) -> Tensor[]"
)
_LIBRARY.impl("splined_convolution_gather", _gather, "CPU")
_LIBRARY.impl("splined_convolution_pull", _pull, "CPU")
_LIBRARY.impl("splined_convolution_gather", _gather_meta, "Meta")
_LIBRARY.impl("splined_convolution_pull", _pull_meta, "Meta")


# ---- derivatives -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Setting:
    paths: list[int]
    plan: Plan
    phase: Phase
    geometric: bool
    trains: bool
    radial: SplinedWeights

    def wanted(self, needs: Sequence[bool]) -> list[bool]:
        """Which gradients by the lengths, T and x are wanted."""
        geometry = self.phase.wants(geometric=True, trains=False)
        features = self.phase.wants(geometric=self.geometric, trains=self.trains)
        waits = [geometry, geometry, *[features] * (len(needs) - 2)]
        return [need and wait for need, wait in zip(needs, waits, strict=True)]

    def gather(
        self, angular: Tensor, features: Sequence[Tensor], moved: Sequence[Tensor] = (), present: Sequence[bool] = ()
    ) -> list[Tensor]:
        plan, radial = self.plan, self.radial
        return torch.ops.forcetune.splined_convolution_gather(
            *(self.paths, plan.starts, plan.edges, radial.table, radial.places, radial.weights, radial.slopes),
            *(angular, list(features), list(moved), list(present)),
        )

    def pull(
        self,
        outer: Sequence[Tensor],
        angular: Tensor,
        features: Sequence[Tensor],
        wanted: Sequence[bool],
        moved: Sequence[Tensor] = (),
        present: Sequence[bool] = (),
    ) -> list[Tensor | None]:
        """Gradients by the lengths, T and x, None where they are not wanted."""
        if not any(wanted):
            return [None] * len(wanted)
        plan, radial = self.plan, self.radial
        gradients = torch.ops.forcetune.splined_convolution_pull(
            *(self.paths, plan.directions, plan.sender, plan.receiver, list(outer)),
            *(radial.table, radial.places, radial.weights, radial.slopes, angular, list(features)),
            *(list(moved), list(present), list(wanted)),
        )
        return spread_out(gradients, wanted)


def convolve(
    paths: Paths,
    plan: Plan,
    radial: SplinedWeights,
    angular: Tensor,
    features: Sequence[Tensor],
    *,
    phase: Phase | None = None,
    geometric: bool = True,
    trains: bool = True,
) -> tuple[Tensor, ...]:
    """Messages of all paths, summed at their receivers.

    Args:
        paths, plan, angular, features, phase, geometric: as :func:`forcetune.kernels.compiled.convolution.convolve`.
        radial: weights of all paths.
        trains: whether the features depend on trainable weights.

    Returns:
        For each output irrep (atoms, dim, channels). Differentiable twice, but for second derivatives by the distances.
    """
    if radial.weights.shape[1] != SPLINE_ROWS:
        raise ValueError(f"splines of {radial.weights.shape[1]} rows: loops are for {SPLINE_ROWS}")
    setting = _Setting(flat_paths(paths), plan, phase or Phase(), geometric, trains, radial)
    # here and not in the forward pass, whose copies the second derivative would not go through
    tensors = (value.contiguous() for value in (angular, *features))
    result: tuple[Tensor, ...] = _Convolution.apply(setting, radial.lengths, *tensors)  # pyright: ignore[reportAssignmentType]
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: _Setting, lengths: Tensor, angular: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        ctx.setting = setting
        ctx.save_for_backward(lengths, angular, *features)
        return tuple(setting.gather(angular, features))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        setting: _Setting = ctx.setting
        wanted = setting.wanted(ctx.needs_input_grad[1:])
        lengths, angular, *features = ctx.saved_tensors
        outer = [grad.contiguous() for grad in grads]
        if torch.is_grad_enabled():
            return (None, *_Pull.apply(setting, wanted, len(outer), *outer, lengths, angular, *features))  # pyright: ignore[reportGeneralTypeIssues]
        return (None, *setting.pull(outer, angular, features, wanted))


class _Pull(torch.autograd.Function):
    """Gradients of Σ g out by the lengths, T and x."""

    @staticmethod
    def forward(
        ctx: Any, setting: _Setting, wanted: Sequence[bool], n_grads: int, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.setting, ctx.n_grads = setting, n_grads
        ctx.set_materialize_grads(False)
        outer, _, angular, features = _parts(tensors, n_grads)
        ctx.save_for_backward(*tensors)
        return tuple(setting.pull(outer, angular, features, wanted))

    @staticmethod
    def _twice(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of Σ g (out moved along the tangents) by g, T and x."""
        setting: _Setting = ctx.setting
        n_grads: int = ctx.n_grads
        needs: tuple[bool, ...] = ctx.needs_input_grad[3:]
        present = [tangent is not None for tangent in tangents]
        if not any(present):
            return (None,) * (3 + len(needs))
        moved = [tangent.contiguous() for tangent in tangents if tangent is not None]
        outer, _, angular, features = _parts(ctx.saved_tensors, n_grads)
        by_outer: list[Tensor | None] = [None] * n_grads
        if any(needs[:n_grads]):
            by_outer = [*setting.gather(angular, features, moved, present)]
        wanted = setting.wanted(needs[n_grads:])
        return (None, None, None, *by_outer, *setting.pull(outer, angular, features, wanted, moved, present))

    backward: Any = staticmethod(once_differentiable(_twice))


def _parts(tensors: Sequence[Tensor], n_grads: int) -> tuple[Sequence[Tensor], Tensor, Tensor, Sequence[Tensor]]:
    """g, lengths, T and x."""
    return tensors[:n_grads], tensors[n_grads], tensors[n_grads + 1], tensors[n_grads + 2 :]
