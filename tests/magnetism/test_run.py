"""A magnetic fit from a file to ASE: data, training, resumption, evaluation, relaxation of spins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import forcetune
from forcetune.adapters.attach import attach
from forcetune.config import RunConfig, TrainingConfig
from forcetune.deployment.dynamics import energy_conservation
from forcetune.errors import ForcetuneWarning, InputError
from forcetune.frames.read import frames_from_atoms, read_frames
from forcetune.frames.spins import with_spins
from forcetune.magnetism.options import Magnetism
from forcetune.runs import folder as run_folder
from forcetune.training.label_weights import settle
from forcetune.training.optimizers import make_optimizer
from recipes.spin_lattice.data import cell, directions, labelled, make, shaken, spiral
from recipes.spin_lattice.hamiltonian import MOMENT, exchange, solve
from systems import write_model
from terminal import Command

COUNTS = {"train": 12, "valid": 6, "test": 3}
# a model with random weights says nothing about units
SETTINGS = {"training.batch_size": 4, "training.threads": 1, "data.doctor": "off"}


@pytest.fixture(scope="module")
def iron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with frames of the spin–lattice model and a small MACE of iron."""
    folder = tmp_path_factory.mktemp("iron")
    make(folder, COUNTS)
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
        settings={"magnetism.layer": "spin"} | SETTINGS | settings,
    )


def test_the_spin_lattice_model_has_known_answers() -> None:
    ferromagnet = cell((2, 2, 2))
    up = np.tile([0.0, 0.0, 1.0], (len(ferromagnet), 1))
    lattice, state = solve(ferromagnet, None), solve(ferromagnet, up)
    # published: cohesive energy 4.28 eV, no stress at the lattice constant
    assert lattice.energy / 16 == pytest.approx(-4.28, abs=1e-5)
    assert np.abs(lattice.stress).max() < 1e-5
    np.testing.assert_allclose(state.moments, MOMENT * up, atol=1e-10)
    atoms = shaken(np.random.default_rng(3))
    spins = directions(atoms, "random", np.random.default_rng(4))
    solution, step = solve(atoms, spins), 1e-4
    moved = []
    for sign in (1, -1):
        there = atoms.copy()
        there.positions[5, 1] += sign * step
        moved.append(solve(there, spins).energy)
    assert solution.forces[5, 1] == pytest.approx(-(moved[0] - moved[1]) / (2 * step), rel=1e-7)


def test_moments_and_spins_are_read_from_every_shape(tmp_path: Path) -> None:
    atoms = Atoms("Fe2", [[0, 0, 0], [0, 0, 2.4]], cell=[4, 4, 5], pbc=True)
    vectors = np.array([[0.0, 1.0, 2.0], [0.5, 0.0, 0.01]])
    one, two, three = atoms.copy(), atoms.copy(), atoms.copy()
    for each in (one, two, three):
        each.info["REF_energy"] = -1.0
    one.arrays["REF_magmoms"] = vectors
    one.arrays["spins"] = vectors[::-1].copy()
    two.arrays["magmoms"] = vectors[:, 2].copy()
    two.set_initial_magnetic_moments([2.0, -2.0])
    three.calc = SinglePointCalculator(three, energy=-1.0, magmoms=vectors[:, 2])
    for index, each in enumerate((one, two)):
        ase.io.write(tmp_path / f"{index}.xyz", each, format="extxyz")
    asked = {"moments_key": "auto", "spins_key": "auto"}
    (first,) = read_frames(tmp_path / "0.xyz", **asked).frames
    np.testing.assert_allclose(first.moments, vectors)
    np.testing.assert_allclose(first.spins, vectors[::-1])
    result = read_frames(tmp_path / "1.xyz", **asked)
    np.testing.assert_allclose(result.frames[0].moments, vectors * [0, 0, 1])
    np.testing.assert_allclose(result.frames[0].spins, [[0, 0, 2.0], [0, 0, -2.0]])
    assert (result.keys.moments, result.keys.spins) == ("magmoms", "initial_magmoms")
    in_memory = frames_from_atoms([three], **asked)
    assert in_memory.keys.moments == "calculator"
    np.testing.assert_allclose(in_memory.frames[0].moments, vectors * [0, 0, 1])
    assert read_frames(tmp_path / "0.xyz", ignored=("moments", "spins")).frames[0].moments is None
    with pytest.warns(ForcetuneWarning, match="read only with a magnetic layer"):
        assert read_frames(tmp_path / "0.xyz").frames[0].moments is None

    (turned,) = with_spins(result.frames, "directions")
    np.testing.assert_allclose(turned.spins, [[0, 0, 1.0], [0, 0, 0]])  # a moment of 0.01 has no direction
    (frame,) = with_spins(result.frames, "moments")
    assert frame.spins is not None
    np.testing.assert_allclose(frame.spins, result.frames[0].moments)


