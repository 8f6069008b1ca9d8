"""A linear layer and a gate on its output whose weights do not train, as in predictions: first derivatives by hand.

A pass for energies and forces keeps what its backward pass needs, and nothing is differentiated step by step. Where the
backward pass is to be differentiated again, for Hessians, it goes through the steps of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from forcetune.kernels.compiled.choice import Kernels, takes_compiled
from forcetune.kernels.compiled.gated_layer import FixedLayer
from forcetune.kernels.gain import gain_and_slope
from forcetune.kernels.gated_blocks import (
    CompiledGate,
    GatedStructure,
    GateWeights,
    apply_by_operations,
    apply_layer_and_gate,
)
from forcetune.kernels.linear import matrices


@dataclass(slots=True)
class PreparedWeights:
    """Weights that do not train, in the form in which predictions use them.

    Attributes:
        owner: has what does not depend on weights.
        state: addresses and versions of the weights; None where nothing counts their changes.
        held: the weights, so that nothing else gets their addresses.
        down, down_bias, up, up_bias: of the bottleneck, and of shifts and gains together, outputs first.
        down_transposed, up_transposed: inputs first.
        matrices, transposed: of the layer, times their factors.
        layer: all of it for compiled kernels, where it has been asked for.
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
    layer: FixedLayer | None = None


class _Entry(NamedTuple):
    """A block, and the places of its shifts or gains among all; -1 for none."""

    source: int
    target: int
    drives: bool
    shift: int
    gain: int


