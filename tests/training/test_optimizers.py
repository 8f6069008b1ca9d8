"""Learning rates, weight decay and moving averages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from forcetune.adapters.attach import attach, detach
from forcetune.adapters.methods import custom_method, method
from forcetune.adapters.updates.soft_threshold import SparseWeight
from forcetune.config import SCHEDULE_FREE, ScheduleConfig, TrainingConfig
from forcetune.errors import InputError
from forcetune.training.optimizers import LearningRate, MovingAverage, make_optimizer, restart_average
from systems import backbone


def test_warm_up_is_linear_and_then_constant() -> None:
    rate = LearningRate(ScheduleConfig(name="constant", warmup_epochs=2), 1e-2, 10)
    assert [rate.at(done) for done in (0.5, 1.0, 2.0, 7.3)] == pytest.approx([2.5e-3, 5e-3, 1e-2, 1e-2])


def test_cosine_ends_at_the_minimum() -> None:
    rate = LearningRate(ScheduleConfig(name="cosine", warmup_epochs=1, minimum=1e-5), 1e-2, 11)
    assert rate.at(1.0) == pytest.approx(1e-2)
    assert rate.at(6.0) == pytest.approx((1e-2 + 1e-5) / 2)
    assert rate.at(11.0) == pytest.approx(1e-5)


def test_plateau_agrees_with_pytorch() -> None:
    losses = [3.0, 2.0, 2.0, 2.5, 1.9999, 2.1, 2.2, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    ours = LearningRate(ScheduleConfig(patience=2, factor=0.8, minimum=1e-4), 1e-2, 100)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, factor=0.8, patience=2, min_lr=1e-4)
    for loss in losses:
        ours.observe(loss)
        theirs.step(loss)
        assert ours.at(1.0) == pytest.approx(reference.param_groups[0]["lr"])
    assert ours.at(1.0) < 1e-2


def test_second_stage_starts_anew_and_state_survives() -> None:
    rate = LearningRate(ScheduleConfig(patience=0, factor=0.5), 1e-2, 10)
    for loss in (1.0, 2.0, 3.0):
        rate.observe(loss)
    copied = LearningRate(ScheduleConfig(patience=0, factor=0.5), 1e-2, 10)
    copied.load_state_dict(rate.state_dict())
    assert copied.at(3.0) == rate.at(3.0) == pytest.approx(2.5e-3)
    rate.restart(1e-3)
    assert rate.at(3.0) == pytest.approx(1e-3)
    assert rate.lowest == math.inf


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", "Adam"), ("adamw", "AdamW"), ("schedulefree", "AdamWScheduleFree"), ("soap", "ScheduleFreeSoap")],
)
def test_weight_decay_acts_on_linear_and_contraction_sites_only(name: str, kind: str) -> None:
    model = backbone()
    adapter = attach(model, method("full"))
    config = TrainingConfig.model_validate({"optimizer": name, "weight_decay": 0.25, "ema": None})
    optimizer = make_optimizer(adapter, config, 1e-3, 10)
    assert type(optimizer).__name__ == kind
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"linear": 0.25, "contraction": 0.25, "contraction_lower": 0.25}
    for site_kind, parameter, _ in adapter.parameter_kinds():
        assert decay[id(parameter)] == expected.get(site_kind, 0.0)
    assert len(decay) == len(list(adapter.parameters()))
    assert name != "adam" or all(group["amsgrad"] for group in optimizer.param_groups)
    detach(model)


@pytest.mark.parametrize("name", ["adam", "adamw", "schedulefree"])
def test_sparse_updates_decay_at_every_site_and_decoupled(name: str) -> None:
    """ΔW ← (1 − η λ_Δ) ΔW, whatever the layer; with a large gradient it is the same."""
    table = {kind: [{"update": "SoftThreshold"}] for kind in ("linear", "readout", "tensor_product", "contraction")}
    rate, decay = 1e-2, 0.3
    config = TrainingConfig.model_validate({"optimizer": name, "weight_decay": decay, "ema": None})
    kinds = set()
    for pull in (0.0, 1e3):
        model = backbone()
        adapter = attach(model, custom_method("mine", table))
        optimizer: Any = make_optimizer(adapter, config, rate, 10)
        if name == "schedulefree":
            optimizer.train()
        changes = [
            (site.kind, adapter.part(site, SparseWeight).change)
            for site in adapter.sites
            if adapter.part(site, SparseWeight) is not None
        ]
        before = [change.detach().clone() for _, change in changes]
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, pull)
        optimizer.step()
        if name == "schedulefree":
            optimizer.eval()
        step = rate if pull else 0.0  # Adam's first step, whatever the size of the gradient
        for (kind, change), old in zip(changes, before, strict=True):
            torch.testing.assert_close(change.detach(), (1 - rate * decay) * old - step, rtol=1e-9, atol=1e-9)
            kinds.add(kind)
    assert kinds == set(table)


def test_moving_average_follows_its_formula_and_gives_the_weights_back() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    average = MovingAverage([parameter], 0.9)
    expected = parameter.detach().clone()
    for step in range(30):
        with torch.no_grad():
            parameter.add_(1.0)
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    last = parameter.detach().clone()
    with average.applied():
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)
    assert torch.equal(parameter.detach(), last)
    restored = MovingAverage([parameter], 0.9)
    restored.load_state_dict(average.state_dict())
    assert restored.updates == 30
    with restored.applied():
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        *(("schedulefree", "plateau"), ("soap", "plateau"), ("adamw", "cosine"), ("adamw", "constant")),
        ("adam", "cosine"),
    ],
)
def test_thresholds_end_where_they_shall_without_gradients(name: Any, schedule: Any) -> None:
    model = backbone()
    adapter = attach(model, method("sparse", final_threshold=0.02, threshold_rate=2.0))
    averages = name in SCHEDULE_FREE
    shape = ScheduleConfig(warmup_epochs=1) if averages else ScheduleConfig(name=schedule)
    config = TrainingConfig(optimizer=name, epochs=20, schedule=shape)
    optimizer = make_optimizer(adapter, config, 1e-2, 25)
    rates = LearningRate(config.schedule, 1e-2, config.epochs)
    parts = [part for part in model.model.modules() if isinstance(part, SparseWeight)]
    assert parts
    if averages:
        optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]
    for step in range(20 * 25):
        for group in optimizer.param_groups:
            if not averages:
                group["lr"] = group["rate"] * rates.at((step + 0.5) / 25)
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    if averages:
        optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]
    for part in parts:
        assert part.tau.detach().tolist() == pytest.approx([math.log(0.02 / 0.98)] * len(part.tau), rel=0.02)


def test_a_final_threshold_below_the_first_is_refused() -> None:
    with pytest.raises(InputError, match=r"final_threshold: 0\.001 is below the threshold at the start \(0\.01\)"):
        method("sparse", threshold=0.01, final_threshold=0.001)
    model = backbone()
    same = attach(model, method("sparse", threshold=0.01, final_threshold=0.01))
    groups = make_optimizer(same, TrainingConfig(optimizer="schedulefree"), 1e-2, 10).param_groups
    assert 0.0 in [group["weight_decay"] for group in groups]


@pytest.mark.parametrize("name", ["schedulefree", "soap"])
def test_a_second_stage_goes_on_from_the_average_and_begins_a_new_one(name: str) -> None:
    model = backbone()
    adapter = attach(model, method("elora"))
    config = TrainingConfig.model_validate({"optimizer": name, "ema": None})
    optimizer: Any = make_optimizer(adapter, config, 1e-2, 10)
    parameters = list(adapter.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.train()
        optimizer.step()

    for _ in range(5):
        step()
    optimizer.eval()
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer.train()
    assert not all(map(torch.equal, averages, parameters))
    restart_average(optimizer)
    for parameter, average in zip(parameters, averages, strict=True):
        torch.testing.assert_close(parameter.detach(), average)
    step()
    optimizer.eval()
    # the average of one step is where it led
    for parameter, average in zip(parameters, averages, strict=True):
        torch.testing.assert_close(parameter.detach(), optimizer.state[parameter]["z"])
        assert not torch.equal(parameter, average)
    detach(model)
