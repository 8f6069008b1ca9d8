"""Merged SevenNet models: what changed and what did not, in forcetune and in sevenn itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write
from torch import Tensor

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.file import save_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.nequip.interaction import ModalLinear
from forcetune.backbones.sevennet import modalities
from forcetune.backbones.sevennet.backbone import SevenNetBackbone
from forcetune.deployment.merge import merge
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.utils.files import compute_sha256
from sevennet_models import ALL_VERSIONS, PUBLISHED, RECIPES, perturb, structures, write_checkpoint
from sevennet_oracle import NEWEST, Request, Results, SevenNets
from systems import frames_of
from terminal import Command

E0 = {8: -1.25, 72: -3.5}


def tuned(base: Path, folder: Path, name: str, *, head: str | None = None, **options: Any) -> Path:
    """A perturbed adapter for some elements of a model, with reference energies of its own."""
    elements = options.pop("elements", (8, 72))
    model = SevenNetBackbone.load(base, elements=elements, head=head, sha256=compute_sha256(base), **options)
    perturb(attach(model, method(name)), 0.05)
    model.set_reference_energies({z: E0[z] for z in elements if z in E0})
    save_adapter(model, folder)
    return folder


def predicted(base: Path | str, adapter: Path | None, systems: Sequence[Atoms], head: str | None = None) -> list[Any]:
    """Energies and forces of forcetune's calculator, in float64."""
    calculator = forcetune.calculator(base, adapter=adapter, head=None if adapter else head, dtype="float64")
    predictions = []
    for atoms in systems:
        atoms.calc = calculator
        predictions.append((atoms.get_potential_energy(), atoms.get_forces()))
    return predictions


def assert_close(results: Results, expected: Sequence[Any], tolerance: float, of_forces: float | None = None) -> None:
    """Energies within ``tolerance`` of their size (at least 1 eV), forces of the largest one (at least 1 eV/Å)."""
    for index, (energy, forces) in enumerate(expected):
        assert abs(float(results[f"{index}/energy"]) - energy) <= tolerance * max(1.0, abs(energy)), index
        if f"{index}/forces" in results:
            difference = np.abs(results[f"{index}/forces"] - forces).max()
            assert difference <= (of_forces or tolerance) * max(1.0, np.abs(forces).max()), index


