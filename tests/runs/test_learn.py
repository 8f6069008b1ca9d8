"""`forcetune learn`: rounds of dynamics, labels and training, interrupted and not, as users run it."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import write

import forcetune
from forcetune.config import load_config
from forcetune.errors import ForcetuneError, InputError
from forcetune.frames.dataset import read_dataset
from forcetune.frames.frame import LabelKeys
from forcetune.runs import learn as learning
from forcetune.runs import learn_round
from forcetune.runs.labelling import LabelError, LabelFolder, compute_label, labelled_atoms, load_labeller
from springs import Springs
from systems import labelled, write_labelled
from terminal import Command

SPRINGS = f"{Path(__file__).parents[1] / 'springs.py'}:Springs"
GATES = ("--set", "training.penalty.gates=1")
SETTINGS: dict[str, Any] = {
    "training.compile": "off",
    "data.doctor": "off",
    "training.valid_every": 1,
    "learn.walkers": 2,
    "learn.picoseconds": 0.04,
    "learn.temperature": 300,
    "learn.final_temperature": 600,
    "learn.every": 10,
    "learn.batch": 3,
    "learn.rounds": 2,
    "learn.forces_std": 0.01,
    "learn.stop": 1e6,
    "learn.novelty": None,
    "learn.apart": 0.3,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Methanol held by springs: training, validation and test frames, and a start structure."""
    folder = tmp_path_factory.mktemp("files")
    write_labelled(folder / "train.xyz", 10)
    write_labelled(folder / "test.xyz", 6, seed=2)
    write(folder / "start.xyz", labelled(1, seed=5)[0], format="extxyz")
    return folder


def learn(files: Path, out: Path, labeller: Any = SPRINGS, **settings: Any) -> forcetune.Learned:
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return forcetune.learn(
        files / "train.xyz",
        start=files / "start.xyz",
        labeller=labeller,
        model="mini",
        method="elora",
        valid=0.3,
        test=files / "test.xyz",
        epochs=2,
        out=out,
        settings=SETTINGS | named,
    )


@pytest.fixture(scope="module")
def whole(files: Path) -> forcetune.Learned:
    """Two rounds without an interruption."""
    return learn(files, files / "whole", **{"learn.labeller_options": {"log": str(files / "whole.log")}})


def begun(whole: forcetune.Learned, out: Path, **settings: Any) -> Path:
    """A loop of other options whose first fit, that of ``whole``, is done."""
    shutil.copytree(whole.folder / "rounds/00", out / "rounds/00")
    shutil.copy(whole.folder / "check.json", out)
    named = {name.replace("__", "."): value for name, value in settings.items()}
    config = load_config(whole.folder / "learn.yaml", overrides=named | {"output.run": str(out)})
    options = config.learn.model_copy(update={"labeller_options": settings.get("learn__labeller_options", {})})
    config.model_copy(update={"learn": options}).save(out / "learn.yaml")
    first = json.loads((out / "rounds/00/round.json").read_text(encoding="utf-8"))
    (out / "rounds/00/round.json").write_text(json.dumps(first | {"bound": config.learn.forces_std}))
    return out


class Killed(BaseException):
    """What no handler catches."""


