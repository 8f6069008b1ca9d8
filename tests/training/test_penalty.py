"""Penalties on changes of the foundation model: values, gradients, what refuses them, and what they do to a fit."""

from __future__ import annotations

import csv
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forcetune
from forcetune.adapters.attach import attach, disable_adapter, require_adapter
from forcetune.adapters.methods import method
from forcetune.adapters.updates import ActivationUpdate, WeightUpdate
from forcetune.adapters.updates.dense import DenseWeight
from forcetune.adapters.updates.gate import GateActivation
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.config import LossConfig, PenaltyConfig, TrainingConfig
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.frames.frame import Frame
from forcetune.graphs.graph import Batch, collate
from forcetune.training.anchor import (
    AnchorFrames,
    anchor_key,
    estimate_fisher,
    frame_gradients,
    make_anchor,
    read_anchor,
    save_anchor,
)
from forcetune.training.losses import compute_loss
from forcetune.training.penalty import Penalty, check_penalty
from forcetune.training.train import train
from systems import backbone, cluster, crystal, frames_of, perturb, write_labelled, write_model
from terminal import Command

SMALL = {"max_ell": 1, "correlation": 2, "hidden_irreps": "4x0e+4x1o", "elements": (1, 6, 7, 8)}
FRAMES: list[Frame] = frames_of(cluster(atoms=5), cluster(atoms=4, seed=8), crystal())
ALL = {"l2sp": 0.7, "ewc": 1.3, "gates": 0.4}


def penalty_of(
    name: str, terms: dict[str, Any], *, moved: float = 0.1, **training: Any
) -> tuple[Penalty, MaceBackbone]:
    """The penalty of a small model whose adapter was moved away from its start."""
    model = backbone(**SMALL)
    adapter = attach(model, method(name))
    config = TrainingConfig.model_validate({"penalty": terms, **training})
    anchor = make_anchor(model, config, AnchorFrames(FRAMES, "training frames"))
    if moved:
        perturb(adapter, moved)
    return Penalty(config.penalty, model, anchor), model


def gradient(penalty: Penalty, model: MaceBackbone) -> torch.Tensor:
    parameters = list(require_adapter(model).parameters())
    pulls = torch.autograd.grad(penalty.compute(), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if pull is None else pull).reshape(-1) for p, pull in zip(parameters, pulls, strict=True)]
    )


def terms_for(name: str) -> dict[str, float]:
    """All terms that a method can take."""
    without = {"mmea-pure": ("l2sp", "ewc"), "bias": ("l2sp", "ewc")}.get(name, () if name == "mmea" else ("gates",))
    return {term: value for term, value in ALL.items() if term not in without}


@pytest.mark.parametrize("name", ["full", "elora", "mmea", "mmea-pure", "sparse", "gain", "bias", "lora"])
def test_gradients_are_those_of_finite_differences_and_nothing_at_the_start(name: str) -> None:
    penalty, model = penalty_of(name, terms_for(name))
    parameters = list(require_adapter(model).parameters())
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = float(gradient(penalty, model) @ torch.cat([d.reshape(-1) for d in directions]))
    values = []
    for sign in (1, -2, 1):  # ahead, behind, and back where it was
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(sign * 1e-6 * direction)
        values.append(float(penalty.compute().detach()))
    # a threshold that an entry crosses meanwhile bends the curve a little
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
    assert float(penalty.compute().detach()) > 0
    start, model = penalty_of(name, terms_for(name), moved=0.0)
    if name != "sparse":  # whose changes start as noise
        assert float(start.compute().detach()) == 0.0
        assert not gradient(start, model).any()


def test_l2_sp_of_a_dense_weight_has_the_closed_form() -> None:
    penalty, model = penalty_of("full", {"l2sp": 0.7})
    adapter = require_adapter(model)
    parameters = dict(model.model.named_parameters())
    squares = 0.0
    penalty.compute().backward()
    for site in adapter.sites:
        part = adapter.part(site, WeightUpdate)
        assert isinstance(part, DenseWeight)
        change = part.value.detach() - parameters[site.name]
        squares += float(change.square().sum())
        assert part.value.grad is not None
        assert torch.allclose(part.value.grad, 0.7 * change, rtol=1e-12, atol=0)
    assert penalty.terms().l2sp == pytest.approx(0.35 * squares, rel=1e-12)


def test_l2_sp_means_the_same_for_every_way_of_changing_a_weight() -> None:
    """A change made by low rank costs what the same change costs when every weight is trained."""
    low_rank, tuned = penalty_of("lora", {"l2sp": 1.0})
    dense, other = penalty_of("full", {"l2sp": 1.0}, moved=0.0)
    parameters = dict(tuned.model.named_parameters())
    with torch.no_grad():
        for site in require_adapter(tuned).sites:
            part = require_adapter(tuned).part(site, WeightUpdate)
            if part is not None:
                require_adapter(other).part(site, WeightUpdate).value.copy_(part(parameters[site.name]))
    assert float(dense.compute().detach()) == pytest.approx(float(low_rank.compute().detach()), rel=1e-12)


