"""Frames of HDF5 files, in the layout that mace's ``mace_prepare_data`` writes.

The file has groups ``config_batch_0``, ``config_batch_1``, …, and each of them groups ``config_0``, ``config_1``, …,
one for a frame:

- ``atomic_numbers``: (atoms,)
- ``positions``: (atoms, 3), Å
- ``cell``: (3, 3), Å, and ``pbc``: (3,); may be missing
- ``properties``: a group with the labels by name, such as ``energy`` (eV), ``forces`` ((atoms, 3), eV/Å), ``stress``
- ``weight`` and ``property_weights`` (a group): of the frame and of each property, read as ``config_weight`` and
  ``config_energy_weight``, … (:mod:`forcetune.frames.weights`); a property with the weight 0 is no label; both may be
  missing
- ``config_type``: a text; may be missing

The text ``None`` stands for a value that is not there. The library below trusts much of what a file says, so these
functions are called in a process that may die
(:mod:`forcetune.frames.store.chunks`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from forcetune.errors import InputError
from forcetune.frames.defects import guarded, refusing

_LARGEST_FRAME = 2**28
_LEAST_UNPACKED = 2**24
_RATIO = 100
_MOST_PROPERTIES = 1000
_WEIGHTED = ("energy", "forces", "stress", "virials")


def frame_groups(path: Path) -> list[tuple[str, np.ndarray]]:
    """Names of the batches, each with the names of its frames (bytes), all in order.

    Raises:
        InputError: this is no HDF5 file, or one of another layout.
    """
    with refusing(path), _opened(path) as file:
        names = _numbered(file, "config_batch_")
        if not names:
            listed = ", ".join(repr(name[:40]) for name in list(file)[:5])
            raise InputError(
                f"{path}: has no groups config_batch_0, config_batch_1, … as mace_prepare_data writes them (it has "
                f"{listed or 'nothing'}); write the frames in this layout, or as an ASE database or extended XYZ."
            )
        # an array, because a batch may have millions
        return [(name, np.array(_numbered(_group(file, name), "config_"), dtype=bytes)) for name in names]


def read_groups(path: Path, batch: str, names: Sequence[bytes], start: int) -> Iterator[Atoms]:
    """Frames of a batch by their names, of which the first is frame ``start`` of the file.

    Raises:
        InputError: a frame is damaged, refers to something outside of the file, or unpacks to more than a frame has.
    """
    with refusing(path), _opened(path) as file:
        group, budget = _group(file, batch), _Budget()
        yield from guarded(path, (_atoms(_group(group, name.decode()), budget) for name in names), start)


class _Budget:
    """What tables of neighbouring frames may fill, measured by the room that they take in the file.

    Tables that were never written take none, and several names may stand for one table.
    """

    def __init__(self) -> None:
        self._stored: dict[Any, int] = {}
        self._unpacked = self._frame = 0

    def next_frame(self) -> None:
        self._frame = 0

    def spend(self, dataset: Any, size: int) -> None:
        """
        Raises:
            ValueError: with these bytes it is more than a frame has, or out of proportion.
        """
        self._stored[_library().h5o.get_info(dataset.id).addr] = dataset.id.get_storage_size()
        self._unpacked += size
        self._frame += size
        if self._frame > _LARGEST_FRAME:
            raise ValueError(f"with more than {_LARGEST_FRAME:,} bytes it is larger than a frame can be")
        most = max(_LEAST_UNPACKED, _RATIO * sum(self._stored.values()))
        if self._unpacked > most:
            raise ValueError(
                f"up to here some frames unpack to more than {most:,} bytes, out of proportion to the file"
            )


def _atoms(group: Any, budget: _Budget) -> Atoms:
    budget.next_frame()
    cell, pbc = _value(group, "cell", budget), _value(group, "pbc", budget)
    atoms = Atoms(
        numbers=_needed(group, "atomic_numbers", budget),
        positions=_needed(group, "positions", budget),
        cell=None if cell is None else np.asarray(cell, dtype=float),
        pbc=None if pbc is None else np.asarray(pbc, dtype=bool),
    )
    if "properties" in group:
        properties = _group(group, "properties")
        weights = _group(group, "property_weights") if "property_weights" in group else None
        if len(properties) > _MOST_PROPERTIES:
            raise ValueError(f"it has {len(properties)} properties")
        for name in properties:
            value = _value(properties, name, budget)
            weight = None if weights is None else _value(weights, name, budget)
            if value is not None and (weight is None or float(weight) != 0):
                atoms.info[name] = value
                if weight is not None and float(weight) != 1 and name in _WEIGHTED:
                    atoms.info[f"config_{name}_weight"] = float(weight)
    if "weight" in group and (weight := _value(group, "weight", budget)) is not None:
        atoms.info["config_weight"] = float(weight)
    if "config_type" in group:
        atoms.info["config_type"] = _value(group, "config_type", budget)
    return atoms


def _numbered(group: Any, prefix: str) -> list[str]:
    """Names of this form, by their number."""
    form = re.compile(re.escape(prefix) + "[0-9]{1,18}")
    return sorted((name for name in group if form.fullmatch(name)), key=lambda name: int(name[len(prefix) :]))


def _library() -> Any:
    """h5py, whose types do not tell of its lower half."""
    import h5py

    return h5py


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        h5py = _library()
    except ImportError as error:
        raise InputError(f"{path}: reading HDF5 needs a package that is not here; pip install h5py.") from error
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise InputError(f"{path}: no HDF5 file, or a damaged one ({str(error)[:120]}); copy it again.") from error
    with file:
        yield file


def _opened_member(group: Any, name: str) -> Any:
    """The identifier of a member that stands in this very file; None where there is none of this name.

    h5py's own layer would look everything up several times.

    Raises:
        ValueError: it is a link that leads elsewhere.
    """
    h5py = _library()
    key = name.encode()
    if not group.id.links.exists(key):
        return None
    if group.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"'{name[:40]}' is a link, which may lead out of the file")
    return h5py.h5o.open(group.id, key)


def _group(group: Any, name: str) -> Any:
    """
    Raises:
        ValueError: there is no group of this name.
    """
    h5py = _library()
    member = _opened_member(group, name)
    if not isinstance(member, h5py.h5g.GroupID):
        raise ValueError(f"'{name[:40]}' is missing or no group")
    return h5py.Group(member)


def _needed(group: Any, name: str, budget: _Budget) -> np.ndarray:
    value = _value(group, name, budget)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"'{name}' is missing")
    return value


def _value(group: Any, name: str, budget: _Budget) -> Any:
    """A text, a number or an array; None where it is missing or the text ``None``.

    Raises:
        ValueError: it lies in another file, or is larger than a frame can be.
    """
    h5py = _library()
    member = _opened_member(group, name)
    if member is None:
        return None
    if not isinstance(member, h5py.h5d.DatasetID):
        raise ValueError(f"'{name[:40]}' is no table of numbers")
    layout = member.get_create_plist()
    if layout.get_external_count() or layout.get_layout() == h5py.h5d.VIRTUAL:
        raise ValueError(f"'{name[:40]}' lies in another file")
    dataset = h5py.Dataset(member)
    if dataset.size is None:
        return None
    text = h5py.check_string_dtype(dataset.dtype) is not None
    if not text and dataset.dtype.kind not in "biuf":
        raise ValueError(f"'{name[:40]}' is neither numbers nor a text")
    if text and dataset.shape != ():
        raise ValueError(f"'{name[:40]}' is larger than a frame can be")
    budget.spend(dataset, dataset.size * dataset.dtype.itemsize)
    value = dataset[()]
    if isinstance(value, bytes):
        budget.spend(dataset, len(value))  # a text may lie elsewhere, under several names
        value = value.decode("utf-8", "replace")
    return None if isinstance(value, str) and value == "None" else value
