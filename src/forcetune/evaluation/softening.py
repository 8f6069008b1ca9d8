"""Whether a model is too soft: how large its forces are beside those of the labels.

Potentials trained near equilibrium give too small forces away from it, and crystals too low phonon frequencies (Deng et
al., npj Comput. Mater. 11, 9, 2025). There the slope of predicted over reference forces says it, as here: least squares
through the origin over all components, a = Σ f f_ref / Σ f_ref²; below 1 the model is soft by 1 − a.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forcetune.evaluation.metrics import Predictions
from forcetune.evaluation.summaries import Softening
from forcetune.frames.frame import FloatArray, Frame

LARGE = 0.9
"""Quantile of the lengths of reference forces from which on they are large."""


def measure_softening(frames: Sequence[Frame], before: Predictions, after: Predictions) -> Softening | None:
    """Softening of a foundation model and of what it was tuned to.

    Args:
        frames: those of the predictions, of which the periodic ones count.
        before, after: predictions of both for the same frames, with labels.

    Returns:
        None where no periodic frame has forces that are not zero.
    """
    periodic = np.array([bool(frame.pbc.all()) for frame in frames], dtype=bool)
    atoms = np.repeat(periodic, before.atoms) & np.isfinite(before.forces_label).all(axis=1)
    lengths = np.linalg.norm(before.forces_label, axis=1)
    if not atoms.any() or not lengths[atoms].any():
        return None
    large = atoms & (lengths >= np.quantile(lengths[atoms], LARGE))
    frame_index = np.repeat(np.arange(len(before.atoms)), before.atoms)
    return Softening(
        len(np.unique(frame_index[atoms])),
        *(
            force_slope(predictions.forces[chosen], predictions.forces_label[chosen])
            for chosen in (atoms, large)
            for predictions in (before, after)
        ),
    )


def force_slope(forces: FloatArray, labels: FloatArray) -> float:
    """Σ f f_ref / Σ f_ref² of forces and labels of one shape, not all zero."""
    return float((forces * labels).sum() / (labels**2).sum())
