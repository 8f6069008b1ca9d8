"""Layers of MACE by the kernels: what each module is asked for within one forward pass of the model.

A layer called with a :class:`Step` or with :class:`Features` takes the fast way; called as the library calls it, it
does what the library does. Every module that owns a weight is called as a module, so that hooks on it and weights
shown in its place count as they do in the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.kernels.constants import Constant
from forcetune.kernels.contraction import arranged, fold, polynomial
from forcetune.kernels.convolution import Path, Paths, convolve
from forcetune.kernels.features import Features, features_of
from forcetune.kernels.linear import equivariant_linear, species_linear
from forcetune.kernels.mace_irreps import linear_blocks, merged, reflection_labels, skip_blocks
from forcetune.kernels.phase import Phase
from forcetune.kernels.plan import Plan
from forcetune.kernels.polynomial import BilinearForm, bilinear_form
from forcetune.kernels.swap import UnknownLayerError, original_class

INTERACTIONS = {
    "RealAgnosticInteractionBlock": "plain",
    "RealAgnosticResidualInteractionBlock": "plain",
    "RealAgnosticDensityInteractionBlock": "density",
    "RealAgnosticDensityResidualInteractionBlock": "density",
    "RealAgnosticResidualNonLinearInteractionBlock": "nonlinear",
}


@dataclass(frozen=True, slots=True)
class Step:
    """What the layers of one forward pass share; pairs and atoms as in the plan.

    Attributes:
        plan: of the batch.
        phase: which derivatives are wanted.
        harmonics: (pairs, Σ 2 l + 1) spherical harmonics.
        radial: (pairs, basis) radial features.
        cutoff: (pairs, 1) envelope to be applied to radial weights, or None.
        attributes: (atoms, species) one-hot.
    """

    plan: Plan
    phase: Phase
    harmonics: Tensor
    radial: Tensor
    cutoff: Tensor | None
    attributes: Tensor


def can_train(module: nn.Module) -> bool:
    """Whether a weight of the module requires a gradient, or a hook may bring one in."""
    return any(parameter.requires_grad for parameter in module.parameters()) or any(
        part._forward_hooks or part._forward_pre_hooks for part in module.modules()
    )


# ---- layers -------------------------------------------------------------------------------------------------------


def linear_forward(module: Any) -> Callable[..., Any]:
    """Forward of an equivariant linear layer, for features in either form."""
    blocks, layout_in, layout_out = linear_blocks(module)
    biased = [ins for ins in module.instructions if ins.i_in < 0]
    places_out = merged(module.irreps_out)[1]
    slow = original_class(module).forward

    def forward(self: Any, features: Any, weight: Any = None, bias: Any = None) -> Any:
        if weight is not None or bias is not None or features.ndim != 2:
            return slow(self, features, weight, bias)
        known = features if isinstance(features, Features) else features_of(features, layout_in)
        found = equivariant_linear(blocks, self.weight, known.blocks, layout_out)
        start = 0
        for ins in biased:
            target, width = places_out[ins.i_out][0], ins.path_shape[0]
            found[target] = found[target] + self.bias[start : start + width]
            start += width
        trains = known.trains or can_train(self)
        result = Features(found, geometric=known.geometric, trains=trains)
        return result if isinstance(features, Features) else result.flat

    return forward


def apply_linear(module: Any, features: Features) -> Features:
    """An equivariant linear layer with whatever hooks it has."""
    found = module(features)
    if isinstance(found, Features):
        return found
    layout = merged(module.irreps_out)[0]
    return features_of(found, layout, geometric=features.geometric, trains=True)


def skip_forward(module: Any) -> Callable[..., Any]:
    """Forward of a tensor product with one-hot species: features and the step, or as the library calls it."""
    blocks, layout_in, layout_out = skip_blocks(module)
    n_species = module.irreps_in2.dim
    slow = original_class(module).forward

    def forward(self: Any, features: Any, second: Any, weight: Any = None) -> Any:
        if not isinstance(second, Step):
            return slow(self, features, second, weight)
        known = features_of(features, layout_in)
        plan = second.plan
        found = species_linear(blocks, self.weight, n_species, known.blocks, layout_out, plan.present, plan.counts)
        return Features(found, geometric=known.geometric, trains=known.trains or can_train(self))

    return forward


@dataclass(frozen=True, slots=True)
class WeightRequest:
    """Asks a contraction for its weights of these species, as the forward pass of this step sees them."""

    present: Tensor


def contraction_forward(module: Any) -> Callable[..., Any]:
    """Forward of one output of a symmetric contraction: its weights on request, or as the library calls it."""
    slow = original_class(module).forward

    def forward(self: Any, x: Any, y: Any = None) -> Any:
        if not isinstance(x, WeightRequest):
            return slow(self, x, y)
        # the library keeps the highest order first
        return [*reversed([self.weights[k] for k in range(len(self.weights))]), self.weights_max]

    return forward


class Coefficients:
    """The folded coefficients of a symmetric contraction; those of frozen weights are kept."""

    def __init__(self, form: BilinearForm) -> None:
        self.form = form
        self._key: tuple[tuple[Tensor, int], ...] = ()
        self._present: Tensor | None = None
        self._kept: list[Tensor] = []

    def of(self, weights: list[list[Tensor]], present: Tensor) -> list[Tensor]:
        """For each segment (species present, channels, rows, columns); one species for a product without species."""
        agnostic = len(weights[0][0]) == 1
        flat = [weight for orders in weights for weight in orders]
        if any(weight.requires_grad for weight in flat):
            return self._folded(weights, None if agnostic else present)
        key = tuple((weight, weight._version) for weight in flat)
        if not self._same(key, present):
            with torch.no_grad():
                self._kept = self._folded(weights, None if agnostic else present)
            self._key, self._present = key, present
        return self._kept

    def _folded(self, weights: list[list[Tensor]], present: Tensor | None) -> list[Tensor]:
        joined = [torch.cat(orders, dim=1) if len(orders) > 1 else orders[0] for orders in weights]
        return fold(self.form, joined if present is None else [weight.index_select(0, present) for weight in joined])

    def _same(self, key: tuple[tuple[Tensor, int], ...], present: Tensor) -> bool:
        if self._present is None or len(key) != len(self._key):
            return False
        if not all(a[0] is b[0] and a[1] == b[1] for a, b in zip(key, self._key, strict=True)):
            return False
        return self._present is present or torch.equal(self._present, present)


def symmetric_contraction_forward(module: Any) -> Callable[..., Any]:
    """Forward of a symmetric contraction: features and the step, or as the library calls it."""
    couplings = [
        [contraction.U_tensors(nu) for nu in range(1, contraction.correlation + 1)]
        for contraction in module.contractions
    ]
    irreps = [ir for _, ir in module.irreps_in]
    form = bilinear_form(couplings, [label for ir in irreps for label in reflection_labels(ir)])
    kept = Coefficients(form)
    slow = original_class(module).forward

    def forward(self: Any, features: Any, second: Any) -> Any:
        if not isinstance(second, Step):
            return slow(self, features, second)
        plan = second.plan
        x = arranged(features.blocks, form.order)
        request = WeightRequest(plan.present)
        coefficients = kept.of([contraction(request) for contraction in self.contractions], plan.present)
        counts = plan.counts if len(coefficients[0]) == len(plan.counts) else (plan.n_atoms,)
        out = polynomial(form, x, coefficients, counts, phase=second.phase, trains=features.trains)
        parts = [part.permute(2, 0, 1) for part in out.split(form.dims)]
        return Features(parts, geometric=True, trains=features.trains or can_train(self))

    return forward


# ---- blocks -------------------------------------------------------------------------------------------------------


class Convolution:
    """The tensor product of an interaction block over the edges, summed at the receivers."""

    def __init__(self, block: Any) -> None:
        product = block.conv_tp
        layout, places = merged(product.irreps_out)
        self.paths: list[Path] = []
        self.couplings: list[Constant] = []
        symbols = {name.rpartition(".")[2]: buffer for name, buffer in product.named_buffers()}
        self.widths: list[int] = []
        columns: list[Tensor] = []
        for ins in product.instructions:
            if ins.connection_mode != "uvu" or not ins.has_weight or ins.path_shape[1] != 1:
                raise UnknownLayerError("its convolution has paths of another kind")
            first, second = product.irreps_in1[ins.i_in1], product.irreps_in2[ins.i_in2]
            out = product.irreps_out[ins.i_out]
            group, column = places[ins.i_out]
            odd = second.ir.l % 2 == 1
            self.paths.append(Path(ins.i_in1, first.mul, first.ir.dim, out.ir.dim, odd, group, column))
            coupling = ins.path_weight * _coupling(symbols, first.ir.l, second.ir.l, out.ir.l)
            placed = torch.zeros(product.irreps_in2.dim, coupling.shape[0], coupling.shape[2], dtype=torch.float64)
            placed[product.irreps_in2.slices()[ins.i_in2]] = coupling.transpose(0, 1)
            columns.append(placed.reshape(len(placed), -1))
            self.widths.append(columns[-1].shape[1])
        self.matrix = Constant(torch.cat(columns, dim=1))
        self.structure = Paths(tuple(self.paths), layout)

    def __call__(self, step: Step, radial: Tensor, features: Features, trains: bool) -> Features:
        angular = (step.harmonics @ self.matrix.like(step.harmonics)).split(self.widths, dim=1)
        found = convolve(
            self.structure,
            step.plan,
            radial,
            angular,
            features.blocks,
            phase=step.phase,
            geometric=features.geometric,
            trains=(trains, features.trains),
        )
        return Features(found, geometric=True, trains=trains or features.trains)


def _coupling(symbols: dict[str, Tensor], first: int, second: int, out: int) -> Tensor:
    """3j symbol in float64: the one the module uses, where it keeps it."""
    from e3nn import o3

    own = symbols.get(f"_w3j_{first}_{second}_{out}")
    return o3.wigner_3j(first, second, out, dtype=torch.float64) if own is None else own.detach().cpu().double()


def interaction_forward(module: Any) -> Callable[..., Any]:
    """Forward of an interaction block: the step and features, or as the library calls it."""
    kind = INTERACTIONS[type(module).__name__]
    convolution = Convolution(module)
    ways = {"plain": _plain, "density": _density, "nonlinear": _nonlinear}
    way = ways[kind]
    slow = original_class(module).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Step):
            return way(self, convolution, *args)
        return slow(self, *args, **kwargs)

    return forward


def _plain(block: Any, convolution: Convolution, step: Step, features: Features) -> tuple[Features, Features | None]:
    residual = "Residual" in type(block).__name__
    skip = block.skip_tp(features, step) if residual else None
    up = apply_linear(block.linear_up, features)
    radial = block.conv_tp_weights(step.radial)
    if step.cutoff is not None:
        radial = radial * step.cutoff
    message = convolution(step, radial, up, can_train(block.conv_tp_weights))
    message = apply_linear(block.linear, message).scaled(1 / block.avg_num_neighbors)
    return (message, skip) if residual else (block.skip_tp(message, step), None)


def _density(block: Any, convolution: Convolution, step: Step, features: Features) -> tuple[Features, Features | None]:
    residual = "Residual" in type(block).__name__
    skip = block.skip_tp(features, step) if residual else None
    up = apply_linear(block.linear_up, features)
    radial = block.conv_tp_weights(step.radial)
    density = torch.tanh(block.density_fn(step.radial) ** 2)
    if step.cutoff is not None:
        radial, density = radial * step.cutoff, density * step.cutoff
    around = _summed(step.plan, density) + 1
    message = convolution(step, radial, up, can_train(block.conv_tp_weights))
    message = apply_linear(block.linear, message).scaled(1 / around.unsqueeze(2))
    message.trains = message.trains or can_train(block.density_fn)
    return (message, skip) if residual else (block.skip_tp(message, step), None)


def _summed(plan: Plan, values: Tensor) -> Tensor:
    """Values of the edges summed at their receivers: (pairs, width) to (atoms, width)."""
    found = values.new_zeros(plan.n_atoms, values.shape[1])
    return found.index_add(0, plan.edge_receiver, values[plan.edge_pair])


def _nonlinear(block: Any, convolution: Convolution, step: Step, features: Features) -> tuple[Features, Features]:
    plan = step.plan
    skip = apply_linear(block.skip_tp, features)
    up = apply_linear(block.linear_up, features)
    rest = apply_linear(block.linear_res, up)
    source, target = block.source_embedding(step.attributes), block.target_embedding(step.attributes)
    inputs = torch.cat([step.radial, source[plan.sender], target[plan.receiver]], dim=-1)
    radial = block.conv_tp_weights(inputs)
    density = torch.tanh(block.density_fn(inputs) ** 2)
    if step.cutoff is not None:
        radial, density = radial * step.cutoff, density * step.cutoff
    around = (_summed(plan, density) * block.beta + block.alpha).unsqueeze(2)
    message = apply_linear(block.linear_1, convolution(step, radial, up, True)).scaled(1 / around).plus(rest)
    active = block.equivariant_nonlin(message.flat)
    layout = tuple((ir.dim, mul) for mul, ir in block.irreps_out)
    return apply_linear(block.linear_2, features_of(active, layout)), skip


def product_forward(module: Any) -> Callable[..., Any]:
    """Forward of a product block: features, what skips it and the step, or as the library calls it."""
    slow = original_class(module).forward

    def forward(self: Any, node_feats: Any, sc: Any, node_attrs: Any) -> Any:
        if not isinstance(node_attrs, Step):
            return slow(self, node_feats, sc, node_attrs)
        found = apply_linear(self.linear, self.symmetric_contractions(node_feats, node_attrs))
        return found.plus(sc) if self.use_sc and sc is not None else found

    return forward


def scalars_of(value: Any) -> Tensor:
    """What a readout gives, (atoms, heads)."""
    return value.flat if isinstance(value, Features) else value
