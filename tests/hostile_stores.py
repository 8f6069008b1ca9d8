"""HDF5 and LMDB files built to break a reader."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import lmdb
import numpy as np

Write = Callable[[Path], None]


def _lmdb(content: dict[bytes, bytes], spoil: Callable[[bytearray], None] | None = None) -> Write:
    def write(path: Path) -> None:
        with lmdb.open(str(path), subdir=False, map_size=2**26) as environment, environment.begin(write=True) as txn:
            for key, value in content.items():
                txn.put(key, value)
        if spoil is not None:
            bytes_of = bytearray(path.read_bytes())
            spoil(bytes_of)
            path.write_bytes(bytes_of)

    return write


def _rows(text: bytes, count: bytes = b"2") -> dict[bytes, bytes]:
    return {b"nextid": zlib.compress(count), b"1": zlib.compress(text)}


ROW = b'{"numbers": [1], "positions": [[0,0,0]], "cell": [[0,0,0],[0,0,0],[0,0,0]], "pbc": [0,0,0], "energy": -1'


def _pages(byte: bytes) -> Callable[[bytearray], None]:
    """All pages but those of the header overwritten."""

    def spoil(content: bytearray) -> None:
        content[2 * 4096 :] = byte * (len(content) - 2 * 4096)

    return spoil


def _pointers(content: bytearray) -> None:
    """Places of entries in a page that lie outside of it."""
    for page in range(2 * 4096, len(content), 4096):
        content[page + 16 : page + 32] = b"\xf0\xff" * 8


def _root(content: bytearray) -> None:
    """A root far behind the end of the file."""
    for header in (0, 4096):
        content[header + 16 + 24 + 48 + 40 : header + 16 + 24 + 48 + 48] = (10**12).to_bytes(8, "little")


LMDBS: dict[str, Write] = {
    "a pickle": _lmdb({b"0": pickle.dumps(print)}),
    "a pickled index": _lmdb({b"nextid": pickle.dumps(2)}),
    "a billion rows": _lmdb(_rows(ROW + b"}", b"1000000000")),
    "10^400 rows": _lmdb(_rows(ROW + b"}", b"1" + b"0" * 400)),
    "a negative number of rows": _lmdb(_rows(ROW + b"}", b"-5")),
    "rows as a list": _lmdb(_rows(ROW + b"}", b"[1, 2]")),
    "a row of blanks that unpacks": _lmdb(_rows(b" " * 2**29)),
    "an index of blanks that unpacks": _lmdb({b"nextid": zlib.compress(b" " * 2**29)}),
    "a row nested 100000 times": _lmdb(_rows(b"[" * 100_000)),
    "a row of tables": _lmdb(_rows(b"[" + b"{}," * 300_000 + b"{}]")),
    "a row that is a number": _lmdb(_rows(b"3")),
    "a row cut short": _lmdb({b"nextid": zlib.compress(b"2"), b"1": zlib.compress(ROW)[:-9]}),
    "an array of a huge shape": _lmdb(_rows(ROW + b', "forces": {"__ndarray__": [[1000000000000], "float64", []]}}')),
    "an array of objects": _lmdb(_rows(ROW + b', "forces": {"__ndarray__": [[1], "object", [1]]}}')),
    "an unknown class": _lmdb(_rows(ROW + b', "data": {"x": {"__ase_objtype__": "os.system"}}}')),
    "methods as keys": _lmdb(_rows(ROW + b', "toatoms": 1, "__class__": 2}')),
    "an unknown constraint": _lmdb(_rows(ROW + b', "constraints": [{"name": "os.system", "kwargs": {}}]}')),
    "element 10^9": _lmdb(_rows(ROW.replace(b"[1]", b"[1000000000]") + b"}")),
    "deleted rows of nonsense": _lmdb(_rows(ROW + b"}") | {b"deleted_ids": zlib.compress(b'{"a": [1]}')}),
    "an index that is no JSON": _lmdb({b"nextid": zlib.compress(b"{")}),
    "an index nested 100000 times": _lmdb({b"nextid": zlib.compress(b"[" * 100_000)}),
    "an index of a wrong array": _lmdb({b"nextid": zlib.compress(b'{"__ndarray__": [[2], "float64", [1]]}')}),
    "an index of an unknown class": _lmdb({b"nextid": zlib.compress(b'{"__ase_objtype__": "os.system"}')}),
    "deleted rows cut short": _lmdb(_rows(ROW + b"}") | {b"deleted_ids": zlib.compress(b"[1, 2, 3]")[:-7]}),
    "an array of 8 GB without numbers": _lmdb(
        _rows(ROW + b', "forces": {"__ndarray__": [[1000000000], "float64", [1]]}}')
    ),
    "an array of one text of 400 MB": _lmdb(
        _rows(ROW + b', "data": {"a": {"__ndarray__": [[1], "U100000000", [""]]}}}')
    ),
    "an array of one table of 800 MB": _lmdb(
        _rows(ROW + b', "data": {"a": {"__ndarray__": [[1], "(1000,1000,100)f8", [1]]}}}')
    ),
    "pages of ones": _lmdb(_rows(ROW + b"}"), _pages(b"\xff")),
    "pages of zeros": _lmdb(_rows(ROW + b"}"), _pages(b"\0")),
    "entries outside of their page": _lmdb(_rows(ROW + b"}"), _pointers),
    "a root outside of the file": _lmdb(_rows(ROW + b"}"), _root),
    "nonsense": lambda path: path.write_bytes(b"\xde\xc0\xef\xbe" * 4096) and None,
}


def _hdf5(change: Callable[[Any, Any], None]) -> Write:
    """A sound frame, changed by a function of the file and the frame's group."""

    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            group = file.create_group("config_batch_0/config_0")
            group["atomic_numbers"], group["positions"] = [1, 1], [[0.0, 0, 0], [0, 0, 1]]
            group["cell"], group["pbc"] = np.zeros((3, 3)), [False] * 3
            group["properties/energy"], group["properties/forces"] = -1.0, np.zeros((2, 3))
            change(file, group)

    return write


