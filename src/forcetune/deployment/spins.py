"""Relaxation of spins at fixed positions, and the exchange between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from scipy.optimize import minimize

from forcetune.deployment.calculator import ForcetuneCalculator, build_frame, read_spins
from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray
from forcetune.graphs.graph import build_graph


@dataclass(frozen=True, slots=True)
class SpinRelaxation:
    """How a relaxation of spins went.

    Attributes:
        energy_before, energy_after: eV.
        torque: largest component of the effective field across a spin that is left, eV per radian.
        evaluations: of the energy.
        converged: the torque is below what was asked for.
    """

    energy_before: float
    energy_after: float
    torque: float
    evaluations: int
    converged: bool


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """Exchange parameters of pairs of atoms in a collinear state.

    Attributes:
        first, second: (pairs,) indices of the atoms.
        distance: (pairs,) between nearest images, Å.
        coupling: (pairs,) J_ij, eV, summed over the images of the second atom.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    distance: FloatArray
    coupling: FloatArray


def exchange_parameters(atoms: Atoms, sites: Sequence[int] | None = None) -> Exchange:
    """J_ij of E = −Σ J_ij eᵢ·eⱼ, each pair once, e unit vectors, from small rotations out of a collinear state.

    J_ij = −½ Σ ∂²E/∂eᵢ∂eⱼ over the two directions across the moments, with everything else that the energy depends on
    following. It is what a spiral of small angle and a calculation by the magnetic force theorem (Liechtenstein et
    al., J. Magn. Magn. Mater. 67, 65 (1987)) see. The coefficients within the layer are another thing: where lengths
    of moments follow the directions, exchange can sit in them as well as in the energy of the lengths.

    Args:
        atoms: with collinear initial magnetic moments and a calculator with a spin layer.
        sites: first atoms of the pairs; all by default. The second is every other atom.

    Raises:
        InputError: the calculator has no spin layer, no atom has a spin, or the state is not collinear.
    """
    calc, start = _magnetic_state(atoms)
    assert calc.magnetism is not None
    lengths = np.linalg.norm(start, axis=1)
    axis = start[int(np.argmax(lengths))] / lengths.max()
    if np.linalg.norm(np.cross(start, axis), axis=1).max() > 1e-6 * lengths.max():
        raise InputError("the moments are not collinear; exchange parameters belong to a collinear state.")
    across = np.linalg.svd(axis[None])[2][1:]
    spins = read_spins(atoms, calc.magnetism)
    frame = replace(build_frame(atoms), spins=spins)
    backbone = calc.backbone
    batch = build_graph(frame, backbone.cutoff, backbone.dtype).to(device=backbone.device)
    batch.spins.requires_grad_()
    fields = backbone.predict(batch, create_graph=True).fields
    assert fields is not None
    unit = torch.as_tensor(np.linalg.norm(spins, axis=1)).to(fields)
    chosen = np.flatnonzero(lengths) if sites is None else np.asarray(sites, dtype=np.int64)
    rows = []
    for site in chosen:
        torque = torch.zeros(len(atoms), dtype=fields.dtype, device=fields.device)
        for direction in torch.as_tensor(across).to(fields):
            (slope,) = torch.autograd.grad(fields[site] @ direction, batch.spins, retain_graph=True)
            torque += 0.5 * unit[site] * unit * (slope @ direction)
        rows.append(torque.detach().double().cpu().numpy())
    first = np.repeat(chosen, len(atoms))
    second = np.tile(np.arange(len(atoms)), len(chosen))
    distinct = first != second
    distance = np.concatenate([atoms.get_distances(int(site), range(len(atoms)), mic=True) for site in chosen])
    return Exchange(first[distinct], second[distinct], distance[distinct], np.concatenate(rows)[distinct])


