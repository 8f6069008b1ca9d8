"""From files and patterns to structures; every failure names the file and the frame."""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms

from forcetune.errors import ForcetuneWarning, InputError
from forcetune.frames.frame import LabelKeys
from forcetune.frames.read import describe_keys, read_frames
from structures import calculated, labelled, text_frame, water, write


def test_trajectory(tmp_path: Path) -> None:
    path = tmp_path / "a.traj"
    ase.io.write(path, [calculated(i) for i in range(3)])
    result = read_frames(path, require=("energy", "forces"))
    assert result.keys == LabelKeys("calculator", "calculator", None)
    assert [frame.energy for frame in result.frames] == [-14, -15, -16]
    assert describe_keys(result) == "energy from the calculator, forces from the calculator, no stress"


def test_database_with_results(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    ase.io.write(path, [calculated(i) for i in range(3)])
    result = read_frames(path, require=("energy", "forces"))
    assert result.keys == LabelKeys("calculator", "calculator", None)
    assert [frame.energy for frame in result.frames] == [-14, -15, -16]
    assert [frame.origin.index for frame in result.frames] == [0, 1, 2]


def test_database_with_labels_in_key_value_pairs_and_data(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    forces = np.random.default_rng(0).standard_normal((3, 3))
    with ase.db.connect(path) as database:
        database.write(water(), key_value_pairs={"REF_energy": -3.5}, data={"REF_forces": forces})
    result = read_frames(path, require=("energy", "forces"))
    assert result.keys == LabelKeys("REF_energy", "REF_forces", None)
    assert result.frames[0].energy == -3.5
    assert result.frames[0].forces is not None
    np.testing.assert_array_equal(result.frames[0].forces, forces)


def test_compressed_files(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.xyz", labelled(0), labelled(1))
    packed = tmp_path / "b.xyz.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert len(read_frames(packed)) == 2
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"b\.xyz\.gz"):
        read_frames(packed)


def _archive(**members: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(f"{name}.xyz", text)
    return content.getvalue()


WATER = "3\nenergy=-1\nO 0 0 0\nH 0 0 1\nH 0 1 0\n"
ARCHIVES = {
    "frame 3: the file ends after 2 of the frame's 3 atoms": _archive(a=2 * WATER, b=WATER + WATER[:-8]),
    "frame 1: line 6": _archive(a=WATER, b="one\n"),
    "no .xyz or .extxyz files": _archive(),
    "unpack it": b"PK nonsense",
    "bytes unpack to more than": _archive(a=WATER + " " * 2**29),
    "copy it again": _archive(a=WATER).replace(b"a.xyz", b"b.xyz", 1),
}


@pytest.mark.parametrize("message", ARCHIVES)
def test_archives_that_are_refused(tmp_path: Path, message: str) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(ARCHIVES[message])
    with pytest.raises(InputError, match=r"a\.zip") as refused:
        read_frames(path)
    assert message in str(refused.value)


def test_plain_xyz_has_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text("2\nwater, sort of\nO 0 0 0\nH 0 0 1\n")
    with pytest.raises(InputError, match="no energy found"):
        read_frames(path)


def test_several_files_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (10, 2, 1):
        write(tmp_path / "runs" / str(number) / "out.xyz", labelled(number))
    single = write(tmp_path / "single.xyz", labelled(3))
    result = read_frames([single, f"{tmp_path}/runs/*/out.xyz"])
    assert [frame.energy for frame in result.frames] == [-17, -15, -24, -16]  # as named, matches sorted by name
    monkeypatch.chdir(tmp_path)
    assert [frame.energy for frame in read_frames("runs/[12]/out.xyz").frames] == [-15, -16]
    assert len(read_frames("**/*.xyz")) == 4


def test_a_pattern_without_matches(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file matches this pattern"):
        read_frames(f"{tmp_path}/*.xyz")


def test_a_file_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    path = write(tmp_path / "water[1].xyz", labelled())
    assert len(read_frames(path)) == 1


def test_an_at_sign_in_a_name_is_no_index(tmp_path: Path) -> None:
    path = write(tmp_path / "water@300K.xyz", labelled(0), labelled(1))
    assert len(read_frames(path)) == 2


def test_a_file_named_twice_is_used_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", labelled())
    with pytest.warns(ForcetuneWarning, match="named more than once"):
        assert len(read_frames([path, tmp_path / "." / "a.xyz"])) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "a folder, not a file"),
        (lambda path: path.write_text(""), "the file is empty"),
        (lambda path: path.write_text("\n\n"), r"holds no frames|should be a number of atoms"),
        (lambda path: path.write_text("not at all\nan xyz file\n"), "should be a number of atoms"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00" * 30), "cannot be read|should be a number"),
    ],
)
def test_files_that_cannot_be_used(make: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    assert callable(make)
    make(path)
    with pytest.raises(InputError, match=said) as caught:
        read_frames(path)
    assert str(path) in str(caught.value)


def test_an_unknown_format(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("nothing of the kind\n")
    with pytest.raises(InputError, match="not a format that ASE can read"):
        read_frames(path)


def test_nothing_named() -> None:
    with pytest.raises(InputError, match="No data file was named"):
        read_frames([])


@pytest.mark.parametrize("lines", [3, 2, 1])
def test_a_truncated_file_names_the_frame(lines: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", *(labelled(i) for i in range(3)))
    lines_left = path.read_text().splitlines(keepends=True)[: 2 * 5 + lines]
    path.write_text("".join(lines_left))
    with pytest.raises(InputError) as caught:
        read_frames(path)
    assert f"{path}, frame 2: the file ends after {max(0, lines - 2)} of the frame's 3 atoms" in str(caught.value)


def test_a_row_that_is_cut_short_names_the_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", *(labelled(i) for i in range(3)))
    text = path.read_text()
    path.write_text(text[: text.rindex("H") + 20])
    with pytest.raises(InputError, match="frame 2: cannot be read"):
        read_frames(path)


def test_a_wrong_number_of_atoms_names_the_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", *(labelled(i) for i in range(3)))
    lines = path.read_text().splitlines(keepends=True)
    lines[5] = "2\n"
    path.write_text("".join(lines))
    with pytest.raises(InputError, match="frame 2: line 10 should be a number of atoms"):
        read_frames(path)


def test_a_blank_line_between_frames_would_hide_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", labelled(0), labelled(1))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:5], "\n", *lines[5:]]))
    with pytest.raises(InputError, match="frame 1: line 6 is blank where a number of atoms is expected"):
        read_frames(path)
    path.write_text("".join([*lines, "\n", "\n"]))
    assert len(read_frames(path)) == 2


def test_an_unknown_element_names_the_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame("energy=-1") + text_frame("energy=-1", "Qq 0 0 0 1 2 3\nH 0 0 1 4 5 6\n"))
    with pytest.raises(InputError, match=r"frame 1: .*'Qq'"):
        read_frames(path)


def test_a_frame_without_atoms_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.traj"
    ase.io.write(path, [calculated(), Atoms()])
    with pytest.raises(InputError, match="frame 1: has no atoms"):
        read_frames(path)


def test_the_hash_is_that_of_the_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.xyz", labelled(0)), write(tmp_path / "b.xyz", labelled(1))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
    assert read_frames([first, second]).sha256 == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert read_frames([second, first]).sha256 != read_frames([first, second]).sha256
