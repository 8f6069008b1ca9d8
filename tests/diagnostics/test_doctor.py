"""Faults planted into the data of the package are named, clean data are left alone, and a fit stops at errors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from benchmarks.doctor_faults import ENERGY, FAULTS, FORCES, Data, Fault, examined, is_named, loaded, plain, turned
from rich.console import Console

import forcetune
from forcetune.backbones.protocol import Backbone
from forcetune.diagnostics.composition import composition_residual
from forcetune.diagnostics.diagnosis import diagnose
from forcetune.diagnostics.examine import examine_frames
from forcetune.diagnostics.label_mismatch import find_mismatch, pair_correlation
from forcetune.diagnostics.label_statistics import LabelledPredictions
from forcetune.diagnostics.memory import measure_peak_memory, step_memory, training_step
from forcetune.errors import ForcetuneWarning, InputError
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from forcetune.frames.read import frames_from_atoms
from forcetune.graphs.graph import collate
from systems import labelled, write_labelled, write_model
from terminal import Command

QUIET = Console(quiet=True)
# one of every kind; all of them run with the marker slow
QUICK = (
    *("energies and forces in kcal/mol", "energies in Hartree", "positions in Bohr", "gradients instead of forces"),
    *("forces shuffled within frames", "forces of the previous frame", "axes of forces exchanged"),
    *("energies shuffled among frames", "one energy 2 eV off", "energies rounded to 0.01 eV", "constant energies"),
    *("NaN energy in one frame", "overflow of one force", "forces zero everywhere", "unusual label keys"),
    *("half of the frames without forces", "species in another order", "element unknown to the model"),
    *("pbc without a cell", "one frame with an atom twice", "training frames turned among test frames"),
)
# not named in so small a molecule: its rounding is below the bound, it fits into the box, its spread covers the step; a
# cell in nm makes atoms overlap before it counts as tiny
OTHER_THINGS = (
    *("energies in single precision", "cell of 5 Å around the molecule", "a third at another level of theory"),
    "cell in nm",
)


def structures(part: str) -> list[Atoms]:
    atoms = ase.io.read(forcetune.demo_file(part), ":")
    assert isinstance(atoms, list)
    return plain(atoms)


def demo_data() -> Data:
    """A hundred training frames and fifty for a test; foreign energies are those of other frames, far away."""
    train = [*structures("train"), *structures("valid")]
    foreign = np.random.default_rng(3).permutation([atoms.info[ENERGY] + 500.0 for atoms in train])
    return Data(train, structures("hot"), list(foreign))


@pytest.fixture(scope="module")
def mini() -> Backbone:
    return loaded()


def check(fault: Fault, model: Backbone, folder: Path) -> None:
    checkup = examined(demo_data(), fault, model, folder)
    assert is_named(fault, checkup), [str(item) for item in checkup.findings]


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in QUICK], ids=lambda fault: fault.name)
def test_fault_is_named(fault: Fault, mini: Backbone, tmp_path: Path) -> None:
    check(fault, mini, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if f.name not in QUICK + OTHER_THINGS], ids=lambda fault: fault.name
)
def test_other_faults_are_named(fault: Fault, mini: Backbone, tmp_path: Path) -> None:
    check(fault, mini, tmp_path)


def test_clean_data_have_no_errors_and_no_warnings(command: Command, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    test = forcetune.demo_file("test")
    code, out, err = command("doctor", forcetune.demo_file("train"), "--test", test, "--json", "--html", page)
    assert code == 0, err
    content = json.loads(out)
    assert set(content) == {"findings", "n_errors", "n_warnings", "facts"}
    assert (content["n_errors"], content["n_warnings"]) == (0, 0)
    assert {item["code"] for item in content["findings"]} == {"composition-rank"}
    forces = content["facts"]["agreement"]["train"]["forces"]
    assert forces["correlation"] > 0.95 and 0.8 < forces["ratio"] < 1.3
    assert content["facts"]["sets"]["train"]["n_frames"] == 50
    memory = content["facts"]["memory"]
    assert memory["batch_size"] == 5 and memory["estimate_bytes"] > 1e6
    text = page.read_text(encoding="utf-8")
    assert "nothing against it" in text and "composition-rank" in text and "<svg" in text


@pytest.mark.parametrize("name", ["train", "valid", "test", "hot"])
def test_clean_parts_have_no_errors_and_no_warnings(name: str, mini: Backbone) -> None:
    checkup = forcetune.doctor(forcetune.demo_file(name), model=mini, console=QUIET)
    assert [str(item) for item in checkup.findings if item.severity != "note"] == []


def test_published_sets_have_no_errors(reference_data: Path, mini: Backbone) -> None:
    aspirin, acac, bpa = (reference_data / name for name in ("rmd17/aspirin", "acac", "3bpa"))
    for train, test in (
        (aspirin / "train.xyz", aspirin / "valid.xyz"),
        (acac / "train_300K.xyz", acac / "test_H_transfer.xyz"),
        (bpa / "train_300K.xyz", bpa / "train_mixedT.xyz"),
    ):
        checkup = forcetune.doctor(train, test=test, model=mini, console=QUIET)
        assert checkup.n_errors == 0, [str(item) for item in checkup.findings]
        # the published mixed-temperature set does contain frames of the 300 K set
        expected = {"test-in-train"} if train.parent == bpa else set()
        assert {item.code for item in checkup.findings if item.severity == "warning"} == expected


# ---- the command line and the fit ---------------------------------------------------------------------------------


def gradients(path: Path) -> Path:
    frames = structures("train")
    for atoms in frames:
        atoms.arrays[FORCES] *= -1
    ase.io.write(path, frames, format="extxyz")
    return path


def test_errors_end_with_exit_code_2_and_name_the_mend(command: Command, tmp_path: Path) -> None:
    data = gradients(tmp_path / "gradients.xyz")
    code, out, _ = command("doctor", data, "--html", tmp_path / "page.html")
    assert code == 2
    assert "forces-sign" in out and "multiply them" in out and "1 error" in out
    assert "do not train on these" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_fit_stops_at_errors_unless_told_otherwise(command: Command, tmp_path: Path) -> None:
    data = gradients(tmp_path / "gradients.xyz")
    arguments = ("fit", data, "--valid", 10, "--method", "readout", "--epochs", 1, "--out", tmp_path / "run")
    code, _, err = command(*arguments)
    assert code == 2
    assert "[forces-sign]" in err and "data.doctor=off" in err and str(data) in err
    assert not (tmp_path / "run").exists()
    code, _, err = command(*arguments, "--set", "data.doctor=off", "--set", "training.batch_size=20")
    assert code == 0, err
    assert "forces-sign" not in err


def test_fit_reports_warnings(command: Command, tmp_path: Path) -> None:
    frames = labelled(12)
    frames[5] = frames[2].copy()
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    ase.io.write(tmp_path / "v.xyz", labelled(3, seed=4), format="extxyz")
    arguments = ("fit", tmp_path / "a.xyz", "--valid", tmp_path / "v.xyz", "--model", write_model(tmp_path / "m.model"))
    code, _, err = command(*arguments, "--method", "readout", "--epochs", 1, "--out", tmp_path / "run")
    assert code == 0, err
    assert "frame 5: The same structure as an earlier frame" in err
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert any("[duplicate-frames]" in text for text in results["warnings"])
    assert "[duplicate-frames]" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_comparison_stops_before_its_first_run(command: Command, tmp_path: Path) -> None:
    frames = labelled(12)
    for atoms in frames:
        atoms.arrays[FORCES] *= 0
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    code, _, err = command("compare", tmp_path / "a.xyz", "--valid", 3, "--out", tmp_path / "c")
    assert code == 2
    assert "[forces-zero]" in err
    assert not (tmp_path / "c").exists()


def test_random_weights_are_no_evidence_against_data(tmp_path: Path) -> None:
    checkup = forcetune.doctor(
        write_labelled(tmp_path / "a.xyz", 40), model=write_model(tmp_path / "m.model"), console=QUIET
    )
    assert checkup.n_errors == 0, [str(item) for item in checkup.findings]


# ---- reading goes on ----------------------------------------------------------------------------------------------


def test_all_problems_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    frames = structures("train")[:20]
    frames[2].info[ENERGY] = np.nan
    frames[5].arrays[FORCES][1, 1] = np.inf
    frames[6].arrays[FORCES][0, 0] = np.nan
    frames[9].positions[0] = np.nan
    del frames[11].info[ENERGY]
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    checkup = forcetune.doctor([tmp_path / "a.xyz", tmp_path / "none.xyz"], model=None, console=QUIET)
    where = {item.code: item.frames for item in checkup.findings if item.severity == "error"}
    assert where == {
        "energy-not-finite": (2,),
        "forces-not-finite": (5, 6),
        "structure-broken": (9,),
        "file-unreadable": (),
    }
    assert checkup.facts["sets"]["train"]["n_frames"] == 19
    missing = next(item for item in checkup.findings if item.code == "energy-missing")
    assert (missing.severity, missing.frames) == ("warning", (11,))


def test_frames_in_memory_without_a_model() -> None:
    frames = structures("train")[:12]
    frames[3] = frames[1].copy()
    checkup = forcetune.doctor(frames, model=None, console=QUIET)
    assert checkup.codes == {"duplicate-frames", "composition-rank"}
    assert "agreement" not in checkup.facts
    duplicate = next(item for item in checkup.findings if item.code == "duplicate-frames")
    assert (duplicate.file, duplicate.frames, duplicate.n_frames) == ("<atoms>", (3,), 1)


# ---- the parts ----------------------------------------------------------------------------------------------------


def codes_of(train: Sequence[Atoms], test: Sequence[Atoms] = ()) -> set[str]:
    sets = {"train": frames_from_atoms(train).frames}
    if test:
        sets["test"] = frames_from_atoms(test).frames
    return {finding.code for finding in examine_frames(sets).findings} - {"composition-rank"}


def test_copies_are_found_whatever_their_orientation_and_order() -> None:
    rng = np.random.default_rng(0)
    train = structures("train")
    assert codes_of(train, structures("hot")) == set()
    copy = turned(train[7], rng, forces=True)
    copy = copy[rng.permutation(len(copy))]
    assert codes_of(train, [copy]) == {"test-in-train"}
    shaken = copy.copy()
    shaken.positions += 2e-3 * rng.standard_normal(shaken.positions.shape)
    assert codes_of(train, [shaken]) == {"test-near-train"}
    other = copy.copy()
    other.positions += 0.05 * rng.standard_normal(other.positions.shape)
    assert codes_of(train, [other]) == set()


def test_structures_without_any_neighbours_are_no_obstacle() -> None:
    exploded = structures("train")[:6]
    for atoms in exploded[:2]:
        atoms.positions *= 8.0
    assert "atom-alone" in codes_of(exploded)


def test_composition_is_not_moved_by_wrong_energies() -> None:
    rng = np.random.default_rng(1)
    frames, energies = [], []
    for k in range(40):
        carbon, hydrogen = rng.integers(1, 6, 2)
        frames.append(Atoms(f"C{carbon}H{hydrogen}", rng.uniform(0, 9, (carbon + hydrogen, 3))))
        frames[-1].info[ENERGY] = -38.0 * carbon - 13.0 * hydrogen + 0.01 * rng.standard_normal()
        energies.append(frames[-1].info[ENERGY] + 100.0 * (k in (3, 17)))
    residual, rank, elements = composition_residual(frames_from_atoms(frames).frames, np.array(energies))
    assert (rank, elements) == (2, 2)
    assert set(np.flatnonzero(np.abs(residual) > 1.0)) == {3, 17}
    assert np.abs(np.delete(residual, (3, 17))).max() < 0.02


def out_of_reach(frames: int = 8, cell: float | None = None) -> list[Atoms]:
    """Pairs of atoms out of each other's reach, with the energy of two atoms and no forces."""
    structures_out_of_reach = []
    for k in range(frames):
        atoms = Atoms("OH", [[0, 0, 0], [0, 0, 6 + 0.1 * k]])
        if cell is not None:
            atoms.set_cell(3 * [cell])
            atoms.pbc = True
            atoms.info["REF_stress"] = np.zeros(9)
        atoms.info[ENERGY] = -120.1234567891
        atoms.arrays[FORCES] = np.zeros((2, 3))
        structures_out_of_reach.append(atoms)
    return structures_out_of_reach


