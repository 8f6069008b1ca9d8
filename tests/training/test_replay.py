"""Replay: whose labels at which zero, how frames are mixed, what it does to a fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import write

import forcetune
from forcetune.config import DataConfig, LossConfig, ReplayConfig, TrainingConfig
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.frames.read import read_frames
from forcetune.graphs.graph import collate
from forcetune.graphs.loader import BatchLoader
from forcetune.training.losses import compute_loss
from forcetune.training.replay import MOST_HELD, Replay, prepare_replay, read_replay
from forcetune.training.replay_head import replay_head
from systems import backbone, write_labelled, write_model
from terminal import Command

DATA = DataConfig(train=["x.xyz"])
ZERO = {1: -13.0, 6: -1030.0, 8: -2040.0}


def other_molecules(path: Path, count: int = 10, *, labels: bool = True) -> Path:
    """Shaken molecules of several compositions; energies of a level of theory with a zero of its own."""
    rng = np.random.default_rng(4)
    structures = []
    for index in range(count):
        atoms = molecule(["CH4", "H2O", "CH3CH2OH", "H2CO"][index % 4])
        shift = 0.05 * rng.standard_normal(atoms.positions.shape)
        atoms.positions += shift
        if labels:
            atoms.info["energy"] = float((shift**2).sum()) + sum(ZERO[int(z)] for z in atoms.numbers)
            atoms.arrays["forces"] = -2 * shift
        structures.append(atoms)
    write(path, structures, format="extxyz")
    return path


def prepared(config: ReplayConfig) -> tuple[Replay, Any]:
    model = backbone(elements=(1, 6, 8))
    replay = read_replay(config, DATA)
    assert replay is not None
    references = {z: energy + 7.0 * z for z, energy in model.reference_energies.items()}
    return prepare_replay(replay, config, TrainingConfig(), model, references), model


def test_labels_of_the_base_are_its_interaction_energy_at_the_zero_of_the_run(tmp_path: Path) -> None:
    config = ReplayConfig(data=[str(other_molecules(tmp_path / "a.xyz", labels=False))], weight=3.0)
    replay, model = prepared(config)
    assert (len(replay.graphs), len(replay.held)) == (8, 2)
    bare = [replace(frame, energy=None, forces=None) for frame in replay.held]
    own = predict(model, build_graphs(model, bare))
    for index, frame in enumerate(replay.held):
        expected = own.energy[index] + 7.0 * frame.numbers.sum()
        assert frame.energy == pytest.approx(expected, abs=1e-9)
    batch = collate(replay.graphs)
    prediction = model.predict(batch)
    moved = torch.zeros(batch.n_graphs, dtype=torch.float64).index_add(
        0, batch.graph_index, 7.0 * batch.numbers.double()
    )
    assert torch.allclose(prediction.energy + moved, batch.energy, atol=1e-9)
    assert torch.allclose(prediction.forces, batch.forces, atol=1e-9)
    assert batch.weight.tolist() == 8 * [3.0]


def test_labels_in_files_get_reference_energies_of_their_own(tmp_path: Path) -> None:
    """Another zero of the same labels leaves the labels of the training as they were."""
    path = other_molecules(tmp_path / "a.xyz")
    replay, model = prepared(ReplayConfig(data=[str(path)], labels="file"))
    moved = []
    for frame in read_frames(path).frames:
        atoms = Atoms(frame.numbers, frame.positions)
        assert frame.energy is not None and frame.forces is not None
        atoms.info["energy"] = frame.energy + 500.0 * sum(int(z == 8) for z in frame.numbers) - 3.0 * len(frame)
        atoms.arrays["forces"] = frame.forces
        moved.append(atoms)
    write(tmp_path / "b.xyz", moved, format="extxyz")
    other, _ = prepared(ReplayConfig(data=[str(tmp_path / "b.xyz")], labels="file"))
    assert other.references[8] - replay.references[8] == pytest.approx(497.0, abs=1e-6)
    for one, two in zip(replay.graphs, other.graphs, strict=True):
        assert float(one.energy) == pytest.approx(float(two.energy), abs=1e-6)
        # by the run's zero the labels lie where the model predicts
        assert (
            abs(float(one.energy) - float(model.predict(one).detached().energy) - 7.0 * float(one.numbers.sum())) < 5.0
        )


def test_a_head_of_its_own_is_for_replay_frames_alone_and_starts_at_nothing(tmp_path: Path) -> None:
    path = str(other_molecules(tmp_path / "a.xyz"))
    replay, model = prepared(ReplayConfig(data=[path], labels="file"))
    assert replay.head is not None
    assert prepared(ReplayConfig(data=[path], labels="file", head="shared"))[0].head is None
    assert prepared(ReplayConfig(data=[path]))[0].head is None
    own = build_graphs(model, read_frames(write_labelled(tmp_path / "b.xyz", 3)).frames)
    batch = collate([own[0], replay.graphs[0], own[1], replay.graphs[1]])
    assert batch.replayed.tolist() == [False, True, False, True]
    plain = model.predict(batch)
    with replay_head(model, replay.head):
        start = model.predict(batch)
    for one, two in zip(start[:2], plain[:2], strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-10)
    with torch.no_grad():
        for parameter in replay.head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    with replay_head(model, replay.head):
        prediction = model.predict(batch, create_graph=True)
        compute_loss(LossConfig(), prediction, batch).backward()
    assert model.extension is None
    of_replay = batch.replayed[batch.graph_index]
    assert torch.allclose(prediction.energy[~batch.replayed], plain.energy[~batch.replayed], rtol=0, atol=1e-10)
    assert torch.allclose(prediction.forces[~of_replay], plain.forces[~of_replay], rtol=0, atol=1e-10)
    assert (prediction.energy - plain.energy)[batch.replayed].abs().min() > 0.01
    assert (prediction.forces - plain.forces)[of_replay].abs().max() > 0.01
    assert all(parameter.grad is not None for parameter in replay.head.parameters())
    # forces are the slope of the energy that the head is part of
    step = torch.zeros_like(batch.positions)
    atom = int(of_replay.nonzero()[0])
    step[atom, 1] = 1e-4
    with replay_head(model, replay.head):
        ends = [model.predict(replace(batch, positions=batch.positions + sign * step)).energy.sum() for sign in (1, -1)]
    assert float(prediction.forces[atom, 1]) == pytest.approx(float((ends[1] - ends[0]).detach() / 2e-4), abs=1e-6)


def test_another_level_of_theory_disturbs_less_with_a_head_of_its_own(tmp_path: Path) -> None:
    """Replay labels that contradict the frames of the run, with and without their own head."""
    frames, model = write_labelled(tmp_path / "frames.xyz", 12), write_model(tmp_path / "small.model")
    others = other_molecules(tmp_path / "others.xyz", 24)
    settings = {"replay.data": [str(others)], "replay.labels": "file", "replay.weight": 5.0, "output.forgetting": False}
    runs = {
        head: forcetune.fit(
            frames,
            model=model,
            method="full",
            valid=4,
            epochs=20,
            out=tmp_path / head,
            settings=settings | {"replay.head": head, "training.learning_rate": 0.01, "training.optimizer": "adam"},
        )
        for head in ("shared", "own")
    }
    assert [run.results["replay"]["head"] for run in runs.values()] == ["shared", "own"]
    errors = {head: run.after["train"].forces_mae_mev_per_ang for head, run in runs.items()}
    assert errors["own"] < 0.9 * errors["shared"]
    tensors = [sorted(path.name for path in (run.folder / "adapter").iterdir()) for run in runs.values()]
    assert tensors[0] == tensors[1]
    assert "their own, not kept" in (runs["own"].folder / "report.html").read_text(encoding="utf-8")


def test_some_frames_are_held_out_and_too_few_are_refused(tmp_path: Path) -> None:
    replay = read_replay(ReplayConfig(data=[str(other_molecules(tmp_path / "a.xyz", 300))]), DATA)
    assert replay is not None and (len(replay.frames), len(replay.held)) == (250, MOST_HELD)
    indices = [frame.origin.index for frame in (*replay.frames, *replay.held)]
    assert sorted(indices) == list(range(300))
    with pytest.raises(InputError, match=r"b\.xyz: replay needs at least 2 frames"):
        read_replay(ReplayConfig(data=[str(other_molecules(tmp_path / "b.xyz", 1))]), DATA)
    with pytest.raises(InputError, match="no energy found"):
        read_replay(ReplayConfig(data=[str(other_molecules(tmp_path / "c.xyz", labels=False))], labels="file"), DATA)
    assert read_replay(ReplayConfig(), DATA) is None


def test_epochs_take_replay_frames_in_turn_and_evenly(tmp_path: Path) -> None:
    model = backbone(elements=(1, 6, 8))
    own = build_graphs(model, read_frames(write_labelled(tmp_path / "a.xyz", 8)).frames)
    other = build_graphs(model, read_frames(other_molecules(tmp_path / "b.xyz", 10)).frames)
    loader = BatchLoader(own, 3, shuffle=True, seed=2, replay=other, replay_ratio=0.5)
    seen: list[int] = []
    for epoch in range(5):
        loader.epoch = epoch
        batches = loader._batches()
        assert [len(batch) for batch in batches] == [3, 3, 3, 3]
        assert all(sum(index >= 8 for index in batch) == 1 for batch in batches)
        flat = [index for batch in batches for index in batch]
        assert sorted(index for index in flat if index < 8) == list(range(8))
        seen += [index for index in flat if index >= 8]
        assert loader._batches() == batches
    # twenty places: each of ten frames twice
    assert sorted(seen) == sorted(2 * list(range(8, 18)))


def test_weights_of_graphs_weigh_the_loss(tmp_path: Path) -> None:
    model = backbone(elements=(1, 6, 8))
    graphs = build_graphs(model, read_frames(write_labelled(tmp_path / "a.xyz", 3)).frames)
    config = LossConfig(forces=0.0)
    single = [float(compute_loss(config, model.predict(graph).detached(), graph)) for graph in graphs]
    batch = collate([graphs[0], graphs[1].weighted(0.5), graphs[2].weighted(2.0)])
    loss = float(compute_loss(config, model.predict(batch).detached(), batch))
    assert loss == pytest.approx((single[0] + 0.5 * single[1] + 2 * single[2]) / 3.5, rel=1e-10)


@pytest.mark.forgetting
def test_replay_keeps_the_model_near_to_its_base(tmp_path: Path) -> None:
    """The same fit with and without replay, judged on the same structures, none of them replayed."""
    frames = write_labelled(tmp_path / "frames.xyz", 12)
    model = write_model(tmp_path / "small.model")
    others = other_molecules(tmp_path / "others.xyz", 24, labels=False)
    moved = {}
    for name, weight in (("light", 1e-6), ("heavy", 10.0)):
        run = forcetune.fit(
            frames,
            model=model,
            method="full",
            valid=4,
            epochs=8,
            out=tmp_path / name,
            settings={"replay.data": [str(others)], "replay.weight": weight, "training.seed": 3},
        )
        distance = run.results["forgetting"]["distance"]
        assert (distance["source"], distance["n_frames"]) == ("replay frames", 4)
        moved[name] = distance["forces_mev_per_ang"]
        assert run.results["replay"]["labels"] == "base"
        assert "<h3>Replay</h3>" in (run.folder / "report.html").read_text(encoding="utf-8")
    assert moved["heavy"] < 0.7 * moved["light"]
    errors = json.loads((tmp_path / "light" / "results.json").read_text(encoding="utf-8"))["errors"]
    assert set(errors) == {"train", "valid"}


def test_bad_replay_is_said_before_anything_is_written(tmp_path: Path, command: Command) -> None:
    frames, model = write_labelled(tmp_path / "a.xyz"), write_model(tmp_path / "small.model")
    run = ("fit", frames, "--model", model, "--out", tmp_path / "run", "--set", "training.epochs=1")
    for setting, message in (
        ("replay.data=[nowhere.xyz]", "there is no such file"),
        ("replay.labels=other", "replay.labels"),
        ("replay.weight=0", "replay.weight"),
        (f"replay.data=[{frames}]", ""),
    ):
        code, _, err = command(*run, "--set", setting)
        assert (code, message in err) == ((2, True) if message else (0, True)), err
        assert (tmp_path / "run").exists() == (not message)
