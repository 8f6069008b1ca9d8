"""The model in the package: what it is, and that it has no holes."""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import pytest
from ase import Atoms

import forcetune
from forcetune.backbones.protocol import Backbone
from forcetune.backbones.registry import find, resolve
from recipes.mini.repulsion import pair_scans


@pytest.fixture(scope="module")
def mini() -> Backbone:
    return forcetune.load("mini")


def test_it_comes_with_the_package(mini: Backbone) -> None:
    model = find("mini")
    assert model is not None and model.packaged
    resolved = resolve("mini")
    assert (resolved.name, resolved.library, resolved.licence) == ("mini", "mace", "MIT")
    assert resolved.path.suffix == ".safetensors" and resolved.path.stat().st_size < 3_000_000
    content = resolved.path.read_bytes()  # safetensors: the length of a JSON header, the header, numbers
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["architecture"])["hidden_irreps"] == "32x0e+32x1o"
    card = (files("forcetune.backbones") / "mini" / "README.md").read_text(encoding="utf-8")
    assert resolved.sha256 in card and "GFN2-xTB" in card and "MIT" in card


def test_every_pair_of_elements_repels_at_short_distances(mini: Backbone) -> None:
    scans = pair_scans(mini, step=0.05)
    assert len(scans) == 28
    assert {scan.symbols: scan.hole for scan in scans if scan.hole is not None} == {}


def test_free_atoms_have_their_energies(mini: Backbone) -> None:
    for number, energy in mini.reference_energies.items():
        atoms = Atoms([number])
        atoms.calc = forcetune.calculator("mini")
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-9)
        assert np.abs(atoms.get_forces()).max() == 0
