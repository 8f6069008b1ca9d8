"""What an adapter trains and what it changed, in numbers: rows of tables, of reports and of ``results.json``."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, computed_field


@dataclass(frozen=True, slots=True)
class SiteCoverage:
    """What a method trains at the sites of one kind.

    Attributes:
        kind: site kind.
        update: description of the updates, or ``Frozen``.
        sites: number of sites of this kind.
        covered: weights at sites that are updated.
        total: weights at all sites of this kind.
        trainable: parameters of the updates.
    """

    kind: str
    update: str
    sites: int
    covered: int
    total: int
    trainable: int


class Sparsity(BaseModel):
    """How many weights a sparse update changes.

    Attributes:
        changed: weights that are not what they were.
        wrapped: weights that could have changed.
        total: weights of the model.
    """

    model_config = ConfigDict(frozen=True)

    changed: int
    wrapped: int
    total: int

    @computed_field
    @property
    def zeros_of_wrapped(self) -> float:
        """Share of the wrapped weights that did not change."""
        return 1 - self.changed / self.wrapped

    @computed_field
    @property
    def zeros_of_all(self) -> float:
        """Share of all weights that did not change."""
        return 1 - self.changed / self.total


@dataclass(frozen=True, slots=True)
class PathChange:
    """The change ΔW = W' − W of one path of a weight.

    Attributes:
        site, kind, path: where; the path of an equivariant layer reads ``order in -> order out``.
        update: name of the update; of a combination those of all its adapters.
        size: weights of the path.
        relative: ‖ΔW‖ / ‖W‖ (Frobenius).
        changed: share of weights with ΔW ≠ 0.
        singular: the largest singular values of ΔW (fan in, fan out), divided by ‖W‖.
        stable_rank: ‖ΔW‖² over the square of its largest singular value, 0 where nothing changed.
        channels: share of the output channels with any change.
        elements: ‖ΔW‖ / ‖W‖ by element symbol, for weights that each element has its own of.
    """

    site: str
    kind: str
    path: str
    update: str
    size: int
    relative: float
    changed: float
    singular: tuple[float, ...]
    stable_rank: float
    channels: float
    elements: dict[str, float]


@dataclass(frozen=True, slots=True)
class GateChange:
    """What a gate did over data, for one block of its output.

    Attributes:
        site: of the gate.
        irrep: of the block, such as ``1o``.
        channels: multiplicity.
        quantity: ``gain`` (factor, 1 changes nothing) or ``shift`` (added, in units of the output's r.m.s.).
        mean, std: over atoms and channels.
        low, high: 5th and 95th percentile.
    """

    site: str
    irrep: str
    channels: int
    quantity: str
    mean: float
    std: float
    low: float
    high: float