def fisher_graphs(model: MaceBackbone, count: int = 3) -> list[Batch]:
    return list(build_graphs(model, FRAMES[:count]))


def exact_fisher(model: MaceBackbone, graphs: list[Batch], loss: LossConfig) -> torch.Tensor:
    """Σ 2 w_k (∂f_k/∂W)² by a backward pass for every output."""
    parameters = [p.requires_grad_() for p in model.model.parameters()]
    atoms = sum(graph.n_atoms for graph in graphs)
    periodic = sum(bool(graph.cell.any()) for graph in graphs)
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for graph in graphs:
        prediction = model.predict(graph, stress=loss.stress_weight > 0, create_graph=True)
        energy_weight = loss.energy / (graph.n_atoms**2 if loss.energy_per_atom else 1) / len(graphs)
        outputs = [(prediction.energy[0], energy_weight)]
        outputs += [(one, loss.forces / (3 * atoms)) for one in prediction.forces.reshape(-1)]
        if loss.stress_weight and bool(graph.cell.any()):
            assert prediction.stress is not None
            outputs += [(one, loss.stress_weight / (9 * periodic)) for one in prediction.stress.reshape(-1)]
        for output, weight in outputs:
            pulls = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, pulls, strict=True)]
            total += 2 * weight * torch.cat([g.reshape(-1) for g in flat]).square()
    return total


