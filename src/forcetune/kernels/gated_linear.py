"""An equivariant linear layer and a gate on its output computed together, in few operations.

The gate shifts even scalars and multiplies all other channels, by numbers computed from the even scalars of the layer's
input: z = SiLU(W↓ h + b↓), out₀ = x₀ W + W↑ z + b↑, out = (x W) φ(W↑ z + b↑). A shift is what the layer's own matrix
product is added to, and both give their gradient by the input in one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forcetune.kernels.compiled import gate as compiled_gate
from forcetune.kernels.compiled.choice import Kernels
from forcetune.kernels.fixed_gate import FixedWeights, LayerByKernels, LayerByOperations, fixed_forward
from forcetune.kernels.gated_blocks import GatedStructure, GateWeights, apply_layer_and_gate


def gated_linear(
    structure: GatedStructure,
    weight: Tensor,
    gate: GateWeights,
    inputs: Sequence[Tensor],
    fixed: FixedWeights,
    kernels: Kernels = "auto",
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
        kernels: that compute the gate.
    """
    compiled = fixed.compiled(kernels, gate, inputs)
    if weight.requires_grad or gate.trains:
        return apply_layer_and_gate(structure, weight, gate, inputs, compiled)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if compiled is None:
        prepared = fixed.prepare(weight, gate)
        if differentiated:
            return LayerByOperations.apply(prepared, weight, gate, *inputs)  # pyright: ignore[reportReturnType]
        return fixed_forward(prepared, inputs).outputs
    if compiled_gate.is_recorded():
        return apply_layer_and_gate(structure, weight, gate, inputs, compiled)
    layer = fixed.layer(weight, gate, compiled)
    inputs = [x.contiguous() for x in inputs]
    if differentiated:
        return LayerByKernels.apply(layer, (structure, weight, gate, compiled), *inputs)  # pyright: ignore[reportReturnType]
    return layer.value(inputs)[0]
