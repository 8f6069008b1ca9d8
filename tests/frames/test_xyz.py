"""Extended XYZ in any encoding, with any line ends, under any name, and with other names of atoms than symbols."""

from __future__ import annotations

import bz2
import codecs
import gzip
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forcetune.errors import ForcetuneWarning, InputError
from forcetune.frames.elements import parse_element
from forcetune.frames.frame import LabelKeys
from forcetune.frames.read import read_frames
from forcetune.frames.sources import file_format
from forcetune.frames.store.streaming import stream_frames
from frames.formats import assert_same
from structures import labelled, text_frame, write

# ---- encodings and line ends ------------------------------------------------------------------------------

ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "byte order mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "UTF-16 of Windows": lambda text: text.encode("utf-16"),
    "UTF-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "UTF-16 without mark": lambda text: text.encode("utf-16-le"),
    "UTF-16 without mark, big end first": lambda text: text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "Windows' line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "old Mac line ends": lambda text: text.replace("\n", "\r").encode(),
    "UTF-16 with Windows' line ends": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "accents in Latin-1": lambda text: text.replace("pbc=", "by=Ångström pbc=").encode("latin-1"),
    "accents in UTF-8": lambda text: text.replace("pbc=", "by=Ångström pbc=").encode(),
    "marks of files put together": lambda text: b"".join(
        codecs.BOM_UTF8 + part.encode() for part in (text[: len(text) // 2], text[len(text) // 2 :])
    ),
}


@pytest.mark.parametrize("ending", ["a.xyz", "a.dat", "a.xyz.gz", "a.xyz.bz2", "a.zip"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings(name: str, ending: str, tmp_path: Path) -> None:
    text = write(tmp_path / "plain.xyz", labelled(1)).read_text()
    content = ENCODINGS[name](text + text)
    path = tmp_path / ending
    if ending == "a.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inside.xyz", content)
    else:
        path.write_bytes(
            gzip.compress(content) if "gz" in ending else bz2.compress(content) if "bz2" in ending else content
        )
    (right,) = read_frames(tmp_path / "plain.xyz", require=("energy", "forces")).frames
    result = read_frames(path, require=("energy", "forces"))
    assert len(result) == 2
    for frame in result.frames:
        assert_same(frame, right)


@pytest.mark.parametrize("name", ["bom.xyz", "utf16.xyz", "extxyz.dat"])
def test_reported_cases(name: str, case_files: Path) -> None:
    result = read_frames(case_files / name, require=("energy", "forces"))
    assert len(result) == 16 and result.frames[0].energy == -309.59740773854276


# ---- by content -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["frames", "a.dat", "a.txt", "a.out", "a.extxyz", "a.extxyz.gz", "POSCAR", "a.cif"])
def test_extended_xyz_under_other_names(name: str, tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.xyz", labelled(0), labelled(1))
    path = tmp_path / name
    path.write_bytes(gzip.compress(plain.read_bytes()) if name.endswith("gz") else plain.read_bytes())
    assert file_format(path) == "extxyz"
    result = read_frames(path, require=("energy", "forces"))
    assert [frame.energy for frame in result.frames] == [-14, -15]


def test_plain_xyz_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "water"
    path.write_text("2\nenergy=-1\nO 0.0 .5 -1e-3\nH 0 0 1\n")
    assert read_frames(path).frames[0].energy == -1


@pytest.mark.parametrize("text", ["5\nThis text\nis no XYZ file\n", "2\n\nO one two three\n", "12 frames\nO 0 0 0\n"])
def test_what_only_begins_alike(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.dat"):
        read_frames(path)


# ---- names of atoms ---------------------------------------------------------------------------------------

NAMES = {
    "D": ("H", r"atoms named 'D' are read as H: the potential energy is the same for all isotopes"),
    "T": ("H", r"'T' are read as H"),
    "C1": ("C", r"'C1' are read as C, the element before the label"),
    "H_2": ("H", "'H_2'"),
    "Fe2+": ("Fe", r"'Fe2\+' are read as Fe"),
    "O1-": ("O", "'O1-'"),
    "CL3": ("Cl", "'CL3' are read as Cl"),
    "D12": ("H", "'D12' are read as H"),
    "26": ("Fe", "'26' are read as Fe, the element of this atomic number"),
    "CA": ("Ca", "'CA' are read as the element Ca; where this is a label of C, write 'C'"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_symbols(name: str, tmp_path: Path) -> None:
    symbol, said = NAMES[name]
    path = tmp_path / "a.xyz"
    path.write_text(2 * text_frame("energy=-1", f"O 0 0 0 1 2 3\n  {name}   0 0 1 4 5 6\n"))
    with pytest.warns(ForcetuneWarning, match=rf"a\.xyz: .*{said}") as warned:
        result = read_frames(path, require=("energy", "forces"))
    assert len(warned) == 1
    path.write_text(2 * text_frame("energy=-1", f"O 0 0 0 1 2 3\n{symbol} 0 0 1 4 5 6\n"))
    for one, other in zip(result.frames, read_frames(path).frames, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("name", ["CL", "fe", "Na", "SI"])
def test_capitals_are_symbols(name: str) -> None:
    assert parse_element(name) == (name.capitalize(), None)


@pytest.mark.parametrize(("name", "hint"), [("HW", "H"), ("OW", "O"), ("CT1", "C"), ("CA1", "Ca"), ("Qq", None)])
def test_names_of_no_element(name: str, hint: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame("energy=-1") + text_frame("energy=-1", f"O 0 0 0 1 2 3\n{name} 0 0 1 4 5 6\n"))
    with pytest.raises(
        InputError, match=rf"a\.xyz, frame 1: atom 1 has the name '{name}', which is no element"
    ) as warned:
        read_frames(path)
    assert (f"such as '{hint}'" in str(warned.value)) == (hint is not None)


def test_names_in_another_column(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(
        '2\nProperties=pos:R:3:species:S:1:tag:S:1 energy=-1 Lattice="5 0 0 0 5 0 0 0 5"\n0 0 0 O C9\n0 0 1 D D\n'
    )
    with pytest.warns(ForcetuneWarning, match="named 'D'"):
        (frame,) = read_frames(path).frames
    assert frame.numbers.tolist() == [8, 1]
    path.write_text("2\nProperties=Z:I:1:pos:R:3 energy=-1\n8 0 0 0\n1 0 0 1\n")
    assert read_frames(path).frames[0].numbers.tolist() == [8, 1]


def test_streamed_frames_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    text = 300 * text_frame("energy=-1", "O 0 0 0 1 2 3\nD 0 0 1 4 5 6\n")
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-16"))
    asked = LabelKeys("auto", "auto", "auto", "none", "none")
    for _ in range(2):  # a store that is there tells the same
        with pytest.warns(ForcetuneWarning, match="named 'D' are read as H") as warned:
            stored = stream_frames([str(path)], asked, ("energy",), "data", folder=tmp_path / "store", workers=0)
        assert sum(issubclass(one.category, ForcetuneWarning) for one in warned) == 1
    with pytest.warns(ForcetuneWarning):
        ours = read_frames(path)
    for one, other in zip(stored.frames, ours.frames, strict=True):
        assert_same(one, other)


def test_the_reported_case(case_files: Path) -> None:
    with pytest.warns(ForcetuneWarning, match=r"deuterium\.xyz: atoms named 'D' are read as H"):
        result = read_frames(case_files / "deuterium.xyz", require=("energy", "forces"))
    right = read_frames(case_files / "extxyz.dat")
    for one, other in zip(result.frames, right.frames, strict=True):
        np.testing.assert_array_equal(one.numbers, other.numbers)
