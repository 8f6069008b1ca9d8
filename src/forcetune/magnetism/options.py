"""What a magnetic layer is, without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import nn

from forcetune.config import LARGEST_CHANNELS, SpinInputs
from forcetune.frames.spins import DIRECTIONS
from forcetune.magnetism.layer import MagnitudeLayer, SpinLayer
from forcetune.utils.parsing import short

Layer = Literal["spin", "magnitude"]


@dataclass(frozen=True)
class Magnetism:
    """Hyper-parameters of a magnetic layer.

    Attributes:
        layer: ``spin`` has moments as vectors and their energy; ``magnitude`` predicts |μ| and adds no energy.
        inputs: the magnetic state that the spin layer is given (:func:`forcetune.frames.spins.with_spins`).
        spin_orbit: terms that couple spins to directions in space.
        channels: width of the perceptrons.
        radial: radial functions.
        learning_rate: of the layer, which starts from nothing, whatever the method's own is.
    """

    layer: Layer = "spin"
    inputs: SpinInputs = "auto"
    spin_orbit: bool = False
    channels: int = 64
    radial: int = 8
    learning_rate: float = 5e-3

    @property
    def takes_directions(self) -> bool:
        """Whether the length of a given spin makes no difference."""
        return self.inputs in DIRECTIONS

    def build(self, n_scalars: int, cutoff: float, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The layer for a backbone with so many invariant node features and this cutoff, Å."""
        if self.layer == "magnitude":
            made: nn.Module = MagnitudeLayer(n_scalars, self.channels)
        else:
            made = SpinLayer(n_scalars, cutoff, self.channels, self.radial, self.spin_orbit)
        return made.to(dtype=dtype, device=device)

    def describe(self) -> str:
        """As in a table."""
        if self.layer == "magnitude":
            return f"magnitudes of moments (channels={self.channels})"
        return f"spin layer (channels={self.channels}, {'with' if self.spin_orbit else 'without'} spin–orbit terms)"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Magnetism:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: an option this version does not know, or of the wrong type or size.
        """
        unknown = set(data) - {field.name for field in fields(Magnetism)}
        if unknown:
            raise ValueError(f"a magnetic layer has no option {sorted(unknown)}")
        made = Magnetism(**data)
        for name, words in (("layer", get_args(Layer)), ("inputs", get_args(SpinInputs))):
            if getattr(made, name) not in words:
                raise ValueError(f"{name} of the magnetic layer is {short(getattr(made, name))}")
        for name, most in (("channels", LARGEST_CHANNELS), ("radial", 64)):
            value = getattr(made, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} of the magnetic layer is {short(value)}, at most {most} is read")
        if type(made.spin_orbit) is not bool:
            raise ValueError("an option of the magnetic layer has the wrong type")
        rate = made.learning_rate
        if type(rate) not in (int, float) or not 0 < rate < 1e6:
            raise ValueError(f"learning_rate of the magnetic layer is {short(rate)}")
        return made
