"""The protocol against mace's own calculator: energies, forces and stress, heads, elements, precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.backbones.loading import choose_device, load
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.network import NetworkBackbone
from forcetune.backbones.protocol import Backbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.graphs.graph import collate
from forcetune.magnetism.options import Magnetism
from models import make_mace
from systems import backbone, cluster, crystal, frames_of, library, write_model


@pytest.mark.parametrize(
    "options", [{}, {"kind": "MACE", "hidden_irreps": "6x0e+6x1o+6x2e"}], ids=["scale-shift", "plain"]
)
@pytest.mark.parametrize("make", [library, backbone], ids=["mace", "network"])
def test_same_numbers_as_the_librarys_calculator(
    options: dict[str, object], make: Callable[..., NetworkBackbone]
) -> None:
    from mace.calculators import MACECalculator

    model = make(**options)
    theirs = MACECalculator(models=[make_mace(**options)], device="cpu", default_dtype="float64")  # pyright: ignore[reportArgumentType]
    for atoms in (cluster(), crystal(), Atoms("O", cell=[9, 9, 9], pbc=True)):
        prediction = predict(model, build_graphs(model, frames_of(atoms)), stress=True)
        atoms.calc = theirs
        assert prediction.energy[0] == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
        np.testing.assert_allclose(prediction.forces, atoms.get_forces(), rtol=0, atol=1e-11)
        if atoms.pbc.all():
            assert prediction.stress is not None
            np.testing.assert_allclose(prediction.stress[0], atoms.get_stress(voigt=False), rtol=0, atol=1e-11)


def test_it_follows_the_protocol() -> None:
    assert isinstance(backbone(), Backbone)
    assert isinstance(library(), Backbone)


def test_heads_are_chosen_or_asked_for(tmp_path: Path) -> None:
    path = write_model(tmp_path / "two.model", heads=("pbe", "r2scan"))
    with pytest.raises(InputError, match=r"two has the heads pbe, r2scan; choose one with --head"):
        load(path)
    with pytest.raises(InputError, match="pbe"):
        load(path, head="hse")
    one, other = load(path, head="pbe"), load(path, head="r2scan")
    assert (one.head, other.head) == ("pbe", "r2scan")
    energies = [predict(model, build_graphs(model, frames_of(cluster()))).energy[0] for model in (one, other)]
    assert abs(energies[0] - energies[1]) > 1e-3


def test_cut_elements_change_no_number(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.model")
    whole, cut = load(path), load(path, elements=[8, 1])
    assert cut.elements == (1, 8)
    atoms = cluster((1, 8))
    first, second = (predict(model, build_graphs(model, frames_of(atoms))) for model in (whole, cut))
    assert first.energy[0] == pytest.approx(second.energy[0], rel=1e-13)
    np.testing.assert_allclose(first.forces, second.forces, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="does not know the element Si"):
        load(path, elements=[1, 14])


def test_float32_keeps_the_digits_of_a_large_total_energy() -> None:
    exact, rough = backbone(), MaceBackbone.from_module(make_mace(), dtype=torch.float32)
    for model in (exact, rough):
        model.set_reference_energies({1: -13.6, 6: -103_526.1, 7: -1_485.3, 8: -2_043.9})
    energies = [predict(model, build_graphs(model, frames_of(cluster()))).energy[0] for model in (exact, rough)]
    assert abs(energies[0]) > 2e5
    assert energies[0] == pytest.approx(energies[1], abs=2e-5)


def test_reference_energies_shift_the_total_and_are_in_a_saved_file(tmp_path: Path) -> None:
    model = backbone()
    before = predict(model, build_graphs(model, frames_of(Atoms("OH", [[0, 0, 0], [0, 0, 1]])))).energy[0]
    model.set_reference_energies({1: model.reference_energies[1] + 2.0, 79: 5.0})
    after = predict(model, build_graphs(model, frames_of(Atoms("OH", [[0, 0, 0], [0, 0, 1]])))).energy[0]
    assert after - before == pytest.approx(2.0, rel=1e-12)
    model.save(tmp_path / "saved.model")
    assert load(tmp_path / "saved.model").reference_energies == pytest.approx(model.reference_energies)


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(InputError, match="no CUDA device"):
            choose_device("cuda:1")
    with pytest.raises(InputError, match="there is no device"):
        choose_device("quantum")


@pytest.mark.parametrize("make", [library, backbone], ids=["mace", "network"])
@pytest.mark.parametrize(
    ("number", "named"),
    [
        *((9, "element F "), (7, "element N "), (118, "element Og ")),
        *((number, f"element of atomic number {number} ") for number in (0, -1, 500)),
    ],
)
def test_an_unknown_element_is_an_error_and_no_number(
    make: Callable[..., NetworkBackbone], number: int, named: str
) -> None:
    model = make(elements=(1, 6, 8))
    known = collate(build_graphs(model, frames_of(cluster((1, 6, 8)), crystal((1, 6, 8)))))
    numbers = known.numbers.clone()
    numbers[int(known.ptr[1]) + 2] = number
    for stress in (False, True):
        with pytest.raises(
            InputError, match=f"does not know the {named}.*structure 1, atom 2.*it has H, C, O"
        ) as caught:
            model.predict(replace(known, numbers=numbers), stress=stress)
        assert str(caught.value).count(".") == 2
    assert model.predict(known).energy.isfinite().all()


def test_an_unknown_element_with_a_spin_layer() -> None:
    model = backbone(elements=(1, 6, 8))
    attach(model, replace(method("readout"), magnetism=Magnetism(inputs="unit")))
    (known,) = build_graphs(model, frames_of(cluster((1, 6, 8))))
    spins = torch.zeros_like(known.positions)
    spins[:, 2] = 1.0
    known = replace(known, spins=spins)
    assert model.predict(known).energy.isfinite().all()
    with pytest.raises(InputError, match="does not know the element F"):
        model.predict(replace(known, numbers=torch.full_like(known.numbers, 9)))
