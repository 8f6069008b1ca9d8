"""Shortened runs of the recipes for the pretraining and the fine-tuning data."""

# The imports stand below the check that the optional packages are there.
# ruff: noqa: E402

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from ase.io import iread
from rich.console import Console

from forcetune.errors import InputError
from forcetune.frames.read import read_frames

for _module in ("rdkit", "tblite", "pyscf"):
    pytest.importorskip(_module, reason=f"{_module} is not installed (extra 'recipes')")

from recipes.mini import finetuning_data, generation, pretraining_data
from recipes.mini.conformers import embed, is_whole
from recipes.mini.dft import Calculation, ConvergenceError, Level, calculate, gradient_error
from recipes.mini.finetuning_data import HOT, Part
from recipes.mini.sample import FloatArray, IntArray, read_shard
from recipes.mini.structures import compressed, in_contact, stretched
from recipes.mini.xtb import Surface

QUIET = Console(quiet=True)
CHEAP = Level(functional="HF", basis="STO-3G", grid=0)
PARTS = (Part("train", 3, (500.0, 1000.0)), Part("hot", 2, HOT))
DATA = tuple(f"{name}.xyz" for name in pretraining_data.FILES)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short scans of the elements of the first few molecules only: all of them take a minute."""
    monkeypatch.setattr(generation, "SCAN_POINTS", 10)
    for module in (generation, pretraining_data):
        monkeypatch.setattr(module, "ELEMENTS", (1, 7, 8, 9))


def pretrain(out: Path) -> dict[str, bytes]:
    """Run the recipe for two molecules; the files by name."""
    pretraining_data.make(out, limit=2, console=QUIET)
    return {name: (out / name).read_bytes() for name in (*DATA, "statistics.json")}


def tune(out: Path, *, level: Level = CHEAP, processes: int = 1) -> dict[str, dict[str, float]]:
    """Run the recipe for a few frames of methanol at a cheap level."""
    return finetuning_data.make(
        out, parts=PARTS, smiles="CO", level=level, every=20, processes=processes, console=QUIET
    )


def counted(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list[object]:
    """The first arguments that a function of a module was called with from now on."""
    calls: list[object] = []
    original: Callable[..., object] = getattr(module, name)

    def spy(*arguments: object) -> object:
        calls.append(arguments[0])
        return original(*arguments)

    monkeypatch.setattr(module, name, spy)
    return calls


@pytest.mark.slow
def test_pretraining_data_is_deterministic_and_resumes(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pretrain(tmp_path / "a")
    assert pretrain(tmp_path / "b") == first

    calls = counted(monkeypatch, pretraining_data, "run_job")
    assert pretrain(tmp_path / "a") == first
    assert not calls
    shards = sorted((tmp_path / "a" / "shards").glob("molecule-*.npz"))
    shards[0].unlink()
    assert pretrain(tmp_path / "a") == first
    assert len(calls) == 1
    with pytest.raises(InputError, match="other settings"):
        pretraining_data.make(tmp_path / "a", limit=2, seed=1, console=QUIET)


def test_a_larger_share_contains_a_smaller_one(tmp_path: Path) -> None:
    molecules = tuple("C" * length for length in range(1, 101))
    work = generation.jobs(tmp_path, 0, molecules, tuple(zip(molecules[1:], molecules, strict=False)))
    small, large = (pretraining_data.draw_share(work, share) for share in (0.3, 0.6))
    assert set(small) < set(large) < set(work)
    assert pretraining_data.draw_share(work, 1.0) == work
    assert 35 < len(small) - 29 < 85, "atoms and 28 pairs of elements are always there"
    assert [job.kind for job in small[:29]] == ["atoms"] + 28 * ["diatomic"]


@pytest.mark.slow
def test_pretraining_data_is_sound(tmp_path: Path, short: None) -> None:
    pretrain(tmp_path)
    frames = {name: list(iread(tmp_path / name, ":")) for name in DATA}
    train = frames["train.xyz"]
    kinds = {atoms.info["config_type"] for atoms in train}
    assert {"IsolatedAtom", "diatomic", "dimer", "minimum", "md_300K", "displaced", "compressed"} <= kinds
    for atoms in (atoms for group in frames.values() for atoms in group):
        forces = atoms.arrays["REF_forces"]
        assert np.isfinite(forces).all() and np.abs(forces.sum(axis=0)).max() < 2e-3
        limit = generation.MAX_FORCE_DIATOMIC if atoms.info["config_type"] == "diatomic" else generation.MAX_FORCE
        assert np.linalg.norm(forces, axis=1).max() <= limit
    held_out = {atoms.info["molecule"] for atoms in frames["test_molecules.xyz"]}
    assert held_out and not held_out & {atoms.info["molecule"] for atoms in train}
    figures = json.loads((tmp_path / "statistics.json").read_text())
    assert sum(row["frames"] for row in figures["files"]["train"].values()) == len(train)
    assert set(figures["free_atoms"]) == {"H", "N", "O", "F"}
    assert read_frames(tmp_path / "train.xyz").keys.energy == "REF_energy"


@pytest.mark.slow
def test_close_atoms_repel_and_the_scan_is_smooth(tmp_path: Path) -> None:
    job = generation.Job("diatomic", ("C", "O"), tmp_path / "scan.npz", 0)
    samples = generation.diatomic_samples(job).samples
    lengths = [float(np.ptp(sample.positions[:, 2])) for sample in samples]
    assert lengths == sorted(lengths)
    assert all(sample.forces[1, 2] > 0 for sample, length in zip(samples, lengths, strict=True) if length < 1.0)
    for (one, near), (other, far) in pairwise(zip(samples, lengths, strict=True)):
        mean_force = 0.5 * (one.forces[1, 2] + other.forces[1, 2])
        change = -mean_force * (far - near)
        assert abs(other.energy - one.energy - change) < 0.02 * abs(change) + 0.05


def test_xtb_forces_are_the_derivative_of_the_energy() -> None:
    molecule = embed("CO", 1, 0)
    surface = Surface(molecule.numbers)
    place = molecule.conformers[0]
    forces = surface(place).forces
    for atom, axis in ((0, 0), (1, 1), (5, 2)):
        energies: list[float] = []
        for sign in (1, -1):
            moved = place.copy()
            moved[atom, axis] += sign * 1e-3
            energies.append(surface(moved).energy)
        assert -(energies[0] - energies[1]) / 2e-3 == pytest.approx(forces[atom, axis], abs=1e-3)


def test_structures_are_what_they_are_called() -> None:
    generator = np.random.default_rng(0)
    molecule = embed("CCC", 1, 0)
    place = molecule.conformers[0]
    assert is_whole(molecule, place)
    torn = place.copy()
    torn[molecule.bonds[0, 1]] += 3.0
    assert not is_whole(molecule, torn)
    for _ in range(20):
        moved = stretched(molecule, place, generator)
        first, second = molecule.bonds.T
        before, after = (np.linalg.norm(at[first] - at[second], axis=1) for at in (place, moved))
        assert (np.abs(after - before) > 1e-6).sum() == 1
        assert not np.allclose(compressed(molecule, place, generator), place)
    pair = in_contact((molecule.numbers, molecule.numbers), (place, place), 1.0, generator)
    size = len(place)
    gaps = np.linalg.norm(pair[:size, None] - pair[None, size:], axis=-1)
    assert 2.0 < gaps.min() < 3.6


@pytest.mark.slow
def test_finetuning_data_is_deterministic_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = tune(tmp_path / "a")
    tune(tmp_path / "b", processes=2)
    names = ("train.xyz.gz", "hot.xyz.gz")
    first = {name: (tmp_path / "a" / name).read_bytes() for name in names}
    assert {name: (tmp_path / "b" / name).read_bytes() for name in names} == first
    assert {name: (row["frames"], row["dropped"]) for name, row in figures.items()} == {"train": (3, 0), "hot": (2, 0)}

    calls = counted(monkeypatch, finetuning_data, "label_frame")
    (tmp_path / "a" / "frames" / "hot-0001.npz").unlink()
    tune(tmp_path / "a")
    assert len(calls) == 1
    assert {name: (tmp_path / "a" / name).read_bytes() for name in names} == first
    with pytest.raises(InputError, match="other settings"):
        tune(tmp_path / "a", level=Level(functional="HF", basis="6-31G", grid=0))

    text = (tmp_path / "a" / "README.md").read_text()
    assert "HF/STO-3G" in text and "MIT" in text
    frames = read_frames(tmp_path / "a" / "train.xyz.gz", require=("energy", "forces"))
    assert len(frames) == 3 and frames.elements == (1, 6, 8)
    frame = frames.frames[0]
    labels = calculate(CHEAP, frame.numbers, frame.positions)
    assert frame.forces is not None
    assert frame.energy == pytest.approx(labels.energy, abs=1e-5)
    np.testing.assert_allclose(frame.forces, labels.forces, atol=1e-5)


@pytest.mark.slow
def test_a_frame_that_does_not_converge_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[FloatArray] = []

    def failing(level: Level, numbers: IntArray, positions: FloatArray) -> Calculation:
        asked.append(positions)
        if len(asked) == 2:
            raise ConvergenceError("as planned")
        return calculate(level, numbers, positions)

    monkeypatch.setattr(finetuning_data, "calculate", failing)
    figures = tune(tmp_path)
    assert (figures["train"]["frames"], figures["train"]["dropped"]) == (2, 1)
    assert read_shard(tmp_path / "frames" / "train-0001.npz")[0] == []
    assert len(list(iread(tmp_path / "train.xyz.gz", ":"))) == 2


@pytest.mark.slow
def test_dft_gradient_by_finite_differences() -> None:
    molecule = embed("CO", 1, 0)
    level = Level(functional="PBE0", basis="STO-3G", grid=1)
    assert gradient_error(level, molecule.numbers, molecule.conformers[0]) < 1e-3
