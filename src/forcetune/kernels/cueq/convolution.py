"""The convolution as a segmented polynomial of cuequivariance: gathers, products and sums at receivers in one kernel.

For an edge e of pair p from j to i, out[i] gets Σ C[m, q, k] R[p, u] Y[e, q] x[j, m, u] for each path; see
:mod:`forcetune.kernels.convolution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forcetune.kernels.constants import Constant
from forcetune.kernels.convolution import Paths
from forcetune.kernels.cueq.library import SegmentedPolynomial, uniform
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.features import Layout


class ConvolutionPolynomial(SegmentedPolynomial):
    """Messages of all paths.

    Args:
        structure: the paths.
        inputs: (dim, channels) of each input.
        couplings: (Σ 2 l₂ + 1, Σ dim_in · dim_out) of all paths, side by side.
        orders: l₂ of each component of the harmonics.
    """

    def __init__(self, structure: Paths, inputs: Layout, couplings: Tensor, orders: Sequence[int]) -> None:
        super().__init__()
        self.structure, self.inputs = structure, inputs
        widths = [path.dim_in * path.dim_out for path in structure.paths]
        self.couplings: list[np.ndarray] = [
            part.reshape(len(part), path.dim_in, path.dim_out).transpose(1, 0, 2)
            for path, part in zip(
                structure.paths, np.split(couplings.numpy(), np.cumsum(widths)[:-1], axis=1), strict=True
            )
        ]
        self.odd = Constant(torch.tensor([order % 2 == 1 for order in orders]))

    def build(self, cue: Any) -> Any:
        product = cue.SegmentedTensorProduct.from_subscripts("u,j,iu,ku+ijk")
        product.add_segment(1, (len(self.odd.value),))
        product.add_segments(2, list(self.inputs))
        for number, (path, coupling) in enumerate(zip(self.structure.paths, self.couplings, strict=True)):
            product.add_segment(0, (path.channels,))
            product.add_segment(3, (path.dim_out, path.channels))
            product.add_path(number, 0, path.source, number, c=coupling)
        return cue.SegmentedPolynomial(product.operands[:3], product.operands[3:], [((0, 1, 2, 3), product)])

    def build_uniform(self, cue: Any) -> Any:
        return uniform(self.build(cue), [*self.structure.channels, *(channels for _, channels in self.inputs)])

    def convolve(self, plan: Plan, radial: Tensor, harmonics: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """Messages of all paths, summed at their receivers; nothing is read back.

        Args:
            plan: of the batch.
            radial: (pairs, Σ channels).
            harmonics: (pairs, Σ 2 l₂ + 1) along the pairs.
            features: (senders, dim, channels) of each input irrep.

        Returns:
            (atoms, dim, channels) of each output irrep.
        """
        if plan.n_edges == 0:  # which the library does not take
            return [radial.new_zeros(plan.n_atoms, dim, channels) for dim, channels in self.structure.groups]
        pair, sender, direction = plan.edges.unbind(1)
        rows = torch.arange(plan.n_edges, device=pair.device)
        receiver = (torch.searchsorted(plan.starts, rows, right=True) - 1).clamp(max=plan.n_atoms - 1)
        # against its pair an edge has odd harmonics of the other sign; fillers, of direction 0, add nothing
        sign = direction.to(harmonics.dtype).unsqueeze(1)
        oriented = harmonics.index_select(0, pair) * torch.where(self.odd.on(pair.device), sign, sign * sign)
        x = torch.cat([block.flatten(1) for block in features], dim=1)
        messages = self.evaluate([radial, oriented, x], {0: pair, 2: sender}, (receiver, plan.n_atoms))
        paths = self.structure.paths
        parts = messages.split([path.dim_out * path.channels for path in paths], dim=1)
        groups: list[list[tuple[int, Tensor]]] = [[] for _ in self.structure.groups]
        for path, part in zip(paths, parts, strict=True):
            groups[path.group].append((path.column, part.unflatten(1, (path.dim_out, path.channels))))
        ordered = [[part for _, part in sorted(group, key=lambda entry: entry[0])] for group in groups]
        return [group[0] if len(group) == 1 else torch.cat(group, dim=2) for group in ordered]
