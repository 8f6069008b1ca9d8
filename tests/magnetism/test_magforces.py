"""Magnetic forces −∂E/∂s as labels: read, brought to the state of the layer, predicted, trained on, compared."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

import forcetune
from forcetune.adapters.attach import attach, require_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.config import LossConfig, RunConfig
from forcetune.errors import ForcetuneWarning, InputError
from forcetune.evaluation.metrics import Tally, build_graphs, predict
from forcetune.frames.frame import FloatArray, Frame
from forcetune.frames.read import frames_from_atoms, read_frames
from forcetune.frames.spins import directions, with_spins
from forcetune.graphs.graph import Batch, collate, split_batch
from forcetune.magnetism.options import Magnetism
from forcetune.runs.fit import run_fit
from forcetune.training.losses import LossSums, compute_loss, label_weights
from recipes.spin_lattice.data import directions as choose_directions
from recipes.spin_lattice.data import labelled, shaken
from recipes.spin_lattice.hamiltonian import solve
from systems import backbone, crystal, frames_of, perturb, write_model
from terminal import Command

SETTINGS = {"training.batch_size": 4, "training.threads": 1, "data.doctor": "off", "magnetism.layer": "spin"}
EXACT = 1e-10


def random_vectors(seed: int, atoms: int = 8) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((atoms, 3))


def magnetic(inputs: str, **options: Any) -> MaceBackbone:
    """A model with an adapter and a spin layer, both at random."""
    actual = backbone()
    layer = Magnetism(layer="spin", inputs=inputs, **options)  # pyright: ignore[reportArgumentType]
    perturb(attach(actual, replace(method("elora"), magnetism=layer)), 0.05)
    return actual


def labelled_frame(seed: int = 0, **labels: Any) -> Frame:
    return replace(frames_of(crystal())[0], moments=random_vectors(seed), magforces=random_vectors(seed + 1), **labels)


def graph_of(model: MaceBackbone, *frames: Frame) -> Batch:
    return collate(build_graphs(model, frames))


def test_labels_of_directions_are_what_turns_them() -> None:
    """For any energy of the moments whose derivative is known, that by an angle is a difference of energies."""
    moments = random_vectors(0)
    moments[5] = 0.0

    def energy(values: FloatArray) -> float:
        return float(np.sin(values).sum() + (values[0] * values[1]).sum() ** 2)

    forces = -np.cos(moments)
    product = float((moments[0] * moments[1]).sum())
    forces[0] -= 2 * product * moments[1]
    forces[1] -= 2 * product * moments[0]
    frame = replace(labelled_frame(), moments=moments, magforces=forces)
    (turned,) = with_spins([frame], "directions")
    assert turned.magforces is not None
    assert np.isnan(turned.magforces[5]).all()
    unit = directions(moments)
    np.testing.assert_allclose((turned.magforces * unit).sum(axis=1)[moments.any(axis=1)], 0.0, atol=1e-14)
    axis, step = np.array([0.6, 0.0, 0.8]), 1e-5
    for atom in (0, 1, 4):
        slope = 0.0
        for sign in (1, -1):
            angle = sign * step
            there = moments.copy()
            there[atom] = (
                moments[atom] * np.cos(angle)
                + np.cross(axis, moments[atom]) * np.sin(angle)
                + axis * (axis @ moments[atom]) * (1 - np.cos(angle))
            )
            slope += sign * energy(there) / (2 * step)
        assert turned.magforces[atom] @ np.cross(axis, unit[atom]) == pytest.approx(-slope, rel=1e-7)
    # a state with a length keeps the label
    (kept,) = with_spins([frame], "moments")
    assert kept.magforces is forces
    (of_file,) = with_spins([replace(frame, spins=unit)], "unit")
    # unit vectors in the file beside moments say the same
    np.testing.assert_array_equal(of_file.magforces, turned.magforces)
    (alone,) = with_spins([replace(frame, spins=unit, moments=None)], "unit")
    across = forces - (forces * unit).sum(axis=1, keepdims=True) * unit
    across[5] = np.nan
    np.testing.assert_allclose(alone.magforces, across, atol=1e-14)


@pytest.mark.parametrize("spin_orbit", [False, True])
def test_fields_by_directions_only_turn(spin_orbit: bool) -> None:
    model = magnetic("directions", spin_orbit=spin_orbit)
    (frame,) = with_spins([labelled_frame()], "directions")
    assert frame.spins is not None
    fields = model.predict(model.place(graph_of(model, frame))).fields
    assert fields is not None
    along = (fields * torch.as_tensor(frame.spins)).sum(dim=1)
    assert float(along.abs().max()) <= EXACT * max(1.0, float(fields.abs().max()))
    axis, step, values = np.array([0.0, 1.0, 0.0]), 1e-4, []
    side = np.cross(axis, frame.spins[2])
    for sign in (1, -1):
        spins = frame.spins.copy()
        spins[2] += sign * step * side
        values.append(float(model.predict(model.place(graph_of(model, replace(frame, spins=spins)))).energy.detach()))
    assert float(fields[2] @ torch.as_tensor(side)) == pytest.approx(-(values[0] - values[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("inputs", ["directions", "moments"])
def test_gradients_of_their_loss_are_differences(inputs: str) -> None:
    model = magnetic(inputs)
    frames = with_spins([labelled_frame(seed) for seed in (0, 5)], inputs)  # pyright: ignore[reportArgumentType]
    # one as of replay, without anything magnetic, and an atom without a moment
    without = replace(frames[0], spins=None, moments=None, magforces=None)
    still = np.zeros(3)
    assert frames[1].spins is not None
    spins = np.concatenate([frames[1].spins[:-1], still[None]])
    frames = (frames[0], replace(frames[1], spins=spins), without)
    batch = model.place(graph_of(model, *frames))
    config = LossConfig(energy=0.0, forces=0.0, stress=0.0, magforces=1.0)

    def loss() -> torch.Tensor:
        return compute_loss(config, model.predict(batch, create_graph=True), batch)

    parameters = dict(require_adapter(model).named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss(), list(parameters.values())), strict=True))
    names = [name for name in parameters if float(gradients[name].abs().max()) > 1e-6]
    assert any("magnetic" in name for name in names) and any("magnetic" not in name for name in names)
    for name in names[:: max(1, len(names) // 6)]:
        place = np.unravel_index(int(gradients[name].abs().argmax()), gradients[name].shape)
        weights, step, values = parameters[name].data, 1e-5, []
        for sign in (1, -1):
            weights[place] += sign * step
            values.append(float(loss().detach()))
            weights[place] -= sign * step
        expected = (values[0] - values[1]) / (2 * step)
        assert float(gradients[name][place]) == pytest.approx(expected, rel=1e-5, abs=1e-9), name


def test_their_term_is_a_mean_over_the_labels_there_are() -> None:
    model = magnetic("moments")
    first, second = with_spins([labelled_frame(0), labelled_frame(5)], "moments")
    batch = graph_of(
        model, first, replace(second, magforces=None, moments_weight=3.0), replace(first, moments_weight=3.0)
    )
    prediction = model.predict(model.place(batch)).detached()
    assert prediction.fields is not None
    config = LossConfig(energy=0.0, forces=0.0, magforces=2.0)
    known = ~torch.isnan(batch.magforces)
    squares = torch.where(known, prediction.fields - batch.magforces, 0.0).square().sum(dim=1)
    weights = torch.tensor([1.0, 3.0, 3.0])[batch.graph_index]
    expected = 2.0 * float((weights * squares).sum() / known.sum())
    assert float(compute_loss(config, prediction, batch)) == pytest.approx(expected, rel=1e-12)
    sums = LossSums(config)
    sums.add(prediction, batch)
    assert sums.loss() == pytest.approx(expected, rel=1e-12)
    assert [float(value) for value in label_weights(config, batch)][-1] == float(known.sum())
    # and of the errors in tables
    predictions = predict(model, build_graphs(model, [first, second]))
    errors, tally = predictions.errors(), Tally()
    tally.add(predictions)
    labels = np.concatenate([first.magforces, second.magforces])  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert predictions.magforces is not None
    assert errors.magforce_mae_mev == pytest.approx(1e3 * np.abs(predictions.magforces - labels).mean())
    assert tally.errors().magforce_rmse_mev == pytest.approx(errors.magforce_rmse_mev, rel=1e-12)
    parts = split_batch(batch, 1)
    assert torch.equal(torch.cat([part.magforces for part in parts]).nan_to_num(), batch.magforces.nan_to_num())


@pytest.fixture(scope="module")
def iron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of the spin–lattice model with moments and the magnetic forces that belong to them, without spins."""
    folder = tmp_path_factory.mktemp("iron")
    for index, (name, count) in enumerate({"train": 12, "valid": 4, "test": 3}.items()):
        random = np.random.default_rng((3, index))
        frames = []
        for _ in range(count):
            atoms = shaken(random)
            spins = choose_directions(atoms, "random", random)
            labelled(atoms, spins)
            state = solve(atoms, spins)
            # by the moment: the length follows the direction, so that nothing is to be said of it
            atoms.arrays["REF_magforces"] = state.fields / np.linalg.norm(state.moments, axis=1, keepdims=True)
            del atoms.arrays["REF_spins"]
            frames.append(atoms)
        ase.io.write(folder / f"{name}.xyz", frames, format="extxyz")
    write_model(folder / "iron.model", elements=(26,), hidden_irreps="4x0e+4x1o", r_max=3.9)
    return folder


