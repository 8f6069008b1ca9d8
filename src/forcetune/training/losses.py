"""The loss of energies, forces, stresses, magnetic moments and magnetic forces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from forcetune.backbones.protocol import Prediction
from forcetune.config import LossConfig
from forcetune.graphs.graph import Batch, moment_labels

LARGE_FORCES, SMALLER_DELTA = (100.0, 200.0, 300.0), (0.7, 0.4, 0.1)
"""Of ``universal``: from these lengths of a force on, eV/Å, Huber's delta is so many times that of other atoms."""


def compute_loss(
    config: LossConfig, prediction: Prediction, batch: Batch, *, total: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    """w_E f(E) + w_F f(F) + w_S f(S) + w_M f(μ) + w_B f(−∂E/∂s), each f a mean over the labels there are.

    A term is Σ w v f / Σ w over the labels there are, with w the weight of a replay frame (1 for others) and v that
    which the file gives the label (1 where it gives none).

    The published form is 1 · MSE(E) + 1000 · MSE(F), with the energy of a frame in eV and the mean over all force
    components; ``energy_per_atom`` divides the energy's error by the number of atoms first, ``stress_per_atom``
    multiplies that of stress by the volume over the number of atoms. In the form ``universal`` v stands inside: f(v Δ),
    with the smaller delta of :data:`SMALLER_DELTA` where the label's force is large, as published with MACE-MP-0; in
    ``l1l2`` the term of the forces is the mean length of an atom's error.

    Args:
        config: weights and form.
        prediction: energy (graphs,), forces (atoms, 3); stress (graphs, 3, 3), moments and fields (atoms, 3) if their
            weights are not zero.
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
        self.sums = torch.zeros((5, 2), dtype=torch.float64)

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
        by_label.append(_weights(_counted(config, batch.forces), batch.weight[batch.graph_index]))
    if config.stress_weight:
        by_label.append(_weights(batch.stress, batch.weight))
    if config.magforces_weight:
        by_label.append(_weights(batch.magforces, batch.weight[batch.graph_index]))
    return [weights.sum() for weights in by_label]


def pointwise_loss(config: LossConfig, errors: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """f of each error by the form of the loss: its square, its size, or Huber's function of it.

    Here ``universal`` is ``huber`` and ``l1l2`` is ``mae``: what sets them apart concerns forces and the weights of
    labels in the file, before and after this function.

    Args:
        config: form, and Huber's delta in the unit of the errors.
        errors: of any shape.
        factor: multiplies Huber's delta.
    """
    if config.form == "mse":
        return errors.square()
    size = errors.abs()
    if config.form in ("mae", "l1l2"):
        return size
    delta = config.huber_delta * factor
    return torch.where(size <= delta, 0.5 * errors.square(), delta * (size - 0.5 * delta))


def _weights(label: Tensor, weight: Tensor) -> Tensor:
    """Of every entry: that of its row where there is a label."""
    return _like_rows(weight, label) * ~torch.isnan(label)


def _joined(terms: list[tuple[Tensor, Tensor]], config: LossConfig) -> Tensor:
    """The weighted sum of terms, each over its weights; the later ones may be left out."""
    factors = (
        config.energy,
        *((config.forces,) if config.forces else ()),
        *((config.stress_weight,) if config.stress_weight else ()),
        *((config.moments,) if config.moments else ()),
        *((config.magforces_weight,) if config.magforces_weight else ()),
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
    """Of each term, in the order of :func:`compute_loss`: the sum over entries, and that of their weights."""
    atoms = batch.atoms_per_graph if config.energy_per_atom else 1
    graph = batch.graph_index
    energy, forces, stress, moments = batch.file_weights.unbind(1)
    values = _values(config, prediction.energy / atoms, batch.energy / atoms, energy)
    terms = [_sums(values, batch.energy, batch.weight, _outside(config, energy))]
    if config.forces:
        row = forces[graph]
        values = _force_values(config, prediction.forces, batch.forces, row)
        terms.append(_sums(values, _counted(config, batch.forces), batch.weight[graph], _outside(config, row)))
    if config.stress_weight:
        assert prediction.stress is not None
        scale = _volume_per_atom(batch) if config.stress_per_atom else 1.0
        values = _values(config, scale * prediction.stress, scale * batch.stress, stress)
        terms.append(_sums(values, batch.stress, batch.weight, _outside(config, stress)))
    if config.moments:
        assert prediction.moments is not None
        labels = moment_labels(prediction.moments, batch.moments)
        row = moments[graph]
        values = _values(config, prediction.moments, labels, row)
        terms.append(_sums(values, labels, batch.weight[graph], _outside(config, row)))
    if config.magforces_weight:
        assert prediction.fields is not None
        row = moments[graph]
        values = _values(config, prediction.fields, batch.magforces, row)
        terms.append(_sums(values, batch.magforces, batch.weight[graph], _outside(config, row)))
    return terms


def _force_values(config: LossConfig, predicted: Tensor, label: Tensor, file_weight: Tensor) -> Tensor:
    """f of the error of forces: (atoms, 3), or (atoms, 1) where each atom's length counts."""
    if config.form == "l1l2":
        missing = torch.isnan(label).any(dim=1, keepdim=True)
        return torch.linalg.vector_norm(torch.where(missing, 0.0, predicted - label).double(), dim=1, keepdim=True)
    if config.form != "universal":
        return _values(config, predicted, label, file_weight)
    size = torch.linalg.vector_norm(file_weight[:, None] * label.double(), dim=1, keepdim=True)
    factor = torch.ones_like(size)
    for limit, smaller in zip(LARGE_FORCES, SMALLER_DELTA, strict=True):
        factor = torch.where(size >= limit, smaller, factor)
    return _values(config, predicted, label, file_weight, factor)


def _volume_per_atom(batch: Batch) -> Tensor:
    """(graphs, 1, 1), Å³."""
    return (torch.linalg.det(batch.cell.double()).abs() / batch.atoms_per_graph).view(-1, 1, 1)


def _values(
    config: LossConfig, predicted: Tensor, label: Tensor, file_weight: Tensor, factor: Tensor | float = 1.0
) -> Tensor:
    """f of errors, entry by entry, zero where there is no label; ``factor`` multiplies Huber's delta."""
    errors = torch.where(torch.isnan(label), 0.0, predicted - label).double()
    if config.form == "universal":
        errors = errors * _like_rows(file_weight, errors)
    return pointwise_loss(config, errors, factor)


def _outside(config: LossConfig, file_weight: Tensor) -> Tensor:
    """The weights of the file that multiply f of an error."""
    return torch.ones_like(file_weight) if config.form == "universal" else file_weight


def _counted(config: LossConfig, forces: Tensor) -> Tensor:
    """Labels of forces as they count in the mean: entry by entry, or one for each atom; NaN where there is none."""
    return forces.sum(dim=1, keepdim=True) if config.form == "l1l2" else forces


def _sums(values: Tensor, label: Tensor, weight: Tensor, file_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the values of entries that have a label, by both weights of their row, and the sum of the former."""
    weights = _weights(label, weight)
    return (weights * _like_rows(file_weight, label) * values).sum(), weights.sum()


def _like_rows(factor: Tensor, values: Tensor) -> Tensor:
    """(rows,) in a shape that multiplies the rows of another tensor."""
    return factor.view(-1, *[1] * (values.ndim - 1))
