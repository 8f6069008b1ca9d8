"""Errors of a run in the tables of mace's ``--error_table``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

_COLUMNS = {
    "PerAtomRMSE": ("energy_rmse_mev_per_atom", "forces_rmse_mev_per_ang", None),
    "TotalRMSE": ("energy_rmse_mev", "forces_rmse_mev_per_ang", None),
    "PerAtomRMSEstressvirials": (
        "energy_rmse_mev_per_atom",
        "forces_rmse_mev_per_ang",
        "stress_rmse_mev_per_ang3",
    ),
    "PerAtomMAE": ("energy_mae_mev_per_atom", "forces_mae_mev_per_ang", None),
    "TotalMAE": ("energy_mae_mev", "forces_mae_mev_per_ang", None),
    "PerAtomMAEstressvirials": ("energy_mae_mev_per_atom", "forces_mae_mev_per_ang", "stress_mae_mev_per_ang3"),
}


def table_in_mace_form(
    kind: str, errors: Mapping[str, Mapping[str, Mapping[str, Any]]], labels: Mapping[str, NDArray] | None
) -> Table:
    """Errors after training of every split.

    Args:
        kind: name of the table in mace.
        errors: split → ``after`` → errors, as in ``results.json``.
        labels: arrays of ``predictions.npz``, for forces errors relative to the forces; None where there are none.
    """
    energy, forces, stress = _COLUMNS[kind]
    measure = "RMSE" if "RMSE" in kind else "MAE"
    unit = "meV/atom" if "per_atom" in energy else "meV"
    table = Table(title=kind, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("set")
    headings = [f"{measure} E, {unit}", f"{measure} F, meV/Å", f"relative F {measure}, %"]
    for heading in [*headings, *([f"{measure} stress, meV/Å³"] if stress else [])]:
        table.add_column(heading, justify="right")
    for split, both in errors.items():
        after = both["after"]
        cells = [after.get(energy), after.get(forces), _relative(measure, split, after.get(forces), labels)]
        cells += [after.get(stress)] if stress else []
        table.add_row(split, *("–" if value is None else f"{value:.2f}" for value in cells))
    return table


def _relative(measure: str, split: str, error: float | None, labels: Mapping[str, NDArray] | None) -> float | None:
    """Percent of the mean absolute, or root mean square, force component."""
    forces = None if labels is None else labels.get(f"{split}/reference/forces")
    if error is None or forces is None or not np.isfinite(forces).any():
        return None
    size = np.nanmean(np.abs(forces)) if measure == "MAE" else np.sqrt(np.nanmean(np.square(forces)))
    return None if size == 0 else float(0.1 * error / size)
