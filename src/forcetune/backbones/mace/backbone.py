"""MACE models behind the backbone protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from forcetune.backbones.mace.architecture import architecture_of
from forcetune.backbones.mace.construction import build
from forcetune.backbones.mace.converted import check_not_converted
from forcetune.backbones.mace.rebuild import fingerprint, read_mace, save_mace
from forcetune.backbones.mace.sites import mace_sites
from forcetune.backbones.mace.surgery import cut_elements, select_head
from forcetune.backbones.protocol import PLAN, Base, Extension, Prediction, Site
from forcetune.errors import InputError
from forcetune.graphs.graph import Batch
from forcetune.irreps import parse_irreps


class MaceBackbone:
    """A MACE or ScaleShiftMACE model with one head.

    Attributes:
        model: the library's own module; adapters are attached to it in place.
        base: identity of the file it was read from, before elements were cut.
        elements: atomic numbers it knows, ascending as in the model.
        cutoff: Å.
        head: name of the head in use.
    """

    library = "mace"

    def __init__(self, model: nn.Module, base: Base) -> None:
        self.model: Any = model
        self.base = base
        self.extension: Extension | None = None
        self.elements = _atomic_numbers(model)
        self.cutoff = float(self.model.r_max)
        self.head = str(getattr(self.model, "heads", ["Default"])[0])
        self._references = self._stored_references()
        self._species = torch.full((len(chemical_symbols) + 1,), -1, dtype=torch.int64)
        self._species[torch.tensor(self.elements)] = torch.arange(len(self.elements))
        self._species = self._species.to(self.device)
        self._every_species = torch.arange(len(self.elements), device=self.device)
        self._energies_of_species = self._reference_tensor()

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        licence: str = "unknown",
        sha256: str = "",
        head: str | None = None,
        elements: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        trust: bool = False,
    ) -> MaceBackbone:
        """Read a ``.model`` file without running code from it.

        Args:
            path: file of mace-torch.
            name, licence, sha256: identity, recorded in adapters.
            head: which head of a multi-head model.
            elements: cut the element table to these atomic numbers; None keeps it.
            dtype: precision to compute in.
            device: where to.
            trust: allow the file to run its own code where it cannot be rebuilt without.

        Raises:
            InputError: the file cannot be read or rebuilt, the head is unknown or missing, an element is unknown.
        """
        model = read_mace(path, trust=trust)
        base = Base(name or Path(path).stem, sha256, fingerprint(model), licence)
        return cls.from_module(model, base=base, head=head, elements=elements, dtype=dtype, device=device)

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        *,
        base: Base | None = None,
        head: str | None = None,
        elements: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
    ) -> MaceBackbone:
        """Wrap a loaded module; it is used as it is unless a head or elements are cut.

        Raises:
            InputError: the model was converted to an accelerator; as :meth:`load`.
        """
        check_not_converted(model, type(model).__name__ if base is None else base.name)
        base = base or Base(type(model).__name__, "", fingerprint(model), "unknown")
        heads = list(getattr(model, "heads", ["Default"]))
        if head is None and len(heads) > 1:
            raise InputError(f"{base.name} has the heads {', '.join(heads)}; choose one with --head (model.head).")
        if head is not None and (len(heads) > 1 or head != heads[0]):
            model = select_head(model, head)
        if elements is not None:
            known = _atomic_numbers(model)
            unknown = sorted(set(elements) - set(known))
            if unknown:
                names = ", ".join(chemical_symbols[z] for z in unknown)
                raise InputError(f"{base.name} does not know the element {names}; choose a model that does.")
            if len(set(elements)) < len(known):
                model = cut_elements(model, sorted(set(elements)))
        return cls(model.to(dtype=dtype, device=torch.device(device)).eval(), base)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.atomic_energies_fn.atomic_energies.dtype

    @property
    def device(self) -> torch.device:
        return self.model.atomic_energies_fn.atomic_energies.device

    @property
    def reference_energies(self) -> dict[int, float]:
        """E0 of each element, eV."""
        return dict(self._references)

    def _stored_references(self) -> dict[int, float]:
        stored = torch.atleast_2d(self.model.atomic_energies_fn.atomic_energies)[0].double()
        return {z: float(energy) for z, energy in zip(self.elements, stored, strict=True)}

    def _reference_tensor(self) -> Tensor:
        return torch.tensor([self._references[z] for z in self.elements], dtype=torch.float64, device=self.device)

    def set_reference_energies(self, energies: Mapping[int, float]) -> None:
        """Set E0 of the elements given, eV; others stay."""
        self._references.update({int(z): float(energies[z]) for z in energies if int(z) in self._references})
        self._energies_of_species = self._reference_tensor()
        buffer = self.model.atomic_energies_fn.atomic_energies
        with torch.no_grad():
            buffer.copy_(self._energies_of_species.view_as(buffer))

    def predict(self, batch: Batch, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        """Energies, forces and on request stress of a batch on the model's device and in its dtype.

        Reference energies are added in float64, so that a total energy of 10⁵ eV keeps its last meV when the model
        runs in float32; the returned energy is float64.

        Raises:
            InputError: an element that the model does not know, or no longer knows since its table was cut.
        """
        species = self._species_of(batch)
        if self.extension is not None:
            found = self._extended(self.extension, batch, species, stress, create_graph)
        else:
            data = self._inputs(batch, species)
            with torch.enable_grad():
                out = self.model(data, training=create_graph, compute_force=True, compute_stress=stress)
            found = Prediction(self._interaction_energy(out), out["forces"], out["stress"] if stress else None)
        per_atom = self._energies_of_species[species]
        total = torch.zeros(batch.n_graphs, dtype=torch.float64, device=per_atom.device)
        total = total.index_add(0, batch.graph_index, per_atom)
        return found._replace(energy=total + found.energy.double())

    def _species_of(self, batch: Batch) -> Tensor:
        """(atoms,) place of each atom's element in the table.

        Raises:
            InputError: an element is not in it.
        """
        if PLAN.get()[0] is self:  # whoever made the plan has looked; a traced step cannot look at values
            return self._species[batch.numbers]
        known = (batch.numbers >= 0) & (batch.numbers < len(self._species))
        species = torch.where(known, self._species[torch.where(known, batch.numbers, 0)], -1)
        if bool((species < 0).any()):
            first = int((species < 0).nonzero()[0])
            number, graph = int(batch.numbers[first]), int(batch.graph_index[first])
            symbol = chemical_symbols[number] if 0 < number < len(chemical_symbols) else f"of atomic number {number}"
            atom = first - int(batch.ptr[graph])
            raise InputError(
                f"{self.base.name} does not know the element {symbol} (structure {graph}, atom {atom}); it has "
                f"{', '.join(chemical_symbols[z] for z in self.elements)}. Load it with all elements that occur, or "
                "choose a model that knows them."
            )
        return species

    @torch.enable_grad()
    def _extended(
        self, extension: Extension, batch: Batch, species: Tensor, stress: bool, create_graph: bool
    ) -> Prediction:
        """Interaction energy of the model and its extension, differentiated together."""
        positions = batch.positions.detach().clone().requires_grad_()
        leaves, moved, cell = [positions], positions, batch.cell
        strain = torch.zeros_like(batch.cell)
        if stress:
            leaves.append(strain.requires_grad_())
            symmetric = (strain + strain.transpose(1, 2)) / 2
            moved = positions + torch.einsum("ai,aij->aj", positions, symmetric[batch.graph_index])
            cell = batch.cell + batch.cell @ symmetric
        if batch.spins.requires_grad:
            leaves.append(batch.spins)
        data = self._inputs(batch, species, moved, cell)
        out = self.model(data, training=create_graph, compute_force=False)
        sender, receiver = batch.edge_index
        vectors = moved[receiver] - moved[sender] + data["shifts"]
        extra = extension(out["node_feats"][:, self._scalar_columns], vectors, batch)
        energy = self._interaction_energy(out)
        if extra.energy is not None:
            energy = energy + extra.energy
        # the kernels leave out what nobody waits for: weights now, the geometry afterwards
        phase: Any = out.get("forcetune_phase")
        with nullcontext() if phase is None else phase.forces():
            slopes = torch.autograd.grad(
                energy.sum(), leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        if phase is not None:
            phase.forces_are_done()
        stresses = None
        if stress:
            volume = torch.linalg.det(batch.cell).abs().view(-1, 1, 1)
            # graphs without a cell have no stress; a quotient by 0 would spoil the gradients of all others
            stresses = slopes[1] / torch.where(volume > 0, volume, torch.inf)
        fields = -slopes[-1] if batch.spins.requires_grad else None
        return Prediction(energy, -slopes[0], stresses, extra.moments, fields)

    @cached_property
    def _scalar_columns(self) -> Tensor:
        """Columns of the node features of all layers, as the model puts them out, that hold even scalars."""
        columns: list[int] = []
        start = 0
        for product in self.model.products:
            blocks = parse_irreps(str(product.linear.irreps_out))
            for block in blocks:
                if block.is_even_scalar:
                    columns += range(start + block.start, start + block.stop)
            start += blocks[-1].stop
        return torch.tensor(columns, device=self.device)

    @property
    def n_scalars(self) -> int:
        return len(self._scalar_columns)

    @staticmethod
    def _interaction_energy(out: dict[str, Tensor]) -> Tensor:
        if "interaction_energy" in out:
            return out["interaction_energy"]
        return out["contributions"][:, 1:].sum(dim=-1)

    def _inputs(
        self, batch: Batch, species: Tensor, positions: Tensor | None = None, cell: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the library's forward takes; positions and cell are those of the batch unless they are given."""
        cell = batch.cell if cell is None else cell
        # the library marks positions as requiring gradients in place: give it its own tensor
        positions = batch.positions.detach().clone() if positions is None else positions
        cell_of_edge = cell[batch.graph_index[batch.edge_index[0]]]
        inputs = {
            "positions": positions,
            # one-hot without a look at the values, which a traced step must not have
            "node_attrs": (species.unsqueeze(1) == self._every_species).to(batch.positions.dtype),
            "edge_index": batch.edge_index,
            "shifts": torch.einsum("ei,eij->ej", batch.unit_shifts, cell_of_edge),
            "unit_shifts": batch.unit_shifts,
            "cell": cell.reshape(-1, 3),
            "batch": batch.graph_index,
            "ptr": batch.ptr,
            "head": torch.zeros(batch.n_graphs, dtype=torch.int64, device=batch.ptr.device),
        }
        owner, plan = PLAN.get()
        return inputs | {"forcetune_plan": plan} if owner is self else inputs

    def sites(self) -> tuple[Site, ...]:
        return mace_sites(self.model)

    def fresh_weights(self, seed: int | None) -> dict[str, Tensor]:
        """Random values for every parameter by dotted name, as mace's constructor draws them."""
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            drawn = build(architecture_of(self.model), dtype=self.dtype)
        return {name: parameter.detach().to(self.device) for name, parameter in drawn.named_parameters()}

    def save(self, path: str | Path) -> None:
        """Write a plain ``.model`` file that mace's own calculator reads, atomically."""
        save_mace(self.model, path)


def _atomic_numbers(model: Any) -> tuple[int, ...]:
    return tuple(int(z) for z in model.atomic_numbers)
