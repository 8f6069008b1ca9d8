"""Magnetic moments and their energy from a foundation model's node features, which know no spin.

Sparsity-promoting fine-tuning (ICLR 2026), section on the spin-aware layer. Its text names the ingredients only
(moments from the final embeddings, an edge energy of spin exchange, E = E_foundation + Σ ε_ij); the equations here are
ours and stand at :class:`SpinLayer`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from forcetune.backbones.protocol import Extra
from forcetune.graphs.graph import Batch


class RadialBasis(nn.Module):
    """√(2/r_c) sin(n π r / r_c) / r, n = 1 …, which are zero at the cutoff; times :func:`envelope` where it is used."""

    def __init__(self, n_radial: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        frequencies = torch.arange(1, n_radial + 1, dtype=torch.float64) * math.pi / cutoff
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, lengths: Tensor) -> Tensor:
        """(pairs, n) of (pairs, 1), Å."""
        frequencies = self.get_buffer("frequencies")
        return math.sqrt(2 / self.cutoff) * torch.sin(lengths * frequencies) / lengths


def envelope(lengths: Tensor, cutoff: float) -> Tensor:
    """1 at 0, and 0 with its first and second derivative at the cutoff: 1 − 28 x⁶ + 48 x⁷ − 21 x⁸."""
    x = (lengths / cutoff).clamp(max=1.0)
    return 1 - 28 * x**6 + 48 * x**7 - 21 * x**8


def select_half(batch: Batch) -> Tensor:
    """One edge of each pair of an edge and its reverse."""
    sender, receiver = batch.edge_index
    shift = batch.unit_shifts.round()
    first = torch.where(shift[:, 0] != 0, shift[:, 0], torch.where(shift[:, 1] != 0, shift[:, 1], shift[:, 2]))
    chosen = (sender < receiver) | ((sender == receiver) & (first > 0))
    if chosen.device.type == "cpu":
        return torch.nonzero(chosen).squeeze(1)
    # elsewhere the number would have to be waited for, but every edge has its reverse: it is half of them
    return torch.argsort((~chosen).to(torch.uint8), stable=True)[: len(chosen) // 2]


RADIAL_GAIN = 15.0
"""Of the first weights of the radial functions in a new layer, beside what PyTorch draws.