def test_repeated_energies_beside_a_composition_of_one_frame() -> None:
    """Energies with all their digits do not meet by chance, and one frame alone has no width to compare with."""
    structures = labelled(10)
    lone = structures[0].copy()
    del lone[[0]]
    lone.info[ENERGY], lone.arrays[FORCES] = structures[0].info[ENERGY] / 3, structures[0].arrays[FORCES][1:]
    for index, atoms in enumerate(structures):
        atoms.info[ENERGY] = structures[0].info[ENERGY] + math.sqrt(index) / 7
    for index in (3, 5):
        structures[index].info[ENERGY] = structures[1].info[ENERGY]
    assert "energy-repeated" in forcetune.doctor([*structures, lone], console=QUIET).codes


@pytest.mark.parametrize("cell", [None, 25.0])
def test_atoms_out_of_reach(cell: float | None, mini: Backbone) -> None:
    """No neighbours, no forces, equal energies: all as it must be, but for the hint that they are alone."""
    checkup = forcetune.doctor(out_of_reach(cell=cell), model=mini, console=QUIET)
    assert checkup.n_errors == 0
    assert "atom-alone" in checkup.codes and not {"energy-constant", "energy-repeated", "forces-zero"} & checkup.codes
    mixed = forcetune.doctor([*out_of_reach(), *structures("train")], model=mini, test=out_of_reach(3), console=QUIET)
    assert mixed.n_errors == 0


