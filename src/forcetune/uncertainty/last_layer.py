"""The covariance of the last layer (LLPR; Bigi et al., Mach. Learn.: Sci. Technol. 5, 045018, 2024).

σ² = α² gᵀ (GᵀG + ς² I)⁻¹ g, where g holds the derivatives of a prediction by the weights of the last linear layers:
their inputs, summed over the atoms of a frame, for its energy, and the derivatives of these sums by a position for a
force. Rows of G are those of energies (per atom) and forces of the training frames, each divided by the noise of its
label, here the root mean square error on the training frames, so that α = 1 is the Laplace approximation of a Bayesian
last layer. All of it is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forcetune.backbones.network import NetworkBackbone, ReadoutFeatures
from forcetune.backbones.protocol import Backbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import EVALUATION_ATOMS, Predictions, evaluation_batches, gather
from forcetune.frames.frame import FloatArray
from forcetune.graphs.graph import Batch


def require_network(backbone: Backbone) -> NetworkBackbone:
    """The backbone as one whose last layers are known.

    Raises:
        InputError: a library computes it, or it carries an extension.
    """
    if not isinstance(backbone, NetworkBackbone) or not hasattr(backbone.model, "last_layers"):
        raise InputError(
            f"{backbone.base.name} is computed by its library (--trust), whose last layer forcetune does not see; use "
            "an ensemble of runs (`--ensemble`)."
        )
    if backbone.extension is not None:
        raise InputError(
            f"{backbone.base.name} carries a spin layer, whose energy has a readout of its own; use an ensemble of "
            "runs (`--ensemble`)."
        )
    return backbone


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """Eigenvalues and eigenvectors of GᵀG with the regularisation ς².

    Attributes:
        eigenvalues: (features,).
        eigenvectors: (features, features), one in each column.
        ridge: ς².
    """

    eigenvalues: FloatArray
    eigenvectors: FloatArray
    ridge: float

    @staticmethod
    def from_gram(gram: FloatArray, ridge: float) -> Posterior:
        """From GᵀG, (features, features)."""
        values, vectors = np.linalg.eigh((gram + gram.T) / 2)
        return Posterior(values.clip(min=0), vectors, ridge)

    @property
    def whitening(self) -> FloatArray:
        """(features, features) W with gᵀ (GᵀG + ς² I)⁻¹ g = |W g|²."""
        return (self.eigenvectors / np.sqrt(self.eigenvalues + self.ridge)).T

    def with_ridge(self, ridge: float) -> Posterior:
        """The same GᵀG with another ς²."""
        return Posterior(self.eigenvalues, self.eigenvectors, ridge)

    def variance(self, features: FloatArray) -> FloatArray:
        """gᵀ (GᵀG + ς² I)⁻¹ g of (…, features)."""
        return ((features @ self.whitening.T) ** 2).sum(axis=-1)


@dataclass(frozen=True, slots=True, eq=False)
class FeaturedPredictions:
    """Predictions for frames with the features that they depend on.

    Attributes:
        predictions: with labels.
        features: (frames, features) of the energies.
        force_features: (directions, atoms, 3); None without directions.
    """

    predictions: Predictions
    features: FloatArray
    force_features: FloatArray | None


def predict_with_features(
    backbone: Backbone,
    graphs: Sequence[Batch],
    directions: FloatArray | None = None,
    *,
    atoms: int = EVALUATION_ATOMS,
    progress: Callable[[int], None] | None = None,
) -> Iterator[FeaturedPredictions]:
    """Predictions and features batch by batch, which is all that is in memory.

    Args:
        backbone: the model.
        graphs: one for each frame.
        directions: (directions, features) along which force features are wanted.
        atoms: of a batch.
        progress: called with the number of frames done.
    """
    network = require_network(backbone)
    along = None if directions is None else torch.from_numpy(directions)
    for batch in evaluation_batches(graphs, atoms=atoms):
        placed = network.place(batch)
        prediction = network.predict(placed, stress=False).detached()
        features: ReadoutFeatures = network.readout_features(placed, along)
        yield FeaturedPredictions(
            Predictions.of(*gather([(batch, prediction)])),
            features.graphs.cpu().numpy(),
            None if features.gradients is None else features.gradients.cpu().numpy(),
        )
        if progress is not None:
            progress(batch.n_graphs)


def count_features(backbone: Backbone, graph: Batch) -> int:
    """Number of weights of the last layers, by which a prediction has derivatives."""
    network = require_network(backbone)
    return network.readout_features(network.place(graph)).graphs.shape[1]


@dataclass(slots=True)
class GramSum:
    """Σ g gᵀ over labelled rows, and the squared errors of the labels.

    Attributes:
        gram: (features, features); energies are per atom.
        squares, count: of the errors, eV² or eV²/Å².
    """

    gram: FloatArray
    squares: float = 0.0
    count: int = 0

    def add(self, rows: FloatArray, errors: FloatArray) -> None:
        """Rows (n, features) with their errors (n,); NaN where there is no label."""
        known = np.isfinite(errors)
        self.gram += rows[known].T @ rows[known]
        self.squares += float((errors[known] ** 2).sum())
        self.count += int(known.sum())

    @property
    def noise(self) -> float:
        """Root mean square error; 1 where nothing has a label or there is no error."""
        return float(np.sqrt(self.squares / self.count)) if self.count and self.squares > 0 else 1.0

    @property
    def whitened(self) -> FloatArray:
        """Rows over the noise."""
        return self.gram / self.noise**2


def compute_training_gram(
    backbone: Backbone,
    graphs: Sequence[Batch],
    *,
    forces: bool = True,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """GᵀG of the labels of training frames, (features, features).

    Args:
        backbone: the tuned model.
        graphs: of the training frames.
        forces: whether forces are rows, too, and not energies alone.
        progress: called with the number of frames done.

    Raises:
        InputError: as :func:`require_network`, or no frame has a label.
    """
    size = count_features(backbone, graphs[0])
    energy_sum, force_sum = GramSum(np.zeros((size, size))), GramSum(np.zeros((size, size)))
    directions = np.eye(size) if forces else None
    for batch in predict_with_features(backbone, graphs, directions, progress=progress):
        predictions = batch.predictions
        energy_errors = (predictions.energy - predictions.energy_label) / predictions.atoms
        energy_sum.add(batch.features / predictions.atoms[:, None], energy_errors)
        if batch.force_features is not None:
            rows = batch.force_features.reshape(size, -1).T
            force_sum.add(rows, (predictions.forces - predictions.forces_label).ravel())
    if not (energy_sum.count or force_sum.count):
        raise InputError("The training frames have neither energies nor forces; there is nothing to learn from them.")
    return energy_sum.whitened + force_sum.whitened


def predict_deviations(
    backbone: Backbone,
    graphs: Sequence[Batch],
    posterior: Posterior,
    *,
    forces: bool = True,
    progress: Callable[[int], None] | None = None,
) -> tuple[Predictions, FloatArray, FloatArray | None]:
    """Predictions and their standard deviations for α = 1.

    Returns:
        predictions; (frames,) eV; (atoms, 3) eV/Å, None where they are not wanted.
    """
    whitening = posterior.whitening
    parts, energies, components = [], [], []
    for batch in predict_with_features(backbone, graphs, whitening if forces else None, progress=progress):
        parts.append(batch.predictions)
        energies.append(np.linalg.norm(batch.features @ whitening.T, axis=1))
        if batch.force_features is not None:
            components.append(np.linalg.norm(batch.force_features, axis=0))
    predictions = join_predictions(parts)
    return predictions, np.concatenate(energies), np.concatenate(components) if forces else None


def join_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of batches as one, without stress, moments and magnetic forces."""
    names = ("numbers", "atoms", "energy", "energy_label", "forces", "forces_label")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Predictions(**columns, stress=None, stress_label=None)


def compute_deviations(
    backbone: Backbone, batch: Batch, whitening: Tensor, *, forces: bool = True
) -> tuple[FloatArray, FloatArray | None]:
    """Standard deviations of a batch on the model's device for α = 1: (graphs,) eV, and (atoms, 3) eV/Å where wanted.

    Args:
        backbone: the model.
        batch: of one or several structures.
        whitening: of the posterior, (features, features).
        forces: whether deviations of the forces are wanted, which take a backward pass for each feature.
    """
    features = require_network(backbone).readout_features(batch, whitening if forces else None)
    energy = torch.linalg.vector_norm(features.graphs.cpu() @ whitening.T, dim=1).numpy()
    if features.gradients is None:
        return energy, None
    return energy, torch.linalg.vector_norm(features.gradients, dim=0).cpu().numpy()
