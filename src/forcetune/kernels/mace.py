"""The kernels in a loaded MACE model, and out of it again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.backbones.protocol import Backbone
from forcetune.graphs.graph import Batch
from forcetune.kernels.constants import Constant
from forcetune.kernels.features import Features, features_of
from forcetune.kernels.mace_layers import (
    INTERACTIONS,
    Step,
    can_train,
    contraction_forward,
    interaction_forward,
    linear_forward,
    product_forward,
    scalars_of,
    skip_forward,
    symmetric_contraction_forward,
)
from forcetune.kernels.phase import Phase
from forcetune.kernels.plan import Plan, make_plan
from forcetune.kernels.swap import UnknownLayerError, is_swapped, original_class, restore_forward, swap_forward

PLAN = "forcetune_plan"
PHASE = "forcetune_phase"
_MODELS = ("MACE", "ScaleShiftMACE")
# what only the library's own forward computes
_LIBRARY_ONLY = (
    "compute_hessian",
    "compute_edge_forces",
    "compute_atomic_stresses",
    "compute_displacement",
    "lammps_mliap",
)


@dataclass(frozen=True, slots=True)
class Coverage:
    """What runs by the kernels.

    Attributes:
        replaced: dotted names of modules (the model itself is ``""``).
        left: dotted names of modules that could have been replaced, with the reason why they were not.
    """

    replaced: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)

    @property
    def fast(self) -> bool:
        """Whether the model's forward pass is by the kernels."""
        return "" in self.replaced


_FORWARDS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "Linear": linear_forward,
    "Contraction": contraction_forward,
    "SymmetricContraction": symmetric_contraction_forward,
    "EquivariantProductBasisBlock": product_forward,
}


def install(backbone: Backbone) -> Coverage:
    """Let the kernels compute what a MACE model computes, with its own weights, names and hooks.

    Args:
        backbone: a loaded MACE; an adapter may be attached before or after.

    Returns:
        What was replaced. A model with a block that the kernels do not know is left to the library as a whole,
        but for its equivariant linear layers.
    """
    return install_in(backbone.model)


def install_in(model: Any) -> Coverage:
    """The same for the library's module."""
    if is_swapped(model) or any(is_swapped(module) for module in model.modules()):
        remove_from(model)
    left: dict[str, str] = {}
    forwards: dict[str, Callable[..., Any]] = {}
    for name, module in model.named_modules():
        if name.split(".")[0] == "forcetune_adapter":
            continue
        make = _forward_for(name, module)
        if make is None:
            continue
        try:
            forwards[name] = make(module)
        except ValueError as error:
            left[name] = str(error)
    reason = _reason_against(model, left)
    if reason is None:
        forwards[""] = model_forward(model)
    else:
        left[""] = reason
        forwards = {name: forward for name, forward in forwards.items() if _is_linear(model.get_submodule(name))}
    for name, forward in forwards.items():
        swap_forward(model.get_submodule(name), forward)
    return Coverage(tuple(sorted(forwards)), left)


def remove(backbone: Backbone) -> None:
    """Give every module its own forward back."""
    remove_from(backbone.model)


def remove_from(model: nn.Module) -> None:
    """The same for the library's module."""
    for module in model.modules():
        if is_swapped(module):
            restore_forward(module)


def _is_linear(module: Any) -> bool:
    return type(module).__name__ == "Linear" and hasattr(module, "irreps_in") and "weight" in module._parameters


def _forward_for(name: str, module: Any) -> Callable[[Any], Callable[..., Any]] | None:
    kind = type(module).__name__
    if kind == "Linear":
        return linear_forward if _is_linear(module) else None
    if kind == "FullyConnectedTensorProduct" and name.endswith("skip_tp"):
        return skip_forward
    if kind.endswith("InteractionBlock"):
        return interaction_forward if kind in INTERACTIONS else _unknown_block
    return _FORWARDS.get(kind)


def _unknown_block(module: Any) -> Callable[..., Any]:
    raise UnknownLayerError(f"{type(module).__name__} is not known to the kernels")


def _reason_against(model: Any, left: dict[str, str]) -> str | None:
    """Why the model's forward pass cannot be by the kernels."""
    if type(model).__name__ not in _MODELS:
        return f"{type(model).__name__} is not known to the kernels"
    if hasattr(model, "joint_embedding"):
        return "it embeds further inputs such as charge or spin"
    for product in model.products:
        if type(product.symmetric_contractions).__name__ != "SymmetricContraction":
            return f"its contraction is a {type(product.symmetric_contractions).__name__}"
    if left:
        name, reason = next(iter(left.items()))
        return f"{name}: {reason}"
    return None


