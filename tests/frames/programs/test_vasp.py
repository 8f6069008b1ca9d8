"""OUTCAR and vasprun.xml: free energy, signs, steps that did not converge."""

from __future__ import annotations

import gzip
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms

from forcetune.errors import ForcetuneNote, ForcetuneWarning, InputError
from forcetune.frames.frame import LabelKeys
from forcetune.frames.read import read_frames
from forcetune.frames.sources import file_format
from frames.outputs import labels, salt, write_outcar, write_vasprun

KILOBAR = 0.1 / 160.21766208
"""In eV/Å³."""
WRITERS = {"OUTCAR": write_outcar, "vasprun.xml": write_vasprun}


@pytest.mark.parametrize("name", WRITERS)
def test_numbers(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, [True, True])
    with pytest.warns(ForcetuneNote, match="free energy.*kbar of pressure"):
        result = read_frames(path, require=("energy", "forces", "stress"))
    assert result.keys == LabelKeys("energy", "forces", "stress")
    for step, frame in enumerate(result.frames):
        energy, forces, stress = labels(step)
        assert frame.energy == pytest.approx(energy, abs=1e-8)
        np.testing.assert_allclose(frame.forces, forces, rtol=0, atol=1e-8)
        np.testing.assert_allclose(frame.stress, -KILOBAR * stress, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(frame.positions, salt(step).positions, rtol=0, atol=1e-8)
        np.testing.assert_array_equal(frame.numbers, [11, 11, 17, 17])
        assert frame.pbc.all() and frame.origin.index == step


@pytest.mark.parametrize("name", WRITERS)
def test_as_ase_reads_it(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, [True])
    atoms = ase.io.read(path)
    assert isinstance(atoms, Atoms)
    (frame,) = read_frames(path).frames
    assert frame.energy == atoms.get_potential_energy(force_consistent=True)
    assert frame.energy == pytest.approx(atoms.get_potential_energy() - 0.25)
    np.testing.assert_array_equal(frame.forces, atoms.get_forces())
    np.testing.assert_allclose(frame.stress, atoms.get_stress(voigt=False), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", WRITERS)
def test_steps_that_did_not_converge_are_left_out(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, [True, False, True, False])
    with pytest.warns(ForcetuneWarning, match=r"did not converge to EDIFF in 2 of 4 steps \(1, 3, counted from 0\)"):
        result = read_frames(path)
    assert [frame.energy for frame in result.frames] == pytest.approx([labels(0)[0], labels(2)[0]])
    alone = WRITERS[name](tmp_path / f"bad-{name}", [False])
    with pytest.raises(InputError, match=rf"bad-{name}: the electronic loop did not converge.*its only step.*NELM"):
        read_frames(alone)


def test_by_content_and_compressed(tmp_path: Path) -> None:
    """What matters is what stands in a file and not what it is called."""
    outcar, run = write_outcar(tmp_path / "OUTCAR", [True]), write_vasprun(tmp_path / "vasprun.xml", [True])
    for name, source, kind in (("slab.out", outcar, "vasp-outcar"), ("relax", run, "vasp-xml")):
        copy = tmp_path / name
        copy.write_bytes(source.read_bytes())
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(source.read_bytes()))
        assert file_format(copy) == file_format(packed) == kind
        frames = [read_frames(path).frames[0] for path in (copy, packed)]
        assert frames[0].energy == frames[1].energy == pytest.approx(labels()[0])


def test_a_job_that_still_runs(tmp_path: Path) -> None:
    path = write_vasprun(tmp_path / "vasprun.xml", [True, True])
    text = path.read_text()
    path.write_text(text[: text.rindex("<calculation>") + 300])
    assert len(read_frames(path).frames) == 1


def test_published_outcars(reference_data: Path) -> None:
    """HfO2 with SCAN, from SevenNet's examples."""
    paths = sorted((reference_data / "formats" / "outcar_hfo2_scan").glob("*/OUTCAR*"))
    assert len(paths) == 10
    result = read_frames(paths, require=("energy", "forces", "stress"))
    for path, frame in zip(paths, result.frames, strict=True):
        atoms = ase.io.read(path)
        assert isinstance(atoms, Atoms)
        assert frame.energy == atoms.get_potential_energy(force_consistent=True)
        np.testing.assert_array_equal(frame.forces, atoms.get_forces())
        np.testing.assert_allclose(frame.stress, atoms.get_stress(voigt=False), rtol=0, atol=1e-15)
    assert result.frames[0].energy == pytest.approx(-2759.11555469)


def test_as_dpdata_reads_it(reference_data: Path) -> None:
    dpdata = pytest.importorskip("dpdata")
    for path in sorted((reference_data / "formats" / "outcar_hfo2_scan" / "label_2").iterdir()):
        theirs = dpdata.LabeledSystem(str(path), fmt="vasp/outcar").data
        (frame,) = read_frames(path).frames
        assert frame.energy == theirs["energies"][0]
        # dpdata turns the cell
        assert frame.forces is not None and frame.stress is not None
        sizes = np.linalg.norm(theirs["forces"][0], axis=1)
        np.testing.assert_allclose(np.linalg.norm(frame.forces, axis=1), sizes, rtol=0, atol=1e-9)
        stress = -theirs["virials"][0] / abs(np.linalg.det(frame.cell))
        np.testing.assert_allclose(np.linalg.eigvalsh(frame.stress), np.linalg.eigvalsh(stress), rtol=1e-4)
