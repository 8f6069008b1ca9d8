"""Langevin dynamics by the BAOAB splitting."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
from ase.data import atomic_masses
from ase.units import fs, kB

from recipes.mini.sample import FloatArray
from recipes.mini.xtb import Surface

FRICTION = 0.01
"""1/fs: strong enough to forget the velocities within a tenth of a picosecond."""


def langevin(
    surface: Surface,
    positions: FloatArray,
    *,
    temperature: float,
    every: int,
    generator: np.random.Generator,
    timestep: float = 1.0,
) -> Iterator[FloatArray]:
    """Yield positions (atoms, 3), Å, every so many steps, for as long as they are asked for.

    BAOAB samples the positions of a harmonic vibration exactly at any stable step, so that 1 fs will do for
    structures although it would not for velocities.

    Args:
        surface: energies and forces.
        positions: where to start, (atoms, 3), Å.
        temperature: K.
        every: steps from one structure to the next.
        generator: random numbers of velocities and noise.
        timestep: fs.

    Raises:
        SurfaceError: no self-consistent solution was found on the way.
    """
    step = timestep * fs
    masses = atomic_masses[surface.numbers][:, None]
    spread = np.sqrt(kB * temperature / masses)
    keep = np.exp(-FRICTION * timestep)
    noise = np.sqrt(1.0 - keep**2) * spread
    velocities = spread * generator.standard_normal(positions.shape)
    forces = surface(positions, follow=True).forces
    for taken in count(1):
        velocities = velocities + 0.5 * step * forces / masses
        positions = positions + 0.5 * step * velocities
        velocities = keep * velocities + noise * generator.standard_normal(positions.shape)
        positions = positions + 0.5 * step * velocities
        forces = surface(positions, follow=True).forces
        velocities = velocities + 0.5 * step * forces / masses
        if taken % every == 0:
            yield positions
