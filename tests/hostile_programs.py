"""Files in formats of other programs, built to break their readers: each by name, with its file's name and content."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np

STRUCTURE = '[{"structure": {"lattice": '
LAUGHS = '<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, 10))


def _announced(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    """An ``.npy`` file of this shape with nothing in it."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _saved(array: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array), allow_pickle=True)
    return stream.getvalue()


def _archive(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


Z = _saved([1, 1])
PROGRAMS: dict[str, tuple[str, bytes]] = {
    "an archive that unpacks to half a gigabyte": ("a.npz", _archive(z=Z, R=_announced((1, 2, 3)) + bytes(2**29))),
    "an archive of 10^12 frames": ("a.npz", _archive(z=Z, R=_announced((10**12, 2, 3)))),
    "an archive of -1 frames": ("a.npz", _archive(z=Z, R=_announced((-1, 2, 3)))),
    "an archive of objects": ("a.npz", _archive(z=Z, R=_saved(np.array([{}, None], dtype=object)))),
    "an archive without numbers": ("a.npz", _archive(z=_saved(["a", "b"]), R=_saved(np.zeros((1, 2, 3))))),
    "an archive of nothing": ("a.npz", b"PK\x05\x06" + bytes(18)),
    "a pickle among arrays": ("a.npz", _archive(z=Z, R=pickle.dumps([1, 2]))),
    "JSON nested 10^5 times": ("a.json", (STRUCTURE + "[" * 10**5).encode()),
    "JSON of a number of 10^5 digits": ("a.json", (STRUCTURE + "9" * 10**5 + "}}]").encode()),
    "JSON of another layout": ("a.json", b'[{"structure": {"lattice": {"matrix": 3}}, "outputs": []}]'),
    "FitSNAP's JSON nested 10^5 times": ("a.json", b'{"Dataset": ' + b'{"a":' * 10**5),
    "FitSNAP's JSON behind blank lines": ("a.json", b"\n" * 10**6 + b'{"Dataset": {}}'),
    "FitSNAP's JSON without data": ("a.json", b'{"Dataset": {"Data": 3}}'),
    "a configuration of 10^18 atoms": ("a.cfg", b"BEGIN_CFG\nSize\n1000000000000000000\nEND_CFG\n"),
    "a configuration of type 10^18": (
        "a.cfg",
        b"BEGIN_CFG\nSize\n1\nAtomData: id type cartes_x cartes_y cartes_z\n1 1e18 0 0 0\nEnergy\n1\nEND_CFG\n",
    ),
    "a configuration behind blank lines": ("a.cfg", b"\n" * 10**6 + b"BEGIN_CFG\n"),
    "configurations within configurations": ("a.cfg", b"BEGIN_CFG\n" * 10**5),
    "XML of a billion laughs": (
        "vasprun.xml",
        f'<?xml version="1.0"?><!DOCTYPE m [{LAUGHS}]><modeling><i name="NELM">&a9;</i></modeling>'.encode(),
    ),
    "XML that asks for a file": (
        "vasprun.xml",
        b'<?xml version="1.0"?><!DOCTYPE m [<!ENTITY a SYSTEM "file:///etc/passwd">]><modeling><i>&a;</i></modeling>',
    ),
    "XML of nothing": ("vasprun.xml", b'<?xml version="1.0"?><modeling></modeling>'),
    "an OUTCAR of its first line": ("OUTCAR", b" vasp.6.3.2 27Jun22\n"),
    "an OUTCAR of ends of steps": ("OUTCAR", b" vasp.6.3.2\n" + b" FREE ENERGIE OF THE ION-ELECTRON SYSTEM\n" * 10**4),
    "a gradient of 10^18 atoms": ("a.engrad", b"# The current total energy in Eh\n1000000000000000000 1\n"),
    "a gradient of nothing": ("a.engrad", b"# The current total energy in Eh\n"),
    "an output of ORCA of its first line": ("a.out", b" * O   R   C   A *\n"),
    "an output of CP2K of energies": (
        "a.out",
        b" DBCSR| x\n" + b" ENERGY| Total FORCE_EVAL ( QS ) energy [a.u.]: nan\n" * 9,
    ),
    "a trajectory of CP2K without numbers": ("x-pos-1.xyz", b"1\n i = 1, time = 0, E = -1.0\nH one two three\n"),
    "half a character": ("a.xyz", "1\nenergy=-1\nH 0 0 0\n".encode("utf-16")[:-1]),
    "UTF-16 of halves of pairs": ("a.xyz", b"\xff\xfe" + b"\x00\xd8" * 1000),
}

ARRAYS: dict[str, dict[str, bytes]] = {
    "10^12 frames": {"coord": _announced((10**12, 6))},
    "no frames": {"coord": _saved(np.zeros((0, 6)))},
    "objects": {"coord": _saved(np.array([{}, None], dtype=object))},
    "a pickle": {"coord": pickle.dumps([1, 2])},
    "no numbers": {"coord": _saved(["a", "b"])},
    "10^12 energies": {"coord": _saved(np.zeros((1, 6))), "energy": _announced((10**12,))},
}
"""Arrays of a folder of DeePMD-kit."""


def write_program(folder: Path, name: str) -> Path:
    """The file of this name among :data:`PROGRAMS`."""
    path = folder / PROGRAMS[name][0]
    path.write_bytes(PROGRAMS[name][1])
    return path


def write_system(folder: Path, name: str) -> Path:
    """A folder of DeePMD-kit with these of :data:`ARRAYS`, others of one frame of two atoms."""
    place = folder / "system" / "set.000"
    place.mkdir(parents=True)
    (place.parent / "type.raw").write_text("0 0")
    (place.parent / "type_map.raw").write_text("H")
    usual = {"box": _saved(5 * np.eye(3).reshape(1, 9)), "energy": _saved(np.ones(1))}
    for array, content in {**usual, **ARRAYS[name]}.items():
        (place / f"{array}.npy").write_bytes(content)
    return place.parent
