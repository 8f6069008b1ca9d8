"""The loss of energies, forces, stresses and magnetic moments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from forcetune.backbones.protocol import Prediction
from forcetune.config import LossConfig
from forcetune.graphs.graph import Batch, moment_labels


def loss_of(
    config: LossConfig, prediction: Prediction, batch: Batch, *, total: Callable[[Tensor], Tensor] = lambda value: value
) -> Tensor:
    """w_E f(E) + w_F f(F) + w_S f(S) + w_M f(μ), each f a mean over the labels there are.

    Graphs count by their weights.

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
    atoms = batch.atoms_per_graph if config.energy_per_atom else 1
    result = config.energy * _mean(config, prediction.energy / atoms, batch.energy / atoms, batch.weight, total)
    if config.forces:
        result = result + config.forces * _mean(
            config, prediction.forces, batch.forces, batch.weight[batch.graph_index], total
        )
    if config.stress:
        assert prediction.stress is not None
        result = result + config.stress * _mean(config, prediction.stress, batch.stress, batch.weight, total)
    if config.moments:
        assert prediction.moments is not None
        labels = moment_labels(prediction.moments, batch.moments)
        result = result + config.moments * _mean(
            config, prediction.moments, labels, batch.weight[batch.graph_index], total
        )
    return result


def _mean(
    config: LossConfig, predicted: Tensor, label: Tensor, weight: Tensor, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """The mean over entries that have a label, by the weight of their row; zero when none has."""
    missing = torch.isnan(label)
    values = torch.where(missing, 0.0, predicted - label).double()
    if config.form == "mse":
        values = values.square()
    elif config.form == "mae":
        values = values.abs()
    else:
        values = functional.huber_loss(values, torch.zeros_like(values), reduction="none", delta=config.huber_delta)
    weights = weight.view(-1, *[1] * (values.ndim - 1)) * ~missing
    whole = total(weights.sum())
    return (weights * values).sum() / torch.where(whole > 0, whole, 1.0)
