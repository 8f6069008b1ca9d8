"""What all sections of the configuration share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from forcetune.utils.parsing import read_number, short

LARGEST_SEED = 2**63 - 1


def as_word(value: Any) -> Any:
    """YAML 1.1 reads ``on`` and ``off`` as true and false; people mean the words."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def as_names(value: Any) -> Any:
    """Names separated by commas, as on the command line, are a list."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(as_names)]
Layer = Annotated[Literal["off", "spin", "magnitude"], BeforeValidator(as_word)]
Switch = Annotated[Literal["on", "off"], BeforeValidator(as_word)]
ThreeWaySwitch = Annotated[Literal["auto", "on", "off"], BeforeValidator(as_word)]


def check_numbers(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Wraps the check of an option: text counts as a number only where YAML 1.2 reads one.

    Raises:
        ValueError: it is a number to Python alone, such as ``1_000`` or ``infinity``.
    """
    result = validate(value)
    _check_text_of_numbers(value, result)
    return result


def _check_text_of_numbers(value: Any, result: Any) -> None:
    if isinstance(value, str) and isinstance(result, int | float) and not isinstance(result, bool):
        if read_number(value.strip()) is None:
            raise ValueError(f"{short(value)} is not a number; write it with digits, such as 1000, 0.001 or 1e-3")
    elif isinstance(value, dict) and isinstance(result, dict):
        for key in value.keys() & result.keys():
            _check_text_of_numbers(value[key], result[key])
    elif isinstance(value, list) and isinstance(result, list):
        for one, other in zip(value, result, strict=False):
            _check_text_of_numbers(one, other)


class Section(BaseModel):
    """A part of the configuration: immutable, no unknown keys, no infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    _numbers = field_validator("*", mode="wrap")(check_numbers)


def explain(error: ValidationError) -> str:
    """The first few problems in one line, each with its key."""
    problems = []
    for item in error.errors()[:3]:
        key = ".".join(
            str(part) for part in item["loc"] if not str(part).startswith(("list[", "literal[", "float", "int"))
        )
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "there is no such option"
        elif item["type"] == "missing":
            message = "is needed"
            if key == "data":
                key, message = "data.train", "name at least one file of training frames"
        value_text = (
            "" if item["type"] in ("missing", "extra_forbidden", "value_error") else f" (given: {short(item['input'])})"
        )
        problems.append(f"{key}: {message}{value_text}" if key else message)
    return "; ".join(problems) + "."
