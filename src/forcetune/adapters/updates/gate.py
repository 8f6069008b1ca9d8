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
from forcetune.kernels.gain import gain_and_slope
from forcetune.kernels.gated_blocks import GatedBlock, GatedStructure, GateWeights
from forcetune.kernels.layers import EquivariantLinear

_NO_WEIGHTS: dict[str, Tensor | None] = {"weight": None, "bias": None}


class GateActivation(ActivationUpdate):
    """Shift of even scalars and gain of all other channels, computed from the input's even scalars.

    z = SiLU(W↓ h⁽⁰⁾ + b↓); even scalars: out + W↑ z + b↑; others: out · φ(W↑ z + b↑), one number for each
    irrep and multiplicity of the output, the same for its 2 l + 1 components. A gate that knows the species
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

    def weights(self) -> GateWeights:
        """All weights, for a gate with one bottleneck."""
        weights: list[Tensor | None] = []
        # read where modules keep them, which is several times as fast as by their attributes
        for name in ("down", "shift", "gain"):
            layer = self._modules.get(name)
            table = _NO_WEIGHTS if layer is None else layer._parameters
            weights += (table["weight"], table["bias"])
        return GateWeights(*weights)  # pyright: ignore[reportArgumentType]

    def structure_on(self, layer: EquivariantLinear) -> GatedStructure | None:
        """Of a layer and this gate computed together; None where that takes the layer's output."""
        one_each = [block.target for block in layer.blocks]
        if len(parse_irreps(layer.irreps_in)) != len(self._layouts[0]):
            return None
        whole = all(block.row == 0 and block.fan_in == self._layouts[0][block.source][1] for block in layer.blocks)
        simple = self.down_gain is None and self.element is None and len(self.scalars_in) == 1
        if not (simple and whole and not layer.biased and sorted(one_each) == list(range(len(self.blocks_out)))):
            return None
        spans: list[tuple[tuple[int, int] | None, tuple[int, int] | None]] = []
        n_shift = n_gain = 0
        for block, count in zip(self.blocks_out, self.gains_of, strict=True):
            shift = gain = None
            if block.is_even_scalar and self.shift is not None:
                shift = (n_shift, n_shift + block.multiplicity)
                n_shift = shift[1]
            elif count:
                gain = (n_gain, n_gain + count)
                n_gain = gain[1]
            spans.append((shift, gain))
        return GatedStructure(
            blocks=tuple(GatedBlock(block, *spans[block.target]) for block in layer.blocks),
            n_outputs=len(self.blocks_out),
            scalars=self._place,
            activation=self.spec.activation,
            gain=self.spec.gain,
        )

    def forward(self, inputs: Tensor, outputs: Tensor, species: Tensor | None = None) -> Tensor:
        shifts, gains = self.shifts_and_gains(self.even_scalars(inputs), species)
        if self.watcher is not None:
            self.watcher(shifts, gains, self._split(outputs))
        return self._changed(inputs, outputs, self.per_block(shifts, gains))

    def even_scalars(self, inputs: Tensor) -> Tensor:
        """The part of the layer's input that drives the gate, (atoms, scalars)."""
        parts = [inputs[..., block.start : block.stop] for block in self.scalars_in]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def shifts_and_gains(self, scalars: Tensor, species: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """What the gate adds to even scalars, (atoms, shifts), and factors of the rest, (atoms, gains); None for none.

        Args:
            scalars: as :meth:`even_scalars` gives them.
            species: (atoms, elements) one-hot, for a gate that reads it.
        """
        hidden = self._bottleneck(self.down, scalars, species)
        shifts = self.shift(hidden) if self.shift is not None else None
        if self.gain is None:
            return shifts, None
        hidden = hidden if self.down_gain is None else self._bottleneck(self.down_gain, scalars, species)
        gains, _ = gain_and_slope(self.spec.gain, self.gain(hidden))
        return shifts, gains

    def _split(self, outputs: Any) -> list[Tensor]:
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