def opened(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# ---- without sevenn --------------------------------------------------------------------------------------------------

MERGEABLE = ("elora", "sparse", "gain", "full")


@pytest.mark.parametrize("name", MERGEABLE)
def test_only_what_was_trained_changes(tmp_path: Path, name: str) -> None:
    """One of two elements was trained: the rows of the other, and what no update reaches, stay bit for bit."""
    base = write_checkpoint(tmp_path / "base.pth", RECIPES["shift and scale by species"])
    adapter = tuned(base, tmp_path / "adapter", name, elements=(8,))
    merged = merge(adapter, tmp_path / "tuned.pth", model=base)
    assert max(merged.energy_difference, merged.forces_difference) < 1e-5
    assert merged.modality is None
    before, after = torch.load(base, weights_only=True), opened(tmp_path / "tuned.pth")
    assert list(after["model_state_dict"]) == list(before["model_state_dict"])
    assert after["config"]["version"] == before["config"]["version"]
    one, other = before["model_state_dict"], after["model_state_dict"]
    assert all(one[key].dtype == other[key].dtype and one[key].shape == other[key].shape for key in one)
    hafnium = 0  # of two species, in alphabetical order
    rows = [state["onehot_to_feature_x.linear.weight"].view(2, -1) for state in (one, other)]
    assert torch.equal(rows[0][hafnium], rows[1][hafnium])
    for key in one:
        if key.endswith("fc_tensor_product.weight") and "1_" in key:
            changed = (one[key] != other[key]).view(-1)
            assert bool(changed.any())
    shift = other["rescale_atomic_energy.shift"]
    assert shift[hafnium] == one["rescale_atomic_energy.shift"][hafnium]
    assert float(shift[1]) == pytest.approx(E0[8])
    assert after["config"]["shift"] == shift.tolist()
    assert torch.equal(other["rescale_atomic_energy.scale"], one["rescale_atomic_energy.scale"])


@pytest.mark.parametrize("name", ["parity, fully connected", "modalities, one shift"])
def test_one_number_for_all_becomes_one_for_each(tmp_path: Path, name: str) -> None:
    """A model with one shift for all elements (or modalities) takes reference energies of each."""
    recipe = RECIPES[name]
    head = next(iter(recipe.modalities), None)
    base = write_checkpoint(tmp_path / "base.pth", recipe)
    adapter = tuned(base, tmp_path / "adapter", "elora", head=head)
    merge(adapter, tmp_path / "tuned.pth", model=base)
    content = opened(tmp_path / "tuned.pth")
    shift, scale = (content["model_state_dict"][f"rescale_atomic_energy.{key}"] for key in ("shift", "scale"))
    original = opened(base)["model_state_dict"]
    if head is None:
        assert shift.tolist() == content["config"]["shift"] == [-3.5, -1.25]
        assert scale.tolist() == content["config"]["scale"] == 2 * original["rescale_atomic_energy.scale"].tolist()
    else:
        assert content["config"]["use_modal_wise_shift"] is True
        assert shift.tolist() == [[-3.5, -1.25], original["rescale_atomic_energy.shift"].tolist()]
    written = SevenNetBackbone.load(tmp_path / "tuned.pth", head=head)
    assert written.reference_energies == E0


def test_other_precisions(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base.pth", RECIPES["parity, fully connected"])
    adapter = tuned(base, tmp_path / "adapter", "full")
    merged = merge(adapter, tmp_path / "double.pth", model=base, dtype="float64")
    assert max(merged.energy_difference, merged.forces_difference) < 1e-10
    kinds = {tensor.dtype for tensor in opened(tmp_path / "double.pth")["model_state_dict"].values()}
    assert kinds == {torch.float64}
    assert SevenNetBackbone.load(tmp_path / "double.pth").stored_dtype == torch.float64


def test_a_tuned_modality_is_replaced_and_the_others_keep_their_rows(tmp_path: Path, command: Command) -> None:
    base = write_checkpoint(tmp_path / "base.pth", RECIPES["modalities, all by modality"])
    adapter = tuned(base, tmp_path / "adapter", "elora", head="b", elements=(1, 6, 8))
    code, out, _ = command("merge", adapter, "-o", tmp_path / "tuned.pth", "--model", base)
    assert code == 0
    assert "modality b was replaced" in out
    one, other = (opened(path)["model_state_dict"] for path in (base, tmp_path / "tuned.pth"))
    widths = {"0_self_interaction_1.linear.weight": 4, "onehot_to_feature_x.linear.weight": 4}
    for key, width in widths.items():
        rows = [state[key][-3 * width :].view(3, width) for state in (one, other)]
        assert torch.equal(rows[0][[0, 2]], rows[1][[0, 2]])
        assert not torch.equal(rows[0][1], rows[1][1])
    code, _, err = command("merge", adapter, "-o", tmp_path / "more.pth", "--model", base, "--modality", "mine")
    assert code == 2
    assert "method elora has changed layers that all modalities share" in err
    assert not (tmp_path / "more.pth").exists()


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.modalities])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_new_modality_leaves_the_others_what_they_were(tmp_path: Path, name: str, dtype: str) -> None:
    recipe = RECIPES[name]
    base = write_checkpoint(tmp_path / "base.pth", recipe)
    elements = (8, 72) if "Hf" in recipe.species else (8, 6)
    options: dict[str, Any] = {"elements": elements, "dtype": getattr(torch, dtype)}
    adapter = tuned(base, tmp_path / "my functional" / "adapter", "modality", head="b", **options)
    merged = merge(tmp_path / "my functional", tmp_path / "tuned.pth", model=base)
    assert (merged.modality, merged.added) == ("my functional", True)
    config = opened(tmp_path / "tuned.pth")["config"]
    assert list(config["_modal_map"]) == [*recipe.modalities, "my functional"]
    assert config["_number_of_modalities"] == len(recipe.modalities) + 1
    systems = structures(["O", "Hf" if 72 in elements else "C"])
    new = predicted(tmp_path / "tuned.pth", None, systems, head="my functional")
    for (energy, forces), (expected, its) in zip(new, predicted(base, adapter, systems), strict=True):
        assert energy == pytest.approx(expected, rel=2e-6, abs=2e-6)
        np.testing.assert_allclose(forces, its, rtol=0, atol=2e-6 * max(1.0, np.abs(its).max()))
    everything = structures(recipe.symbols)
    for head in recipe.modalities:
        before, after = (predicted(path, None, everything, head=head) for path in (base, tmp_path / "tuned.pth"))
        for (energy, forces), (expected, its) in zip(after, before, strict=True):
            assert energy == pytest.approx(expected, rel=2e-6, abs=2e-6)
            np.testing.assert_allclose(forces, its, rtol=0, atol=2e-6 * max(1.0, np.abs(its).max()))
    # elements that were not trained keep the reference energies of the modality that the new one began with
    started, actual = (
        SevenNetBackbone.load(path, head=label).reference_energies
        for path, label in ((base, "b"), (tmp_path / "tuned.pth", "my functional"))
    )
    assert {z: actual[z] for z in actual if z not in E0} == {z: started[z] for z in started if z not in E0}
    assert {z: actual[z] for z in elements if z in E0} == {z: E0[z] for z in elements if z in E0}


