"""Radial bases, envelopes, distance transforms and networks, and the repulsion of nuclei at short range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from ase.data import covalent_radii
from torch import Tensor, nn
from torch.nn import functional

from forcetune.kernels.compiled.choice import Kernels, takes_compiled
from forcetune.kernels.compiled.radial_network import radial_network
from forcetune.kernels.harmonics import second_moment_factor
from forcetune.kernels.site import Site, WeightPath
from forcetune.kernels.tensors import Draw, TensorSource, UnfitError, register

RADII = torch.from_numpy(np.asarray(covalent_radii, dtype=np.float64))
"""Å, by atomic number."""


class BesselBasis(nn.Module):
    """√(2/r_c) sin(w_n r) / r (DimeNet, eq. 7), with trainable frequencies where the file has them as a parameter."""

    bessel_weights: Tensor
    r_max: Tensor
    prefactor: Tensor

    def __init__(self, cutoff: float, size: int, source: TensorSource) -> None:
        super().__init__()
        frequencies = torch.pi / cutoff * torch.arange(1, size + 1, dtype=torch.float64)
        register(self, "bessel_weights", source.take("bessel_weights", (size,), frequencies, parameter=False))
        register(self, "r_max", source.take("r_max", (), torch.tensor(cutoff, dtype=torch.float64), parameter=False))
        prefactor = torch.tensor(math.sqrt(2 / cutoff), dtype=torch.float64)
        register(self, "prefactor", source.take("prefactor", (), prefactor, parameter=False))

    def forward(self, lengths: Tensor) -> Tensor:
        """(edges, 1), Å, to (edges, size)."""
        return self.prefactor * (torch.sin(self.bessel_weights * lengths) / lengths)


class GaussianBasis(nn.Module):
    """exp(c (r − r_n)²) at equal distances up to the cutoff."""

    gaussian_weights: Tensor

    def __init__(self, cutoff: float, size: int, source: TensorSource, coefficient: float | None = None) -> None:
        super().__init__()
        centres = torch.linspace(0, cutoff, size, dtype=torch.float64)
        register(self, "gaussian_weights", source.take("gaussian_weights", (size,), centres, parameter=False))
        self.coeff = -0.5 / (cutoff / (size - 1)) ** 2 if coefficient is None else coefficient

    def forward(self, lengths: Tensor) -> Tensor:
        """(edges, 1), Å, to (edges, size)."""
        return torch.exp(self.coeff * (lengths - self.gaussian_weights).square())


class ChebyshevBasis(nn.Module):
    """Chebyshev polynomials T_1 … T_n of the distance, which count as constants when energies are differentiated.

    That is how mace computes them (PyTorch's polynomials have no derivative), and what such models were trained with:
    their forces are not the slopes of their energies.
    """

    n: Tensor

    def __init__(self, size: int, source: TensorSource) -> None:
        super().__init__()
        orders = torch.arange(1, size + 1, dtype=torch.float64).unsqueeze(0)
        register(self, "n", source.take("n", (1, size), orders, parameter=False))
        if not torch.equal(self.n.double().flatten(), torch.arange(1, size + 1, dtype=torch.float64)):
            raise UnfitError("its Chebyshev polynomials are not of the orders 1, 2, 3, …")
        self.size = size

    def forward(self, lengths: Tensor) -> Tensor:
        """(edges, 1) to (edges, size)."""
        lengths = lengths.detach()
        found = [torch.ones_like(lengths), lengths]
        for _ in range(self.size - 1):
            found.append(2 * lengths * found[-1] - found[-2])
        return torch.cat(found[1 : self.size + 1], dim=1)


def envelope(ratio: Tensor, power: float) -> Tensor:
    """1 − (p+1)(p+2)/2 xᵖ + p(p+2) xᵖ⁺¹ − p(p+1)/2 xᵖ⁺² below x = 1, and 0 from there on (DimeNet, eq. 8)."""
    first, second, third = (power + 1) * (power + 2) / 2, power * (power + 2), power * (power + 1) / 2
    inner = 1 - ratio.pow(power) * (first - ratio * (second - third * ratio))
    return inner * (ratio < 1)


class PolynomialCutoff(nn.Module):
    """The envelope of a radial basis, 1 at 0 and 0 with two derivatives at the cutoff."""

    p: Tensor
    r_max: Tensor

    def __init__(self, cutoff: float, power: float, source: TensorSource) -> None:
        super().__init__()
        register(self, "p", source.take("p", None, torch.tensor(int(power), dtype=torch.int32), parameter=False))
        register(self, "r_max", source.take("r_max", None, torch.tensor(cutoff, dtype=torch.float64), parameter=False))
        self.power = power

    def forward(self, lengths: Tensor) -> Tensor:
        return envelope(lengths / self.r_max, self.power)


def smooth_step(lengths: Tensor, start: float, cutoff: float) -> Tensor:
    """1 up to ``start``, from there smoothly to 0 at the cutoff (XPLOR), in the squares of the distances."""
    squares, first, last = lengths.square(), start**2, cutoff**2
    falling = (last - squares).square() * (last + 2 * squares - 3 * first) / (last - first) ** 3
    return torch.where(lengths < start, torch.ones_like(lengths), falling * (lengths < cutoff))


class AgnesiTransform(nn.Module):
    """1 / (1 + a sᵠ / (1 + sᵠ⁻ᵖ)) of s = r over the mean covalent radius (ACEpotentials.jl, 10.1063/5.0158783)."""

    q: Tensor
    p: Tensor
    a: Tensor
    covalent_radii: Tensor

    def __init__(self, source: TensorSource) -> None:
        super().__init__()
        for name, value in (("q", 0.9183), ("p", 4.5791), ("a", 1.0805)):
            register(self, name, source.take(name, (), torch.tensor(value, dtype=torch.float64), parameter=False))
        _register_radii(self, source)

    def forward(self, lengths: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """
        Args:
            lengths: (edges, 1), Å.
            first, second: (edges,) atomic numbers.
        """
        ratio = lengths / (0.5 * (self.covalent_radii[first] + self.covalent_radii[second])).unsqueeze(1)
        return 1 / (1 + self.a * ratio.pow(self.q) / (1 + ratio.pow(self.q - self.p)))


class SoftTransform(nn.Module):
    """r, bent by a tanh towards 3/4 of the sum of the covalent radii at short distances.

    Models of mace before 0.3.10 have another one, r + (1 − tanh(s + a sᵇ)) / 2 with s = r over a quarter of that sum.
    """

    a: Tensor
    b: Tensor
    alpha: Tensor
    covalent_radii: Tensor

    def __init__(self, source: TensorSource) -> None:
        super().__init__()
        self.old = False
        if (a := source.optional("a")) is not None:
            self.old = True
            register(self, "a", a)
            register(self, "b", source.take("b", ()))
        else:
            alpha = torch.tensor(4.0, dtype=torch.float64)
            register(self, "alpha", source.take("alpha", (), alpha, parameter=False))
        _register_radii(self, source)

    def forward(self, lengths: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """As :meth:`AgnesiTransform.forward`."""
        sums = (self.covalent_radii[first] + self.covalent_radii[second]).unsqueeze(1)
        if self.old:
            ratio = lengths / (sums / 4)
            return lengths + 0.5 * torch.tanh(-ratio - self.a * ratio.pow(self.b)) + 0.5
        low, high = 0.75 * sums, 4 / 3 * sums
        rise = 0.5 * (1 + torch.tanh(self.alpha / (high - low) * (lengths - 0.5 * (low + high))))
        return low + (lengths - low) * rise


class ZBLRepulsion(nn.Module):
    """Half of the Ziegler–Biersack–Littmark potential of each pair, up to the sum of the covalent radii, in eV.

    Args:
        power: p of the envelope, for new models.
        source: of its tensors.
        rounded: products of charges have the seven digits that mace gave them when PyTorch's default is float32.
    """

    EXPONENTS = (3.2, 0.9423, 0.4028, 0.2016)

    c: Tensor
    p: Tensor
    a_exp: Tensor
    a_prefactor: Tensor
    covalent_radii: Tensor

    def __init__(self, power: float, source: TensorSource, *, rounded: bool = False) -> None:
        super().__init__()
        self.rounded = rounded
        coefficients = torch.tensor((0.1818, 0.5099, 0.2802, 0.02817), dtype=torch.float64)
        register(self, "c", source.take("c", (4,), coefficients, parameter=False))
        stored = source.take("p", None, torch.tensor(int(power), dtype=torch.int32), parameter=False)
        register(self, "p", stored)
        self.power = float(stored)
        _register_radii(self, source)
        for name, value in (("a_exp", 0.300), ("a_prefactor", 0.4543)):
            register(self, name, source.take(name, (), torch.tensor(value, dtype=torch.float64), parameter=False))
        # models of mace before 0.3.7 carry an envelope that nothing reads
        for owner, inner in ((self, source), (nn.Module(), source.within("cutoff"))):
            for name in ("r_max",) if owner is self else ("r_max", "p"):
                if (unread := inner.optional(name)) is not None:
                    register(owner, name, unread)
                    if owner is not self:
                        self.cutoff = owner

    def forward(self, lengths: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """As :meth:`AgnesiTransform.forward`; (edges, 1), eV."""
        charges = [numbers.to(lengths.dtype).unsqueeze(1) for numbers in (first, second)]
        product = 14.3996 * charges[0] * charges[1]
        if self.rounded:
            product = ((14.3996 * charges[0].float()) * charges[1].float()).to(lengths.dtype)
        scale = self.a_prefactor * 0.529 / (charges[0].pow(self.a_exp) + charges[1].pow(self.a_exp))
        reduced = lengths / scale
        screening = sum(c * torch.exp(-e * reduced) for c, e in zip(self.c.unbind(0), self.EXPONENTS, strict=True))
        potential = product / lengths * screening
        sums = (self.covalent_radii[first] + self.covalent_radii[second]).unsqueeze(1)
        return 0.5 * potential * envelope(lengths / sums, self.power)


def _register_radii(module: nn.Module, source: TensorSource) -> None:
    register(module, "covalent_radii", source.take("covalent_radii", None, RADII, parameter=False))


class RadialLayer(nn.Module):
    """x W g / √(inputs), and unless it is the last an activation, of second moment 1 by its factor.

    Args:
        inputs, outputs: widths.
        source: of ``weight``.
        activation: None for the last layer.
        factor: of the activation.
        kind: of its site.
        gain: g.
        draw: makes new weights.
    """

    weight: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        source: TensorSource,
        activation: Callable[[Tensor], Tensor] | None,
        factor: float,
        kind: str = "radial_mlp",
        *,
        gain: float = 1.0,
        draw: Draw = torch.randn,
    ) -> None:
        super().__init__()
        self.kind = kind
        register(self, "weight", source.take("weight", (inputs, outputs), draw))
        self.scale = gain / math.sqrt(inputs)
        self.activation, self.factor = activation, factor

    def forward(self, x: Tensor | None) -> Tensor:
        """The layer's output; without inputs its matrix, normalisation included, as hooks on the layer leave it."""
        matrix = self.weight * self.scale
        if x is None:
            return matrix
        values = x @ matrix
        return values if self.activation is None else self.activation(values) * self.factor

    def sites(self, name: str) -> Iterator[Site]:
        path = WeightPath("in->out", 0, tuple(self.weight.shape))
        yield Site(f"{name}.weight", name, "weight", name, self.kind, (path,))


class RadialNetwork(nn.Sequential):
    """A perceptron without biases from the radial basis to the weights of all paths (e3nn's fully connected net).

    Args:
        widths: of input, hidden layers, output.
        source: of ``layer0.weight`` and so on.
        factors: normalisation of the activation of each layer as a file has it; None computes it.
        activation: between the layers.
        kind: of its sites.

    Attributes:
        kernels: that compute it.
    """

    kernels: Kernels = "auto"

    def __init__(
        self,
        widths: Sequence[int],
        source: TensorSource,
        factors: Callable[[str], float | None] | None = None,
        *,
        activation: Callable[[Tensor], Tensor] = functional.silu,
        kind: str = "radial_mlp",
    ) -> None:
        super().__init__()
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            last = index == len(widths) - 2
            name = f"layer{index}"
            stored = None if factors is None else factors(f"{name}.act.cst")
            factor = second_moment_factor(activation) if stored is None else stored
            between = None if last else activation
            self.add_module(name, RadialLayer(inputs, outputs, source.within(name), between, factor, kind))
        self.fused = len(widths) > 2 and activation is functional.silu

    def forward(self, input: Tensor, *, twice: bool = True) -> Tensor:
        """
        Args:
            input: (pairs, inputs).
            twice: whether second derivatives may be wanted.

        Returns:
            (pairs, outputs).
        """
        if not self.fused or not takes_compiled(self.kernels, input):
            return super().forward(input)
        layers: list[Any] = list(self)
        return radial_network(
            input, [layer(None) for layer in layers], [layer.factor for layer in layers[:-1]], twice=twice
        )


class NormedRadialNetwork(nn.Module):
    """A perceptron with biases and layer norms: linear, norm, SiLU, …, linear."""

    def __init__(self, widths: Sequence[int], source: TensorSource) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            layers.append(nn.Linear(inputs, outputs, device="meta"))
            if index < len(widths) - 2:
                layers += [nn.LayerNorm(outputs, device="meta"), nn.SiLU()]
        self.net = nn.Sequential(*layers)
        for index, layer in enumerate(layers):
            inner = source.within("net").within(index)
            if isinstance(layer, (nn.Linear, nn.LayerNorm)):
                fan_in = layer.in_features if isinstance(layer, nn.Linear) else 0
                for name, parameter in list(layer.named_parameters()):
                    draw = _uniform(fan_in) if fan_in else torch.ones if name == "weight" else torch.zeros
                    tensor = inner.take(name, parameter.shape, draw)
                    del layer._parameters[name]
                    register(layer, name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _uniform(fan_in: int) -> Callable[[tuple[int, ...]], Tensor]:
    """PyTorch's own start of linear layers."""
    bound = 1 / math.sqrt(fan_in)
    return lambda shape: torch.empty(shape).uniform_(-bound, bound)
