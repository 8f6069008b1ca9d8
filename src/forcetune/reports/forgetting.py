"""The section of the report on what was forgotten."""

from __future__ import annotations

from forcetune.evaluation.summaries import Forgetting
from forcetune.reports.tables import Html, html, html_pairs, html_table, number_text

_MEANT = {
    "replay frames": "replay frames held out of the training",
    "molecules": "shaken small molecules of the data's elements (G2), of other compositions than the data",
    "shaken validation frames": "validation frames shaken by 0.2 Å",
}


def forgetting_section(found: Forgetting | None) -> Html:
    """Distance from the base, dimers and dynamics; nothing where they were not measured."""
    if found is None:
        return Html("")
    distance, stability = found.distance, found.stability
    if stability.failure is not None:
        told = f"broke down: {stability.failure}"
    else:
        told = (
            f"{stability.picoseconds:g} ps at constant energy: drift "
            f"{number_text(stability.drift_mev_per_atom_per_ps)} meV/atom/ps, fluctuation "
            f"{number_text(stability.fluctuation_mev_per_atom)} meV/atom"
        )
    facts = html_pairs(
        (
            ("Compared on", f"{distance.n_frames} {_MEANT.get(distance.source, distance.source)}"),
            ("Energies moved by", f"{number_text(distance.energy_mev_per_atom)} meV/atom"),
            ("Forces moved by", f"{number_text(distance.forces_mev_per_ang)} meV/Å"),
            ("Dynamics", told),
        )
    )
    rows = [
        (
            dimer.pair,
            f"{dimer.closest_ang:.2f}",
            number_text(dimer.base_wall_ev),
            number_text(dimer.tuned_wall_ev),
            *("repels" if hole is None else f"{hole:.2f}" for hole in (dimer.base_hole_ang, dimer.tuned_hole_ang)),
            "" if dimer.tuned_barrier_ev is None else number_text(dimer.tuned_barrier_ev),
        )
        for dimer in found.dimers
    ]
    head = ("Pair", "Closest, Å", "Base, eV", "Tuned, eV", "Base attracts below, Å", "Tuned, Å", "Barrier, eV")
    note = (
        "Mean absolute differences between the tuned model and its base where it was not tuned, reference energies "
        "taken out. A new level of theory moves these predictions, too: this is a distance, not an error. Dimers: "
        "energy at the closest distance relative to 1.2 times the sum of covalent radii."
    )
    return Html(f'{facts}<h3>Two atoms near to each other</h3>{html_table(head, rows)}<p class="note">{html(note)}</p>')
