"""Hessian labels: how they are read, what their loss and its gradient are, and what training on them does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write
from rich.console import Console

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.protocol import Backbone
from forcetune.config import LossConfig
from forcetune.errors import ForcetuneWarning, InputError
from forcetune.evaluation.hessian import STEPS, hessian_errors, hessian_products, predict_hessian
from forcetune.evaluation.metrics import evaluate_frames
from forcetune.frames.frame import FloatArray, Frame
from forcetune.frames.read import read_frames
from forcetune.graphs.graph import build_graph
from forcetune.runs.measuring import Measuring
from forcetune.training.hessian import HessianLoss
from own_labels import shaken
from systems import backbone, cluster, crystal, frames_of, perturb, write_labelled, write_model
from terminal import Command

SMALL = {"max_ell": 1, "correlation": 2, "hidden_irreps": "4x0e+4x1o", "elements": (1, 6, 7, 8)}
LOSS = LossConfig(energy=0, forces=0, hessian=0.5, hessian_directions=3)


def exact_hessian(model: Backbone, frame: Frame) -> FloatArray:
    """By automatic differentiation of the forces."""
    graph = model.place(build_graph(frame, model.cutoff, model.dtype))
    graph = replace(graph, positions=graph.positions.requires_grad_())
    forces = model.predict(graph, create_graph=True).forces.reshape(-1)
    rows = [torch.autograd.grad(-force, graph.positions, retain_graph=True)[0].reshape(-1) for force in forces]
    return torch.stack(rows).double().numpy()


def shifted(model: MaceBackbone, frames: list[Frame], seed: int = 1) -> list[Frame]:
    """Frames with labels that are the model's Hessian and something symmetric."""
    noise = [np.random.default_rng(seed).standard_normal((3 * len(frame),) * 2) for frame in frames]
    return [
        replace(frame, hessian=predict_hessian(model, frame) + one + one.T)
        for frame, one in zip(frames, noise, strict=True)
    ]


@pytest.mark.parametrize("structure", [cluster(atoms=5), crystal()], ids=["cluster", "crystal"])
def test_hessians_are_those_of_automatic_differentiation(structure: Atoms) -> None:
    (frame,) = frames_of(structure)
    model = backbone(**SMALL)
    exact = exact_hessian(model, frame)
    assert np.abs(predict_hessian(model, frame) - exact).max() < 1e-6 * np.abs(exact).max()
    direction = np.random.default_rng(0).standard_normal((len(frame), 3))
    ((moved, product),) = hessian_products(model, [(frame, direction)])
    assert np.abs(product.numpy() - exact @ moved).max() < 1e-6 * np.abs(exact @ moved).max()


def test_steps_suit_the_precision_of_the_model() -> None:
    """Far from the origin, too: positions are rounded, and the direction is that of the rounded ones."""
    (frame,) = frames_of(*shaken(1, periodic=False))
    frame = replace(frame, positions=frame.positions + 20.0)
    exact = exact_hessian(forcetune.load("mini", dtype="float64"), frame)
    direction = np.random.default_rng(0).standard_normal((len(frame), 3))
    for dtype, bound in (("float64", 1e-8), ("float32", 1e-3)):
        model = forcetune.load("mini", dtype=dtype)
        ((moved, product),) = hessian_products(model, [(frame, direction)])
        assert 0 < np.abs(moved - direction.ravel()).max() < 2e-6 / STEPS[model.dtype]
        assert np.abs(product.numpy() - exact @ moved).max() < bound * np.abs(exact @ moved).max()


def test_the_loss_is_the_mean_square_of_the_errors_of_entries() -> None:
    model = backbone(**SMALL)
    frames = shifted(model, frames_of(cluster(atoms=3), cluster(atoms=4)))
    frames[1] = replace(frames[1], hessian=frames[0].hessian, numbers=frames[0].numbers, positions=frames[0].positions)
    term = HessianLoss(model, frames, [], seed=3)
    many = LOSS.model_copy(update={"hessian": 1.0, "hessian_directions": 500})
    loss = term.compute(many, [0, 1], 1)
    errors = hessian_errors(model, frames)
    assert loss is not None and errors.rmse is not None and errors.n_frames == 2
    assert float(loss.detach()) == pytest.approx(errors.rmse**2, rel=0.1)
    assert hessian_errors(model, frames_of(cluster())).rmse is None


