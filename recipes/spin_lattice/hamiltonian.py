"""Bcc iron as many-body lattice, Heisenberg exchange and Landau energies: every answer is known.

E = E_lattice − ½ Σ_i≠j J(r_ij) mᵢ·mⱼ + Σᵢ (A |mᵢ|² + B |mᵢ|⁴); eV, Å, μB.

- E_lattice: Finnis and Sinclair, Phil. Mag. A 50, 45 (1984), iron with the parameters of the erratum, Phil. Mag. A 53,
  161 (1986): E = ½ Σ V(r) − A Σ √ρᵢ.
- J(r): the Bethe–Slater form 4 a (r/δ)² (1 − b (r/δ)²) exp(−(r/δ)²) with the parameters for bcc iron that come with
  LAMMPS's SPIN package (a = 0.02726 eV, b = 0.2171, δ = 1.841 Å; Tranchida et al., J. Comput. Phys. 372, 406 (2018)).
  There it belongs to unit vectors and counts every pair twice; here 2 J / m₀² with m₀ = 2.2 μB does the same for
  moments. Instead of a step at 3.4 Å it goes smoothly to zero between 3.2 and 3.9 Å.
- Landau terms: the form of Ma and Dudarev, Phys. Rev. B 86, 054416 (2012), up to the fourth order. The coefficients
  are ours: B = 0.02 eV/μB⁴ is chosen, and A such that the ferromagnet has 2.2 μB at 2.8665 Å.

The directions of the moments are given, as a constrained calculation gives them; their magnitudes are those of lowest
energy. Therefore forces and stress are derivatives at fixed moments.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from forcetune.frames.neighbor_list import neighbours

LATTICE_CONSTANT = 2.8665
MOMENT = 2.2
CUTOFF = 3.9
A_FS, D_FS, BETA_FS, C_FS = 1.828905, 3.569745, 1.8, 3.4
V_FS = (1.2371147, -0.3592185, -0.0385607)
A_J, B_J, DELTA_J, SMOOTH_FROM = 0.02726, 0.2171, 1.841, 3.2
LANDAU_4 = 0.02


class State(NamedTuple):
    """What the model says of a structure.

    Attributes:
        energy: eV.
        forces: (atoms, 3), eV/Å.
        stress: (3, 3), eV/Å³, positive under tension.
        moments: (atoms, 3), μB.
        fields: (atoms, 3), −∂E/∂directions, eV, along the directions included.
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray
    moments: np.ndarray
    fields: np.ndarray


def exchange(distance: Tensor) -> Tensor:
    """J(r), eV/μB²."""
    x = (distance / DELTA_J) ** 2
    bethe_slater = 4 * A_J * x * (1 - B_J * x) * torch.exp(-x)
    t = ((distance - SMOOTH_FROM) / (CUTOFF - SMOOTH_FROM)).clamp(0, 1)
    return 2 * bethe_slater * (1 - t**3 * (10 - 15 * t + 6 * t**2)) / MOMENT**2


def _landau_2() -> float:
    """A such that the perfect ferromagnet has the moment :data:`MOMENT`."""
    first, second = np.sqrt(3) / 2 * LATTICE_CONSTANT, LATTICE_CONSTANT
    near = exchange(torch.tensor([first, second], dtype=torch.float64)).numpy()
    field = (8 * near[0] + 6 * near[1]) * MOMENT
    return float((field - 4 * LANDAU_4 * MOMENT**3) / (2 * MOMENT))


LANDAU_2 = _landau_2()


def lattice_energy(distance: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    """Finnis–Sinclair energy, eV, of directed edges."""
    zero = torch.zeros_like(distance)
    below = distance - D_FS
    density = torch.where(below < 0, below**2 + BETA_FS * below**3 / D_FS, zero)
    total = torch.zeros(atoms, dtype=distance.dtype).index_add(0, receiver, density)
    c0, c1, c2 = V_FS
    pair = torch.where(distance < C_FS, (distance - C_FS) ** 2 * (c0 + c1 * distance + c2 * distance**2), zero)
    return 0.5 * pair.sum() - A_FS * total.sqrt().sum()


def magnitudes(coupling: Tensor, sender: Tensor, receiver: Tensor, atoms: int) -> Tensor:
    """(atoms,) magnitudes of lowest energy, μB, from J(r) eᵢ·eⱼ of directed edges."""
    found = torch.full((atoms,), MOMENT, dtype=torch.float64)
    for _ in range(500):
        field = torch.zeros_like(found).index_add(0, receiver, coupling * found[sender])
        step = (2 * LANDAU_2 * found + 4 * LANDAU_4 * found**3 - field) / (2 * LANDAU_2 + 12 * LANDAU_4 * found**2)
        found = (found - 0.7 * step).clamp(min=0.5)
        if float(step.abs().max()) < 1e-13:
            return found
    raise ValueError("the magnitudes of the moments do not converge")


def solve(atoms: Atoms, directions: np.ndarray | None) -> State:
    """Energy, forces, stress and moments; without directions the lattice alone.

    Args:
        atoms: iron.
        directions: (atoms, 3) unit vectors.
    """
    cell = torch.tensor(atoms.cell.array)
    edges, shifts = neighbours(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF)
    sender, receiver = torch.as_tensor(edges)
    positions = torch.tensor(atoms.positions, requires_grad=True)
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    deformation = torch.eye(3, dtype=torch.float64) + (strain + strain.T) / 2
    vectors = (
        positions[receiver] - positions[sender] + torch.as_tensor(shifts, dtype=torch.float64) @ cell
    ) @ deformation
    distance = torch.linalg.vector_norm(vectors, dim=1)
    energy = lattice_energy(distance, receiver, len(atoms))
    moments = np.zeros((len(atoms), 3))
    unit = torch.tensor(moments if directions is None else directions, requires_grad=True)
    if directions is not None:
        product = (unit[sender] * unit[receiver]).sum(1)
        coupling = exchange(distance) * product
        size = magnitudes(coupling.detach(), sender, receiver, len(atoms))
        energy = energy - 0.5 * (coupling * size[sender] * size[receiver]).sum()
        energy = energy + (LANDAU_2 * size**2 + LANDAU_4 * size**4).sum()
        moments = (size[:, None] * unit).detach().numpy()
    leaves = (positions, strain, unit)
    # sizes have the lowest energy, so that nothing depends on their changes
    slope, pull, turn = torch.autograd.grad(energy, leaves, allow_unused=True, materialize_grads=True)
    energy = float(energy.detach())
    return State(energy, -slope.numpy(), pull.numpy() / atoms.get_volume(), moments, -turn.numpy())