def test_names_of_new_modalities(tmp_path: Path, command: Command) -> None:
    base = write_checkpoint(tmp_path / "base.pth", RECIPES["modalities, biases"])
    tuned(base, tmp_path / "a" / "adapter", "modality", head="b")
    output = tmp_path / "tuned.pth"

    def run(*more: object) -> tuple[int, str]:
        code, out, failed = command("merge", tmp_path / "a", "-o", output, "--model", base, *more)
        return code, out + failed

    code, out = run()  # the folder has the name of a modality
    assert code == 0
    assert "modality forcetune was added; the others are what they were" in out
    code, out = run("--modality", "PBE-D4")
    assert code == 0
    assert SevenNetBackbone.load(output, head="PBE-D4").modalities == ("a", "b", "PBE-D4")
    code, out = run("--modality", "a")
    assert code == 2
    assert "has the modality a already; name the new one with --modality" in out
    code, out = run("--modality", "b")
    assert code == 0
    assert "modality b was replaced" in out
    assert SevenNetBackbone.load(output, head="b").modalities == ("a", "b")
    plain = write_checkpoint(tmp_path / "plain.pth", RECIPES["parity, fully connected"])
    tuned(plain, tmp_path / "plain" / "adapter", "elora")
    code, _, failed = command("merge", tmp_path / "plain", "-o", output, "--model", plain, "--modality", "x")
    assert code == 2
    assert "has no modalities; leave it out" in failed


def test_modalities_that_would_change_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_checkpoint(tmp_path / "base.pth", RECIPES["modalities, one shift"])
    adapter = tuned(base, tmp_path / "adapter", "modality", head="b")
    whole = modalities._with_row

    def careless(values: Tensor, start: int, layer: ModalLinear, row: Tensor) -> Tensor:
        values_written = whole(values, start, layer, row)
        values_written[start : start + len(row)] += 0.1
        return values_written

    monkeypatch.setattr(modalities, "_with_row", careless)
    with pytest.raises(ForcetuneError, match="modality a would no longer be what it was"):
        merge(adapter, tmp_path / "tuned.pth", model=base, modality="mine")
    assert not (tmp_path / "tuned.pth").exists()
    model = SevenNetBackbone.load(base, head="b")
    with torch.no_grad():
        model.model.reduce_hidden_to_energy.linear.weight.mul_(1.1)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"reduce_hidden_to_energy\.linear\.weight has changed, which all modalities"):
        model.save_modality(tmp_path / "tuned.pth", "mine")


# ---- in sevenn -------------------------------------------------------------------------------------------------------


def metals(count: int, seed: int) -> list[Atoms]:
    """Shaken alloys with labels of effective medium theory."""
    rng = np.random.default_rng(seed)
    structures = []
    for _ in range(count):
        atoms = bulk("Cu", cubic=True)
        atoms.symbols[:] = rng.choice(["Cu", "Ni", "Al"], 4)
        atoms.symbols[:2] = ["Cu", "Ni"]
        atoms.set_cell(atoms.cell.array * rng.uniform(0.97, 1.08), scale_atoms=True)
        atoms.positions += 0.1 * rng.standard_normal((4, 3))
        atoms.calc = EMT()
        atoms.info["REF_energy"] = atoms.get_potential_energy() - 40.0
        atoms.arrays["REF_forces"] = atoms.get_forces()
        atoms.calc = None
        structures.append(atoms)
    return structures


def fitted(folder: Path, base: Path, name: str, head: str | None) -> Path:
    """A tiny fit."""
    write(folder / "train.xyz", metals(6, 1), format="extxyz")
    settings = {"training.batch_size": 2, "training.compile": "off", "data.doctor": "off", "model.head": head}
    out = folder / f"run-{name}"
    forcetune.fit(folder / "train.xyz", model=base, method=name, valid=2, epochs=1, out=out, settings=settings)
    return out


SYSTEMS = metals(3, 2)


