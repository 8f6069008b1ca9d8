"""What forcetune asks of a foundation model, whichever library it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from forcetune.graphs.graph import Batch
from forcetune.kernels.site import Site, WeightPath

__all__ = ["ADAPTER", "Backbone", "Base", "Extension", "Extra", "Prediction", "Site", "WeightPath"]

ADAPTER = "forcetune_adapter"
"""Name of the submodule that holds an attached adapter."""


class Prediction(NamedTuple):
    """What a backbone predicts for a batch.

    Attributes:
        energy: (graphs,), eV, reference energies included.
        forces: (atoms, 3), eV/Å.
        stress: (graphs, 3, 3), eV/Å³, ASE's sign, or None when not asked for.
        moments: (atoms, 3) magnetic moments, or (atoms, 1) magnitudes, μB; None of a model that knows none.
        fields: (atoms, 3) effective fields −∂E/∂s, eV per unit of the spins given; None of a model whose energy knows
            no spins.
        energies: (atoms,), eV, the share of each atom in the energy, reference energies included; None of a model that
            has no such shares, and where gradients of the prediction are kept.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor | None
    moments: Tensor | None = None
    fields: Tensor | None = None
    energies: Tensor | None = None

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
        energies: (atoms,), eV, shares of the energy; None where there is no energy, or only its sum is known.
    """

    energy: Tensor | None
    moments: Tensor | None
    energies: Tensor | None = None


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
class Base:
    """The identity of a foundation model, pinned by adapters.

    Attributes:
        name: published name, or the file's name.
        sha256: of the file.
        fingerprint: SHA-256 over architecture, parameters and coupling tensors as they were loaded.
        licence: SPDX identifier or ``unknown``.
        source: the name or path it was loaded by; empty for what came from memory.
        trusted: its file was allowed to run code.
        folded: names of the methods whose adapters were written into its weights since it was loaded.
    """

    name: str
    sha256: str
    fingerprint: str
    licence: str
    source: str = ""
    trusted: bool = False
    folded: tuple[str, ...] = ()


@runtime_checkable
class Backbone(Protocol):
    """A loaded foundation model."""

    model: nn.Module
    base: Base
    library: str
    learning_rates: ClassVar[Mapping[str, float]]
    elements: tuple[int, ...]
    cutoff: float
    head: str
    extension: Extension | None
    """Set while an adapter with one is attached."""

    @property
    def paired(self) -> bool | None:
        """Whether its plans have an edge and its reverse share a pair; None where it follows no plan.

        A backbone that follows plans (:func:`forcetune.kernels.edge_plan.with_plan`) can be recorded.
        """
        ...

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

    def place(self, batch: Batch) -> Batch:
        """A batch on the CPU, moved to where the model is, and what :meth:`predict` has to look up in it known."""
        ...

    def predict(self, batch: Batch, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        """Energy and forces; ``create_graph`` keeps what is needed to differentiate them again."""
        ...

    def sites(self) -> tuple[Site, ...]:
        """Every learnable weight."""
        ...

    def fresh_weights(self, seed: int | None) -> dict[str, Tensor]:
        """Random values for its parameters by dotted name, as the library draws them; None takes the global state."""
        ...

    def cut_to(self, elements: Sequence[int]) -> Backbone:
        """The model as it is now, without an adapter, with these elements only."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 over architecture, parameters and coupling tensors as they are now, without an adapter."""
        ...

    def save(self, path: str | Path) -> None:
        """Write a plain model of the library, atomically."""
        ...

    def read_back(self, path: str | Path) -> Backbone:
        """What :meth:`save` wrote, in the precision of this one, to be compared with it."""
        ...

    @property
    def stored_dtype(self) -> torch.dtype:
        """Precision of the file that it was read from."""
        ...

    def save_into_source(self, path: str | Path) -> bool:
        """Write its file with its weights in it, so that it opens wherever that does; False where it cannot be done."""
        ...


@runtime_checkable
class Multimodal(Protocol):
    """A backbone of a file with several modalities (levels of theory), of which it is one."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Their names; none where there is nothing to choose."""
        ...

    def with_modality(self, name: str) -> Backbone:
        """Another modality of the file that this one was made from."""
        ...

    def save_modality(self, path: str | Path, name: str, dtype: torch.dtype | None = None) -> None:
        """Write the file with this one as a further modality, which leaves the others what they were."""
        ...
