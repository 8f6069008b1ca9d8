"""``adapter_config.json``: what it holds, and reading it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from ase.data import atomic_numbers, chemical_symbols
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from forcetune.adapters.hub import CONFIG_NAME
from forcetune.adapters.methods import Method
from forcetune.errors import InputError

FORMAT_VERSION = 1
UNITS = {"energy": "eV", "length": "Å", "forces": "eV/Å", "stress": "eV/Å³"}
LARGEST_CONFIG = 16 * 2**20
"""Bytes."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseRecord(_Record):
    """The foundation model an adapter belongs to.

    ``elements`` and ``head`` say how it was cut; ``parameters`` counts its weights after the cut.
    """

    name: str
    library: str
    sha256: str
    fingerprint: str
    licence: str
    head: str
    elements: list[str]
    cutoff_ang: float
    parameters: int


class MemberRecord(_Record):
    """One of several adapters in one folder; they act in the order of their records."""

    name: str
    method: dict[str, Any]
    scale: float


class AdapterConfig(_Record):
    """Content of ``adapter_config.json``; only combinations have the field of that name."""

    format_version: int
    forcetune: str
    base: BaseRecord
    method: dict[str, Any]
    reference_energies_ev: dict[str, float]
    units: dict[str, str] = Field(default=UNITS)
    dtype: Literal["float64", "float32"]
    stored_dtype: Literal["float64", "float32"]
    trainable: int
    training_data_sha256: str | None = None
    metrics: dict[str, Any] = Field(default={})
    combination: tuple[MemberRecord, ...] | None = None

    @property
    def methods(self) -> list[Method]:
        """The method, or those of a combination's adapters.

        Raises:
            InputError: one of them cannot be read.
        """
        if self.combination is None:
            return [Method.from_json(self.method)]
        return [Method.from_json(member.method) for member in self.combination]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Atomic numbers of the elements the base was cut to."""
        return tuple(atomic_numbers[symbol] for symbol in self.base.elements)


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Raises:
        InputError: there is none, it is damaged, or a newer forcetune wrote it.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise InputError(f"{path}: larger than any adapter configuration; this is no adapter folder.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: holds no {CONFIG_NAME}; give the adapter folder or the run folder around it."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy the adapter folder again.") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {version!r}, this forcetune reads {FORMAT_VERSION}; update forcetune."
        )
    try:
        config = AdapterConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {where}: {first['msg']}; copy the adapter folder again.") from error
    if not all(map(math.isfinite, config.reference_energies_ev.values())):
        raise InputError(f"{path}: a reference energy is not finite; copy the adapter folder again.")
    unknown = {*config.base.elements, *config.reference_energies_ev} - set(chemical_symbols[1:])
    if unknown:
        raise InputError(f"{path}: {sorted(unknown)} are no elements; copy the adapter folder again.")
    return config
