"""Merged NequIP models: what changed and what did not, in forcetune and in nequip itself."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.file import save_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.nequip.backbone import NequIPBackbone
from forcetune.backbones.nequip.checkpoint import MODEL
from forcetune.backbones.nequip.content import EMBEDDING, SHIFTS
from forcetune.deployment.merge import merge
from forcetune.errors import InputError
from forcetune.utils.files import compute_sha256
from nequip_models import NEWEST, RECIPES, write_checkpoint
from nequip_oracle import NequIPs, Request
from sevennet_models import perturb, structures
from sevennet_oracle import Results

E0 = {1: -13.25, 8: -2041.5}


def tuned(base: Path, folder: Path, name: str, *, elements: Sequence[int] = (1, 8), **options: Any) -> Path:
    """A perturbed adapter for some elements of a model, with reference energies of its own."""
    references = options.pop("references", E0)
    model = NequIPBackbone.load(base, elements=elements, sha256=compute_sha256(base), **options)
    perturb(attach(model, method(name)), 0.05)
    model.set_reference_energies(references)
    save_adapter(model, folder)
    return folder


def predicted(base: Path, adapter: Path | None, systems: Sequence[Atoms]) -> list[Any]:
    """Energies and forces of forcetune's calculator, in float64."""
    calculator = forcetune.calculator(base, adapter=adapter, dtype="float64")
    predictions = []
    for atoms in systems:
        atoms.calc = calculator
        predictions.append((atoms.get_potential_energy(), atoms.get_forces()))
        atoms.calc = None
    return predictions


def assert_close(results: Results, expected: Sequence[Any], tolerance: float) -> None:
    """Energies within ``tolerance`` of their size (at least 1 eV), forces of the largest one (at least 1 eV/Å)."""
    for index, (energy, forces) in enumerate(expected):
        assert abs(float(results[f"{index}/energy"]) - energy) <= tolerance * max(1.0, abs(energy)), index
        difference = np.abs(results[f"{index}/forces"] - forces).max()
        assert difference <= tolerance * max(1.0, np.abs(forces).max()), index


