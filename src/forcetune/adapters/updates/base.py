"""What an update is: a small specification that builds the trainable part of one site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor, nn

from forcetune.backbones.protocol import Site, WeightPath
from forcetune.config import LARGEST_RANK, explain

OPTION_RULES = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
"""How options of updates and methods are checked: unknown names and values that are not finite are refused."""
Rank = Annotated[int, Field(ge=1, le=LARGEST_RANK)]

OUT: Literal["out"] = "out"
Axis = Literal["out", "last"]
"""Which axis of a weight holds the channels that a factor or norm belongs to: that of the outputs, or the last one,
which has the inputs where a weight is stored transposed. Adapters of earlier versions took the last one."""


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
        shrink: the factor that decay alone shall have brought the parameter to at the end of the run; instead of
            ``decay``, which follows from it and the number of steps.
    """

    rate: float = 1.0
    decay: float | None = 0.0
    learning_rate: float | None = None
    shrink: float | None = None


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

    Attributes:
        weight_shaped: names of the parameters that have the layout of W, path by path.
        elementwise: names of those whose entries an optimizer may not mix with each other.
    """

    weight_shaped: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[tuple[str, ...]] = ()

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


def check_options(update: type[Update], options: Mapping[str, Any]) -> None:
    """Check options against the annotations of an update's fields.

    Raises:
        ValueError: an option is unknown, has the wrong type or lies out of range.
    """
    try:
        _options_model(update).model_validate(options, strict=True)
    except ValidationError as error:
        raise ValueError(f"{update.name}: {explain(error).removesuffix('.')}") from error


@cache
def _options_model(update: type[Update]) -> type[BaseModel]:
    """What checks the options of an update; all have defaults."""
    annotations = get_type_hints(update, include_extras=True)
    options: dict[str, Any] = {field.name: (annotations[field.name], None) for field in fields(update)}
    return create_model(f"{update.__name__}Options", __config__=OPTION_RULES, **options)


@dataclass(frozen=True)
class Update(ABC):
    """What a method does at a site: hyper-parameters only, no tensors. One subclass per file.

    The fields are the update's options in YAML, on the command line and in Python, where their annotations check them
    in the same way. What an option means stands in the docstring of the subclass.

    Attributes:
        name: in tables and files.
        mergeable: whether the weights can absorb it.
        equivariant: whether it keeps rotational symmetry.
        internal: fields that are set by a method or by the files of earlier versions, and are no options of a user.
    """

    name: ClassVar[str]
    mergeable: ClassVar[bool] = True
    equivariant: ClassVar[bool] = True
    internal: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: an option has the wrong type or lies out of range.
        """
        check_options(type(self), {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """The update with these options.

        Raises:
            ValueError: an option is unknown, has the wrong type or lies out of range.
        """
        check_options(cls, options)
        return cls(**options)

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the options that a user may set."""
        return [field.name for field in fields(cls) if field.name not in cls.internal]

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
        options = ", ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in asdict(self).items()
            if (key, value) != ("axis", OUT)  # the other axis is an exception, and shown
        )
        return f"{self.name}({options})" if options else self.name

    def to_json(self) -> dict[str, Any]:
        return {"update": self.name, **asdict(self)}