def test_forms_apply_to_each_component_and_those_for_forces_are_the_plain_ones() -> None:
    """Components of a random vector of length √n have the mean size √n Γ(n/2) / (√π Γ((n+1)/2))."""
    model = backbone(**SMALL)
    (frame,) = shifted(model, frames_of(cluster(atoms=3)))
    assert frame.hessian is not None
    missed = predict_hessian(model, frame) - frame.hessian
    size = len(missed)
    one = math.exp(math.lgamma(size / 2) - math.lgamma((size + 1) / 2)) / math.sqrt(math.pi)
    expected = one * np.linalg.norm(missed, axis=1).mean()

    def loss(form: str, weight: float = 1.0, directions: int = 3) -> float:
        term = HessianLoss(model, [replace(frame, hessian_weight=weight)], [], seed=3)
        config = LossConfig.model_validate({"hessian": 1.0, "hessian_directions": directions, "form": form})
        value = term.compute(config, [0], 1)
        assert value is not None
        return float(value.detach())

    assert loss("mae", directions=300) == pytest.approx(expected, rel=0.05)
    # of errors far above delta, 0.01
    assert loss("huber", directions=300) == pytest.approx(0.01 * (expected - 0.005), rel=0.05)
    assert (loss("l1l2"), loss("universal")) == (loss("mae"), loss("huber"))
    for form in ("mse", "mae", "huber", "universal", "l1l2"):
        assert loss(form, weight=3.0) == pytest.approx(3 * loss(form), rel=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    model = backbone(**SMALL)
    frames = shifted(model, frames_of(cluster(atoms=4), crystal(), cluster(atoms=3)))
    frames[1] = replace(frames[1], hessian_weight=2.0)
    term = HessianLoss(model, [*frames[:2], replace(frames[2], hessian=None)], frames[2:], seed=3)
    adapter = attach(model, method("elora"))
    perturb(adapter, 0.1)
    parameters = list(adapter.parameters())

    def compute() -> torch.Tensor:
        loss = term.compute(LOSS, [1, 0, 2, 7], 4)
        assert loss is not None
        return loss

    gradient = torch.autograd.grad(compute(), parameters)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradient, directions, strict=True))
    values = []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(sign * 1e-5 * direction)
        values.append(float(compute().detach()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_directions_depend_on_seed_epoch_and_frame_alone() -> None:
    model = backbone(**SMALL)
    frames = shifted(model, frames_of(cluster(atoms=4), cluster(atoms=5)))

    def loss(numbers: list[int], epoch: int, seed: int = 3) -> float:
        term = HessianLoss(model, frames, frames[:1], seed)
        value = term.compute(LOSS, numbers, epoch)
        assert value is not None
        return float(value.detach())

    assert loss([0], 1) == loss([0], 1)
    assert len({loss([0], 1), loss([0], 2), loss([0], 1, seed=4)}) == 3
    sizes = [12, 15]
    mean = (sizes[0] * loss([0], 1) + sizes[1] * loss([1], 1)) / sum(sizes)
    assert loss([0, 1], 1) == pytest.approx(mean, rel=1e-12)
    term = HessianLoss(model, frames, frames[:1], 3)
    assert term.compute(LOSS, [2], 1) is None
    assert term.compute(LOSS.model_copy(update={"hessian": 0.0}), [0], 1) is None
    assert term.validate(LOSS) == term.validate(LOSS) > 0


def test_processes_share_the_frames_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone(**SMALL)
    frames = shifted(model, frames_of(*(cluster(atoms=3, seed=seed) for seed in range(3))))
    term = HessianLoss(model, frames, [], 3)
    whole = term.compute(LOSS, [0, 1, 2], 1)
    assert whole is not None
    from forcetune.utils import distributed

    parts = []
    monkeypatch.setattr(distributed, "joined", lambda: True)
    for rank in range(4):
        monkeypatch.setattr(distributed, "place", lambda rank=rank: distributed.Place(rank, 4, rank))
        part = term.compute(LOSS, [0, 1, 2], 1)
        assert part is not None
        parts.append(float(part.detach()))
    assert sum(parts) == pytest.approx(float(whole.detach()), rel=1e-12) and parts[3] == 0


def hessian_of(atoms: Atoms) -> FloatArray:
    """Symmetric, with rows that add up to zero for a shift in each direction."""
    size = len(atoms)
    random = np.random.default_rng(2).standard_normal((3 * size, 3 * size))
    rest = np.eye(3 * size) - np.kron(np.full((size, size), 1 / size), np.eye(3))
    return rest @ (random + random.T) @ rest


@pytest.mark.parametrize("atoms", [cluster(atoms=4), cluster(atoms=1)], ids=["four", "one"])
@pytest.mark.parametrize("key", ["REF_hessian", "dft_hessian"])
def test_labels_are_read_as_they_were_written(tmp_path: Path, atoms: Atoms, key: str) -> None:
    hessian = hessian_of(atoms) if len(atoms) > 1 else np.zeros((3, 3))
    atoms = atoms.copy()
    atoms.info |= {"REF_energy": 0.0, key: hessian}
    write(tmp_path / "matrix.xyz", atoms)
    read = read_frames(tmp_path / "matrix.xyz")
    assert read.keys.hessian == key
    label = read.frames[0].hessian
    assert label is not None and np.array_equal(label, 0.5 * (hessian + hessian.T))
    del atoms.info[key]
    atoms.arrays[key] = hessian.reshape(len(atoms), -1)
    write(tmp_path / "rows.xyz", atoms)
    label = read_frames(tmp_path / "rows.xyz").frames[0].hessian
    assert label is not None and np.abs(label - hessian).max() < 1e-7  # ASE writes eight digits of arrays
    assert read_frames(tmp_path / "rows.xyz", hessian_key="none").frames[0].hessian is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[:6, :6], r"bad.xyz, frame 1: the Hessian under 'REF_hessian' should have shape \(12, 12\)"),
        (lambda h: h + np.eye(12, k=1), "bad.xyz, frame 1: the Hessian under 'REF_hessian' is not symmetric"),
        (lambda h: h * np.nan, "bad.xyz, frame 1: the hessian under 'REF_hessian' is nan"),
    ],
)
def test_broken_labels_are_refused_by_file_and_frame(tmp_path: Path, change: Any, message: str) -> None:
    good, bad = cluster(atoms=4), cluster(atoms=4)
    for atoms, hessian in ((good, hessian_of(good)), (bad, change(hessian_of(bad)))):
        atoms.info |= {"REF_energy": 0.0, "REF_hessian": hessian}
    write(tmp_path / "bad.xyz", [good, bad])
    with pytest.raises(InputError, match=message):
        read_frames(tmp_path / "bad.xyz")


