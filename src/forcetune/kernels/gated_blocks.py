"""A linear layer and a gate on its output, by operations that are differentiated as often as wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from forcetune.kernels.compiled import gate as compiled_gate
from forcetune.kernels.compiled.gate_layout import GateShape
from forcetune.kernels.constants import Constant
from forcetune.kernels.gain import GainKind, gain_and_slope
from forcetune.kernels.linear import Block, equivariant_linear, matrices

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
        gain: φ.
    """

    blocks: tuple[GatedBlock, ...]
    n_outputs: int
    scalars: int
    activation: bool
    gain: GainKind


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


class CompiledGate:
    """The gate of a structure as compiled kernels have it.

    Attributes:
        gate: that they apply.
        targets: outputs that the gate changes, in its order.
    """

    def __init__(self, structure: GatedStructure, rank: int, n_in: int, dims: Sequence[int]) -> None:
        changed = sorted((b for b in structure.blocks if b.shift or b.gain), key=lambda gated: gated.block.target)
        self.targets = [gated.block.target for gated in changed]
        blocks = tuple((gated.gain is not None, dims[gated.block.source], gated.block.fan_out) for gated in changed)
        shape = GateShape(structure.activation, structure.gain, rank, n_in, blocks)
        self.structure, self.dims = structure, list(dims)
        self.spans = [(gated.shift, gated.gain) for gated in changed]
        self.has_shifts = any(gated.shift for gated in changed)
        self.gate = compiled_gate.Gate(shape, shape.flat, self._reference)

    def _reference(self, driver: Tensor, weights: Sequence[Tensor], blocks: Sequence[Tensor]) -> list[Tensor]:
        """What the kernels compute, by operations that PyTorch differentiates as often as wanted."""
        hidden = functional.linear(driver.squeeze(1), weights[0], weights[1])
        hidden = functional.silu(hidden) if self.structure.activation else hidden
        shifts = functional.linear(hidden, weights[2], weights[3]) if self.has_shifts else None
        place = 4 if self.has_shifts else 2
        gains = None
        if len(weights) > place:
            gains, _ = gain_and_slope(self.structure.gain, functional.linear(hidden, *weights[place : place + 2]))
        results: list[Tensor] = []
        for block, (shift, gain) in zip(blocks, self.spans, strict=True):
            if shift is not None and shifts is not None:
                results.append(block + _columns(shifts, shift).unsqueeze(1))
            else:
                assert gain is not None and gains is not None
                results.append(block * _columns(gains, gain).unsqueeze(1))
        return results


def apply_layer_and_gate(
    structure: GatedStructure,
    weight: Tensor,
    gate: GateWeights,
    inputs: Sequence[Tensor],
    compiled: CompiledGate | None,
) -> list[Tensor]:
    """The linear layer and then its gate, by kernels where ``compiled`` is given; differentiable as often as wanted."""
    if compiled is None:
        return apply_by_operations(structure, weight, gate, inputs)
    # every output has a block, so that none is filled with zeros
    shapes = [(0, 0)] * structure.n_outputs
    outputs = equivariant_linear([gated.block for gated in structure.blocks], weight, inputs, shapes)
    weights = [tensor for tensor in gate if tensor is not None]
    plain = [outputs[target] for target in compiled.targets]
    changed = compiled_gate.apply_gate(compiled.gate, inputs[structure.scalars], weights, plain)
    for target, block in zip(compiled.targets, changed, strict=True):
        outputs[target] = block
    return outputs


def apply_by_operations(
    structure: GatedStructure, weight: Tensor, gate: GateWeights, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """By operations that PyTorch differentiates, as often as wanted."""
    hidden = functional.linear(inputs[structure.scalars][:, 0], gate.down, gate.down_bias)
    hidden = functional.silu(hidden) if structure.activation else hidden
    shifts = gains = None
    if gate.shift is not None:
        shifts = functional.linear(hidden, gate.shift, gate.shift_bias)
    if gate.gain is not None:
        gains, _ = gain_and_slope(structure.gain, functional.linear(hidden, gate.gain, gate.gain_bias))
    outputs: list[Any] = [None] * structure.n_outputs
    blocks = [gated.block for gated in structure.blocks]
    for gated, matrix in zip(structure.blocks, matrices(blocks, weight), strict=True):
        block, x = gated.block, inputs[gated.block.source]
        start = _NOTHING.like(x) if shifts is None or gated.shift is None else _columns(shifts, gated.shift)
        # β 0 leaves out what the product would be added to
        beta = 0 if gated.shift is None else 1
        product = torch.addmm(start, x.reshape(-1, block.fan_in), matrix, beta=beta, alpha=block.factor)
        product = product.view(*x.shape[:2], block.fan_out)
        if gains is not None and gated.gain is not None:
            product = product * _columns(gains, gated.gain).unsqueeze(1)
        outputs[block.target] = product
    return outputs


def _columns(values: Tensor, span: Span) -> Tensor:
    first, last = span
    return values if last - first == values.shape[1] else values[:, first:last]