class Plans:
    """Plans of the batches seen last; a batch is recognised by its edge index."""

    def __init__(self, paired: bool, most: int = 64) -> None:
        self.paired = paired
        self.most = most
        self._kept: dict[int, tuple[Any, int, Plan]] = {}

    def of(self, data: dict[str, Tensor]) -> Plan:
        """The plan of a batch, given with it or made."""
        given: Any = data.get(PLAN)
        if isinstance(given, Plan):
            return given
        edges, species = data["edge_index"], data["node_attrs"].argmax(dim=1)
        found = self._kept.get(id(edges))
        if found is not None and found[0]() is edges and found[1] == edges._version:
            plan = found[2]
            if torch.equal(plan.species, species[plan.order]):
                return plan
        plan = make_plan(edges, data["unit_shifts"], species, paired=self.paired)
        while len(self._kept) >= self.most:
            del self._kept[next(iter(self._kept))]
        self._kept[id(edges)] = (weakref.ref(edges), edges._version, plan)
        return plan


def is_installed(backbone: Backbone) -> bool:
    """Whether the model's forward pass is by the kernels."""
    return is_swapped(backbone.model)


def is_paired(model: Any) -> bool:
    """Whether an edge and its reverse have the same radial weights."""
    return all(INTERACTIONS.get(type(block).__name__) != "nonlinear" for block in model.interactions)


def plan_of(backbone: Backbone, batch: Batch) -> Plan:
    """The plan of a batch, to be handed to the model with it (``data[PLAN]``) where it must not look at integers."""
    table = {number: index for index, number in enumerate(backbone.elements)}
    species = torch.tensor([table[number] for number in batch.numbers.tolist()], dtype=torch.int64)
    return make_plan(batch.edge_index, batch.unit_shifts, species, paired=is_paired(backbone.model))


class _Cut(torch.autograd.Function):
    """The identity; its gradient is passed on only while those by the geometry are wanted."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, phase: Phase) -> Tensor:
        ctx.phase = phase
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return (grads[0] if ctx.phase.geometry else None), None


def model_forward(model: Any) -> Callable[..., Any]:
    """Forward of a MACE or ScaleShiftMACE."""
    slow = original_class(model).forward
    plans = Plans(is_paired(model))
    one_hot = Constant(torch.eye(len(model.atomic_numbers)))

    def forward(
        self: Any,
        data: dict[str, Tensor],
        training: bool = False,
        compute_force: bool = True,
        compute_virials: bool = False,
        compute_stress: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        known = isinstance(data.get(PLAN), Plan) or "unit_shifts" in data
        if not known or any(options.get(name) for name in _LIBRARY_ONLY) or len(data["positions"]) == 0:
            flags = {"compute_virials": compute_virials, "compute_stress": compute_stress}
            return slow(self, data, training=training, compute_force=compute_force, **flags, **options)
        graph = _Graph(plans.of(data), data, one_hot)
        energies = _energies(self, graph)
        wants_virials = compute_virials or compute_stress
        if compute_force or wants_virials:
            forces, virials = _derivatives(graph, energies["interaction_energy"], training, wants_virials)
        else:
            forces = virials = None
        found: dict[str, Any] = _outputs(self, graph, energies, forces, virials, compute_stress)
        # for whoever differentiates the energy himself
        return found | {PHASE: graph.phase}

    return forward


class _Graph:
    """Geometry of a batch on pairs, with the batch's tensors in the plan's order."""

    def __init__(self, plan: Plan, data: dict[str, Tensor], one_hot: Constant) -> None:
        self.plan = plan
        self.data = data
        self.phase = Phase()
        self.n_graphs = data["ptr"].numel() - 1
        self.graph = data["batch"][plan.order]
        attributes = data["node_attrs"]
        # a plan that was given knows species that are the same for all batches of its layout
        given = PLAN in data
        self.attributes = one_hot.like(attributes).index_select(0, plan.species) if given else attributes[plan.order]
        heads = data["head"][data["batch"]] if "head" in data else torch.zeros_like(data["batch"])
        self.heads = heads[plan.order].to(torch.int64)
        self.arange = torch.arange(plan.n_atoms, device=self.graph.device)
        positions = data["positions"]
        ordered = positions[plan.order]
        vectors = ordered[plan.receiver] - ordered[plan.sender] + data["shifts"][plan.edge_of_pair]
        # somebody who differentiates with respect to the positions keeps the whole graph
        self.own = not positions.requires_grad
        self.vectors = vectors.detach().requires_grad_() if self.own else vectors
        self.lengths = torch.linalg.vector_norm(self.vectors, dim=1, keepdim=True)

    def summed(self, values: Tensor) -> Tensor:
        """Σ over the atoms of each graph."""
        return values.new_zeros(self.n_graphs, *values.shape[1:]).index_add(0, self.graph, values)


def _energies(model: Any, graph: _Graph) -> dict[str, Any]:
    plan, phase = graph.plan, graph.phase
    chosen = (graph.arange, graph.heads)
    reference = model.atomic_energies_fn(graph.attributes)[chosen]
    edges = torch.stack((plan.sender, plan.receiver))
    radial, cutoff = model.radial_embedding(graph.lengths, graph.attributes, edges, model.atomic_numbers)
    step = Step(
        plan=plan,
        phase=phase,
        harmonics=model.spherical_harmonics(graph.vectors),
        radial=radial if can_train(model.radial_embedding) else _Cut.apply(radial, phase),  # pyright: ignore[reportArgumentType]
        cutoff=cutoff,
        attributes=graph.attributes,
    )
    layout = ((1, model.node_embedding.linear.irreps_out.dim),)
    embedded = model.node_embedding(graph.attributes)
    features = features_of(embedded, layout, geometric=False, trains=can_train(model.node_embedding))
    pair = _pair_repulsion(model, graph)
    kept: list[Features] = []
    for interaction, product in zip(model.interactions, model.products, strict=True):
        message, skip = interaction(step, features)
        features = product(message, skip, step)
        kept.append(features)
    atomic = []
    for index, readout in enumerate(model.readouts):
        own = kept[-1 if len(model.readouts) == 1 else index]
        atomic.append(scalars_of(readout(own, graph.heads))[chosen])
    return _assembled(model, graph, reference, pair, atomic) | {"features": kept}


def _pair_repulsion(model: Any, graph: _Graph) -> Tensor | None:
    if not hasattr(model, "pair_repulsion"):
        return None
    plan = graph.plan
    edges = torch.stack((plan.edge_sender, plan.edge_receiver))
    lengths = graph.lengths[plan.edge_pair]
    return model.pair_repulsion_fn(lengths, graph.attributes, edges, model.atomic_numbers)


def _assembled(
    model: Any, graph: _Graph, reference: Tensor, pair: Tensor | None, atomic: list[Tensor]
) -> dict[str, Any]:
    """Energies of atoms and graphs in the way of the library's two models."""
    e0 = graph.summed(reference).to(graph.vectors.dtype)
    if hasattr(model, "scale_shift"):
        parts = atomic if pair is None else [pair, *atomic]
        inter = model.scale_shift(torch.stack(parts).sum(0), graph.heads)
        energy = graph.summed(inter)
        node = reference.double() + inter.double()
        return {"interaction_energy": energy, "energy": e0 + energy, "node_energy": node}
    pair = torch.zeros_like(reference) if pair is None else pair
    contributions = torch.stack([e0, *(graph.summed(part) for part in (pair, *atomic))], dim=-1)
    node = torch.stack([reference, pair, *atomic], dim=-1).sum(-1)
    total = contributions.sum(-1)
    return {"interaction_energy": total, "energy": total, "node_energy": node, "contributions": contributions}


