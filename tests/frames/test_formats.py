"""HDF5 and LMDB: their layouts, and what is refused in them."""

from __future__ import annotations

import pickle
import zlib
from pathlib import Path
from typing import Any

import ase.db
import h5py
import lmdb
import numpy as np
import pytest
from ase.io.jsonio import encode

from forcetune.errors import InputError
from forcetune.frames.read import read_frames
from forcetune.frames.store.aselmdb import _decode, row_ids
from forcetune.frames.store.hdf5 import frame_groups, read_groups
from frames.formats import assert_same, write_database, write_hdf5
from hostile_stores import HDF5S, LMDBS
from systems import labelled


def test_hdf5_as_mace_writes_it(tmp_path: Path) -> None:
    frames = labelled(120)
    path = write_hdf5(tmp_path / "a.h5", frames, stress=np.arange(6.0), dipole="None")
    result = read_frames(path, require=("energy", "forces", "stress"))
    assert result.keys[:3] == ("energy", "forces", "stress")
    assert [frame.energy for frame in result.frames] == [atoms.info["REF_energy"] for atoms in frames]
    assert all(np.array_equal(f.positions, a.positions) for f, a in zip(result.frames, frames, strict=True))
    assert result.frames[0].stress is not None and result.frames[0].stress[1, 2] == 3.0
    with h5py.File(path, "r+") as file:
        file["config_batch_2/config_19/property_weights/forces"][...] = 0.0  # pyright: ignore[reportIndexIssue]
    with pytest.raises(InputError, match=r"a\.h5, frame 119 has no forces under 'forces' \(1 of 120"):
        read_frames(path, require=("energy", "forces"))


def spoilt(path: Path, change: Any) -> Path:
    write_hdf5(path, labelled(3))
    with h5py.File(path, "r+") as file:
        change(file, file["config_batch_0/config_1"])
    return path


def _external(file: Any, group: Any) -> None:
    del group["positions"]
    group["positions"] = h5py.ExternalLink("/etc/passwd", "/positions")


def _soft(file: Any, group: Any) -> None:
    del group["cell"]
    group["cell"] = h5py.SoftLink("/config_batch_0/config_0/cell")


def _elsewhere(file: Any, group: Any) -> None:
    del group["positions"]
    group.create_dataset("positions", (6, 3), "f8", external=[("/dev/zero", 0, h5py.h5f.UNLIMITED)])


def _virtual(file: Any, group: Any) -> None:
    del group["positions"]
    layout = h5py.VirtualLayout((6, 3), "f8")
    layout[:] = h5py.VirtualSource("/other.h5", "x", (6, 3))
    group.create_virtual_dataset("positions", layout)


def _huge(file: Any, group: Any) -> None:
    del group["positions"]
    group.create_dataset("positions", (10**12, 3), "f8", chunks=(1000, 3))


def _missing(file: Any, group: Any) -> None:
    del group["atomic_numbers"]


def _text(file: Any, group: Any) -> None:
    del group["positions"]
    group["positions"] = "here"


def _compound(file: Any, group: Any) -> None:
    del group["properties/energy"]
    group["properties/energy"] = np.zeros(1, dtype=[("a", "f8")])


REFUSED = {
    "'positions' is a link": _external,
    "'cell' is a link, which may lead out of the file": _soft,
    "lies in another file": _elsewhere,
    "'positions' lies in another file": _virtual,
    "larger than a frame can be": _huge,
    "'atomic_numbers' is missing": _missing,
    "'positions' is missing": _text,
    "neither numbers nor a text": _compound,
}


@pytest.mark.parametrize("message", REFUSED)
def test_hdf5_that_is_refused(tmp_path: Path, message: str) -> None:
    with pytest.raises(InputError, match=r"a\.h5, frame 1: cannot be read") as refused:
        read_frames(spoilt(tmp_path / "a.h5", REFUSED[message]))
    assert message in str(refused.value)


def test_hdf5_of_another_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["coordinates"] = np.zeros((3, 3))
    with pytest.raises(InputError, match=r"no groups config_batch_0.*it has 'coordinates'"):
        read_frames(path)
    path.write_bytes(b"\x89HDF\r\n\x1a\nnonsense")
    with pytest.raises(InputError, match="no HDF5 file, or a damaged one"):
        read_frames(path)


def test_aselmdb_is_read_as_any_database(tmp_path: Path) -> None:
    frames = labelled(20)
    written = [write_database(tmp_path / name, frames) for name in ("a.db", "a.aselmdb")]
    (tmp_path / "a.aselmdb-lock").unlink()
    ones, others = (read_frames(path, require=("energy", "forces")) for path in written)
    assert ones.keys[:3] == others.keys[:3] == ("calculator", "calculator", None)
    for one, other in zip(ones.frames, others.frames, strict=True):
        assert_same(one, other)
    assert not (tmp_path / "a.aselmdb-lock").exists()
    with ase.db.connect(tmp_path / "a.aselmdb") as database:
        database.delete([1, 7])
    result = read_frames(tmp_path / "a.aselmdb")
    assert [frame.energy for frame in result.frames] == [
        atoms.info["REF_energy"] for index, atoms in enumerate(frames) if index not in (0, 6)
    ]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was-run"),)