def _magnetic_state(atoms: Atoms) -> tuple[ForcetuneCalculator, FloatArray]:
    """The calculator and the (atoms, 3) initial magnetic moments.

    Raises:
        InputError: the calculator has no spin layer, or no atom has a spin.
    """
    calc = atoms.calc
    if not isinstance(calc, ForcetuneCalculator) or calc.magnetism is None or calc.magnetism.layer != "spin":
        raise InputError("the atoms need a calculator with a spin layer: forcetune.calculator(RUN) of a magnetic run.")
    given = np.asarray(atoms.get_initial_magnetic_moments(), dtype=np.float64)
    moments = given if given.ndim == 2 else given[:, None] * np.array([0.0, 0.0, 1.0])
    if not moments.any():
        raise InputError("no atom has a spin; set_initial_magnetic_moments first.")
    return calc, moments


class _SpentError(Exception):
    """No evaluation is left for the search."""


def relax_spins(atoms: Atoms, *, torque: float = 1e-4, evaluations: int = 500) -> SpinRelaxation:
    """Turn the spins of ``atoms``, their lengths kept, until the energy is lowest; positions stay.

    Args:
        atoms: with initial magnetic moments, (atoms, 3) or (atoms,) along z, and a calculator with a spin layer. The
            relaxed spins become its initial magnetic moments. A state that symmetry keeps from turning, such as the
            collinear one, is left as it is: turn it a little first.
        torque: largest torque to be left, eV per radian.
        evaluations: at most so many of the energy.

    Raises:
        InputError: the calculator has no spin layer, or no atom has a spin.
    """
    calc, start = _magnetic_state(atoms)
    assert calc.magnetism is not None
    lengths = np.linalg.norm(start, axis=1)
    spinning = lengths > 0
    # the layer may take directions only: the gradient by the initial moments then has their length in it
    unit = np.linalg.norm(read_spins(atoms, calc.magnetism), axis=1)

    def state(values: FloatArray) -> tuple[FloatArray, FloatArray]:
        raw = values.reshape(-1, 3)
        return raw / np.linalg.norm(raw, axis=1, keepdims=True), np.linalg.norm(raw, axis=1)

    def across(directions: FloatArray) -> FloatArray:
        """The effective field across each spin, eV per radian."""
        field = unit[spinning, None] * calc.results["effective_field"][spinning]
        return field - (field * directions).sum(1, keepdims=True) * directions

    used, lowest = 0, (np.inf, np.empty(0))

    def energy(values: FloatArray) -> tuple[float, FloatArray]:
        nonlocal used, lowest
        used += 1
        directions, norms = state(values)
        moments = np.zeros_like(start)
        moments[spinning] = lengths[spinning, None] * directions
        atoms.set_initial_magnetic_moments(moments)
        value = float(atoms.get_potential_energy())
        lowest = min(lowest, (value, directions.ravel()), key=lambda one: one[0])
        return value, (-across(directions) / norms[:, None]).ravel()

    def limited(values: FloatArray) -> tuple[float, FloatArray]:
        if used + 1 >= evaluations:  # the last one is for the state that is kept
            raise _SpentError
        return energy(values)

    # one number for each atom may become a vector
    atoms.set_initial_magnetic_moments(None)
    # a spin of another length is the same state: the gradient along it is zero
    values = (start[spinning] / lengths[spinning, None]).ravel()
    before = after = energy(values)[0]
    left, last = float(np.abs(across(values.reshape(-1, 3))).max()), np.inf
    options = {"maxfun": evaluations, "gtol": torque, "ftol": 0.0}
    while used + 1 < evaluations and torque < left < last:
        try:
            optimum = minimize(limited, values, jac=True, method="L-BFGS-B", options=options)
            # lengths have grown on the way, which the gradients are divided by: it goes on from unit vectors
            values = state(optimum.x)[0].ravel()
        except _SpentError:
            values = lowest[1]
        after = energy(values)[0]
        last, left = left, float(np.abs(across(values.reshape(-1, 3))).max())
    return SpinRelaxation(before, after, left, used, left <= torque)
