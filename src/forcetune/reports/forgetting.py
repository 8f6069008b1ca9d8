"""What the report says about what was forgotten."""

from __future__ import annotations

from typing import Any

from forcetune.evaluation.summaries import Dimer, Forgetting, Stability
from forcetune.reports.texts import number_text

_SOURCES = {
    "replay frames": "replay frames held out of the training",
    "molecules": "shaken small molecules of the data's elements (G2), of other compositions than the data",
    "shaken validation frames": "validation frames shaken by 0.2 Å",
}


def describe_forgetting(forgetting: Forgetting | None) -> dict[str, Any] | None:
    """``facts`` and rows of ``dimers`` for ``forgetting.html``; None where nothing was measured."""
    if forgetting is None:
        return None
    distance = forgetting.distance
    return {
        "facts": [
            ("Compared on", f"{distance.n_frames} {_SOURCES.get(distance.source, distance.source)}"),
            ("Energies moved by", f"{number_text(distance.energy_mev_per_atom)} meV/atom"),
            ("Forces moved by", f"{number_text(distance.forces_mev_per_ang)} meV/Å"),
            ("Dynamics", _stability_text(forgetting.stability)),
        ],
        "dimers": [_dimer_row(dimer) for dimer in forgetting.dimers],
    }


def _stability_text(stability: Stability) -> str:
    if stability.failure is not None:
        return f"broke down: {stability.failure}"
    return (
        f"{stability.picoseconds:g} ps at constant energy: drift "
        f"{number_text(stability.drift_mev_per_atom_per_ps)} meV/atom/ps, fluctuation "
        f"{number_text(stability.fluctuation_mev_per_atom)} meV/atom"
    )


def _dimer_row(dimer: Dimer) -> tuple[str, ...]:
    return (
        dimer.pair,
        f"{dimer.closest_ang:.2f}",
        number_text(dimer.base_wall_ev),
        number_text(dimer.tuned_wall_ev),
        *("repels" if hole is None else f"{hole:.2f}" for hole in (dimer.base_hole_ang, dimer.tuned_hole_ang)),
        "" if dimer.tuned_barrier_ev is None else number_text(dimer.tuned_barrier_ev),
    )
