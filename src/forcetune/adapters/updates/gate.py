"""Magnitude-modulated gate (MMEA, arXiv 2511.06696, AAAI 2026)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from forcetune.adapters.updates.base import ActivationUpdate, Rank, Update
from forcetune.backbones.protocol import Site
from forcetune.irreps import Block, merge_neighbours, parse_irreps
from forcetune.kernels.features import Features

# Beyond this argument the exponential goes on as its tangent: gains of e^10 are met in no sane run, and
# neither the gain nor its derivative can overflow, in float32 either.
LARGEST_EXPONENT = 10.0


def gain_and_slope(kind: Literal["exp", "linear"], x: Tensor) -> tuple[Tensor, Tensor]:
    """φ(x) and φ′(x).

    ``exp``: eˣ, continued by its tangent beyond :data:`LARGEST_EXPONENT`; once continuously differentiable, positive.
    ``linear``: 1 + x.
    """
    if kind == "linear":
        return 1 + x, torch.ones_like(x)
    capped = x.clamp(max=LARGEST_EXPONENT)
    slope = capped.exp()
    return torch.addcmul(slope, slope, x - capped), slope


class _FixedGate(torch.autograd.Function):
    """A gate whose own weights are constants, on features by blocks: a few fused steps forwards and backwards.

    Where its backward pass is to be differentiated again, for Hessians, it starts from what was given; otherwise from
    what the forward pass has found.
    """

    @staticmethod
    def forward(ctx: Any, gate: GateActivation, scalars: Tensor, *blocks: Tensor) -> tuple[Tensor, ...]:
        ctx.gate = gate
        ctx.save_for_backward(scalars, *blocks)
        ctx.fixed = gate.fixed(scalars[:, 0])
        per_block = gate.per_block(*ctx.fixed[:2])
        return tuple(
            block * gain.unsqueeze(1)
            if gain is not None
            else block + shift.unsqueeze(1)
            if shift is not None
            else block.view_as(block)
            for block, (shift, gain) in zip(blocks, per_block, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate: GateActivation = ctx.gate
        scalars, *blocks = ctx.saved_tensors
        again = torch.is_grad_enabled()
        shifts, gains, slope, before = gate.fixed(scalars[:, 0]) if again else ctx.fixed
        block_grads: list[Tensor] = []
        by_shift: list[Tensor] = []
        by_gain: list[Tensor] = []
        for grad, block, (shift, gain) in zip(grads, blocks, gate.per_block(shifts, gains), strict=True):
            if gain is not None:
                pull = (grad * block).sum(1)
                by_gain.append(pull if gain.shape[1] == pull.shape[1] else pull.sum(1, keepdim=True))
                grad = grad * gain.unsqueeze(1)
            elif shift is not None:
                by_shift.append(grad[:, 0])
            block_grads.append(grad)
        if not ctx.needs_input_grad[1]:
            return None, None, *block_grads
        if slope is not None:
            by_gain = [_joined(by_gain) * slope]
        hidden = _joined([*by_shift, *by_gain]) @ gate.heads()[0]
        if gate.spec.activation:
            hidden = _through_silu(hidden, before, again=again)
        return None, (hidden @ gate.down.weight).unsqueeze(1), *block_grads


def _through_silu(grad: Tensor, x: Tensor, *, again: bool) -> Tensor:
    """The gradient by what goes into a SiLU; PyTorch's own way for that is one operation, but has no derivative."""
    if not again:
        return torch.ops.aten.silu_backward(grad, x)
    sigmoid = x.sigmoid()
    return grad * torch.addcmul(sigmoid, x * sigmoid, 1 - sigmoid)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)