def check_in_sevenn(sevennets: SevenNets, run: Path, base: Path, merged: Path, head: str | None, old: str) -> None:
    """sevenn gives what base + adapter does, and from the merged file exactly what forcetune reads from it."""
    requests = [Request(merged, head, SYSTEMS)]
    (double,), (single,) = (sevennets.compute(kind, requests) for kind in ("evaluate", "calculate"))
    assert_close(double, predicted(merged, None, SYSTEMS, head), 1e-9)
    assert_close(double, predicted(base, run, SYSTEMS), 1e-6)
    assert_close(single, predicted(base, run, SYSTEMS), 1e-6, of_forces=2e-5)
    content = opened(merged)
    assert content["config"]["version"] == old


@pytest.mark.parametrize(("model", "head", "name"), [("sevennet-0", None, "elora"), ("sevennet-mf-0", "PBE", "full")])
def test_merged_published_models_in_sevenn(
    sevennets: SevenNets, tmp_path: Path, model: str, head: str | None, name: str
) -> None:
    base = sevennets.published(PUBLISHED[model].folder)
    run = fitted(tmp_path, base, name, head)
    merge(run, tmp_path / "tuned.pth")
    old = {"sevennet-0": "0.9.1", "sevennet-mf-0": "0.9.4"}[model]
    check_in_sevenn(sevennets, run, base, tmp_path / "tuned.pth", head, old)
    assert_other_elements_and_modalities_are_untouched(base, tmp_path / "tuned.pth", head)


def assert_other_elements_and_modalities_are_untouched(base: Path, merged: Path, head: str | None) -> None:
    whole = SevenNetBackbone.load(base, head=head)
    state, written = whole.content.state, opened(merged)["model_state_dict"]
    assert list(state) == list(written)
    table = list(whole.content.architecture.type_map)
    assert len(table) == 89
    trained = [table.index(z) for z in (13, 28, 29)]
    untouched = [row for row in range(89) if row not in trained]
    rows = [checkpoint["onehot_to_feature_x.linear.weight"].view(89, -1) for checkpoint in (state, written)]
    assert torch.equal(rows[0][untouched], rows[1][untouched])
    shifts = [checkpoint["rescale_atomic_energy.shift"] for checkpoint in (state, written)]
    if head is None:
        assert torch.equal(shifts[0][untouched], shifts[1][untouched])
        return
    chosen = whole.modalities.index(head)
    assert torch.equal(shifts[0][chosen][untouched], shifts[1][chosen][untouched])
    assert torch.equal(shifts[0][1 - chosen], shifts[1][1 - chosen])
    modal = [checkpoint["reduce_input_to_hidden.linear.weight"][-128:].view(2, 64) for checkpoint in (state, written)]
    assert torch.equal(modal[0][1 - chosen], modal[1][1 - chosen])
    assert not torch.equal(modal[0][chosen], modal[1][chosen])


