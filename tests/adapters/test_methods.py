"""Method tables: options, targets, and the way through JSON."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from forcetune.adapters.attach import attach, detach
from forcetune.adapters.methods import METHODS, Method, custom_method, method, option_names
from forcetune.adapters.updates import UPDATES, Dense, Gain, LowRank
from forcetune.adapters.updates.dense import DenseWeight
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.protocol import Site, WeightPath
from forcetune.errors import InputError
from systems import backbone


@pytest.fixture(scope="module")
def model():
    return backbone()


@pytest.mark.parametrize("name", METHODS)
def test_json_and_back(name: str) -> None:
    made = method(name)
    assert Method.from_json(made.to_json()) == replace(made, fresh=False)


def test_options_reach_the_updates_and_useless_ones_are_refused() -> None:
    assert method("elora", rank=4).table["linear"] == (LowRank(4, 4.0, False),)
    assert method("elora", rank=4, alpha=1.0).table["linear"] == (LowRank(4, 1.0, False),)
    assert method("mmea", rank=4).table["tensor_product"] == (LowRank(16, 16.0, False),)
    with pytest.raises(InputError, match=r"no use for 'rank'; it has no options"):
        method("full", rank=3)
    with pytest.raises(InputError, match=r"no use for 'gain'; its options are rank, alpha, cap_rank"):
        method("elora", gain="exp")
    with pytest.raises(InputError, match="there is no method 'dora'"):
        method("dora")
    with pytest.raises(InputError, match="does nothing"):
        method("mmea", shift=False, modulation=False)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_a_field_of_the_update_or_a_parameter_of_the_method(name: str) -> None:
    fields = {field for update in UPDATES.values() for field in update.option_names()}
    assert set(option_names(METHODS[name])) <= fields | {"skip", "budget", "layers", "wrap"}
    for option in option_names(METHODS[name]):
        with pytest.raises(InputError, match=f"{name}.*{option}"):
            method(name, **{option: [3]})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mmea", {"rank": 0}),
        ("mmea", {"rank": 2000}),
        ("mmea", {"shift_init": float("nan")}),
        ("mmea", {"gain": "square"}),
        ("mmea", {"skip": "yes"}),
        ("elora", {"alpha": 0}),
        ("elora", {"budget": 0}),
        ("freeze", {"layers": 0}),
        ("sparse", {"wrap": "some"}),
        ("sparse", {"threshold": 1.5}),
        ("adapter", {"rank": True}),
    ],
)
def test_options_out_of_range_are_named(name: str, options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"method {name}: .*{next(iter(options))}: "):
        method(name, **options)


def test_what_a_method_sets_itself_is_no_option() -> None:
    for name, option in (("mmea", "species"), ("elora", "ranks"), ("elora", "axis"), ("gain", "axis")):
        with pytest.raises(InputError, match=f"no use for '{option}'"):
            method(name, **{option: None})


def test_gain_has_one_factor_for_each_channel_and_element() -> None:
    linear, contraction = WeightPath("1o->1o", 0, (16, 8)), WeightPath("order3", 0, (3, 23, 8))
    assert Gain().shape_for(linear) == (1, 8)
    assert Gain().shape_for(contraction) == (3, 1, 8)
    assert Gain(per_element=False).shape_for(contraction) == (1, 1, 8)
    assert Gain().shape_for(WeightPath("all", 0, (8,))) == (8,)
    site = Site("a.weight", "a", "weight", "a", "contraction", (contraction,))
    weight = torch.randn(3, 23, 8, dtype=torch.float64)
    part = Gain().build(site, weight)
    assert torch.equal(part(weight), weight)
    with torch.no_grad():
        part.gains["order3"][1, 0, 2] = 0.5
    expected = weight.clone()
    expected[1, :, 2] *= 1.5
    assert torch.equal(part(weight), expected)


def fresh_start(model: MaceBackbone, seed: int) -> dict[str, Tensor]:
    adapter = attach(model, method("scratch"), seed=seed)
    values = {site.name: adapter.part(site, DenseWeight).value.detach().clone() for site in adapter.sites}
    detach(model)
    return values


def test_scratch_starts_every_weight_afresh_and_leaves_the_model_alone() -> None:
    model = backbone()
    known = {name: value.clone() for name, value in model.model.named_parameters()}
    one, again, other = (fresh_start(model, seed) for seed in (1, 1, 2))
    assert set(one) == {site.name for site in model.sites()}
    for name, value in one.items():
        assert torch.equal(value, again[name])
        if value.count_nonzero():
            assert not torch.equal(value, other[name]) and not torch.equal(value, known[name])
    assert all(torch.equal(value, known[name]) for name, value in model.model.named_parameters())


def test_rank_is_capped_at_what_a_path_can_use() -> None:
    assert LowRank(16, 16.0, True).rank_for(WeightPath("a", 0, (128, 1))) == 1
    assert LowRank(16, 16.0, True).rank_for(WeightPath("a", 0, (3, 23, 128))) == 16
    assert LowRank(16, 16.0, False).rank_for(WeightPath("a", 0, (128, 1))) == 16


def test_freeze_trains_the_last_layers_and_the_readouts(model: MaceBackbone) -> None:
    adapter = attach(model, method("freeze"))
    trained = {key.split("|")[0].replace("/", ".") for key in adapter.parts}
    detach(model)
    assert trained == {site.name for site in model.sites() if site.layers_behind == 0}
    assert {name.split(".")[0] + name.split(".")[1] for name in trained} == {
        "interactions1",
        "products1",
        "readouts0",
        "readouts1",
    }
    both = attach(model, method("freeze", layers=2)).trainable
    detach(model)
    whole = attach(model, method("full")).trainable
    detach(model)
    assert 0 < whole - both == sum(site.numel for site in model.sites() if site.layers_behind == 2)


def test_a_table_of_ones_own() -> None:
    made = custom_method("mine", {"linear": [{"update": "Gate", "rank": 4}, {"update": "SoftThreshold"}]})
    assert made.optimizer == "schedulefree" and made.name == "mine" and not made.mergeable
    assert Method.from_json(made.to_json()) == made
    for table, message in (
        ({"linear": [{"update": "Gate"}, {"update": "Shift"}]}, "two updates of the same type"),
        ({"linear": [{"update": "LowRank"}, {"update": "Dense"}]}, "two updates of the same type"),
        ({"linear": [{"update": "DoRA"}]}, "updates are Gate, LowRank"),
        ({"linear": [{"update": "LowRank", "width": 3}]}, "LowRank: width: there is no such option"),
        ({"linear": [{"update": "LowRank", "rank": 0}]}, r"LowRank: rank: Input should be greater .* \(given: 0\)"),
        ({"lines": [{"update": "Dense"}]}, "there is no site kind"),
    ):
        with pytest.raises(InputError, match=message):
            custom_method("mine", table)


def test_targets_by_expression_and_by_ending(model) -> None:
    by_expression = attach(model, method("full", target=r"products\..*linear\.weight"))
    assert {site.split("|")[0] for site in by_expression.parts} == {
        "products/0/linear/weight",
        "products/1/linear/weight",
    }
    detach(model)
    by_ending = attach(model, method("full", target=["skip_tp.weight"]))
    assert len(by_ending.parts) == 2
    detach(model)
    for target in (r"nothing", ["skip_tp"]):
        with pytest.raises(InputError, match="matches none of the model's"):
            attach(model, method("full", target=target))
    with pytest.raises(InputError, match="not a regular expression"):
        method("full", target="(")
    with pytest.raises(InputError, match="no site kind"):
        Method("odd", {"linears": (Dense(),)}, "")


def test_seed_decides_the_start_and_leaves_the_global_generator_alone(model) -> None:
    import torch

    state = torch.random.get_rng_state()
    first = attach(model, method("elora"), seed=3).state_dict()
    detach(model)
    again = attach(model, method("elora"), seed=3).state_dict()
    detach(model)
    other = attach(model, method("elora"), seed=4).state_dict()
    detach(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_two_adapters_are_refused(model) -> None:
    attach(model, method("readout"))
    with pytest.raises(InputError, match="detach it first"):
        attach(model, method("readout"))
    detach(model)
    with pytest.raises(InputError, match="carries no adapter"):
        detach(model)
