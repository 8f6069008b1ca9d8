"""Radial weights of networks that do not train, as splines of the distance with an error of about rounding.

A radial network has one argument, the distance (and the elements of a pair where they transform it). Of a frozen one
a spline of degree 7 with uniform knots has the same values to 1e-13 and the same slopes to 1e-11 of the largest, for a
fraction of the work; it has six continuous derivatives, and forces are the exact slopes of its energies. Where no table
of bearable size gets that close, such as across a kink of an activation, the network itself is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from forcetune.kernels.compiled.choice import Kernels, takes_compiled
from forcetune.kernels.compiled.convolution_form import SPLINE_ROWS
from forcetune.kernels.compiled.splined_convolution import SplinedWeights
from forcetune.kernels.phase import Phase
from forcetune.kernels.radial import RadialNetwork
from forcetune.kernels.step import Step, can_train

DEGREE = SPLINE_ROWS - 1

TOLERANCE = 1e-13
"""Largest error of a radial weight between the knots, of the largest value of that weight."""

FEWEST, MOST = 512, 4096
"""Intervals between 0 and the cutoff."""

FIRST, LEAST = 0.04, 0.06
"""Of the cutoff: where tables begin, and from where on they are used, as splines are less accurate at their ends."""

WORTHWHILE, NEARLY = 8, 1e-10
"""Twice as many intervals have to make an error above the second number so many times smaller, or no more are tried."""

LARGEST = 2**23
"""Numbers that the tables of a model may have."""

Function = Callable[[Tensor, Any], Sequence[Tensor]]
Splined = Mapping[nn.Module, SplinedWeights] | None


class TooCloseError(RuntimeError):
    """A distance is shorter than those that tables begin with."""


# ---- tables ----------------------------------------------------------------------------------------------------------


def _pieces() -> np.ndarray:
    """(powers of t, rows): the polynomials of the uniform B-splines that are not 0 on an interval, t from 0 to 1."""
    coefficients = np.zeros((DEGREE + 1, DEGREE + 1))
    for row in range(DEGREE + 1):
        for i in range(DEGREE - row + 1):
            sign = (-1) ** i * math.comb(DEGREE + 1, i)
            for power in range(DEGREE + 1):
                coefficients[power, row] += sign * math.comb(DEGREE, power) * (DEGREE - row - i) ** (DEGREE - power)
    return coefficients / math.factorial(DEGREE)


_PIECES = torch.from_numpy(_pieces())
_SLOPES = torch.arange(1, DEGREE + 1, dtype=torch.float64).unsqueeze(1) * _PIECES[1:]


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the knots are; distances are counted in cutoffs.

    Attributes:
        breaks: ascending, from where the tables begin to 1; between neighbours the functions are smooth.
        intervals: between neighbouring breaks.
    """

    breaks: tuple[float, ...]
    intervals: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(count + DEGREE for count in self.intervals)

    def spans(self) -> Iterator[tuple[float, float, int]]:
        """First and last distance and intervals between two breaks."""
        for (first, last), count in zip(pairwise(self.breaks), self.intervals, strict=True):
            yield first, last, count


def _grid(breaks: Sequence[float], density: int) -> Grid:
    whole = (FIRST, *(b for b in breaks if FIRST < b < 1), 1.0)
    counts = tuple(max(2 * DEGREE, math.ceil(density * (last - first))) for first, last in pairwise(whole))
    return Grid(whole, counts)