def test_fits_of_atoms_out_of_reach(tmp_path: Path) -> None:
    """Frames without an edge, alone and beside others, in batches of their own and in mixed ones."""
    alone, mixed = tmp_path / "alone.xyz", tmp_path / "mixed.xyz"
    ase.io.write(alone, out_of_reach(cell=25.0))
    ase.io.write(mixed, [*out_of_reach(4), *structures("train")[:4]])
    for path in (alone, mixed):
        for batch in (1, 3):
            own = {"training.batch_size": batch, "training.loss.stress": float(path is alone), "data.doctor": "off"}
            out = tmp_path / f"{path.stem}{batch}"
            run = forcetune.fit(path, model="mini", epochs=1, out=out, settings=own)
            error = run.after["train"].energy_mae_mev
            assert error is not None and np.isfinite(error)


def test_atoms_at_one_place_are_findings(mini: Backbone) -> None:
    frames = structures("train")[:10]
    frames[3].positions[1] = frames[3].positions[0]
    checkup = forcetune.doctor(frames, model=mini, console=QUIET)
    assert any(one.code == "atoms-overlap" and one.frames == (3,) for one in checkup.findings)


def predicted(model: Backbone, frames: Sequence[Atoms]) -> LabelledPredictions:
    labelled_frames = frames_from_atoms(frames).frames
    return LabelledPredictions.split(labelled_frames, predict(model, build_graphs(model, labelled_frames)))


