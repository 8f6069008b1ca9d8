"""Options that several commands share; their descriptions and defaults stand in the configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from forcetune import config as configuration
from forcetune.errors import InputError
from forcetune.utils.parsing import read_number


def about(section: type[BaseModel], field: str, *, default: bool = True) -> str:
    """Description and default of an option, which stand in the configuration; not if the command has its own."""
    option = section.model_fields[field]
    description = option.description or ""
    if not default or option.is_required() or option.default in (None, [], False):
        return description
    return f"{description} Default: {option.default}."


Model = Annotated[str, typer.Option("--model", help=about(configuration.ModelConfig, "model"))]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Trust = Annotated[bool, typer.Option("--trust", help=about(configuration.ModelConfig, "trust"))]
Head = Annotated[str | None, typer.Option("--head", help=about(configuration.ModelConfig, "head"))]
Device = Annotated[str | None, typer.Option("--device", help=about(configuration.ModelConfig, "device"))]
Dtype = Annotated[str | None, typer.Option("--dtype", help=about(configuration.ModelConfig, "dtype"))]
UntrainedHead = Annotated[
    str | None,
    typer.Option("--head", help="Head, or modality, of a model that has several; an adapter knows that of its base."),
]
PredictionDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Precision to predict in, float64 or float32; by default that of the training, or float64 without an "
        "adapter.",
    ),
]
MergedDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Precision of the written model, float64 or float32; by default that of the base's own file."
    ),
]
ExportedDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Precision of what is written, float64 or float32; by default that of the training, or float64 without "
        "an adapter.",
    ),
]
EnergyKey = Annotated[str | None, typer.Option("--energy-key", help=about(configuration.DataConfig, "energy_key"))]
ForcesKey = Annotated[str | None, typer.Option("--forces-key", help=about(configuration.DataConfig, "forces_key"))]
StressKey = Annotated[str | None, typer.Option("--stress-key", help=about(configuration.DataConfig, "stress_key"))]
MomentsKey = Annotated[str | None, typer.Option("--moments-key", help=about(configuration.DataConfig, "moments_key"))]
MagforcesKey = Annotated[
    str | None, typer.Option("--magforces-key", help=about(configuration.DataConfig, "magforces_key"))
]
HessianKey = Annotated[str | None, typer.Option("--hessian-key", help=about(configuration.DataConfig, "hessian_key"))]
TypeMap = Annotated[str | None, typer.Option("--type-map", help=about(configuration.DataConfig, "type_map"))]
SpinsKey = Annotated[str | None, typer.Option("--spins-key", help=about(configuration.DataConfig, "spins_key"))]
Rank = Annotated[int | None, typer.Option(help="Rank of the updates of methods that have one (method.rank).")]
Epochs = Annotated[int | None, typer.Option(help=about(configuration.TrainingConfig, "epochs", default=False))]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any option: section.key=value.")]


def read_valid(texts: Sequence[str] | None) -> list[str] | float | int | None:
    """Files, or a single number."""
    if not texts:
        return None
    if len(texts) == 1:
        number = read_number(texts[0])
        if number is not None:
            return number
    return list(texts)


def data_options(
    train: Sequence[str] | None,
    valid: Sequence[str] | None,
    test: Sequence[str] | None,
    *,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    type_map: str | None = None,
) -> dict[str, Any]:
    """The section ``data`` of a configuration, from the options of a command that trains; None is not set."""
    return {
        "train": train or None,
        "valid": read_valid(valid),
        "test": test or None,
        "energy_key": energy_key,
        "forces_key": forces_key,
        "stress_key": stress_key,
        "type_map": type_map,
    }


def finite(value: float | None) -> float | None:
    """Callback of options that are numbers.

    Raises:
        typer.BadParameter: an infinite number, or none.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def read_sizes(text: str | None) -> list[int]:
    """Whole numbers that are separated by commas.

    Raises:
        InputError: something else.
    """
    try:
        return [int(part) for part in split_names(text)]
    except ValueError as error:
        raise InputError(f"--learning-curve {text}: write numbers of frames such as 10,20,50,100.") from error


def split_names(text: str | None) -> list[str]:
    """Names that are separated by commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def without_none(**options: Any) -> dict[str, Any]:
    """Options that were set; the others keep the defaults of what they are passed to."""
    return {name: value for name, value in options.items() if value is not None}
