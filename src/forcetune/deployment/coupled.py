"""The ASE calculator that a simulation program asks for one structure at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ase.calculators.calculator import Calculator

from forcetune.backbones.protocol import Backbone
from forcetune.deployment.calculator import ForcetuneCalculator, calculator
from forcetune.deployment.watch import WatchedCalculator
from forcetune.errors import InputError


def coupled_calculator(
    program: str,
    model: str | Path | Backbone | Calculator | None,
    adapter: str | Path | Sequence[str | Path] | None,
    options: Mapping[str, Any],
) -> Calculator:
    """The calculator itself, or that of a model.

    Args:
        program: as it is known.
        model, adapter, options: as :func:`forcetune.calculator`, or a calculator alone.

    Raises:
        InputError: a calculator with an adapter or options, a model with a spin layer, whose magnetic state the
            program does not know, or as :func:`forcetune.calculator`.
    """
    if isinstance(model, Calculator):
        if adapter is not None or options:
            raise InputError("give a calculator alone, or a model with its adapter and options.")
        coupled = model
    else:
        coupled = calculator(model, adapter, **options)
    inner = coupled.inner if isinstance(coupled, WatchedCalculator) else coupled
    if isinstance(inner, ForcetuneCalculator) and inner.magnetism is not None and inner.magnetism.layer == "spin":
        raise InputError(
            f"this model has a spin layer, and {program} passes no magnetic moments to it; run it in ASE "
            "(forcetune.calculator)."
        )
    return coupled
