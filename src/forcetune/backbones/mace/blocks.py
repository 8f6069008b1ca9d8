"""The blocks of MACE, under the names of mace's files; their layers are those of :mod:`forcetune.kernels`.

Batatia et al., MACE (NeurIPS 2022), arXiv 2206.07697; equation numbers are those of the paper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from forcetune.backbones.mace.architecture import MaceArchitecture
from forcetune.irreps import irreps_text, merge_neighbours, parse_irreps
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.features import Features
from forcetune.kernels.harmonics import second_moment_factor
from forcetune.kernels.layers import (
    Convolution,
    EquivariantLinear,
    GatedActivation,
    SpeciesLinear,
    channelwise_paths,
)
from forcetune.kernels.radial import (
    AgnesiTransform,
    BesselBasis,
    ChebyshevBasis,
    GaussianBasis,
    NormedRadialNetwork,
    PolynomialCutoff,
    RadialNetwork,
    SoftTransform,
)
from forcetune.kernels.step import Step, can_train
from forcetune.kernels.symmetric_contraction import SymmetricContraction
from forcetune.kernels.tensors import TensorSource, UnfitError, register

PLAIN_INTERACTIONS = (
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
)
"""Interactions that differ in their skip connection and in what messages are divided by."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "elu": functional.elu,
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "softplus": functional.softplus,
}
"""What the last readout can have between its layers."""


class NodeEmbedding(nn.Module):
    """One-hot species to even scalars."""

    def __init__(self, n_species: int, channels: int, source: TensorSource) -> None:
        super().__init__()
        self.linear = EquivariantLinear(f"{n_species}x0e", f"{channels}x0e", source.within("linear"), one_hot=True)

    def forward(self, attributes: Features) -> Features:
        return self.linear(attributes)


