"""Labels by a calculator that the user names: every one in a file of its own as soon as it is there."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from forcetune.errors import ForcetuneError, InputError
from forcetune.frames.frame import Frame, LabelKeys
from forcetune.frames.labels import CALCULATOR
from forcetune.utils.files import atomic_path, write_json
from forcetune.utils.parsing import first_line

Labeller = Callable[..., Any]
"""Makes an ASE calculator."""
MOST_ATTEMPTS = 2
"""A label during which the process died so many times counts as failed."""
NEAR_FORCES, NEAR_ENERGY = 0.05, 0.02
"""eV/Å, root mean square, and eV/atom: what a label that is computed again may differ by."""


class LabelError(ForcetuneError):
    """A structure could not be labelled."""


def labeller_name(labeller: str | Labeller) -> str:
    """A labeller in words."""
    if isinstance(labeller, str):
        return labeller
    return f"{getattr(labeller, '__module__', '')}:{getattr(labeller, '__qualname__', type(labeller).__qualname__)}"


def load_labeller(labeller: str | Labeller, options: Mapping[str, Any]) -> Callable[[], Any]:
    """What makes a calculator without further arguments; one is made to see that it can be.

    Args:
        labeller: ``package.module:name``, ``file.py:name`` or a callable.
        options: keyword arguments.

    Raises:
        InputError: it cannot be imported or called, or what it makes is no calculator of energies and forces.
    """
    name = labeller_name(labeller)
    make = _import(labeller) if isinstance(labeller, str) else labeller
    try:
        calculator = make(**options)
    except (Exception, SystemExit) as error:  # code of the user's
        raise InputError(f"learn.labeller {name}: failed when it was called ({_describe_error(error)}).") from error
    if not callable(getattr(calculator, "get_potential_energy", None)):
        raise InputError(f"learn.labeller {name}: made {type(calculator).__name__}, which is no ASE calculator.")
    missing = {"energy", "forces"} - {*getattr(calculator, "implemented_properties", ("energy", "forces"))}
    if missing:
        raise InputError(f"learn.labeller {name}: its calculator has no {' and no '.join(sorted(missing))}.")
    return lambda: make(**options)


def _import(name: str) -> Labeller:
    """
    Raises:
        InputError: not of the form, or there is no such thing.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise InputError(
            f"learn.labeller {name!r}: write package.module:name or file.py:name, such as ase.calculators.emt:EMT."
        )
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ImportError as error:
        raise InputError(f"learn.labeller {name}: cannot be imported ({_describe_error(error)}).") from error
    except (Exception, SystemExit) as error:  # code of the user's
        raise InputError(f"learn.labeller {name}: failed when it was imported ({_describe_error(error)}).") from error
    made = getattr(module, attribute, None)
    if not callable(made):
        raise InputError(f"learn.labeller {name}: {place} has no {attribute} that can be called.")
    return made


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _describe_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__


def compute_label(structure: Atoms, make: Callable[[], Any], *, stress: bool, largest_force: float) -> dict[str, Any]:
    """Energy (eV), forces (atoms, 3) in eV/Å and, where wanted and known, stress in Voigt order, eV/Å³.

    Args:
        structure: what to compute.
        make: makes the calculator.
        stress: wanted of periodic structures.
        largest_force: eV/Å; a label with a larger force is none.

    Raises:
        LabelError: the calculator raised something, says that it has not converged, or its results are not finite, of
            the wrong shape, or beyond ``largest_force``.
    """
    atoms = structure.copy()
    atoms.set_constraint()  # ASE sets the forces on held atoms to 0
    try:
        atoms.calc = make()
        label: dict[str, Any] = {"energy": float(atoms.get_potential_energy())}
        label["forces"] = np.array(atoms.get_forces(), dtype=np.float64)
        if stress and atoms.pbc.all() and "stress" in getattr(atoms.calc, "implemented_properties", ()):
            label["stress"] = np.array(atoms.get_stress(voigt=True), dtype=np.float64)
    except (Exception, SystemExit) as error:  # code of the user's
        raise LabelError(_describe_error(error)) from error
    results = getattr(atoms.calc, "results", {})
    said = [getattr(atoms.calc, "converged", None), results.get("converged") if isinstance(results, dict) else None]
    if any(isinstance(one, (bool, np.bool_)) and not one for one in said):
        raise LabelError("the calculator says that it has not converged")
    for name, value in label.items():
        if not np.isfinite(value).all():
            raise LabelError(f"its {name} is not finite" if name != "forces" else "its forces are not finite")
    if label["forces"].shape != (len(atoms), 3):
        raise LabelError(f"its forces have the shape {label['forces'].shape}")
    sizes = np.linalg.norm(label["forces"], axis=1)
    if sizes.max() > largest_force:
        atom = int(sizes.argmax())
        raise LabelError(
            f"the force on atom {atom} ({atoms.symbols[atom]}) is {sizes.max():.3g} eV/Å, above learn.largest_force "
            f"({largest_force:g})"
        )
    return label