class FixedWeights:
    """Keeps the weights of a layer and its gate as predictions use them, until one of them changes."""

    def __init__(self, structure: GatedStructure) -> None:
        self.structure = structure
        shifts = sorted(gated.shift for gated in structure.blocks if gated.shift is not None)
        gains = sorted(gated.gain for gated in structure.blocks if gated.gain is not None)
        self.n_shifts = len(shifts)
        self.gain_widths = [last - first for first, last in gains]
        self.widths = [last - first for first, last in shifts]
        if gains:
            self.widths.append(sum(self.gain_widths))
        self.entries = [
            _Entry(
                gated.block.source,
                gated.block.target,
                gated.block.source == structure.scalars,
                -1 if gated.shift is None else shifts.index(gated.shift),
                -1 if gated.gain is None else gains.index(gated.gain),
            )
            for gated in structure.blocks
        ]
        self._kept: PreparedWeights | None = None
        # one gain for all channels of a block is left to PyTorch's operations
        self._compilable = all(
            gated.gain is None or gated.gain[1] - gated.gain[0] == gated.block.fan_out for gated in structure.blocks
        )
        self._compiled: CompiledGate | None = None

    def compiled(self, kernels: Kernels, gate: GateWeights, inputs: Sequence[Tensor]) -> CompiledGate | None:
        """What compiled kernels need; None where this gate, or this computer, has none."""
        driver = inputs[self.structure.scalars]
        if not (self._compilable and takes_compiled(kernels, driver)):
            return None
        if self._compiled is None:
            rank, n_in = gate.down.shape
            self._compiled = CompiledGate(self.structure, rank, n_in, [x.shape[1] for x in inputs])
        return self._compiled

    def __reduce__(self) -> tuple[Any, ...]:
        return FixedWeights, (self.structure,)

    def prepare(self, weight: Tensor, gate: GateWeights) -> PreparedWeights:
        """These weights, prepared."""
        tensors = [weight, *filter(_is_tensor, gate)]
        try:
            state = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        except RuntimeError:
            state = None  # nothing counts the changes of tensors made in inference mode
        kept = self._kept  # other threads may put theirs in its place
        if kept is None or state is None or kept.state != state:
            with torch.no_grad():
                self._kept = kept = self._build_prepared(weight, gate, state, [tensor.detach() for tensor in tensors])
        return kept

    def layer(self, weight: Tensor, gate: GateWeights, compiled: CompiledGate) -> FixedLayer:
        """These weights, as compiled kernels have them."""
        prepared = self.prepare(weight, gate)
        if prepared.layer is None:
            blocks = [
                (gated.block.source, gated.block.target, compiled.dims[gated.block.source])
                for gated in self.structure.blocks
            ]
            prepared.layer = FixedLayer(
                *(compiled.gate.shape, prepared.held[1:], prepared.matrices, blocks),
                *(compiled.targets, self.structure.scalars),
            )
        return prepared.layer

    def _build_prepared(
        self, weight: Tensor, gate: GateWeights, state: list[tuple[int, int]] | None, held: list[Tensor]
    ) -> PreparedWeights:
        ups = [(w, b) for w, b in ((gate.shift, gate.shift_bias), (gate.gain, gate.gain_bias)) if w is not None]
        up, down = torch.cat([w for w, _ in ups]), gate.down.detach()
        blocks = [gated.block for gated in self.structure.blocks]
        scaled = [matrix * block.factor for block, matrix in zip(blocks, matrices(blocks, weight), strict=True)]
        return PreparedWeights(
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


def _is_tensor(value: Tensor | None) -> bool:
    return value is not None


class ForwardPass(NamedTuple):
    """A forward pass and what a backward pass needs of it.

    Attributes:
        outputs: of the layer.
        plain: for each block with a gain what it multiplies.
        before: the bottleneck before its activation.
        gains: (atoms, 1, channels) for each block with a gain.
        slopes: derivatives of all gains.
    """

    outputs: tuple[Tensor, ...]
    plain: list[Any]
    before: Tensor
    gains: Sequence[Tensor]
    slopes: Tensor | None


def fixed_forward(fixed: PreparedWeights, inputs: Sequence[Tensor]) -> ForwardPass:
    """The layer and its gate by PyTorch's operations, and what their gradients by the inputs need."""
    owner = fixed.owner
    structure = owner.structure
    scalars = inputs[structure.scalars].squeeze(1)
    before = torch.addmm(fixed.down_bias, scalars, fixed.down_transposed)
    hidden = functional.silu(before) if structure.activation else before
    changes = torch.addmm(fixed.up_bias, hidden, fixed.up_transposed)
    parts = changes.split(owner.widths, dim=1) if len(owner.widths) > 1 else (changes,)
    gains: Sequence[Tensor] = ()
    slopes = None
    if owner.gain_widths:
        every, slopes = gain_and_slope(structure.gain, parts[-1])
        every = every.unsqueeze(1)
        gains = every.split(owner.gain_widths, dim=2) if len(owner.gain_widths) > 1 else (every,)
    outputs: list[Any] = [None] * structure.n_outputs
    plain: list[Any] = [None] * len(gains)
    for (source, target, drives, shift, gain), matrix in zip(owner.entries, fixed.matrices, strict=True):
        if shift >= 0:
            x = scalars if drives else inputs[source].squeeze(1)
            outputs[target] = torch.addmm(parts[shift], x, matrix).unsqueeze(1)
            continue
        product = _times(inputs[source], matrix)
        if gain >= 0:
            plain[gain] = product
            product = product * gains[gain]
        outputs[target] = product
    return ForwardPass(tuple(outputs), plain, before, gains, slopes)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x W by one matrix product; ``matmul`` makes a batch of them where x is not contiguous."""
    atoms, dim, channels = x.shape
    return x.reshape(atoms * dim, channels).mm(matrix).view(atoms, dim, matrix.shape[1])


class LayerByOperations(torch.autograd.Function):
    """The layer with constant weights.

    Where its backward pass is to be differentiated again, for Hessians, it goes through the steps of the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, fixed: PreparedWeights, weight: Tensor, gate: GateWeights, *inputs: Tensor) -> Any:
        ctx.fixed, ctx.weight, ctx.gate = fixed, weight, gate
        ctx.save_for_backward(*inputs)
        forward = fixed_forward(fixed, inputs)
        ctx.kept = forward._replace(outputs=())
        return forward.outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
        wanted: tuple[bool, ...] = ctx.needs_input_grad[3:]
        fixed: PreparedWeights = ctx.fixed
        if torch.is_grad_enabled():
            outputs = apply_by_operations(fixed.owner.structure, ctx.weight, ctx.gate, inputs)
            return None, None, None, *_pulled_again(outputs, inputs, wanted, grads)
        gradients = _backward(fixed, ctx.kept, len(inputs), grads)
        return None, None, None, *(one if wants else None for one, wants in zip(gradients, wanted, strict=True))