class RadialEmbedding(nn.Module):
    """Radial basis of each distance, transformed first where the model does that, times the envelope."""

    def __init__(self, architecture: MaceArchitecture, source: TensorSource) -> None:
        super().__init__()
        cutoff, size, inner = architecture.r_max, architecture.num_bessel, source.within("bessel_fn")
        if architecture.radial_type == "bessel":
            self.bessel_fn: nn.Module = BesselBasis(cutoff, size, inner)
        elif architecture.radial_type == "gaussian":
            coefficient = dict(architecture.constants).get("radial_embedding.bessel_fn.coeff")
            self.bessel_fn = GaussianBasis(cutoff, size, inner, coefficient)
        elif architecture.radial_type == "chebyshev":
            self.bessel_fn = ChebyshevBasis(size, inner)
        else:
            raise UnfitError(f"its radial basis is {architecture.radial_type}")
        self.distance_transform: nn.Module | None = None
        if architecture.distance_transform != "None":
            kinds = {"Agnesi": AgnesiTransform, "Soft": SoftTransform}
            if architecture.distance_transform not in kinds:
                raise UnfitError(f"its distance transform is {architecture.distance_transform}")
            self.distance_transform = kinds[architecture.distance_transform](source.within("distance_transform"))
        self.cutoff_fn = PolynomialCutoff(cutoff, architecture.num_polynomial_cutoff, source.within("cutoff_fn"))
        self.apply_cutoff = architecture.apply_cutoff

    def forward(self, lengths: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            lengths: (pairs, 1), Å.
            first, second: (pairs,) atomic numbers.

        Returns:
            (pairs, basis), and (pairs, 1) where the envelope belongs to the radial weights instead.
        """
        cutoff = self.cutoff_fn(lengths)
        moved = lengths if self.distance_transform is None else self.distance_transform(lengths, first, second)
        basis = self.bessel_fn(moved)
        return (basis * cutoff, None) if self.apply_cutoff else (basis, cutoff)


class AtomicEnergies(nn.Module):
    """Energies of isolated atoms as the file has them; they are added in float64 outside of the network."""

    atomic_energies: Tensor

    def __init__(self, heads: int, n_species: int, source: TensorSource) -> None:
        super().__init__()
        drawn = torch.zeros(heads, n_species, dtype=torch.float64)
        register(self, "atomic_energies", source.take("atomic_energies", None, drawn, parameter=False))
        shape = tuple(torch.atleast_2d(self.atomic_energies).shape)
        if shape != (heads, n_species):
            raise UnfitError(f"it has reference energies of shape {shape} for {heads} heads, {n_species} elements")


class ScaleShift(nn.Module):
    """Interaction energies of atoms times a scale, plus a shift."""

    scale: Tensor
    shift: Tensor

    def __init__(self, heads: int, source: TensorSource) -> None:
        super().__init__()
        for name, drawn in (("scale", torch.ones(heads)), ("shift", torch.zeros(heads))):
            register(self, name, source.take(name, None, drawn, parameter=False))
            shape = tuple(torch.atleast_1d(getattr(self, name)).shape)
            if shape != (heads,):
                raise UnfitError(f"it has a {name} of shape {shape} for {heads} heads")

    def forward(self, energies: Tensor) -> Tensor:
        return self.scale.reshape(-1)[0] * energies + self.shift.reshape(-1)[0]


class Interaction(nn.Module):
    """Messages from the neighbours of each atom (eq. 8 and 9): linear, convolution, linear, skip connection.

    Attributes:
        residual: the skip connection starts from the features that come in, and not from the messages.
        has_density: messages are divided by 1 + Σ tanh²(density) instead of the average number of neighbours.
    """

    def __init__(self, kind: str, irreps: BlockIrreps, neighbours: float, source: TensorSource) -> None:
        super().__init__()
        self.irreps = irreps
        self.residual, self.has_density = "Residual" in kind, "Density" in kind
        self.linear_up = EquivariantLinear(irreps.features, irreps.edges, source.within("linear_up"))
        paths, irreps_mid = channelwise_paths(irreps.edges, irreps.harmonics, irreps.target)
        self.conv_tp = Convolution(irreps.edges, irreps.harmonics, paths, irreps_mid, source.within("conv_tp"))
        widths = (irreps.radial[0], *irreps.radial[1:], self.conv_tp.weight_numel)
        self.conv_tp_weights = RadialNetwork(
            widths, source.within("conv_tp_weights"), irreps.factors("conv_tp_weights")
        )
        self.linear = EquivariantLinear(irreps_mid, irreps.target, source.within("linear"))
        ends = (irreps.features, irreps.hidden) if self.residual else (irreps.target, irreps.target)
        self.skip_tp = SpeciesLinear(*ends, irreps.n_species, source.within("skip_tp"))
        if self.has_density:
            self.density_fn = RadialNetwork((irreps.radial[0], 1), source.within("density_fn"))
        else:
            self.density_fn = None
        self.neighbours = neighbours
        if (stored := source.optional("avg_num_neighbors")) is not None:
            register(self, "avg_num_neighbors", stored)

    def forward(self, features: Features, step: Step) -> tuple[Features, Features | None]:
        skip = self.skip_tp(step.of_atoms(features), step) if self.residual else None
        up = self.linear_up(features)
        radial = self.conv_tp_weights(step.radial)
        if step.cutoff is not None:
            radial = radial * step.cutoff
        message = self.linear(self.conv_tp(step, radial, up, can_train(self.conv_tp_weights)))
        if self.density_fn is None:
            message = message.scaled(1 / self.neighbours)
        else:
            density = torch.tanh(self.density_fn(step.radial) ** 2)
            if step.cutoff is not None:
                density = density * step.cutoff
            message = message.scaled(1 / (sum_over_neighbors(step.plan, density) + 1).unsqueeze(2))
            message.trains = message.trains or can_train(self.density_fn)
        return (message, skip) if self.residual else (self.skip_tp(message, step), None)


class NonLinearInteraction(nn.Module):
    """The interaction of MACE-OMOL and later: radial weights know both species, and a gate follows the messages."""

    alpha: Tensor
    beta: Tensor

    def __init__(self, irreps: BlockIrreps, source: TensorSource) -> None:
        super().__init__()
        self.irreps = irreps
        scalars = sum(block.multiplicity for block in parse_irreps(irreps.features) if block.is_even_scalar)
        species = f"{irreps.n_species}x0e"
        self.source_embedding = EquivariantLinear(
            species, f"{scalars}x0e", source.within("source_embedding"), one_hot=True
        )
        self.target_embedding = EquivariantLinear(
            species, f"{scalars}x0e", source.within("target_embedding"), one_hot=True
        )
        self.linear_up = EquivariantLinear(irreps.features, irreps.edges, source.within("linear_up"))
        paths, irreps_mid = channelwise_paths(irreps.edges, irreps.harmonics, irreps.target)
        self.conv_tp = Convolution(irreps.edges, irreps.harmonics, paths, irreps_mid, source.within("conv_tp"))
        inputs = irreps.radial[0] + 2 * scalars
        widths = (inputs, *irreps.radial[1:], self.conv_tp.weight_numel)
        self.conv_tp_weights = NormedRadialNetwork(widths, source.within("conv_tp_weights"))
        self.skip_tp = EquivariantLinear(irreps.features, irreps.hidden, source.within("skip_tp"))
        self.equivariant_nonlin = GatedActivation(irreps.target)
        gated = self.equivariant_nonlin.irreps_in
        self.linear_res = EquivariantLinear(irreps.edges, gated, source.within("linear_res"))
        self.linear_1 = EquivariantLinear(irreps_mid, gated, source.within("linear_1"))
        self.linear_2 = EquivariantLinear(irreps.target, irreps.target, source.within("linear_2"))
        self.density_fn = NormedRadialNetwork((inputs, 64, 1), source.within("density_fn"))
        for name, value in (("alpha", 20.0), ("beta", 0.0)):
            register(self, name, source.take(name, (), functools.partial(torch.full, fill_value=value)))
        if source.draws:
            for layer in (self.source_embedding, self.target_embedding):
                nn.init.uniform_(layer.weight, -0.001, 0.001)
        if (stored := source.optional("avg_num_neighbors")) is not None:
            register(self, "avg_num_neighbors", stored)

    def forward(self, features: Features, step: Step) -> tuple[Features, Features]:
        plan = step.plan
        skip = self.skip_tp(step.of_atoms(features))
        up = self.linear_up(features)
        rest = self.linear_res(step.of_atoms(up))
        assert step.sender_attributes is not None
        embeddings = (self.source_embedding, step.sender_attributes), (self.target_embedding, step.attributes)
        senders, receivers = (
            embedding(Features([attributes.unsqueeze(1)], geometric=False, trains=False)).blocks[0][:, 0]
            for embedding, attributes in embeddings
        )
        inputs = torch.cat([step.radial, senders[plan.sender], receivers[plan.receiver]], dim=-1)
        radial = self.conv_tp_weights(inputs)
        density = torch.tanh(self.density_fn(inputs) ** 2)
        if step.cutoff is not None:
            radial, density = radial * step.cutoff, density * step.cutoff
        around = (sum_over_neighbors(plan, density) * self.beta + self.alpha).unsqueeze(2)
        message = self.linear_1(self.conv_tp(step, radial, up, True)).scaled(1 / around).plus(rest)
        return self.linear_2(self.equivariant_nonlin(message)), skip


def sum_over_neighbors(plan: Plan, values: Tensor) -> Tensor:
    """Values of the edges summed at their receivers: (pairs, width) to (atoms, width)."""
    sums = values.new_zeros(plan.n_atoms, values.shape[1])
    return sums.index_add(0, plan.edge_receiver, values[plan.edge_pair])


class Product(nn.Module):
    """Symmetric contraction of the messages, linear layer, and what skipped both (eq. 10 and 11)."""

    def __init__(
        self, target: str, hidden: str, order: int, n_species: int, uses_skip: bool, source: TensorSource
    ) -> None:
        super().__init__()
        inner = source.within("symmetric_contractions")
        self.symmetric_contractions = SymmetricContraction(target, hidden, order, n_species, inner)
        self.linear = EquivariantLinear(hidden, hidden, source.within("linear"))
        self.uses_skip = uses_skip
        blocks = parse_irreps(hidden)
        self.scalar_blocks = [index for index, block in enumerate(blocks) if block.is_even_scalar]
        self.n_scalars = sum(blocks[index].multiplicity for index in self.scalar_blocks)

    def forward(self, message: Features, skip: Features | None, step: Step) -> Features:
        features = self.linear(self.symmetric_contractions(message, step))
        return features.plus(skip) if self.uses_skip and skip is not None else features


class LinearReadout(nn.Module):
    """Energy of each atom from its even scalars."""

    def __init__(self, irreps: str, heads: int, source: TensorSource) -> None:
        super().__init__()
        self.linear = EquivariantLinear(irreps, f"{heads}x0e", source.within("linear"), kind="readout")

    def forward(self, features: Features) -> Tensor:
        return self.linear(features).blocks[0][:, 0]


class NonLinearReadout(nn.Module):
    """Energy of each atom by a perceptron with one or two hidden layers."""

    def __init__(self, irreps: str, architecture: MaceArchitecture, source: TensorSource) -> None:
        super().__init__()
        heads = len(architecture.heads)
        blocks = merge_neighbours(parse_irreps(architecture.MLP_irreps))
        if len(blocks) != 1:
            raise UnfitError(f"its readouts have the irreps {architecture.MLP_irreps}")
        (block,) = blocks
        count = max(heads, architecture.mixed_heads)
        first, hidden = (irreps_text([block._replace(multiplicity=n * block.multiplicity)]) for n in (count, heads))
        biased = architecture.readout == "NonLinearBiasReadoutBlock"
        self.linear_1 = EquivariantLinear(irreps, first, source.within("linear_1"), kind="readout")
        self.linear_mid = None
        if biased:
            middle = source.within("linear_mid")
            self.linear_mid = EquivariantLinear(first, hidden, middle, biases=True, kind="readout")
        self.linear_2 = EquivariantLinear(
            hidden, f"{heads}x0e", source.within("linear_2"), biases=biased, kind="readout"
        )
        gate = architecture.gate
        self.activation = None if gate is None else ACTIVATIONS[gate]
        ending = "non_linearity.acts.0.cst"
        stored = [value for name, value in architecture.constants if name.endswith(ending)]
        self.factor = 1.0
        if self.activation is not None:
            self.factor = stored[0] if stored else second_moment_factor(self.activation)

    def _activated(self, features: Features) -> Features:
        if self.activation is None:
            return features
        blocks = [self.activation(block) * self.factor for block in features.blocks]
        return Features(blocks, geometric=features.geometric, trains=features.trains)

    def forward(self, features: Features) -> Tensor:
        hidden = self._activated(self.linear_1(features))
        if self.linear_mid is not None:
            hidden = self._activated(self.linear_mid(hidden))
        return self.linear_2(hidden).blocks[0][:, 0]


class BlockIrreps:
    """Irreps and widths around one interaction block.

    Attributes:
        features: that come in.
        edges: of the senders in the convolution.
        harmonics: of the directions.
        target: of the messages.
        hidden: that go out.
        radial: widths of the radial network without its output.
    """

    def __init__(
        self, architecture: MaceArchitecture, index: int, features: str, edges: str, hidden: str, target: str
    ) -> None:
        self.features, self.edges, self.hidden, self.target = features, edges, hidden, target
        self.harmonics = harmonics_text(architecture)
        self.n_species = len(architecture.atomic_numbers)
        self.radial = (architecture.num_bessel, *architecture.radial_MLP)
        self._constants = dict(architecture.constants)
        self._prefix = f"interactions.{index}."

    def factors(self, network: str) -> Callable[[str], float | None]:
        """Stored normalisations of the activations of a radial network."""
        return lambda name: self._constants.get(f"{self._prefix}{network}.{name}")


def harmonics_text(architecture: MaceArchitecture) -> str:
    """Irreps of the spherical harmonics."""
    parities = ["e" if architecture.use_so3 or order % 2 == 0 else "o" for order in range(architecture.max_ell + 1)]
    return "+".join(f"1x{order}{parity}" for order, parity in enumerate(parities))