def test_a_new_modality_in_sevenn(sevennets: SevenNets, tmp_path: Path) -> None:
    """The old modalities give what they gave, the new one base + adapter."""
    base = sevennets.published(PUBLISHED["sevennet-mf-0"].folder)
    run = fitted(tmp_path, base, "modality", "PBE")
    merge(run, tmp_path / "tuned.pth", modality="EMT")
    merged = tmp_path / "tuned.pth"
    requests = [Request(base, "PBE", SYSTEMS), Request(base, "R2SCAN", SYSTEMS)]
    requests += [Request(merged, name, SYSTEMS) for name in ("PBE", "R2SCAN", "EMT")]
    pbe, r2scan, still_pbe, still_r2scan, emt = sevennets.compute("evaluate", requests)
    for before, after in ((pbe, still_pbe), (r2scan, still_r2scan)):
        expected = [(float(before[f"{k}/energy"]), before[f"{k}/forces"]) for k in range(len(SYSTEMS))]
        assert_close(after, expected, 1e-6)
    assert_close(emt, predicted(base, run, SYSTEMS), 1e-6)
    assert_close(emt, predicted(merged, None, SYSTEMS, "EMT"), 1e-9)
    assert max(abs(float(emt[f"{k}/energy"] - pbe[f"{k}/energy"])) for k in range(len(SYSTEMS))) > 1.0
    (single,) = sevennets.compute("calculate", [Request(merged, "EMT", SYSTEMS)])
    assert_close(single, predicted(base, run, SYSTEMS), 1e-6, of_forces=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize(
    ("model", "head"), [("sevennet-0", None), ("sevennet-0-may2024", None), ("sevennet-mf-0", "R2SCAN")]
)
def test_merged_models_are_deployed_by_sevenn(
    sevennets: SevenNets, tmp_path: Path, model: str, head: str | None, name: str
) -> None:
    """``sevenn get_model``: the serial TorchScript model, and the parallel ones are written."""
    base = sevennets.published(PUBLISHED[model].folder)
    run = fitted(tmp_path, base, name, head)
    merge(run, tmp_path / "tuned.pth")
    version = SevenNetBackbone.load(base, head=head).content.config["version"]
    check_in_sevenn(sevennets, run, base, tmp_path / "tuned.pth", head, version)
    (results,) = sevennets.compute("deploy", [Request(tmp_path / "tuned.pth", head, SYSTEMS)])
    assert int(results["parallel"]) == 5
    assert_close(results, predicted(base, run, SYSTEMS), 1e-6)


@pytest.mark.slow
def test_a_new_modality_is_deployed_by_sevenn(sevennets: SevenNets, tmp_path: Path) -> None:
    base = sevennets.published(PUBLISHED["sevennet-mf-0"].folder)
    run = fitted(tmp_path, base, "modality", "R2SCAN")
    merge(run, tmp_path / "tuned.pth", modality="EMT")
    requests = [Request(tmp_path / "tuned.pth", name, SYSTEMS) for name in ("EMT", "PBE")]
    emt, pbe = sevennets.compute("deploy", requests)
    assert_close(emt, predicted(base, run, SYSTEMS), 1e-6)
    assert_close(pbe, predicted(base, None, SYSTEMS, "PBE"), 1e-6)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        pytest.param(version, name, marks=() if version == NEWEST and name in QUICK else pytest.mark.slow)
        for QUICK in [("parity, fully connected", "modalities, one shift")]
        for name, recipe in RECIPES.items()
        for version in recipe.versions
        if version in (ALL_VERSIONS[0], ALL_VERSIONS[1], NEWEST) and version not in recipe.lost
    ],
)
def test_merged_models_of_each_version_in_the_newest(
    sevennets: SevenNets, tmp_path: Path, version: str, name: str
) -> None:
    """Old layouts, names and tables; single shifts that become one for each element; every kind of layer."""
    recipe = RECIPES[name]
    (base,) = sevennets.make([name], version)
    head = recipe.modalities[-1] if recipe.modalities else None
    systems = structures(recipe.symbols)
    elements = tuple(sorted({z for atoms in systems for z in atoms.numbers.tolist()}))
    adapter = tuned(base, tmp_path / "adapter", "elora", head=head, elements=elements)
    merge(adapter, tmp_path / "tuned.pth", model=base)
    assert opened(tmp_path / "tuned.pth")["config"]["version"] == version
    requests = [Request(tmp_path / "tuned.pth", head, systems)]
    if recipe.modalities:
        tuned(base, tmp_path / "modality", "modality", head=head, elements=elements)
        merge(tmp_path / "modality", tmp_path / "added.pth", model=base, modality="mine")
        requests.append(Request(tmp_path / "added.pth", "mine", systems))
        requests.append(Request(tmp_path / "added.pth", recipe.modalities[0], systems))
    results = sevennets.compute("evaluate", requests)
    assert_close(results[0], predicted(base, adapter, systems), 2e-6)
    assert_close(results[0], predicted(tmp_path / "tuned.pth", None, systems, head), 1e-9)
    if recipe.modalities:
        assert_close(results[1], predicted(base, tmp_path / "modality", systems), 2e-6)
        assert_close(results[2], predicted(base, None, systems, recipe.modalities[0]), 2e-6)


def test_unchanged_models_are_written_as_they_were(sevennets: SevenNets, tmp_path: Path) -> None:
    """Bit for bit the same tensors, under the same names, for every published model."""
    for model in PUBLISHED.values():
        base = sevennets.published(model.folder)
        actual = SevenNetBackbone.load(base, head=model.modalities[0], elements=[1, 8, 26])
        actual.save_into_source(tmp_path / "same.pth")
        written = opened(tmp_path / "same.pth")
        state = actual.content.state
        assert list(written["model_state_dict"]) == list(state)
        for key, tensor in written["model_state_dict"].items():
            assert torch.equal(tensor, state[key].cpu()), key
        again = SevenNetBackbone.load(tmp_path / "same.pth", head=model.modalities[0])
        assert again.base.fingerprint == actual.base.fingerprint
        frames = frames_of(bulk("Fe"))
        one, other = (predict(b, build_graphs(b, frames)) for b in (actual, again))
        assert one.energy[0] == pytest.approx(other.energy[0], abs=1e-9)
