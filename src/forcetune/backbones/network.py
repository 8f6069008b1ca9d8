"""The part that all backbones with a network of ours have in common: from a batch to energies and their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from forcetune.backbones.protocol import ADAPTER, Base, Extension, Prediction
from forcetune.errors import InputError
from forcetune.graphs.graph import Batch, with_spin_leaf
from forcetune.kernels.edge_plan import Plan, PlanCache, given_plan, make_plan
from forcetune.kernels.features import Features
from forcetune.kernels.layers import EquivariantLinear
from forcetune.kernels.phase import Phase
from forcetune.kernels.precision import full_precision
from forcetune.kernels.radial import RadialLayer
from forcetune.kernels.site import Site, WeightPath
from forcetune.kernels.step import Ghosts


class ReadoutFeatures(NamedTuple):
    """Derivatives of energies by the weights of the last linear layers.

    Attributes:
        atoms: (atoms, features), float64, eV per unit of weight.
        graphs: (graphs, features), their sums.
        gradients: (directions, atoms, 3), minus the derivatives of each direction · graphs by the positions, per Å;
            None where they were not asked for.
    """

    atoms: Tensor
    graphs: Tensor
    gradients: Tensor | None


class NetworkBackbone:
    """A network that gives the interaction energy of every atom for a plan, a phase and the vectors of all pairs.

    Attributes:
        model: the network; adapters are attached to it in place. Its ``paired`` says how plans are made.
        base: identity of the file it was read from, before elements were cut.
        elements: atomic numbers it knows, in the network's order.
        cutoff: Å.
        head: name of the head in use.
        learning_rates: defaults of methods, by name, that differ from the methods' own.
    """

    library = "none"
    learning_rates: ClassVar[Mapping[str, float]] = MappingProxyType({})

    def __init__(self, model: nn.Module, base: Base, *, elements: Sequence[int], cutoff: float, head: str) -> None:
        self.model: Any = model
        self.base = base
        self.extension: Extension | None = None
        self.elements = tuple(elements)
        self.cutoff = cutoff
        self.head = head
        self._references = self._stored_references()
        species = torch.full((len(chemical_symbols) + 1,), -1, dtype=torch.int64)
        species[torch.tensor(self.elements)] = torch.arange(len(self.elements))
        self._species = species.to(self.device)
        self._species_on_cpu = species
        self._energies_of_species = self._reference_tensor()
        self._plans = PlanCache(bool(self.paired))

    # ---- what a library fills in -----------------------------------------------------------------------------------

    def _stored_references(self) -> dict[int, float]:
        """E0 of each element as the file has them, eV."""
        raise NotImplementedError

    def _store_references(self, energies: Tensor) -> None:
        """Write E0 of all elements, (elements,) float64, into the network, for whoever reads its files."""
        raise NotImplementedError

    @property
    def paired(self) -> bool | None:
        return self.model.paired

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> None:
        """Move the network and what it needs, in place."""
        self.model.to(device)
        self._species = self._species.to(self.device)
        self._energies_of_species = self._energies_of_species.to(self.device)

    # ---- reference energies ----------------------------------------------------------------------------------------

    @property
    def reference_energies(self) -> dict[int, float]:
        """E0 of each element, eV."""
        return dict(self._references)

    def _reference_tensor(self) -> Tensor:
        return torch.tensor([self._references[z] for z in self.elements], dtype=torch.float64, device=self.device)

    def set_reference_energies(self, energies: Mapping[int, float]) -> None:
        """Set E0 of the elements given, eV; others stay."""
        self._references.update({int(z): float(energies[z]) for z in energies if int(z) in self._references})
        self._energies_of_species = self._reference_tensor()
        with torch.no_grad():
            self._store_references(self._energies_of_species)

    # ---- prediction ------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        """Energies, forces and on request stress of a batch on the model's device and in its dtype.

        Reference energies are added in float64, so that a total energy of 10⁵ eV keeps its last meV when the model
        runs in float32; the returned energy is float64.

        Raises:
            InputError: the model does not know one of the elements.
        """
        plan = given_plan(self)
        if plan is None:
            plan = self._plans.placed(batch.edge_index, batch.numbers)
        if plan is None:
            self._check_elements(batch)
        species = self._species[batch.numbers]
        if plan is None:
            plan = self._plans.plan(batch.edge_index, batch.unit_shifts, species)
        with torch.enable_grad(), full_precision():
            if self.extension is None:
                prediction = self._differentiated(plan, batch, stress, create_graph)
            else:
                prediction = self._extended(self.extension, plan, batch, stress, create_graph)
        per_atom = self._energies_of_species[species]
        total = torch.zeros(batch.n_graphs, dtype=torch.float64, device=per_atom.device)
        total = total.index_add(0, batch.graph_index, per_atom)
        energies = None if prediction.energies is None else per_atom + prediction.energies
        return prediction._replace(energy=total + prediction.energy.double(), energies=energies)

    def place(self, batch: Batch) -> Batch:
        """The same batch where the model is; what the model needs to know of its integers is read before it moves.

        :meth:`predict` then has nothing to wait for: on a GPU each number read from the device costs a wait for all
        that was asked of it before.

        Args:
            batch: on the CPU; a batch from elsewhere only moves.

        Raises:
            InputError: the model does not know one of the elements.
        """
        if batch.positions.device == self.device:
            return batch
        moved = batch.to(device=self.device)
        if self.paired is None or batch.positions.device.type != "cpu":
            return moved
        plan = self._plans.placed(batch.edge_index, batch.numbers)
        if plan is None or plan.order.device != self.device:
            self._check_elements(batch)
            species = self._species_on_cpu[batch.numbers]
            plan = make_plan(
                batch.edge_index, batch.unit_shifts, species, paired=self._plans.paired, device=self.device
            )
            self._plans.place(batch.edge_index, batch.numbers, plan)
        self._plans.place(moved.edge_index, moved.numbers, plan)
        return moved

    def pair_gradients(self, plan: Plan, vectors: Tensor, ghosts: Ghosts | None = None) -> tuple[Tensor, Tensor]:
        """Energies of atoms, and the derivatives of their sum by the vectors of pairs, without extensions.

        It is what programs need that keep neighbors and sum forces themselves.

        Args:
            plan: of atoms whose species are indices of :attr:`elements`.
            vectors: (pairs, 3) from sender to receiver, Å.
            ghosts: further senders.

        Returns:
            (atoms,) eV, float64, reference energies included, atoms as they were before the plan sorted them;
            (pairs, 3) eV/Å.
        """
        phase = Phase(twice=False)
        vectors = vectors.detach().requires_grad_()
        with torch.enable_grad(), full_precision():
            energies, _ = self.model(plan, phase, vectors, ghosts)
            with phase.forces():
                (gradients,) = torch.autograd.grad(
                    [energies], [vectors], [torch.ones_like(energies)], allow_unused=True, materialize_grads=True
                )
        total = energies.detach().double() + self._energies_of_species[plan.species]
        return total[plan.place], gradients

    def _check_elements(self, batch: Batch) -> None:
        """
        Raises:
            InputError: an element that the model does not know, or no longer knows since its table was cut.
        """
        of_number = self._species_on_cpu if batch.numbers.device.type == "cpu" else self._species
        known = (batch.numbers >= 0) & (batch.numbers < len(of_number))
        known &= of_number[torch.where(known, batch.numbers, 0)] >= 0
        if bool(known.all()):
            return
        first = int((~known).nonzero()[0])
        number, graph = int(batch.numbers[first]), int(batch.graph_index[first])
        symbol = chemical_symbols[number] if 0 < number < len(chemical_symbols) else f"of atomic number {number}"
        raise InputError(
            f"{self.base.name} does not know the element {symbol} (structure {graph}, atom "
            f"{first - int(batch.ptr[graph])}); it has {', '.join(chemical_symbols[z] for z in self.elements)}. Load "
            "it with all elements that occur, or choose a model that knows them."
        )

    def _differentiated(self, plan: Plan, batch: Batch, stress: bool, create_graph: bool) -> Prediction:
        """Interaction energies and their derivatives by the vectors of all pairs."""
        # a caller who differentiates with respect to the positions needs the whole graph
        own = not batch.positions.requires_grad
        phase = Phase(twice=create_graph or not own, curved=not own)
        graph_index = batch.graph_index[plan.order]
        vectors = _vectors(plan, batch.positions, batch.cell, batch)
        if own:
            vectors = vectors.detach().requires_grad_()
        atoms, _ = self.model(plan, phase, vectors)
        energy = _summed(atoms, graph_index, batch.n_graphs)
        with phase.forces():
            (pull,) = torch.autograd.grad(
                [energy],
                [vectors],
                [torch.ones_like(energy)],
                create_graph=create_graph,
                retain_graph=create_graph or not own,
                allow_unused=True,
                materialize_grads=True,
            )
        if own:
            phase.forces_are_done()
        forces = pull.new_zeros(plan.n_atoms, 3).index_add(0, plan.sender, pull).index_add(0, plan.receiver, -pull)
        stresses = None
        if stress:
            outer = vectors.unsqueeze(2) * pull.unsqueeze(1)
            strain = pull.new_zeros(batch.n_graphs, 3, 3).index_add(0, graph_index[plan.receiver], outer)
            stresses = per_volume((strain + strain.transpose(1, 2)) / 2, batch.cell)
        if create_graph:
            return Prediction(energy, forces[plan.place], stresses)
        own = atoms.detach().double()[plan.place]
        return Prediction(energy.detach(), forces[plan.place], stresses, energies=own)

    def _extended(self, extension: Extension, plan: Plan, batch: Batch, stress: bool, create_graph: bool) -> Prediction:
        """Interaction energy of the model and its extension, differentiated together."""
        positions = batch.positions.detach().clone().requires_grad_()
        leaves, moved, cell = [positions], positions, batch.cell
        strain = torch.zeros_like(batch.cell)
        if stress:
            leaves.append(strain.requires_grad_())
            symmetric = (strain + strain.transpose(1, 2)) / 2
            moved = positions + torch.einsum("ai,aij->aj", positions, symmetric[batch.graph_index])
            cell = batch.cell + batch.cell @ symmetric
        batch = with_spin_leaf(batch)
        leaves.append(batch.spins)
        phase = Phase(twice=create_graph, curved=False)
        atoms, features = self.model(plan, phase, _vectors(plan, moved, cell, batch))
        energy = _summed(atoms, batch.graph_index[plan.order], batch.n_graphs)
        sender, receiver = batch.edge_index
        shifts = torch.einsum("ei,eij->ej", batch.unit_shifts, cell[batch.graph_index[sender]])
        scalars = self._invariants(features)[plan.place]
        extra = extension(scalars, moved[receiver] - moved[sender] + shifts, batch)
        if extra.energy is not None:
            energy = energy + extra.energy
        # the kernels leave out the gradients that are not asked for: by weights now, by the geometry afterwards
        with phase.forces():
            slopes = torch.autograd.grad(
                energy.sum(), leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        phase.forces_are_done()
        stresses = per_volume(slopes[1], batch.cell) if stress else None
        # an energy without moments is that of a head, which knows no spins
        fields = None if extra.energy is None or extra.moments is None else -slopes[-1]
        energies = None
        if not create_graph and (extra.energy is None or extra.energies is not None):
            energies = atoms.double()[plan.place]
            energies = energies if extra.energies is None else energies + extra.energies
        return Prediction(energy, -slopes[0], stresses, extra.moments, fields, energies)

    def _invariants(self, features: Sequence[Features]) -> Tensor:
        """Even scalars of all layers, (atoms, n_scalars), atoms in the plan's order."""
        raise NotImplementedError

    # ---- readouts --------------------------------------------------------------------------------------------------

    def readout_features(self, batch: Batch, directions: Tensor | None = None) -> ReadoutFeatures:
        """Derivatives of the energy by the weights (and biases) of the last linear layers, and their own by positions.

        The layers are those that :attr:`last_layers` of the network names. Their inputs are the last hidden features
        of the model as it is, adapter included; where nothing follows a last layer, weights · features is its energy.

        Args:
            batch: on the model's device and in its dtype.
            directions: (directions, features) along which features are differentiated; None for no derivatives.

        Raises:
            InputError: an element is unknown, or the model has an extension, whose energy has other last layers.
        """
        if self.extension is not None:
            raise InputError(
                f"{self.base.name} carries a spin layer, whose energy has a readout of its own; the uncertainty of "
                "the last layer is for models without one. Use an ensemble of runs (`--ensemble`)."
            )
        self._check_elements(batch)
        plan = self._plans.plan(batch.edge_index, batch.unit_shifts, self._species[batch.numbers])
        graph_index = batch.graph_index[plan.order]
        phase, vectors = Phase(), _vectors(plan, batch.positions, batch.cell, batch).detach().requires_grad_()
        with torch.enable_grad(), full_precision(), _watched(self.model.last_layers) as inputs:
            self.model(plan, phase, vectors)
            atoms = torch.cat([_by_weight(layer, inputs[layer]) for layer in self.model.last_layers], dim=1)
            atoms = atoms * self.model.energy_factors(plan)
            graphs = atoms.new_zeros(batch.n_graphs, atoms.shape[1]).index_add(0, graph_index, atoms)
            gradients = None
            if directions is not None:
                rows = directions.to(atoms).unbind()
                gradients = torch.stack([self._features_pull(plan, phase, atoms, row, vectors) for row in rows])
        return ReadoutFeatures(atoms.detach().double()[plan.place], graphs.detach().double(), gradients)

    @staticmethod
    def _features_pull(plan: Plan, phase: Phase, atoms: Tensor, direction: Tensor, vectors: Tensor) -> Tensor:
        """−∂(Σ direction · features)/∂positions, (atoms, 3), float64, as forces are derived from energies."""
        with phase.forces():
            (pull,) = torch.autograd.grad(
                [atoms],
                [vectors],
                [direction.expand_as(atoms)],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        pull = pull.double()
        forces = pull.new_zeros(plan.n_atoms, 3).index_add(0, plan.sender, pull).index_add(0, plan.receiver, -pull)
        return forces[plan.place]

    # ---- sites -----------------------------------------------------------------------------------------------------

    def sites(self) -> tuple[Site, ...]:
        """Every learnable weight, in the order of the modules; weights without a meaning of their own come last."""
        return network_sites(self.model, self._layers_behind)

    def _layers_behind(self, name: str) -> int:
        """Interaction layers between a weight and the output that come after its own."""
        raise NotImplementedError


@contextmanager
def _watched(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Within this context, what each layer was given last."""
    inputs: dict[nn.Module, Any] = {}

    def keep(layer: nn.Module, arguments: Any) -> None:
        inputs[layer] = arguments[0]

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _by_weight(layer: nn.Module, given: Any) -> Tensor:
    """(atoms, weights and biases) derivatives of a last layer's one output by its stored weights and its bias."""
    if isinstance(layer, RadialLayer):
        return given * layer.scale
    assert isinstance(layer, EquivariantLinear)
    columns = [given.blocks[block.source][:, 0] * block.factor for block in layer.blocks]
    if layer.biased:
        columns.append(torch.ones_like(columns[0][:, :1]))
    return torch.cat(columns, dim=1)


def network_sites(model: nn.Module, layers_behind: Callable[[str], int]) -> tuple[Site, ...]:
    """Sites that layers declare themselves, and one for each parameter that no layer declares."""
    sites: list[Site] = []
    modules = [(name, module) for name, module in model.named_modules() if name.split(".")[0] != ADAPTER]
    for name, module in modules:
        declared = getattr(module, "sites", None)
        if declared is not None:
            sites.extend(declared(name))
        elif isinstance(module, nn.Linear):
            path = WeightPath("out->in", 0, tuple(module.weight.shape), transposed=True)
            sites.append(Site(f"{name}.weight", name, "weight", name, "radial_mlp", (path,)))
    names = {site.name for site in sites}
    for name, module in modules:
        if isinstance(module, nn.ParameterList):
            continue  # of weights that no layer declares, as no coupling has them
        for parameter, tensor in module.named_parameters(recurse=False):
            full = f"{name}.{parameter}".lstrip(".")
            if full not in names:
                whole = WeightPath("all", 0, tuple(tensor.shape) or (1,))
                kind = "radial_basis" if "bessel" in parameter or "gaussian" in parameter else "other"
                sites.append(Site(full, name, parameter, name, kind, (whole,)))
    return tuple(replace(site, layers_behind=layers_behind(site.name)) for site in sites)


def _summed(energies: Tensor, graph_index: Tensor, graphs: int) -> Tensor:
    """(graphs,) energies of graphs from those of atoms; in float64, as thousands of terms lose digits in float32."""
    total = torch.zeros(graphs, dtype=torch.float64, device=energies.device)
    return total.index_add(0, graph_index, energies.double())


def _vectors(plan: Plan, positions: Tensor, cell: Tensor, batch: Batch) -> Tensor:
    """(pairs, 3) from sender to receiver, Å."""
    ordered = positions[plan.order]
    graph = batch.graph_index[plan.order][plan.sender]
    shifts = torch.einsum("ei,eij->ej", batch.unit_shifts[plan.edge_of_pair], cell[graph])
    return ordered[plan.receiver] - ordered[plan.sender] + shifts


def per_volume(strain: Tensor, cell: Tensor) -> Tensor:
    """Derivatives by the strain over the volumes; graphs without a cell have no stress."""
    volume = torch.linalg.det(cell).abs().view(-1, 1, 1)
    # a quotient by 0 would spoil the gradients of all others
    stress = strain / torch.where(volume > 0, volume, torch.inf)
    return torch.where(stress.abs() < 1e10, stress, torch.zeros_like(stress))
