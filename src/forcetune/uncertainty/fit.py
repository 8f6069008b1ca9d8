"""The covariance of a tuned model from its training frames, its regularisation and scale from validation frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from forcetune.backbones.protocol import Backbone
from forcetune.evaluation.metrics import Predictions
from forcetune.frames.frame import FloatArray
from forcetune.graphs.graph import Batch
from forcetune.uncertainty.calibration import (
    Calibration,
    calibrate_all,
    collect_deviations,
    log_likelihood,
)
from forcetune.uncertainty.last_layer import Posterior, compute_training_gram, join_predictions, predict_with_features

RIDGES = tuple(10.0**power for power in range(-10, 1))
"""ς² in units of the mean eigenvalue of GᵀG, of which the likeliest is taken."""
CHOSEN_BY = ("energy_per_atom", "forces")


@dataclass(frozen=True, slots=True, eq=False)
class LastLayerFit:
    """The result of :func:`fit_last_layer`.

    Attributes:
        posterior: with the regularisation that suits the validation frames best.
        relative_ridge: ς² over the mean eigenvalue of GᵀG.
        calibrations: by quantity.
    """

    posterior: Posterior
    relative_ridge: float
    calibrations: dict[str, Calibration]


def fit_last_layer(
    backbone: Backbone,
    train: Sequence[Batch],
    valid: Sequence[Batch],
    *,
    progress: Callable[[int], None] | None = None,
) -> LastLayerFit:
    """Covariance from training frames; ς² by the likelihood of the validation errors, α for each ς² in closed form.

    Args:
        backbone: the tuned model.
        train, valid: graphs with labels.
        progress: called with the number of frames done.

    Raises:
        InputError: no labels, or a model whose last layer is not known.
    """
    posterior = Posterior.from_gram(compute_training_gram(backbone, train, progress=progress), 0.0)
    unit = float(posterior.eigenvalues.mean())
    inverses = 1 / (posterior.eigenvalues[:, None] + unit * np.array(RIDGES))
    predictions, energy, forces = _candidate_deviations(backbone, valid, posterior, inverses, progress)
    likelihoods = []
    for candidate in range(len(RIDGES)):
        measured = collect_deviations(predictions, energy[candidate], forces[candidate])
        terms = [measured[name] for name in CHOSEN_BY if np.isfinite(measured[name].errors).any()]
        likelihoods.append(sum(log_likelihood(term.errors, term.deviations) for term in terms))
    best = int(np.argmax(likelihoods))
    calibrations = calibrate_all(collect_deviations(predictions, energy[best], forces[best]))
    return LastLayerFit(posterior.with_ridge(unit * RIDGES[best]), RIDGES[best], calibrations)


def _candidate_deviations(
    backbone: Backbone,
    graphs: Sequence[Batch],
    posterior: Posterior,
    inverses: FloatArray,
    progress: Callable[[int], None] | None,
) -> tuple[Predictions, FloatArray, FloatArray]:
    """Predictions, and standard deviations for each candidate: (candidates, frames), (candidates, atoms, 3)."""
    predictions, energies, forces = [], [], []
    for batch in predict_with_features(backbone, graphs, posterior.eigenvectors.T, progress=progress):
        predictions.append(batch.predictions)
        energies.append(np.sqrt((batch.features @ posterior.eigenvectors) ** 2 @ inverses).T)
        assert batch.force_features is not None
        forces.append(np.sqrt(np.tensordot(inverses.T, batch.force_features**2, axes=1)))
    return join_predictions(predictions), np.concatenate(energies, axis=1), np.concatenate(forces, axis=1)
