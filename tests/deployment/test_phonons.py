"""Phonon frequencies of a crystal before and after training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.data import atomic_masses
from ase.io import write

import forcetune
from forcetune.adapters.attach import attach, disable_adapter, get_adapter
from forcetune.adapters.methods import method
from forcetune.config import DataConfig
from forcetune.deployment import phonons
from forcetune.deployment.calculator import ForcetuneCalculator, build_frame
from forcetune.errors import InputError
from forcetune.evaluation.summaries import Frequencies, Phonons
from forcetune.frames.dataset import read_dataset
from forcetune.frames.frame import Frame
from systems import backbone, perturb, write_labelled

pytest.importorskip("phonopy", reason="phonopy is not installed")
THZ = 15.6333023
"""√(eV/Å²/u) / 2π."""


def diamond() -> Frame:
    return replace(build_frame(bulk("C", "diamond", a=3.9)), forces=np.zeros((2, 3)))


def second_moment(model: forcetune.Backbone, atoms: Atoms, step: float = 1e-3) -> float:
    """Mean squared frequency, THz², from the force constants of atoms on themselves in a supercell."""
    calculator = ForcetuneCalculator(model)
    total = 0.0
    for index in (0, len(atoms) // 2):
        for axis in range(3):
            forces = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[index, axis] += sign * step
                moved.calc = calculator
                forces.append(moved.get_forces()[index, axis])
            total += (forces[1] - forces[0]) / (2 * step)
    return THZ**2 * total / (6 * atomic_masses[6])


def test_frequencies_have_the_second_moment_of_the_force_constants() -> None:
    model = backbone()
    perturb(attach(model, method("elora")), 0.3)
    result = phonons.measure_phonons(model, diamond())
    assert (result.primitive_atoms, result.supercell_atoms) == (2, 128)
    supercell = bulk("C", "diamond", a=3.9).repeat(4)
    moments = []
    for frequencies, base in ((result.tuned, False), (result.base, True)):
        assert frequencies.failure is None
        edges = np.array(result.edges_thz)
        centres = (edges[1:] + edges[:-1]) / 2
        share = np.array(frequencies.density) * np.diff(edges)
        assert share.sum() == pytest.approx(1.0)
        assert frequencies.imaginary == pytest.approx(share[centres < -phonons.IMAGINARY].sum(), abs=0.05)
        mean = float((share * np.sign(centres) * centres**2).sum())
        if base:
            with disable_adapter(model):
                expected = second_moment(model, supercell)
        else:
            expected = second_moment(model, supercell)
        width = edges[1] - edges[0]
        assert mean == pytest.approx(expected, rel=0.01, abs=width * abs(centres).max() / 2)
        moments.append(expected)
    assert abs(moments[0] - moments[1]) > 0.02 * abs(moments[1]), "the adapter changes them"
    assert get_adapter(model) is not None


def test_an_adapter_that_does_nothing_changes_no_frequency() -> None:
    model = backbone()
    attach(model, method("elora"))
    result = phonons.measure_phonons(model, diamond())
    assert result.tuned == result.base
    assert phonons.describe_instability(result) is None


def test_only_new_instabilities_are_warned_of() -> None:
    stable, unstable = Frequencies(1.0, 2.0, 0.0, 0.0, (1.0,)), Frequencies(1.0, 2.0, -3.0, 0.25, (1.0,))
    failed = Frequencies(failure="positions did not relax")

    def described(base: Frequencies, tuned: Frequencies) -> str | None:
        return phonons.describe_instability(Phonons("a.xyz, frame 1", 1, 8, (0.0, 1.0), base, tuned))

    assert described(stable, stable) is None and described(unstable, unstable) is None
    assert described(failed, failed) is None
    assert "its base gave no phonons (positions did not relax)" in str(described(failed, unstable))
    assert "25.0% of the phonon modes" in str(described(stable, unstable))
    assert "and none of its base" in str(described(stable, unstable))
    assert "could not be computed (positions did not relax)" in str(described(stable, failed))


def test_what_phonopy_cannot_do_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = backbone()
    attach(model, method("elora"))

    def fail(*_: object) -> None:
        raise RuntimeError("Index matching didn't go well.")

    monkeypatch.setattr(phonons, "_displaced", fail)
    assert phonons.count_displaced_atoms(diamond()) is None
    result = phonons.measure_phonons(model, diamond())
    assert result.base.failure == "RuntimeError: Index matching didn't go well." == result.tuned.failure
    assert result.supercell_atoms is None and result.edges_thz == ()
    monkeypatch.undo()
    result = phonons.measure_phonons(model, diamond(), most_atoms=127)
    assert "1 displaced supercells would be needed" in str(result.tuned.failure)
    monkeypatch.setattr(phonons, "_RELAXED", -1.0)
    monkeypatch.setattr(phonons, "_STEPS", 2)
    assert "did not relax" in str(phonons.measure_phonons(model, diamond()).tuned.failure)


def test_slabs_and_molecules_in_boxes_are_no_crystals() -> None:
    assert phonons.is_crystal(diamond()) and phonons.is_crystal(build_frame(bulk("C", "diamond", a=3.9).repeat(2)))
    boxed = molecule("CH4")
    boxed.set_cell(np.diag([12.0, 12.0, 12.0]))
    boxed.pbc = True
    slab = bulk("C", "diamond", a=3.9, cubic=True)
    slab.center(vacuum=5.0, axis=2)
    slab.pbc = True
    assert not phonons.is_crystal(build_frame(boxed)) and not phonons.is_crystal(build_frame(slab))
    assert not phonons.is_crystal(build_frame(molecule("CH4")))


def crystals(folder: Path) -> Path:
    """Molecules, and diamond relaxed, strained and shaken."""
    frames = []
    for name, (a, stress) in {"strained": (3.7, 0.02), "relaxed": (3.9, 0.001), "no stress": (3.6, None)}.items():
        atoms = bulk("C", "diamond", a=a)
        atoms.info |= {"name": name, "REF_energy": -3.0}
        if stress is not None:
            atoms.info["REF_stress"] = np.full(9, stress)
        atoms.arrays["REF_forces"] = np.zeros((2, 3))
        frames.append(atoms)
    shaken = bulk("C", "diamond", a=3.9).repeat(2)
    for seed in range(8):
        atoms = shaken.copy()
        atoms.rattle(0.05, seed=seed)
        atoms.info |= {"REF_energy": -24.0 + 0.1 * seed, "REF_stress": np.full(9, 0.0001)}
        atoms.arrays["REF_forces"] = np.random.default_rng(seed).normal(0, 0.5, (16, 3))
        frames.append(atoms)
    write(folder / "crystals.xyz", frames, format="extxyz")
    return folder / "crystals.xyz"


@pytest.mark.filterwarnings("ignore:.*frames have no stress")
def test_the_crystal_is_the_relaxed_one(tmp_path: Path) -> None:
    dataset = read_dataset(DataConfig(train=[str(crystals(tmp_path))], valid=0.3))
    chosen = phonons.choose_crystal(dataset)
    assert chosen is not None and chosen.cell is not None
    assert np.linalg.norm(chosen.cell[0]) == pytest.approx(3.9 / np.sqrt(2))
    molecules = read_dataset(DataConfig(train=[str(write_labelled(tmp_path / "a.xyz"))], valid=0.3))
    assert phonons.choose_crystal(molecules) is None


@pytest.mark.filterwarnings("ignore:.*frames have no stress")
def test_crystals_are_left_out_whose_displaced_supercells_are_too_many(tmp_path: Path) -> None:
    frame = diamond()
    assert phonons.count_displaced_atoms(frame) == 128, "one displacement says all, by symmetry"
    shaken = replace(frame, positions=frame.positions + np.array([[0.0, 0.0, 0.0], [0.05, 0.02, -0.03]]))
    assert phonons.count_displaced_atoms(shaken) > 128
    dataset = read_dataset(DataConfig(train=[str(crystals(tmp_path))], valid=0.3))
    assert phonons.choose_crystal(dataset, most_atoms=127) is None
    assert phonons.choose_crystal(dataset, most_atoms=128) is not None


@pytest.mark.filterwarnings("ignore:.*frames have no stress")
def test_fit_reports_phonons_of_its_crystal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = crystals(tmp_path)
    options = {"model": "mini", "method": "readout", "valid": 0.3, "epochs": 1}
    settings = {"data.doctor": "off", "output.phonons": "on"}
    run = forcetune.fit(data, **options, out=tmp_path / "run", settings=settings)
    measured = run.results["phonons"]
    assert measured["crystal"].endswith("frame 1") and measured["base"]["highest_thz"] > 0
    assert measured["tuned"]["failure"] is None and len(measured["tuned"]["density"]) == len(measured["edges_thz"]) - 1
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "Phonons" in page and "densities of states" in page
    monkeypatch.setattr("forcetune.runs.measuring.describe_instability", lambda _: "it shakes")
    shaky = forcetune.fit(data, **options, out=tmp_path / "shaky", settings=settings)
    assert "it shakes" in shaky.results["warnings"]
    off = forcetune.fit(data, **options, out=tmp_path / "off", settings=settings | {"output.phonons": "off"})
    assert "phonons" not in off.results
    molecules = write_labelled(tmp_path / "a.xyz")
    with pytest.raises(InputError, match="no frame is a crystal"):
        forcetune.fit(molecules, **options, out=tmp_path / "no", settings={"output.phonons": "on"})
    assert not (tmp_path / "no").exists()


@pytest.mark.filterwarnings("ignore:.*frames have no stress")
def test_without_phonopy_auto_leaves_them_out_and_on_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = crystals(tmp_path)
    monkeypatch.setattr(phonons, "is_installed", lambda: False)
    options = {"model": "mini", "method": "readout", "valid": 0.3, "epochs": 1}
    run = forcetune.fit(data, **options, out=tmp_path / "run", settings={"data.doctor": "off"})
    assert "phonons" not in run.results
    with pytest.raises(InputError, match=r"forcetune\[phonons\]"):
        forcetune.fit(data, **options, out=tmp_path / "on", settings={"output.phonons": "on"})
    assert not (tmp_path / "on").exists()