The functions are about 0.1 in size. With the usual weights pairs at any distance are alike at first: in NiO, whose
exchange is that of second neighbors alone, a layer learned one coefficient for all neighbors and stayed there. Rates
above 0.003 bring it there, too. With 40 the exchange of iron, which is long-ranged, became rougher.
"""


def _perceptron(n_in: int, channels: int, n_out: int) -> nn.Sequential:
    """Two hidden layers; the output starts at zero."""
    last = nn.Linear(channels, n_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(n_in, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU(), last)


class SpinLayer(nn.Module):
    """Moments as vectors, and the energy of exchange between them.

    With the scalars hᵢ of the foundation model (normalised), distances r and directions r̂ from i to j, the given spins
    sᵢ (axial, odd under time reversal), and the envelope f of the radial functions:

    - moments μᵢ = [aᵢ + Σⱼ f p_ij sᵢ·sⱼ] sᵢ + Σⱼ f [b_ij sⱼ + c_ij (r̂·sⱼ) r̂], the last with spin–orbit terms only;
    - pairs ε_ij = −f [J_ij μᵢ·μⱼ + K_ij (μᵢ·μⱼ)²], with spin–orbit terms also
      −f [d_ij (r̂ × (uᵢ + uⱼ))·(μᵢ × μⱼ) + g_ij ((r̂·μᵢ)(r̂·μⱼ) − μᵢ·μⱼ / 3)], uᵢ = Σⱼ f w_ij r̂, each pair once;
    - sites εᵢ = Aᵢ |μᵢ|² + Bᵢ |μᵢ|⁴ (Landau);
    - E = E_foundation + Σ ε_ij + Σ εᵢ.

    a, A and B are perceptrons of hᵢ; the others are symmetric perceptrons of P hᵢ ⊙ P hⱼ and the radial functions.
    E is even in the spins, unchanged by rotations and reflections of space and spins together (spins are axial), and
    by rotations of the spins alone without spin–orbit terms. The Dzyaloshinskii–Moriya vector, r̂ × (uᵢ + uⱼ), is
    axial, changes sign with the order of the pair and vanishes where the middle of the pair is a centre of inversion.

    All energies start at zero and the moments at the spins times :attr:`scale`.

    Attributes:
        scale: a starts here.
    """

    MOMENTS = ("p", "b", "c", "w")
    ENERGIES = ("J", "K", "d", "g")

    def __init__(self, n_scalars: int, cutoff: float, channels: int, n_radial: int, spin_orbit: bool) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.spin_orbit = spin_orbit
        self.radial = RadialBasis(n_radial, cutoff)
        self.norm = nn.LayerNorm(n_scalars, elementwise_affine=False)
        self.embedding = nn.Linear(n_scalars, channels)
        self.site = _perceptron(n_scalars, channels, 3)
        self.pair = _perceptron(channels + n_radial, channels, 8 if spin_orbit else 4)
        first = self.pair[0].weight
        assert isinstance(first, nn.Parameter)
        with torch.no_grad():
            first[:, channels:] *= RADIAL_GAIN
        self.scale = nn.Parameter(torch.ones(()))
        if spin_orbit:
            # d and w are only met as a product: were both zero, neither would ever have a gradient
            bias = self.pair[-1].bias
            assert isinstance(bias, nn.Parameter)
            nn.init.constant_(bias[self.names.index("w")], 1.0)

    @property
    def names(self) -> tuple[str, ...]:
        """The coefficients of a pair, in the order of :attr:`pair`'s output."""
        return ("p", "b", "J", "K", "c", "w", "d", "g") if self.spin_orbit else ("p", "b", "J", "K")

    def coefficients(self, scalars: Tensor, lengths: Tensor, sender: Tensor, receiver: Tensor) -> dict[str, Tensor]:
        """Coefficients of pairs, (pairs, 1) each, times the envelope.

        Args:
            scalars: (atoms, n_scalars) normalised.
            lengths: (pairs, 1), Å.
            sender, receiver: (pairs,) atoms.
        """
        nodes = self.embedding(scalars)
        inputs = torch.cat((nodes[sender] * nodes[receiver], self.radial(lengths)), dim=1)
        coefficients = self.pair(inputs) * envelope(lengths, self.cutoff)
        return dict(zip(self.names, coefficients.split(1, dim=1), strict=True))

    def exchange(self, scalars: Tensor, vectors: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Distance, Å, and J, eV/μB², of every pair of atoms, each once: (pairs,) both."""
        half = select_half(batch)
        lengths = torch.linalg.vector_norm(vectors[half], dim=1, keepdim=True)
        sender, receiver = batch.edge_index[:, half]
        coefficients = self.coefficients(self.norm(scalars), lengths, sender, receiver)
        return lengths[:, 0], coefficients["J"][:, 0]

    def forward(self, scalars: Tensor, vectors: Tensor, batch: Batch) -> Extra:
        """Moments (atoms, 3), μB, and energies (graphs,), eV; atoms without given spins have none."""
        spins = torch.nan_to_num(batch.spins)
        half = select_half(batch)
        sender, receiver = batch.edge_index[:, half]
        vectors = vectors[half]
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        directions = vectors / lengths
        scalars = self.norm(scalars)
        pairs = self.coefficients(scalars, lengths, sender, receiver)
        shift, landau_2, landau_4 = self.site(scalars).split(1, dim=1)
        moments = self._moments(spins, self.scale + shift, pairs, directions, sender, receiver)
        squared = moments.square().sum(dim=1, keepdim=True)
        of_sites = landau_2 * squared + landau_4 * squared.square()
        of_pairs = self._pair_energies(moments, pairs, directions, sender, receiver)
        energy = torch.zeros(batch.n_graphs, dtype=scalars.dtype, device=scalars.device)
        energy = energy.index_add(0, batch.graph_index, of_sites[:, 0])
        energy = energy.index_add(0, batch.graph_index[sender], of_pairs[:, 0])
        half_pairs = of_pairs[:, 0] / 2
        energies = of_sites[:, 0].index_add(0, sender, half_pairs).index_add(0, receiver, half_pairs)
        return Extra(energy, moments, energies)

    def _moments(
        self,
        spins: Tensor,
        factor: Tensor,
        pairs: dict[str, Tensor],
        directions: Tensor,
        sender: Tensor,
        receiver: Tensor,
    ) -> Tensor:
        one, two = spins[sender], spins[receiver]
        along = pairs["p"] * (one * two).sum(dim=1, keepdim=True)
        factor = factor.index_add(0, sender, along).index_add(0, receiver, along)
        from_two, from_one = pairs["b"] * two, pairs["b"] * one
        if self.spin_orbit:
            from_two = from_two + pairs["c"] * (directions * two).sum(dim=1, keepdim=True) * directions
            from_one = from_one + pairs["c"] * (directions * one).sum(dim=1, keepdim=True) * directions
        return (factor * spins).index_add(0, sender, from_two).index_add(0, receiver, from_one)

    def _pair_energies(
        self, moments: Tensor, pairs: dict[str, Tensor], directions: Tensor, sender: Tensor, receiver: Tensor
    ) -> Tensor:
        one, two = moments[sender], moments[receiver]
        product = (one * two).sum(dim=1, keepdim=True)
        result = pairs["J"] * product + pairs["K"] * product.square()
        if self.spin_orbit:
            push = pairs["w"] * directions
            surroundings = torch.zeros_like(moments).index_add(0, sender, push).index_add(0, receiver, -push)
            axis = torch.linalg.cross(directions, surroundings[sender] + surroundings[receiver])
            twist = (axis * torch.linalg.cross(one, two)).sum(dim=1, keepdim=True)
            along = (directions * one).sum(dim=1, keepdim=True) * (directions * two).sum(dim=1, keepdim=True)
            result = result + pairs["d"] * twist + pairs["g"] * (along - product / 3)
        return -result

    @torch.no_grad()
    def calibrate(self, spins: Tensor, moments: Tensor) -> None:
        """Let the moments start as near to their labels as one factor for all brings the spins.

        Args:
            spins, moments: (atoms, 3); NaN where there are none.
        """
        known = ~(spins.isnan() | moments.isnan()).any(dim=1)
        overlap, size = (spins[known] * moments[known]).sum(), spins[known].square().sum()
        if size > 0:
            self.scale.copy_(overlap / size)


class MagnitudeLayer(nn.Module):
    """|μᵢ| = softplus of a perceptron of the scalars hᵢ; adds no energy. For data with collinear |μ| only."""

    def __init__(self, n_scalars: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_scalars, elementwise_affine=False)
        self.site = _perceptron(n_scalars, channels, 1)

    def forward(self, scalars: Tensor, vectors: Tensor, batch: Batch) -> Extra:
        """Magnitudes (atoms, 1), μB."""
        return Extra(None, functional.softplus(self.site(self.norm(scalars))))
