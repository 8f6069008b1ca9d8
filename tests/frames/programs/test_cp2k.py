"""CP2K: outputs of single points, and trajectories with the files beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forcetune.errors import ForcetuneNote, ForcetuneWarning, InputError
from forcetune.frames.read import read_frames
from forcetune.frames.sources import content_hash
from frames.outputs import labels, salt, write_cp2k_output, write_cp2k_trajectory

HARTREE, PER_BOHR = 27.211386246, 51.422067476
GIGAPASCAL = 1 / 160.21766208


@pytest.mark.parametrize("modern", [False, True])
def test_output(modern: bool, tmp_path: Path) -> None:
    path = write_cp2k_output(tmp_path / "cp2k.out", modern=modern)
    with pytest.warns(ForcetuneNote, match="from Hartree to eV, forces from Hartree/Bohr"):
        result = read_frames(path, require=("energy", "forces", "stress"))
    energy, forces, stress = labels()
    (frame,) = result.frames
    assert frame.energy == pytest.approx(HARTREE * energy, rel=1e-7) and frame.pbc.all()
    np.testing.assert_allclose(frame.forces, PER_BOHR * forces, rtol=1e-6)
    np.testing.assert_allclose(frame.stress, -GIGAPASCAL * stress, rtol=1e-6)
    np.testing.assert_allclose(frame.positions, salt().positions, rtol=0, atol=1e-7)
    np.testing.assert_allclose(frame.cell, salt().cell.array, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(frame.numbers, [11, 11, 17, 17])


def test_outputs_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the SCF did not converge in its only step"):
        read_frames(write_cp2k_output(tmp_path / "a.out", converged=False))
    text = write_cp2k_output(tmp_path / "b.out").read_text()
    (tmp_path / "c.out").write_text(text[: text.index(" MODULE")])
    with pytest.raises(InputError, match=r"no coordinates with an energy; print them .*PROJECT-pos-1\.xyz"):
        read_frames(tmp_path / "c.out")
    energy = text[text.index(" ENERGY|") :].splitlines()[0]
    (tmp_path / "d.out").write_text(f"{text}\n{energy}\n{energy}\n")
    with pytest.warns(ForcetuneWarning, match="2 energies belong to geometries that are not printed"):
        assert len(read_frames(tmp_path / "d.out")) == 1


def test_trajectory(tmp_path: Path) -> None:
    path = write_cp2k_trajectory(tmp_path)
    with pytest.warns(ForcetuneNote, match="a trajectory of CP2K: energies from Hartree"):
        result = read_frames(path, require=("energy", "forces", "stress"))
    for step, frame in enumerate(result.frames):
        energy, forces, stress = labels(step)
        assert frame.energy == pytest.approx(HARTREE * energy, rel=1e-7)
        np.testing.assert_allclose(frame.forces, PER_BOHR * forces, rtol=1e-6)
        np.testing.assert_allclose(frame.stress, -GIGAPASCAL * 1e-4 * stress, rtol=1e-6)
        np.testing.assert_allclose(frame.cell, salt().cell.array, rtol=0, atol=1e-9)
        np.testing.assert_allclose(frame.positions, salt(step).positions, rtol=0, atol=1e-9)


def test_the_hash_follows_the_files_beside(tmp_path: Path) -> None:
    path = write_cp2k_trajectory(tmp_path)
    before = content_hash(path)
    forces = path.with_name("melt-frc-1.xyz")
    forces.write_text(forces.read_text().replace("i =        0", "i =       00"))
    assert content_hash(path) != before


def test_a_cell_that_stays(tmp_path: Path) -> None:
    path = write_cp2k_trajectory(tmp_path, cells=False)
    with pytest.warns(ForcetuneWarning, match=r"no melt-1\.cell and no \.restart beside it"):
        assert not read_frames(path).frames[0].pbc.any()
    cell = "     &CELL\n       A 4.0 0 0\n       B 0 5.0 0\n       C 0 0 20.0\n       PERIODIC  XY\n     &END CELL\n"
    (tmp_path / "melt-1.restart").write_text(f" &FORCE_EVAL\n   &SUBSYS\n{cell}   &END SUBSYS\n &END FORCE_EVAL\n")
    frame = read_frames(path).frames[2]
    assert frame.pbc.tolist() == [True, True, False]
    np.testing.assert_array_equal(frame.cell, np.diag([4.0, 5.0, 20.0]))


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    path = write_cp2k_trajectory(tmp_path, every=2)
    with pytest.raises(InputError, match=r"pos-1\.xyz, frame 1: step 1 is missing in .*melt-frc-1\.xyz"):
        read_frames(path)
    with pytest.raises(InputError, match="name the trajectory of positions"):
        read_frames(tmp_path / "melt-frc-1.xyz")
    path.with_name("melt-frc-1.xyz").unlink()
    assert read_frames(path).frames[0].forces is None
    with pytest.raises(InputError, match="no forces found"):
        read_frames(path, require=("energy", "forces"))


@pytest.mark.parametrize("modern", [False, True])
def test_as_dpdata_reads_it(modern: bool, tmp_path: Path) -> None:
    dpdata = pytest.importorskip("dpdata")
    path = write_cp2k_output(tmp_path / "cp2k.out", modern=modern)
    theirs = dpdata.LabeledSystem(str(path), fmt="cp2k/output").data
    (frame,) = read_frames(path).frames
    assert frame.energy == pytest.approx(theirs["energies"][0], rel=1e-7)
    np.testing.assert_allclose(frame.forces, theirs["forces"][0], rtol=1e-6)
