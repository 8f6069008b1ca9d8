"""An equivariant linear layer and a gate on its output computed together, in few operations.

The gate shifts even scalars and multiplies all other channels, by numbers computed from the even scalars of the layer's
input: z = SiLU(W↓ h + b↓), out₀ = x₀ W + W↑ z + b↑, out = (x W) φ(W↑ z + b↑). A shift is what the layer's own matrix
product is added to, and both give their gradient by the input in one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from forcetune.kernels.constants import Constant
from forcetune.kernels.linear import Block, matrices

Gain = Callable[[Tensor], tuple[Tensor, Tensor]]

_NOTHING = Constant(torch.zeros(1))
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class GatedBlock:
    """A matrix of the layer and what its output is changed by.

    Attributes:
        block: of the layer's weight; no other writes to its output.
        shift, gain: which of the gate's shifts or gains belong to its output, first and behind the last; one of them,
            or neither.
    """

    block: Block
    shift: Span | None
    gain: Span | None


@dataclass(frozen=True, slots=True)
class GatedStructure:
    """What does not depend on weights.

    Attributes:
        blocks: in the order of the layer's weight, one for each output.
        n_outputs: outputs of the layer.
        scalars: which input has the even scalars that drive the gate.
        activation: whether a SiLU follows W↓.
        gain: φ and φ′.
    """

    blocks: tuple[GatedBlock, ...]
    n_outputs: int
    scalars: int
    activation: bool
    gain: Gain


class GateWeights(NamedTuple):
    """W and b of the bottleneck, of shifts and of gains, outputs first; None where a gate has no shifts or gains."""

    down: Tensor
    down_bias: Tensor
    shift: Tensor | None
    shift_bias: Tensor | None
    gain: Tensor | None
    gain_bias: Tensor | None

    @property
    def trains(self) -> bool:
        return any(tensor is not None and tensor.requires_grad for tensor in self)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Weights that do not train, in the form in which predictions use them.

    Attributes:
        owner: has what does not depend on weights.
        state: addresses and versions of the weights; None where nothing counts their changes.
        held: the weights, so that nothing else gets their addresses.
        down, down_bias, up, up_bias: of the bottleneck, and of shifts and gains together, outputs first.
        down_transposed, up_transposed: inputs first.
        matrices, transposed: of the layer, times their factors.
    """

    owner: FixedWeights
    state: list[tuple[int, int]] | None
    held: list[Tensor]
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down_transposed: Tensor
    up_transposed: Tensor
    matrices: list[Tensor]
    transposed: list[Tensor]


class FixedWeights:
    """Keeps the weights of a layer and its gate as predictions use them, until one of them changes."""

    def __init__(self, structure: GatedStructure) -> None:
        self.structure = structure
        shifted = [(gated.shift, gated) for gated in structure.blocks if gated.shift is not None]
        gained = [(gated.gain, gated) for gated in structure.blocks if gated.gain is not None]
        shifted, gained = (sorted(pairs, key=lambda pair: pair[0]) for pairs in (shifted, gained))
        self.shifted, self.gained = [gated for _, gated in shifted], [gated for _, gated in gained]
        self.shift_widths, self.gain_widths = (
            [last - first for (first, last), _ in pairs] for pairs in (shifted, gained)
        )
        self._kept: _Prepared | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FixedWeights, (self.structure,)

    def of(self, weight: Tensor, gate: GateWeights) -> _Prepared:
        """These weights, prepared."""
        tensors = [weight, *(tensor for tensor in gate if tensor is not None)]
        state = None
        if not any(tensor.is_inference() for tensor in tensors):
            state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        kept = self._kept  # other threads may put theirs in its place
        if kept is None or state is None or kept.state != state:
            with torch.no_grad():
                self._kept = kept = self._prepared(weight, gate, state, [tensor.detach() for tensor in tensors])
        return kept

    def _prepared(
        self, weight: Tensor, gate: GateWeights, state: list[tuple[int, int]] | None, held: list[Tensor]
    ) -> _Prepared:
        ups = [(w, b) for w, b in ((gate.shift, gate.shift_bias), (gate.gain, gate.gain_bias)) if w is not None]
        up, down = torch.cat([w for w, _ in ups]), gate.down.detach()
        blocks = [gated.block for gated in self.structure.blocks]
        scaled = [matrix * block.factor for block, matrix in zip(blocks, matrices(blocks, weight), strict=True)]
        return _Prepared(
            owner=self,
            state=state,
            held=held,
            down=down,
            down_bias=gate.down_bias.detach(),
            up=up,
            up_bias=torch.cat([b for _, b in ups if b is not None]),
            down_transposed=down.t(),
            up_transposed=up.t(),
            matrices=scaled,
            transposed=[matrix.t() for matrix in scaled],
        )


