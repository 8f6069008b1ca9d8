"""The loss of energies, forces, stresses and magnetic moments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from forcetune.backbones.protocol import Prediction
from forcetune.config import LossConfig
from forcetune.graphs.graph import Batch, moment_labels


def compute_loss(
    config: LossConfig, prediction: Prediction, batch: Batch, *, total: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    """w_E f(E) + w_F f(F) + w_S f(S) + w_M f(μ), each f a mean over the labels there are.

    A term is Σ w v f / Σ w over the labels there are, with w the weight of a replay frame (1 for others) and v that
    which the file gives the label (1 where it gives none).

    The published form is 1 · MSE(E) + 1000 · MSE(F), with the energy of a frame in eV and the mean over all force
    components; ``energy_per_atom`` divides the energy's error by the number of atoms first.

    Args:
        config: weights and form.
        prediction: energy (graphs,), forces (atoms, 3), stress (graphs, 3, 3) if its weight is not zero.
        batch: with the labels; NaN where there is none.
        total: sum over the processes that have a part of the batch each; the loss is then this part's share of that
            of the whole batch.

    Returns:
        A scalar in float64.
    """
    return _joined([(term, total(weights)) for term, weights in _terms(config, prediction, batch)], config)


class LossSums:
    """The loss of frames that come batch after batch and are not kept: that of :func:`compute_loss` for all of them."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.sums = torch.zeros((4, 2), dtype=torch.float64)

    def add(self, prediction: Prediction, batch: Batch) -> None:
        """Count a batch with what was predicted for it."""
        terms = _terms(self.config, prediction, batch)
        self.sums[: len(terms)] += torch.stack([torch.stack(term) for term in terms]).detach().cpu()

    def wholes(self) -> tuple[Tensor, ...]:
        """The sum of the weights of each term's labels, in the order in which :func:`compute_loss` asks for them."""
        return self.sums[:, 1].unbind()

    def loss(self) -> float:
        """Over all batches so far."""
        return float(_joined([(term, weights) for term, weights in self.sums.unbind()], self.config))


def label_weights(config: LossConfig, batch: Batch) -> list[Tensor]:
    """The sum of the weights of each term's labels, in the order in which :func:`compute_loss` asks for them.

    Raises:
        ValueError: the loss has moments, whose labels take the shape of what is predicted.
    """
    if config.moments:
        raise ValueError("how many labels moments have depends on what is predicted")
    by_label = [_weights(batch.energy, batch.weight)]
    if config.forces:
        by_label.append(_weights(batch.forces, batch.weight[batch.graph_index]))
    if config.stress_weight:
        by_label.append(_weights(batch.stress, batch.weight))
    return [weights.sum() for weights in by_label]


def pointwise_loss(config: LossConfig, errors: Tensor) -> Tensor:
    """What each error costs by the form of the loss: its square, its size, or Huber's function of it."""
    if config.form == "mse":
        return errors.square()
    if config.form == "mae":
        return errors.abs()
    return functional.huber_loss(errors, torch.zeros_like(errors), reduction="none", delta=config.huber_delta)


def _weights(label: Tensor, weight: Tensor) -> Tensor:
    """Of every entry: that of its row where there is a label."""
    return weight.view(-1, *[1] * (label.ndim - 1)) * ~torch.isnan(label)


def _joined(terms: list[tuple[Tensor, Tensor]], config: LossConfig) -> Tensor:
    """The weighted sum of terms, each over its weights; the later ones may be left out."""
    factors = (
        config.energy,
        *((config.forces,) if config.forces else ()),
        *((config.stress_weight,) if config.stress_weight else ()),
        *((config.moments,) if config.moments else ()),
    )
    parts = [
        factor * (term / torch.where(whole > 0, whole, 1.0))
        for factor, (term, whole) in zip(factors, terms, strict=False)
    ]
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def _terms(config: LossConfig, prediction: Prediction, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Of energy, forces, stress and moments, where they count: the sum over entries, and the sum of their weights."""
    atoms = batch.atoms_per_graph if config.energy_per_atom else 1
    graph = batch.graph_index
    energy, forces, stress, moments = batch.file_weights.unbind(1)
    terms = [_sums(config, prediction.energy / atoms, batch.energy / atoms, batch.weight, energy)]
    if config.forces:
        terms.append(_sums(config, prediction.forces, batch.forces, batch.weight[graph], forces[graph]))
    if config.stress_weight:
        assert prediction.stress is not None
        terms.append(_sums(config, prediction.stress, batch.stress, batch.weight, stress))
    if config.moments:
        assert prediction.moments is not None
        labels = moment_labels(prediction.moments, batch.moments)
        terms.append(_sums(config, prediction.moments, labels, batch.weight[graph], moments[graph]))
    return terms


def _sums(
    config: LossConfig, predicted: Tensor, label: Tensor, weight: Tensor, file_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of the errors of entries that have a label, by both weights of their row, and the sum of the former."""
    missing = torch.isnan(label)
    values = torch.where(missing, 0.0, predicted - label).double()
    values = pointwise_loss(config, values)
    weights = _weights(label, weight)
    factors = file_weight.view(-1, *[1] * (label.ndim - 1))
    return (weights * factors * values).sum(), weights.sum()