def fit(iron: Path, out: Path, epochs: int = 4, method: str = "readout", **settings: Any) -> forcetune.Run:
    return forcetune.fit(
        iron / "train.xyz",
        model=iron / "iron.model",
        method=method,
        valid=iron / "valid.xyz",
        test=iron / "test.xyz",
        epochs=epochs,
        out=out,
        settings=SETTINGS | settings,
    )


def test_the_spin_lattice_model_knows_its_fields() -> None:
    atoms, random = shaken(np.random.default_rng(3)), np.random.default_rng(4)
    spins, step = choose_directions(atoms, "random", random), 1e-4
    side = np.cross(spins[5], [0.0, 0.0, 1.0])
    values = []
    for sign in (1, -1):
        there = spins.copy()
        there[5] = spins[5] * np.cos(sign * step) + side / np.linalg.norm(side) * np.sin(sign * step)
        values.append(solve(atoms, there).energy)
    slope = -(values[0] - values[1]) / (2 * step)
    assert solve(atoms, spins).fields[5] @ side / np.linalg.norm(side) == pytest.approx(slope, rel=1e-6)


def test_a_run_learns_them_where_frames_have_them(iron: Path, tmp_path: Path, command: Command) -> None:
    # the lattice of a model with random weights would be most of what is learned
    alone = {f"training.loss.{name}": 0.0 for name in ("energy", "forces", "stress")}
    given = SETTINGS | alone
    settings = [f"--set={name}={value}" for name, value in given.items() if name != "magnetism.layer"]
    code, output, err = command(
        *("fit", iron / "train.xyz", "--model", iron / "iron.model", "--method", "readout", "--magnetic"),
        *("--valid", iron / "valid.xyz", "--test", iron / "test.xyz", "--epochs", 20, "--out", tmp_path / "run"),
        *settings,
    )
    assert code == 0
    assert "magnetic forces: trained on with weight 1" in err
    assert "Magnetic forces MAE" in output
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    after = results["errors"]["test"]["after"]
    assert "magforce_mae_mev" not in results["errors"]["test"]["before"]
    frames = read_frames(iron / "test.xyz", moments_key="auto", magforces_key="auto").frames
    labels = np.concatenate([frame.magforces for frame in with_spins(frames, "directions")])  # pyright: ignore
    assert after["magforce_rmse_mev"] < 0.8e3 * float(np.sqrt((labels**2).mean()))
    assert "Parity plot of magforces" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    with (tmp_path / "run" / "metrics.csv").open(encoding="utf-8") as stream:
        assert "valid_magforce_rmse_mev" in stream.readline()
    without = fit(iron, tmp_path / "without", 20, **alone, **{"data.magforces_key": "none"})
    assert without.after["test"].magforce_rmse_mev is None
    code, out, _ = command("evaluate", without.folder, iron / "test.xyz", "--json")
    assert json.loads(out)["magforce_rmse_mev"] > after["magforce_rmse_mev"]
    code, out, _ = command("evaluate", tmp_path / "run", iron / "test.xyz", "--json")
    assert (code, json.loads(out)) == (0, pytest.approx(after, rel=1e-9))
    # in ASE they are the effective field of the state
    atoms: Any = ase.io.read(iron / "test.xyz", 0)
    atoms.calc = forcetune.calculator(tmp_path / "run")
    atoms.set_initial_magnetic_moments(atoms.arrays["REF_magmoms"])
    atoms.get_potential_energy()
    stored = np.load(tmp_path / "run" / "predictions.npz")["test/after/magforces"][:16]
    np.testing.assert_allclose(atoms.calc.results["effective_field"], stored, atol=1e-10)


