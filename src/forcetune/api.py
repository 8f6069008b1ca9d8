"""Short ways through the layers, shared by the command line and Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers

from forcetune.adapters.attach import attach, detach
from forcetune.adapters.methods import METHODS, method, options_of
from forcetune.backbones.loading import load
from forcetune.backbones.protocol import Backbone
from forcetune.deployment.loading import deploy
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Errors, evaluate_frames
from forcetune.frames.read import AUTO, read_frames


def evaluate(
    model: str | Path | Backbone,
    data: str | Path | Sequence[str | Path],
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    energy_key: str = AUTO,
    forces_key: str = AUTO,
    stress_key: str = AUTO,
    head: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    trust: bool = False,
) -> Errors:
    """Errors of a model on labelled frames.

    Args:
        model: run folder, adapter folder, model name, model file or loaded backbone.
        data: files or patterns.
        adapter: adapter folder or run folder, when ``model`` is a base.
        base: the base, when ``model`` is a run or adapter whose base has moved.
        energy_key, forces_key, stress_key: as :func:`forcetune.frames.read.read_frames`.
        head, device, dtype, trust: as :func:`forcetune.deployment.calculator.calculator`.

    Raises:
        InputError: bad data, or nothing usable at a path.
    """
    frames = read_frames(
        data, energy_key=energy_key, forces_key=forces_key, stress_key=stress_key, name="evaluation data"
    ).frames
    if base is not None and adapter is None and isinstance(model, (str, Path)):
        model, adapter = base, model
    deployed = deploy(model, adapter, head=head, device=device, dtype=dtype, trust=trust)
    return evaluate_frames(deployed.backbone, frames).errors()


def compare_methods(
    model: str | Path | Backbone,
    *,
    elements: Sequence[str] | None = None,
    rank: int | None = None,
    head: str | None = None,
    trust: bool = False,
) -> list[dict[str, Any]]:
    """What each method would train: ``method, trainable, total, coverage``, one object per method.

    Args:
        model: name, path or loaded backbone; left as it was.
        elements: cut the element table to these symbols.
        rank: for the methods that have one.
        head, trust: as :func:`forcetune.load`.

    Raises:
        InputError: unknown model or element.
    """
    unknown = [symbol for symbol in elements or () if symbol not in atomic_numbers]
    if unknown:
        raise InputError(f"--elements: {unknown[0]!r} is no element; write symbols such as H,C,O.")
    numbers = [atomic_numbers[symbol] for symbol in elements] if elements else None
    backbone = load(model, head=head, elements=numbers, device="cpu", trust=trust)
    rows = []
    for name, make in METHODS.items():
        options: dict[str, Any] = {"rank": rank} if rank is not None and "rank" in options_of(make) else {}
        adapter = attach(backbone, method(name, **options))
        coverage = [asdict(row) for row in adapter.coverage()]
        total = sum(row["total"] for row in coverage)
        rows.append({"method": name, "trainable": adapter.trainable, "total": total, "coverage": coverage})
        detach(backbone)
    return rows
