"""Relaxation of spins at fixed positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from scipy.optimize import minimize

from forcetune.deployment.calculator import ForcetuneCalculator, spins_of
from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray


@dataclass(frozen=True, slots=True)
class SpinRelaxation:
    """How a relaxation of spins went.

    Attributes:
        energy_before, energy_after: eV.
        torque: largest component of the effective field across a spin that is left, eV per unit of the spin.
        evaluations: of the energy.
        converged: the torque is below what was asked for.
    """

    energy_before: float
    energy_after: float
    torque: float
    evaluations: int
    converged: bool


def relax_spins(atoms: Atoms, *, torque: float = 1e-4, evaluations: int = 500) -> SpinRelaxation:
    """Turn the spins of ``atoms``, their lengths kept, until the energy is lowest; positions stay.

    Args:
        atoms: with initial magnetic moments, (atoms, 3) or (atoms,) along z, and a calculator with a spin layer. The
            relaxed spins become its initial magnetic moments. A state that symmetry keeps from turning, such as the
            collinear one, is left as it is: turn it a little first.
        torque: largest torque to be left, eV per unit of the spin.
        evaluations: at most so many of the energy.

    Raises:
        InputError: the calculator has no spin layer, or no atom has a spin.
    """
    calc = atoms.calc
    if not isinstance(calc, ForcetuneCalculator) or calc.magnetism is None or calc.magnetism.layer != "spin":
        raise InputError("the atoms need a calculator with a spin layer: forcetune.calculator(RUN) of a magnetic run.")
    given = np.asarray(atoms.get_initial_magnetic_moments(), dtype=np.float64)
    start = given if given.ndim == 2 else given[:, None] * np.array([0.0, 0.0, 1.0])
    lengths = np.linalg.norm(start, axis=1)
    spinning = lengths > 0
    if not spinning.any():
        raise InputError("no atom has a spin; set_initial_magnetic_moments first.")
    # the layer may take directions only: the gradient by the initial moments then has their length in it
    unit = np.linalg.norm(spins_of(atoms, calc.magnetism), axis=1)

    def state(values: FloatArray) -> tuple[FloatArray, FloatArray]:
        raw = values.reshape(-1, 3)
        return raw / np.linalg.norm(raw, axis=1, keepdims=True), np.linalg.norm(raw, axis=1)

    def across(directions: FloatArray) -> FloatArray:
        """The effective field across each spin, eV per radian."""
        field = unit[spinning, None] * calc.results["effective_field"][spinning]
        return field - (field * directions).sum(1, keepdims=True) * directions

    def energy(values: FloatArray) -> tuple[float, FloatArray]:
        directions, norms = state(values)
        moments = np.zeros_like(start)
        moments[spinning] = lengths[spinning, None] * directions
        atoms.set_initial_magnetic_moments(moments)
        value = float(atoms.get_potential_energy())
        return value, (-across(directions) / norms[:, None]).ravel()

    # a spin of another length is the same state: the gradient along it is zero
    first = (start[spinning] / lengths[spinning, None]).ravel()
    before, _ = energy(first)
    found = minimize(
        energy, first, jac=True, method="L-BFGS-B", options={"maxfun": evaluations, "gtol": torque, "ftol": 0.0}
    )
    after, _ = energy(found.x)
    left = float(np.abs(across(state(found.x)[0])).max())
    return SpinRelaxation(before, after, left, int(found.nfev) + 2, left <= torque)