def _replaced(name: str, *shape: int, **options: Any) -> Callable[[Any, Any], None]:
    def change(_: Any, group: Any) -> None:
        del group[name]
        group.create_dataset(name, shape, **options)

    return change


def _linked(name: str, link: Any) -> Callable[[Any, Any], None]:
    def change(_: Any, group: Any) -> None:
        del group[name]
        group[name] = link

    return change


def _circle(file: Any, group: Any) -> None:
    del group["properties"]
    group["properties"] = file["/"]
    file["config_batch_1"] = file["config_batch_0"]
    group["config_0"] = group


def _many_batches(file: Any, group: Any) -> None:
    for index in range(1, 3000):
        file.create_group(f"config_batch_{index}")


def _instead_of_batch(link: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    def change(file: Any, _: Any) -> None:
        file.move("config_batch_0", "other")
        file["config_batch_0"] = link(file)

    return change


def _many_unwritten(file: Any, group: Any) -> None:
    """Frames of 15 MB that take no room."""
    for index in range(1, 400):
        file.copy(group, f"config_batch_0/config_{index}")
        more = file[f"config_batch_0/config_{index}"]
        more.create_dataset("properties/more", (2_000_000,), dtype="f8", chunks=(1000,))


def _one_table_of_many_names(_: Any, group: Any) -> None:
    group["properties/more"] = np.random.default_rng(0).random(2**20)
    for index in range(900):
        group[f"properties/more{index}"] = group["properties/more"]


def _one_frame_of_many_names(file: Any, group: Any) -> None:
    group["properties/more"] = np.random.default_rng(0).random(2**17)
    for index in range(1, 10_000):
        file[f"config_batch_0/config_{index}"] = group


def _truncated(path: Path) -> None:
    _hdf5(lambda *_: None)(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _scrambled(path: Path) -> None:
    _hdf5(lambda *_: None)(path)
    content = bytearray(path.read_bytes())
    content[600::37] = b"\xff" * len(content[600::37])
    path.write_bytes(content)


HDF5S: dict[str, Write] = {
    "10^12 atoms that take no room": _hdf5(_replaced("atomic_numbers", 10**12, dtype="i8", chunks=(1000,))),
    "2^27 atoms of zeros": _hdf5(_replaced("atomic_numbers", 2**26, dtype="i8", chunks=(2**16,), compression="gzip")),
    "200 MB of zeros that take no room": _hdf5(
        _replaced("properties/forces", 2**23, 3, dtype="f8", chunks=(1000, 3), maxshape=(None, 3))
    ),
    "400 frames of zeros that take no room": _hdf5(_many_unwritten),
    "a large table under 900 names": _hdf5(_one_table_of_many_names),
    "a frame under 10000 names": _hdf5(_one_frame_of_many_names),
    "a batch that is a table": _hdf5(_instead_of_batch(lambda _: np.zeros(3))),
    "a batch that is a link": _hdf5(_instead_of_batch(lambda _: h5py.SoftLink("/other"))),
    "positions in another file": _hdf5(_replaced("positions", 2, 3, external=[("/dev/zero", 0, 48)], dtype="f8")),
    "a link to another file": _hdf5(_linked("positions", h5py.ExternalLink("/dev/zero", "/a"))),
    "a link to itself": _hdf5(_linked("positions", h5py.SoftLink("/config_batch_0/config_0/positions"))),
    "groups in a circle": _hdf5(_circle),
    "three thousand empty batches": _hdf5(_many_batches),
    "positions of objects": _hdf5(_replaced("positions", 2, 3, dtype=h5py.ref_dtype)),
    "texts as positions": _hdf5(_replaced("positions", 2, 3, dtype=h5py.string_dtype())),
    "ragged positions": _hdf5(_replaced("positions", 2, dtype=h5py.vlen_dtype("f8"))),
    "positions of nothing": _hdf5(_linked("positions", h5py.Empty("f8"))),
    "an energy as a table": _hdf5(_linked("properties/energy", np.zeros((100, 100)))),
    "forces of other atoms": _hdf5(_linked("properties/forces", np.zeros((5, 3)))),
    "element -1": _hdf5(_linked("atomic_numbers", [1, -1])),
    "elements as fractions": _hdf5(_linked("atomic_numbers", [1.5, 2.5])),
    "a cell of seven numbers": _hdf5(_linked("cell", np.zeros(7))),
    "a file of half its length": _truncated,
    "bytes of nonsense within": _scrambled,
    "nothing but a signature": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 4096) and None,
}
