"""A model by name, by path and loaded does the same, and what is made with it can be opened again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms

import forcetune
from forcetune.adapters.attach import attach, detach, get_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.loading import load, store_base
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.runs.folder import BASE_NAME, CHECKPOINT
from forcetune.runs.inspect import inspect
from models import make_mace
from sevennet_models import BATTERY as SEVENNETS
from sevennet_models import write_checkpoint
from systems import frames_of, labelled, write_labelled, write_model
from terminal import Command

ELEMENTS = [1, 6, 8]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("data") / "a.xyz", 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.model")


def fit(data: Path, model: Any, out: Path, **settings: Any) -> forcetune.Run:
    options = {"training.batch_size": 4, "training.threads": 1, "method.rank": 2}
    named = {key.replace("__", "."): value for key, value in settings.items()}
    return forcetune.fit(data, model=model, method="elora", valid=3, epochs=2, out=out, settings=options | named)


def opened(run: Path, data: Path, command: Command, *, by_all: bool = True) -> float:
    """Every command that opens a run does; returns the force error."""
    code, text, err = command("evaluate", run, data, "--json")
    assert code == 0, err
    if not by_all:
        return json.loads(text)["forces_mae_mev_per_ang"]
    for arguments in (("inspect", run), ("merge", run, "-o", run.parent / f"{run.name}.tuned.model"), ("report", run)):
        code, _, err = command(*arguments)
        assert code == 0, err
    atoms = labelled(1)[0]
    atoms.calc = forcetune.calculator(run)
    atoms.get_potential_energy()
    return json.loads(text)["forces_mae_mev_per_ang"]


@pytest.mark.parametrize("kind", ["path", "name"])
def test_a_loaded_model_fits_as_its_file_does(
    data: Path, model: Path, kind: str, tmp_path: Path, command: Command
) -> None:
    named = str(model) if kind == "path" else "mini"
    loaded = forcetune.load(named, elements=ELEMENTS)
    one, other = fit(data, named, tmp_path / "one"), fit(data, loaded, tmp_path / "other")
    assert other.backbone is loaded
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one.adapter / name).read_bytes() == (other.adapter / name).read_bytes()
    assert one.after == other.after and one.results["model"] == other.results["model"]
    assert not (other.folder / BASE_NAME).exists()
    config = forcetune.load_config(other.folder / "config.yaml")
    assert (config.model.model, config.model.elements) == (named, ["H", "C", "O"])
    error = opened(other.folder, data, command, by_all=kind == "path")
    assert error == pytest.approx(opened(one.folder, data, command, by_all=False), rel=1e-12)
    again = forcetune.fit(config=other.folder / "config.yaml", out=tmp_path / "again")
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == (
        one.adapter / "adapter_model.safetensors"
    ).read_bytes()


def changed_in_memory(model: Path) -> MaceBackbone:
    backbone = load(model, elements=ELEMENTS)
    with torch.no_grad():
        next(iter(backbone.model.parameters())).mul_(1.05)
    assert isinstance(backbone, MaceBackbone)
    return backbone


def of_no_file(model: Path) -> MaceBackbone:
    return MaceBackbone.from_module(make_mace(seed=4), elements=ELEMENTS)


def with_other_references(model: Path) -> MaceBackbone:
    backbone = load(model, elements=ELEMENTS)
    backbone.set_reference_energies({1: -13.6, 6: -1029.0, 8: -2041.0})
    assert isinstance(backbone, MaceBackbone)
    return backbone


def in_float32(model: Path) -> MaceBackbone:
    return MaceBackbone.from_module(make_mace(seed=4, dtype=torch.float32), elements=ELEMENTS, dtype=torch.float32)


@pytest.mark.parametrize("make", [changed_in_memory, of_no_file, with_other_references, in_float32])
def test_a_model_that_no_file_gives_is_kept_in_the_run(
    data: Path, model: Path, make: Any, tmp_path: Path, command: Command
) -> None:
    backbone = make(model)
    before = backbone.reference_energies
    run = fit(data, backbone, tmp_path / "first")
    assert (run.folder / BASE_NAME).is_file()
    moved = run.folder.rename(tmp_path / "run")
    error = opened(moved, data, command, by_all=make is of_no_file)
    actual = forcetune.evaluate(backbone, data).forces_mae_mev_per_ang
    assert error == pytest.approx(actual, rel=1e-10 if backbone.dtype == torch.float64 else 1e-4)
    stored = load(str(moved / BASE_NAME))
    assert stored.reference_energies == pytest.approx(before, rel=1e-14)
    detach(backbone)
    assert backbone.reference_energies == before
    if make is not changed_in_memory:
        return
    # as if it had died in the middle, and then at the beginning
    (moved / "results.json").unlink()
    code, _, err = command("resume", moved)
    assert code == 0, err
    (moved / "results.json").unlink()
    (moved / CHECKPOINT).unlink()
    code, _, err = command("resume", moved)
    assert code == 0, err
    assert forcetune.evaluate(moved, data).forces_mae_mev_per_ang == pytest.approx(error, rel=1e-9)


def test_a_run_with_a_stored_model_is_overwritten_as_others_are(data: Path, model: Path, tmp_path: Path) -> None:
    fit(data, of_no_file(model), tmp_path / "run")
    run = fit(data, model, tmp_path / "run", output__overwrite=True)
    assert not (run.folder / BASE_NAME).exists()
    assert forcetune.evaluate(run.folder, data).forces_mae_mev_per_ang is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__dtype": "float32"}, "precision torch.float64, not torch.float32"),
        ({"model__head": "pbe"}, "head Default, not pbe"),
        ({"model__elements": ["H", "Xx"]}, "'Xx' is not an element symbol"),
        ({"model__elements": ["H", "C", "O", "U"]}, "does not know the element U"),
    ],
)
def test_options_that_a_loaded_model_does_not_have_are_refused(
    data: Path, model: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit(data, load(model, elements=ELEMENTS), tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_loaded_model_is_not_silently_another_one(model: Path) -> None:
    backbone = load(model)
    for options in ({"dtype": "float32"}, {"head": "pbe"}):
        for use in (forcetune.load, forcetune.calculator):
            with pytest.raises(InputError, match="the loaded model m has the"):
                use(backbone, **options)
    with pytest.raises(InputError, match="a model is a name, a path or what"):
        forcetune.load(backbone.model)  # pyright: ignore[reportArgumentType]
    for use in (attach, detach, forcetune.load_adapter, forcetune.combine):
        with pytest.raises(InputError, match=r"load the model first, as in forcetune\.load"):
            use(str(model), *(() if use is detach else ({},)))  # pyright: ignore


def test_everything_else_takes_a_loaded_model_as_its_path(data: Path, model: Path, tmp_path: Path) -> None:
    run = fit(data, model, tmp_path / "run").folder
    second = fit(data, model, tmp_path / "second", training__seed=7).folder
    whole = load(model)  # knows nitrogen, too
    for one_model in (model, whole):
        atoms = labelled(1)[0]
        atoms.calc = forcetune.calculator(one_model, adapter=run)
        energies: list[Any] = [atoms.get_potential_energy()]
        atoms.calc = forcetune.calculator(one_model)
        energies.append(atoms.get_potential_energy())
        energies.append(forcetune.evaluate(one_model, data).forces_mae_mev_per_ang)
        energies.append(forcetune.evaluate(one_model, data, adapter=run).forces_mae_mev_per_ang)
        energies.append(forcetune.evaluate(run, data, base=one_model).forces_mae_mev_per_ang)
        energies.append(forcetune.evaluate_ensemble([run, second], data, base=one_model)["forces_mae_mev_per_ang"])
        energies.append(inspect(run, against=second, model=one_model).changes.paths[0].relative)
        merged = forcetune.merge(run, tmp_path / "tuned.model", model=one_model)
        energies.append(forcetune.evaluate(merged.path, data).forces_mae_mev_per_ang)
        checked = forcetune.doctor(data, model=one_model)
        energies.append([checked.facts["agreement"]["train"]["forces"], checked.facts["model"]])
        energies.append([row["trainable"] for row in forcetune.compare_methods(one_model, elements=["H", "C", "O"])])
        if one_model is model:
            expected = energies
    assert energies[:-2] == pytest.approx(expected[:-2], rel=1e-11)
    assert energies[-2][0]["correlation"] == pytest.approx(expected[-2][0]["correlation"], rel=1e-9)
    assert energies[-2][1] == expected[-2][1] and energies[-1] == expected[-1]
    assert get_adapter(whole) is None and whole.elements == (1, 6, 7, 8)
    assert torch.equal(next(whole.model.parameters()), next(load(model).model.parameters()))


def test_a_model_with_an_adapter_is_refused_where_another_would_be_put_on_it(
    data: Path, model: Path, tmp_path: Path
) -> None:
    run = fit(data, model, tmp_path / "run").folder
    backbone = load(model, elements=ELEMENTS)
    attach(backbone, method("readout"))
    config = forcetune.load_config(given={"data": {"train": [str(data)]}, "output": {"run": str(tmp_path / "cmp")}})
    for use in (
        lambda: fit(data, backbone, tmp_path / "other"),
        lambda: forcetune.calculator(backbone, adapter=run),
        lambda: forcetune.merge(run, tmp_path / "tuned.model", model=backbone),
        lambda: forcetune.compare(config, ["readout"], model=backbone),
    ):
        with pytest.raises(InputError, match="already carries an adapter"):
            use()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert get_adapter(backbone) is not None


def test_comparisons_of_a_loaded_model(data: Path, model: Path, tmp_path: Path) -> None:
    def compare(a_model: Any, name: str) -> forcetune.runs.compare.ComparisonRun:  # pyright: ignore
        sections = {
            "data": {"train": [str(data)], "valid": 3},
            "training": {"epochs": 1},
            "output": {"run": str(tmp_path / name)},
        }
        return forcetune.compare(forcetune.load_config(given=sections), ["readout", "gain"], model=a_model)

    backbone = load(model)
    one, other = compare(model, "one"), compare(backbone, "other")
    assert get_adapter(backbone) is None
    values = [[row.valid_loss.mean for row in comparison_run.comparison.methods] for comparison_run in (one, other)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    memory = MaceBackbone.from_module(make_mace(seed=4))
    for _ in range(2):  # the second time all runs are finished already
        comparison_run = compare(memory, "memory")
        assert (tmp_path / "memory" / "comparison.model").is_file()
        stamp = (tmp_path / "memory" / "gain-1" / "results.json").stat().st_mtime_ns
        assert forcetune.evaluate(tmp_path / "memory" / "gain-1", data).forces_mae_mev_per_ang is not None
    comparison_run = compare(memory, "memory")
    assert (comparison_run.folder / "gain-1" / "results.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", SEVENNETS)
def test_a_cut_sevennet_that_was_changed_in_memory_is_stored(name: str, tmp_path: Path) -> None:
    """Its writer keeps the whole table of elements; what is loaded again is cut as the model in memory."""
    recipe = SEVENNETS[name]
    head = next(iter(recipe.modalities), None)
    path = write_checkpoint(tmp_path / "base.pth", recipe)
    cut = forcetune.load(path, head=head, elements=[1, 8])
    with torch.no_grad():
        next(cut.model.parameters()).mul_(1.01)
    store_base(cut, tmp_path / "stored.pth")
    again = forcetune.load(tmp_path / "stored.pth", head=head, elements=[1, 8])
    graph = build_graphs(cut, frames_of(Atoms("OH2", [[0, 0, 0], [0.9, 0.1, 0], [-0.3, 0.8, 0]])))[0]
    first, second = cut.predict(graph), again.predict(graph)
    torch.testing.assert_close(second.energy, first.energy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(second.forces, first.forces, rtol=1e-5, atol=1e-6)
