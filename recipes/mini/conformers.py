"""Structures of molecules from SMILES, and whether a structure is still that molecule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase.data import covalent_radii
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from recipes.mini.sample import FloatArray, IntArray

STRETCH = 1.5
"""A bond longer than so many times the sum of covalent radii counts as broken."""


@dataclass(frozen=True, slots=True, eq=False)
class Molecule:
    """A molecule with conformers.

    Attributes:
        smiles: canonical SMILES.
        numbers: (atoms,) atomic numbers.
        bonds: (bonds, 2) indices of bonded atoms.
        conformers: each (atoms, 3), Å; at the minimum of a force field where it knows the molecule.
    """

    smiles: str
    numbers: IntArray
    bonds: IntArray
    conformers: tuple[FloatArray, ...]


def embed(smiles: str, count: int, seed: int) -> Molecule:
    """Up to ``count`` distinct conformers of a molecule by ETKDG, the same for the same seed.

    Raises:
        ValueError: RDKit cannot read the SMILES or finds no structure.
    """
    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None:
        raise ValueError(f"{smiles}: not a SMILES that RDKit reads")
    molecule = Chem.AddHs(parsed)
    settings = rdDistGeom.ETKDGv3()
    settings.randomSeed = seed
    settings.pruneRmsThresh = 0.2
    settings.numThreads = 1
    found = list(rdDistGeom.EmbedMultipleConfs(molecule, count, settings))
    if not found:
        settings.useRandomCoords = True
        found = list(rdDistGeom.EmbedMultipleConfs(molecule, count, settings))
    if not found:
        raise ValueError(f"{smiles}: RDKit finds no structure")
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
        rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(molecule, numThreads=1, maxIters=500)
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], dtype=np.int64)
    bonds = np.array([(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()], dtype=np.int64)
    conformers = tuple(np.asarray(molecule.GetConformer(index).GetPositions(), dtype=np.float64) for index in found)
    return Molecule(Chem.MolToSmiles(parsed), numbers, bonds.reshape(-1, 2), conformers)


def is_whole(molecule: Molecule, positions: FloatArray) -> bool:
    """Whether every bond of the molecule is still one and no hydrogen has found a second partner.

    A reaction would put another molecule's frames under this molecule's name.
    """
    radii = covalent_radii[molecule.numbers]
    reach = radii[:, None] + radii[None, :]
    distances = np.linalg.norm(positions[:, None] - positions[None, :], axis=-1)
    first, second = molecule.bonds.T
    if (distances[first, second] > STRETCH * reach[first, second]).any():
        return False
    free = ~np.eye(len(radii), dtype=bool)
    free[first, second] = free[second, first] = False
    hydrogens = molecule.numbers == 1
    return not (free & hydrogens[:, None] & (distances < 1.15 * reach)).any()