def gated_linear(
    structure: GatedStructure, weight: Tensor, gate: GateWeights, inputs: Sequence[Tensor], fixed: FixedWeights
) -> Sequence[Tensor]:
    """(atoms, dim, channels) of each output from those of each input.

    Where neither the layer nor the gate trains, a pass for energies and forces keeps what its backward pass needs, and
    nothing is differentiated step by step.

    Args:
        structure: of layer and gate.
        weight: of the layer, flat.
        gate: its weights.
        inputs: (atoms, dim, channels) each.
        fixed: for this structure, from the call before.
    """
    if weight.requires_grad or gate.trains:
        return _forward(structure, weight, gate, inputs)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return _fixed_forward(fixed.of(weight, gate), inputs).outputs
    return _Fixed.apply(fixed.of(weight, gate), weight, gate, *inputs)  # pyright: ignore[reportReturnType]


def _forward(structure: GatedStructure, weight: Tensor, gate: GateWeights, inputs: Sequence[Tensor]) -> list[Tensor]:
    """By operations that PyTorch differentiates, as often as wanted."""
    hidden = functional.linear(inputs[structure.scalars][:, 0], gate.down, gate.down_bias)
    hidden = functional.silu(hidden) if structure.activation else hidden
    shifts = gains = None
    if gate.shift is not None:
        shifts = functional.linear(hidden, gate.shift, gate.shift_bias)
    if gate.gain is not None:
        gains, _ = structure.gain(functional.linear(hidden, gate.gain, gate.gain_bias))
    outputs: list[Any] = [None] * structure.n_outputs
    blocks = [gated.block for gated in structure.blocks]
    for gated, matrix in zip(structure.blocks, matrices(blocks, weight), strict=True):
        block, x = gated.block, inputs[gated.block.source]
        start = _NOTHING.like(x) if shifts is None or gated.shift is None else _columns(shifts, gated.shift)
        # β 0 leaves out what the product would be added to
        beta = 0 if gated.shift is None else 1
        found = torch.addmm(start, x.reshape(-1, block.fan_in), matrix, beta=beta, alpha=block.factor)
        found = found.view(*x.shape[:2], block.fan_out)
        if gains is not None and gated.gain is not None:
            found = found * _columns(gains, gated.gain).unsqueeze(1)
        outputs[block.target] = found
    return outputs


def _columns(values: Tensor, span: Span) -> Tensor:
    first, last = span
    return values if last - first == values.shape[1] else values[:, first:last]


class _Pass(NamedTuple):
    """A forward pass and what a backward pass needs of it.

    Attributes:
        outputs: of the layer.
        plain: for each block with a gain what it multiplies.
        before: the bottleneck before its activation.
        gains: (atoms, 1, channels) for each block with a gain.
        slopes: derivatives of all gains.
    """

    outputs: tuple[Tensor, ...]
    plain: dict[int, Tensor]
    before: Tensor
    gains: dict[int, Tensor]
    slopes: Tensor | None