def labelled_atoms(structure: Atoms, label: Mapping[str, Any], keys: LabelKeys) -> Atoms:
    """A structure with its label where the training frames have theirs.

    Args:
        structure: without results.
        label: as :func:`compute_label` returns it.
        keys: of the training frames; a label without a key stands under its own name.
    """
    atoms = structure.copy()
    atoms.set_constraint()  # ASE writes forces on held atoms as 0
    # numbers that look like labels and are none stay in the file of what was selected
    atoms.info = {name: value for name, value in atoms.info.items() if not name.endswith("_std")}
    results: dict[str, Any] = {}
    for name, key in (("energy", keys.energy), ("forces", keys.forces), ("stress", keys.stress)):
        if name not in label:
            continue
        if key in (None, CALCULATOR) or key == name:
            results[name] = label[name]
        elif name == "forces":
            atoms.arrays[str(key)] = label[name]
        elif name == "stress" and "virial" in str(key).lower():
            xx, yy, zz, yz, xz, xy = -atoms.get_volume() * label[name]
            atoms.info[str(key)] = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        else:
            atoms.info[str(key)] = label[name]
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


class LabelFolder:
    """Labels of one round: ``001.xyz`` of a structure that is labelled, ``001.failed.json`` of one that cannot be.

    Either is written as soon as it is known, so that whatever happens later no structure is computed twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _place(self, number: int, ending: str) -> Path:
        return self.folder / f"{number:03d}{ending}"

    def is_done(self, number: int) -> bool:
        """Whether a structure is labelled, or known to fail."""
        return self.labelled(number).is_file() or self.failure(number) is not None

    def labelled(self, number: int) -> Path:
        """The file of a structure that is labelled."""
        return self._place(number, ".xyz")

    def failure(self, number: int) -> str | None:
        """Why a structure cannot be labelled.

        Raises:
            InputError: the file is damaged.
        """
        path = self._place(number, ".failed.json")
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["reason"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read ({error}); remove it to compute the label again.") from error

    def label(self, number: int, structure: Atoms, keys: LabelKeys, compute: Callable[[Atoms], dict[str, Any]]) -> None:
        """Compute the label of a structure that has none yet, and write it, or why there is none.

        Args:
            number: of the structure, from 1.
            structure: what to compute.
            keys: under which labels are written.
            compute: returns the label or raises :class:`LabelError`.
        """
        if self.is_done(number):
            return
        begun = self._place(number, ".begun")
        attempts = len(begun.read_bytes()) if begun.is_file() else 0
        if attempts >= MOST_ATTEMPTS:
            self._fail(number, f"the process died {attempts} times while it was computed")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with begun.open("ab") as stream:
            stream.write(b".")
        try:
            atoms = labelled_atoms(structure, compute(structure), keys)
        except LabelError as error:
            self._fail(number, str(error))
            return
        except KeyboardInterrupt:
            begun.unlink(missing_ok=True)  # on purpose, and not by what is computed
            raise
        with atomic_path(self.labelled(number)) as temporary:
            ase.io.write(temporary, atoms, format="extxyz")
        begun.unlink(missing_ok=True)

    def _fail(self, number: int, reason: str) -> None:
        write_json(self._place(number, ".failed.json"), {"number": number, "reason": reason})
        self._place(number, ".begun").unlink(missing_ok=True)


def compare_label(frame: Frame, label: Mapping[str, Any], labeller: str) -> None:
    """See that a labeller is at the level of theory of the training frames.

    Args:
        frame: a training frame with its label.
        label: the same, computed again.
        labeller: its name.

    Raises:
        InputError: the two differ by more than computing again explains.
    """
    differences = []
    if frame.forces is not None:
        forces = float(np.sqrt(np.mean((label["forces"] - frame.forces) ** 2)))
        if forces > NEAR_FORCES:
            differences.append(f"forces by {1000 * forces:.3g} meV/Å")
    if frame.energy is not None:
        energy = abs(label["energy"] - frame.energy) / len(frame)
        if energy > NEAR_ENERGY:
            differences.append(f"the energy by {1000 * energy:.3g} meV/atom")
    if differences:
        raise InputError(
            f"{frame.origin}: the labeller {labeller} differs from its label: {' and '.join(differences)}. Label with "
            "the level of theory of the training frames, or set learn.check to off."
        )
