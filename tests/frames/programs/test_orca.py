"""ORCA: outputs of single points and optimisations, and .engrad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forcetune.errors import ForcetuneNote, ForcetuneWarning, InputError
from forcetune.frames.read import read_frames
from frames.outputs import ORCA_WATER, labels, write_orca

HARTREE, PER_BOHR = 27.211386246, 51.422067476


def test_single_point(tmp_path: Path) -> None:
    path = write_orca(tmp_path / "water.out")
    with pytest.warns(ForcetuneNote, match="ORCA's output: energies from Hartree to eV, forces from gradients"):
        result = read_frames(path, require=("energy", "forces"))
    energy, gradient, _ = labels(0, 3)
    (frame,) = result.frames
    assert frame.energy == pytest.approx(HARTREE * energy, rel=1e-7) and not frame.pbc.any()
    np.testing.assert_allclose(frame.forces, -PER_BOHR * gradient, rtol=1e-6)
    np.testing.assert_array_equal(frame.numbers, [8, 1, 1])
    np.testing.assert_allclose(frame.positions, ORCA_WATER, atol=1e-6)


def test_optimisation(tmp_path: Path) -> None:
    path = write_orca(tmp_path / "water.log", steps=4, last_gradient=False)
    with pytest.warns(ForcetuneWarning, match=r"1 of 4 geometries have an energy and no gradient \(first 3,"):
        result = read_frames(path, require=("energy", "forces"))
    energies = [frame.energy for frame in result.frames]
    assert energies == pytest.approx([HARTREE * labels(step, 3)[0] for step in range(3)], rel=1e-7)
    np.testing.assert_allclose(result.frames[2].positions, ORCA_WATER + 0.02, atol=1e-6)


def test_energies_alone(tmp_path: Path) -> None:
    path = write_orca(tmp_path / "water.out", last_gradient=False)
    assert read_frames(path).frames[0].forces is None


def test_outputs_that_cannot_be_used(tmp_path: Path) -> None:
    path = write_orca(tmp_path / "water.out")
    text = path.read_text()
    path.write_text(
        text.replace("FINAL SINGLE POINT ENERGY", "FINAL SINGLE POINT ENERGY (Wavefunction not fully converged!)")
    )
    with pytest.raises(InputError, match="the wavefunction did not converge in its only step"):
        read_frames(path)
    path.write_text(text[: text.index("CARTESIAN COORD")])
    with pytest.raises(InputError, match=r"water\.out, frame 0"):
        read_frames(path)


def write_engrad(path: Path) -> Path:
    energy, gradient, _ = labels(0, 3)
    blocks = {
        "Number of atoms": ["3"],
        "The current total energy in Eh": [f"{energy:.10f}"],
        "The current gradient in Eh/bohr": [f"{value:.12f}" for value in gradient.ravel()],
        "The atomic numbers and current coordinates in Bohr": [
            f"{z} " + " ".join(f"{value:.10f}" for value in place)
            for z, place in zip((8, 1, 1), ORCA_WATER / 0.529177210903, strict=True)
        ],
    }
    path.write_text("".join(f"#\n# {title}\n#\n" + "\n".join(rows) + "\n" for title, rows in blocks.items()))
    return path


def test_engrad(tmp_path: Path) -> None:
    path = write_engrad(tmp_path / "water.engrad")
    energy, gradient, _ = labels(0, 3)
    (frame,) = read_frames(path, require=("energy", "forces")).frames
    assert frame.energy == pytest.approx(HARTREE * energy, rel=1e-7)
    np.testing.assert_allclose(frame.forces, -PER_BOHR * gradient, rtol=1e-6)
    np.testing.assert_allclose(frame.positions, ORCA_WATER, atol=1e-6)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(InputError, match=r"water\.engrad, frame 0: .*where 3 atoms have 23"):
        read_frames(path)


def test_as_dpdata_reads_it(tmp_path: Path) -> None:
    dpdata = pytest.importorskip("dpdata")
    path = write_orca(tmp_path / "water.out")
    theirs = dpdata.LabeledSystem(str(path), fmt="orca/spout").data
    (frame,) = read_frames(path).frames
    assert frame.energy == pytest.approx(theirs["energies"][0], rel=1e-7)
    np.testing.assert_allclose(frame.forces, theirs["forces"][0], rtol=1e-6)
