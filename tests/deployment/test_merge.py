"""Merged models, read by mace's own calculator in a process that knows nothing of forcetune."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.io import read, write

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.file import save_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.deployment import merge as merging
from forcetune.deployment.merge import merge, probe_frames
from forcetune.errors import ForcetuneError, InputError
from forcetune.utils.files import compute_sha256
from systems import cluster, crystal, perturb, write_model

FOREIGN = """
import json, sys
from ase.io import read
from mace.calculators import MACECalculator
assert not any(name.split('.')[0] == 'forcetune' for name in sys.modules)
results = []
calculator = MACECalculator(model_paths=sys.argv[1], device='cpu', default_dtype='float64')
for atoms in read(sys.argv[2], ':'):
    atoms.calc = calculator
    results.append([atoms.get_potential_energy(), atoms.get_forces().tolist()])
assert not any(name.split('.')[0] == 'forcetune' for name in sys.modules)
print('RESULT', json.dumps(results))
"""


def adapter_on(path: Path, folder: Path, name: str, elements: tuple[int, ...] = (1, 6, 8)) -> Path:
    """A perturbed adapter with reference energies of its own."""
    model = MaceBackbone.load(path, elements=elements, sha256=compute_sha256(path))
    perturb(attach(model, method(name)))
    model.set_reference_energies({1: -13.6, 6: -1035.2, 8: -2043.9})
    save_adapter(model, folder)
    return folder


@pytest.mark.parametrize("name", ["elora", "full", "readout"])
def test_merged_model_in_the_librarys_own_calculator(tmp_path: Path, name: str) -> None:
    base = write_model(tmp_path / "base.model", trainable_bessel=True)
    folder = adapter_on(base, tmp_path / "adapter", name)
    merged = merge(folder, tmp_path / "tuned.model", model=base)
    assert max(merged.energy_difference, merged.forces_difference) <= 1e-10
    structures = [cluster((1, 6, 8)), crystal((1, 6, 8))]
    write(tmp_path / "probe.xyz", structures, format="extxyz")
    command = [sys.executable, "-W", "ignore", "-c", FOREIGN, "tuned.model", "probe.xyz"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    content = json.loads(out.split("RESULT", 1)[1])
    calculator = forcetune.calculator(base, adapter=folder)
    for atoms, (energy, forces) in zip(read(tmp_path / "probe.xyz", ":"), content, strict=True):
        atoms.calc = calculator
        assert energy == pytest.approx(atoms.get_potential_energy(), rel=1e-12, abs=1e-10)
        np.testing.assert_allclose(forces, atoms.get_forces(), rtol=0, atol=1e-10)


BROMINE = -70_038.737
"""eV, of all electrons."""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reference_energies_of_all_electrons(tmp_path: Path, dtype: str) -> None:
    """A float64 base keeps them whatever the precision of the training was."""
    base = write_model(tmp_path / "base.model", elements=(1, 6, 35))
    model = MaceBackbone.load(base, sha256=compute_sha256(base), dtype=getattr(torch, dtype))
    perturb(attach(model, method("elora")))
    references = {1: -13.587, 6: -1029.2809654211628, 35: BROMINE}
    model.set_reference_energies(references)
    save_adapter(model, tmp_path / "adapter", stored_dtype=getattr(torch, dtype))
    merged = merge(tmp_path / "adapter", tmp_path / "tuned.model", model=base)
    written = MaceBackbone.load(tmp_path / "tuned.model", dtype=getattr(torch, dtype))
    for z, energy in references.items():
        stored = np.float32(energy) if dtype == "float32" else energy
        assert written.reference_energies[z] == float(stored)
    assert merged.references_difference == 0
    assert merged.energy_difference < (1e-4 if dtype == "float32" else 1e-10)
    atoms = cluster((1, 6, 35))
    models = []
    for given in (tmp_path / "tuned.model", None):
        atoms.calc = forcetune.calculator(given or base, adapter=None if given else tmp_path / "adapter")
        models.append((atoms.get_potential_energy(), atoms.get_forces()))
    # by the plain model loaded in float64, from its rounded parameters
    assert models[0][0] == pytest.approx(models[1][0], abs=9 * 0.004 if dtype == "float32" else 1e-8)
    np.testing.assert_allclose(models[0][1], models[1][1], rtol=0, atol=2e-4 if dtype == "float32" else 1e-9)


def test_wrong_reference_energies_are_found_whatever_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_model(tmp_path / "base.model", elements=(1, 6, 35))
    model = MaceBackbone.load(base, sha256=compute_sha256(base), dtype=torch.float32)
    perturb(attach(model, method("elora")))
    model.set_reference_energies({1: -13.587, 6: -1029.28, 35: BROMINE})
    save_adapter(model, tmp_path / "adapter")
    whole = MaceBackbone.save

    def careless(backbone: MaceBackbone, path: Path) -> None:
        right = backbone.reference_energies[35]
        backbone.set_reference_energies({35: right + 0.5})
        whole(backbone, path)
        backbone.set_reference_energies({35: right})

    monkeypatch.setattr(MaceBackbone, "save_into_source", lambda *_: False)
    monkeypatch.setattr(MaceBackbone, "save", careless)
    with pytest.raises(ForcetuneError, match=r"its reference energies by 5\.0e-01 eV"):
        merge(tmp_path / "adapter", tmp_path / "tuned.model", model=base)
    assert not (tmp_path / "tuned.model").exists()


def test_nothing_is_written_unless_parity_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base.model")
    folder = adapter_on(base, tmp_path / "adapter", "elora")
    whole = merging.merge_weights

    def careless(backbone: MaceBackbone) -> None:
        whole(backbone)
        next(iter(backbone.model.parameters())).data.mul_(1.001)

    monkeypatch.setattr(merging, "merge_weights", careless)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ForcetuneError, match="differs from base"):
        merge(folder, tmp_path / "tuned.model", model=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_gates_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.model")
    folder = adapter_on(base, tmp_path / "adapter", "mmea")
    with pytest.raises(InputError, match="no weights can absorb"):
        merge(folder, tmp_path / "tuned.model", model=base)
    with pytest.raises(InputError, match=r"base\.model: holds no adapter_config\.json"):
        merge(base, tmp_path / "tuned.model")
    assert not (tmp_path / "tuned.model").exists()


def test_probes_hold_every_element_and_kind_of_structure() -> None:
    for elements in ((1,), (1, 6, 8), tuple(range(1, 90))):
        frames = probe_frames(elements, 5.0)
        assert {int(z) for frame in frames for z in frame.numbers} == set(elements)
        assert {bool(frame.pbc.all()) for frame in frames} == {True, False}
        assert min(len(frame) for frame in frames) == 1
