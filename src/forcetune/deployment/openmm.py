"""The potential in OpenMM, as a `PythonForce`: of a whole system, or of some atoms inside a classical force field.

>>> from forcetune.openmm import create_system
>>> system = create_system(atoms, "run")
>>> context = openmm.Context(system, openmm.LangevinMiddleIntegrator(300, 1.0, 0.0005))
>>> context.setPositions(0.1 * atoms.positions)  # nm
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers

from forcetune.backbones.protocol import Backbone
from forcetune.deployment.coupled import coupled_calculator
from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray
from forcetune.utils.optional import missing_package

try:
    import openmm
except ImportError as error:
    raise missing_package("OpenMM", "openmm", error) from error

unit: Any = openmm.unit  # its units are made at run time
KILOJOULES = units.mol / units.kJ
"""One eV in kJ/mol."""

_BONDED = (
    *("HarmonicBondForce", "HarmonicAngleForce", "PeriodicTorsionForce", "RBTorsionForce", "CMAPTorsionForce"),
    *("CustomBondForce", "CustomAngleForce", "CustomTorsionForce"),
)
_NONBONDED = ("NonbondedForce", "CustomNonbondedForce")
_WITHOUT_ATOMS = (
    *("CMMotionRemover", "AndersenThermostat", "MonteCarloBarostat"),
    *("MonteCarloAnisotropicBarostat", "MonteCarloMembraneBarostat", "MonteCarloFlexibleBarostat"),
)


class Computation:
    """What OpenMM calls for energy and forces; it can be pickled, and with it a serialized system.

    Attributes:
        atoms: the structure of the last call.
        calculator: of ASE, which computes it; ``calculator.results`` are those of the last call, in eV and Å.
    """

    def __init__(self, calculator: Calculator, numbers: Sequence[int], periodic: bool) -> None:
        self.calculator = calculator
        self.atoms = Atoms(numbers, pbc=periodic)

    def __call__(self, state: Any) -> tuple[float, FloatArray]:
        """Energy in kJ/mol and forces (atoms, 3) in kJ/mol/nm of OpenMM's state."""
        self.atoms.positions = 10 * state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        if self.atoms.pbc.all():
            self.atoms.set_cell(10 * state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.nanometer))
        self.calculator.calculate(self.atoms, ["energy", "forces"])
        results = self.calculator.results
        return float(results["energy"]) * KILOJOULES, results["forces"] * (10 * KILOJOULES)


def create_force(
    elements: Sequence[str] | Sequence[int],
    model: str | Path | Backbone | Calculator | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    *,
    periodic: bool = False,
    particles: Iterable[int] | None = None,
    **options: Any,
) -> Any:
    """A ``PythonForce`` of the potential.

    Args:
        elements: symbol or atomic number of each atom it acts on.
        model, adapter: as :func:`forcetune.calculator`; or a calculator, also one that watches
            (:func:`forcetune.watch`).
        periodic: whether the box counts; OpenMM's boxes are periodic in all directions.
        particles: indices of these atoms in the system; by default it has no others.
        options: further ones of :func:`forcetune.calculator`.

    Raises:
        InputError: an unknown symbol, not one index for each element, a version of OpenMM before 8.5, a model with a
            spin layer, or as :func:`forcetune.calculator`.
    """
    if not hasattr(openmm, "PythonForce"):
        raise InputError(
            f"OpenMM {openmm.__version__} has no PythonForce; install 8.5 or later: pip install 'forcetune[openmm]'"
        )
    numbers = [_read_atomic_number(element) for element in elements]
    chosen = None if particles is None else [int(index) for index in particles]
    if chosen is not None and (len(chosen) != len(numbers) or len(set(chosen)) != len(chosen)):
        raise InputError(f"{len(numbers)} elements and {len(set(chosen))} different particles; give one for each.")
    calculator = coupled_calculator("OpenMM", model, adapter, options)
    force = openmm.PythonForce(Computation(calculator, numbers, periodic))
    force.setName("forcetune")
    force.setUsesPeriodicBoundaryConditions(periodic)
    if chosen is not None:
        force.setParticles(chosen)
    return force


def create_system(
    atoms: Atoms,
    model: str | Path | Backbone | Calculator | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    **options: Any,
) -> Any:
    """An OpenMM system in which the potential is everything: masses, box and the force.

    OpenMM's box has its first vector along x and the second in the plane of x and y, and is reduced; structures in
    other cells are refused, as turning them would be noticed late.

    Args:
        atoms: structure with elements, masses, and a cell where periodic; positions go into a context (in nm).
        model, adapter, options: as :func:`create_force`.

    Raises:
        InputError: periodic in some directions only, a cell that is no box of OpenMM, or as :func:`create_force`.
    """
    if atoms.pbc.any() != atoms.pbc.all():
        raise InputError("The structure is periodic in some directions only, which OpenMM does not know.")
    periodic = bool(atoms.pbc.all())
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(float(mass))
    if periodic:
        _check_box(atoms.cell.array)
        system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in 0.1 * atoms.cell.array))
    system.addForce(create_force(atoms.numbers.tolist(), model, adapter, periodic=periodic, **options))
    return system