def _backward(fixed: PreparedWeights, kept: ForwardPass, n_inputs: int, grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients by the inputs."""
    owner = fixed.owner
    by_shift: list[Any] = [None] * owner.n_shifts
    by_gain: list[Any] = [None] * len(kept.gains)
    for _, target, _, shift, gain in owner.entries:
        if shift >= 0:
            by_shift[shift] = grads[target].squeeze(1)
        elif gain >= 0:
            pull = (grads[target] * kept.plain[gain]).sum(1)
            # one gain may belong to all channels
            by_gain[gain] = pull if kept.gains[gain].shape[2] == pull.shape[1] else pull.sum(1, keepdim=True)
    by_changes = by_shift
    if kept.slopes is not None:
        together = by_gain[0] if len(by_gain) == 1 else torch.cat(by_gain, dim=1)
        by_changes = [*by_shift, together * kept.slopes]
    hidden = (by_changes[0] if len(by_changes) == 1 else torch.cat(by_changes, dim=1)).mm(fixed.up)
    if owner.structure.activation:
        hidden = torch.ops.aten.silu_backward(hidden, kept.before)
    driving = hidden.mm(fixed.down)
    gradients: list[Tensor | None] = [None] * n_inputs
    for (source, target, drives, shift, gain), transposed in zip(owner.entries, fixed.transposed, strict=True):
        if shift >= 0 and drives:
            driving = torch.addmm(driving, by_shift[shift], transposed)
            continue
        grad = grads[target] * kept.gains[gain] if gain >= 0 else grads[target]
        one = _times(grad, transposed)
        if drives:
            driving = driving + one.squeeze(1)
            continue
        before = gradients[source]
        gradients[source] = one if before is None else before + one
    gradients[owner.structure.scalars] = driving.unsqueeze(1)
    return gradients


class LayerByKernels(torch.autograd.Function):
    """As :class:`LayerByOperations`, by one call of compiled kernels for each pass; inputs are contiguous."""

    @staticmethod
    def forward(ctx: Any, layer: FixedLayer, again: tuple[Any, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.layer, ctx.again = layer, again
        outputs, ctx.kept = layer.value(inputs)
        ctx.save_for_backward(*inputs, *outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        wanted: tuple[bool, ...] = ctx.needs_input_grad[2:]
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        inputs, outputs = saved[: len(wanted)], saved[len(wanted) :]
        if torch.is_grad_enabled():
            structure, weight, gate, compiled = ctx.again
            outputs = apply_layer_and_gate(structure, weight, gate, inputs, compiled)
            return None, None, *_pulled_again(outputs, inputs, wanted, grads)
        by_inputs = ctx.layer.pull(inputs, outputs, [grad.contiguous() for grad in grads], ctx.kept)
        return None, None, *(one if wants else None for one, wants in zip(by_inputs, wanted, strict=True))


def _pulled_again(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], grads: Sequence[Tensor]
) -> Iterator[Tensor | None]:
    """Gradients by the inputs, in a form that is differentiated once more."""
    reached = [x for x, wants in zip(inputs, wanted, strict=True) if wants]
    results = iter(torch.autograd.grad(outputs, reached, grads, create_graph=True, allow_unused=True))
    return (next(results) if wants else None for wants in wanted)
