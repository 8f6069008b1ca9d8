"""Phonon frequencies of a crystal in the report."""

from __future__ import annotations

from typing import Any

from forcetune.evaluation.summaries import Phonons
from forcetune.reports.plots import densities_of_states


def describe_phonons(phonons: Phonons | None) -> dict[str, Any] | None:
    """Frequencies and densities of states of base and tuned model for ``run.html``; None where there are none."""
    if phonons is None:
        return None
    rows = [
        (name, *(_thz(value) for value in (one.mean_thz, one.highest_thz, one.lowest_thz)), f"{one.imaginary:.1%}")
        if one.failure is None
        else (name, one.failure, "", "", "")
        for name, one in (("Base", phonons.base), ("Tuned", phonons.tuned))
    ]
    image = densities_of_states(phonons) if phonons.edges_thz else None
    return {"crystal": phonons.crystal, "atoms": phonons.supercell_atoms, "rows": rows, "image": image}


def _thz(value: float | None) -> str:
    # acoustic modes at Γ are zero but for rounding, whose sign means nothing
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