def test_from_frames_to_ase(iron: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "run"
    settings = [f"--set={name}={value}" for name, value in SETTINGS.items()]
    code, output, _ = command(
        *("fit", iron / "train.xyz", "--model", iron / "iron.model", "--method", "sparse", "--magnetic"),
        *("--valid", iron / "valid.xyz", "--test", iron / "test.xyz", "--epochs", 4, "--out", out, *settings),
    )
    assert code == 0
    assert "Moments MAE" in output
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["rotation_error"]["energy_mev_per_atom"] < 1e-6
    assert results["parameters"]["coverage"][-1]["kind"] == "magnetism"
    assert "moment_mae_mub" not in results["errors"]["test"]["before"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Parity plot of moments" in page
    code, output, _ = command("evaluate", out, iron / "test.xyz", "--json")
    assert code == 0
    assert json.loads(output) == pytest.approx(results["errors"]["test"]["after"], rel=1e-9)
    plain = json.loads(command("evaluate", iron / "iron.model", iron / "test.xyz", "--json")[1])
    assert "moment_mae_mub" not in plain

    frame = read_frames(iron / "test.xyz", moments_key="auto", spins_key="auto").frames[0]
    atoms: Any = ase.io.read(iron / "test.xyz", 0)
    assert frame.spins is not None
    predictions = np.load(out / "predictions.npz")
    atoms.calc = forcetune.calculator(out)
    atoms.set_initial_magnetic_moments(frame.spins)
    assert atoms.get_potential_energy() / 16 == pytest.approx(predictions["test/after/energy_per_atom"][0])
    np.testing.assert_allclose(atoms.get_forces(), predictions["test/after/forces"][:16], atol=1e-10)
    np.testing.assert_allclose(atoms.get_magnetic_moments(), predictions["test/after/moments"][:16], atol=1e-10)
    field, step, energies = atoms.calc.results["effective_field"], 1e-4, []
    # the spins of the file are unit vectors, so that what is along them makes no difference
    side = np.cross(frame.spins[3], [0.0, 0.6, 0.8])
    side /= np.linalg.norm(side)
    for sign in (1, -1):
        spins = 2.2 * frame.spins
        spins[3] += 2.2 * sign * step * side
        atoms.set_initial_magnetic_moments(spins)
        energies.append(atoms.get_potential_energy())
    assert field[3] @ side == pytest.approx(-(energies[0] - energies[1]) / (2 * step), rel=1e-5, abs=1e-9)


def test_a_magnetic_run_goes_on_to_the_same_result(iron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its second stage, and with a head for replay frames: rates of their own for what starts from nothing."""
    more = {"training.second_stage.start": 2, "replay.data": [str(iron / "valid.xyz")], "replay.head": "own"}
    whole = fit(iron, tmp_path / "whole", 6, "mmea", **more)

    class Dies:
        count = 0

    write = run_folder.write_checkpoint

    def dying(folder: Path, state: dict[str, Any]) -> None:
        write(folder, state)
        Dies.count += 1
        if Dies.count == 3:
            raise RuntimeError("the power is gone")

    monkeypatch.setattr("forcetune.runs.fitting.write_checkpoint", dying)
    with pytest.raises(RuntimeError, match="power"):
        fit(iron, tmp_path / "cut", 6, "mmea", **more)
    monkeypatch.undo()
    again = forcetune.resume(tmp_path / "cut")
    assert again.after == whole.after
    one, two = ((run.adapter / "adapter_model.safetensors").read_bytes() for run in (whole, again))
    assert one == two


def test_what_a_magnetic_run_is_trained_on_by_default() -> None:
    options = {"data": {"train": ["a.xyz"]}, "magnetism": {"layer": "spin"}}
    config = RunConfig.model_validate(options | {"training": {"second_stage": {"start": 5, "loss": {"forces": 3.0}}}})
    training = config.with_method_defaults(0.005, "adam").training
    usual = training.loss
    assert (usual.energy, usual.forces, usual.stress, usual.moments) == (1, 1, None, 1)
    assert (usual.form, usual.energy_per_atom) == ("huber", True)
    second = training.second_stage.loss
    assert (second.energy, second.forces, second.stress, second.moments, second.form) == (10, 3, None, 1, "huber")
    for labels, weight in (({"energy", "forces", "stress", "moments"}, 1), ({"energy", "forces", "moments"}, 0)):
        settled = settle(training, labels, magnetic=True)
        assert (settled.loss.stress, settled.second_stage.loss.stress) == (weight, weight)


def without_stress(path: Path, source: Path) -> Path:
    frames: Any = ase.io.read(source, ":")
    for atoms in frames:
        del atoms.info["REF_stress"]
    ase.io.write(path, frames, format="extxyz")
    return path


@pytest.mark.parametrize("layer", ["spin", "magnitude"])
def test_stress_counts_as_the_others_where_frames_have_it(iron: Path, tmp_path: Path, layer: str) -> None:
    settings = {"magnetism.layer": layer, "training.second_stage.start": 2}

    def weights(run: forcetune.Run) -> tuple[float | None, float | None]:
        training = forcetune.load_config(run.folder / "config.yaml").training
        return training.loss.stress, training.second_stage.loss.stress

    first = fit(iron, tmp_path / "with", 2, **settings)
    assert weights(first) == (None, None)
    options = {"model": iron / "iron.model", "method": "readout", "epochs": 2, "valid": 4}
    train = without_stress(tmp_path / "train.xyz", iron / "train.xyz")
    bare = forcetune.fit(train, out=tmp_path / "bare", settings=SETTINGS | settings, **options)
    assert weights(bare) == (None, None)
    # what the labels of one run decided is decided again for other frames
    options = {"config": bare.folder / "config.yaml", "valid": 4}
    assert weights(forcetune.fit(iron / "train.xyz", out=tmp_path / "other", **options)) == (None, None)
    asked = {"training.loss.stress": 1.0}
    with pytest.raises(InputError, match="no training frame has stress labels"):
        forcetune.fit(out=tmp_path / "no", settings=asked, **options)


@pytest.mark.parametrize("rate", [None, 0.02])
def test_the_layer_has_a_learning_rate_of_its_own(iron: Path, rate: float | None) -> None:
    model = forcetune.load(iron / "iron.model")
    adapter = attach(model, replace(forcetune.method("full"), magnetism=Magnetism(inputs="unit")))
    optimizer = make_optimizer(adapter, TrainingConfig(), 0.04, 10, first_rate=rate)
    layer = {id(parameter) for parameter in adapter.magnetic.parameters()} if adapter.magnetic else set()
    for group in optimizer.param_groups:
        inside = [id(parameter) in layer for parameter in group["params"]]
        assert all(inside) or not any(inside)
        expected = 0.002 * 0.04 / (rate or 0.04) if inside[0] else 0.04
        assert group["lr"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:.*training.loss.stress is 0")
def test_ranks_from_gradients_go_with_a_layer(iron: Path, tmp_path: Path) -> None:
    run = fit(iron, tmp_path / "run", 2, "elora", **{"method.init": "gradient", "method.budget": 600})
    assert run.after["test"].moment_mae_mub is not None
    alone = {f"training.loss.{name}": 0.0 for name in ("energy", "forces", "stress")}
    with pytest.raises(InputError, match="moments and magnetic forces alone"):
        fit(iron, tmp_path / "no", 2, "elora", **{"method.init": "gradient"}, **alone)


def test_an_ensemble_takes_the_state_and_means_the_moments(iron: Path, tmp_path: Path, command: Command) -> None:
    runs = [fit(iron, tmp_path / str(seed), 2, **{"training.seed": seed}) for seed in (1, 2)]
    atoms: Any = ase.io.read(iron / "test.xyz", 0)
    atoms.set_initial_magnetic_moments(atoms.arrays["REF_spins"])
    single = []
    for run in runs:
        atoms.calc = forcetune.calculator(run.folder)
        single.append(
            (atoms.get_potential_energy(), atoms.get_magnetic_moments(), atoms.calc.results["effective_field"])
        )
    atoms.calc = forcetune.calculator(adapter=[run.folder for run in runs])
    assert atoms.get_potential_energy() == pytest.approx((single[0][0] + single[1][0]) / 2, abs=1e-10)
    np.testing.assert_allclose(atoms.get_magnetic_moments(), (single[0][1] + single[1][1]) / 2, atol=1e-12)
    np.testing.assert_allclose(atoms.calc.results["effective_field"], (single[0][2] + single[1][2]) / 2, atol=1e-12)
    code, out, _ = command("evaluate", runs[0].folder, iron / "test.xyz", "--ensemble", runs[1].folder, "--json")
    assert code == 0
    errors = json.loads(out)
    own = [run.after["test"].energy_mae_mev for run in runs]
    assert errors["energy_mae_mev"] <= max(own) * 1.0001
    assert errors["moment_mae_mub"] is not None
    other = fit(iron, tmp_path / "other", 1, **{"magnetism.layer": "magnitude"})
    with pytest.raises(InputError, match="one magnetic state"):
        forcetune.calculator(adapter=[runs[0].folder, other.folder])


def test_keys_of_magnetic_labels_can_be_named_wherever_frames_are_read(
    iron: Path, tmp_path: Path, command: Command
) -> None:
    run = fit(iron, tmp_path / "run", 2)
    frames: Any = ase.io.read(iron / "test.xyz", ":")
    for atoms in frames:
        atoms.arrays["m"] = atoms.arrays.pop("REF_magmoms")
        atoms.arrays["s"] = atoms.arrays.pop("REF_spins")
    ase.io.write(tmp_path / "other.xyz", frames, format="extxyz")
    code, _, err = command("evaluate", run.folder, tmp_path / "other.xyz", "--json")
    assert (code, "other.xyz" in err) == (2, True)
    keys = ("--moments-key", "m", "--spins-key", "s")
    code, out, _ = command("evaluate", run.folder, tmp_path / "other.xyz", "--json", *keys)
    assert code == 0
    assert json.loads(out)["moment_mae_mub"] == pytest.approx(run.after["test"].to_json()["moment_mae_mub"], rel=1e-6)
    code, _, err = command("evaluate", iron / "iron.model", tmp_path / "other.xyz", *keys)
    assert (code, "no magnetic layer" in err) == (2, True)
    # two states of one structure are no duplicates for the doctor, whatever the key
    twice = [frames[0], frames[0].copy()]
    twice[1].info, twice[1].calc = dict(frames[0].info), frames[0].calc
    twice[1].arrays["s"] = directions(twice[1], "random", np.random.default_rng(5))
    ase.io.write(tmp_path / "twice.xyz", twice, format="extxyz")
    for key, has_spins in (("s", False), ("none", True)):
        arguments = ("--model", iron / "iron.model", "--spins-key", key, "--json")
        out = command("doctor", tmp_path / "twice.xyz", *arguments)[1]
        codes = {one["code"] for one in json.loads(out)["findings"]}
        assert any(code.startswith("duplicate") for code in codes) == has_spins, codes


@pytest.mark.forgetting
def test_conservation_of_energy_is_tested_in_the_state_of_the_frame(
    iron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def watched(atoms: Atoms, **options: Any) -> Any:
        seen.append(atoms.get_initial_magnetic_moments())
        return energy_conservation(atoms, **options)

    monkeypatch.setattr("forcetune.deployment.forgetting.energy_conservation", watched)
    fit(iron, tmp_path / "run", 1)
    assert len(seen) >= 1
    assert all(np.linalg.norm(spins, axis=1).min() > 0.9 for spins in seen)


def test_magnitudes_alone(iron: Path, tmp_path: Path) -> None:
    run = fit(iron, tmp_path / "run", **{"magnetism.layer": "magnitude", "training.learning_rate": 0.01})
    assert run.after["test"].moment_mae_mub is not None
    atoms: Any = ase.io.read(iron / "test.xyz", 0)
    atoms.calc = forcetune.calculator(run.folder)
    assert atoms.get_magnetic_moments().shape == (16,)
    assert "effective_field" not in atoms.calc.results


def test_collinear_data_without_directions_of_their_own(iron: Path, tmp_path: Path) -> None:
    """Scalars along z are the state and the label; lengths of the given moments do not matter afterwards."""
    frames: Any = ase.io.read(iron / "train.xyz", ":")
    for atoms in frames:
        atoms.arrays["magmoms"] = np.where(np.arange(16) % 2 == 0, 2.0, -1.8)
        del atoms.arrays["REF_magmoms"], atoms.arrays["REF_spins"]
    ase.io.write(tmp_path / "train.xyz", frames, format="extxyz")
    run = forcetune.fit(
        tmp_path / "train.xyz",
        model=iron / "iron.model",
        method="readout",
        valid=4,
        epochs=2,
        out=tmp_path / "run",
        settings={"magnetism.layer": "spin"} | SETTINGS,
    )
    config = json.loads((run.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["method"]["magnetism"]["inputs"] == "directions"
    collinear = []
    for length in (1.0, 2.5):
        atoms = frames[0].copy()
        atoms.calc = forcetune.calculator(run.folder)
        atoms.set_initial_magnetic_moments(length * frames[0].arrays["magmoms"])
        collinear.append(atoms.get_potential_energy())
    assert collinear[0] == pytest.approx(collinear[1], abs=1e-12)


Damage = Callable[[list[Any]], None]


def _no_moments(frames: list[Any]) -> None:
    for atoms in frames:
        del atoms.arrays["REF_magmoms"], atoms.arrays["REF_spins"]


def _one_without_spins(frames: list[Any]) -> None:
    del frames[2].arrays["REF_spins"]


def _wrong_shape(frames: list[Any]) -> None:
    for atoms in frames:
        atoms.arrays["REF_magmoms"] = np.ones((16, 2))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_no_moments, (", frame ", "magnetic moments", "moments_key")),
        (_one_without_spins, ("frame 2", "spins")),
        (_wrong_shape, ("frame 0", "REF_magmoms", "(16, 3)")),
    ],
)
@pytest.mark.filterwarnings("ignore::forcetune.errors.ForcetuneWarning")
def test_bad_magnetic_data_stop_at_the_door(
    iron: Path, tmp_path: Path, command: Command, damage: Damage, words: tuple[str, ...]
) -> None:
    frames: Any = ase.io.read(iron / "train.xyz", ":")
    damage(frames)
    ase.io.write(tmp_path / "bad.xyz", frames, format="extxyz")
    out = tmp_path / "run"
    arguments = ("--model", iron / "iron.model", "--magnetic", "--epochs", 2, "--out", out, "--set", "data.doctor=off")
    code, _, err = command("fit", tmp_path / "bad.xyz", *arguments)
    assert code == 2
    for word in ("bad.xyz", *words):
        assert word in err
    assert not out.exists()


def test_moments_in_the_loss_need_a_layer(iron: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"magnetism\.layer"):
        fit(iron, tmp_path / "run", **{"magnetism.layer": "off", "training.loss.moments": 1.0})


def test_spins_relax_to_lower_energy_with_positions_kept(iron: Path, tmp_path: Path) -> None:
    run = fit(iron, tmp_path / "run", 3)
    atoms, spins = spiral(2)
    atoms.positions += 0.05 * np.random.default_rng(1).standard_normal(atoms.positions.shape)
    atoms.set_initial_magnetic_moments(2.2 * spins)
    atoms.calc = forcetune.calculator(run.folder)
    before = atoms.positions.copy()
    relaxation = forcetune.relax_spins(atoms, torque=1e-5)
    assert relaxation.converged
    assert relaxation.energy_after < relaxation.energy_before - 1e-4
    np.testing.assert_array_equal(atoms.positions, before)
    np.testing.assert_allclose(np.linalg.norm(atoms.get_initial_magnetic_moments(), axis=1), 2.2)
    field, final = atoms.calc.results["effective_field"], atoms.get_initial_magnetic_moments() / 2.2
    across = field - (field * final).sum(1, keepdims=True) * final
    assert np.abs(across).max() <= 1.0001e-5
    # no more evaluations than it may take, and what was reached by then is kept
    for evaluations in (1, 2, 6):
        other = atoms.copy()
        other.set_initial_magnetic_moments(2.2 * spins)
        other.calc = forcetune.calculator(run.folder)
        cut = forcetune.relax_spins(other, torque=1e-9, evaluations=evaluations)
        assert cut.evaluations <= evaluations and not cut.converged
        assert cut.energy_after <= cut.energy_before
    # numbers along z, which may turn away from it
    collinear = cell((2, 2, 2))
    collinear.set_initial_magnetic_moments(np.where(np.arange(16) % 2 == 0, 2.2, -2.0))
    collinear.calc = forcetune.calculator(run.folder)
    forcetune.relax_spins(collinear)
    lengths = np.linalg.norm(collinear.get_initial_magnetic_moments(), axis=1)
    np.testing.assert_allclose(lengths, np.where(np.arange(16) % 2 == 0, 2.2, 2.0))
    atoms.calc = forcetune.calculator(iron / "iron.model")
    with pytest.raises(InputError, match="spin layer"):
        forcetune.relax_spins(atoms)


def test_exchange_is_smooth_and_ends() -> None:
    import torch

    distance = torch.linspace(2.0, 4.2, 500, dtype=torch.float64)
    values = exchange(distance)
    assert float(values[distance > 3.9].abs().max()) == 0
    assert float(values.diff().abs().max()) < 2e-4
    np.testing.assert_allclose(labelled(cell((1, 1, 1)), None).arrays["REF_forces"], 0, atol=1e-12)


def test_states_of_one_structure_are_no_copies() -> None:
    from forcetune.diagnostics.duplicates import check_duplicates
    from forcetune.diagnostics.shape import measure_shape

    frames = []
    for kind in ("ferro", "random", "random"):
        atoms = labelled(cell((2, 2, 2)), directions(cell((2, 2, 2)), kind, np.random.default_rng(len(frames))))
        frames += frames_from_atoms([atoms], moments_key="auto", spins_key="auto").frames
    frames.append(frames[1])
    (finding,) = check_duplicates(frames, [measure_shape(frame) for frame in frames], trained_on=True)
    assert (finding.code, len(finding.frames)) == ("duplicate-frames", 1)


def test_exchange_parameters_are_what_small_rotations_cost(iron: Path, tmp_path: Path) -> None:
    run = fit(iron, tmp_path / "run", 3)
    atoms = cell((2, 2, 2))
    atoms.positions += 0.05 * np.random.default_rng(2).standard_normal(atoms.positions.shape)
    atoms.calc = forcetune.calculator(run.folder)
    axis = np.array([0.6, 0.0, 0.8])
    signs = np.where(np.arange(16) % 3 == 0, -1.0, 1.0)
    state = 2.2 * signs[:, None] * axis
    atoms.set_initial_magnetic_moments(state)
    exchange = forcetune.exchange_parameters(atoms, sites=[0, 5])
    assert len(exchange.first) == 30
    sides = (np.array([0.0, 1.0, 0.0]), np.array([0.8, 0.0, -0.6]))
    step = 1e-3

    def energy(turns: dict[int, np.ndarray]) -> float:
        there = state / 2.2
        for site, turn in turns.items():
            there[site] = (there[site] + turn) / np.linalg.norm(there[site] + turn)
        atoms.set_initial_magnetic_moments(2.2 * there)
        return atoms.get_potential_energy()

    for place in (0, 7, 20):
        i, j = int(exchange.first[place]), int(exchange.second[place])
        mixed = 0.0
        for side in sides:
            corners = [a * b * energy({i: a * step * side, j: b * step * side}) for a in (1, -1) for b in (1, -1)]
            mixed += sum(corners) / (4 * step**2)
        assert exchange.coupling[place] == pytest.approx(-0.5 * mixed, rel=1e-3, abs=1e-7)
        assert exchange.distance[place] == pytest.approx(atoms.get_distance(i, j, mic=True))
    atoms.set_initial_magnetic_moments(np.random.default_rng(0).standard_normal((16, 3)))
    with pytest.raises(InputError, match="collinear"):
        forcetune.exchange_parameters(atoms)


def test_magnetic_frames_on_disk_train_the_same_adapter(iron: Path, tmp_path: Path) -> None:
    runs = []
    for stream in ("off", "on"):
        streaming = {"data.stream": stream, "data.store": str(tmp_path / "store"), "data.workers": 0}
        settings = streaming | {"magnetism.inputs": "directions"}
        runs.append(fit(iron, tmp_path / stream, 2, **settings))
    one, two = ((run.adapter / "adapter_model.safetensors").read_bytes() for run in runs)
    assert one == two
    assert runs[1].after["test"].moment_rmse_mub == pytest.approx(runs[0].after["test"].moment_rmse_mub, rel=1e-9)
