"""What an adapter changed, against changes made on purpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forcetune.adapters.attach import Adapter, attach, detach, require_adapter
from forcetune.adapters.changes import likeness, recorded_gates, weight_changes
from forcetune.adapters.methods import custom_method, method
from forcetune.adapters.updates import ActivationUpdate
from forcetune.adapters.updates.dense import DenseWeight
from forcetune.adapters.updates.gate import GateActivation
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from systems import backbone, cluster, frames_of, perturb


@pytest.fixture
def model() -> MaceBackbone:
    return backbone(elements=(1, 6, 8))


def dense_of(adapter: Adapter, ending: str) -> tuple[DenseWeight, str]:
    site = next(site for site in adapter.sites if site.name.endswith(ending))
    return adapter.part(site, DenseWeight), site.name


def test_a_known_change_is_found_where_it_was_made(model: MaceBackbone) -> None:
    adapter = attach(model, method("full"))
    assert all(change.relative == change.changed == change.stable_rank == 0 for change in weight_changes(model))
    part, name = dense_of(adapter, "interactions.1.linear_up.weight")
    path = part.paths[1]
    with torch.no_grad():
        block = part.value.view(-1)[path.start : path.start + path.size].view(path.shape)
        before = block.clone()
        block[:, 0] += 2 * before[:, 0]
    changes = {(change.site, change.path): change for change in weight_changes(model)}
    touched = {key for key, change in changes.items() if change.changed > 0}
    assert touched == {(name, path.name)}
    change = changes[name, path.name]
    expected = float(2 * before[:, 0].norm() / before.norm())
    assert change.relative == pytest.approx(expected) == pytest.approx(change.singular[0])
    assert change.stable_rank == pytest.approx(1.0)
    assert change.changed == pytest.approx(1 / path.shape[1]) == pytest.approx(change.channels)
    assert change.size == path.size and change.update == "Dense" and change.kind == "linear"


@pytest.mark.parametrize("ending", ["interactions.1.skip_tp.weight", "contractions.0.weights_max"])
def test_a_change_of_one_element_is_told_by_element(model: MaceBackbone, ending: str) -> None:
    adapter = attach(model, method("full"))
    part, name = dense_of(adapter, ending)
    path = part.paths[0]
    with torch.no_grad():
        block = part.value.view(-1)[path.start : path.start + path.size]
        if ending.endswith("max"):
            block.view(path.shape)[1] *= 1.5
        else:
            block.view(-1, 3, path.shape[-1])[:, 1] *= 1.5  # channels, elements, channels out
    change = next(c for c in weight_changes(model) if (c.site, c.path) == (name, path.name))
    assert change.elements == pytest.approx({"H": 0.0, "C": 0.5, "O": 0.0})


def test_gates_are_watched_over_data(model: MaceBackbone) -> None:
    adapter = attach(model, method("mmea-pure"))
    graphs = build_graphs(model, frames_of(cluster((1, 6, 8)), cluster((1, 6), 5, seed=2)))
    gates = [part for part in adapter.parts.values() if isinstance(part, GateActivation)]
    with recorded_gates(model) as fresh:
        predict(model, graphs)
    assert fresh and all((gate.mean, gate.std) == ((1.0, 0.0) if gate.quantity == "gain" else (0, 0)) for gate in fresh)
    with torch.no_grad():
        for gate in gates:
            if gate.gain is not None:
                gate.gain.bias.fill_(float(np.log(1.25)))
    expected = predict(model, graphs)
    with recorded_gates(model) as seen:
        again = predict(model, graphs)
    # rounded otherwise: without watching, a layer and its gate are computed together
    np.testing.assert_allclose(again.forces, expected.forces, rtol=0, atol=1e-13)
    gains = [gate for gate in seen if gate.quantity == "gain"]
    assert gains and all(gate.mean == pytest.approx(1.25) and gate.low == pytest.approx(1.25) for gate in gains)
    assert {gate.irrep for gate in gains} >= {"1o"}
    assert all(gate.watcher is None for gate in gates)


def test_likeness_of_two_adapters() -> None:
    first, second, third = (backbone() for _ in range(3))
    for tuned, seed in ((first, 0), (second, 0), (third, 1)):
        perturb(attach(tuned, method("elora"), seed=seed + 1))
        if seed:
            with torch.no_grad():
                for parameter in tuned.model.forcetune_adapter.parameters():
                    parameter.normal_()
    same, other = likeness(first, second), likeness(first, third)
    assert same.weights == pytest.approx(0, abs=1e-12) and same.paths == pytest.approx(0, abs=1e-12)
    assert other.weights > 0.9
    assert (same.shared, same.shared_by_chance) == (pytest.approx(1), pytest.approx(1)), "dense changes"
    strange = backbone(seed=5)
    attach(strange, method("elora"))
    with pytest.raises(InputError, match="different bases"):
        likeness(first, strange)
    detach(strange)
    attach(strange, method("mmea-pure"))
    with pytest.raises(InputError, match="changes no weights"):
        likeness(first, strange)


def test_bases_cut_to_different_elements_are_compared_by_what_they_share() -> None:
    first, second = backbone(elements=(1, 6, 8)), backbone(elements=(1, 6, 8, 9))
    shared = {name for name, value in first.model.named_parameters()} & set(dict(second.model.named_parameters()))
    theirs = dict(second.model.named_parameters())
    with torch.no_grad():
        for name, value in first.model.named_parameters():
            if name in shared and value.shape == theirs[name].shape:
                theirs[name].copy_(value)
    for tuned in (first, second):
        attach(tuned, method("full"))
    assert likeness(first, second).shared == 0
    site = next(site for site in require_adapter(first).sites if all(path.by_element is None for path in site.paths))
    for tuned in (first, second):
        (parameter,) = require_adapter(tuned).part(site, DenseWeight).parameters()
        with torch.no_grad():
            parameter.view(-1)[: site.paths[0].size].add_(0.1)
    alike = likeness(first, second)
    assert alike.shared == 1 and alike.weights == pytest.approx(0, abs=1e-9)


def test_weights_changed_by_two_sparse_adapters_are_counted() -> None:
    first, second = backbone(), backbone()
    generator = torch.Generator().manual_seed(0)
    counts = {"both": 0, "all": 0}
    by_path: list[tuple[int, int, int]] = []
    for tuned in (first, second):
        attach(tuned, method("full"))
    for site in require_adapter(first).sites:
        sizes = []
        for tuned in (first, second):
            (parameter,) = require_adapter(tuned).part(site, DenseWeight).parameters()
            change = (torch.rand(parameter.numel(), generator=generator) < 0.3).double()
            with torch.no_grad():
                parameter.add_(change.view_as(parameter))
            sizes.append(change != 0)
        for path in site.paths:
            one, other = (side[path.start : path.start + path.size] for side in sizes)
            counts["both"] += int((one & other).sum())
            counts["all"] += int((one | other).sum())
            by_path.append((int(one.sum()), int(other.sum()), path.size))
    untouched = backbone(), backbone()
    for tuned in untouched:
        attach(tuned, method("full"))
    nothing = likeness(*untouched)
    assert (nothing.shared, nothing.shared_by_chance) == (0, 0)
    alike = likeness(first, second)
    expected = sum(one * other / size for one, other, size in by_path)
    total = sum(one + other for one, other, _ in by_path)
    assert alike.shared == pytest.approx(counts["both"] / counts["all"])
    assert alike.shared_by_chance == pytest.approx(expected / (total - expected))
    assert alike.shared == pytest.approx(alike.shared_by_chance, abs=0.02), "they were drawn independently"


@pytest.mark.parametrize("weight", ["LowRank", "SoftThreshold", "Gain", "Dense"])
@pytest.mark.parametrize("output", ["Shift", "Gate", "Bottleneck"])
def test_a_weight_has_the_name_of_what_changes_it(model: MaceBackbone, weight: str, output: str) -> None:
    for order in ((weight, output), (output, weight)):
        table = {"linear": [{"update": name} for name in order], "readout": [{"update": output}]}
        perturb(attach(model, custom_method("mine", table)))
        changes = weight_changes(model)
        assert {change.update for change in changes} == {weight}
        assert {change.kind for change in changes} == {"linear"}
        detach(model)


def test_shifts_are_watched_like_gates(model: MaceBackbone) -> None:
    adapter = attach(model, method("bias"))
    perturb(adapter)
    site = next(site for site in adapter.sites if adapter.part(site, ActivationUpdate) is not None)
    shift = adapter.part(site, ActivationUpdate).shift
    graphs = build_graphs(model, frames_of(cluster((1, 6, 8)), cluster((1, 6, 8), seed=8)))
    with recorded_gates(model) as changes:
        predict(model, graphs)
    assert {change.quantity for change in changes} == {"shift"}
    assert {change.irrep for change in changes} == {"0e"}
    of_site = [change for change in changes if change.site == site.name]
    assert sum(change.channels for change in of_site) == shift.numel()
    # every value is the shift over the r.m.s. of the output, one positive factor for the site
    values = shift.detach().numpy()
    (change,) = of_site
    assert change.mean / change.std == pytest.approx(values.mean() / values.std(), rel=1e-10)
    detach(model)
