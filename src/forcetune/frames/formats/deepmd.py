"""Folders of DeePMD-kit: ``deepmd/npy``, ``deepmd/npy/mixed`` and ``deepmd/raw``.

A system is a folder with ``type.raw`` (the type of each atom), ``type_map.raw`` (the element of each type), perhaps an
empty file ``nopbc``, and sets of frames ``set.000``, ``set.001``, … with arrays ``coord.npy`` (frames, 3 atoms; Å),
``box.npy`` (frames, 9; Å), ``energy.npy`` (frames; eV), ``force.npy`` (frames, 3 atoms; eV/Å), ``virial.npy``
(frames, 9; eV), ``spin.npy`` (frames, 3 atoms; μB). Mixed systems have frames of one size and any composition, with
``real_atom_types.npy`` (frames, atoms), where −1 is an atom that is not there. Raw systems have the same arrays as text
(``coord.raw``) beside ``type.raw``.

deepmd's virial is −dE/dε, so that stress = −virial / volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from forcetune.errors import InputError
from forcetune.frames.formats.format import Format, labelled, symbols_of_types
from forcetune.frames.frame import IntArray
from forcetune.frames.text import open_text

DEEPEST = 5
"""Folders within folders in which systems are looked for."""
_MOST_TEXT = 2**26
_READ = ("coord", "box", "energy", "force", "virial", "spin", "force_mag", "real_atom_types")


def is_system(path: Path) -> bool:
    """Whether a folder is a system, or a set of one."""
    return bool(_sets(path)) and (_home(path) / "type.raw").is_file()


def systems_in(path: Path) -> list[Path]:
    """The folder itself if it is a system, otherwise those below it."""
    if is_system(path):
        return [path]
    levels = ("*/" * depth + "type.raw" for depth in range(1, DEEPEST + 1))
    return sorted(kind.parent for level in levels for kind in path.glob(level) if is_system(kind.parent))


def read_system(path: Path, type_map: Sequence[str]) -> Iterator[Atoms]:
    """The frames of a system, set after set.

    Raises:
        InputError: types without names of elements, or an array of another shape than its frames and atoms say.
    """
    home = _home(path)
    types = _integers(home / "type.raw")
    names = _words(home / "type_map.raw") if (home / "type_map.raw").is_file() else list(type_map)
    periodic = not (home / "nopbc").exists()
    for folder in _sets(path):
        yield from _read_set(path, _Set(folder, types), names, periodic)


def _read_set(path: Path, arrays: _Set, names: Sequence[str], periodic: bool) -> Iterator[Atoms]:
    coordinates = arrays.per_atom("coord", 3)
    if coordinates is None:
        raise InputError(f"{arrays.folder}: has no coordinates (coord.npy); copy the folder again.")
    box = arrays.per_frame("box", 9)
    if periodic and box is None:
        raise InputError(f"{arrays.folder}: has no cells (box.npy); add them, or a file nopbc for molecules.")
    energy, virial = arrays.per_frame("energy", 1), arrays.per_frame("virial", 9)
    force, spin, force_mag = (arrays.per_atom(name, 3) for name in ("force", "spin", "force_mag"))
    mixed = arrays.per_atom("real_atom_types", 1)
    source = "deepmd without type_map.raw" if mixed is None else "deepmd's mixed data without type_map.raw"
    for index in range(arrays.n_frames):
        frame_types = arrays.types if mixed is None else mixed[index, :, 0].astype(int)
        here = frame_types >= 0 if mixed is not None else np.ones(len(frame_types), dtype=bool)
        cell = None if box is None or not periodic else np.asarray(box[index], dtype=float).reshape(3, 3)
        atoms = Atoms(
            symbols_of_types(path, frame_types[here].tolist(), names, source),
            positions=np.asarray(coordinates[index], dtype=float)[here],
            cell=cell,
            pbc=periodic,
        )
        stress = None
        if virial is not None and cell is not None:
            stress = -np.asarray(virial[index], dtype=float).reshape(3, 3) / abs(np.linalg.det(cell))
        if force_mag is not None:
            atoms.set_array("force_mag", np.asarray(force_mag[index][here], dtype=float))
        yield labelled(
            atoms,
            energy=None if energy is None else float(energy[index, 0]),
            forces=None if force is None else force[index][here],
            stress=stress,
            magmoms=None if spin is None else spin[index][here],
        )


class _Set:
    """The arrays of one set of frames, as text or as ``.npy``."""

    def __init__(self, folder: Path, types: IntArray) -> None:
        self.folder = folder
        self.types = types
        self.n_frames = 0
        coordinates = self._load("coord")
        if coordinates is not None:
            self.n_frames = 1 if coordinates.ndim == 1 else len(coordinates)

    def per_frame(self, name: str, numbers: int) -> Any:
        """(frames, numbers), None where there is no such file."""
        return self._shaped(name, (self.n_frames, numbers))

    def per_atom(self, name: str, numbers: int) -> Any:
        """(frames, atoms, numbers), None where there is no such file."""
        return self._shaped(name, (self.n_frames, len(self.types), numbers))

    def _shaped(self, name: str, shape: tuple[int, ...]) -> Any:
        array = self._load(name)
        if array is None:
            return None
        if array.size != np.prod(shape):
            raise InputError(
                f"{self.folder}: {name} has the shape {array.shape}, but coord and type.raw announce {self.n_frames} "
                f"frames of {len(self.types)} atoms; copy the folder again."
            )
        return array.reshape(shape)

    def _load(self, name: str) -> Any:
        file = self.folder / f"{name}.npy"
        try:
            if file.is_file():
                # mapped, so that no header makes room for more than the file has
                array = np.load(file, mmap_mode="r", allow_pickle=False)
                if array.dtype.kind not in "iuf":
                    raise ValueError(f"it has entries of type {array.dtype}")
                return array
            if (file := self.folder / f"{name}.raw").is_file():
                return np.loadtxt(file, ndmin=2)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{file}: cannot be read ({str(error)[:100]}); copy or write it again.") from error
        return None


def _home(path: Path) -> Path:
    """The folder of the system: that of a set is the one above it."""
    return path if (path / "type.raw").is_file() else path.parent


def _sets(path: Path) -> list[Path]:
    """Folders with arrays, in order."""
    sets = sorted(folder for folder in path.glob("set.*") if (folder / "coord.npy").is_file())
    if sets:
        return sets
    return [path] if (path / "coord.npy").is_file() or (path / "coord.raw").is_file() else []


def _words(path: Path) -> list[str]:
    with open_text(path) as stream:
        return stream.read(_MOST_TEXT).split()


def _integers(path: Path) -> IntArray:
    try:
        return np.array([int(word) for word in _words(path)], dtype=np.int64)
    except ValueError as error:
        raise InputError(f"{path}: should have the type of each atom as a number ({error}); write it again.") from error


def _parts(path: Path) -> list[Path]:
    home = _home(path)
    files = [home / name for name in ("type.raw", "type_map.raw", "nopbc") if (home / name).is_file()]
    return files + [
        folder / f"{name}{ending}"
        for folder in _sets(path)
        for name in _READ
        for ending in (".npy", ".raw")
        if (folder / f"{name}{ending}").is_file()
    ]


def _unused(path: Path) -> list[str]:
    files = [file for folder in _sets(path) for ending in ("npy", "raw") for file in folder.glob(f"*.{ending}")]
    return sorted({file.name for file in files if file.stem not in (*_READ, "type", "type_map")})


FORMAT = Format(
    name="deepmd",
    title="a folder of DeePMD-kit",
    conversion="energies in eV and forces in eV/Å as they are, stress = −virial / volume, spin.npy as magnetic "
    "moments, force_mag.npy as magnetic forces.",
    recognizes=lambda path, head: is_system(path),
    read=read_system,
    parts=_parts,
    unused=_unused,
    is_folder=True,
    folders_in=systems_in,
)