def test_frames_on_disk_train_the_same_adapter(iron: Path, tmp_path: Path) -> None:
    adapters = []
    for stream in ("off", "on"):
        streaming = {"data.stream": stream, "data.store": str(tmp_path / "store"), "data.workers": 0}
        run = fit(iron, tmp_path / stream, 2, **streaming)
        adapters.append((run.adapter / "adapter_model.safetensors").read_bytes())
        assert run.after["test"].magforce_rmse_mev is not None
    assert adapters[0] == adapters[1]


@pytest.mark.filterwarnings("ignore:.*training.loss.stress is 0")
def test_ranks_from_gradients_and_refinement_go_with_them(iron: Path, tmp_path: Path) -> None:
    options = {"method.init": "gradient", "method.budget": 600, "training.refine": 2}
    run = fit(iron, tmp_path / "run", 2, "elora", **options)
    assert run.after["test"].magforce_mae_mev is not None


def test_an_ensemble_means_them(iron: Path, tmp_path: Path) -> None:
    runs = [fit(iron, tmp_path / str(seed), 1, **{"training.seed": seed}) for seed in (1, 2)]
    stored = [np.load(run.folder / "predictions.npz") for run in runs]
    mean = np.mean([arrays["test/after/magforces"] for arrays in stored], axis=0)
    expected = 1e3 * float(np.abs(mean - stored[0]["test/reference/magforces"]).mean())
    errors = forcetune.evaluate_ensemble([run.folder for run in runs], iron / "test.xyz")
    assert errors["magforce_mae_mev"] == pytest.approx(expected, rel=1e-9)