def opened(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("name", ["elora", "sparse", "gain", "full"])
def test_only_what_was_trained_changes(tmp_path: Path, name: str) -> None:
    """Of four elements one was trained: rows and energies of the others, and the description, stay bit for bit."""
    base = write_checkpoint(tmp_path / "base.ckpt", RECIPES["parity"])
    adapter = tuned(base, tmp_path / "adapter", name, elements=(8,))
    merged = merge(adapter, tmp_path / "tuned.ckpt", model=base)
    assert max(merged.energy_difference, merged.forces_difference) < 1e-10
    before, after = members(base), members(tmp_path / "tuned.ckpt")
    assert before.keys() == after.keys()
    assert all(before[key] == after[key] for key in before if "/data/" not in key)
    one, other = (opened(path)["state_dict"] for path in (base, tmp_path / "tuned.ckpt"))
    rows = [state[f"{MODEL}func.{EMBEDDING}"] for state in (one, other)]
    assert torch.equal(rows[0][:3], rows[1][:3])
    shifts = [state[f"{MODEL}func.{SHIFTS}"] for state in (one, other)]
    assert torch.equal(shifts[0][:3], shifts[1][:3])
    assert float(shifts[1][3, 0]) == E0[8]
    key = f"{MODEL}func.layer1_convnet.conv.linear_2.weight"
    assert not torch.equal(one[key], other[key])
    for unread in ("edge_norm._rmax_recip", "bessel_encode.bessel_weights", "per_type_energy_scale_shift.scales"):
        assert torch.equal(one[f"{MODEL}func.{unread}"], other[f"{MODEL}func.{unread}"])


def test_one_shift_for_all_becomes_one_for_each(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base.ckpt", RECIPES["modified"])
    adapter = tuned(base, tmp_path / "adapter", "elora")
    merge(adapter, tmp_path / "tuned.ckpt", model=base)
    written = opened(tmp_path / "tuned.ckpt")
    expected = {"H": -13.25, "C": -2.5, "N": -2.5, "O": -2041.5}
    for config in (
        written["hyper_parameters"]["model"],
        written["hyper_parameters"]["info_dict"]["training_module"]["model"],
    ):
        assert config["model"]["per_type_energy_shifts"] == expected
    assert NequIPBackbone.load(tmp_path / "tuned.ckpt").reference_energies == {1: -13.25, 6: -2.5, 7: -2.5, 8: -2041.5}
    assert sorted(written) == sorted(opened(base))


def test_averages_are_written_as_well(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base.ckpt", RECIPES["averaged"])
    adapter = tuned(base, tmp_path / "adapter", "elora")
    merge(adapter, tmp_path / "tuned.ckpt", model=base)
    state = opened(tmp_path / "tuned.ckpt")["state_dict"]
    model = NequIPBackbone.load(tmp_path / "tuned.ckpt")
    weight = model.model.type_embed.embed_module.weight.detach()
    assert torch.equal(state["ema.ema_weight_0"], weight)
    # only the rows that were trained; the others keep what they were, each of its own
    assert torch.equal(state[f"{MODEL}func.{EMBEDDING}"][0], weight[0])


def test_other_precisions(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base.ckpt", RECIPES["single precision"])
    adapter = tuned(base, tmp_path / "adapter", "full")
    merged = merge(adapter, tmp_path / "single.ckpt", model=base)
    assert max(merged.energy_difference, merged.forces_difference) < 1e-5
    assert NequIPBackbone.load(tmp_path / "single.ckpt").stored_dtype == torch.float32
    merged = merge(adapter, tmp_path / "double.ckpt", model=base, dtype="float64")
    assert max(merged.energy_difference, merged.forces_difference) < 1e-10
    assert NequIPBackbone.load(tmp_path / "double.ckpt").stored_dtype == torch.float64
    content = opened(tmp_path / "double.ckpt")
    assert content["hyper_parameters"]["model"]["model_dtype"] == "float64"
    kinds = {value.dtype for key, value in content["state_dict"].items() if key.startswith(MODEL)}
    assert kinds == {torch.float64}


def test_a_file_that_has_changed_is_not_written_into(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base.ckpt", RECIPES["parity"])
    model = NequIPBackbone.load(base)
    write_checkpoint(base, RECIPES["parity"], seed=1)
    with pytest.raises(InputError, match="is no longer the file that the model was read from"):
        model.save_into_source(tmp_path / "tuned.ckpt")
    assert not (tmp_path / "tuned.ckpt").exists()


def test_unchanged_models_are_written_as_they_were(nequips: NequIPs, tmp_path: Path) -> None:
    """Byte for byte the same members, of checkpoints and packages."""
    names = ("parity", "averaged", "everything trained", "several linear readouts")
    for name, made in zip(names, nequips.make(names), strict=True):
        for source, ending in ((made.checkpoint, "ckpt"), (made.package, "nequip.zip")):
            model = NequIPBackbone.load(source, elements=[1, 8])
            assert model.save_into_source(tmp_path / f"same.{ending}")
            before, after = members(source), members(tmp_path / f"same.{ending}")
            differing = [key for key in before if before[key] != after[key]]
            if name == "averaged" and ending == "ckpt":
                # averages stand beside the weights that were trained on, which become the same
                assert all("/data/" in key for key in differing)
            else:
                assert not differing, (name, ending, differing)
            again = NequIPBackbone.load(tmp_path / f"same.{ending}", elements=[1, 8])
            assert again.base.fingerprint == model.base.fingerprint


def test_packages_without_a_place_for_reference_energies_say_so(nequips: NequIPs, tmp_path: Path) -> None:
    (made,) = nequips.make(["neighbors by type, one shift"])
    adapter = tuned(made.package, tmp_path / "adapter", "elora")
    with pytest.raises(InputError, match="one energy shift for all types"):
        merge(adapter, tmp_path / "tuned.nequip.zip", model=made.package)
    assert not (tmp_path / "tuned.nequip.zip").exists()
    kept = tuned(made.package, tmp_path / "kept", "elora", references={})
    merge(kept, tmp_path / "tuned.nequip.zip", model=made.package)


MERGED = ("parity", "averaged", "everything trained", "modified", "repulsion", "several linear readouts")


def test_merged_models_in_nequip(nequips: NequIPs, tmp_path: Path) -> None:
    """Its ASE calculator gives base + adapter, from checkpoints and packages."""
    systems = structures(("H", "O"))[:3]
    requests, expected = [], []
    for name, made in zip(MERGED, nequips.make(MERGED), strict=True):
        for source, ending in ((made.checkpoint, "ckpt"), (made.package, "nequip.zip")):
            place = f"{name.replace(' ', '-')}.{ending}"
            # the package of a modified model has shifts for each type already
            adapter = tuned(source, tmp_path / f"{place}-adapter", "full" if ending == "ckpt" else "elora")
            merge(adapter, tmp_path / place, model=source)
            requests.append(Request(tmp_path / place, systems))
            expected.append(predicted(source, adapter, systems))
    for request, results, wanted in zip(requests, nequips.compute("calculate", requests), expected, strict=True):
        assert_close(results, wanted, 1e-9)
        assert_close(results, predicted(request.model, None, systems), 1e-10)


def compare_compiled(nequips: NequIPs, folder: Path, name: str, version: str, mode: str) -> None:
    """``nequip-compile`` takes both forms of a merged file, and NequIP's calculator then gives base + adapter."""
    systems = structures(("H", "O"))[:3]
    requests, expected = [], []
    (made,) = nequips.make([name], version)
    for source, ending in ((made.checkpoint, "ckpt"), (made.package, "nequip.zip")):
        adapter = tuned(source, folder / f"{ending}-adapter", "elora")
        merge(adapter, folder / f"tuned.{ending}", model=source)
        requests.append(Request(folder / f"tuned.{ending}", systems))
        expected.append(predicted(source, adapter, systems))
    for results, wanted in zip(nequips.compute("compile", requests, version=version, mode=mode), expected, strict=True):
        assert_close(results, wanted, 1e-9)


@pytest.mark.slow
def test_merged_models_are_compiled_to_torchscript(nequips: NequIPs, tmp_path: Path) -> None:
    """By the last version that still does so with PyTorch 2.10 and later; 0.17 and later refuse there."""
    compare_compiled(nequips, tmp_path, "smallest", "0.16.2", "torchscript")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="nequip-compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["smallest", "parity"])
def test_merged_models_are_compiled_by_inductor(nequips: NequIPs, tmp_path: Path, name: str) -> None:
    compare_compiled(nequips, tmp_path, name, NEWEST, "aotinductor")
