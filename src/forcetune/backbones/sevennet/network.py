"""SevenNet as a network of our own (Park et al., J. Chem. Theory Comput. 2024), with the names of its files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from forcetune.backbones.nequip.interaction import ACTIVATIONS, ModalLinear, in_order_of_inputs, interact
from forcetune.backbones.sevennet.architecture import SevenNetArchitecture
from forcetune.irreps import irreps_text, parse_irreps
from forcetune.kernels.constants import Constant
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.features import Features
from forcetune.kernels.harmonics import SphericalHarmonics
from forcetune.kernels.layers import (
    Convolution,
    EquivariantLinear,
    GatedActivation,
    SpeciesLinear,
    channelwise_paths,
)
from forcetune.kernels.phase import Cut, Phase
from forcetune.kernels.radial import RadialNetwork, envelope, smooth_step
from forcetune.kernels.site import Site, WeightPath
from forcetune.kernels.splines import Function, RadialFunctions, RadialSplines, Splined
from forcetune.kernels.step import Ghosts, Step, can_train, one_hot_species
from forcetune.kernels.tensors import TensorSource, UnfitError, register


class BesselBasis(nn.Module):
    """2/r_c sin(w_n r) / r with trained frequencies."""

    coeffs: Tensor

    def __init__(self, cutoff: float, size: int, source: TensorSource) -> None:
        super().__init__()
        frequencies = torch.pi / cutoff * torch.arange(1, size + 1, dtype=torch.float64)
        register(self, "coeffs", source.take("coeffs", (size,), frequencies))
        self.prefactor = 2.0 / cutoff

    def forward(self, lengths: Tensor) -> Tensor:
        """(edges, 1), Å, to (edges, size)."""
        return self.prefactor * torch.sin(self.coeffs * lengths) / lengths

    def sites(self, name: str) -> Iterator[Site]:
        path = WeightPath("all", 0, tuple(self.coeffs.shape))
        yield Site(f"{name}.coeffs", name, "coeffs", name, "radial_basis", (path,))


class EdgeEmbedding(nn.Module):
    """Radial basis times cutoff function, and spherical harmonics of the direction from receiver to sender."""

    def __init__(self, architecture: SevenNetArchitecture, source: TensorSource) -> None:
        super().__init__()
        self.basis_function = BesselBasis(architecture.cutoff, architecture.bessel, source.within("basis_function"))
        highest = parse_irreps(architecture.harmonics)[-1].order
        self.spherical = SphericalHarmonics(highest, solid=architecture.solid_harmonics)
        self.cutoff = architecture.cutoff
        self.smooth = architecture.cutoff_function == "XPLOR"
        self.parameter = architecture.cutoff_parameter

    def radial(self, lengths: Tensor) -> Tensor:
        """(edges, 1), Å, to (edges, size)."""
        if self.smooth:
            decay = smooth_step(lengths, self.parameter, self.cutoff)
        else:
            decay = envelope(lengths / self.cutoff, self.parameter)
        return self.basis_function(lengths) * decay

    def forward(self, lengths: Tensor) -> Tensor:
        return self.radial(lengths)


class IrrepsLinear(nn.Module):
    """A linear layer, or one that knows the modality, under the name that files give it."""

    def __init__(
        self,
        irreps_in: str,
        irreps_out: str,
        source: TensorSource,
        *,
        modalities: int = 0,
        biases: bool = False,
        kind: str = "linear",
        further_inputs: int = 0,
        one_hot: bool = False,
    ) -> None:
        super().__init__()
        inner = source.within("linear")
        if modalities:
            self.linear: EquivariantLinear = ModalLinear(
                irreps_in,
                irreps_out,
                inner,
                modalities=modalities,
                biases=biases,
                kind=kind,
                further_inputs=further_inputs,
            )
        else:
            self.linear = EquivariantLinear(
                irreps_in,
                irreps_out,
                inner,
                biases=biases,
                kind=kind,
                further_inputs=further_inputs,
                one_hot=one_hot,
            )

    def forward(self, features: Features) -> Features:
        return self.linear(features)


class SelfConnection(nn.Module):
    """What skips the convolution: linear, or with a matrix for each species."""

    def __init__(
        self, kind: str, irreps_in: str, irreps_out: str, species: tuple[int, int], source: TensorSource
    ) -> None:
        super().__init__()
        self.linear = self.fc_tensor_product = None
        if kind == "linear":
            # in the place of a tensor product, which methods treat apart from other linear layers
            self.linear = EquivariantLinear(irreps_in, irreps_out, source.within("linear"), kind="tensor_product")
        else:
            inner = source.within("fc_tensor_product")
            self.fc_tensor_product = SpeciesLinear(irreps_in, irreps_out, species[0], inner, species[1])

    def of_step(self, step: Step) -> Callable[[Features], Features]:
        """The layer as a function of features alone."""
        coupled = self.fc_tensor_product
        if coupled is not None:
            return lambda features: coupled(features, step)
        assert self.linear is not None
        return self.linear


class IrrepsConvolution(nn.Module):
    """Radial network, tensor product, denominator."""

    denominator: Tensor

    def __init__(self, architecture: SevenNetArchitecture, irreps_in: str, targets: str, source: TensorSource) -> None:
        super().__init__()
        paths, irreps_mid = channelwise_paths(irreps_in, architecture.harmonics, targets)
        if not architecture.sorted_paths:
            paths = in_order_of_inputs(paths, irreps_mid)
        denominator = source.take("denominator", (1,), torch.ones(1), parameter=False).detach()
        if not bool(denominator):
            raise UnfitError(f"it divides its sums over neighbours by {float(denominator)}")
        register(self, "denominator", denominator)
        self.convolution = Convolution(
            irreps_in, architecture.harmonics, paths, irreps_mid, source.within("convolution")
        )
        widths = (architecture.bessel, *architecture.radial_hidden, self.convolution.weight_numel)
        activation = ACTIVATIONS[architecture.radial_activation]
        self.weight_nn = RadialNetwork(widths, source.within("weight_nn"), activation=activation)
        source.within("convolution").optional("weight")

    @property
    def irreps_out(self) -> str:
        return self.convolution.irreps_out


class FullyConnectedReadout(nn.Module):
    """Energies of atoms by a network of scalars."""

    def __init__(self, fcn: RadialNetwork) -> None:
        super().__init__()
        self.fcn = fcn

    def forward(self, scalars: Tensor) -> Tensor:
        return self.fcn(scalars)[:, 0]


class Rescaling(nn.Module):
    """Energies of isolated atoms and the unit of interaction energies, by element."""

    shift: Tensor
    scale: Tensor

    def __init__(self, source: TensorSource, known: int) -> None:
        super().__init__()
        for name, drawn in (("shift", torch.zeros(known)), ("scale", torch.ones(known))):
            register(self, name, source.take(name, (known,), drawn, parameter=False).detach())


class SevenNetNetwork(nn.Module):
    """SevenNet with one modality.

    Args:
        architecture: of the file.
        elements: atomic numbers it knows; those of the file or some of them.
        source: of its tensors, cut to these elements and one modality (:mod:`.content`).
    """

    def __init__(self, architecture: SevenNetArchitecture, elements: tuple[int, ...], source: TensorSource) -> None:
        super().__init__()
        self.architecture, self.elements = architecture, elements
        known, counted = len(elements), len(architecture.type_map)
        modal = dict.fromkeys(architecture.modal_layers, len(architecture.modalities))
        biases = architecture.biases
        self.edge_embedding = EdgeEmbedding(architecture, source.within("edge_embedding"))
        self.onehot_to_feature_x = IrrepsLinear(
            f"{known}x0e",
            architecture.features[0],
            source.within("onehot_to_feature_x"),
            modalities=modal.get("node_embedding", 0),
            biases=biases,
            further_inputs=counted - known,
            one_hot=True,
        )
        self.layers: list[tuple[SelfConnection | None, IrrepsLinear, IrrepsConvolution, IrrepsLinear, GatedActivation]]
        self.layers = []
        for index in range(architecture.n_layers):
            self._add_layer(index, modal, (known, counted), source)
        self._add_readout(modal, source)
        self.rescale_atomic_energy = Rescaling(source.within("rescale_atomic_energy"), known)
        if left := source.left_over():
            raise UnfitError(f"there is no place for its tensor {left[0]}")
        self._species = Constant(torch.arange(known))
        self._splines = RadialSplines()
        self.eval()

    def _add_layer(self, index: int, modal: dict[str, int], species: tuple[int, int], source: TensorSource) -> None:
        architecture, biases = self.architecture, self.architecture.biases
        before, after = architecture.features[index], architecture.features[index + 1]
        even, odd = (ACTIVATIONS[name] for name in architecture.scalar_activations)
        has_odd = any(block.irrep == "0o" for block in parse_irreps(after))
        if has_odd and architecture.scalar_activations[1] != "tanh":
            raise UnfitError(f"its odd scalars go through {architecture.scalar_activations[1]}, which is not odd")
        gate = GatedActivation(after, even, ACTIVATIONS[architecture.gate_activation], odd if has_odd else None)
        kind = architecture.self_connections[index]
        connection = None
        if kind != "none":
            inner = source.within(f"{index}_self_connection_intro")
            connection = SelfConnection(kind, before, gate.irreps_in, species, inner)
            self.add_module(f"{index}_self_connection_intro", connection)
        first = IrrepsLinear(
            before,
            before,
            source.within(f"{index}_self_interaction_1"),
            modalities=modal.get("self_interaction_1", 0),
            biases=biases,
        )
        targets = architecture.convolution_targets(index)
        convolution = IrrepsConvolution(architecture, before, targets, source.within(f"{index}_convolution"))
        second = IrrepsLinear(
            convolution.irreps_out,
            gate.irreps_in,
            source.within(f"{index}_self_interaction_2"),
            modalities=modal.get("self_interaction_2", 0),
            biases=biases,
        )
        for name, module in (
            ("self_interaction_1", first),
            ("convolution", convolution),
            ("self_interaction_2", second),
        ):
            self.add_module(f"{index}_{name}", module)
        self.add_module(f"{index}_equivariant_gate", gate)
        self.layers.append((connection, first, convolution, second, gate))

    def _add_readout(self, modal: dict[str, int], source: TensorSource) -> None:
        architecture = self.architecture
        last = parse_irreps(architecture.features[-1])
        if any(not block.is_even_scalar for block in last):
            raise UnfitError(f"its last features are {architecture.features[-1]}")
        width = sum(block.multiplicity for block in last)
        self.readout_FCN: FullyConnectedReadout | None = None
        if architecture.readout_hidden is not None:
            assert architecture.readout_activation is not None
            widths = (width, *architecture.readout_hidden, 1)
            activation = ACTIVATIONS[architecture.readout_activation]
            inner = source.within("readout_FCN").within("fcn")
            fcn = RadialNetwork(widths, inner, activation=activation, kind="readout")
            self.readout_FCN = FullyConnectedReadout(fcn)
            return
        features, biases = irreps_text(last), architecture.biases
        self.reduce_input_to_hidden = IrrepsLinear(
            features,
            f"{width // 2}x0e",
            source.within("reduce_input_to_hidden"),
            modalities=modal.get("reduce_input_to_hidden", 0),
            biases=biases,
            kind="readout",
        )
        self.reduce_hidden_to_energy = IrrepsLinear(
            f"{width // 2}x0e", "1x0e", source.within("reduce_hidden_to_energy"), biases=biases, kind="readout"
        )

    @property
    def paired(self) -> bool:
        """An edge and its reverse have the same radial weights."""
        return True

    @property
    def last_layers(self) -> tuple[nn.Module, ...]:
        """The linear layer behind which there are energies of atoms."""
        if self.readout_FCN is not None:
            return (list(self.readout_FCN.fcn)[-1],)
        return (self.reduce_hidden_to_energy.linear,)

    def energy_factors(self, plan: Plan) -> Tensor:
        """(atoms, 1), eV, by which what the readout says is multiplied, in the plan's order."""
        return self.rescale_atomic_energy.scale[plan.species].unsqueeze(1)

    @property
    def n_scalars(self) -> int:
        """Invariants of the features behind all layers."""
        return sum(
            block.multiplicity
            for features in self.architecture.features[1:]
            for block in parse_irreps(features)
            if block.is_even_scalar
        )

    def _splined(self, phase: Phase, lengths: Tensor) -> Splined:
        """Radial weights from splines, where they can be had."""
        if phase.curved:
            return None
        convolutions = [convolution for _, _, convolution, _, _ in self.layers]
        networks = [convolution.weight_nn for convolution in convolutions]
        modules, cutoff = [self.edge_embedding, *networks], self.edge_embedding.cutoff

        def function() -> Function:
            embedding, *copies = (copy.deepcopy(module).double() for module in modules)

            def values(ratio: Tensor, kind: int) -> list[Tensor]:
                radial = embedding(ratio * cutoff)
                return [network(radial) for network in copies]

            return values

        channels = [convolution.convolution.structure.channels for convolution in convolutions]
        breaks = [self.edge_embedding.parameter / cutoff] if self.edge_embedding.smooth else []
        functions = RadialFunctions(function, networks, channels, modules, breaks)
        return self._splines.at(functions, phase, convolutions[0].convolution.kernels, lengths / cutoff)

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
        splined = self._splined(phase, lengths)
        radial = self.edge_embedding(lengths) if splined is None else lengths[:, :0]  # not read beside splines
        _, of_senders = one_hot_species(plan, ghosts, self._species.on(vectors.device), vectors.dtype)
        step = Step(
            plan=plan,
            phase=phase,
            harmonics=self.edge_embedding.spherical(-vectors, lengths),
            radial=radial if can_train(self.edge_embedding) else Cut.apply(radial, phase),  # pyright: ignore[reportArgumentType]
            cutoff=None,
            attributes=of_senders if ghosts is None else of_senders[: plan.n_atoms],
            ghosts=ghosts,
            sender_attributes=of_senders,
            splined=splined,
        )
        features: Features = self.onehot_to_feature_x(
            Features([of_senders.unsqueeze(1)], geometric=False, trains=False)
        )
        outputs: list[Features] = []
        for connection, first, convolution, second, gate in self.layers:
            features = interact(
                features,
                step,
                self_connection=None if connection is None else connection.of_step(step),
                before=first,
                radial=convolution.weight_nn,
                convolution=convolution.convolution,
                denominator=convolution.denominator,
                after=second,
                gate=gate,
            )
            outputs.append(features)
        if self.readout_FCN is not None:
            energies = self.readout_FCN(features.blocks[0][:, 0])
        else:
            energies = self.reduce_hidden_to_energy(self.reduce_input_to_hidden(features)).blocks[0][:, 0, 0]
        return energies * self.rescale_atomic_energy.scale[plan.species], outputs