def test_rounds_are_written_and_trained_on(files: Path, whole: forcetune.Learned) -> None:
    record = whole.record
    assert (record.status, record.labels) == ("rounds", 6)
    assert [one.train_frames for one in record.rounds] == [7, 10, 13]
    assert json.loads((whole.folder / "learn.json").read_text(encoding="utf-8"))["labels"] == 6
    configs = [load_config(whole.folder / f"rounds/{number:02d}/run/config.yaml") for number in range(3)]
    datasets = [read_dataset(config.data) for config in configs]
    origins = [[frame.origin for frame in dataset.valid.frames] for dataset in datasets]
    assert origins[0] == origins[1] == origins[2], "validation frames stay the same"
    assert configs[0].training.start_from is None
    assert configs[2].training.start_from == str(whole.folder / "rounds/01/run/adapter")
    assert whole.run == whole.folder / "rounds/02/run"
    for number, dataset in enumerate(datasets[1:], 1):
        new = ase.io.read(whole.folder / f"rounds/{number:02d}/labelled.xyz", ":")
        expected = Springs()
        for atoms, frame in zip(new, dataset.train.frames[-3:], strict=True):
            expected.calculate(atoms)
            assert frame.energy == pytest.approx(expected.results["energy"], abs=1e-5)
            np.testing.assert_allclose(frame.forces, expected.results["forces"], atol=1e-5)
    references = [
        json.loads((whole.folder / f"rounds/{number:02d}/run/adapter/adapter_config.json").read_text())
        for number in (0, 2)
    ]
    assert references[0]["reference_energies_ev"] == references[1]["reference_energies_ev"]
    errors = [one.errors["test"]["forces_mae_mev_per_ang"] for one in record.rounds]
    measured = forcetune.evaluate(whole.run, files / "test.xyz").forces_mae_mev_per_ang
    assert errors[2] == pytest.approx(measured, rel=1e-6)


def test_the_new_frames_are_measured_before_they_are_trained_on(whole: forcetune.Learned) -> None:
    new = whole.record.rounds[2].new
    measured = forcetune.evaluate_uncertainty(whole.folder / "rounds/01/run", whole.folder / "rounds/02/labelled.xyz")
    assert new["forces_mae_mev_per_ang"] == pytest.approx(measured["forces_mae_mev_per_ang"], rel=1e-6)
    ratio = new["forces_rmse_mev_per_ang"] / new["forces_std_mev_per_ang"]
    assert ratio == pytest.approx(measured["uncertainty"]["forces"]["ratio"], rel=1e-6)


def test_no_two_labelled_structures_are_nearly_the_same(whole: forcetune.Learned) -> None:
    collected = ase.io.read(whole.folder / "rounds/01/dynamics/001.xyz", ":")
    steps = [atoms.info["learn_step"] for atoms in collected]
    assert steps == sorted(steps)
    assert all(atoms.info["learn_uncertainty"] > 0.01 for atoms in collected)
    chosen = [one for number in (1, 2) for one in ase.io.read(whole.folder / f"rounds/{number:02d}/selected.xyz", ":")]
    for atoms in chosen:
        assert atoms.info["select_nearest_labelled"] >= 0.3
    run = whole.folder / "rounds/00/run"
    pool = [whole.folder / f"rounds/01/dynamics/{number:03d}.xyz" for number in (1, 2)]
    everything = forcetune.select(pool, n=100, model=run, uncertainty="forces")
    apart = forcetune.select(pool, n=100, model=run, uncertainty="forces", apart=0.3)
    assert 3 <= len(apart.chosen) < len(everything.chosen)
    assert all((one.nearest_chosen or 1.0) >= 0.3 for one in apart.chosen)
    assert min(one.nearest_chosen for one in everything.chosen if one.nearest_chosen is not None) < 0.3
    assert [one.frame for one in apart.chosen[:3]] == [atoms.info["select_frame"] for atoms in chosen[:3]]


