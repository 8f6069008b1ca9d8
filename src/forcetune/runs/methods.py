"""What each method would train of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers

from forcetune.adapters.attach import attach, detach
from forcetune.adapters.methods import METHODS, method, option_names
from forcetune.backbones.loading import load
from forcetune.backbones.protocol import Backbone
from forcetune.errors import InputError


def compare_methods(
    model: str | Path | Backbone,
    *,
    elements: Sequence[str] | None = None,
    rank: int | None = None,
    head: str | None = None,
    trust: bool = False,
) -> list[dict[str, Any]]:
    """What each method would train: ``method, trainable, total, coverage``, one object per method.

    Methods that have nothing to train in this model are left out (``modality`` in one without modalities).

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
        raise InputError(f"--elements: {unknown[0]!r} is not an element symbol; write symbols such as H,C,O.")
    numbers = [atomic_numbers[symbol] for symbol in elements] if elements else None
    backbone = load(model, head=head, elements=numbers, device="cpu", trust=trust)
    rows = []
    for name, make in METHODS.items():
        options: dict[str, Any] = {"rank": rank} if rank is not None and "rank" in option_names(make) else {}
        chosen = method(name, **options)
        if not chosen.reaches(backbone.sites()):
            continue
        adapter = attach(backbone, chosen)
        coverage = [asdict(row) for row in adapter.coverage()]
        total = sum(row["total"] for row in coverage)
        rows.append({"method": name, "trainable": adapter.trainable, "total": total, "coverage": coverage})
        detach(backbone)
    return rows
