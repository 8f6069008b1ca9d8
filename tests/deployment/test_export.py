"""Files for other programs: written after comparison, opened in fresh processes, refused where they cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import write

import forcetune
import nequip_models
from forcetune.adapters.attach import attach
from forcetune.adapters.file import save_adapter
from forcetune.adapters.methods import method
from forcetune.deployment.export import lammps_mliap
from forcetune.deployment.export.exporting import export
from forcetune.deployment.export.registry import TARGETS
from forcetune.deployment.mliap.unified import UnifiedPotential
from forcetune.errors import ForcetuneError, InputError
from sevennet_models import RECIPES, write_checkpoint
from systems import cluster, crystal, perturb, write_model
from terminal import Command

FRESH = """
import json, pickle, sys
import numpy as np
import torch
from ase.io import read
from forcetune.deployment.calculator import build_frame
from forcetune.deployment.mliap.stand_in import run_lammps
def load():
    if sys.argv[1].endswith('.pt'):
        return torch.load(sys.argv[1], weights_only=False)
    with open(sys.argv[1], 'rb') as stream:
        return pickle.load(stream)
results = []
for atoms in read(sys.argv[2], ':'):
    result = run_lammps(load, build_frame(atoms), bounds=(0.5,))
    results.append([result.energy, result.forces.tolist()])
