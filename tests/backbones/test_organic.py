"""The model of the papers' size that benchmarks start from; it is part of the repository and not of the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule

import forcetune

ORGANIC = Path(__file__).parents[2] / "benchmarks" / "models" / "organic.safetensors"


def test_it_opens_and_knows_molecules() -> None:
    atoms = molecule("CH3OH")
    atoms.calc = forcetune.calculator(ORGANIC)
    assert atoms.get_potential_energy() == pytest.approx(-223.797618804381, abs=1e-9)
    assert np.abs(atoms.get_forces().sum(axis=0)).max() < 1e-10
    cut = forcetune.load(ORGANIC, elements=[1, 6, 8])
    assert sum(parameter.numel() for parameter in cut.model.parameters()) == 751_888
