"""The potential in OpenMM, against the ASE calculator, ASE's integrator and OpenMM's own force field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.md.verlet import VelocityVerlet

import forcetune
from forcetune.errors import InputError
from simulations import (
    alloy,
    ethanol,
    metal_model,
    published_metal_model,
    skewed_water,
    total_energy_drift,
    tuned_mini,
    water_box,
    with_velocities,
)

openmm: Any = pytest.importorskip("openmm", reason="OpenMM is not installed (pip install forcetune[openmm])")
if not hasattr(openmm, "PythonForce"):
    pytest.skip("this OpenMM has no PythonForce (8.5 or later has)", allow_module_level=True)

from openmm import app, unit  # noqa: E402

from forcetune.openmm import create_force, create_mixed_system, create_system  # noqa: E402 (only with OpenMM)

KILOJOULES = units.mol / units.kJ


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_mini(tmp_path_factory.mktemp("gates") / "adapter")


@pytest.fixture(scope="module")
def metals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return metal_model(tmp_path_factory.mktemp("metals"))


def context_of(system: Any, positions: np.ndarray, step: float = 0.0005) -> Any:
    """A context of velocity Verlet in double precision; positions in Å."""
    integrator = openmm.CustomIntegrator(step)
    integrator.addUpdateContextState()
    integrator.addComputePerDof("v", "v+0.5*dt*f/m")
    integrator.addComputePerDof("x", "x+dt*v")
    integrator.addComputePerDof("v", "v+0.5*dt*f/m")
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(0.1 * positions)
    return context


def energy_and_forces(context: Any) -> tuple[float, np.ndarray]:
    """eV and eV/Å."""
    state = context.getState(energy=True, forces=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    return energy / KILOJOULES, forces / (10 * KILOJOULES)


@pytest.mark.parametrize("name", ["molecule", "box", "triclinic box", "metal", "published"])
def test_energy_and_forces(name: str, gates: Path, metals: Path) -> None:
    model = (metals,) if name == "metal" else ("mini", gates)
    if name == "published":
        model = (published_metal_model(),)
    atoms = {"molecule": ethanol, "box": water_box, "triclinic box": skewed_water, "metal": alloy}.get(name, alloy)()
    context = context_of(create_system(atoms, *model), atoms.positions)
    energy, forces = energy_and_forces(context)
    atoms.calc = forcetune.calculator(*model, compile="off")
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(forces, atoms.get_forces(), rtol=0, atol=1e-10)


def test_constant_energy_as_in_ase(gates: Path) -> None:
    atoms = with_velocities(ethanol(), 300)
    context = context_of(create_system(atoms, "mini", gates), atoms.positions)
    context.setVelocities(atoms.get_velocities() * 0.1 * 1000 * units.fs)
    totals = []
    for _ in range(50):
        state = context.getState(energy=True)
        total = (state.getPotentialEnergy() + state.getKineticEnergy()).value_in_unit(unit.kilojoule_per_mole)
        totals.append(total / KILOJOULES)
        context.getIntegrator().step(2)
    atoms.calc = forcetune.calculator("mini", gates)
    VelocityVerlet(atoms, 0.5 * units.fs).run(100)
    positions = 10 * context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)
    np.testing.assert_allclose(positions, atoms.positions, rtol=0, atol=1e-7)
    assert abs(total_energy_drift(np.array(totals), 1.0, len(atoms))) < 5.0


def test_the_box_follows_the_barostat(gates: Path) -> None:
    atoms = water_box()
    system = create_system(atoms, "mini", gates)
    context = context_of(system, atoms.positions)
    energy_and_forces(context)
    context.setPeriodicBoxVectors(*(openmm.Vec3(*row) for row in 0.103 * atoms.cell.array))
    context.setPositions(0.103 * atoms.positions)
    atoms.set_cell(1.03 * atoms.cell.array, scale_atoms=True)
    atoms.calc = forcetune.calculator("mini", gates, compile="off")
    assert energy_and_forces(context)[0] == pytest.approx(atoms.get_potential_energy(), abs=1e-9)


# ---- some atoms of a classical system --------------------------------------------------------------------------------


def _methanol_in_water() -> tuple[Any, Atoms, list[int]]:
    """Two molecules of water of TIP3P with flexible bonds, and one of methanol of harmonic springs and charges."""
    atoms = molecule("CH3OH")
    atoms.rattle(0.03, seed=1)
    for index, place in enumerate(((4.0, 0.5, 0.0), (-3.5, 1.0, 1.0))):
        water = molecule("H2O")
        water.rattle(0.02, seed=index)
        water.positions += place
        atoms += water
    atoms.set_cell([15, 15, 15])
    atoms.pbc = True
    system = openmm.System()
    for mass in atoms.get_masses():
        system.addParticle(float(mass))
    system.setDefaultPeriodicBoxVectors(*(openmm.Vec3(*row) for row in 0.1 * atoms.cell.array))
    bonds, angles, nonbonded = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.NonbondedForce()
    torsions = openmm.PeriodicTorsionForce()
    torsions.addTorsion(2, 0, 1, 3, 3, 0.0, 1.2)
    charges = [0.145, -0.683, 0.04, 0.418, 0.04, 0.04, *2 * [-0.834, 0.417, 0.417]]
    for charge in charges:
        nonbonded.addParticle(charge, 0.3, 0.4)
    pairs = [(0, 1), (0, 2), (0, 4), (0, 5), (1, 3), (6, 7), (6, 8), (9, 10), (9, 11)]
    for one, other in pairs:
        bonds.addBond(one, other, 0.1, 3e5)
    for first, middle, last in ((0, 1, 3), (2, 0, 1), (7, 6, 8), (10, 9, 11)):
        angles.addAngle(first, middle, last, 1.9, 400.0)
    nonbonded.createExceptionsFromBonds(pairs, 0.8333, 0.5)
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.PME)
    nonbonded.setCutoffDistance(0.7)
    bonds.setUsesPeriodicBoundaryConditions(True)
    for force in (bonds, angles, torsions, nonbonded, openmm.CMMotionRemover()):
        system.addForce(force)
    system.addConstraint(1, 3, 0.096)
    system.addConstraint(6, 7, 0.096)
    return system, atoms, list(range(6))


def test_some_atoms_inside_a_classical_system(gates: Path) -> None:
    """E = E(classical, all) − E(classical, chosen alone) + E(potential, chosen), of non-bonded terms by hand."""
    system, atoms, chosen = _methanol_in_water()
    mixed = create_mixed_system(system, chosen, atoms.symbols[chosen], "mini", gates)
    assert mixed.getNumConstraints() == 1 and system.getNumConstraints() == 2
    energy, forces = energy_and_forces(context_of(mixed, atoms.positions))
    alone = atoms[chosen]
    alone.calc = forcetune.calculator("mini", gates, compile="off")

    # the same without the potential: what is left is classical, and does not change when only distances inside do
    rest = create_mixed_system(system, chosen, atoms.symbols[chosen], Nothing())
    classical, classical_forces = energy_and_forces(context_of(rest, atoms.positions))
    assert energy - classical == pytest.approx(alone.get_potential_energy(), abs=1e-9)
    difference = forces - classical_forces
    np.testing.assert_allclose(difference[chosen], alone.get_forces(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(difference[6:], 0, atol=1e-12)

    for force in rest.getForces():
        if isinstance(force, openmm.HarmonicBondForce):
            assert force.getNumBonds() == 4
        elif isinstance(force, openmm.HarmonicAngleForce):
            assert force.getNumAngles() == 2
        elif isinstance(force, openmm.PeriodicTorsionForce):
            assert force.getNumTorsions() == 0
    # far from all water nothing classical acts on the chosen atoms
    far = atoms.copy()
    del far[6:]
    lonely = openmm.System()
    for mass in far.get_masses():
        lonely.addParticle(float(mass))
    nonbonded = openmm.NonbondedForce()
    for charge in (0.145, -0.683, 0.04, 0.418, 0.04, 0.04):
        nonbonded.addParticle(charge, 0.3, 0.4)
    custom = openmm.CustomNonbondedForce("1/r")
    for _ in far:
        custom.addParticle([])
    custom.addExclusion(0, 1)
    lonely.addForce(nonbonded)
    lonely.addForce(custom)
    isolated = create_mixed_system(lonely, chosen, far.symbols, "mini", gates)
    far.pbc = False
    far.calc = alone.calc
    actual, pull = energy_and_forces(context_of(isolated, far.positions))
    assert actual == pytest.approx(far.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(pull, far.get_forces(), rtol=0, atol=1e-10)


def test_dynamics_of_a_mixed_system_conserve_energy(gates: Path) -> None:
    system, atoms, chosen = _methanol_in_water()
    mixed = create_mixed_system(system, chosen, atoms.symbols[chosen], "mini", gates)
    mixed.removeConstraint(0)
    context = context_of(mixed, atoms.positions, 0.0002)
    context.setVelocitiesToTemperature(100, 1)
    totals = []
    for _ in range(60):
        state = context.getState(energy=True)
        total = (state.getPotentialEnergy() + state.getKineticEnergy()).value_in_unit(unit.kilojoule_per_mole)
        totals.append(total / KILOJOULES)
        context.getIntegrator().step(1)
    assert np.ptp(totals) / len(atoms) < 1e-3


class Nothing(forcetune.deployment.calculator.ForcetuneCalculator):  # type: ignore[name-defined]
    """No energy and no forces."""

    def __init__(self) -> None:
        super().__init__(forcetune.load("mini"))

    def calculate(self, atoms: Any = None, properties: Any = (), system_changes: Any = ()) -> None:
        self.results = {"energy": 0.0, "forces": np.zeros((len(atoms), 3))}


def test_with_openmms_own_force_field(gates: Path) -> None:
    """Water of a force field file, one molecule of it by the potential."""
    atoms = water_box()
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(len(atoms) // 3):
        residue = topology.addResidue("HOH", chain)
        oxygen, *hydrogens = (
            topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")
        )
        for hydrogen in hydrogens:
            topology.addBond(oxygen, hydrogen)
    field = app.ForceField("tip3p.xml")
    classical = field.createSystem(topology, nonbondedMethod=app.NoCutoff, constraints=None, rigidWater=False)
    mixed = create_mixed_system(classical, range(3), ["O", "H", "H"], "mini", gates)
    energy, _ = energy_and_forces(context_of(mixed, atoms.positions))
    rest = create_mixed_system(classical, range(3), ["O", "H", "H"], Nothing())
    one = atoms[:3]
    one.pbc = False
    one.calc = forcetune.calculator("mini", gates, compile="off")
    difference = energy - energy_and_forces(context_of(rest, atoms.positions))[0]
    assert difference == pytest.approx(one.get_potential_energy(), abs=1e-9)


def test_serialized_systems(gates: Path) -> None:
    atoms = ethanol()
    text = openmm.XmlSerializer.serialize(create_system(atoms, "mini", gates))
    energy, _ = energy_and_forces(context_of(openmm.XmlSerializer.deserialize(text), atoms.positions))
    atoms.calc = forcetune.calculator("mini", gates, compile="off")
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)


def test_refusals(gates: Path) -> None:
    slab = water_box(1)
    slab.pbc = (True, True, False)
    with pytest.raises(InputError, match="some directions only"):
        create_system(slab, "mini")
    turned = water_box(1)
    turned.rotate(30, "z", rotate_cell=True)
    with pytest.raises(InputError, match="no box of OpenMM"):
        create_system(turned, "mini")
    with pytest.raises(InputError, match="'Q' is no symbol"):
        create_force(["Q"], "mini")
    with pytest.raises(InputError, match="2 elements and 1 different particles"):
        create_force(["H", "H"], "mini", particles=[3, 3])
    with pytest.raises(InputError, match="alone"):
        create_force(["H"], forcetune.calculator("mini"), gates)
    system, atoms, chosen = _methanol_in_water()
    with pytest.raises(InputError, match=r"\[12\] of a system of 12 atoms"):
        create_mixed_system(system, [12], ["H"], "mini")
    system.addForce(openmm.GBSAOBCForce())
    with pytest.raises(InputError, match="GBSAOBCForce of the classical system"):
        create_mixed_system(system, chosen, atoms.symbols[chosen], "mini")
    context = context_of(create_system(Atoms("Si"), "mini"), np.zeros((1, 3)))
    with pytest.raises(Exception, match="Si"):
        energy_and_forces(context)
