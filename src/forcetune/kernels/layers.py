"""Equivariant layers with weights: linear, linear for each species, channel-wise convolution, gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from forcetune.irreps import Block as IrrepsBlock
from forcetune.irreps import irreps_text, merge_neighbours, parse_irreps
from forcetune.kernels.compiled import convolution as compiled
from forcetune.kernels.compiled import splined_convolution as splined
from forcetune.kernels.compiled.choice import Kernels, takes_compiled, takes_triton
from forcetune.kernels.constants import Constant
from forcetune.kernels.convolution import Path, Paths, convolve
from forcetune.kernels.cueq.convolution import ConvolutionPolynomial
from forcetune.kernels.cueq.species_linear import SpeciesLinearPolynomial
from forcetune.kernels.features import Features, Layout
from forcetune.kernels.harmonics import second_moment_factor, wigner_3j
from forcetune.kernels.linear import Block, equivariant_linear, species_linear
from forcetune.kernels.site import Site, WeightPath, numbered
from forcetune.kernels.step import Step, can_train
from forcetune.kernels.tensors import TensorSource, UnfitError, register
from forcetune.kernels.triton import convolution as triton


def layout_for(blocks: Sequence[IrrepsBlock]) -> Layout:
    """(dim, channels) of each block."""
    return tuple((block.dim, block.multiplicity) for block in blocks)


def merged_places(irreps: str) -> tuple[tuple[IrrepsBlock, ...], list[tuple[int, int]]]:
    """Irreps with equal neighbours merged, and for each of the original its place: (block, first channel)."""
    places: list[tuple[int, int]] = []
    blocks = parse_irreps(irreps)
    index, channel = -1, 0
    for number, block in enumerate(blocks):
        if number and blocks[number - 1].irrep == block.irrep:
            channel += blocks[number - 1].multiplicity
        else:
            index, channel = index + 1, 0
        places.append((index, channel))
    return merge_neighbours(blocks), places


class LayerGate(Protocol):
    """What an adapter puts on a linear layer, to compute in its place."""

    def __call__(self, layer: EquivariantLinear, features: Features) -> Features: ...


class EquivariantLinear(nn.Module):
    """out = Σ x W for each irrep, divided by the root of the number of inputs that reach it; scalars may have a bias.

    The flat weight has the blocks of all pairs of equal irreps, (multiplicity in, multiplicity out), inputs first.

    Args:
        irreps_in, irreps_out: equal neighbours among the inputs count as one irrep.
        source: of ``weight`` and ``bias``.
        biases: whether even scalars have a bias.
        kind: of its site.
        further_inputs: even scalars among the inputs that were cut away, which the normalisation still counts.
        merge: whether equal neighbours among the inputs count as one irrep.
        one_hot: whether the input is the one-hot element.

    Attributes:
        gated_by: computes the layer together with a gate on it; None for the layer alone.
        kernels: that compute the gate.
    """

    kernels: Kernels = "auto"

    weight: Tensor
    bias: Tensor
    gated_by: LayerGate | None

    def __init__(
        self,
        irreps_in: str,
        irreps_out: str,
        source: TensorSource,
        *,
        biases: bool = False,
        kind: str = "linear",
        further_inputs: int = 0,
        merge: bool = True,
        one_hot: bool = False,
    ) -> None:
        super().__init__()
        inputs, outputs = parse_irreps(irreps_in), parse_irreps(irreps_out)
        inputs = merge_neighbours(inputs) if merge else inputs
        if len(merge_neighbours(outputs)) != len(outputs):
            raise UnfitError(f"a linear layer has the outputs {irreps_out}, one irrep twice in a row")
        self.irreps_in, self.irreps_out = irreps_text(inputs), irreps_text(outputs)
        self.kind, self.one_hot = kind, one_hot
        self.gated_by = None
        self.layout = layout_for(outputs)
        self.blocks: list[Block] = []
        labels: list[str] = []
        start = 0
        for i, block in enumerate(inputs):
            for k, target in enumerate(outputs):
                if block.irrep != target.irrep:
                    continue
                fan_in = sum(other.multiplicity for other in inputs if other.irrep == target.irrep)
                fan_in += further_inputs if target.is_even_scalar else 0
                rows, columns = block.multiplicity, target.multiplicity
                self.blocks.append(Block(i, k, 0, rows, columns, start, 1 / math.sqrt(fan_in)))
                labels.append(f"{block.irrep}->{target.irrep}")
                start += rows * columns
        self._labels = numbered(labels)
        register(self, "weight", source.take("weight", (start,), torch.randn))
        self.biased: list[tuple[int, int, int]] = []
        width = 0
        for k, target in enumerate(outputs if biases else ()):
            if target.is_even_scalar:
                self.biased.append((k, width, width + target.multiplicity))
                width += target.multiplicity
        if width:
            register(self, "bias", source.take("bias", (width,), torch.zeros))
        elif (empty := source.optional("bias")) is not None and empty.numel():
            raise UnfitError(f"a linear layer from {irreps_in} to {irreps_out} has a bias")
        source.optional("output_mask")

    def forward(self, features: Features) -> Features:
        return self.ungated(features) if self.gated_by is None else self.gated_by(self, features)

    def ungated(self, features: Features) -> Features:
        """The layer alone."""
        blocks = equivariant_linear(self.blocks, self.weight, features.blocks, self.layout)
        for target, start, stop in self.biased:
            blocks[target] = blocks[target] + self.bias[start:stop]
        return Features(blocks, geometric=features.geometric, trains=features.trains or can_train(self))

    def sites(self, name: str) -> Iterator[Site]:
        paths = tuple(
            WeightPath(
                label,
                block.start,
                (block.fan_in, block.fan_out),
                by_element=(1, block.fan_in, block.fan_out) if self.one_hot else None,
            )
            for label, block in zip(self._labels, self.blocks, strict=True)
        )
        yield Site(f"{name}.weight", name, "weight", name, self.kind, paths, self.irreps_in, self.irreps_out)


class SpeciesLinear(nn.Module):
    """A matrix for each species: the fully connected tensor product of features with one-hot species.

    The flat weight has the blocks (multiplicity in, species, multiplicity out) of all pairs of equal irreps.

    Args:
        irreps_in, irreps_out: of the features.
        n_species: of the one-hot.
        source: of ``weight``, and of the couplings 1/√(2 l + 1) as the file has them rounded.
        counted_species: that the normalisation counts, where some were cut away.

    Attributes:
        kernels: that compute it.
    """

    weight: Tensor
    kernels: Kernels = "auto"

    def __init__(
        self,
        irreps_in: str,
        irreps_out: str,
        n_species: int,
        source: TensorSource,
        counted_species: int | None = None,
    ) -> None:
        super().__init__()
        inputs, outputs = parse_irreps(irreps_in), parse_irreps(irreps_out)
        if any(len(merge_neighbours(blocks)) != len(blocks) for blocks in (inputs, outputs)):
            raise UnfitError(f"a skip connection from {irreps_in} to {irreps_out} names one irrep twice in a row")
        self.irreps_in, self.irreps_out, self.n_species = irreps_text(inputs), irreps_text(outputs), n_species
        self.layout = layout_for(outputs)
        self.couplings: dict[str, Tensor] = {}
        self.blocks: list[Block] = []
        labels: list[str] = []
        start = 0
        for i, block in enumerate(inputs):
            for k, target in enumerate(outputs):
                if block.irrep != target.irrep:
                    continue
                fan_in = (counted_species or n_species) * sum(
                    other.multiplicity for other in inputs if other.irrep == target.irrep
                )
                rows, columns = block.multiplicity, target.multiplicity
                coupling = float(take_coupling(source, block.order, 0, block.order, self.couplings)[0, 0, 0])
                factor = math.sqrt(block.dim / fan_in) * coupling
                self.blocks.append(Block(i, k, 0, rows, columns, start, factor))
                labels.append(f"{block.irrep}*0e->{target.irrep}")
                start += rows * n_species * columns
        self._labels = numbered(labels)
        register(self, "weight", source.take("weight", (start,), torch.randn))
        source.optional("output_mask")
        self.polynomial = SpeciesLinearPolynomial(self.blocks, layout_for(inputs), self.layout, n_species)

    def forward(self, features: Features, step: Step) -> Features:
        plan = step.plan
        if self.kernels == "cuequivariance":
            blocks = self.polynomial.apply(plan, self.weight, features.blocks)
        else:
            blocks = species_linear(
                self.blocks, self.weight, self.n_species, features.blocks, self.layout, plan.present, plan.counts
            )
        return Features(blocks, geometric=features.geometric, trains=features.trains or can_train(self))

    def sites(self, name: str) -> Iterator[Site]:
        paths = tuple(
            WeightPath(
                label,
                block.start,
                (block.fan_in * self.n_species, block.fan_out),
                by_element=(block.fan_in, self.n_species, block.fan_out),
            )
            for label, block in zip(self._labels, self.blocks, strict=True)
        )
        yield Site(f"{name}.weight", name, "weight", name, "tensor_product", paths, self.irreps_in, self.irreps_out)


def take_coupling(source: TensorSource, first: int, second: int, third: int, couplings: dict[str, Tensor]) -> Tensor:
    """A 3j symbol in float64, as the file has it where it does; added to ``couplings`` by its name.

    Raises:
        UnfitError: the file's is no 3j symbol of these orders.
    """
    name = f"_w3j_{first}_{second}_{third}"
    stored, computed = source.constant(name), wigner_3j(first, second, third)
    if stored is not None:
        # networks of different times differ in its sign
        same = stored.shape == computed.shape
        if not same or not torch.allclose(stored * torch.sign((stored * computed).sum()), computed, atol=1e-5):
            raise UnfitError(f"its constant {name} has other values than a coupling of these orders")
    couplings[name] = computed if stored is None else stored
    return couplings[name]


@dataclass(frozen=True, slots=True)
class TensorPath:
    """A path of a channel-wise tensor product: input block, order and parity of the harmonics, output block."""

    source: int
    harmonic: int
    target: int


def channelwise_paths(irreps_in: str, harmonics: str, targets: str) -> tuple[list[TensorPath], str]:
    """All paths from features and spherical harmonics to irreps that are wanted, sorted by their outputs.

    Args:
        irreps_in: of the features.
        harmonics: irreps of the harmonics.
        targets: irreps that are wanted; their multiplicities do not matter.

    Returns:
        The paths, and the irreps of their outputs, one for each path, equal ones side by side.
    """
    inputs, angular = parse_irreps(irreps_in), parse_irreps(harmonics)
    wanted = {block.irrep for block in parse_irreps(targets)}
    paths: list[tuple[int, bool, int, int, int]] = []
    for i, block in enumerate(inputs):
        for j, harmonic in enumerate(angular):
            even = (block.parity == "e") == (harmonic.parity == "e")
            for order in range(abs(block.order - harmonic.order), block.order + harmonic.order + 1):
                if f"{order}{'e' if even else 'o'}" in wanted:
                    paths.append((order, even, len(paths), i, j))
    paths.sort()
    outputs = "+".join(f"{inputs[i].multiplicity}x{order}{'e' if even else 'o'}" for order, even, _, i, _ in paths)
    return [TensorPath(i, j, k) for k, (_, _, _, i, j) in enumerate(paths)], outputs


class Convolution(nn.Module):
    """Messages Σ_edges R x ⊗ Y of all paths, summed at the receivers.

    A path multiplies each channel of an input irrep with a spherical harmonic and a radial weight of that channel;
    outputs are normalised to √(2 l + 1) times the 3j symbol.

    Args:
        irreps_in: of the features.
        harmonics: irreps of the harmonics.
        paths: and
        irreps_mid: their outputs, as :func:`channelwise_paths` gives them. Radial weights lie in their order.
        source: of couplings that a file carries.

    Attributes:
        kernels: that compute it.
    """

    kernels: Kernels = "auto"

    def __init__(
        self, irreps_in: str, harmonics: str, paths: Sequence[TensorPath], irreps_mid: str, source: TensorSource
    ) -> None:
        super().__init__()
        inputs, angular, outputs = parse_irreps(irreps_in), parse_irreps(harmonics), parse_irreps(irreps_mid)
        merged, places = merged_places(irreps_mid)
        self.irreps_in, self.harmonics, self.irreps_out = irreps_in, harmonics, irreps_text(merged)
        self.paths = tuple(paths)
        self.couplings: dict[str, Tensor] = {}
        self.widths: list[int] = []
        columns: list[Tensor] = []
        tensor_paths: list[Path] = []
        for path in paths:
            first, second, out = inputs[path.source], angular[path.harmonic], outputs[path.target]
            group, column = places[path.target]
            tensor_paths.append(
                Path(path.source, first.multiplicity, first.dim, out.dim, second.order % 2 == 1, group, column)
            )
            coupling = take_coupling(source, first.order, second.order, out.order, self.couplings)
            placed = torch.zeros(angular[-1].stop, first.dim, out.dim, dtype=torch.float64)
            placed[second.start : second.stop] = math.sqrt(out.dim) * coupling.transpose(0, 1)
            columns.append(placed.reshape(len(placed), -1))
            self.widths.append(columns[-1].shape[1])
        self.matrix = Constant(torch.cat(columns, dim=1))
        self.structure = Paths(tuple(tensor_paths), layout_for(merged))
        orders = [block.order for block in angular for _ in range(block.dim)]
        self.polynomial = ConvolutionPolynomial(self.structure, layout_for(inputs), self.matrix.value, orders)
        self.weight_numel = sum(path.channels for path in tensor_paths)

    def forward(
        self, step: Step, radial: Tensor | splined.SplinedWeights, features: Features, trains: bool
    ) -> Features:
        """
        Args:
            step: of this pass.
            radial: (pairs, weight_numel), or splines.
            features: of the atoms; where they depend on the species only, of the ghosts behind them, too.
            trains: whether the radial weights depend on trainable ones.
        """
        features = step.of_senders(features)
        if self.kernels == "cuequivariance" and isinstance(radial, Tensor):
            messages = self.polynomial.convolve(step.plan, radial, step.harmonics, features.blocks)
            return Features(messages, geometric=True, trains=trains or features.trains)
        angular = step.harmonics @ self.matrix.like(step.harmonics)
        options: dict[str, Any] = {"phase": step.phase, "geometric": features.geometric}
        if isinstance(radial, splined.SplinedWeights):
            options["trains"] = features.trains
            blocks = splined.convolve(self.structure, step.plan, radial, angular, features.blocks, **options)
            return Features(blocks, geometric=True, trains=trains or features.trains)
        options["trains"] = trains, features.trains
        if takes_triton(self.kernels, radial):
            blocks = triton.convolve(self.structure, step.plan, radial, angular, features.blocks, **options)
        elif takes_compiled(self.kernels, radial):
            blocks = compiled.convolve(self.structure, step.plan, radial, angular, features.blocks, **options)
        else:
            parts = angular.split(self.widths, dim=1)
            blocks = convolve(self.structure, step.plan, radial, parts, features.blocks, **options)
        return Features(blocks, geometric=True, trains=trains or features.trains)


class GatedActivation(nn.Module):
    """Scalars through an activation; other irreps times an even scalar of their own, through another activation.

    Inputs are sorted: odd scalars, even scalars with the gates behind them, then the gated irreps.

    Args:
        irreps_out: outputs, scalars first; no irrep occurs twice.
        scalar, gate: the activations of even scalars and of gates, each normalised to a second moment of 1.
        odd_scalar: an odd activation for odd scalars; None where there are none.
    """

    def __init__(
        self,
        irreps_out: str,
        scalar: Callable[[Tensor], Tensor] = functional.silu,
        gate: Callable[[Tensor], Tensor] = torch.sigmoid,
        odd_scalar: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        outputs = parse_irreps(irreps_out)
        scalars = [block for block in outputs if block.order == 0]
        gated = [block for block in outputs if block.order]
        even = [block for block in scalars if block.is_even_scalar]
        unique = len({block.irrep for block in outputs}) == len(outputs)
        if len(even) != 1 or not unique or [*scalars, *gated] != list(outputs):
            raise UnfitError(f"its gated activation has the outputs {irreps_out}")
        if len(scalars) > 1 and odd_scalar is None:
            raise UnfitError("its gated activation has odd scalars and no odd activation for them")
        self.irreps_out = irreps_text(outputs)
        self.widths = [even[0].multiplicity, *(block.multiplicity for block in gated)]
        together = IrrepsBlock(sum(self.widths), 0, "e", 0)
        odd = [block for block in scalars if not block.is_even_scalar]
        ordered = sorted_blocks([together, *odd, *gated])
        inputs = [block.irrep for block in ordered]
        self.irreps_in = irreps_text(ordered)
        self.scalars = [(inputs.index(block.irrep), block.is_even_scalar) for block in scalars]
        self.even = inputs.index("0e")
        self.gated = [inputs.index(block.irrep) for block in gated]
        self.scalar, self.gate, self.odd_scalar = scalar, gate, odd_scalar
        self.factors = (second_moment_factor(scalar), second_moment_factor(gate))
        self.odd_factor = 1.0 if odd_scalar is None else second_moment_factor(odd_scalar)

    def forward(self, features: Features) -> Features:
        scalars, *gates = features.blocks[self.even].split(self.widths, dim=2)
        blocks: list[Tensor] = []
        for index, is_even in self.scalars:
            if is_even:
                blocks.append(self.scalar(scalars) * self.factors[0])
            else:
                assert self.odd_scalar is not None
                blocks.append(self.odd_scalar(features.blocks[index]) * self.odd_factor)
        for index, gate in zip(self.gated, gates, strict=True):
            blocks.append(features.blocks[index] * (self.gate(gate) * self.factors[1]))
        return Features(blocks, geometric=features.geometric, trains=features.trains)


def sorted_blocks(blocks: Sequence[IrrepsBlock]) -> list[IrrepsBlock]:
    """By order, odd before even, as they were among equals."""
    return sorted(blocks, key=lambda block: (block.order, block.parity == "e"))