class GateActivation(ActivationUpdate):
    """Shift of even scalars and gain of all other channels, computed from the input's even scalars.

    z = SiLU(W↓ h⁽⁰⁾ + b↓); even scalars: out + W↑ z + b↑; others: out · φ(W↑ z + b↑), one number for each
    irrep and multiplicity of the output, the same for its 2 l + 1 components. A gate that is told the species
    adds to b↓ a vector for the element of each atom.

    Attributes:
        watcher: called with shifts, gains and the blocks of the output they act on, to learn what the gate does.
    """

    def __init__(self, site: Site, weight: Tensor, spec: Gate) -> None:
        super().__init__()
        assert site.irreps_in is not None and site.irreps_out is not None
        self.spec = spec
        blocks_in = merge_neighbours(parse_irreps(site.irreps_in))
        self.scalars_in = tuple(block for block in blocks_in if block.is_even_scalar)
        self.blocks_out = parse_irreps(site.irreps_out)
        self._layouts = tuple(tuple((b.dim, b.multiplicity) for b in blocks) for blocks in (blocks_in, self.blocks_out))
        self._place = blocks_in.index(self.scalars_in[0])
        self.gains_of = [self._gains(block) for block in self.blocks_out]
        n_in = sum(block.multiplicity for block in self.scalars_in)
        n_shift = sum(block.multiplicity for block in self.blocks_out if block.is_even_scalar) if spec.shift else 0
        n_gain = sum(self.gains_of)
        options = {"dtype": weight.dtype, "device": weight.device}

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, **options)

        self.watcher: Callable[[Tensor | None, Tensor | None, Sequence[Tensor]], None] | None = None
        both = n_shift > 0 and n_gain > 0
        self.down = linear(n_in, spec.rank)
        self.down_gain = linear(n_in, spec.rank) if both and not spec.shared_bottleneck else None
        self.element = None
        if spec.species:
            self.element = nn.Parameter(torch.randn(_n_species(site), spec.rank, **options))
        self.shift = linear(spec.rank, n_shift) if n_shift else None
        self.gain = linear(spec.rank, n_gain) if n_gain else None
        for layer, spread in ((self.shift, spec.shift_init), (self.gain, 0.0)):
            if layer is not None:
                nn.init.normal_(layer.weight, std=spread) if spread else nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def _gains(self, block: Block) -> int:
        if block.is_even_scalar or not self.spec.modulation:
            return 0
        return 1 if self.spec.shared_gain else block.multiplicity

    @property
    def reads_species(self) -> bool:
        return self.element is not None

    def _bottleneck(self, down: nn.Linear, scalars: Tensor, species: Tensor | None) -> Tensor:
        hidden = down(scalars)
        if self.element is not None:
            assert species is not None
            hidden = hidden + species @ self.element
        return functional.silu(hidden) if self.spec.activation else hidden

    def fixed(self, scalars: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """Shifts, gains, the derivative of the gains, and the bottleneck before its activation, for (atoms, n₀)."""
        before = self.down(scalars)
        hidden = functional.silu(before) if self.spec.activation else before
        outputs = functional.linear(hidden, *self.heads())
        if self.gain is None:
            return outputs, None, None, before
        n_shift = 0 if self.shift is None else self.shift.out_features
        shifts = outputs[:, :n_shift] if n_shift else None
        return shifts, *gain_and_slope(self.spec.gain, outputs[:, n_shift:] if n_shift else outputs), before

    def heads(self) -> tuple[Tensor, Tensor]:
        """W↑ and b↑ of shifts and gains, shifts first."""
        heads = [head for head in (self.shift, self.gain) if head is not None]
        if len(heads) == 1:
            return heads[0].weight, heads[0].bias
        return torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])

    def _can_be_fixed(self, inputs: Any, outputs: Any) -> bool:
        return (
            isinstance(inputs, Features)
            and isinstance(outputs, Features)
            and self.down_gain is None
            and self.element is None
            and len(self.scalars_in) == 1
            and (inputs.geometric or outputs.geometric)
            and self._layouts == (inputs.layout, outputs.layout)
            and self.watcher is None
            and not any(parameter.requires_grad for parameter in self.parameters())
        )

    def forward(self, inputs: Tensor, outputs: Tensor, species: Tensor | None = None) -> Tensor:
        if self._can_be_fixed(inputs, outputs):
            known: Any = outputs
            features: Any = inputs
            scalars = features.blocks[self._place]
            blocks: Any = _FixedGate.apply(self, scalars, *known.blocks)
            return Features(blocks, geometric=True, trains=True)  # pyright: ignore[reportReturnType]
        parts = [inputs[..., block.start : block.stop] for block in self.scalars_in]
        scalars = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        hidden = self._bottleneck(self.down, scalars, species)
        shifts = self.shift(hidden) if self.shift is not None else None
        gains = None
        if self.gain is not None:
            hidden = hidden if self.down_gain is None else self._bottleneck(self.down_gain, scalars, species)
            gains, _ = gain_and_slope(self.spec.gain, self.gain(hidden))
        if self.watcher is not None:
            self.watcher(shifts, gains, self._parts_of(outputs))
        return self._changed(inputs, outputs, self.per_block(shifts, gains))

    def _parts_of(self, outputs: Any) -> list[Tensor]:
        """The output's blocks, (…, anything)."""
        flat = outputs.flat if isinstance(outputs, Features) else outputs
        return [flat[..., block.start : block.stop] for block in self.blocks_out]

    def per_block(self, shifts: Tensor | None, gains: Tensor | None) -> list[tuple[Tensor | None, Tensor | None]]:
        """(shift, gain) of each output block, (…, channels) or (…, 1)."""
        by_block: list[tuple[Tensor | None, Tensor | None]] = []
        n_shift = n_gain = 0
        for block, count in zip(self.blocks_out, self.gains_of, strict=True):
            shift = gain = None
            if block.is_even_scalar and shifts is not None:
                shift = shifts[..., n_shift : n_shift + block.multiplicity]
                n_shift += block.multiplicity
            elif count and gains is not None:
                gain = gains[..., n_gain : n_gain + count]
                n_gain += count
            by_block.append((shift, gain))
        return by_block

    def _changed(
        self, inputs: Tensor, outputs: Any, per_block: Sequence[tuple[Tensor | None, Tensor | None]]
    ) -> Tensor | Any:
        """The outputs, flat or by blocks as the kernels have them, with every block's shift or gain."""
        if isinstance(outputs, Features):
            if outputs.layout == self._layouts[1]:
                blocks = []
                for part, (shift, gain) in zip(outputs.blocks, per_block, strict=True):
                    shifted = part if shift is None else part + shift.unsqueeze(1)
                    blocks.append(shifted if gain is None else shifted * gain.unsqueeze(1))
                return Features(blocks, geometric=self._geometric(inputs, outputs), trains=True)
            outputs = outputs.flat
        changed = []
        for block, (shift, gain) in zip(self.blocks_out, per_block, strict=True):
            part = outputs[..., block.start : block.stop]
            if shift is not None:
                part = part + shift
            elif gain is not None:
                part = (part.unflatten(-1, (block.multiplicity, block.dim)) * gain.unsqueeze(-1)).flatten(-2)
            changed.append(part)
        return changed[0] if len(changed) == 1 else torch.cat(changed, dim=-1)

    @staticmethod
    def _geometric(inputs: Any, outputs: Features) -> bool:
        return outputs.geometric or not isinstance(inputs, Features) or inputs.geometric


