"""Force errors of a set of frames, element by element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from forcetune.reports.texts import ratio


@dataclass(frozen=True, slots=True)
class ElementErrors:
    """Force errors on the atoms of one element before and after training, meV/Å over all labelled components.

    Attributes:
        symbol: of the element.
        atoms: number of atoms with labels.
        mae_before, mae_after: mean absolute errors; None where there are no predictions.
        rmse_before, rmse_after: root mean square errors.
    """

    symbol: str
    atoms: int
    mae_before: float | None
    mae_after: float | None
    rmse_before: float | None
    rmse_after: float | None

    @property
    def ratio(self) -> float | None:
        """MAE after / before."""
        return ratio(self.mae_before, self.mae_after)


def force_errors_by_element(arrays: Mapping[str, NDArray], split: str) -> list[ElementErrors] | None:
    """Force errors by element, in order of atomic numbers; elements without labels are left out.

    Args:
        arrays: as from :func:`forcetune.runs.predictions.read_predictions`.
        split: name of the set of frames.

    Returns:
        None where there are no labels.
    """
    numbers, labels = arrays.get(f"{split}/forces_element"), arrays.get(f"{split}/reference/forces")
    if numbers is None or labels is None:
        return None
    predictions = [arrays.get(f"{split}/{when}/forces") for when in ("before", "after")]
    rows = []
    for element in np.unique(numbers):
        atoms = numbers == element
        labelled = np.isfinite(labels[atoms])
        if not labelled.any():
            continue
        errors = [None if p is None else 1e3 * (p[atoms] - labels[atoms])[labelled] for p in predictions]
        mae = [None if e is None else float(np.abs(e).mean()) for e in errors]
        rmse = [None if e is None else float(np.sqrt((e**2).mean())) for e in errors]
        symbol = chemical_symbols[element] if 0 <= element < len(chemical_symbols) else f"Z={element}"
        rows.append(ElementErrors(symbol, int(labelled.any(axis=1).sum()), *mae, *rmse))
    return rows
