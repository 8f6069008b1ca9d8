"""What a fit, an evaluation and the doctor do with labels as people have them: used, refused or named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from rich.console import Console

import forcetune
from forcetune.backbones.loading import load
from forcetune.backbones.protocol import Backbone
from forcetune.diagnostics.diagnosis import diagnose
from forcetune.diagnostics.doctor import Checkup
from forcetune.diagnostics.label_checks import check_labels
from forcetune.diagnostics.label_statistics import LabelledPredictions, energy_agreement, force_agreement
from forcetune.diagnostics.shape import measure_shape
from forcetune.diagnostics.stress import ORDERS, find_order
from forcetune.errors import ForcetuneWarning
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.frames.read import frames_from_atoms, read_frames
from own_labels import labelled_by, shaken, write
from systems import labelled, write_model
from terminal import Command

QUIET = Console(quiet=True)
VOIGT = ([0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1])


@pytest.fixture(scope="module")
def mini() -> Backbone:
    return load("mini")


@pytest.fixture(scope="module")
def crystals(mini: Backbone) -> list[Atoms]:
    return labelled_by(mini, 10, periodic=True)


def doctor(data: Any, model: Backbone) -> Checkup:
    return forcetune.doctor(data, model=model, console=QUIET)


def changed(structures: Sequence[Atoms], change: Callable[[Atoms], Any]) -> list[Atoms]:
    copies = [atoms.copy() for atoms in structures]
    for atoms in copies:
        change(atoms)
    return copies


def fit(command: Command, data: Path, run: Path, *more: object, model: object = "mini") -> tuple[int, str, str]:
    arguments = ("--model", model, "--method", "readout", "--epochs", 1, "--valid", 1, "--out", run)
    return command("fit", data, *arguments, *more)


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


# ---- the model's own labels give no errors, however they are written ------------------------------------------------


def six(atoms: Atoms) -> np.ndarray:
    return np.asarray(atoms.info.pop("REF_stress")).reshape(3, 3)[VOIGT]


def as_virial(atoms: Atoms) -> None:
    atoms.info["DFT_virials"] = -atoms.get_volume() * np.asarray(atoms.info.pop("REF_stress"))


def with_weights(atoms: Atoms) -> None:
    atoms.info["config_weight"] = 1.0
    if atoms.positions[0, 0] < 0:
        atoms.info |= {"config_weight": 0.0, "REF_energy": 1e3}


FORMS: dict[str, Callable[[Atoms], Any]] = {
    "nine": lambda atoms: None,
    "six under stress": lambda atoms: atoms.info.update(REF_stress=six(atoms)),
    "virials": as_virial,
    "six virials": lambda atoms: atoms.info.update(ref_virial=-atoms.get_volume() * six(atoms)),
    "stress and virial": lambda atoms: atoms.info.update(
        virial=-atoms.get_volume() * np.asarray(atoms.info["REF_stress"]).reshape(3, 3)
    ),
    "wrong labels with weight 0": with_weights,
}


@pytest.mark.filterwarnings("default::forcetune.errors.ForcetuneWarning")
@pytest.mark.parametrize("form", FORMS)
def test_own_labels_have_no_errors(form: str, mini: Backbone, crystals: list[Atoms], tmp_path: Path) -> None:
    errors = forcetune.evaluate(mini, write(tmp_path / "a.xyz", changed(crystals, FORMS[form])))
    assert errors.energy_mae_mev_per_atom == pytest.approx(0, abs=1e-6)
    assert errors.forces_mae_mev_per_ang == pytest.approx(0, abs=1e-4)
    assert errors.stress_mae_mev_per_ang3 == pytest.approx(0, abs=1e-4)
    assert 0 < errors.n_frames <= 10


CASES = (
    *("stress_unused", "config_weights", "DFT_virials", "stress_six", "stress_and_virial", "half_forces", "slab"),
    "eight_frames",
)


@pytest.mark.filterwarnings("default::forcetune.errors.ForcetuneWarning")
@pytest.mark.parametrize("case", CASES)
def test_case_files_have_no_errors(case: str, mini: Backbone, case_files: Path) -> None:
    errors = forcetune.evaluate(mini, case_files / f"{case}.xyz")
    assert errors.energy_mae_mev_per_atom == pytest.approx(0, abs=1e-6)
    assert errors.forces_mae_mev_per_ang == pytest.approx(0, abs=1e-4)
    if case.startswith(("stress", "DFT", "slab")):
        assert errors.stress_mae_mev_per_ang3 == pytest.approx(0, abs=1e-4)
    if case == "config_weights":
        assert errors.n_frames == 8


# ---- stress is trained on ------------------------------------------------------------------------------------------


def test_stress_is_trained_on_where_there_is_some(command: Command, crystals: list[Atoms], tmp_path: Path) -> None:
    data = write(tmp_path / "a.xyz", crystals)
    code, _, err = fit(command, data, tmp_path / "run")
    assert code == 0, err
    assert "stress: trained on with weight 100000, beside 1000 of forces" in err and "training.loss.stress" in err
    assert results(tmp_path / "run")["training"]["loss"]["stress"] == 1e5
    # the run's own configuration leaves the choice to the data again
    assert "stress: null" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")


def test_stress_that_is_left_out_is_told(command: Command, crystals: list[Atoms], tmp_path: Path) -> None:
    data = write(tmp_path / "a.xyz", crystals)
    code, _, err = fit(command, data, tmp_path / "run", "--set", "training.loss.stress=0")
    assert code == 0, err
    assert "warning: The training frames have stress labels that are not trained on: training.loss.stress is 0" in err
    assert results(tmp_path / "run")["training"]["loss"]["stress"] == 0
    code, _, err = fit(command, data, tmp_path / "other", "--stress-key", "none")
    assert code == 0, err
    assert "stress" not in err.replace(str(data), "")


def test_the_gradient_of_the_loss_follows_stress(crystals: list[Atoms], tmp_path: Path) -> None:
    """With labels that differ in stress alone a fit gives another adapter, unless its weight is 0."""
    other = changed(crystals, lambda atoms: atoms.info.update(REF_stress=2.0 * np.asarray(atoms.info["REF_stress"])))
    paths = [write(tmp_path / "a.xyz", crystals), write(tmp_path / "b.xyz", other)]

    def forces(path: Path, name: str, **settings: Any) -> float:
        options = {"training.batch_size": 9, "data.doctor": "off", "output.forgetting": False, **settings}
        run = forcetune.fit(path, method="readout", valid=1, epochs=1, out=tmp_path / name, settings=options)
        errors = run.after["train"].forces_mae_mev_per_ang
        assert errors is not None
        return errors

    assert forces(paths[0], "one") != pytest.approx(forces(paths[1], "two"), rel=1e-6)


# ---- sign and order of stress, with few frames ---------------------------------------------------------------------


def flip(atoms: Atoms) -> None:
    atoms.info["REF_stress"] = -np.asarray(atoms.info["REF_stress"])


def vasp(atoms: Atoms) -> None:
    """xx yy zz xy yz zx, where ASE has xx yy zz yz xz xy."""
    atoms.info["REF_stress"] = six(atoms)[[0, 1, 2, 5, 3, 4]]


@pytest.mark.parametrize(("change", "code"), [(flip, "stress-sign"), (vasp, "stress-order")])
def test_doctor_and_fit_name_sign_and_order(
    change: Callable[[Atoms], None], code: str, command: Command, mini: Backbone, crystals: list[Atoms], tmp_path: Path
) -> None:
    data = write(tmp_path / "a.xyz", changed(crystals, change))
    severities = {item.code: item.severity for item in doctor(data, mini).findings if item.severity == "error"}
    assert severities == {code: "error"}
    status, _, err = fit(command, data, tmp_path / "run")
    assert status == 2
    assert f"[{code}]" in err and str(data) in err
    assert not (tmp_path / "run").exists()


def test_right_stress_is_left_alone(mini: Backbone, crystals: list[Atoms]) -> None:
    assert doctor(crystals, mini).codes == {"composition-rank", "cell-below-cutoff"} & doctor(crystals, mini).codes


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_order_is_recognised(order: tuple[str, ...], sign: float) -> None:
    rng = np.random.default_rng(2)
    model = 0.01 * rng.standard_normal((6, 3, 3))
    model += model.transpose(0, 2, 1) + 0.2 * np.eye(3)
    components = dict(zip(("xx", "yy", "zz", "yz", "xz", "xy"), model[:, *VOIGT].T, strict=True))
    written = sign * np.stack([components[name] for name in order], axis=1)
    label = written[:, np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])]
    actual = find_order(label, model)
    assert actual is not None and actual.text == ORDERS[order]
    assert actual.after == pytest.approx(sign) and abs(actual.before) < 0.7


def test_stress_in_the_right_order_has_no_other() -> None:
    rng = np.random.default_rng(3)
    model = 0.01 * rng.standard_normal((5, 3, 3))
    model += model.transpose(0, 2, 1)
    assert find_order(model, model) is None
    assert find_order(model * np.eye(3), model) is None  # a crystal whose axes are its own has no shear
    other = rng.standard_normal((5, 3, 3))
    assert find_order(other + other.transpose(0, 2, 1), model) is None


def test_a_pressure_of_the_other_sign_is_no_wrong_sign(mini: Backbone, crystals: list[Atoms]) -> None:
    """Two theories may differ in the sign of the pressure of all frames."""
    frames = frames_from_atoms(crystals).frames
    labelled = LabelledPredictions.split(frames, predict(mini, build_graphs(mini, frames)))
    assert labelled.stress is not None
    offset = 0.2 * np.eye(3)
    moved = replace(labelled, stress=labelled.stress - offset, stress_label=labelled.stress + offset)
    assert "stress-sign" not in {item.code for item in diagnose(moved)}


@pytest.mark.parametrize(("factor", "code"), [(-1.0, "forces-sign"), (0.0194469, "forces-unit")])
def test_forces_are_checked_with_few_frames_too(factor: float, code: str, mini: Backbone) -> None:
    few = labelled_by(mini, 4)
    for atoms in few:
        atoms.arrays["REF_forces"] *= factor
    assert code in {item.code for item in doctor(few, mini).findings if item.severity == "error"}


# ---- labels that are missing ---------------------------------------------------------------------------------------


def drop_half(name: str, *, keep: int = 0) -> Callable[[list[Atoms]], None]:
    def change(frames: list[Atoms]) -> None:
        for atoms in frames[keep::2]:
            (atoms.arrays if name == "REF_forces" else atoms.info).pop(name)

    return change


@pytest.mark.parametrize("name", ["REF_forces", "REF_energy", "REF_stress"])
@pytest.mark.parametrize("stream", ["off", "on"])
def test_labels_that_half_of_the_frames_lack(
    name: str, stream: str, command: Command, mini: Backbone, crystals: list[Atoms], tmp_path: Path
) -> None:
    frames = [atoms.copy() for atoms in crystals]
    drop_half(name)(frames)
    data = write(tmp_path / "a.xyz", frames)
    label = name.removeprefix("REF_")
    code, _, err = fit(command, data, tmp_path / "run", "--set", f"data.stream={stream}")
    assert code == 0, err
    assert f"5 of 10 frames have no {label} under '{name}'" in err
    errors = results(tmp_path / "run")["errors"]["train"]["before"]
    for key in ("energy_mae_mev_per_atom", "forces_mae_mev_per_ang", "stress_mae_mev_per_ang3"):
        assert errors[key] == pytest.approx(0, abs=1e-3)
    if stream == "off":
        checkup = doctor(data, mini)
        assert checkup.n_errors == 0 and (f"{label}-missing" in checkup.codes)


@pytest.mark.parametrize("label", ["energy", "forces"])
def test_none_trains_on_the_other_label_alone(label: str, command: Command, tmp_path: Path) -> None:
    """Whether the label is in the file or not."""
    model = write_model(tmp_path / "m.model")
    name = f"REF_{label}"
    for number, frames in enumerate((labelled(12), labelled(12))):
        if number:
            drop_half(name)(frames)
            drop_half(name, keep=1)(frames)
        data = write(tmp_path / f"{number}.xyz", frames)
        run = tmp_path / f"run{number}"
        code, _, err = fit(command, data, run, f"--{label}-key", "none", model=model)
        assert code == 0, err
        assert f"no {label} (data.{label}_key=none)" in err
        content = results(run)
        assert content["training"]["loss"][label] == 0
        key = {"energy": "energy_mae_mev_per_atom", "forces": "forces_mae_mev_per_ang"}[label]
        assert content["errors"]["valid"]["after"][key] is None
        assert (run / "report.html").is_file()
    code, out, err = command("evaluate", tmp_path / "run0", tmp_path / "0.xyz", f"--{label}-key", "none", "--json")
    assert code == 0, err
    assert json.loads(out)[key] is None


def test_training_counts_each_label_by_itself(tmp_path: Path) -> None:
    """Frames of weight 0, and labels that are missing, change nothing of what the others give."""
    model = write_model(tmp_path / "m.model")
    plain = labelled(10)
    noise = labelled(4, seed=5)
    for atoms in noise:
        atoms.info |= {"REF_energy": 1e3, "config_weight": 0.0}
    adapters = []
    for name, frames in (("one", plain), ("two", [*plain[:4], *noise, *plain[4:]])):
        settings = {"data.doctor": "off", "output.forgetting": False}
        data = write(tmp_path / f"{name}.xyz", frames)
        options = {"model": str(model), "method": "readout", "valid": 2, "epochs": 2, "out": tmp_path / name}
        if name == "two":
            with pytest.warns(ForcetuneWarning, match="4 of 14 frames have config_weight 0 and are left out"):
                run = forcetune.fit(data, settings=settings, **options)
        else:
            run = forcetune.fit(data, settings=settings, **options)
        adapters.append((run.adapter / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


# ---- isolated atoms, charge and spin -------------------------------------------------------------------------------


def with_isolated(model: Backbone, shifts: dict[int, float]) -> list[Atoms]:
    energies = model.reference_energies
    atoms = [Atoms([z], [[0.0, 0.0, 0.0]], info={"REF_energy": energies[z] + off}) for z, off in shifts.items()]
    return [*atoms, *labelled_by(model, 10)]


def test_isolated_atoms_that_do_not_fit_are_told(command: Command, mini: Backbone, tmp_path: Path) -> None:
    data = write(tmp_path / "a.xyz", with_isolated(mini, {1: -5.0, 6: -6.0, 7: -6.5, 8: -7.0}))
    finding = next(item for item in doctor(data, mini).findings if item.code == "isolated-energies")
    assert finding.severity == "warning"
    assert (
        "H −15.7" in finding.message
        and "(model −10.7" in finding.message
        and "--references isolated" in finding.message
    )
    code, _, err = fit(command, data, tmp_path / "run")
    assert code == 0, err
    assert "warning: Isolated atoms have H −15.7" in err and "--references isolated" in err
    code, _, err = fit(command, data, tmp_path / "other", "--references", "isolated")
    assert code == 0, err
    assert "--references estimate fits the frames" in err
    elements = results(tmp_path / "other")["reference_energies"]["elements"]
    assert {row["symbol"]: round(row["after_ev"] - row["before_ev"], 6) for row in elements} == {
        "H": -5.0,
        "C": -6.0,
        "N": -6.5,
        "O": -7.0,
    }


def test_isolated_atoms_that_fit_are_advised(command: Command, mini: Backbone, tmp_path: Path) -> None:
    data = write(tmp_path / "a.xyz", with_isolated(mini, {1: 0.0, 6: 0.0, 7: 0.0, 8: 0.0}))
    code, _, err = fit(command, data, tmp_path / "run")
    assert code == 0, err
    assert "Isolated atoms have H −10.71 (model −10.71)" in err and "--references isolated takes them" in err
    # labels are the model's own, so that any training makes it worse, which is the only warning
    assert "warning" not in err.replace("warning: the tuned model is worse than the untouched one on the valid", "")
    finding = next(item for item in doctor(data, mini).findings if item.code == "isolated-energies")
    assert finding.severity == "note"


def test_charge_and_spin_are_named_where_energies_fall_into_two_groups(mini: Backbone) -> None:
    mixed = labelled_by(mini, 12)
    for atoms in mixed[::2]:
        atoms.info |= {"charge": 1, "spin": 2, "REF_energy": atoms.info["REF_energy"] + 9.5}
    for atoms in mixed[1::2]:
        atoms.info |= {"charge": 0, "spin": 1}
    messages = {item.code: item.message for item in doctor(mixed, mini).findings}
    groups = ("charge 1 (the others 0) and spin 2 (the others 1)", "charge 0 (the others 1) and spin 1 (the others 2)")
    assert any(group in messages["energy-levels"] for group in groups)
    assert "'charge' and 'spin' are not read" in messages["labels-unread"]


def test_groups_without_charges_are_told_as_before(mini: Backbone) -> None:
    mixed = labelled_by(mini, 12)
    for atoms in mixed[::2]:
        atoms.info["REF_energy"] += 9.5
    messages = {item.code: item.message for item in doctor(mixed, mini).findings}
    assert "settings, units or molecules are mixed" in messages["energy-levels"]


# ---- a weak model is believed as far as it agrees ------------------------------------------------------------------


def weakened(model: Backbone, structures: list[Atoms], noise: float, energies: str) -> LabelledPredictions:
    """Right labels, and a model whose forces follow them as far as noise lets them and whose energies do not at all."""
    rng = np.random.default_rng(6)
    frames = frames_from_atoms(structures).frames
    labelled = LabelledPredictions.split(frames, predict(model, build_graphs(model, frames)))
    forces = [own + noise * own.std() * rng.standard_normal(own.shape) for own in labelled.forces]
    spread = float(np.std(labelled.energy))
    moved = {
        "unrelated": labelled.energy.mean() + spread * rng.standard_normal(len(labelled.energy)),
        "opposite": 2 * labelled.energy.mean() - labelled.energy,
        "small": labelled.energy.mean() + 5 * (labelled.energy - labelled.energy.mean()),
    }[energies]
    return replace(labelled, forces=forces, energy=moved)


@pytest.mark.parametrize("energies", ["unrelated", "opposite", "small"])
def test_energies_are_not_judged_by_a_weak_model(energies: str, mini: Backbone) -> None:
    structures = labelled_by(mini, 40)
    weak = weakened(mini, structures, 1.05, energies)
    agreement = force_agreement(weak)
    assert agreement is not None and 0.6 < agreement.correlation < 0.8
    assert energy_agreement(weak) is not None
    # what it does not know is still said of the model, not of the labels
    assert [str(item) for item in diagnose(weak) if not item.code.startswith("element-unknown")] == []


def test_energies_are_judged_by_a_good_model(mini: Backbone) -> None:
    structures = labelled_by(mini, 40)
    shuffled = np.random.default_rng(8).permutation([atoms.info["REF_energy"] for atoms in structures])
    for atoms, energy in zip(structures, shuffled, strict=True):
        atoms.info["REF_energy"] = float(energy)
    assert "energy-shuffled" in doctor(structures, mini).codes


@pytest.mark.parametrize("part", ["train", "test"])
def test_liquid_water_is_no_alarm(part: str, reference_data: Path, mini: Backbone) -> None:
    """Right labels, which mini's forces follow with 0.68 and its energies not at all."""
    frames = read_frames(reference_data / "water" / f"water_deepmd_{part}.xyz").frames[::4][:30]
    findings = diagnose(LabelledPredictions.split(frames, predict(mini, build_graphs(mini, frames))))
    assert [str(item) for item in findings] == []


def test_energies_in_single_precision_repeat_by_chance() -> None:
    """Of 300 energies within some eV, written in steps of 1/2048 eV, a few are equal."""
    rng = np.random.default_rng(9)
    frames = []
    for atoms in shaken(50, periodic=False) * 6:
        moved = atoms.copy()
        moved.positions += 0.1 * rng.standard_normal(moved.positions.shape)
        moved.info["REF_energy"] = round((-5700.0 + rng.standard_normal()) * 2048) / 2048
        frames.append(moved)
    energies = [atoms.info["REF_energy"] for atoms in frames]
    assert len(set(energies)) < len(energies) - 3
    read = frames_from_atoms(frames).frames
    shapes = [measure_shape(frame) for frame in read]
    assert "energy-repeated" not in {item.code for item in check_labels(read, shapes)}
    written = [replace(frame, energy=read[k // 8 * 8].energy) for k, frame in enumerate(read)]
    assert "energy-repeated" in {item.code for item in check_labels(written, shapes)}
