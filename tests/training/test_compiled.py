"""Compiled steps: loss and every gradient of the eager step, for any batch of a set, and what is reported otherwise."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import forcetune
from forcetune.adapters.attach import attach, require_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.network import NetworkBackbone
from forcetune.config import LossConfig, TrainingConfig
from forcetune.errors import ForcetuneWarning
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from forcetune.graphs.loader import BatchLoader
from forcetune.kernels import recording
from forcetune.kernels.recording import CompileError
from forcetune.training import compiled, replay_head
from forcetune.training.compiled import CompiledStep, CompiledTraining, Workers, choose_layouts, frames_of_part
from forcetune.training.losses import label_weights
from forcetune.training.replay_head import ReplayHead
from forcetune.training.train import train
from systems import backbone, cluster, crystal, frames_of, library, perturb, write_labelled, write_model
from terminal import Command

SMALL = {"max_ell": 1, "correlation": 2, "hidden_irreps": "4x0e+4x1o", "elements": (1, 6, 7, 8)}
MOLECULES = [cluster(seed=seed, atoms=5 + seed % 3) for seed in range(9)]
CRYSTALS = [crystal(seed=seed) for seed in range(5)]


def tuned(name: str, **options: Any) -> MaceBackbone:
    """A small model with an adapter that is no longer that of the start."""
    model = backbone(**SMALL | options)
    perturb(attach(model, method(name)))
    return model


def with_labels(graphs: Sequence[Batch], seed: int = 0) -> list[Batch]:
    """Random labels; some are missing."""
    generator = torch.Generator().manual_seed(seed)
    frames_with_labels = []
    for index, graph in enumerate(graphs):
        forces = torch.randn(graph.forces.shape, generator=generator, dtype=torch.float64).to(graph.forces)
        stress = torch.randn(graph.stress.shape, generator=generator, dtype=torch.float64).to(graph.stress)
        if index % 4 == 3:
            forces[1:] = torch.nan
        energy = torch.randn(1, generator=generator, dtype=torch.float64) if index % 3 else graph.energy
        labels = {"energy": energy, "forces": forces, "stress": stress}
        own = 0.5 + torch.rand(1, 4, generator=generator, dtype=torch.float64)
        frames_with_labels.append(replace(graph, **labels, weight=graph.weight + index % 2, file_weights=own))
    return frames_with_labels


def step_of(
    model: MaceBackbone, graphs: Sequence[Batch], config: LossConfig, frames: int, *, head: ReplayHead | None = None
) -> CompiledStep:
    parameters = [*require_adapter(model).parameters(), *(head.parameters() if head else ())]
    training = TrainingConfig(batch_size=frames)
    layouts = choose_layouts(model, training, BatchLoader(graphs, frames), frames_of_part(frames, 7, 2))
    return CompiledStep(model, head, config, layouts, parameters, Workers(frames))


def gradients(step: CompiledStep, loss: torch.Tensor) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(loss, step.parameters, allow_unused=True))


def assert_eager(step: CompiledStep, batch: Batch, tolerance: float = 1e-10) -> None:
    """Loss and gradients are those of the eager step."""
    loss = step.loss(batch)
    assert loss is not None
    eager = step._eager(batch, label_weights(step.config, batch))
    mine, expected = gradients(step, loss), gradients(step, eager)
    assert [one is None for one in mine] == [one is None for one in expected]
    largest = max(float(one.abs().max()) for one in expected if one is not None)
    assert float(loss.detach()) == pytest.approx(float(eager.detach()), rel=tolerance)
    assert largest > 0
    for one, two in zip(mine, expected, strict=True):
        if one is not None and two is not None:
            assert float((one - two).abs().max()) <= tolerance * largest


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["mmea", "elora", "sparse", "full", "gain"])
def test_loss_and_every_gradient_are_those_of_the_eager_step(name: str, two_threads: None) -> None:
    model = tuned(name)
    graphs = with_labels(build_graphs(model, frames_of(*MOLECULES)))
    step = step_of(model, graphs, LossConfig(energy_per_atom=True), 4)
    assert_eager(step, collate(graphs[:4]))
    assert [one.operations > 100 for one in step.recordings.values()] == [True]
    perturb(require_adapter(model), seed=6)
    assert_eager(step, collate(graphs[4:8]))
    assert_eager(step, collate([graphs[8], graphs[0], graphs[3], graphs[5]]))
    # the last batch of an epoch has fewer frames
    assert_eager(step, collate(graphs[6:8]))
    assert_eager(step, collate(graphs[7:8]))


def test_parts_that_differ_by_a_frame_are_not_filled_up(two_threads: None) -> None:
    model = tuned("mmea")
    graphs = with_labels(build_graphs(model, frames_of(*MOLECULES)))
    step = step_of(model, graphs, LossConfig(energy_per_atom=True), 5)
    assert_eager(step, collate(graphs[:5]))
    assert sorted(layout.frames for layout in step.recordings) == [2, 3]
    assert_eager(step, collate(graphs[5:]))
    # two frames, and four in two parts, need no third size
    assert_eager(step, collate(graphs[2:4]))
    assert_eager(step, collate(graphs[2:6]))
    assert_eager(step, collate(graphs[2:3]))
    assert len(step.recordings) == 2


def test_the_worse_filled_of_two_layouts_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned("mmea")
    structures = [cluster(atoms=12, seed=1), *(cluster(atoms=5, seed=seed) for seed in range(9))]
    loader = BatchLoader(with_labels(build_graphs(model, frames_of(*structures))), 5)
    config = TrainingConfig(batch_size=5)
    monkeypatch.setattr(compiled, "SMALLEST_FILL", 0.0)
    small, large = (layout.fill for layout in choose_layouts(model, config, loader, 3))
    assert small < large
    monkeypatch.setattr(compiled, "SMALLEST_FILL", (small + large) / 2)
    with pytest.raises(CompileError, match="would be filling"):
        choose_layouts(model, config, loader, 3)


@pytest.mark.parametrize(
    "first, later, options",
    [
        ("RealAgnosticInteractionBlock", "RealAgnosticResidualInteractionBlock", {"pair_repulsion": True}),
        ("RealAgnosticDensityInteractionBlock", "RealAgnosticDensityResidualInteractionBlock", {}),
    ],
)
def test_periodic_frames_with_stress_and_other_blocks(first: str, later: str, options: dict[str, Any]) -> None:
    model = tuned("mmea", first=first, later=later, **options)
    graphs = with_labels(build_graphs(model, frames_of(*CRYSTALS)))
    step = step_of(model, graphs, LossConfig(stress=10.0, form="huber"), 2)
    assert_eager(step, collate(graphs[:2]))
    assert_eager(step, collate(graphs[2:4]))
    assert_eager(step, collate(graphs[4:5]))


def test_single_precision(two_threads: None) -> None:
    """Within 1e-3 of the largest gradient: sums come in another order."""
    model = backbone(**SMALL | {"dtype": torch.float32})
    perturb(attach(model, method("mmea")))
    graphs = with_labels(build_graphs(model, frames_of(*MOLECULES)))
    step = step_of(model, graphs, LossConfig(), 4)
    assert_eager(step, collate(graphs[:4]), 1e-3)
    assert_eager(step, collate(graphs[4:8]), 1e-3)


def test_replay_frames_with_a_head_of_their_own(two_threads: None) -> None:
    model = tuned("elora")
    graphs = with_labels(build_graphs(model, frames_of(*MOLECULES)))
    graphs = [graph.for_replay() if index % 2 else graph for index, graph in enumerate(graphs)]
    head = ReplayHead(model.n_scalars, seed=0, dtype=model.dtype, device=model.device)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.full_like(parameter, 0.1))
    step = step_of(model, graphs, LossConfig(), 4, head=head)
    assert_eager(step, collate(graphs[:4]))
    assert_eager(step, collate(graphs[5:9]))


def test_a_batch_that_is_not_of_the_set_is_left_to_the_eager_step() -> None:
    model = tuned("readout")
    graphs = with_labels(build_graphs(model, frames_of(*MOLECULES)))
    step = step_of(model, graphs, LossConfig(), 2)
    other = with_labels(build_graphs(model, frames_of(*CRYSTALS)))
    assert step.loss(collate([other[0], graphs[0]])) is None
    assert_eager(step, collate(graphs[1:3]))
    assert step.loss(collate([graphs[0], other[0]])) is None


def test_a_graph_of_one_batch_only_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is a number while it is recorded becomes part of the graph; what depends on values cannot be recorded."""
    model = tuned("readout")
    graphs = with_labels(build_graphs(model, frames_of(*MOLECULES)))
    original = replay_head.compute_loss
    values = {"factor": 1.0}
    monkeypatch.setattr(replay_head, "compute_loss", lambda *a, **k: original(*a, **k) * values["factor"])
    other = step_of(model, graphs, LossConfig(), 2)
    assert other.loss(collate(graphs[:2])) is not None
    values["factor"] = 2.0
    with pytest.raises(CompileError, match="off the eager one"):
        other.loss(collate(graphs[2:4]))

    def decides(config: Any, prediction: Any, batch: Batch, **more: Any) -> torch.Tensor:
        return original(config, prediction, batch, **more) * float(batch.forces.nan_to_num().abs().max())

    monkeypatch.setattr(replay_head, "compute_loss", decides)
    with pytest.raises(CompileError, match="depends on values"):
        step_of(model, graphs, LossConfig(), 2).loss(collate(graphs[:2]))

    def chooses(config: Any, prediction: Any, batch: Batch, **more: Any) -> torch.Tensor:
        return original(config, prediction, batch, **more) + prediction.energy[~torch.isnan(batch.energy)].sum()

    monkeypatch.setattr(replay_head, "compute_loss", chooses)
    with pytest.raises(CompileError, match="depends on values"):
        step_of(model, graphs, LossConfig(), 2).loss(collate(graphs[:2]))


