"""NequIP as a network of our own (Batzner et al., Nat. Commun. 13, 2453, 2022), with the names of its files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from forcetune.backbones.nequip.architecture import SCALAR_ACTIVATIONS, NequIPArchitecture
from forcetune.backbones.nequip.interaction import ACTIVATIONS, in_order_of_inputs, interact
from forcetune.backbones.nequip.layers import AttributeLinear, RadialBasis, Repulsion, ScalarNetwork, TypeEmbedding
from forcetune.irreps import parse_irreps
from forcetune.kernels.constants import Constant
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.features import Features
from forcetune.kernels.harmonics import SphericalHarmonics
from forcetune.kernels.layers import Convolution, EquivariantLinear, GatedActivation, channelwise_paths
from forcetune.kernels.phase import Cut, Phase
from forcetune.kernels.splines import Function, RadialFunctions, RadialSplines, Splined
from forcetune.kernels.step import Ghosts, Step, can_train, one_hot_species
from forcetune.kernels.tensors import TensorSource, UnfitError, register


class NamedEmbedding(nn.Module):
    """An embedding under the name of files."""

    def __init__(self, embed_module: TypeEmbedding) -> None:
        super().__init__()
        self.embed_module = embed_module


class NamedNetwork(nn.Module):
    """A network of scalars under the name of files."""

    def __init__(self, mlp: ScalarNetwork) -> None:
        super().__init__()
        self.mlp = mlp


class Readout(nn.Module):
    """Energies of atoms from scalars, under the name of files."""

    def __init__(self, mlp: ScalarNetwork) -> None:
        super().__init__()
        self.mlp_module = NamedNetwork(mlp)

    def forward(self, scalars: Tensor) -> Tensor:
        return self.mlp_module.mlp(scalars)[:, 0]


class EdgeNormalizer(nn.Module):
    """Distances over their cutoffs: one for all pairs, or one for each pair of types."""

    _rmax_recip: Tensor

    def __init__(self, cutoff: float, known: int, source: TensorSource) -> None:
        super().__init__()
        drawn = torch.tensor(1 / cutoff, dtype=torch.float64)
        stored = source.take("_rmax_recip", None, drawn, parameter=False)
        if tuple(stored.shape) not in ((), (known**2,)) or not bool((stored > 0).all()):
            raise UnfitError("its table of cutoffs does not fit its types")
        if float(1 / stored.max()) > cutoff * (1 + 1e-6) or float(1 / stored.min()) > cutoff * (1 + 1e-6):
            raise UnfitError(f"it has a cutoff beyond its r_max of {cutoff} Å")
        if not stored.ndim and abs(float(stored) * cutoff - 1) > 1e-6:
            raise UnfitError(f"its distances are divided by {1 / float(stored):.6g} Å, not by its r_max of {cutoff} Å")
        register(self, "_rmax_recip", stored)
        table = stored.reshape(known, known) if stored.ndim else None
        self.by_type, self.known = table is not None, known
        self.symmetric = table is None or torch.equal(table, table.T)

    def forward(self, lengths: Tensor, plan: Plan, species: Tensor) -> Tensor:
        """(pairs, 1) Å to (pairs, 1); the receiver's type names the row of the table.

        Args:
            lengths: (pairs, 1), Å.
            plan: of the batch.
            species: (senders,) of the plan's atoms, and of ghosts behind them.
        """
        if not self.by_type:
            return lengths * self._rmax_recip
        place = species[plan.receiver] * self.known + species[plan.sender]
        return lengths * self._rmax_recip.index_select(0, place).unsqueeze(1)


class NeighborNorm(nn.Module):
    """1/√(neighbors), one number or one for each type of the sender."""

    norm_const: Tensor

    def __init__(self, known: int, source: TensorSource) -> None:
        super().__init__()
        stored = source.take("norm_const", None, torch.ones(1, 1), parameter=False)
        if tuple(stored.shape) not in ((1, 1), (known, 1)):
            raise UnfitError("its numbers of neighbors do not fit its types")
        register(self, "norm_const", stored)

    def forward(self, features: Features, species: Tensor) -> Features:
        """
        Args:
            features: of all senders, or of the plan's atoms, which are the first of them.
            species: (senders,).
        """
        if len(self.norm_const) == 1:
            return features.scaled(self.norm_const)
        return features.scaled(self.norm_const.index_select(0, species[: len(features)]).unsqueeze(2))


class Interaction(nn.Module):
    """The parts of an interaction layer, under the names of files."""

    def __init__(
        self, architecture: NequIPArchitecture, layer: int, known: int, gate: GatedActivation, source: TensorSource
    ) -> None:
        super().__init__()
        before, after = architecture.features[layer], gate.irreps_in
        self.avg_num_neighbors_norm = NeighborNorm(known, source.within("avg_num_neighbors_norm"))
        self.linear_1 = EquivariantLinear(before, before, source.within("linear_1"))
        paths, irreps_mid = channelwise_paths(before, architecture.harmonics, after)
        paths = in_order_of_inputs(paths, irreps_mid)
        inner = source.within("tp_scatter").within("tp")
        self.tp_scatter = Convolution(before, architecture.harmonics, paths, irreps_mid, inner)
        widths = (architecture.bessel, *architecture.radial_hidden[layer], self.tp_scatter.weight_numel)
        inner = source.within("edge_mlp").within("mlp")
        self.edge_mlp = NamedNetwork(ScalarNetwork(widths, inner, functional.silu))
        self.linear_2 = EquivariantLinear(self.tp_scatter.irreps_out, after, source.within("linear_2"))
        self.sc: AttributeLinear | None = None
        if architecture.self_connections[layer]:
            self.sc = AttributeLinear(before, after, architecture.attributes, source.within("sc"))

    def before(self, features: Features, species: Tensor) -> Features:
        return self.avg_num_neighbors_norm(self.linear_1(features), species)

    def self_connection(self, step: Step, attributes: Tensor) -> Callable[[Features], Features] | None:
        layer = self.sc
        return None if layer is None else lambda features: layer(features, step, attributes)


class ConvolutionLayer(nn.Module):
    """Interaction, gate, and what was there before where the layer is residual."""

    def __init__(self, architecture: NequIPArchitecture, layer: int, known: int, source: TensorSource) -> None:
        super().__init__()
        after = architecture.features[layer + 1]
        has_odd = any(block.irrep == "0o" for block in parse_irreps(after))
        gate, scalar = ACTIVATIONS[architecture.gate_activation], ACTIVATIONS[architecture.scalar_activation]
        self.equivariant_nonlin = GatedActivation(after, scalar, gate, ACTIVATIONS["tanh"] if has_odd else None)
        self.conv = Interaction(architecture, layer, known, self.equivariant_nonlin, source.within("conv"))
        self.residual = architecture.residual[layer]

    def forward(self, features: Features, step: Step, attributes: Tensor, species: Tensor) -> Features:
        """
        Args:
            features: of the atoms; of all senders where they depend on the species only.
            step: of this pass.
            attributes: (types present, attributes), of each type of the batch.
            species: (senders,).
        """
        outputs = interact(
            features,
            step,
            self_connection=self.conv.self_connection(step, attributes),
            before=partial(self.conv.before, species=species),
            radial=self.conv.edge_mlp.mlp,
            convolution=self.conv.tp_scatter,
            denominator=None,
            after=self.conv.linear_2,
            gate=self.equivariant_nonlin,
        )
        return step.of_atoms(features).plus(outputs) if self.residual else outputs


class ScaleShift(nn.Module):
    """The unit of interaction energies and energies of isolated atoms, by element."""

    scales: Tensor
    shifts: Tensor

    def __init__(self, known: int, source: TensorSource) -> None:
        super().__init__()
        for name, drawn in (("scales", torch.ones(known)), ("shifts", torch.zeros(known))):
            register(self, name, source.take(name, (known,), drawn, parameter=False).detach())


class NequIPNetwork(nn.Module):
    """
    Args:
        architecture: of the file.
        elements: atomic numbers it knows; those of the file or some of them.
        source: of its tensors, cut to these elements (:mod:`.content`).
    """

    def __init__(self, architecture: NequIPArchitecture, elements: tuple[int, ...], source: TensorSource) -> None:
        super().__init__()
        self.architecture, self.elements = architecture, elements
        known = len(elements)
        inner = source.within("type_embed").within("embed_module")
        self.type_embed = NamedEmbedding(TypeEmbedding(known, architecture.attributes, inner))
        self.edge_norm = EdgeNormalizer(architecture.cutoff, known, source.within("edge_norm"))
        self.bessel_encode = RadialBasis(
            architecture.cutoff, architecture.bessel, architecture.cutoff_power, source.within("bessel_encode")
        )
        self.spherical = SphericalHarmonics(parse_irreps(architecture.harmonics)[-1].order)
        self.layers: list[ConvolutionLayer] = []
        for index in range(architecture.n_layers):
            name = f"layer{index}_convnet"
            self.layers.append(ConvolutionLayer(architecture, index, known, source.within(name)))
            self.add_module(name, self.layers[-1])
        self._add_readout(source)
        self.per_type_energy_scale_shift = ScaleShift(known, source.within("per_type_energy_scale_shift"))
        self.pair_potential: Repulsion | None = None
        if architecture.repulsion_power is not None:
            self.pair_potential = Repulsion(architecture.repulsion_power, source.within("pair_potential"))
        if left := source.left_over():
            raise UnfitError(f"there is no place for its tensor {left[0]}")
        self._species = Constant(torch.arange(known))
        self._charges = Constant(torch.tensor(elements, dtype=torch.float64))
        self._splines = RadialSplines()
        self.eval()

    def _add_readout(self, source: TensorSource) -> None:
        architecture = self.architecture
        last = parse_irreps(architecture.features[-1])
        if len(last) != 1 or not last[0].is_even_scalar:
            raise UnfitError(f"its last features are {architecture.features[-1]}")
        name = architecture.readout_activation
        activation = None if name is None else SCALAR_ACTIVATIONS[name]
        widths = (last[0].multiplicity, *architecture.readout_hidden, 1)
        inner = source.within("per_atom_energy_readout").within("mlp_module").within("mlp")
        self.per_atom_energy_readout = Readout(ScalarNetwork(widths, inner, activation, kind="readout"))

    @property
    def paired(self) -> bool:
        """Whether an edge and its reverse have the same radial weights: their cutoffs are the same."""
        return self.edge_norm.symmetric

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """The linear layer behind which there are energies of atoms."""
        return (list(self.per_atom_energy_readout.mlp_module.mlp)[-1],)

    def energy_factors(self, plan: Plan) -> Tensor:
        """(atoms, 1), eV, by which what the readout says is multiplied, in the plan's order."""
        return self.per_type_energy_scale_shift.scales[plan.species].unsqueeze(1)

    @property
    def scalar_blocks(self) -> list[tuple[int, int]]:
        """Place and number of the even scalars among the features behind each layer."""
        return [
            next((index, b.multiplicity) for index, b in enumerate(parse_irreps(after)) if b.is_even_scalar)
            for after in self.architecture.features[1:]
        ]

    def _splined(self, phase: Phase, ratio: Tensor) -> Splined:
        """Radial weights from splines, where they can be had."""
        if phase.curved:
            return None
        networks = [layer.conv.edge_mlp.mlp for layer in self.layers]
        modules = [self.bessel_encode, *networks]

        def function() -> Function:
            embedding, *copies = (copy.deepcopy(module).double() for module in modules)

            def values(ratio: Tensor, kind: int) -> list[Tensor]:
                radial = embedding(ratio)
                return [network(radial) for network in copies]

            return values

        channels = [layer.conv.tp_scatter.structure.channels for layer in self.layers]
        functions = RadialFunctions(function, networks, channels, modules)
        return self._splines.at(functions, phase, self.layers[0].conv.tp_scatter.kernels, ratio)

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
        """
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        species, of_senders = one_hot_species(plan, ghosts, self._species.on(vectors.device), vectors.dtype)
        ratio = self.edge_norm(lengths, plan, species)
        splined = self._splined(phase, ratio)
        radial = self.bessel_encode(ratio) if splined is None else ratio[:, :0]  # not read beside splines
        step = Step(
            plan=plan,
            phase=phase,
            harmonics=self.spherical(-vectors, lengths),
            radial=radial if can_train(self.bessel_encode) else Cut.apply(radial, phase),  # pyright: ignore[reportArgumentType]
            cutoff=None,
            attributes=of_senders if ghosts is None else of_senders[: plan.n_atoms],
            ghosts=ghosts,
            sender_attributes=of_senders,
            splined=splined,
        )
        features: Features = self.type_embed.embed_module(
            Features([of_senders.unsqueeze(1)], geometric=False, trains=False)
        )
        # atoms are sorted by species: the first of each stands for all
        groups = features.blocks[0][: plan.n_atoms, 0].split(list(plan.counts))
        attributes = torch.cat([group[:1] for group in groups])
        behind: list[Features] = []
        for layer in self.layers:
            features = layer(features, step, attributes, species)
            behind.append(features)
        energies = self.per_atom_energy_readout(features.blocks[0][:, 0])
        energies = energies * self.per_type_energy_scale_shift.scales[plan.species]
        if self.pair_potential is not None:
            charges = self._charges.like(lengths)[species].unsqueeze(1)
            repulsion = self.pair_potential(lengths, ratio, (charges[plan.receiver], charges[plan.sender]))
            energies = energies.index_add(0, plan.edge_receiver, repulsion[plan.edge_pair, 0])
        return energies, behind