def test_keys_can_be_named(iron: Path, tmp_path: Path, command: Command) -> None:
    run = fit(iron, tmp_path / "run", 1)
    frames: Any = ase.io.read(iron / "test.xyz", ":")
    for atoms in frames:
        atoms.arrays["b"] = atoms.arrays.pop("REF_magforces")
    ase.io.write(tmp_path / "other.xyz", frames, format="extxyz")
    code, out, _ = command("evaluate", run.folder, tmp_path / "other.xyz", "--json", "--magforces-key", "b")
    assert code == 0
    expected = run.after["test"].magforce_mae_mev
    assert json.loads(out)["magforce_mae_mev"] == pytest.approx(expected, rel=1e-6)
    code, _, err = command("evaluate", iron / "iron.model", tmp_path / "other.xyz", "--magforces-key", "b")
    assert (code, "no magnetic layer" in err) == (2, True)
    magnitude = fit(iron, tmp_path / "magnitude", 1, **{"magnetism.layer": "magnitude", "data.magforces_key": "none"})
    code, _, err = command("evaluate", magnitude.folder, tmp_path / "other.xyz", "--magforces-key", "b")
    assert (code, "a layer of magnitudes predicts no magnetic forces" in err) == (2, True)
    with pytest.warns(ForcetuneWarning, match="'REF_magforces' and 'REF_magmoms' are read only with a magnetic layer"):
        read_frames(iron / "test.xyz")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"magnetism": {"layer": "magnitude"}, "training": {"loss": {"magforces": 1.0}}}, "needs a spin layer"),
        ({"training": {"loss": {"magforces": 1.0}}}, "needs a spin layer"),
        (
            {
                "magnetism": {"layer": "spin"},
                "training": {"loss": {"magforces": 1.0}},
                "data": {"magforces_key": "none"},
            },
            "data.magforces_key is none",
        ),
    ],
)
def test_weights_without_a_meaning_are_refused(options: dict[str, Any], word: str) -> None:
    data = {"train": ["a.xyz"]} | options.get("data", {})
    with pytest.raises(ValueError, match=word):
        RunConfig.model_validate(options | {"data": data})


@pytest.mark.filterwarnings("ignore:.*training.loss.stress is 0")
def test_they_can_be_all_that_is_trained_on(iron: Path, tmp_path: Path) -> None:
    nothing = {f"training.loss.{name}": 0.0 for name in ("energy", "forces", "stress", "moments")}
    run = fit(iron, tmp_path / "run", 1, **nothing)
    assert run.after["test"].magforce_mae_mev is not None


def test_beside_replay_frames_without_spins(iron: Path, tmp_path: Path) -> None:
    run = fit(iron, tmp_path / "run", 2, **{"replay.data": [str(iron / "valid.xyz")]})
    assert run.after["test"].magforce_mae_mev is not None