def _fixed_forward(fixed: _Prepared, inputs: Sequence[Tensor]) -> _Pass:
    structure = fixed.owner.structure
    driving = inputs[structure.scalars]
    scalars = driving.reshape(len(driving), driving.shape[2])
    before = torch.addmm(fixed.down_bias, scalars, fixed.down_transposed)
    hidden = functional.silu(before) if structure.activation else before
    changes = torch.addmm(fixed.up_bias, hidden, fixed.up_transposed)
    n_gains = sum(fixed.owner.gain_widths)
    widths = [*fixed.owner.shift_widths, n_gains] if n_gains else fixed.owner.shift_widths
    parts = [changes] if len(widths) == 1 else changes.split(widths, dim=1)
    shifts = {gated.block.target: part for gated, part in zip(fixed.owner.shifted, parts, strict=False)}
    gains: dict[int, Tensor] = {}
    slopes = None
    if n_gains:
        every, slopes = structure.gain(parts[-1])
        every = every.unsqueeze(1)
        each = [every] if len(fixed.owner.gained) == 1 else every.split(fixed.owner.gain_widths, dim=2)
        gains = {gated.block.target: part for gated, part in zip(fixed.owner.gained, each, strict=True)}
    outputs: list[Any] = [None] * structure.n_outputs
    plain: dict[int, Tensor] = {}
    for gated, matrix in zip(structure.blocks, fixed.matrices, strict=True):
        block, x = gated.block, inputs[gated.block.source]
        flat = scalars if block.source == structure.scalars else x.reshape(-1, block.fan_in)
        target = block.target
        product = torch.addmm(shifts[target], flat, matrix) if target in shifts else torch.mm(flat, matrix)
        product = product.view(*x.shape[:2], block.fan_out)
        if target in gains:
            plain[target] = product
            product = product * gains[target]
        outputs[target] = product
    return _Pass(tuple(outputs), plain, before, gains, slopes)


class _Fixed(torch.autograd.Function):
    """The layer with constant weights.

    Where its backward pass is to be differentiated again, for Hessians, it goes through the steps of the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, fixed: _Prepared, weight: Tensor, gate: GateWeights, *inputs: Tensor) -> Any:
        ctx.fixed, ctx.weight, ctx.gate = fixed, weight, gate
        ctx.save_for_backward(*inputs)
        found = _fixed_forward(fixed, inputs)
        ctx.kept = found._replace(outputs=())
        return found.outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        wanted: tuple[bool, ...] = ctx.needs_input_grad[3:]
        fixed: _Prepared = ctx.fixed
        if torch.is_grad_enabled():
            outputs = _forward(fixed.owner.structure, ctx.weight, ctx.gate, inputs)
            reached = [x for x, wants in zip(inputs, wanted, strict=True) if wants]
            found = iter(torch.autograd.grad(outputs, reached, grads, create_graph=True, allow_unused=True))
            return None, None, None, *(next(found) if wants else None for wants in wanted)
        found = _fixed_backward(fixed, ctx.kept, len(inputs), grads)
        return None, None, None, *(one if wants else None for one, wants in zip(found, wanted, strict=True))


def _fixed_backward(fixed: _Prepared, kept: _Pass, n_inputs: int, grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients by the inputs."""
    structure = fixed.owner.structure
    flat = {gated.block.target: grads[gated.block.target].flatten(0, 1) for gated in fixed.owner.shifted}
    by_changes = [flat[gated.block.target] for gated in fixed.owner.shifted]
    by_product = dict(enumerate(grads))
    if fixed.owner.gained and kept.slopes is not None:
        pulls: list[Tensor] = []
        for gated, width in zip(fixed.owner.gained, fixed.owner.gain_widths, strict=True):
            target = gated.block.target
            whole = width == grads[target].shape[2]
            pulls.append(_dot(grads[target], kept.plain[target], whole=whole))
            by_product[target] = grads[target] * kept.gains[target]
        by_changes.append((pulls[0] if len(pulls) == 1 else torch.cat(pulls, dim=1)) * kept.slopes)
    hidden = (by_changes[0] if len(by_changes) == 1 else torch.cat(by_changes, dim=1)) @ fixed.up
    if structure.activation:
        hidden = torch.ops.aten.silu_backward(hidden, kept.before)
    found: list[Tensor | None] = [None] * n_inputs
    found[structure.scalars] = hidden @ fixed.down
    shapes: dict[int, tuple[int, int]] = {structure.scalars: (1, fixed.down.shape[1])}
    for gated, transposed in zip(structure.blocks, fixed.transposed, strict=True):
        block, grad = gated.block, by_product[gated.block.target]
        rows = flat[block.target] if block.target in flat else grad.reshape(-1, block.fan_out)
        before = found[block.source]
        found[block.source] = rows @ transposed if before is None else torch.addmm(before, rows, transposed)
        shapes[block.source] = (grad.shape[1], block.fan_in)
    return [None if one is None else one.view(-1, *shapes[index]) for index, one in enumerate(found)]


def _dot(one: Tensor, other: Tensor, *, whole: bool) -> Tensor:
    """Products summed over the components, and over the channels too where all have one gain."""
    return (one * other).sum(1) if whole else (one * other).sum((1, 2)).unsqueeze(1)
