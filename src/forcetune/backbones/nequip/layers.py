"""Layers that only NequIP has: embedded types, products with them, networks of scalars, radial basis, repulsion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from forcetune.irreps import irreps_text, merge_neighbours, parse_irreps
from forcetune.kernels.features import Features
from forcetune.kernels.layers import layout_for, take_coupling
from forcetune.kernels.linear import Block, species_linear
from forcetune.kernels.radial import RadialLayer, envelope
from forcetune.kernels.site import Site, WeightPath, numbered
from forcetune.kernels.step import Step, can_train
from forcetune.kernels.tensors import TensorSource, UnfitError, register


class TypeEmbedding(nn.Module):
    """A vector for each type: a linear layer of the one-hot element, without normalisation."""

    weight: Tensor

    def __init__(self, types: int, width: int, source: TensorSource) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = f"{types}x0e", f"{width}x0e"
        register(self, "weight", source.take("weight", (types, width), torch.randn))

    def forward(self, features: Features) -> Features:
        embedded = features.blocks[0] @ self.weight
        return Features([embedded], geometric=features.geometric, trains=features.trains or can_train(self))

    def sites(self, name: str) -> Iterator[Site]:
        types, width = self.weight.shape
        path = WeightPath("0e->0e", 0, (types, width), by_element=(1, types, width))
        yield Site(f"{name}.weight", name, "weight", name, "linear", (path,), self.irreps_in, self.irreps_out)


class AttributeLinear(nn.Module):
    """The fully connected tensor product of features with a vector of the type: out = Σ x[u] a[s, v] W[u, v, w].

    The flat weight has the blocks (multiplicity in, attributes, multiplicity out) of all pairs of equal irreps; for
    the types of a batch they become one matrix each.

    Args:
        irreps_in, irreps_out: of the features.
        attributes: numbers of each type.
        source: of ``weight``, and of the couplings 1/√(2 l + 1) as the file has them rounded.
    """

    weight: Tensor

    def __init__(self, irreps_in: str, irreps_out: str, attributes: int, source: TensorSource) -> None:
        super().__init__()
        inputs, outputs = parse_irreps(irreps_in), parse_irreps(irreps_out)
        if any(len(merge_neighbours(blocks)) != len(blocks) for blocks in (inputs, outputs)):
            raise UnfitError(f"a self-connection from {irreps_in} to {irreps_out} names one irrep twice in a row")
        self.irreps_in, self.irreps_out, self.attributes = irreps_text(inputs), irreps_text(outputs), attributes
        self.layout = layout_for(outputs)
        self.couplings: dict[str, Tensor] = {}
        self.blocks: list[Block] = []
        labels: list[str] = []
        start = 0
        for i, block in enumerate(inputs):
            for k, target in enumerate(outputs):
                if block.irrep != target.irrep:
                    continue
                fan_in = attributes * sum(other.multiplicity for other in inputs if other.irrep == target.irrep)
                rows, columns = block.multiplicity, target.multiplicity
                coupling = float(take_coupling(source, block.order, 0, block.order, self.couplings)[0, 0, 0])
                self.blocks.append(Block(i, k, 0, rows, columns, start, math.sqrt(block.dim / fan_in) * coupling))
                labels.append(f"{block.irrep}->{target.irrep}")
                start += rows * attributes * columns
        self._labels = numbered(labels)
        register(self, "weight", source.take("weight", (start,), torch.randn))
        source.optional("output_mask")

    def forward(self, features: Features, step: Step, attributes: Tensor) -> Features:
        """
        Args:
            features: of the atoms.
            step: of this pass.
            attributes: (types present, attributes), of each type of the batch.
        """
        present, plan = len(attributes), step.plan
        sizes = [block.fan_in * self.attributes * block.fan_out for block in self.blocks]
        parts, blocks, start = [], [], 0
        for block, piece in zip(self.blocks, self.weight.split(sizes), strict=True):
            parts.append((attributes @ piece.view(block.fan_in, self.attributes, block.fan_out)).flatten())
            blocks.append(Block(block.source, block.target, 0, block.fan_in, block.fan_out, start, block.factor))
            start += block.fan_in * present * block.fan_out
        outputs = species_linear(
            blocks, torch.cat(parts), present, features.blocks, self.layout, _count_up(plan.present), plan.counts
        )
        return Features(outputs, geometric=features.geometric, trains=features.trains or can_train(self))

    def sites(self, name: str) -> Iterator[Site]:
        paths = tuple(
            WeightPath(label, block.start, (block.fan_in * self.attributes, block.fan_out))
            for label, block in zip(self._labels, self.blocks, strict=True)
        )
        yield Site(f"{name}.weight", name, "weight", name, "tensor_product", paths, self.irreps_in, self.irreps_out)


def _count_up(present: Tensor) -> Tensor:
    """0, 1, 2, …, as many as there are types; from a tensor, as a recorded step must not make constants."""
    return torch.ones_like(present).cumsum(0) - 1


class ScalarNetwork(nn.Sequential):
    """A perceptron without biases; layers of it lie at every other place, as activations have the places between.

    Args:
        widths: of input, hidden layers, output.
        source: of ``0.weight``, ``2.weight`` and so on.
        activation: between the layers, as it is; None for none.
        kind: of its sites.
    """

    def __init__(
        self,
        widths: Sequence[int],
        source: TensorSource,
        activation: Callable[[Tensor], Tensor] | None,
        *,
        kind: str = "radial_mlp",
    ) -> None:
        super().__init__()
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            name = str(2 * index)
            between = None if index == len(widths) - 2 else activation
            # √2 stands for what an activation leaves of the variance
            gain = math.sqrt(2) if index and activation is not None else 1.0
            layer = RadialLayer(inputs, outputs, source.within(name), between, 1.0, kind, gain=gain, draw=_uniform)
            self.add_module(name, layer)


def _uniform(shape: tuple[int, ...]) -> Tensor:
    """Of variance 1, as nequip draws them."""
    return (2 * torch.rand(shape) - 1) * math.sqrt(3)


class RadialBasis(nn.Module):
    """2 sin(π w x) / (r_c² x) of x = r over the cutoff of a pair, times the envelope.

    Args:
        cutoff: r_c, Å, the largest.
        size: functions.
        power: p of the envelope.
        source: of ``bessel_weights``, parameters where they were trained.
    """

    bessel_weights: Tensor

    def __init__(self, cutoff: float, size: int, power: float, source: TensorSource) -> None:
        super().__init__()
        drawn = torch.arange(1, size + 1, dtype=torch.float64).unsqueeze(0)
        register(self, "bessel_weights", source.take("bessel_weights", (1, size), drawn, parameter=False))
        self.power, self.factor = power, 2 / cutoff**2

    def forward(self, ratio: Tensor) -> Tensor:
        """(edges, 1) to (edges, size)."""
        waves = torch.sin(math.pi * self.bessel_weights * ratio) / ratio
        return waves * (self.factor * envelope(ratio, self.power))


class Repulsion(nn.Module):
    """Half of the Ziegler–Biersack–Littmark potential of each pair as LAMMPS has it, times an envelope, in eV."""

    EXPONENTS = (0.20162, 0.40290, 0.94229, 3.19980)
    COEFFICIENTS = (0.02817, 0.28022, 0.50986, 0.18175)
    HALF_COULOMB = 0.5 * 14.399645
    """e²/(8 π ε₀), eV Å."""

    _qqr2exesquare: Tensor

    def __init__(self, power: float, source: TensorSource) -> None:
        super().__init__()
        self.power = power
        drawn = torch.tensor(self.HALF_COULOMB, dtype=torch.float64)
        register(self, "_qqr2exesquare", source.take("_qqr2exesquare", (), drawn, parameter=False))
        if abs(float(self._qqr2exesquare) - self.HALF_COULOMB) > 1e-3:
            raise UnfitError(
                f"its ZBL potential has the prefactor {float(self._qqr2exesquare):.6g}, not that of eV and Å"
            )

    def forward(self, lengths: Tensor, ratio: Tensor, charges: tuple[Tensor, Tensor]) -> Tensor:
        """
        Args:
            lengths: (pairs, 1), Å.
            ratio: (pairs, 1), over the cutoff of each pair.
            charges: (pairs, 1) each, atomic numbers.
        """
        first, second = charges
        reduced = (first.pow(0.23) + second.pow(0.23)) * lengths / 0.46850
        terms = zip(self.COEFFICIENTS, self.EXPONENTS, strict=True)
        screening = sum(coefficient * torch.exp(-exponent * reduced) for coefficient, exponent in terms)
        return self._qqr2exesquare * (first * second / lengths) * screening * envelope(ratio, self.power)