def test_energies_follow_forces_from_frame_to_frame(mini: Backbone) -> None:
    predictions = predicted(mini, [*structures("train"), *structures("valid")])
    correlation = pair_correlation(predictions)
    rng = np.random.default_rng(2)
    shuffled = LabelledPredictions(
        predictions.frames,
        predictions.energy,
        rng.permutation(predictions.energy_label),
        predictions.forces,
        predictions.forces_label,
        None,
        None,
    )
    lost = pair_correlation(shuffled)
    assert correlation is not None and lost is not None
    assert correlation > 0.9
    assert abs(lost) < 0.3


def test_chance_does_not_explain_forces(mini: Backbone) -> None:
    frames = structures("train")
    rng = np.random.default_rng(4)
    for atoms in frames:
        atoms.arrays[FORCES] = rng.permutation(atoms.arrays[FORCES].ravel()).reshape(-1, 3)
    assert find_mismatch(predicted(mini, frames)) is None


@pytest.mark.parametrize(
    ("factor", "codes"),
    [
        (1.0, set()),
        (-1.0, {"stress-sign"}),
        (160.2177, {"stress-unit"}),
        (-1602.177, {"stress-sign", "stress-unit"}),
    ],
)
def test_stress_signs_and_units(factor: float, codes: set[str]) -> None:
    rng = np.random.default_rng(5)
    frames = []
    for atoms in structures("train")[:20]:
        atoms.info["REF_stress"] = np.zeros((3, 3))
        atoms.set_cell([6.0] * 3)
        atoms.pbc = True
        frames.append(atoms)
    stress = 0.01 * rng.standard_normal((20, 3, 3))
    stress += stress.transpose(0, 2, 1)
    numbers = np.concatenate([atoms.numbers for atoms in frames])
    nothing = np.full((len(numbers), 3), np.nan)
    predictions = Predictions(
        numbers=numbers,
        atoms=np.array([len(atoms) for atoms in frames]),
        energy=np.zeros(20),
        energy_label=np.full(20, np.nan),
        forces=np.zeros_like(nothing),
        forces_label=nothing,
        stress=stress,
        stress_label=factor * 1.1 * stress,
    )
    compared = LabelledPredictions.split(frames_from_atoms(frames).frames, predictions)
    assert {item.code for item in diagnose(compared)} == codes