def by_parameter(model: MaceBackbone, fisher: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([fisher[name].reshape(-1) for name, _ in model.model.named_parameters()])


def test_the_fisher_information_of_energies_alone_is_exact() -> None:
    model = backbone(**SMALL)
    graphs = fisher_graphs(model)
    loss = LossConfig(energy=3.0, forces=0.0, energy_per_atom=True)
    estimate = by_parameter(model, estimate_fisher(model, graphs, loss, 1, 0))
    assert torch.allclose(estimate, exact_fisher(model, graphs, loss), rtol=1e-10, atol=1e-14)


def test_the_fisher_information_is_the_mean_over_random_signs() -> None:
    """All signs of a few outputs give the exact sum: the estimate is unbiased; many draws come near to it."""
    model = backbone(**SMALL)
    graphs = fisher_graphs(model)
    loss = LossConfig(energy=3.0, forces=20.0, stress=400.0)
    expected = exact_fisher(model, graphs, loss)
    outputs = model.predict(graphs[1], create_graph=True).forces[:3].reshape(-1)
    weights = list(model.model.parameters())
    mean = (
        sum(
            torch.cat([(0 * w if g is None else g.square()).reshape(-1) for w, g in zip(weights, pulls, strict=True)])
            for signs in itertools.product((-1.0, 1.0), repeat=9)
            for pulls in [frame_gradients(outputs, weights, torch.tensor(signs), keep=True)]
        )
        / 2**9
    )
    single = sum(
        torch.cat([(0 * w if g is None else g.square()).reshape(-1) for w, g in zip(weights, pulls, strict=True)])
        for k in range(9)
        for pulls in [frame_gradients(outputs, weights, torch.eye(9)[k], keep=True)]
    )
    assert isinstance(mean, torch.Tensor) and isinstance(single, torch.Tensor)
    assert torch.allclose(mean, single, rtol=1e-9, atol=1e-16)
    estimate = by_parameter(model, estimate_fisher(model, graphs, loss, 40, 4))
    assert float(estimate.sum()) == pytest.approx(float(expected.sum()), rel=0.3)
    assert np.corrcoef(estimate.detach(), expected.detach())[0, 1] > 0.9


def test_the_fisher_information_of_virials_for_each_atom() -> None:
    """With the same signs: that of the stress times the square of the volume for each atom."""
    model = backbone(**SMALL)
    (graph,) = (one for one in fisher_graphs(model) if bool(one.cell.any()))
    loss = LossConfig(energy=0.0, forces=0.0, stress=400.0)
    stress = by_parameter(model, estimate_fisher(model, [graph], loss, 1, 0))
    loss = loss.model_copy(update={"stress_per_atom": True})
    virials = by_parameter(model, estimate_fisher(model, [graph], loss, 1, 0))
    volume = float(torch.linalg.det(graph.cell).abs()) / graph.n_atoms
    assert float(stress.sum()) > 0
    assert torch.allclose(virials, volume**2 * stress, rtol=1e-10, atol=0.0)


def test_ewc_is_the_second_order_cost_of_replay_with_labels_of_the_base() -> None:
    """A change of one weight costs what frames labelled by the foundation model would add to the loss."""
    loss = LossConfig(energy=2.0, forces=30.0)
    model = backbone(**SMALL)
    graphs = fisher_graphs(model, 2)
    exact = exact_fisher(model, graphs, loss)
    batch = collate(graphs)
    own = model.predict(batch).detached()
    batch = replace(batch, energy=own.energy, forces=own.forces)
    position = compared = 0
    with torch.no_grad():
        for parameter in model.model.parameters():
            place = int(exact[position : position + parameter.numel()].argmax())
            curvature = float(exact[position + place])
            position += parameter.numel()
            if curvature < 1e-3:
                continue
            compared += 1
            flat = parameter.view(-1)
            before, costs = float(flat[place]), []
            for step in (1e-4, -1e-4):
                flat[place] = before + step
                costs.append(float(compute_loss(loss, model.predict(batch).detached(), batch)))
            flat[place] = before
            assert sum(costs) / 2 == pytest.approx(0.5 * curvature * 1e-8, rel=1e-3)
    assert compared > 5


def test_ewc_weighs_each_weight_by_its_information() -> None:
    penalty, model = penalty_of("full", {"ewc": 1.3, "probes": 2}, loss={"forces": 50.0}, seed=5)
    fisher = estimate_fisher_without_adapter(TrainingConfig(loss=LossConfig(forces=50.0), seed=5), probes=2)
    adapter, parameters = require_adapter(model), dict(model.model.named_parameters())
    changes = {
        site.name: (adapter.part(site, WeightUpdate).value - parameters[site.name]).detach() for site in adapter.sites
    }
    expected = sum(float((fisher[name] * change.square()).sum()) for name, change in changes.items())
    assert penalty.terms().ewc == pytest.approx(0.65 * expected, rel=1e-10)
    assert (penalty.terms().l2sp, penalty.terms().gates) == (None, None)


def estimate_fisher_without_adapter(config: TrainingConfig, probes: int) -> dict[str, torch.Tensor]:
    model = backbone(**SMALL)
    return estimate_fisher(model, fisher_graphs(model), config.loss, probes, config.seed)


def test_gates_cost_their_distance_from_one() -> None:
    """Constant gates: gains of 2 and shifts of c cost 1 for each gain and (c / σ)² for each shift."""
    penalty, model = penalty_of("mmea-pure", {"gates": 0.4}, moved=0.0)
    adapter = require_adapter(model)
    shift, seen, expected = 0.25, {}, 0.0
    gates = {
        site.name: (model.model.get_submodule(site.reader), part)
        for site in adapter.sites
        if isinstance(part := adapter.part(site, ActivationUpdate), GateActivation)
    }
    handles = [
        layer.register_forward_hook(lambda *of, name=name: seen.__setitem__(name, of[2]))
        for name, (layer, _) in gates.items()
    ]
    with disable_adapter(model):
        model.predict(collate(build_graphs(model, FRAMES)))
    for handle in handles:
        handle.remove()
    for name, (_, gate) in gates.items():
        with torch.no_grad():
            if gate.gain is not None:
                gate.gain.bias.fill_(math.log(2))
                expected += gate.gain.bias.numel()
            if gate.shift is not None:
                gate.shift.bias.fill_(shift)
        for block in gate.blocks_out if gate.shift is not None else ():
            if block.is_even_scalar:
                values = seen[name][..., block.start : block.stop]
                expected += block.multiplicity * shift**2 / float(values.detach().square().mean())
    assert penalty.terms().gates == pytest.approx(0.2 * expected, rel=1e-10)


def test_an_anchor_comes_back_from_its_file_only_for_the_same_run(tmp_path: Path) -> None:
    penalty, model = penalty_of("mmea", ALL)
    config = TrainingConfig.model_validate({"penalty": ALL})
    key = anchor_key(config, model.base.fingerprint, "data", {})
    save_anchor(tmp_path / "a.safetensors", penalty.anchor, key)
    again = read_anchor(tmp_path / "a.safetensors", key, model.device)
    assert again is not None and (again.source, again.n_frames) == ("training frames", 3)
    assert Penalty(config.penalty, model, again).terms() == penalty.terms()
    other = TrainingConfig.model_validate({"penalty": ALL, "seed": 2})
    assert (
        read_anchor(tmp_path / "a.safetensors", anchor_key(other, model.base.fingerprint, "data", {}), model.device)
        is None
    )
    (tmp_path / "a.safetensors").write_bytes(b"cut short")
    assert read_anchor(tmp_path / "a.safetensors", key, model.device) is None


@pytest.mark.parametrize(
    ("name", "term", "message"),
    [
        (
            "mmea-pure",
            "l2sp",
            r"penalty.l2sp: method mmea-pure changes no weights.*use training.penalty.gates",
        ),
        ("bias", "ewc", r"training.penalty.ewc: method bias changes no weights.*use training.penalty.gates"),
        ("elora", "gates", r"training.penalty.gates: method elora has no gates.*use training.penalty.l2sp"),
        ("adapter", "gates", r"training.penalty.gates: method adapter has no gates"),
        ("adapter", "l2sp", r"training.penalty.l2sp: method adapter changes no weights.*leave it out"),
        ("scratch", "l2sp", r"method scratch starts from random values.*no foundation model to stay near"),
    ],
)
def test_terms_that_a_method_cannot_take_are_refused_by_name(name: str, term: str, message: str) -> None:
    sites = backbone(**SMALL).sites()
    with pytest.raises(InputError, match=message):
        check_penalty(PenaltyConfig.model_validate({term: 1.0}), method(name), sites)
    check_penalty(PenaltyConfig(), method(name), sites)


def test_compiled_and_eager_steps_go_the_same_way(tmp_path: Path) -> None:
    weights, rows = [], []
    for choice in ("off", "on"):
        model = backbone(**SMALL)
        adapter = attach(model, method("mmea"))
        config = TrainingConfig.model_validate({"epochs": 3, "batch_size": 3, "compile": choice, "penalty": ALL})
        frames = frames_of(*(cluster(seed=seed, atoms=5 + seed % 3) for seed in range(6)))
        labels = torch.Generator().manual_seed(2)
        graphs = [
            replace(
                graph,
                energy=torch.randn(1, generator=labels, dtype=torch.float64),
                forces=torch.randn(graph.forces.shape, generator=labels, dtype=torch.float64),
            )
            for graph in build_graphs(model, frames)
        ]
        penalty = Penalty(config.penalty, model, make_anchor(model, config, AnchorFrames(frames, "training frames")))
        (tmp_path / choice).mkdir()
        outcome = train(model, config, 1e-2, graphs, graphs[:2], tmp_path / choice, lambda _: None, penalty=penalty)
        assert (outcome.traced_operations > 0) == (choice == "on")
        weights.append({key: value.clone() for key, value in adapter.state_dict().items()})
        with (tmp_path / choice / "metrics.csv").open(encoding="utf-8") as stream:
            rows.append([float(row["train_penalty"]) for row in csv.DictReader(stream)])
    moved = max(float(value.abs().max()) for value in weights[0].values())
    for key, value in weights[0].items():
        assert float((value - weights[1][key]).abs().max()) < 1e-7 * moved
    assert rows[0] == pytest.approx(rows[1], rel=1e-6) and rows[0][0] > 0


def test_a_run_with_a_penalty_moves_less_and_says_what_it_cost(tmp_path: Path, command: Command) -> None:
    frames, model = write_labelled(tmp_path / "frames.xyz", 12), write_model(tmp_path / "small.model")
    others = write_labelled(tmp_path / "others.xyz", 5, seed=3)
    moved, results = {}, {}
    for name, settings in {
        "free": {},
        "l2sp": {"training.penalty.l2sp": 1e4},
        "ewc": {"training.penalty.ewc": 100.0, "training.penalty.data": [str(others)]},
    }.items():
        options = {"training.seed": 2, "training.refine": 2, **settings}
        run = forcetune.fit(
            frames, model=model, method="full", valid=4, epochs=4, out=tmp_path / name, settings=options
        )
        moved[name] = sum((row["relative"] or 0) ** 2 for row in run.results["changes"])
        results = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))
        if name == "free":
            assert "penalty" not in results
        else:
            assert results["penalty"][name] > 0
        assert run.results["status"] == "finished"
    assert results["penalty"]["source"] == "penalty frames" and results["penalty"]["n_frames"] == 5
    assert moved["l2sp"] < 0.5 * moved["free"] and moved["ewc"] < 0.9 * moved["free"]
    page = (tmp_path / "ewc" / "report.html").read_text(encoding="utf-8")
    assert "Penalty" in page and "5 penalty frames" in page
    start = ("fit", frames, "--model", model, "--out", tmp_path / "run", "--valid", "4", "--epochs", "1")
    for setting, message in (
        ("training.penalty.l2sp=-1", "training.penalty.l2sp"),
        ("training.penalty.data=[a.xyz]", "penalty.data names frames for ewc and gates"),
        ("training.penalty.gates=1", "method elora has no gates"),
    ):
        code, _, err = command(*start, "--method", "elora", "--set", setting)
        assert code == 2 and message in err, err
        assert not (tmp_path / "run").exists()
    code, _, err = command(*start, "--method", "mmea", "--set", "training.penalty.l2sp=1")
    assert code == 0 and "gates and shifts are free to change (training.penalty.gates holds them back)" in err