def test_a_loop_that_is_killed_goes_on_and_labels_nothing_twice(
    files: Path, whole: forcetune.Learned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed while a label is computed, while a fit is running, between fit and calibration, and in the dynamics."""
    log = tmp_path / "calls.log"
    options = {"learn.labeller_options": {"log": str(log)}}
    original = {name: getattr(learn_round, name) for name in ("calibrate", "explore", "run_fit")}

    def dying(name: str, at: int) -> None:
        count = 0

        def replaced(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise Killed
            return original[name](*arguments, **named)

        monkeypatch.setattr(learn_round, name, replaced)

    for name, at in (("explore", 2), ("run_fit", 1), ("calibrate", 1)):
        dying(name, at)
        with pytest.raises(Killed):
            learn(files, tmp_path / "cut", **options)
        monkeypatch.setattr(learn_round, name, original[name])
    assert not (tmp_path / "cut" / "rounds/01/round.json").exists()
    done = learn(files, tmp_path / "cut", **options)
    lines = log.read_text().splitlines()
    assert len(set(lines)) == len(lines) == 7, "one to compare with the training frames, and six labels"
    assert sorted(lines) == sorted((files / "whole.log").read_text().splitlines())
    for one, other in zip(done.record.rounds, whole.record.rounds, strict=True):
        assert one.errors["test"]["forces_mae_mev_per_ang"] == pytest.approx(
            other.errors["test"]["forces_mae_mev_per_ang"], rel=1e-9
        )
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("*.xyz")}
    again = learn(files, tmp_path / "cut", **options)
    assert again.record == done.record
    assert {path: path.stat().st_mtime_ns for path in done.folder.rglob("*.xyz")} == before
    with pytest.raises(InputError, match=r"begun with other options \(learn\.batch\)"):
        learn(files, tmp_path / "cut", **options, learn__batch=4)


def test_labels_are_written_at_once_and_none_is_computed_again(tmp_path: Path) -> None:
    folder, keys = LabelFolder(tmp_path / "labels"), LabelKeys("REF_energy", "REF_forces", None)
    structures, computed = labelled(5), []

    def compute(atoms: Atoms) -> dict[str, Any]:
        computed.append(len(computed))
        if len(computed) == 3:
            raise Killed
        if len(computed) == 4:
            raise LabelError("no field")
        return compute_label(atoms, Springs, stress=False, largest_force=100)

    with pytest.raises(Killed):
        for number, atoms in enumerate(structures, 1):
            folder.label(number, atoms, keys, compute)
    assert [folder.is_done(number) for number in range(1, 6)] == [True, True, False, False, False]
    for number, atoms in enumerate(structures, 1):
        folder.label(number, atoms, keys, compute)
    assert len(computed) == 6
    assert folder.failure(3) == "no field"
    assert [folder.labelled(number).is_file() for number in range(1, 6)] == [True, True, False, True, True]
    written = ase.io.read(folder.labelled(5))
    assert written.info["REF_energy"] == pytest.approx(structures[4].info["REF_energy"], abs=1e-6)

    def die(_: Atoms) -> dict[str, Any]:
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            folder.label(6, structures[0], keys, die)
    folder.label(6, structures[0], keys, die)
    assert folder.failure(6) == "the process died 2 times while it was computed"
    assert not list((tmp_path / "labels").glob("*.begun"))


class _NotFinite(Springs):
    def calculate(self, *arguments: Any, **options: Any) -> None:
        super().calculate(*arguments, **options)
        self.results["forces"][2, 1] = np.nan


def test_what_no_label_comes_of() -> None:
    atoms = labelled(1)[0]
    for make, message in (
        (lambda: Springs(unconverged=True), "has not converged"),
        (_NotFinite, "forces are not finite"),
        (EMT, "force on atom"),
        (lambda: Springs(log="/nowhere/at/all"), "FileNotFoundError"),
    ):
        with pytest.raises(LabelError, match=message):
            compute_label(atoms, make, stress=False, largest_force=1e-3 if make is EMT else 100)
    label = compute_label(atoms, Springs, stress=False, largest_force=100)
    np.testing.assert_allclose(label["forces"], atoms.arrays["REF_forces"], atol=1e-9)


def test_labels_stand_where_those_of_the_training_frames_do(tmp_path: Path) -> None:
    from ase.build import bulk

    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    label = compute_label(atoms, EMT, stress=True, largest_force=100)
    alone = atoms.copy()
    alone.calc = EMT()
    for number, keys in enumerate(
        (
            LabelKeys("calculator", "calculator", "calculator"),
            LabelKeys("dft_energy", "dft_forces", "dft_virial"),
            LabelKeys("dft_energy", "calculator", "dft_stress"),
        )
    ):
        path = tmp_path / f"{number}.xyz"
        write(path, labelled_atoms(atoms, label, keys), format="extxyz")
        named = {f"{name}_key": getattr(keys, name) for name in ("energy", "forces", "stress")}
        frame = forcetune.read_frames(path, **named).frames[0]
        assert frame.energy == pytest.approx(alone.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(frame.forces, alone.get_forces(), atol=1e-6)
        np.testing.assert_allclose(frame.stress, alone.get_stress(voigt=False), atol=1e-7)


def test_failed_labels_are_named_and_left_out(files: Path, whole: forcetune.Learned, tmp_path: Path) -> None:
    options = {"learn__labeller_options": {"log": str(tmp_path / "log"), "fails": [2]}, "learn__rounds": 1}
    done = learn(files, begun(whole, tmp_path / "out", **options), **options)
    (failure,) = done.record.rounds[1].failed
    assert failure.number == 2
    assert "structure 2 did not converge" in failure.reason
    assert done.record.rounds[1].labelled == 2
    assert done.record.labels == 3
    assert len(ase.io.read(done.folder / "rounds/01/labelled.xyz", ":")) == 2
    page = done.page.read_text(encoding="utf-8")
    assert "structure 2 did not converge" in page
    assert "Labels that failed" in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)


def test_too_many_failures_stop(files: Path, whole: forcetune.Learned, tmp_path: Path, command: Command) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    options = {"log": str(log), "fails": [1, 3]}
    begun(whole, out, learn__labeller_options=options)
    arguments: list[object] = ["learn", files / "train.xyz", "--valid", 0.3, "--test", files / "test.xyz"]
    arguments += ["--start", files / "start.xyz", "--labeller", SPRINGS, "--model", "mini", "--method", "elora"]
    arguments += ["--epochs", 2, "--out", out]
    given = SETTINGS | {"learn.labeller_options": options, "learn.failures": 1, "learn.rounds": 1}
    arguments += [f"--set={name}={json.dumps(value)}" for name, value in given.items()]
    code, _, err = command(*arguments)
    assert code == 1, err
    assert "2 labels of round 1 failed" in err
    assert "*.failed.json to try them again" in err
    record = json.loads((out / "learn.json").read_text(encoding="utf-8"))
    assert (record["status"], record["labels"]) == ("failures", 3)
    assert "did not converge" in (out / "learn.html").read_text(encoding="utf-8")
    assert command(*arguments)[0] == 1
    assert len(log.read_text().splitlines()) == 3, "what failed is not computed again"
    for path in out.rglob("*.failed.json"):
        path.unlink()
    code, shown, err = command(*arguments)
    assert code == 0, err
    assert "ended    rounds: 1 rounds are done" in shown
    assert len(log.read_text().splitlines()) == 5


def test_it_ends_where_its_target_is_reached_or_its_labels_are_spent(
    files: Path, whole: forcetune.Learned, tmp_path: Path
) -> None:
    out = begun(whole, tmp_path / "loose")
    loose = learn(files, out, learn__target_forces=1e5)
    assert loose.record.status == "target reached"
    assert "on the test frames" in loose.record.reason
    assert len(loose.record.rounds) == 1
    more = learn(files, out, learn__labels=2)
    assert (more.record.status, more.record.labels) == ("labels", 2), "limits may be others when it goes on"


def test_it_ends_where_it_is_sure_everywhere(files: Path, whole: forcetune.Learned, tmp_path: Path) -> None:
    sure = learn(files, begun(whole, tmp_path / "sure", learn__forces_std=1e4), learn__forces_std=1e4)
    assert (sure.record.status, sure.record.labels) == ("sure everywhere", 0)
    assert [one.ended for one in sure.record.rounds[1].dynamics] == ["length", "length"]
    page = sure.page.read_text(encoding="utf-8")
    assert "no structure of the dynamics of round 1 is beyond the bound" in page


def test_bad_input_ends_before_anything_is_written(files: Path, command: Command, tmp_path: Path) -> None:
    train, start, out = files / "train.xyz", files / "start.xyz", tmp_path / "out"
    strange = tmp_path / "strange.xyz"
    write(strange, Atoms("CF", [[0, 0, 0], [0, 0, 1.4]]), format="extxyz")
    here = SPRINGS.removesuffix(":Springs")
    for arguments, message in (
        ((), "learn.start: name files"),
        (("--start", start), "learn.labeller: name what makes"),
        (("--start", tmp_path / "none.xyz", "--labeller", SPRINGS), "there is no such file"),
        (("--start", strange, "--labeller", SPRINGS), "has F, which no training frame has"),
        (("--start", start, "--labeller", "Springs"), "write package.module:name or file.py:name"),
        (("--start", start, "--labeller", "no.such.package:make"), "cannot be imported"),
        (("--start", start, "--labeller", f"{tmp_path}/none.py:make"), "cannot be imported"),
        (("--start", start, "--labeller", f"{here}:Strings"), "has no Strings that can be called"),
        (("--start", start, "--labeller", f"{here}:no_calculator"), "which is no ASE calculator"),
        (("--start", start, "--labeller", f"{here}:stops"), "failed when it was called (SystemExit: no licence)"),
        (("--start", start, "--labeller", f"{here}:x:"), "springs.py:x:"),
        (
            ("--start", start, "--labeller", SPRINGS, "--set", "learn.labeller_options.cut=3"),
            "failed when it was called",
        ),
        (
            ("--start", start, "--labeller", SPRINGS, "--set", "learn.labeller_options.shift=1"),
            "differs from its label",
        ),
        (("--start", start, "--labeller", SPRINGS, "--target-forces", -1), "greater than 0"),
        (("--start", start, "--labeller", SPRINGS, "--rounds", 0), "greater than or equal to 1"),
        (("--start", start, "--labeller", SPRINGS, "--set", "learn.every=10000"), "before the first look"),
        (("--start", start, "--labeller", SPRINGS, "--set", "data.forces_key=none"), "uncertainty that counts"),
        (("--start", start, "--labeller", SPRINGS, "--set", "magnetism.layer=spin"), "no calibrated uncertainty"),
        (("--start", start, "--labeller", SPRINGS, "--model", "nothing"), "nothing"),
        (
            (
                *("--start", start, "--labeller", SPRINGS, "--valid", 0.3, "--model", "mini", "--method", "elora"),
                *GATES,
            ),
            "method elora has no gates",
        ),
    ):
        code, _, err = command("learn", train, "--out", out, *arguments)
        assert (code, message in " ".join(err.split())) == (2, True), err
        assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    code, _, err = command("learn", train, "--out", out, "--start", start, "--labeller", SPRINGS)
    assert (code, "is not empty and not of" in err) == (2, True)
    config = tmp_path / "learn.yaml"
    config.write_text(yaml.safe_dump({"learn": {"rounds": 3}}))
    for name in ("fit", "compare"):
        code, _, err = command(name, train, "--config", config, "--out", tmp_path / "fit")
        assert (code, "those of `forcetune learn`" in err) == (2, True)


def test_labellers_are_modules_files_and_callables() -> None:
    assert isinstance(load_labeller("ase.calculators.emt:EMT", {})(), EMT)
    assert load_labeller(SPRINGS, {"shift": 2.0})().shift == 2.0
    make = load_labeller(Springs, {})
    assert make() is not make(), "a calculator for every structure"


def test_rounds_go_by_the_record(whole: forcetune.Learned) -> None:
    numbers = [one.number for one in whole.record.rounds]
    assert all(later == earlier + 1 for earlier, later in pairwise(numbers))
    assert learning.LearnRecord.model_validate_json((whole.folder / "learn.json").read_text()) == whole.record
    with pytest.raises(ForcetuneError, match="none of 1 structures could be labelled"):
        one = learn_round.Round(1, whole.folder / "nowhere", None, ())
        config = load_config(whole.folder / "learn.yaml")
        keys = LabelKeys("REF_energy", "REF_forces", None)
        learn_round.label_structures(config, one, labelled(1), _NotFinite, keys, lambda _: None)
