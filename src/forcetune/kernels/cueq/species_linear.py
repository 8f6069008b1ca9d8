"""A linear layer with a matrix for each species as a segmented polynomial of cuequivariance.

Linear layers with one matrix stay PyTorch's matrix products, which is how cuequivariance itself computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from forcetune.kernels.cueq.library import SegmentedPolynomial
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.features import Layout
from forcetune.kernels.linear import Block


class SpeciesLinearPolynomial(SegmentedPolynomial):
    """out[n, k, w] = Σ_u x[n, k, u] W[s(n), u, w].

    Args:
        blocks: of the flat weight, each (fan in, species, fan out).
        inputs, outputs: (dim, channels) of each irrep.
        n_species: of the weight.
    """

    method = "indexed_linear"

    def __init__(self, blocks: Sequence[Block], inputs: Layout, outputs: Layout, n_species: int) -> None:
        super().__init__()
        self.blocks, self.inputs, self.outputs, self.n_species = tuple(blocks), inputs, outputs, n_species

    def build(self, cue: Any) -> Any:
        product = cue.SegmentedTensorProduct.from_subscripts("uv,iu,iv")
        product.add_segments(1, list(self.inputs))
        product.add_segments(2, list(self.outputs))
        for number, block in enumerate(self.blocks):
            product.add_segment(0, (block.fan_in, block.fan_out))
            product.add_path(number, block.source, block.target, c=block.factor)
        return cue.SegmentedPolynomial(product.operands[:2], product.operands[2:], [((0, 1, 2), product)])

    def apply(self, plan: Plan, weight: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """The layer for the atoms of a plan, which are sorted by species.

        Args:
            plan: of the batch.
            weight: flat.
            features: (atoms, dim, channels) of each input irrep.

        Returns:
            (atoms, dim, channels) of each output irrep.
        """
        sizes = [block.fan_in * self.n_species * block.fan_out for block in self.blocks]
        matrices = [
            piece.view(block.fan_in, self.n_species, block.fan_out).transpose(0, 1).flatten(1)
            for block, piece in zip(self.blocks, weight.split(sizes), strict=True)
        ]
        chosen = torch.cat(matrices, dim=1).index_select(0, plan.present)
        x = torch.cat([block.flatten(1) for block in features], dim=1)
        outputs = self.evaluate([chosen, x], {0: torch.searchsorted(plan.present, plan.species)})
        parts = outputs.split([dim * channels for dim, channels in self.outputs], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.outputs, strict=True)]
