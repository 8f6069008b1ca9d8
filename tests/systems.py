"""Frames to predict for, and models to predict with, shared by tests of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import write

from forcetune.adapters.attach import Adapter
from forcetune.adapters.methods import METHODS
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.deployment.calculator import build_frame
from forcetune.frames.frame import Frame
from models import Oracle, make_mace, oracle

METHODS_FOR_MACE = tuple(name for name in METHODS if name != "modality")
"""MACE has no modalities."""
STIFFNESS = 5.0
"""eV/Å² of the springs in :func:`labelled`."""


def backbone(**options: Any) -> MaceBackbone:
    """A small MACE with random weights, computed by our network."""
    model = MaceBackbone.from_module(make_mace(**options), dtype=options.get("dtype", torch.float64))
    assert isinstance(model, MaceBackbone)
    return model


def library(**options: Any) -> Oracle:
    """The same model, computed by mace."""
    return oracle(make_mace(**options), dtype=options.get("dtype", torch.float64))


def perturb(adapter: Adapter, scale: float = 0.1, seed: int = 5) -> None:
    """Random values on top of every adapter parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))


def cluster(elements: Sequence[int] = (1, 6, 7, 8), atoms: int = 9, seed: int = 3) -> Atoms:
    """Atoms at random places without a cell, none too near to another."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*3 * [np.arange(3)]), axis=-1).reshape(-1, 3)[:atoms] * 1.7
    numbers = [elements[i % len(elements)] for i in range(atoms)]
    return Atoms(numbers, grid + rng.uniform(-0.3, 0.3, (atoms, 3)))


def crystal(elements: Sequence[int] = (1, 6, 7, 8), seed: int = 4) -> Atoms:
    """A skewed periodic cell smaller than twice the cutoff."""
    atoms = cluster(elements, 8, seed)
    atoms.set_cell(np.diag([4.9, 5.2, 5.5]) + 0.4 * np.tri(3, k=-1))
    atoms.pbc = True
    return atoms


def frames_of(*structures: Atoms) -> list[Frame]:
    return [build_frame(atoms) for atoms in structures]


def labelled(count: int = 12, seed: int = 0) -> list[Atoms]:
    """Shaken methanol molecules in which springs hold all pairs; energies in ``REF_energy``, forces in ``REF_forces``.

    E = ½ k Σ (d − d₀)² over pairs, so that forces and torques add up to zero.
    """
    rng = np.random.default_rng(seed)
    start = molecule("CH3OH")
    rest = start.get_all_distances() + np.eye(len(start))
    structures = []
    for _ in range(count):
        atoms = start.copy()
        atoms.positions += 0.06 * rng.standard_normal(start.positions.shape)
        apart = atoms.positions[None] - atoms.positions[:, None]
        distance = np.linalg.norm(apart, axis=-1) + np.eye(len(start))
        atoms.info["REF_energy"] = -3000.0 + 0.25 * STIFFNESS * float(((distance - rest) ** 2).sum())
        pull = STIFFNESS * (distance - rest) / distance
        atoms.arrays["REF_forces"] = (pull[..., None] * apart).sum(axis=1)
        structures.append(atoms)
    return structures


def write_labelled(path: Path, count: int = 12, seed: int = 0) -> Path:
    """The same as an extended-XYZ file."""
    write(path, labelled(count, seed), format="extxyz")
    return path


def write_model(path: Path, **options: Any) -> Path:
    """A small MACE with random weights as mace writes it."""
    torch.save(make_mace(**options), path)
    return path
