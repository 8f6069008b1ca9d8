"""What a magnetic layer is, without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict, ValidationError
from torch import nn

from forcetune.config import MagnetismConfig, explain
from forcetune.frames.spins import DIRECTIONS
from forcetune.magnetism.layer import MagnitudeLayer, SpinLayer


class Magnetism(MagnetismConfig):
    """A magnetic layer; its hyper-parameters are the options of the configuration, all of them resolved.

    Attributes:
        layer: ``spin`` has moments as vectors and their energy; ``magnitude`` predicts |μ| and adds no energy.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    layer: Literal["spin", "magnitude"] = "spin"  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def takes_directions(self) -> bool:
        """Whether the length of a spin that it is given makes no difference."""
        return self.inputs in DIRECTIONS

    def build(self, n_scalars: int, cutoff: float, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The layer for a backbone with so many invariant node features and this cutoff, Å."""
        if self.layer == "magnitude":
            module: nn.Module = MagnitudeLayer(n_scalars, self.channels)
        else:
            module = SpinLayer(n_scalars, cutoff, self.channels, self.radial, self.spin_orbit)
        return module.to(dtype=dtype, device=device)

    def describe(self) -> str:
        """As in a table."""
        if self.layer == "magnitude":
            return f"magnitudes of moments (channels={self.channels})"
        return f"spin layer (channels={self.channels}, {'with' if self.spin_orbit else 'without'} spin–orbit terms)"

    def to_json(self) -> dict[str, Any]:
        """All hyper-parameters, as an adapter file holds them."""
        return self.model_dump()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: an option this version does not know, or of the wrong type or size.
        """
        try:
            return cls.model_validate(data, strict=True)
        except ValidationError as error:
            raise ValueError(f"its magnetic layer: {explain(error).removesuffix('.')}") from error