def _derivatives(graph: _Graph, energy: Tensor, training: bool, wants_virials: bool) -> tuple[Tensor, Tensor | None]:
    """Forces (atoms, 3), and on request the derivative by the symmetric strain (graphs, 3, 3)."""
    plan = graph.plan
    with graph.phase.forces():
        (pull,) = torch.autograd.grad(
            [energy],
            [graph.vectors],
            [torch.ones_like(energy)],
            create_graph=training,
            retain_graph=training or not graph.own,
            allow_unused=True,
        )
    if graph.own:
        graph.phase.forces_are_done()
    if pull is None:
        pull = torch.zeros_like(graph.vectors)
    ordered = pull.new_zeros(plan.n_atoms, 3).index_add(0, plan.sender, pull).index_add(0, plan.receiver, -pull)
    if not wants_virials:
        return ordered[plan.place], None
    outer = graph.vectors.unsqueeze(2) * pull.unsqueeze(1)
    strain = pull.new_zeros(graph.n_graphs, 3, 3).index_add(0, graph.graph[plan.receiver], outer)
    return ordered[plan.place], (strain + strain.transpose(1, 2)) / 2


def _outputs(
    model: Any,
    graph: _Graph,
    energies: dict[str, Any],
    forces: Tensor | None,
    strain: Tensor | None,
    compute_stress: bool,
) -> dict[str, Tensor | None]:
    place = graph.plan.place
    stress = None
    if strain is not None:
        stress = torch.zeros_like(strain)
        if compute_stress:
            volume = torch.linalg.det(graph.data["cell"].view(-1, 3, 3)).abs().view(-1, 1, 1)
            # graphs without a cell have no stress; a quotient by 0 would spoil the gradients of all others
            stress = strain / torch.where(volume > 0, volume, torch.inf)
            stress = torch.where(stress.abs() < 1e10, stress, torch.zeros_like(stress))
    kept: list[Features] = energies["features"]
    result: dict[str, Tensor | None] = dict.fromkeys(
        ("edge_forces", "atomic_virials", "atomic_stresses", "displacement", "hessian")
    )
    result |= {
        "energy": energies["energy"],
        "node_energy": energies["node_energy"][place],
        "forces": forces,
        "virials": None if strain is None else -strain,
        "stress": stress,
        "node_feats": torch.cat([features.flat for features in kept], dim=-1)[place],
    }
    if hasattr(model, "scale_shift"):
        result["interaction_energy"] = energies["interaction_energy"]
    else:
        result["contributions"] = energies["contributions"]
    return result
