"""Calibrating a run, evaluating it, its calculator, and descriptors what to label next, as users do."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from safetensors.numpy import load_file, save_file

import forcetune
from forcetune.deployment.loading import deploy
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.frames.read import read_frames
from forcetune.runs import descriptors
from forcetune.uncertainty.file import ARRAYS_NAME, JSON_NAME, load_uncertainty
from forcetune.uncertainty.last_layer import predict_deviations
from systems import labelled, write_labelled
from terminal import Command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short runs on methanol held by springs, with 20 frames to validate on."""
    folder = tmp_path_factory.mktemp("runs")
    train = write_labelled(folder / "train.xyz", 12)
    valid = write_labelled(folder / "valid.xyz", 20, seed=1)
    folders = []
    for seed in (1, 2):
        settings = {"training.seed": seed, "training.compile": "off", "output.forgetting": False, "data.doctor": "off"}
        out = folder / f"run-{seed}"
        forcetune.fit(train, valid=valid, model="mini", method="elora", epochs=2, out=out, settings=settings)
        folders.append(out)
    return folders


@pytest.fixture(scope="module")
def calibrated(runs: list[Path]) -> Path:
    forcetune.calibrate(runs[0])
    return runs[0]


@pytest.fixture(scope="module")
def test_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("test") / "test.xyz", 30, seed=2)


