"""MACE as a network of our own: its layers are those of :mod:`forcetune.kernels`, its names those of mace's files.

Batatia et al., MACE (NeurIPS 2022), arXiv 2206.07697; equation numbers are those of the paper.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.backbones.mace.architecture import MaceArchitecture
from forcetune.backbones.mace.blocks import (
    PLAIN_INTERACTIONS,
    AtomicEnergies,
    BlockIrreps,
    Interaction,
    LinearReadout,
    NodeEmbedding,
    NonLinearInteraction,
    NonLinearReadout,
    Product,
    RadialEmbedding,
    ScaleShift,
    harmonics_text,
    sum_over_neighbors,
)
from forcetune.errors import InputError
from forcetune.irreps import Block, irreps_text, parse_irreps
from forcetune.kernels.compiled.choice import chosen_kernels, takes_compiled
from forcetune.kernels.constants import Constant
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.features import Features
from forcetune.kernels.harmonics import SphericalHarmonics
from forcetune.kernels.layers import (
    Convolution,
    SpeciesLinear,
    sorted_blocks,
)
from forcetune.kernels.phase import Cut, Phase
from forcetune.kernels.radial import ChebyshevBasis, ZBLRepulsion
from forcetune.kernels.splines import Function, RadialFunctions, RadialSplines, Splined
from forcetune.kernels.step import Ghosts, Step, can_train, one_hot_species
from forcetune.kernels.tensors import TensorSource, UnfitError, register


@functools.cache
def pairs_of_elements(numbers: tuple[int, ...]) -> tuple[list[tuple[int, int]], Tensor]:
    """Unordered pairs of a model's elements, and (elements, elements) which pair two of its species are."""
    pairs = list(itertools.combinations_with_replacement(range(len(numbers)), 2))
    table = torch.zeros(len(numbers), len(numbers), dtype=torch.int64)
    for index, (first, second) in enumerate(pairs):
        table[first, second] = table[second, first] = index
    return [(numbers[first], numbers[second]) for first, second in pairs], table