def _n_species(site: Site) -> int:
    """Elements of a tensor product of features with one-hot species: its fan in runs over channels and elements."""
    assert site.irreps_in is not None
    first = next(block for block in parse_irreps(site.irreps_in) if block.is_even_scalar)
    path = next(path for path in site.paths if path.name.startswith("0e*"))
    return path.shape[0] // first.multiplicity


@dataclass(frozen=True)
class Gate(Update):
    """MMEA's gate after an equivariant linear layer. It mixes no two channels and keeps O(3) equivariance exactly.

    Trainable parameters, with S non-scalar output channels, n₀ even scalar outputs and n_in even scalar inputs:
    n_in r + r + r S + S + r n₀ + n₀.

    Attributes:
        rank: r, width of the bottleneck.
        gain: φ(x) = eˣ (``exp``) or 1 + x (``linear``).
        activation: SiLU in the bottleneck.
        shift: the additive part on even scalars.
        modulation: the multiplicative part on all other channels.
        shared_bottleneck: one bottleneck for both parts.
        shared_gain: one gain for all channels of an irrep block instead of one each.
        shift_init: standard deviation of the additive part's initial weights; 0 starts at the identity.
        species: the gate knows each atom's element, too; for tensor products with the species (skip connections).
    """

    rank: Rank = 16
    gain: Literal["exp", "linear"] = "exp"
    activation: bool = True
    shift: bool = True
    modulation: bool = True
    shared_bottleneck: bool = True
    shared_gain: bool = False
    shift_init: Annotated[float, Field(ge=0)] = 0.0
    species: bool = False
    name: ClassVar[str] = "Gate"
    mergeable: ClassVar[bool] = False
    internal: ClassVar[frozenset[str]] = frozenset({"species"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.shift or self.modulation):
            raise ValueError("a gate without shift and without modulation does nothing")

    def unsupported_reason(self, site: Site) -> str | None:
        if site.irreps_in is None or site.irreps_out is None:
            return "its module has no irreps"
        # a linear layer may stand in the place of a tensor product with the species
        if self.species and not all("*" in path.name for path in site.paths):
            return "it does not know the species"
        if not any(block.is_even_scalar for block in parse_irreps(site.irreps_in)):
            return "its input has no even scalars to drive a gate"
        outputs = parse_irreps(site.irreps_out)
        shifted = self.shift and any(block.is_even_scalar for block in outputs)
        gained = self.modulation and any(not block.is_even_scalar for block in outputs)
        if not (shifted or gained):
            return "its output has no channels that this gate changes"
        return None

    def build(self, site: Site, weight: Tensor) -> GateActivation:
        return GateActivation(site, weight, self)