@pytest.mark.parametrize(
    ("hidden", "mixed", "severity"), [(False, False, "error"), (True, False, "warning"), (True, True, "error")]
)
def test_energies_of_what_the_model_does_not_know_are_no_error_of_units(
    hidden: bool, mixed: bool, severity: str
) -> None:
    """As those of magnetic states at nearly one place: forces agree, energies are larger and do not follow them.

    Where no ten frames have their atoms in one order, label forces cannot say so.
    """
    rng = np.random.default_rng(8)
    start = structures("train")[0]
    stiffness = rng.uniform(1.0, 3.0, size=(len(start), 3))
    frames, energies = [], []
    for _ in range(60):
        atoms = start.copy()
        moved = 0.05 * rng.standard_normal((len(atoms), 3))
        atoms.positions += moved
        energies.append(0.5 * float((stiffness * moved**2).sum()))
        atoms.arrays[FORCES] = -stiffness * moved
        frames.append(atoms[rng.permutation(len(atoms))] if mixed else atoms)
    label = 20 * np.array(energies)
    if hidden:
        label = 20 * np.std(energies) * rng.standard_normal(60)
    energy = label / 20 + (1.2 * np.std(energies) * rng.standard_normal(60) if hidden else 0.0)
    for atoms, value in zip(frames, label, strict=True):
        atoms.info["REF_energy"] = value
    forces = np.concatenate([atoms.arrays[FORCES] for atoms in frames])
    predictions = Predictions(
        numbers=np.concatenate([atoms.numbers for atoms in frames]),
        atoms=np.array([len(atoms) for atoms in frames]),
        energy=energy,
        energy_label=label,
        forces=forces + 0.01 * rng.standard_normal(forces.shape),
        forces_label=forces,
        stress=None,
        stress_label=None,
    )
    (finding,) = diagnose(LabelledPredictions.split(frames_from_atoms(frames).frames, predictions))
    assert (finding.code, finding.severity) == ("energy-unit", severity)
    assert ("magnetic moments" in finding.message) == (severity == "warning")


def test_memory_of_a_step_is_what_is_measured(mini: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = build_graphs(mini, frames_from_atoms(structures("train")).frames)
    monkeypatch.setattr("forcetune.diagnostics.memory.MEASURED_EDGES", 1000)
    estimate = step_memory(mini, graphs, 40)
    assert estimate is not None
    assert estimate.measured_edges <= 1000 < estimate.batch_edges
    largest = sorted(graphs, key=lambda graph: graph.n_edges, reverse=True)[:40]
    batch = collate(largest).to(device=mini.device)
    measured = measure_peak_memory(lambda: training_step(mini, batch), mini.device)
    assert estimate.estimate_bytes == pytest.approx(measured, rel=0.25)
    assert not any(parameter.grad is not None for parameter in mini.model.parameters())


def test_switch_in_python(tmp_path: Path) -> None:
    data = gradients(tmp_path / "gradients.xyz")
    options = {"model": "mini", "method": "readout", "valid": 10, "epochs": 1, "out": tmp_path / "run"}
    with pytest.raises(InputError, match=r"multiply them by −1.*\[forces-sign\]"):
        forcetune.fit(data, **options)
    frames = structures("train")
    frames[5] = frames[2].copy()
    ase.io.write(tmp_path / "twice.xyz", frames, format="extxyz")
    with pytest.warns(ForcetuneWarning, match="duplicate-frames"):
        forcetune.fit(tmp_path / "twice.xyz", **options | {"valid": forcetune.demo_file("hot")})