def test_labels_that_are_not_used_are_named(iron: Path, tmp_path: Path) -> None:
    with pytest.warns(ForcetuneWarning, match="magnetic forces that are not trained on: training.loss.magforces is 0"):
        fit(iron, tmp_path / "run", 1, **{"training.loss.magforces": 0.0})
    with pytest.warns(ForcetuneWarning, match="magnetic forces, which a layer of magnitudes alone does not predict"):
        fit(iron, tmp_path / "magnitude", 1, **{"magnetism.layer": "magnitude"})
    frames: Any = ase.io.read(iron / "train.xyz", ":")
    for atoms in frames:
        del atoms.arrays["REF_magforces"]
    ase.io.write(tmp_path / "without.xyz", frames, format="extxyz")
    with pytest.raises(InputError, match="no training frame has magforces labels"):
        forcetune.fit(
            tmp_path / "without.xyz",
            model=iron / "iron.model",
            out=tmp_path / "no",
            epochs=1,
            settings=SETTINGS | {"training.loss.magforces": 1.0},
        )
    frames[0].arrays["REF_magforces"] = np.zeros((16, 2))
    with pytest.raises(InputError, match=r"the magforces under 'REF_magforces' should have shape \(16, 3\)"):
        frames_from_atoms(frames[:1], moments_key="auto", magforces_key="auto")


def test_runs_of_versions_that_knew_none_stay_what_they_were(iron: Path, tmp_path: Path) -> None:
    first = fit(iron, tmp_path / "first", 1)
    stored = yaml.safe_load((first.folder / "config.yaml").read_text(encoding="utf-8"))
    del stored["data"]["magforces_key"], stored["training"]["loss"]["magforces"]
    (tmp_path / "earlier.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    assert forcetune.load_config(first.folder / "config.yaml").data.magforces_key == "auto"
    assert forcetune.load_config(tmp_path / "earlier.yaml").data.magforces_key == "none"
    # but those of a user are new
    (tmp_path / "own.yaml").write_text("data: {train: [a.xyz]}\nmagnetism: {layer: spin}\n", encoding="utf-8")
    assert forcetune.load_config(tmp_path / "own.yaml").data.magforces_key == "auto"
    # and a file without data says nothing of them
    (tmp_path / "part.yaml").write_text("magnetism: {layer: spin}\n", encoding="utf-8")
    given = {"data": {"train": ["a.xyz"]}}
    assert forcetune.load_config(tmp_path / "part.yaml", given=given).data.magforces_key == "auto"
    # a new fit by the earlier file says what it leaves out
    config = forcetune.load_config(tmp_path / "earlier.yaml", overrides={"output.run": str(tmp_path / "second")})
    with pytest.warns(ForcetuneWarning, match="'REF_magforces' is not read: no key asks for it"):
        run_fit(config, console=Console(quiet=True))


def test_a_second_stage_weighs_them_anew(iron: Path, tmp_path: Path) -> None:
    adapters = []
    for weight in (0.0, 50.0):
        stage = {"training.second_stage.start": 3, "training.second_stage.loss.magforces": weight}
        run = fit(iron, tmp_path / str(weight), 4, **stage)
        adapters.append((run.adapter / "adapter_model.safetensors").read_bytes())
        with (run.folder / "metrics.csv").open(encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert all(float(row["valid_magforce_mae_mev"]) > 0 for row in rows)
    # the first stage is the same, the second is not
    assert adapters[0] != adapters[1]


def test_an_ensemble_has_no_field_where_there_is_no_moment(iron: Path, tmp_path: Path) -> None:
    runs = [fit(iron, tmp_path / str(seed), 1, **{"training.seed": seed}) for seed in (1, 2)]
    atoms: Any = ase.io.read(iron / "test.xyz", 0)
    moments = atoms.arrays["REF_magmoms"].copy()
    moments[3] = 0.0
    atoms.set_initial_magnetic_moments(moments)
    fields = []
    for adapter in (runs[0].folder, runs[1].folder, [run.folder for run in runs]):
        atoms.calc = forcetune.calculator(adapter=adapter)
        atoms.get_potential_energy()
        fields.append(atoms.calc.results["effective_field"])
    assert np.abs(fields[2][3]).max() == 0.0
    assert np.linalg.norm(np.delete(fields[2], 3, axis=0), axis=1).min() > 0
    np.testing.assert_allclose(fields[2], (fields[0] + fields[1]) / 2, atol=1e-12)
