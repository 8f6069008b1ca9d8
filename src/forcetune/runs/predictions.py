"""``predictions.npz``: labels and predictions of every split, written by a run and read for its report.

Arrays have the names ``{split}/{before|after|reference}/{quantity}`` and ``{split}/forces_element``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from forcetune.runs.results import damaged
from forcetune.utils.files import atomic_path
from forcetune.utils.parsing import check_archive

if TYPE_CHECKING:
    from forcetune.evaluation.metrics import Predictions

PREDICTIONS_NAME = "predictions.npz"


def save_predictions(path: Path, before: Mapping[str, Predictions], after: Mapping[str, Predictions]) -> None:
    """Write predictions and labels of every split, compressed: ``{split}/{before|after|reference}/{quantity}``."""
    arrays: dict[str, np.ndarray] = {}
    for when, by_split in (("before", before), ("after", after)):
        for name, predictions in by_split.items():
            arrays[f"{name}/{when}/energy_per_atom"] = predictions.energy / predictions.atoms
            arrays[f"{name}/{when}/forces"] = predictions.forces
            arrays[f"{name}/reference/energy_per_atom"] = predictions.energy_label / predictions.atoms
            arrays[f"{name}/reference/forces"] = predictions.forces_label
            arrays[f"{name}/forces_element"] = predictions.numbers
            if predictions.stress is not None and predictions.stress_label is not None:
                arrays[f"{name}/{when}/stress"] = predictions.stress
                arrays[f"{name}/reference/stress"] = predictions.stress_label
            if predictions.moments is not None and predictions.moments_label is not None:
                arrays[f"{name}/{when}/moments"] = predictions.moments
                arrays[f"{name}/reference/moments"] = predictions.moments_label
            if predictions.magforces is not None and predictions.magforces_label is not None:
                arrays[f"{name}/{when}/magforces"] = predictions.magforces
                arrays[f"{name}/reference/magforces"] = predictions.magforces_label
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # pyright: ignore[reportArgumentType]


def read_predictions(path: Path) -> dict[str, NDArray] | None:
    """Read ``predictions.npz``; None when it is absent.

    Raises:
        InputError: no NPZ file, or arrays of a set that do not fit together.
    """
    if not path.exists():
        return None
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:
        # whatever zlib, zipfile and NumPy's reader of headers raise for damaged bytes, MemoryError included
        raise damaged(path, "it is not a complete NPZ file") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise damaged(path, f"{name} has no numbers")
        split, _, rest = name.partition("/")
        source, _, quantity = rest.partition("/")
        reference = arrays.get(f"{split}/reference/{quantity}")
        if source in ("before", "after") and reference is not None and array.shape != reference.shape:
            raise damaged(path, f"{name} has shape {array.shape}, its reference {reference.shape}")
        forces = arrays.get(f"{split}/reference/forces")
        if rest == "forces_element" and forces is not None and array.shape != forces.shape[:1]:
            raise damaged(path, f"{name} has shape {array.shape} for {len(forces)} atoms")
    return arrays
