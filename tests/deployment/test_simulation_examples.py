"""The scripts of docs/simulate.md run, and what they print is right."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest

import forcetune
from sevennet_models import RECIPES, write_checkpoint
from simulations import water_box

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(script: str, folder: Path, *arguments: object, needs: str | None = None) -> str:
    """What a script prints."""
    if needs is not None and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def test_ase(tmp_path: Path) -> None:
    out = run("simulate_ase.py", tmp_path, "mini", 20)
    novelty = float(re.search(r"at most ([\d.]+)", out)[1])  # type: ignore[index]
    assert 0.1 < novelty < 5.0
    assert not (tmp_path / "flagged.xyz").exists()


def test_torchsim(tmp_path: Path) -> None:
    out = run("simulate_torchsim.py", tmp_path, "mini", 5, 3, needs="torch_sim")
    assert "3 molecules, 5 steps: energies from -" in out


def test_lammps(tmp_path: Path) -> None:
    pytest.importorskip("lammps", reason="LAMMPS is not installed")
    out = run("simulate_lammps.py", tmp_path, "mini", "--steps", 5)
    rows = [line.split() for line in out.splitlines() if re.match(r"\s+[05]\s+\d", line)]
    assert [row[0] for row in rows] == ["0", "5"]
    # scripts of one's own
    atoms = water_box(1)
    ase.io.write(tmp_path / "own.data", atoms, format="lammps-data", specorder=["O", "H"], masses=True)
    (tmp_path / "system.lmp").write_text("units metal\nboundary p p p\nread_data own.data\n")
    (tmp_path / "run.lmp").write_text("run 0\nvariable pe equal pe\nprint 'energy ${pe}'\n")
    out = run("simulate_lammps.py", tmp_path, "mini", "system.lmp", "run.lmp", "--elements", "O,H")
    atoms.calc = forcetune.calculator("mini", compile="off")
    energy = float(re.findall(r"energy (-[\d.]+)", out)[-1])
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)


def test_openmm(tmp_path: Path) -> None:
    out = run("simulate_openmm.py", tmp_path, "mini", 3, needs="openmm")
    assert re.search(r"alone: 3 steps, -\d+\.\d+ eV", out) and re.search(r"force field: 3 steps, -\d+\.\d+ eV", out)


def test_ipi(tmp_path: Path) -> None:
    """Path integrals of two beads: the first potential energy is the calculator's, and a conserved quantity is one."""
    out = run("simulate_ipi.py", tmp_path, "mini", 8, tmp_path / "ipi", 2, needs="ipi")
    atoms = ase.io.read(tmp_path / "ipi" / "start.xyz")
    atoms.calc = forcetune.calculator("mini", compile="off")
    potential = np.loadtxt(tmp_path / "ipi" / "simulation.md", usecols=3)
    assert len(potential) == 9
    # i-PI has eight digits of the electron volt, ASE more
    assert potential[0] == pytest.approx(atoms.get_potential_energy(), rel=3e-7)
    assert float(re.search(r"within ([\d.]+) meV", out)[1]) < 0.5  # type: ignore[index]


def test_phonopy(tmp_path: Path) -> None:
    """A crystal of one atom, so that phonopy's three frequencies at Γ are those of translations: zero."""
    pytest.importorskip("phonopy", reason="phonopy is not installed")
    model = write_checkpoint(tmp_path / "copper.pth", replace(RECIPES["parity, fully connected"], species=("Cu",)))
    out = run("phonons.py", tmp_path, model)
    frequencies = {name: [float(value) for value in line.split()] for name, line in re.findall(r"(Γ|X) THz: (.+)", out)}
    assert np.abs(frequencies["Γ"]).max() < 1e-3
    # two transverse branches are one along this direction
    low, middle, high = frequencies["X"]
    assert low == pytest.approx(middle, abs=1e-3) or middle == pytest.approx(high, abs=1e-3)