def test_labels_that_know_where_space_begins_are_named(tmp_path: Path) -> None:
    atoms = cluster(atoms=4)
    atoms.info |= {"REF_energy": 0.0, "REF_hessian": np.eye(12)}
    write(tmp_path / "pinned.xyz", atoms)
    with pytest.warns(ForcetuneWarning, match=r"1 of 1 Hessians do not add up to zero \(first .*frame 0: 1 eV/Å²\)"):
        read_frames(tmp_path / "pinned.xyz")
    found = forcetune.doctor(tmp_path / "pinned.xyz", model=None)
    assert {"hessian-drift", "hessians"} <= found.codes
    assert found.facts["sets"]["train"]["hessians"] == 1


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and frames with energies, forces and Hessians of the same model after a change of its weights."""
    folder = tmp_path_factory.mktemp("planted")
    path = write_model(folder / "small.model", **SMALL)
    changed = forcetune.load(path, dtype="float64")
    perturb(attach(changed, method("full")), 0.05)
    structures = [cluster(atoms=4, seed=seed) for seed in range(18)]
    for atoms, frame in zip(structures, frames_of(*structures), strict=True):
        predictions = evaluate_frames(changed, [frame])
        atoms.info |= {"REF_energy": float(predictions.energy[0]), "REF_hessian": predict_hessian(changed, frame)}
        atoms.arrays["REF_forces"] = predictions.forces
    write(folder / "train.xyz", structures[:16])
    write(folder / "test.xyz", structures[16:])
    return path, folder


def test_training_on_hessians_alone_lowers_their_error(planted: tuple[Path, Path], tmp_path: Path) -> None:
    model, folder = planted
    loss = {"energy": 0.0, "forces": 0.0, "hessian": 1.0, "hessian_directions": 4}
    run = forcetune.fit(
        folder / "train.xyz",
        model=model,
        method="full",
        valid=2,
        epochs=25,
        out=tmp_path / "run",
        settings={"training.batch_size": 4, "data.doctor": "off", "training.learning_rate": 5e-3, "training.ema": None}
        | {f"training.loss.{name}": value for name, value in loss.items()},
    )
    before = forcetune.evaluate(model, folder / "test.xyz", dtype="float64")
    after = forcetune.evaluate(run.folder, folder / "test.xyz")
    assert before.hessian_frames == after.hessian_frames == 2
    assert before.hessian_rmse_ev_per_ang2 is not None and after.hessian_rmse_ev_per_ang2 is not None
    assert after.hessian_rmse_ev_per_ang2 < 0.6 * before.hessian_rmse_ev_per_ang2
    assert run.results["training"]["best_epoch"] > 5  # the validation loss has the term, too
    valid = run.results["errors"]["valid"]
    assert valid["before"]["hessian_frames"] == valid["after"]["hessian_frames"] == 2
    assert valid["after"]["hessian_rmse_ev_per_ang2"] < 0.8 * valid["before"]["hessian_rmse_ev_per_ang2"]
    assert "Hessian RMSE" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_a_fit_compares_the_first_frames_that_are_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [
        replace(frame, hessian=np.zeros((3 * len(frame), 3 * len(frame))))
        for frame in frames_of(*(cluster(atoms=atoms, seed=atoms) for atoms in (6, 3, 4, 5, 3)))
    ]
    splits = {"train": frames, "valid": [replace(frames[1], hessian=None), *frames], "test": frames[:1]}
    dataset = SimpleNamespace(splits={name: SimpleNamespace(frames=part) for name, part in splits.items()})
    measuring = Measuring(SimpleNamespace(dataset=dataset), False, 0, 1e-3, Console(quiet=True), print)  # pyright: ignore
    monkeypatch.setattr("forcetune.runs.measuring.LARGEST", 5)
    monkeypatch.setattr("forcetune.runs.measuring.HESSIANS", 3)
    chosen = measuring._frames_with_hessians()
    assert {name: [len(frame) for frame in part] for name, part in chosen.items()} == {"valid": [3, 4, 5], "test": []}


def test_what_is_said_where_labels_and_loss_do_not_match(
    planted: tuple[Path, Path], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = planted
    fit = ("fit", folder / "train.xyz", "--model", model, "--out", tmp_path / "run", "--epochs", "1", "--valid", "2")
    fit = (*fit, "--set", "data.doctor=off")
    weight = ("--set", "training.loss.hessian=1")
    plain = write_labelled(tmp_path / "plain.xyz", 4)
    for arguments, message in (
        ((fit[0], plain, *fit[2:], *weight), "plain.xyz: the loss weighs Hessians, but no training frame has one"),
        ((*fit, *weight, "--set", "data.hessian_key=none"), "data.hessian_key is none"),
        ((*fit, *weight, "--set", "data.stream=on"), "streamed frames have no Hessians"),
        ((*fit, *weight, "--set", "training.refine=2"), "training.refine minimizes a loss without Hessians"),
        ((*fit, "--set", "training.loss.hessian_directions=0"), "hessian_directions"),
    ):
        code, _, err = command(*arguments)
        assert code == 2 and message in " ".join(err.split()), err
        assert not (tmp_path / "run").exists()
    code, _, err = command(*fit)
    assert code == 0 and "Hessian labels that are not trained on: training.loss.hessian is 0" in " ".join(err.split())
    code, out, err = command("evaluate", tmp_path / "run", folder / "test.xyz", "--json")
    assert code == 0 and json.loads(out)["hessian_rmse_ev_per_ang2"] > 0
    code, out, _ = command("evaluate", tmp_path / "run", folder / "test.xyz", "--json", "--hessian-key", "none")
    assert code == 0 and "hessian_frames" not in json.loads(out)
    monkeypatch.setattr("forcetune.evaluation.hessian.LARGEST", 3)
    with pytest.warns(ForcetuneWarning, match="Hessians of 2 frames with more than"):
        assert forcetune.evaluate(tmp_path / "run", folder / "test.xyz").hessian_frames is None
