"""What an update is: a small specification that builds the trainable part of one site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from forcetune.backbones.protocol import Site, WeightPath

OUT: Literal["out"] = "out"
Axis = Literal["out", "last"]
"""Which axis of a weight holds the channels that a factor or norm belongs to: that of the outputs, or the last one,
which has the inputs where a weight is stored transposed. Adapters of earlier versions took the last one."""


def check_axis(axis: Axis) -> None:
    """
    Raises:
        ValueError: there is no such axis.
    """
    if axis not in get_args(Axis):
        raise ValueError(f"unknown axis {axis!r}")


def channel_axis(path: WeightPath, axis: Axis) -> int:
    """The axis of a path's shape that ``axis`` means."""
    return path.output_axis if axis == OUT else len(path.shape) - 1


@dataclass(frozen=True, slots=True)
class ParameterOptions:
    """How one parameter is trained differently from the others.

    Attributes:
        rate: learning rate in units of the run's.
        decay: decoupled weight decay; None for that of the run, on sites of every kind.
        learning_rate: at the beginning, whatever the run's is; instead of ``rate``.
    """

    rate: float = 1.0
    decay: float | None = 0.0
    learning_rate: float | None = None


class TrainablePart(nn.Module, ABC):
    """What an update trains at one site.

    Attributes:
        update_name: of the update that it was built by; empty where it was built by none.
    """

    update_name: str = ""

    def options(self) -> dict[str, ParameterOptions]:
        """Parameters, by name, that have a learning rate and decay of their own."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """The trainable tensors under names that do not depend on the library's layout of the weight.

        They share memory with the parameters.
        """
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def packed(self) -> dict[str, Tensor]:
        """What a file keeps of it, by name; the names are always the same."""
        return self.tensors()

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`packed` gave.

        Raises:
            ValueError: a tensor has the wrong shape or type.
        """
        for name, target in self.tensors().items():
            self._copy(name, target, tensors[name])

    @staticmethod
    def _copy(name: str, target: Tensor, value: Tensor) -> None:
        if value.shape != target.shape or not value.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and type {value.dtype}, expected numbers of shape "
                f"{tuple(target.shape)}"
            )
        target.copy_(value)


class WeightUpdate(TrainablePart):
    """The trainable part of a weight update: maps the frozen weight W to the effective weight W'.

    Weight updates merge exactly: the merged model's weight is W'.
    """

    @abstractmethod
    def forward(self, weight: Tensor) -> Tensor:
        """W' with the shape of ``weight``."""


class ActivationUpdate(TrainablePart):
    """The trainable part of an activation update: changes what the site's module puts out.

    No weight can absorb it: it does not merge.
    """

    @property
    def reads_species(self) -> bool:
        """Whether :meth:`forward` wants the species, (atoms, elements) one-hot, as a third argument."""
        return False

    @abstractmethod
    def forward(self, inputs: Tensor, outputs: Tensor, species: Tensor | None = None) -> Tensor:
        """The new output, with the shape of ``outputs``."""


@dataclass(frozen=True)
class Update(ABC):
    """What a method does at a site: hyper-parameters only, no tensors. One subclass per file."""

    name: ClassVar[str]
    mergeable: ClassVar[bool] = True
    equivariant: ClassVar[bool] = True

    def unsupported_reason(self, site: Site) -> str | None:
        """Why this update leaves ``site`` alone, or None if it applies."""
        return None

    @abstractmethod
    def build(self, site: Site, weight: Tensor) -> WeightUpdate | ActivationUpdate | None:
        """The trainable part for ``site``, in the dtype and on the device of ``weight``; None for none."""

    @classmethod
    def earlier_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options of an adapter file, which may be of an earlier version and lack some, as that version meant them."""
        return options

    def describe(self) -> str:
        """Name and hyper-parameters, as in a table."""
        given = ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in asdict(self).items()
            if (key, value) != ("axis", OUT)  # the other axis is an exception, and told
        )
        return f"{self.name}({given})" if given else self.name

    def to_json(self) -> dict[str, Any]:
        return {"update": self.name, **asdict(self)}