def reason(model: NetworkBackbone, graphs: Sequence[Batch], **options: Any) -> CompileError:
    config = TrainingConfig.model_validate({"batch_size": 3, "compile": "on"} | options)
    loader = BatchLoader(graphs, config.batch_size)
    with pytest.raises(CompileError) as caught:
        CompiledTraining(model, None, config, loader, list(require_adapter(model).parameters()))
    return caught.value


def test_reasons_for_eager_steps() -> None:
    model = tuned("readout")
    graphs = with_labels(build_graphs(model, frames_of(*MOLECULES)))
    off = reason(model, graphs, compile="off")
    assert "compile=off" in str(off) and off.wanted
    short = reason(model, graphs, compile="auto", epochs=20)
    assert "60 steps" in str(short) and short.wanted
    packed = reason(model, graphs, batch_atoms=30)
    assert "packed by a budget" in str(packed) and not packed.wanted
    uneven = build_graphs(model, frames_of(*[cluster(atoms=2, seed=seed) for seed in range(9)], cluster(atoms=27)))
    assert "would be filling" in str(reason(model, uneven))
    slow = library(**SMALL)
    attach(slow, method("readout"))
    assert "do not cover" in str(reason(slow, graphs))


def test_stages_are_compiled_where_they_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "PAYS_AFTER", 10)
    model = tuned("readout")
    graphs = with_labels(build_graphs(model, frames_of(*MOLECULES)))
    config = TrainingConfig.model_validate({"batch_size": 3, "epochs": 6, "second_stage": {"start": 5}})
    loader = BatchLoader(graphs, 3)
    actual = CompiledTraining(model, None, config, loader, list(require_adapter(model).parameters()))
    batch = collate(graphs[:3])
    assert actual.loss(config.second_stage.loss, batch) is None and actual.operations == 0
    assert actual.loss(config.loss, batch) is not None and actual.operations > 100