print('RESULT', json.dumps([load().element_types, load().rcutfac, results]))
"""


def adapter_on(base: Path, folder: Path, name: str, elements: tuple[int, ...] | None = None) -> Path:
    """A perturbed adapter with reference energies of its own."""
    model = forcetune.load(base, elements=None if elements is None else list(elements))
    perturb(attach(model, method(name)))
    model.set_reference_energies({z: -10.0 * z for z in model.elements})
    save_adapter(model, folder)
    return folder


@pytest.fixture
def mace_base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.model")


@pytest.fixture
def sevennet_base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base.pth", RECIPES["no parity, linear, XPLOR"])


@pytest.fixture
def nequip_base(tmp_path: Path) -> Path:
    return nequip_models.write_checkpoint(tmp_path / "base.ckpt", nequip_models.RECIPES["cutoffs by pair"])


@pytest.mark.parametrize("suffix", [".pt", ".pkl"])
@pytest.mark.parametrize("library", ["mace", "sevennet", "nequip"])
def test_mliap_opens_in_a_fresh_process(
    tmp_path: Path, command: Command, request: pytest.FixtureRequest, library: str, suffix: str
) -> None:
    base: Path = request.getfixturevalue(f"{library}_base")
    run = adapter_on(base, tmp_path / "run", "mmea")
    file = tmp_path / f"tuned{suffix}"
    code, out, err = command("export", run, "--to", "lammps-mliap", "-o", file, "--model", base)
    assert code == 0, err
    assert "pair_style mliap unified FILE 0" in out and "not by LAMMPS itself" in out
    calculator = forcetune.calculator(base, adapter=run)
    elements = calculator.backbone.elements
    structures = [cluster(elements), crystal(elements)]
    write(tmp_path / "probe.xyz", structures, format="extxyz")
    script = [sys.executable, "-W", "ignore", "-c", FRESH, str(file), str(tmp_path / "probe.xyz")]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    types, half_cutoff, results = json.loads(printed.split("RESULT", 1)[1])
    assert types == Atoms(list(elements)).get_chemical_symbols()
    assert 2 * half_cutoff == calculator.backbone.cutoff
    for atoms, (energy, forces) in zip(structures, results, strict=True):
        atoms.calc = calculator
        # positions in the file have eight digits
        assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(forces, atoms.get_forces(), rtol=0, atol=1e-6)


def test_a_foundation_model_by_its_name(tmp_path: Path) -> None:
    exported = export("mini", "lammps-mliap", tmp_path / "mini.pt")
    assert exported.path == tmp_path / "mini.pt" and exported.path.is_file()
    assert max(exported.parity.energy, exported.parity.forces) <= 1e-10
    assert exported.parity.n_probes >= 3


def test_nothing_is_written_unless_lammps_agrees(
    tmp_path: Path, mace_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shortened(path: Path, suffix: str) -> UnifiedPotential:
        potential = read_back(path, suffix)
        potential.rcutfac *= 0.8
        return potential

    read_back = lammps_mliap.read_back
    monkeypatch.setattr(lammps_mliap, "read_back", shortened)
    with pytest.raises(ForcetuneError, match="in LAMMPS the potential would differ"):
        export(mace_base, "lammps-mliap", tmp_path / "tuned.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["base.model"]


def test_gates_are_refused_where_a_plain_model_is_needed(tmp_path: Path, mace_base: Path) -> None:
    run = adapter_on(mace_base, tmp_path / "run", "mmea")
    for name, target in TARGETS.items():
        if target.gates or "mace" not in target.libraries:
            continue
        file = tmp_path / f"tuned{(target.suffixes or ('',))[0]}"
        with pytest.raises(InputError, match=rf"--to {name} needs a plain model.*--to lammps-mliap carries gates"):
            export(run, name, file, model=mace_base)
        assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "gromacs"}, "--to gromacs: is no export target; choose one of lammps-mliap"),
        ({"to": "symmetrix", "output": "tuned.json"}, "takes models of mace, and this one is of sevennet; choose"),
        ({"output": "tuned.xyz"}, r"tuned\.xyz: a file for lammps-mliap ends with \.pt or \.pth or \.pkl"),
        ({"output": "."}, "is a folder; name a file"),
        ({"output": "base.pth"}, "is the base of this model and stays as it is"),
        ({"model": "mini"}, "holds no adapter, which alone has a base"),
        ({"head": "PBE"}, "has no modalities, and so no head 'PBE'"),
        ({"to": "sevennet-serial", "python": "no-such-python"}, "--python no-such-python: cannot be started"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, sevennet_base: Path, arguments: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"to": "lammps-mliap", "output": "tuned.pt"} | arguments
    options["output"] = tmp_path / options["output"]
    with pytest.raises(InputError, match=message):
        export(sevennet_base, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["base.pth"]


def test_a_missing_library_is_named_with_how_to_get_it(
    tmp_path: Path, sevennet_base: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an interpreter without site-packages has none of them
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    code, _, err = command(
        "export", sevennet_base, "--to", "sevennet-serial", "-o", tmp_path / "tuned.pt", "--python", bare
    )
    assert code == 2
    assert "sevenn is not installed" in err and "pip install sevenn" in err
    assert not (tmp_path / "tuned.pt").exists()


def test_targets_are_listed(command: Command) -> None:
    code, out, _ = command("export")
    assert code == 0
    for name in (
        "lammps-mliap",
        "lammps-mliap-mace",
        "symmetrix",
        "sevennet-serial",
        "sevennet-parallel",
        "torchscript",
    ):
        assert name in out
    code, _, err = command("export", "run", "--to", "lammps-mliap")
    assert code == 2 and "forcetune export RUN --to TARGET -o FILE" in err


def test_torchscript_by_maces_converter(tmp_path: Path) -> None:
    pytest.importorskip("mace")
    base = write_model(tmp_path / "base.model", num_interactions=1, hidden_irreps="4x0e", correlation=1)
    run = adapter_on(base, tmp_path / "run", "elora")
    exported = export(run, "torchscript", tmp_path / "tuned.pt", model=base)
    assert max(exported.parity.energy, exported.parity.forces) < 1e-10
    assert sorted(float(z) for z in torch.jit.load(exported.path).atomic_numbers) == [1, 6, 7, 8]


@pytest.mark.slow
def test_symmetrix_by_its_own_converter(tmp_path: Path) -> None:
    """Energies, forces and stress in symmetrix itself, without the code that it compiles for minutes."""
    pytest.importorskip("mace")
    symmetrix = pytest.importorskip("symmetrix")
    run = adapter_on(Path("mini"), tmp_path / "run", "elora", (1, 8))
    exported = export(run, "symmetrix", tmp_path / "tuned.json")
    assert 0 < max(exported.parity.energy, exported.parity.forces) < 1e-4
    ours = forcetune.calculator(adapter=run, compile="off")
    theirs = symmetrix.Symmetrix(str(exported.path), dtype="float64", streamed_edges="non-compiled")
    rng = np.random.default_rng(0)
    box = Atoms(cell=[6.2, 6.4, 6.0], pbc=True)
    for place in np.ndindex(2, 2, 2):
        water = molecule("H2O")
        water.rotate(rng.uniform(0, 360), rng.normal(size=3))
        water.translate(3.0 * np.array(place))
        box += water
    for atoms in (molecule("H2O", vacuum=8.0), box):
        other = atoms.copy()
        atoms.calc, other.calc = ours, theirs
        forces = atoms.get_forces()
        assert other.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=2e-6 * len(atoms))
        np.testing.assert_allclose(other.get_forces(), forces, rtol=0, atol=1e-4 * max(1, np.abs(forces).max()))
    np.testing.assert_allclose(box.get_stress(), other.get_stress(), rtol=0, atol=1e-5)


OTHER_PYTHON = "FORCETUNE_SEVENNET_PYTHON"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["sevennet-serial", "sevennet-parallel"])
def test_sevennets_own_converter(tmp_path: Path, to: str) -> None:
    """On a published model; an interpreter with sevenn is named by a variable, since mace wants another e3nn."""
    python = os.environ.get(OTHER_PYTHON)
    if python is None:
        pytest.skip(f"{OTHER_PYTHON} names no interpreter with sevenn")
    find = "import sevenn._const as c; print(c.SEVENNET_0_11Jul2024)"
    base = Path(subprocess.run([python, "-c", find], capture_output=True, text=True, check=True).stdout.strip())
    run = adapter_on(base, tmp_path / "run", "elora", (8, 29))
    output = tmp_path / ("tuned.pt" if to == "sevennet-serial" else "tuned")
    exported = export(run, to, output, model=base, python=python)
    assert 0 < max(exported.parity.energy, exported.parity.forces) < 1e-4
    assert output.is_file() if to == "sevennet-serial" else len(list(output.glob("deployed_parallel_*.pt"))) == 5