class MaceNetwork(nn.Module):
    """MACE or ScaleShiftMACE.

    Args:
        architecture: what to build.
        source: of its tensors.
        rounded_charges: as :class:`~forcetune.kernels.radial.ZBLRepulsion`.

    Raises:
        UnfitError: a tensor is missing, has another shape, or has no place.
    """

    atomic_numbers: Tensor
    r_max: Tensor

    def __init__(self, architecture: MaceArchitecture, source: TensorSource, *, rounded_charges: bool = False) -> None:
        super().__init__()
        self.architecture = architecture
        self.rounded_charges = rounded_charges
        n_species, heads = len(architecture.atomic_numbers), len(architecture.heads)
        hidden = parse_irreps(architecture.hidden_irreps)
        channels = sum(block.multiplicity for block in hidden if block.is_even_scalar)
        numbers = torch.tensor(architecture.atomic_numbers, dtype=torch.int64)
        register(self, "atomic_numbers", source.take("atomic_numbers", (n_species,), numbers, parameter=False))
        r_max = torch.tensor(architecture.r_max, dtype=torch.float64)
        register(self, "r_max", source.take("r_max", None, r_max, parameter=False))
        layers = torch.tensor(len(architecture.interactions), dtype=torch.int64)
        if source.fresh:
            self.register_buffer("num_interactions", layers)
        elif (stored := source.optional("num_interactions")) is not None:
            register(self, "num_interactions", stored)
        self.node_embedding = NodeEmbedding(n_species, channels, source.within("node_embedding"))
        self.radial_embedding = RadialEmbedding(architecture, source.within("radial_embedding"))
        self.pair_repulsion_fn = None
        if architecture.pair_repulsion:
            inner = source.within("pair_repulsion_fn")
            self.pair_repulsion_fn = ZBLRepulsion(architecture.num_polynomial_cutoff, inner, rounded=rounded_charges)
        self.spherical_harmonics = SphericalHarmonics(architecture.max_ell)
        self.atomic_energies_fn = AtomicEnergies(heads, n_species, source.within("atomic_energies_fn"))
        self.interactions, self.products, self.readouts = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self._add_layers(architecture, channels, source)
        self.scale_shift = None
        if architecture.kind == "ScaleShiftMACE":
            self.scale_shift = ScaleShift(heads, source.within("scale_shift"))
        if left := source.left_over():
            raise UnfitError(f"there is no place for its tensor {left[0]}")
        self._species = Constant(torch.arange(n_species))
        self._splines = RadialSplines()
        self.eval()

    def _add_layers(self, architecture: MaceArchitecture, channels: int, source: TensorSource) -> None:
        hidden, count = architecture.hidden_irreps, len(architecture.interactions)
        scalars, heads = irreps_text(parse_irreps(hidden)[:1]), len(architecture.heads)
        first_target, target = self._targets(architecture, channels)
        features = f"{channels}x0e"
        for index, kind in enumerate(architecture.interactions):
            last = index == count - 1
            out = scalars if last and count > 1 and not architecture.keep_last_layer_irreps else hidden
            edges = self._edge_irreps(architecture, index) or features
            block = BlockIrreps(architecture, index, features, edges, out, target if index else first_target)
            inner = source.within("interactions").within(index)
            if kind == "RealAgnosticResidualNonLinearInteractionBlock":
                self.interactions.append(NonLinearInteraction(block, inner))
            elif kind in PLAIN_INTERACTIONS:
                self.interactions.append(Interaction(kind, block, architecture.avg_num_neighbors[index], inner))
            else:
                raise UnfitError(f"its interactions are {kind}, which forcetune does not compute")
            rows = 1 if architecture.use_agnostic_product else len(architecture.atomic_numbers)
            uses_skip = index > 0 or "Residual" in kind
            inner = source.within("products").within(index)
            self.products.append(Product(block.target, out, architecture.correlation[index], rows, uses_skip, inner))
            inner = source.within("readouts").within(len(self.readouts))
            if last and count > 1:
                self.readouts.append(NonLinearReadout(out, architecture, inner))
            elif not architecture.use_last_readout_only:
                self.readouts.append(LinearReadout(out, heads, inner))
            features = out

    @staticmethod
    def _edge_irreps(architecture: MaceArchitecture, index: int) -> str | None:
        edges = architecture.edge_irreps
        if edges is None or index:
            return edges
        if not architecture.use_edge_irreps_first:
            return None
        return f"{sum(block.multiplicity for block in parse_irreps(edges) if block.is_even_scalar)}x0e"

    @staticmethod
    def _targets(architecture: MaceArchitecture, channels: int) -> tuple[str, str]:
        """Irreps of the messages of the first layer and of those behind it."""
        harmonics = parse_irreps(harmonics_text(architecture))
        first = [block._replace(multiplicity=channels) for block in harmonics]
        later = first
        if any(block.irrep == "0o" for block in parse_irreps(architecture.hidden_irreps)):
            orders = range(architecture.max_ell + 1)
            later = [Block(channels, order, parity, 0) for order in orders for parity in "eo"]
        return irreps_text(sorted_blocks(first)), irreps_text(sorted_blocks(later))

    @property
    def paired(self) -> bool:
        """Whether an edge and its reverse have the same radial weights."""
        return not any(isinstance(block, NonLinearInteraction) for block in self.interactions)

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """The linear layers behind which there are energies of atoms."""
        readouts: list[Any] = list(self.readouts)
        return tuple(one.linear_2 if isinstance(one, NonLinearReadout) else one.linear for one in readouts)

    def energy_factors(self, plan: Plan) -> Tensor:
        """(1, 1), eV, by which what the readouts say is multiplied."""
        if self.scale_shift is None:
            return torch.ones_like(self.r_max).reshape(1, 1)
        return self.scale_shift.scale.reshape(-1)[:1].reshape(1, 1)

    def constants(self) -> dict[str, Tensor]:
        """Couplings of all layers, float64, by the name of the layer and their own."""
        return {
            f"{name}.{key}": tensor
            for name, module in self.named_modules()
            if isinstance(module, (Convolution, SpeciesLinear))
            for key, tensor in module.couplings.items()
        }

    def _radial_functions(self) -> RadialFunctions | None:
        """Radial weights as functions of the distance and the elements; None where they depend on more, or on less."""
        blocks = [block for block in self.interactions if isinstance(block, Interaction)]
        # a Chebyshev basis counts as a constant: its slopes are not to be seen
        if len(blocks) < len(self.interactions) or isinstance(self.radial_embedding.bessel_fn, ChebyshevBasis):
            return None
        networks = [block.conv_tp_weights for block in blocks]
        modules = [self.radial_embedding, *networks]
        reach = self.architecture.r_max

        def function() -> Function:
            embedding, *copies = (copy.deepcopy(module).double() for module in modules)

            def values(ratio: Tensor, kind: tuple[int, int]) -> list[Tensor]:
                radial, cutoff = embedding(ratio * reach, *(torch.full((len(ratio),), z) for z in kind))
                weights = [network(radial) for network in copies]
                return weights if cutoff is None else [weight * cutoff for weight in weights]

            return values

        return RadialFunctions(function, networks, [block.conv_tp.structure.channels for block in blocks], modules)

    def _splined(self, plan: Plan, phase: Phase, lengths: Tensor, ghosts: Ghosts | None) -> Splined:
        """Radial weights from splines, where they can be had."""
        kernels = chosen_kernels(self)
        functions = None if phase.curved or not takes_compiled(kernels, lengths) else self._radial_functions()
        if functions is None:
            return None
        ratio = lengths / self.architecture.r_max
        if self.radial_embedding.distance_transform is None:
            return self._splines.at(functions, phase, kernels, ratio, [(1, 1)])
        if ghosts is not None:
            return None  # of elements that the plan does not know
        # all pairs of the model's elements: those of one batch would want other tables in the next
        kinds, table = pairs_of_elements(tuple(self.architecture.atomic_numbers))
        return self._splines.at(
            functions, phase, kernels, ratio, kinds, table[plan.species[plan.sender], plan.species[plan.receiver]]
        )

    def forward(
        self, plan: Plan, phase: Phase, vectors: Tensor, ghosts: Ghosts | None = None
    ) -> tuple[Tensor, list[Features]]:
        """Interaction energies of a batch's atoms.

        Args:
            plan: of the batch.
            phase: which derivatives are wanted.
            vectors: (pairs, 3) from sender to receiver, Å.
            ghosts: further senders.

        Returns:
            (atoms,) eV without energies of isolated atoms, and the features of all layers; atoms in the plan's order.

        Raises:
            InputError: the network has several heads.
        """
        if len(self.architecture.heads) > 1:
            raise InputError(
                f"this network has the heads {', '.join(self.architecture.heads)}; choose one first (select_head), or "
                "load the model with one (head=...)."
            )
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        species, of_senders = one_hot_species(plan, ghosts, self._species.on(vectors.device), vectors.dtype)
        numbers = self.atomic_numbers[species]
        first, second = numbers[plan.sender], numbers[plan.receiver]
        splined = self._splined(plan, phase, lengths, ghosts)
        if splined is None or any(block.has_density for block in self.interactions):
            radial, cutoff = self.radial_embedding(lengths, first, second)
        else:
            radial, cutoff = lengths[:, :0], None  # not read beside splines
        step = Step(
            plan=plan,
            phase=phase,
            splined=splined,
            harmonics=self.spherical_harmonics(vectors, lengths),
            radial=radial if can_train(self.radial_embedding) else Cut.apply(radial, phase),  # pyright: ignore[reportArgumentType]
            cutoff=cutoff,
            attributes=of_senders if ghosts is None else of_senders[: plan.n_atoms],
            ghosts=ghosts,
            sender_attributes=of_senders,
        )
        embedded = self.node_embedding(Features([of_senders.unsqueeze(1)], geometric=False, trains=False))
        features: Features = embedded
        outputs: list[Features] = []
        for interaction, product in zip(self.interactions, self.products, strict=True):
            message, skip = interaction(features, step)
            features = product(message, skip, step)
            outputs.append(features)
        energies = [
            readout(outputs[-1 if len(self.readouts) == 1 else index])[:, 0]
            for index, readout in enumerate(self.readouts)
        ]
        if self.pair_repulsion_fn is not None:
            repulsion = self.pair_repulsion_fn(lengths, first, second)
            energies.insert(0, sum_over_neighbors(plan, repulsion)[:, 0])
        total = torch.stack(energies).sum(0)
        return (total if self.scale_shift is None else self.scale_shift(total)), outputs
