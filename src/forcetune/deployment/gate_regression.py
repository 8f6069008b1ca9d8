"""Weights of linear layers that come nearest to what gates make of their outputs, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from forcetune.adapters.attach import require_adapter
from forcetune.adapters.updates import ActivationUpdate
from forcetune.backbones.protocol import Backbone, Site
from forcetune.evaluation.metrics import evaluation_batches
from forcetune.graphs.graph import Batch
from forcetune.kernels.features import make_features
from forcetune.kernels.layers import EquivariantLinear


class GateRegression:
    """The normal equations of all linear layers with gates, solved for any ridge λ.

    Gates on layers that are not linear (skip connections with species) are left to what follows.
    """

    def __init__(self, gated: Backbone, graphs: Sequence[Batch]) -> None:
        """
        Args:
            gated: carries gates, and nothing else that is not folded into its weights.
            graphs: whose atoms count.
        """
        adapter = require_adapter(gated)
        self._fits: list[tuple[Site, _LayerFit]] = []
        handles = []
        for site in adapter.sites:
            layer = gated.model.get_submodule(site.reader)
            if adapter.part(site, ActivationUpdate) is None or not isinstance(layer, EquivariantLinear):
                continue
            fit = _LayerFit(layer)
            self._fits.append((site, fit))
            # behind the gate's own hook: it is given what the gate has made of the output
            handles.append(layer.register_forward_hook(fit))
        try:
            for batch in evaluation_batches(graphs, gated.device):
                gated.predict(batch)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def apply(self, plain: Backbone, ridge: float) -> None:
        """Give the layers of ``plain`` the weights W' that minimise Σ |gate(W x) − W' x|² + λ |W' − W|².

        Args:
            plain: the same model without gates; its weights are W, changed in place.
            ridge: λ, relative to the mean square of a layer's inputs over all atoms.
        """
        for site, fit in self._fits:
            weight = plain.model.get_submodule(site.module)._parameters[site.parameter]
            assert weight is not None
            weight.copy_(fit.solve(weight, ridge))


class _LayerFit:
    """Normal equations of one layer: Xᵀ X and Xᵀ Y for each irrep of its outputs, X with the layer's factors in it."""

    def __init__(self, layer: EquivariantLinear) -> None:
        self.layer = layer
        self.members = [
            [block for block in layer.blocks if block.target == target] for target in range(len(layer.layout))
        ]
        self.inputs: list[Tensor | None] = [None] * len(layer.layout)
        self.outputs: list[Tensor | None] = [None] * len(layer.layout)

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        features = args[0]
        with torch.no_grad():
            changed = make_features(output, self.layer.layout)
            # what the layer adds by itself, a bias or the row of a modality, stays as it is
            zero = type(features)(
                [torch.zeros_like(block[:1]) for block in features.blocks], geometric=False, trains=False
            )
            constant = self.layer.forward(zero)
            for target, members in enumerate(self.members):
                if not members:
                    continue
                parts = [
                    features.blocks[block.source][:, :, block.row : block.row + block.fan_in].double() * block.factor
                    for block in members
                ]
                x = torch.cat(parts, dim=2).flatten(0, 1)
                y = (changed.blocks[target] - constant.blocks[target]).double().flatten(0, 1)
                for store, product in ((self.inputs, x.T @ x), (self.outputs, x.T @ y)):
                    before = store[target]
                    store[target] = product if before is None else before + product

    def solve(self, weight: Tensor, ridge: float) -> Tensor:
        """The fitted weight, from the one that is there."""
        flat = weight.detach().reshape(-1).clone()
        for members, squares, products in zip(self.members, self.inputs, self.outputs, strict=True):
            if squares is None or products is None:
                continue
            now = torch.cat(
                [flat[b.start : b.start + b.fan_in * b.fan_out].view(b.fan_in, b.fan_out).double() for b in members]
            )
            pull = ridge * squares.diagonal().mean().clamp(min=torch.finfo(squares.dtype).tiny)
            eye = torch.eye(len(squares), dtype=squares.dtype, device=squares.device)
            fitted = torch.linalg.solve(squares + pull * eye, products + pull * now)
            row = 0
            for block in members:
                part = fitted[row : row + block.fan_in].to(flat)
                flat[block.start : block.start + block.fan_in * block.fan_out] = part.reshape(-1)
                row += block.fan_in
        return flat.view(weight.shape)