def database_of(path: Path, content: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(path), subdir=False, map_size=2**24) as environment, environment.begin(write=True) as written:
        for key, value in content.items():
            written.put(key, value)
    return path


def test_pickled_databases_are_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(Bomb())
    for name, content in (
        ("a.lmdb", {b"0": pickled, b"length": pickle.dumps(1)}),
        ("b.aselmdb", {b"1": pickled, b"nextid": zlib.compress(b"2")}),
        ("c.lmdb", {b"1": zlib.compress(b"{}"), b"nextid": pickled}),
    ):
        with pytest.raises(InputError, match="pickled objects, which can run code"):
            read_frames(database_of(tmp_path / name, content))
    assert not Path("was-run").exists()


ROW = {"numbers": [1], "positions": [[0, 0, 0]], "cell": [[0] * 3] * 3, "pbc": [False] * 3, "ctime": 0, "mtime": 0}
CONTENTS = {
    "no rows of an ASE database": {b"a": b"b"},
    "announces 999,999,999,999 rows but holds": {b"nextid": zlib.compress(str(10**12).encode()), b"1": b"x"},
    "its table of rows is damaged": {b"nextid": zlib.compress(b'"many"')},
    "frame 0: cannot be read (row 1 is missing)": {b"nextid": zlib.compress(b"2"), b"2": b"x"},
    "a row is damaged": {b"nextid": zlib.compress(b"2"), b"1": b"nonsense"},
    "unpacks to more than": {b"nextid": zlib.compress(b"2"), b"1": zlib.compress(b" " * 2**27)},
    "holds no frames": {b"nextid": zlib.compress(b"1")},
    "cannot be read": {b"nextid": zlib.compress(b"2"), b"1": zlib.compress(encode(ROW | {"toatoms": 3}).encode())},
}


@pytest.mark.parametrize("message", CONTENTS)
def test_damaged_databases_are_refused(tmp_path: Path, message: str) -> None:
    with pytest.raises(InputError) as refused:
        read_frames(database_of(tmp_path / "a.aselmdb", CONTENTS[message]))
    assert message in str(refused.value)


def test_a_file_that_kills_its_reader_is_refused(tmp_path: Path) -> None:
    """LMDB follows page numbers of the file wherever they lead."""
    path = write_database(tmp_path / "a.aselmdb", labelled(200))
    content = bytearray(path.read_bytes())
    for start in range(2 * 4096, len(content), 4096):
        content[start + 16 : start + 4096] = b"\xff" * 4080
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.aselmdb"):
        read_frames(path)
    path.write_bytes(b"LMDB" * 3000)
    with pytest.raises(InputError, match="no LMDB database"):
        read_frames(path)


DAMAGED_INDEXES = {
    **{("a.h5", name): HDF5S[name] for name in ("a batch that is a table", "a batch that is a link")},
    **{("a.aselmdb", name): write for name, write in LMDBS.items() if name.startswith("an index")},
    ("a.aselmdb", "deleted rows cut short"): LMDBS["deleted rows cut short"],
}


@pytest.mark.parametrize("case", DAMAGED_INDEXES, ids=str)
def test_damaged_indexes_are_told_by_their_file(tmp_path: Path, case: tuple[str, str]) -> None:
    """Whatever a library raises, it is the file that is wrong and not the program."""
    DAMAGED_INDEXES[case](tmp_path / case[0])
    with pytest.raises(InputError, match=case[0]):
        (frame_groups if case[0] == "a.h5" else row_ids)(tmp_path / case[0])


def test_tables_out_of_proportion_to_the_file_are_refused(tmp_path: Path) -> None:
    for name in ("200 MB of zeros that take no room", "400 frames of zeros that take no room"):
        HDF5S[name](path := tmp_path / "a.h5")
        ((batch, names),) = frame_groups(path)
        with pytest.raises(InputError, match=r"a\.h5, frame \d: .* out of proportion to the file"):
            list(read_groups(path, batch, names.tolist(), 0))
    zeros = np.zeros((1000, 3))
    path = write_hdf5(tmp_path / "b.h5", labelled(3), more=zeros)
    with h5py.File(path, "r+") as file:
        for index in range(3):
            place = f"config_batch_0/config_{index}/properties/more"
            del file[place]
            file.create_dataset(place, data=zeros, chunks=True, compression="gzip")
    assert len(read_frames(path).frames) == 3


def test_frames_that_fill_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forcetune.frames.store.chunks._LEAST_UNPACKED", 2**20)
    HDF5S["a frame under 10000 names"](path := tmp_path / "a.h5")
    assert path.stat().st_size < 2**22
    with pytest.raises(InputError, match=r"out of proportion|unpack to more than"):
        read_frames(path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 3)),
        np.arange(6).reshape(2, 3),
        np.ones(2) * 1j,
        np.array(["H", "He"]),
        np.array(3.0),
        np.ones(2, bool),
    ],
)
def test_arrays_of_rows_are_those_that_ase_wrote(array: np.ndarray) -> None:
    decoded = _decode(encode({"a": array}))["a"]
    assert decoded.dtype == array.dtype and np.array_equal(decoded, array)
