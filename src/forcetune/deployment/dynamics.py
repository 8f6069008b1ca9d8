"""Whether a potential conserves energy: dynamics without a thermostat."""

from __future__ import annotations

import time as clock
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from numpy.typing import NDArray

from forcetune.errors import ForcetuneError

FloatArray = NDArray[np.float64]
_LEAST_STEPS = 20  # a line needs some points


@dataclass(frozen=True, slots=True)
class EnergyConservation:
    """Dynamics at constant energy (NVE), step by step from 0.

    Attributes:
        timestep: fs.
        time: (steps + 1,) ps.
        potential, total: (steps + 1,) energies, eV.
        temperature: (steps + 1,) K.
        n_atoms: number of atoms.
    """

    timestep: float
    time: FloatArray
    potential: FloatArray
    total: FloatArray
    temperature: FloatArray
    n_atoms: int

    @property
    def drift(self) -> float:
        """Slope of the total energy over time by least squares, meV/atom/ps."""
        return float(np.polyfit(self.time, self.total, 1)[0]) * 1000 / self.n_atoms

    @property
    def fluctuation(self) -> float:
        """Standard deviation of the total energy about that line, meV/atom."""
        line = np.polyval(np.polyfit(self.time, self.total, 1), self.time)
        return float(np.std(self.total - line)) * 1000 / self.n_atoms

    def to_json(self, points: int = 400) -> dict[str, object]:
        """Figures, and at most about ``points`` points of the curves; energies in meV/atom from the start."""
        every = max(1, len(self.time) // points)
        chosen = slice(None, None, every)
        return {
            "ensemble": "NVE",
            "picoseconds": float(self.time[-1]),
            "timestep_fs": self.timestep,
            "n_atoms": self.n_atoms,
            "drift_mev_per_atom_per_ps": self.drift,
            "fluctuation_mev_per_atom": self.fluctuation,
            "mean_temperature_k": float(self.temperature.mean()),
            "time_ps": [round(float(value), 5) for value in self.time[chosen]],
            "total_mev_per_atom": _from_start(self.total, self.n_atoms, chosen),
            "potential_mev_per_atom": _from_start(self.potential, self.n_atoms, chosen),
        }


def _from_start(energy: FloatArray, n_atoms: int, chosen: slice) -> list[float]:
    return [round(float(value), 5) for value in (energy - energy[0])[chosen] * 1000 / n_atoms]


def energy_conservation(
    atoms: Atoms,
    *,
    temperature: float = 300.0,
    picoseconds: float = 2.0,
    timestep: float = 0.5,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    seconds: float | None = None,
) -> EnergyConservation:
    """Run velocity Verlet at constant energy and keep every step's energies.

    Args:
        atoms: with a calculator; moved in place.
        temperature: of the velocities drawn, K; without translation and, for molecules, rotation. Dynamics from a
            minimum end at about half of it.
        picoseconds: length.
        timestep: fs.
        seed: of the velocities.
        progress: called with the number of steps done.
        seconds: wall time after which the dynamics end, however long they are by then.

    Raises:
        ForcetuneError: the energy is no longer a number.
    """
    generator = np.random.default_rng(seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=generator)
    Stationary(atoms)
    if not atoms.pbc.any():
        ZeroRotation(atoms)
    began = clock.monotonic()
    steps = max(1, round(picoseconds * 1000 / timestep))
    rows = np.empty((steps + 1, 3))
    dynamics = VelocityVerlet(atoms, timestep=timestep * units.fs)
    for step in range(steps + 1):
        if step:
            dynamics.run(1)
        rows[step] = atoms.get_potential_energy(), atoms.get_kinetic_energy(), atoms.get_temperature()
        if not np.isfinite(rows[step]).all():
            raise ForcetuneError(
                f"the dynamics broke down after {step * timestep:g} fs: the energy is {rows[step, 0]}."
            )
        if progress is not None:
            progress(step)
        if seconds is not None and step >= _LEAST_STEPS and clock.monotonic() - began > seconds:
            rows = rows[: step + 1]
            break
    steps = len(rows) - 1
    time = np.arange(steps + 1) * timestep / 1000
    return EnergyConservation(timestep, time, rows[:, 0], rows[:, 0] + rows[:, 1], rows[:, 2], len(atoms))
