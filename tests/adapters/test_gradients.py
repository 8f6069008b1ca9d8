"""Low-rank updates that begin where the loss pulls, and ranks within a budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from forcetune.adapters.attach import attach, detach
from forcetune.adapters.gradients import start_from_gradients, weight_gradients, within_budget
from forcetune.adapters.methods import method
from forcetune.adapters.updates import LowRank, WeightUpdate
from forcetune.adapters.updates.low_rank import LowRankWeight
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.protocol import Prediction
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch
from systems import backbone, cluster, crystal, frames_of


def loss(prediction: Prediction, batch: Batch) -> Tensor:
    return prediction.energy.square().sum() + prediction.forces.square().sum()


@pytest.fixture(scope="module")
def model() -> MaceBackbone:
    return backbone()


@pytest.fixture(scope="module")
def gradients(model: MaceBackbone) -> dict[str, Tensor]:
    return weight_gradients(model, build_graphs(model, frames_of(cluster(), crystal())), loss)


def test_gradients_are_slopes_of_the_mean_loss(model: MaceBackbone, gradients: dict[str, Tensor]) -> None:
    assert not any(parameter.grad is not None for parameter in model.model.parameters())
    batches = build_graphs(model, frames_of(cluster(), crystal()))
    rng = np.random.default_rng(0)
    parameters = dict(model.model.named_parameters())
    assert set(gradients) == {site.name for site in model.sites()}
    for name in ("interactions.1.linear_up.weight", "interactions.0.skip_tp.weight", "readouts.0.linear.weight"):
        flat, place = parameters[name].data.view(-1), int(rng.integers(parameters[name].numel()))
        values = []
        for step in (1e-5, -1e-5):
            flat[place] += step
            losses = [float(loss(model.predict(batch), batch).detach()) for batch in batches]
            flat[place] -= step
            values.append(sum(losses) / len(losses))
        slope = (values[0] - values[1]) / 2e-5
        assert float(gradients[name].view(-1)[place]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_start_along_the_gradient_captures_the_most_a_first_step_can(
    model: MaceBackbone, gradients: dict[str, Tensor]
) -> None:
    adapter = attach(model, method("elora", rank=2, init="gradient"))
    start_from_gradients(adapter, gradients)
    for site in adapter.sites:
        part = adapter.part(site, WeightUpdate)
        if not isinstance(part, LowRankWeight):
            continue
        for path in site.paths:
            rows = part.A[path.name].detach().reshape(-1, 2)
            block = gradients[site.name].view(-1)[path.start : path.start + path.size].view(-1, path.shape[-1])
            singular_values = torch.linalg.svdvals(block)[:2]
            scale = float(singular_values.max())
            if scale == 0 or len(singular_values) < 2 or float(singular_values[1]) < 1e-9 * scale:
                continue
            pull = torch.linalg.svdvals((rows / np.sqrt(len(rows))).T @ block)
            torch.testing.assert_close(pull / scale, singular_values / scale, rtol=1e-9, atol=1e-12)
            assert not part.B[path.name].count_nonzero()
    detach(model)


@pytest.mark.parametrize("norms", [False, True])
def test_a_budget_is_kept_and_spent_where_the_gradient_is(
    model: MaceBackbone, gradients: dict[str, Tensor], norms: bool
) -> None:
    whole = attach(model, method("elora", rank=4)).trainable
    detach(model)
    budget = whole // 2
    sites = model.sites()
    made = within_budget(method("elora", rank=4, norms=norms, budget=budget), sites, gradients)
    adapter = attach(model, made)
    assert made.budget is None
    if norms:
        assert adapter.trainable <= budget
    else:
        assert 0.95 * budget < adapter.trainable <= budget
    update = made.table["linear"][0]
    assert isinstance(update, LowRank) and update.ranks is not None
    ranks = update.ranks
    assert len(set(ranks.values())) > 2
    # no path that was given less could have used a unit better than the last one of a path that was given more
    worth: dict[str, np.ndarray] = {}
    for site in sites:
        if any(isinstance(one, LowRank) for one in made.table.get(site.kind, ())):
            for path in site.paths:
                block = gradients[site.name].view(-1)[path.start : path.start + path.size].view(-1, path.shape[-1])
                values = torch.linalg.svdvals(block).square() / (block.shape[0] + block.shape[1])
                worth[f"{site.name}/{path.name}"] = values.numpy()
    lowest = min(worth[key][rank - 1] for key, rank in ranks.items() if rank)
    affordable = budget - adapter.trainable
    for key, rank in ranks.items():
        if rank < len(worth[key]) and not norms:
            site, path = next((s, p) for s in sites for p in s.paths if f"{s.name}/{p.name}" == key)
            assert worth[key][rank] <= lowest * (1 + 1e-12) or update.cost(path) > affordable, (site.name, rank)
    detach(model)
    with pytest.raises(InputError, match="fewer than the other updates"):
        within_budget(method("elora", budget=10), sites, gradients)
