"""What forcetune asks of a foundation model, whichever library it comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from forcetune.graphs.graph import Batch

PLAN: ContextVar[tuple[Any, Any]] = ContextVar("plan", default=(None, None))
"""A backbone and how its kernels lay out the next batch, where that is known already; each thread has its own."""


class Prediction(NamedTuple):
    """What a backbone predicts for a batch.

    Attributes:
        energy: (graphs,), eV, reference energies included.
        forces: (atoms, 3), eV/Å.
        stress: (graphs, 3, 3), eV/Å³, ASE's sign, or None when not asked for.
        moments: (atoms, 3) magnetic moments, or (atoms, 1) magnitudes, μB; None of a model that knows none.
        fields: (atoms, 3) effective fields −∂E/∂s, eV per unit of the spins given; None unless the spins of the batch
            require gradients.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor | None
    moments: Tensor | None = None
    fields: Tensor | None = None

    def to(self, device: torch.device) -> Prediction:
        """The same on another device."""
        return self._each(lambda value: value.to(device))

    def detached(self) -> Prediction:
        """Without the graph that led to it."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Prediction:
        further = (None if value is None else change(value) for value in self[2:])
        return Prediction(change(self.energy), change(self.forces), *further)


class Extra(NamedTuple):
    """What an extension adds to a backbone's prediction.

    Attributes:
        energy: (graphs,), eV, or None.
        moments: as in :class:`Prediction`.
    """

    energy: Tensor | None
    moments: Tensor | None


class Extension(Protocol):
    """A further term of the energy, computed from the backbone's last node features."""

    def __call__(self, scalars: Tensor, vectors: Tensor, batch: Batch) -> Extra:
        """
        Args:
            scalars: (atoms, n_scalars) invariant node features.
            vectors: (edges, 3) from sender to receiver, Å; positions, strain and cell lead to them.
            batch: the graphs.
        """
        ...


@dataclass(frozen=True, slots=True)
class WeightPath:
    """One path of a site: a contiguous block of the flat weight that couples one irrep in to one irrep out.

    Attributes:
        name: unique within the site and independent of the library's layout, such as ``1o->1o``.
        start: first element of the block in the flattened weight.
        shape: (fan in, fan out); for contractions (elements, couplings, channels).
    """

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Site:
    """One learnable weight of the backbone with its equivariant meaning.

    Attributes:
        name: dotted name of the weight in the backbone's module.
        module: dotted name of the module that owns it.
        parameter: the weight's name in that module.
        reader: dotted name of the module whose call reads the weight; mostly the owner itself.
        kind: ``linear``, ``tensor_product``, ``radial_mlp``, ``contraction``, ``contraction_lower``,
            ``radial_basis``, ``readout`` or ``other``.
        irreps_in, irreps_out: of the module's features, where it has some.
        layers_behind: interaction layers between this weight and the output that come after its own: 0 for those of
            the last layer and the readouts.
        paths: blocks of the weight that updates act on.
    """

    name: str
    module: str
    parameter: str
    reader: str
    kind: str
    paths: tuple[WeightPath, ...]
    irreps_in: str | None = None
    irreps_out: str | None = None
    layers_behind: int = 0

    @property
    def numel(self) -> int:
        return sum(path.size for path in self.paths)


@dataclass(frozen=True, slots=True)
class Base:
    """The identity of a foundation model, pinned by adapters.

    Attributes:
        name: published name, or the file's name.
        sha256: of the file.
        fingerprint: SHA-256 over architecture, parameters and coupling tensors as they were loaded.
        licence: SPDX identifier or ``unknown``.
    """

    name: str
    sha256: str
    fingerprint: str
    licence: str


@runtime_checkable
class Backbone(Protocol):
    """A loaded foundation model."""

    model: nn.Module
    base: Base
    library: str
    elements: tuple[int, ...]
    cutoff: float
    head: str
    extension: Extension | None
    """Set while an adapter with one is attached."""

    @property
    def n_scalars(self) -> int:
        """Invariant node features that an extension is given."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def reference_energies(self) -> dict[int, float]:
        """Energy of each isolated element, eV (E0)."""
        ...

    def set_reference_energies(self, energies: Mapping[int, float]) -> None: ...

    def predict(self, batch: Batch, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        """Energy and forces; ``create_graph`` keeps what is needed to differentiate them again."""
        ...

    def sites(self) -> tuple[Site, ...]:
        """Every learnable weight."""
        ...

    def fresh_weights(self, seed: int | None) -> dict[str, Tensor]:
        """Random values for its parameters by dotted name, as the library draws them; None takes the global state."""
        ...

    def save(self, path: str | Path) -> None:
        """Write a plain model of the library, atomically."""
        ...

    @property
    def stored_dtype(self) -> torch.dtype:
        """Precision of the file that it was read from."""
        ...

    def save_into_source(self, path: str | Path) -> bool:
        """Write its file with its weights in it, so that it opens wherever that does; False where it cannot be done."""
        ...