def _rows(first: float, last: float, count: int, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Coefficients of the spline through values at all knots, and between those next to the ends."""
    from scipy.interpolate import make_interp_spline  # takes half a second, which few programs need

    step = (last - first) / count
    further = step * (np.arange(DEGREE // 2) + 0.5)
    places = np.sort(np.concatenate((np.linspace(first, last, count + 1), first + further, last - further)))
    knots = first + step * np.arange(-DEGREE, count + DEGREE + 1)
    knots[DEGREE], knots[-DEGREE - 1] = first, last
    return np.asarray(make_interp_spline(places, function(places), k=DEGREE, t=knots).c)


def _locate(lengths: Tensor, kinds: Tensor, breaks: list[float], intervals: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    distances = lengths.detach().double().view(-1)
    if distances.numel() and not float(distances.min()) >= LEAST:  # what is no number, too
        raise TooCloseError(f"a distance is shorter than {LEAST} of the cutoff")
    grid = Grid(tuple(breaks), tuple(intervals))
    part = torch.bucketize(distances, distances.new_tensor(breaks[1:-1]), right=True)
    firsts, steps, counts, starts = [], [], [], [0]
    for first, last, count in grid.spans():
        firsts.append(first)
        steps.append((last - first) / count)
        counts.append(count)
        starts.append(starts[-1] + count + DEGREE)
    first, step = (distances.new_tensor(values)[part] for values in (firsts, steps))
    along = (distances - first) / step
    most = part.new_tensor(counts)[part] - 1
    interval = torch.minimum(along, most.double()).long()
    powers = (along - interval).unsqueeze(1).pow(torch.arange(DEGREE + 1, dtype=torch.float64))
    inside = (distances < breaks[-1]).unsqueeze(1)
    weights = (powers @ _PIECES) * inside
    slopes = (powers[:, :-1] @ _SLOPES) * (inside / step.unsqueeze(1))
    places = part.new_tensor(starts)[part] + interval + grid.rows * kinds
    return places, weights.to(lengths.dtype), slopes.to(lengths.dtype)


def _locate_meta(
    lengths: Tensor, kinds: Tensor, breaks: list[float], intervals: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(lengths), DEGREE + 1)
    return torch.empty_like(kinds), lengths.new_empty(shape), lengths.new_empty(shape)


_LIBRARY = torch.library.Library("forcetune", "FRAGMENT")
_LIBRARY.define(
    "spline_locate(Tensor lengths, Tensor kinds, float[] breaks, int[] intervals) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("spline_locate", _locate, "CPU")
_LIBRARY.impl("spline_locate", _locate_meta, "Meta")


@dataclass(frozen=True, slots=True)
class Tables:
    """Splines of all radial networks of a model.

    Attributes:
        grid: of all of them.
        values: for each network the rows of its paths, one path after another, flat.
        error: the largest of a radial weight, of its largest value.
    """

    grid: Grid
    values: tuple[Tensor, ...]
    error: float


def tabulate(
    function: Function, kinds: Sequence[Any], breaks: Sequence[float], channels: Sequence[Sequence[int]]
) -> Tables | None:
    """Splines of functions of the distance.

    Args:
        function: from (n, 1) distances over the cutoff, float64, and a kind to the values of each network,
            (n, outputs). From the cutoff on they are 0.
        kinds: of pairs, which have their own tables.
        breaks: where the functions are not smooth, over the cutoff.
        channels: for each network those of each path.

    Returns:
        None where they would be too large or not accurate enough.
    """
    outputs = sum(map(sum, channels))
    density, coarser = FEWEST, math.inf
    while density <= MOST:
        grid = _grid(breaks, density)
        if grid.rows * outputs * len(kinds) > LARGEST:
            return None
        rows_of_kinds, error = [], 0.0
        for kind in kinds:
            rows, kind_error = _tabulate_kind(function, kind, grid)
            rows_of_kinds.append(rows)
            error = max(error, kind_error)
            if error > TOLERANCE:
                break
        if error <= TOLERANCE:
            return Tables(grid, tuple(_split_by_path(rows_of_kinds, channels)), error)
        # a smooth function's error falls by 2⁸ at each doubling; of others no density is enough
        if error > NEARLY and not error < coarser / WORTHWHILE:
            return None
        density, coarser = 2 * density, error
    return None


def _tabulate_kind(function: Function, kind: Any, grid: Grid) -> tuple[np.ndarray, float]:
    """(rows, outputs) of all networks together, and their error."""
    parts, errors, sizes = [], [], []
    for first, last, count in grid.spans():

        def values(places: np.ndarray) -> np.ndarray:
            # the end of a span belongs to it, whatever the function does behind
            inner = np.clip(places, first, np.nextafter(last, 0))  # noqa: B023 (called within the turn)
            outputs = function(torch.from_numpy(inner).unsqueeze(1), kind)
            return torch.cat(list(outputs), dim=1).numpy()

        rows = _rows(first, last, count, values)
        parts.append(rows)
        step = (last - first) / count
        between = np.concatenate([first + step * (np.arange(count) + offset) for offset in (0.21, 0.5, 0.83)])
        between = between[between > LEAST]
        expected = values(between)
        places, weights, _ = _locate(
            torch.from_numpy(between).unsqueeze(1), torch.zeros(len(between), dtype=torch.int64), [first, last], [count]
        )
        spline = np.zeros_like(expected)
        for row in range(DEGREE + 1):
            spline += weights[:, row : row + 1].numpy() * rows[places.numpy() + row]
        errors.append(np.abs(spline - expected).max(axis=0, initial=0.0))
        sizes.append(np.abs(expected).max(axis=0, initial=0.0))
    beyond = function(torch.tensor([[1.0], [1.5]], dtype=torch.float64), kind)
    errors.append(torch.cat(list(beyond), dim=1).abs().numpy().max(axis=0, initial=0.0))
    size = np.max(sizes, axis=0)
    # weights that are hardly there need not be better than others
    size = np.maximum(size, 1e-3 * size.max(initial=0.0))
    error = float((np.max(errors, axis=0) / np.where(size > 0, size, 1.0)).max(initial=0.0))
    return np.concatenate(parts), error if math.isfinite(error) else math.inf


def _split_by_path(rows_of_kinds: Sequence[np.ndarray], channels: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """The flat table of each convolution, its paths one after another."""
    rows = np.concatenate(rows_of_kinds)
    start = 0
    for paths in channels:
        parts = []
        for width in paths:
            parts.append(rows[:, start : start + width].reshape(-1))
            start += width
        yield torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.float64)


# ---- of a model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RadialFunctions:
    """The radial networks of a model as functions of the distance.

    Attributes:
        function: makes what :func:`tabulate` takes, from the weights as they are now, in float64.
        networks: that give the radial weights of each convolution.
        channels: of the paths of each convolution.
        modules: all that the functions depend on.
        breaks: as :func:`tabulate` takes them.
    """

    function: Callable[[], Function]
    networks: Sequence[nn.Module]
    channels: Sequence[Sequence[int]]
    modules: Sequence[nn.Module]
    breaks: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class _CachedTables:
    """Tables, and the state of the weights that they were made from."""

    state: list[tuple[int, int]]
    held: list[Tensor]
    kinds: tuple[Any, ...]
    dtype: torch.dtype
    tables: Tables | None


class RadialSplines:
    """Tables of a model, until one of its radial weights changes."""

    def __init__(self) -> None:
        self._cache: _CachedTables | None = None

    def __reduce__(self) -> Any:
        return RadialSplines, ()

    def at(
        self,
        functions: RadialFunctions,
        phase: Phase,
        kernels: Kernels,
        ratio: Tensor,
        kinds: Sequence[Any] = (0,),
        kind_of_pair: Tensor | None = None,
    ) -> Splined:
        """Radial weights of all convolutions of a pass, by their networks.

        Args:
            functions: of the model.
            phase: of the pass.
            kernels: setting of the model.
            ratio: (pairs, 1) distances over the cutoff.
            kinds: that tables are needed for.
            kind_of_pair: (pairs,) index of its kind; None where there is one.

        Returns:
            None where the networks themselves are to be computed: they train, second derivatives by the geometry are
            wanted, atoms are too close, kernels are PyTorch's, or there is no accurate table.
        """
        if phase.curved or not takes_compiled(kernels, ratio) or any(map(can_train, functions.modules)):
            return None
        tables = self._tables(functions, tuple(kinds), ratio.dtype)
        if tables is None:
            return None
        grid = tables.grid
        index = torch.zeros(len(ratio), dtype=torch.int64) if kind_of_pair is None else kind_of_pair
        try:
            places, weights, slopes = torch.ops.forcetune.spline_locate(
                ratio.detach(), index, list(grid.breaks), list(grid.intervals)
            )
        except TooCloseError:
            return None
        return {
            network: SplinedWeights(ratio, values, places, weights, slopes)
            for network, values in zip(functions.networks, tables.values, strict=True)
        }

    def _tables(self, functions: RadialFunctions, kinds: tuple[Any, ...], dtype: torch.dtype) -> Tables | None:
        weights = [t for module in functions.modules for t in (*module.parameters(), *module.buffers())]
        try:
            state = [(tensor.data_ptr(), tensor._version) for tensor in weights]
        except RuntimeError:
            return None  # nothing counts the changes of tensors made in inference mode
        cached = self._cache  # other threads may put theirs in its place
        if cached is None or cached.state != state or cached.kinds != kinds or cached.dtype != dtype:
            with torch.no_grad():
                tables = tabulate(functions.function(), kinds, functions.breaks, functions.channels)
            if tables is not None:
                tables = Tables(tables.grid, tuple(value.to(dtype) for value in tables.values), tables.error)
            # memory that is held gets no other weights
            held = [tensor.detach() for tensor in weights]
            self._cache = cached = _CachedTables(state, held, kinds, dtype, tables)
        return cached.tables


def radial_weights(network: nn.Module, step: Step) -> Tensor | SplinedWeights:
    """Radial weights of a convolution, with the envelope where it belongs to them."""
    if step.splined is not None and network in step.splined:
        return step.splined[network]
    options = {"twice": step.phase.twice} if isinstance(network, RadialNetwork) else {}
    weights = network(step.radial, **options)
    return weights if step.cutoff is None else weights * step.cutoff