def create_mixed_system(
    system: Any,
    particles: Iterable[int],
    elements: Sequence[str] | Sequence[int],
    model: str | Path | Backbone | Calculator | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    **options: Any,
) -> Any:
    """A copy of a classical system in which the potential acts among some atoms (mechanical embedding).

    Classical terms and constraints among these atoms alone are taken out, nonbonded ones included; everything between
    them and the others stays classical: choose whole molecules.

    Args:
        system: of a classical force field; stays as it is.
        particles: indices of the atoms that the potential describes.
        elements: their symbols or atomic numbers, in the same order.
        model, adapter, options: as :func:`create_force`.

    Raises:
        InputError: an index that is not in the system, a virtual site or a force of which it is not known what to
            take out, or as :func:`create_force`.
    """
    chosen = [int(index) for index in particles]
    outside = [index for index in chosen if not 0 <= index < system.getNumParticles()]
    if outside or not chosen:
        raise InputError(f"particles: {outside or 'none'} of a system of {system.getNumParticles()} atoms.")
    if any(system.isVirtualSite(index) for index in chosen):
        raise InputError("particles: one of them is a virtual site, which has no element; leave it out.")
    inside = set(chosen)
    mixed = _without_bonded(system, inside)
    for force in mixed.getForces():
        _exclude(force, inside)
    periodic = bool(system.usesPeriodicBoundaryConditions())
    force = create_force(elements, model, adapter, periodic=periodic, particles=chosen, **options)
    mixed.addForce(force)
    return mixed


def _without_bonded(system: Any, inside: set[int]) -> Any:
    """A copy without bonded terms and constraints whose atoms are all inside.

    Raises:
        InputError: a force of which it is not known what to take out.
    """
    for force in system.getForces():
        kind = type(force).__name__
        if kind not in _BONDED + _NONBONDED + _WITHOUT_ATOMS:
            raise InputError(
                f"{kind} of the classical system: it is not known which of its terms are among the chosen atoms; "
                "remove it, or add it to the mixed system afterwards."
            )
    root = ElementTree.fromstring(openmm.XmlSerializer.serialize(system))
    parents = [root.find("Constraints")]
    parents += [child for force in root.iter("Force") if force.get("type") in _BONDED for child in force]
    for parent in parents:
        for term in list(parent) if parent is not None else ():
            atoms = {int(value) for name, value in term.attrib.items() if _names_an_atom(name)}
            if atoms and atoms <= inside:
                parent.remove(term)  # type: ignore[union-attr]
    return openmm.XmlSerializer.deserialize(ElementTree.tostring(root, encoding="unicode"))


def _names_an_atom(attribute: str) -> bool:
    """Of serialized terms: p1 … p4, and a1 … b4 of CMAP."""
    return len(attribute) == 2 and attribute[0] in "pab" and attribute[1] in "1234"


def _exclude(force: Any, inside: set[int]) -> None:
    """No nonbonded interaction among these atoms."""
    if isinstance(force, openmm.NonbondedForce):
        for one, other in combinations(sorted(inside), 2):
            force.addException(one, other, 0, 1, 0, True)
    elif isinstance(force, openmm.CustomNonbondedForce):
        present = {frozenset(force.getExclusionParticles(index)) for index in range(force.getNumExclusions())}
        for one, other in combinations(sorted(inside), 2):
            if frozenset((one, other)) not in present:
                force.addExclusion(one, other)


def _check_box(cell: FloatArray) -> None:
    """
    Raises:
        InputError: no reduced box as OpenMM wants it.
    """
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = cell
    tolerance = 1e-6
    turned = max(abs(ay), abs(az), abs(bz)) > tolerance or min(ax, by, cz) <= 0
    skewed = max(2 * abs(bx) - ax, 2 * abs(cx) - ax, 2 * abs(cy) - by) > tolerance
    if turned or skewed:
        raise InputError(
            "The cell is no box of OpenMM: its first vector lies along x, the second in the plane of x and y, and "
            "no component across may exceed half a box length. `atoms.cell.standard_form()` and "
            "`ase.build.minkowski_reduce` bring cells there."
        )


def _read_atomic_number(element: str | int) -> int:
    """
    Raises:
        InputError: no element.
    """
    number = atomic_numbers.get(element, 0) if isinstance(element, str) else int(element)
    if not 0 < number < 119:
        raise InputError(f"elements: {element!r} is no symbol or number of an element.")
    return number