def test_calibrate_and_evaluate_at_the_command_line(
    runs: list[Path], test_file: Path, command: Command, tmp_path: Path
) -> None:
    run = runs[0]
    code, out, _ = command("calibrate", run)
    assert code == 0
    assert "Force components" in out
    record = json.loads((run / JSON_NAME).read_text())
    assert (record["kind"], record["n_train"], record["n_valid"]) == ("last layer", 12, 20)
    assert record["calibrations"]["energy_per_atom"]["quantiles"]["0.95"] is not None
    assert record["calibrations"]["energy_per_atom"]["quantiles"]["0.99"] is None, "20 frames promise 95 %"

    plot = tmp_path / "plot.svg"
    code, out, _ = command("evaluate", run, test_file, "--uncertainty", "--plot", plot, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["n_frames"] == 30
    forces = result["uncertainty"]["forces"]
    assert [row["level"] for row in forces["coverage"]] == [0.5, 0.8, 0.95]
    # on the frames that it was calibrated on, coverage is exact: ⌈level · (n + 1)⌉ of n, by frames and by components
    code, out, _ = command("evaluate", run, run.parent / "valid.xyz", "--uncertainty", "--json")
    assert code == 0
    calibrated_on = json.loads(out)["uncertainty"]
    for quantity, entries in (("energy_per_atom", 1), ("forces", 18), ("forces_of_atoms", 6)):
        for row in calibrated_on[quantity]["coverage"]:
            expected = math.ceil(row["level"] * 21 * entries - 1e-9) / (20 * entries)
            assert row["conformal"] == pytest.approx(expected, abs=1e-9)
    assert result["uncertainty"]["cost_ratio"] > 0
    assert plot.read_text().startswith("<?xml")
    code, out, _ = command("evaluate", run, test_file, "--uncertainty")
    assert code == 0
    assert "conformal" in out


def test_scales_are_those_of_the_validation_frames(calibrated: Path) -> None:
    deployed = deploy(calibrated)
    uncertainty = load_uncertainty(calibrated, [calibrated / "adapter"])
    assert uncertainty.posterior is not None
    graphs = build_graphs(deployed.backbone, read_frames(calibrated.parent / "valid.xyz").frames)
    predictions, energy, forces = predict_deviations(deployed.backbone, graphs, uncertainty.posterior)
    ratios = (predictions.energy - predictions.energy_label) / energy
    assert uncertainty.scale("energy_per_atom") == pytest.approx(np.sqrt(np.mean(ratios**2)), rel=1e-6)
    assert forces is not None
    ratios = (predictions.forces - predictions.forces_label) / forces
    assert uncertainty.scale("forces") == pytest.approx(np.sqrt(np.mean(ratios**2)), rel=1e-6)
    half = uncertainty.calibrations["energy_per_atom"].quantiles[0.5]
    scores = np.sort(np.abs(predictions.energy - predictions.energy_label) / energy)
    assert half == pytest.approx(scores[10], rel=1e-6), "the ⌈21 · 0.5⌉-th smallest of 20"


def test_the_calculator_has_calibrated_deviations(calibrated: Path) -> None:
    uncertainty = load_uncertainty(calibrated, [calibrated / "adapter"])
    assert uncertainty.posterior is not None
    atoms = labelled(1, seed=9)[0]
    deployed = deploy(calibrated)
    graphs = build_graphs(deployed.backbone, [forcetune.read_frames(_write(calibrated, atoms)).frames[0]])
    _, energy, forces = predict_deviations(deployed.backbone, graphs, uncertainty.posterior)
    plain, both, cheap = (forcetune.calculator(calibrated, uncertainty=option) for option in (False, True, "energy"))
    for calculator in (plain, both, cheap):
        calculator.calculate(atoms)
        assert calculator.results["energy"] == pytest.approx(plain.results["energy"], abs=1e-9)
    scale = uncertainty.scale("energy_per_atom")
    assert scale is not None
    assert both.results["energy_std"] == pytest.approx(scale * energy[0], rel=1e-6)
    assert cheap.results["energy_std"] == pytest.approx(scale * energy[0], rel=1e-6)
    scale = uncertainty.scale("forces")
    assert scale is not None
    assert forces is not None
    np.testing.assert_allclose(both.results["forces_std"], scale * forces, rtol=1e-6)
    assert "forces_std" not in cheap.results
    assert "energy_std" not in plain.results


def _write(folder: Path, atoms: Atoms) -> Path:
    path = folder.parent / "one.xyz"
    ase.io.write(path, atoms, format="extxyz")
    return path


def test_uncertainty_rises_away_from_the_training_frames(calibrated: Path) -> None:
    calculator = forcetune.calculator(calibrated, uncertainty=True)
    near = labelled(1, seed=11)[0]
    far = near.copy()
    far.positions += np.random.default_rng(0).normal(scale=0.25, size=far.positions.shape)
    deviations = []
    for atoms in (near, far):
        calculator.calculate(atoms)
        deviations.append((calculator.results["energy_std"], calculator.results["forces_std"].mean()))
    assert deviations[1][0] > deviations[0][0]
    assert deviations[1][1] > 1.5 * deviations[0][1]


def test_an_ensemble_is_calibrated_by_the_same_means(runs: list[Path], test_file: Path, command: Command) -> None:
    code, out, _ = command("calibrate", runs[0], "--ensemble", runs[1], "--json")
    assert code == 0
    record = json.loads(out)
    assert record["kind"] == "ensemble"
    code, out, _ = command("evaluate", runs[0], test_file, "--ensemble", runs[1], "--uncertainty", "--json")
    assert code == 0
    assert json.loads(out)["uncertainty"]["kind"] == "ensemble"
    atoms = labelled(1, seed=3)[0]
    results = []
    for option in (False, True):
        calculator = forcetune.calculator(adapter=list(runs), uncertainty=option)
        calculator.calculate(atoms)
        results.append(calculator.results)
    scale = record["calibrations"]["forces"]["scale"]
    np.testing.assert_allclose(results[1]["forces_std"], scale * results[0]["forces_std"], rtol=1e-9)


def test_what_cannot_be_is_refused_by_name(
    runs: list[Path], calibrated: Path, test_file: Path, command: Command, tmp_path: Path
) -> None:
    code, _, error = command("evaluate", runs[1], test_file, "--uncertainty")
    assert code == 2
    assert "not calibrated yet" in error
    assert command("calibrate", "mini")[0] == 2
    assert command("evaluate", calibrated, test_file, "--plot", tmp_path / "plot.png")[0] == 2
    code, _, error = command("evaluate", calibrated, test_file, "--uncertainty", "--plot", tmp_path / "plot.doc")
    assert (code, ".png" in error) == (2, True)
    code, _, error = command("evaluate", calibrated, test_file, "--uncertainty", "--adapter", runs[1])
    assert (code, "--adapter: with --uncertainty" in error) == (2, True)
    with pytest.raises(InputError, match="only a run has a calibration"):
        forcetune.calculator("mini", uncertainty=True)
    with pytest.raises(InputError, match="True, False or 'energy'"):
        forcetune.calculator(calibrated, uncertainty="forces")  # pyright: ignore[reportArgumentType]

    copy = tmp_path / "copy"
    shutil.copytree(calibrated, copy)
    (copy / ARRAYS_NAME).write_bytes((copy / ARRAYS_NAME).read_bytes()[:-9])
    with pytest.raises(InputError, match=f"{ARRAYS_NAME}: cannot be read"):
        load_uncertainty(copy, [copy / "adapter"])
    shutil.copy(runs[1] / "adapter" / "adapter_model.safetensors", copy / "adapter")
    with pytest.raises(InputError, match="belongs to other adapters"):
        load_uncertainty(copy, [copy / "adapter"])
    (copy / JSON_NAME).write_text("{")
    with pytest.raises(InputError, match=f"{JSON_NAME}: cannot be read"):
        load_uncertainty(copy, [copy / "adapter"])


def test_arrays_of_another_calibration_and_damaged_adapters_are_refused(calibrated: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(calibrated, copy)
    adapter = copy / "adapter"
    record = json.loads((copy / JSON_NAME).read_text())
    assert record["arrays_sha256"] == hashlib.sha256((copy / ARRAYS_NAME).read_bytes()).hexdigest()
    arrays = load_file(copy / ARRAYS_NAME)
    save_file(arrays | {"eigenvalues": 2 * arrays["eigenvalues"]}, copy / ARRAYS_NAME)
    with pytest.raises(InputError, match=f"{ARRAYS_NAME}: does not fit {JSON_NAME}"):
        load_uncertainty(copy, [adapter])
    del record["arrays_sha256"]  # as earlier versions wrote it
    (copy / JSON_NAME).write_text(json.dumps(record))
    posterior = load_uncertainty(copy, [adapter]).posterior
    assert posterior is not None
    np.testing.assert_array_equal(posterior.eigenvalues, 2 * arrays["eigenvalues"])
    for content, message in (("{", "cannot be read"), ('{"format_version": 1}', "Field required")):
        (adapter / "adapter_config.json").write_text(content)
        with pytest.raises(InputError, match=f"adapter_config.json: .*{message}"):
            load_uncertainty(copy, [adapter])


def pool_file(path: Path, calibrated: Path) -> Path:
    """Methanols near the training frames, three training frames turned and renumbered, one far out, one copy of it."""
    pool = labelled(20, seed=5)
    for atoms in ase.io.read(calibrated.parent / "train.xyz", ":3"):
        assert isinstance(atoms, Atoms)
        atoms.rotate(50, (1, 2, 3))
        pool.append(atoms[[0, 1, 3, 2, 5, 4]])
    far = labelled(1, seed=6)[0]
    far.positions[0] += [0.6, 0.2, 0.0]
    turned = far.copy()
    turned.rotate(80, "x")
    pool += [far, turned]
    ase.io.write(path, pool, format="extxyz")
    return path


def test_select_leaves_out_what_is_labelled_and_takes_the_outlier_once(
    calibrated: Path, command: Command, tmp_path: Path
) -> None:
    pool, target = pool_file(tmp_path / "pool.xyz", calibrated), tmp_path / "chosen.xyz"
    code, out, _ = command("select", pool, "--n", 30, "--model", calibrated, "-o", target, "--json")
    assert code == 0
    selection = json.loads(out)
    assert (selection["n_pool"], selection["n_excluded"], selection["n_labelled"]) == (25, 3, 32)
    frames = [chosen["frame"] for chosen in selection["chosen"]]
    assert frames[0] in (23, 24)
    assert sorted({*frames} - {23, 24}) == list(range(20))
    assert len(frames) == 21, "the copy is not taken"
    structures = ase.io.read(target, ":")
    assert [atoms.info["select_rank"] for atoms in structures] == list(range(1, 22))
    assert structures[0].info["select_frame"] == frames[0]
    assert "from the nearest labelled frame" in structures[0].info["select_reason"]
    assert structures[0].info["select_nearest_labelled"] == pytest.approx(selection["chosen"][0]["nearest_labelled"])
    assert structures[0].info["select_energy_std"] > 0
    np.testing.assert_allclose(structures[0].positions, ase.io.read(pool, frames[0]).positions, atol=1e-7)


def test_a_pool_in_pieces_gives_what_a_pool_at_once_does(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_file(tmp_path / "pool.xyz", calibrated)
    options = {"n": 8, "model": calibrated, "uncertainty": "forces"}
    at_once = forcetune.select(pool, **options)
    monkeypatch.setattr(descriptors, "AT_ONCE", 3)
    sizes: list[int] = []
    describe = descriptors._describe_frames

    def counted(backbone, frames, *rest):
        sizes.append(len(frames))
        return describe(backbone, frames, *rest)

    monkeypatch.setattr(descriptors, "_describe_frames", counted)
    in_pieces = forcetune.select(pool, **options)
    assert max(sizes) == 3
    assert [one.frame for one in in_pieces.chosen] == [one.frame for one in at_once.chosen]
    assert in_pieces.chosen[0].score == pytest.approx(at_once.chosen[0].score, rel=1e-9)
    assert in_pieces.chosen[0].forces_std is not None


def test_a_start_set_without_any_run(tmp_path: Path, command: Command) -> None:
    pool = tmp_path / "trajectory.traj"
    structures = labelled(15, seed=8)
    ase.io.write(pool, structures)
    target = tmp_path / "start.xyz"
    code, out, _ = command("select", pool, "--n", 5, "-o", target, "--quota", "CH4O=5", "--json")
    assert code == 0
    selection = json.loads(out)
    assert len(selection["chosen"]) == 5
    assert selection["n_labelled"] == 0
    assert all(chosen["energy_std"] is None for chosen in selection["chosen"])
    again = forcetune.select(pool, n=5, exclude=[target])
    assert again.n_excluded == 5
    assert not {chosen.frame for chosen in again.chosen} & {chosen["frame"] for chosen in selection["chosen"]}
    code, _, error = command("select", pool, "--n", 5, "-o", target, "--uncertainty", "energy")
    assert (code, "only a calibrated run has one" in error) == (2, True)
    assert command("select", pool, "--n", 5, "-o", target, "--strategy", "best")[0] == 2


def test_what_a_selection_reads_is_not_replaced_and_mistakes_end_it_early(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, other = (write_labelled(tmp_path / name, 3, seed=7) for name in ("pool.xyz", "other.xyz"))
    (tmp_path / "folder.xyz").mkdir()
    link = tmp_path / "link.xyz"
    link.symlink_to(pool)
    before = {path: path.read_bytes() for path in (pool, other, calibrated.parent / "train.xyz")}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("forcetune.runs.select.deploy", refuse)
    replaced = [
        pool,
        tmp_path / "x" / ".." / "pool.xyz",
        link,
        other,
        *(calibrated.parent / f"{name}.xyz" for name in ("train", "valid")),
    ]
    (tmp_path / "x").mkdir()
    for output in replaced:
        with pytest.raises(InputError, match="is read by this selection"):
            forcetune.select(pool, n=1, model=calibrated, output=output, exclude=other)
    for name, message in (("folder.xyz", "is a folder"), ("chosen.traj", "ends in .xyz"), ("no/a.xyz", "no folder")):
        with pytest.raises(InputError, match=message):
            forcetune.select(pool, n=1, model=calibrated, output=tmp_path / name)
    with pytest.raises(InputError, match="write proportional"):
        forcetune.select(pool, n=1, model=calibrated, quota="half")
    assert {path: path.read_bytes() for path in before} == before
