"""What an adapter changed: by site, path and element for weights, over data for gates, and two adapters compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from forcetune.adapters.attach import Adapter, require_adapter
from forcetune.adapters.combined import CombinedActivation
from forcetune.adapters.summaries import GateChange, PathChange
from forcetune.adapters.updates import ActivationUpdate, WeightUpdate
from forcetune.adapters.updates.gate import GateActivation
from forcetune.adapters.updates.shift import ShiftActivation
from forcetune.backbones.protocol import Backbone, Site, WeightPath
from forcetune.errors import InputError

SINGULAR_VALUES = 8


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything an adapter changed."""

    method: str
    paths: tuple[PathChange, ...]
    gates: tuple[GateChange, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def weight_changes(backbone: Backbone) -> tuple[PathChange, ...]:
    """The change of every path that a weight update acts on.

    Raises:
        InputError: no adapter is attached.
    """
    adapter = require_adapter(backbone)
    changes: list[PathChange] = []
    for site, weight, delta in _weight_updates(backbone):
        # what no weight can absorb stands beside it and is none of its changes
        update = " + ".join(dict.fromkeys(one.name for one in adapter.updates_at(site) if one.mergeable))
        for path in site.paths:
            place = slice(path.start, path.start + path.size)
            old, new = weight[place].view(path.shape), delta[place].view(path.shape)
            changes.append(_path_change(site, path, update, old, new, backbone.elements))
    return tuple(changes)


def _weight_updates(backbone: Backbone) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """(site, flat W, flat ΔW) of every site with a weight update, on the CPU in float64."""
    adapter = require_adapter(backbone)
    with torch.no_grad():
        for site in adapter.sites:
            part = adapter.part(site, WeightUpdate)
            if part is not None:
                weight = backbone.model.get_submodule(site.module)._parameters[site.parameter]
                assert weight is not None
                change = part(weight) - weight
                yield site, weight.detach().reshape(-1).cpu().double(), change.reshape(-1).cpu().double()


def _path_change(
    site: Site, path: WeightPath, update: str, weight: Tensor, delta: Tensor, elements: Sequence[int]
) -> PathChange:
    norm = float(torch.linalg.vector_norm(weight)) or 1.0
    matrix = delta.reshape(-1, path.shape[-1]) if len(path.shape) > 1 else delta.reshape(1, -1)
    values = torch.linalg.svdvals(matrix)
    largest = float(values[0]) if len(values) else 0.0
    size = float(torch.linalg.vector_norm(delta))
    return PathChange(
        site=site.name,
        kind=site.kind,
        path=path.name,
        update=update,
        size=path.size,
        relative=size / norm,
        changed=float((delta != 0).double().mean()),
        singular=tuple(float(value) / norm for value in values[:SINGULAR_VALUES]),
        stable_rank=(size / largest) ** 2 if largest > 0 else 0.0,
        channels=float((matrix != 0).any(dim=1 if path.transposed else 0).double().mean()),
        elements=_by_element(path, weight, delta, elements),
    )


def _by_element(path: WeightPath, weight: Tensor, delta: Tensor, elements: Sequence[int]) -> dict[str, float]:
    count = len(elements)
    if path.by_element is None or path.by_element[1] != count:
        return {}
    old, new = (tensor.reshape(path.by_element).transpose(0, 1).reshape(count, -1) for tensor in (weight, delta))
    ratios = torch.linalg.vector_norm(new, dim=1) / torch.linalg.vector_norm(old, dim=1).clamp(min=1e-300)
    return {chemical_symbols[number]: float(ratio) for number, ratio in zip(elements, ratios, strict=True)}


def _watchable_parts(adapter: Adapter) -> Iterator[tuple[str, GateActivation | ShiftActivation]]:
    """Every gate and shift by the name of its site; those of a combination have the name of their adapter behind it."""
    for site in adapter.sites:
        part = adapter.part(site, ActivationUpdate)
        if isinstance(part, CombinedActivation):
            for member, member_part in part.parts().items():
                if isinstance(member_part, GateActivation | ShiftActivation):
                    yield f"{site.name} ({member})", member_part
        elif isinstance(part, GateActivation | ShiftActivation):
            yield site.name, part


@contextmanager
def recorded_gates(backbone: Backbone) -> Iterator[list[GateChange]]:
    """Within this context every prediction is watched; afterwards the list holds what the gates did.

    Raises:
        InputError: no adapter is attached.
    """
    adapter = require_adapter(backbone)
    seen: dict[tuple[str, int, str], list[np.ndarray]] = {}
    outputs: dict[tuple[str, int], list[float]] = {}
    watched = list(_watchable_parts(adapter))
    changes: list[GateChange] = []

    def watch(name: str, gate: GateActivation | ShiftActivation) -> Any:
        def look(shifts: Tensor | None, gains: Tensor | None, blocks: Sequence[Tensor]) -> None:
            for index, (shift, gain) in enumerate(gate.per_block(shifts, gains)):
                value, quantity = (shift, "shift") if shift is not None else (gain, "gain")
                if value is not None:
                    seen.setdefault((name, index, quantity), []).append(value.detach().double().cpu().numpy())
                    outputs.setdefault((name, index), []).append(float(blocks[index].detach().square().mean()))

        return look

    for name, gate in watched:
        gate.watcher = watch(name, gate)
    try:
        yield changes
    finally:
        for _, gate in watched:
            gate.watcher = None
    gates = dict(watched)
    for (name, index, quantity), values in seen.items():
        block = gates[name].blocks_out[index]
        numbers = np.concatenate([value.ravel() for value in values])
        if quantity == "shift":
            numbers = numbers / (np.sqrt(np.mean(outputs[name, index])) or 1.0)
        low, high = np.percentile(numbers, (5, 95))
        statistics = float(numbers.mean()), float(numbers.std()), float(low), float(high)
        changes.append(GateChange(name, block.irrep, block.multiplicity, quantity, *statistics))


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike two adapters of one base changed it.

    Attributes:
        weights: 1 − R² between their ΔW, over all weights that either could change; 0 is the same, 1 unrelated.
        paths: 1 − R² between the relative changes of their sites.
        shared: weights that both changed, as a share of those that either did; 0 where neither did.
        shared_by_chance: the same if each had changed as many weights of every path as it did, at random places.
    """

    weights: float
    paths: float
    shared: float
    shared_by_chance: float


def likeness(one: Backbone, other: Backbone) -> Likeness:
    """Compare the adapters attached to two copies of a base.

    Where the copies were cut to different elements, weights that belong to an element are left out.

    Raises:
        InputError: the bases differ, or one changes no weights.
    """
    same_elements = tuple(one.elements) == tuple(other.elements)
    first, second = (dict(_compared(backbone, same_elements)) for backbone in (one, other))
    if not first or not second:
        raise InputError("one of the adapters changes no weights (gates only), so there is nothing to compare.")
    deltas: list[tuple[Tensor, Tensor]] = []
    squares: dict[str, list[float]] = {}
    counts = _ChangedCounts()
    for key in sorted(set(first) | set(second)):
        weight = first[key][0] if key in first else second[key][0]
        if key in first and key in second and not torch.equal(first[key][0], second[key][0]):
            raise InputError(f"the adapters belong to different bases: {key[0]} differs.")
        pair = [side[key][1] if key in side else torch.zeros_like(weight) for side in (first, second)]
        deltas.append((pair[0], pair[1]))
        counts.add(pair[0] != 0, pair[1] != 0)
        sums = squares.setdefault(key[0], [0.0, 0.0, 0.0])
        for place, tensor in enumerate((weight, *pair)):
            sums[place] += float(tensor.square().sum())
    ratios = np.sqrt([[sums[1] / (sums[0] or 1.0), sums[2] / (sums[0] or 1.0)] for sums in squares.values()])
    left, right = (torch.cat([pair[i] for pair in deltas]).numpy() for i in (0, 1))
    return Likeness(_unexplained(left, right), _unexplained(*ratios.T), *counts.shares())


def _compared(backbone: Backbone, of_elements: bool) -> Iterator[tuple[tuple[str, str], tuple[Tensor, Tensor]]]:
    """Names of site and path, and the flat W and ΔW of every path that is changed; of weights of elements if wanted."""
    for site, weight, delta in _weight_updates(backbone):
        for path in site.paths:
            if of_elements or path.by_element is None:
                place = slice(path.start, path.start + path.size)
                yield (site.name, path.name), (weight[place], delta[place])


class _ChangedCounts:
    """Counts of weights that two adapters changed, path by path."""

    def __init__(self) -> None:
        self.both = self.either = 0
        self.expected = 0.0

    def add(self, one: Tensor, other: Tensor) -> None:
        """Which weights of a path were changed by either adapter."""
        counts = int(one.sum()), int(other.sum())
        self.both += int((one & other).sum())
        self.either += int((one | other).sum())
        self.expected += counts[0] * counts[1] / len(one)

    def shares(self) -> tuple[float, float]:
        """Changed by both of those changed by either, and the same by chance."""
        changed = self.both + self.either
        if not changed:
            return 0.0, 0.0
        return self.both / self.either, self.expected / (changed - self.expected)


def _unexplained(one: np.ndarray, other: np.ndarray) -> float:
    """1 − R² of a straight line through two patterns; 1 where one of them is constant."""
    if one.std() == 0 or other.std() == 0:
        return 1.0
    return float(1 - np.corrcoef(one, other)[0, 1] ** 2)
