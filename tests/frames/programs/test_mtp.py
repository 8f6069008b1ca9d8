"""MTP's .cfg: numbers, elements by option, files that are cut short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forcetune.errors import InputError
from forcetune.frames.read import read_frames
from frames.outputs import labels, salt
from terminal import Command


def configuration(seed: int = 0, *, direct: bool = False, vectors: int = 3) -> str:
    """Salt as MLIP writes it, its stress standing for PlusStress in eV."""
    atoms, (energy, forces, virial) = salt(seed), labels(seed)
    places = atoms.get_scaled_positions() if direct else atoms.positions
    kind = "direct" if direct else "cartes"
    lines = ["BEGIN_CFG", " Size", "    4", *([" Supercell"] if vectors else [])]
    lines += ["    " + "  ".join(f"{value:.10f}" for value in row) for row in atoms.cell.array[:vectors]]
    lines += [f" AtomData:  id type {kind:>12}_x {kind:>12}_y {kind:>12}_z           fx          fy          fz"]
    lines += [
        f"    {k}    {number}  " + "  ".join(f"{value:.12f}" for value in (*place, *force))
        for k, (number, place, force) in enumerate(zip((0, 0, 1, 1), places, forces, strict=True), 1)
    ]
    six = [virial[k] for k in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))]
    lines += [
        " Energy",
        f"    {energy:.12f}",
        " PlusStress:  xx          yy          zz          yz          xz          xy",
    ]
    lines += ["    " + "  ".join(f"{value:.10f}" for value in six), " Feature   EFS_by       VASP", "END_CFG", ""]
    return "\n".join(lines) + "\n"


def test_numbers(tmp_path: Path) -> None:
    path = tmp_path / "train.cfg"
    path.write_text(configuration(0) + configuration(1, direct=True))
    result = read_frames(path, require=("energy", "forces", "stress"), type_map=["Na", "Cl"])
    for index, frame in enumerate(result.frames):
        energy, forces, virial = labels(index)
        assert frame.energy == pytest.approx(energy, abs=1e-10) and frame.pbc.all()
        np.testing.assert_array_equal(frame.numbers, [11, 11, 17, 17])
        np.testing.assert_allclose(frame.positions, salt(index).positions, rtol=0, atol=1e-9)
        np.testing.assert_allclose(frame.forces, forces, rtol=0, atol=1e-10)
        np.testing.assert_allclose(frame.stress, -virial / salt().get_volume(), rtol=1e-8)


@pytest.mark.parametrize("vectors", [0, 1, 2])
def test_molecules_wires_and_slabs(vectors: int, tmp_path: Path) -> None:
    path = tmp_path / "a.cfg"
    path.write_text(configuration(vectors=vectors))
    (frame,) = read_frames(path, type_map=["Na", "Cl"]).frames
    assert frame.pbc.tolist() == [axis < vectors for axis in range(3)]
    assert frame.stress is None


def test_by_content(tmp_path: Path) -> None:
    path = tmp_path / "selected.txt"
    path.write_text("\n" + configuration())
    assert len(read_frames(path, type_map=["Na", "Cl"])) == 1


REFUSED = {
    r"a\.cfg: MTP's \.cfg numbers the types of its atoms, here 0 to 1, and none of them has a name.*--type-map": (
        configuration()
    ),
    r"a\.cfg, frame 1: the MTP configuration begins but does not end \(no END_CFG\)": (
        configuration() + configuration()[:300]
    ),
    r"a\.cfg, frame 0: the MTP configuration begins": "BEGIN_CFG\n Size\n 1\n",
    r"a\.cfg, frame 0: its MTP configuration is damaged \(it has 4 atoms and announces 5\)": (
        configuration().replace("    4\n", "    5\n", 1)
    ),
    "is damaged.*type and cartes_x are needed": configuration().replace("type", "kind"),
    "could not convert string to float": configuration().replace("0.", "zero", 1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.cfg"
    path.write_text(REFUSED[message])
    names = [] if "none of them" in message else ["Na", "Cl"]
    with pytest.raises(InputError, match=message):
        read_frames(path, type_map=names)


def test_names_at_the_command_line(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "a.cfg"
    path.write_text(configuration())
    assert command("evaluate", "mini", path, "--type-map", "F,Cl", "--json")[0] == 0
    code, _, said = command("evaluate", "mini", path)
    assert code == 2 and "--type-map" in said and "Traceback" not in said
    settings = ("--set", "data.type_map=F,Cl", "--set", "data.doctor=off", "--method", "readout", "--epochs", 1)
    path.write_text(configuration(0) + configuration(1) + configuration(2))
    code, _, said = command("fit", path, "--model", "mini", *settings, "--out", tmp_path / "run")
    assert code == 0, said


def test_the_reported_case(case_files: Path) -> None:
    with pytest.raises(InputError, match=r"mtp\.cfg, frame 0: the MTP configuration begins but does not end"):
        read_frames(case_files / "mtp.cfg")