def test_training_goes_the_same_way(tmp_path: Path, two_threads: None) -> None:
    weights = []
    for choice in ("off", "on"):
        model = backbone(**SMALL)
        adapter = attach(model, method("mmea"))
        graphs = with_labels(build_graphs(model, frames_of(*MOLECULES)))
        config = TrainingConfig.model_validate({"epochs": 3, "batch_size": 4, "compile": choice})
        (tmp_path / choice).mkdir()
        outcome = train(model, config, 1e-2, graphs, graphs[:2], tmp_path / choice, lambda _: None)
        assert (outcome.traced_operations > 0) == (choice == "on")
        assert (outcome.untraced is None) == (choice == "on")
        weights.append({key: value.clone() for key, value in adapter.state_dict().items()})
    moved = max(float(value.abs().max()) for value in weights[0].values())
    for name, value in weights[0].items():
        assert float((value - weights[1][name]).abs().max()) < 1e-7 * moved


def test_a_run_says_how_its_steps_were(tmp_path: Path, command: Command) -> None:
    frames, model = write_labelled(tmp_path / "frames.xyz", 12), write_model(tmp_path / "small.model", **SMALL)
    arguments = ("fit", frames, "--model", model, "--valid", "4", "--epochs", "2", "--method", "readout")
    code, _, err = command(*arguments, "--out", tmp_path / "on", "--compile", "on")
    assert code == 0 and "eager" not in err
    training = json.loads((tmp_path / "on" / "results.json").read_text())["training"]
    assert training["traced_operations"] > 100 and training["untraced"] is None
    code, _, err = command(*arguments, "--out", tmp_path / "auto")
    assert code == 0 and "eager" not in err
    training = json.loads((tmp_path / "auto" / "results.json").read_text())["training"]
    assert training["traced_operations"] == 0 and "before compiling pays" in training["untraced"]
    code, _, err = command(
        *arguments, "--out", tmp_path / "packed", "--compile", "on", "--set", "training.batch_atoms=40"
    )
    assert code == 0 and "training steps are eager, not compiled (training.compile): its batches are packed" in err
    code, _, err = command(*arguments, "--out", tmp_path / "no", "--compile", "yes")
    assert code == 2 and "compile" in err


def test_steps_that_turn_out_uncompilable_go_on_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no recording today")

    monkeypatch.setattr(recording.Operations, "graph", refuses)
    frames, model = write_labelled(tmp_path / "frames.xyz", 12), write_model(tmp_path / "small.model", **SMALL)
    settings = {"training.compile": "on", "method.name": "readout"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = forcetune.fit(frames, model=model, valid=4, epochs=2, out=tmp_path / "run", settings=settings)
    assert any(w.category is ForcetuneWarning and "no recording today" in str(w.message) for w in caught)
    assert run.results["status"] == "finished" and "no recording today" in run.results["training"]["untraced"]
