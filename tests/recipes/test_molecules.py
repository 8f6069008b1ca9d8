"""The list of molecules: what is on it, what must not be, and the split."""

from __future__ import annotations

import pytest

from recipes.mini.molecules import (
    BENCHMARKS,
    ELEMENTS,
    FINE_TUNING,
    HELD_OUT_SHARE,
    held_out_molecules,
    is_held_out,
    molecules,
    training_molecules,
)


def test_molecules_are_many_and_distinct() -> None:
    assert len(molecules()) >= 300
    assert len(set(molecules())) == len(molecules())


def test_fine_tuning_and_benchmark_molecules_are_not_trained_on() -> None:
    assert not {*FINE_TUNING, *BENCHMARKS} & set(molecules())


def test_every_molecule_is_on_one_side_of_the_split() -> None:
    training, held_out = training_molecules(), held_out_molecules()
    assert not set(training) & set(held_out)
    assert sorted(training + held_out) == sorted(molecules())
    assert 0.5 * HELD_OUT_SHARE < len(held_out) / len(molecules()) < 1.5 * HELD_OUT_SHARE


def test_split_does_not_depend_on_the_list() -> None:
    # a molecule that is added must not move another one to the other side
    assert [is_held_out(smiles) for smiles in ("CCC#N", "CN(C)N", "CNC=O")] == [True] * 3
    assert [is_held_out(smiles) for smiles in ("O", "CC(N)=O", "c1ccncc1")] == [False] * 3


def test_smiles_are_canonical_neutral_and_small() -> None:
    chem = pytest.importorskip("rdkit.Chem", reason="rdkit is not installed (extra 'recipes')")
    for smiles in (*molecules(), *FINE_TUNING, *BENCHMARKS):
        molecule = chem.MolFromSmiles(smiles)
        assert molecule is not None, smiles
        assert chem.MolToSmiles(molecule) == smiles
        assert chem.GetFormalCharge(molecule) == 0, smiles
        assert not any(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()), smiles
        assert {atom.GetAtomicNum() for atom in molecule.GetAtoms()} <= set(ELEMENTS), smiles
    heavy = [chem.MolFromSmiles(smiles).GetNumHeavyAtoms() for smiles in molecules()]
    assert max(heavy) <= 14
    assert sum(count > 9 for count in heavy) < 0.05 * len(heavy)


def test_training_molecules_show_every_element() -> None:
    chem = pytest.importorskip("rdkit.Chem", reason="rdkit is not installed (extra 'recipes')")
    for group in (training_molecules(), held_out_molecules()):
        heavy = {atom.GetAtomicNum() for smiles in group for atom in chem.MolFromSmiles(smiles).GetAtoms()}
        assert heavy | {1} == set(ELEMENTS)


def test_fine_tuning_molecule_has_nine_to_fifteen_atoms() -> None:
    chem = pytest.importorskip("rdkit.Chem", reason="rdkit is not installed (extra 'recipes')")
    for smiles in FINE_TUNING:
        assert 9 <= chem.AddHs(chem.MolFromSmiles(smiles)).GetNumAtoms() <= 15
