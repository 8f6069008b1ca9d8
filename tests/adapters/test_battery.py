"""What every method must satisfy on every kind of model: identity at the start, symmetry, forces, exact removal."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

from forcetune.adapters.attach import attach, detach, disable_adapter, get_adapter, merge_weights
from forcetune.adapters.methods import METHODS, Method, custom_method, method
from forcetune.backbones.network import NetworkBackbone
from forcetune.backbones.sevennet.backbone import SevenNetBackbone
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from nequip_models import BATTERY as NEQUIPS
from nequip_models import backbone_of as nequip_of
from sevennet_models import BATTERY as SEVENNETS
from sevennet_models import backbone_of
from systems import backbone, cluster, crystal, frames_of, perturb

EXACT = 1e-10

MODELS: dict[str, dict[str, Any]] = {
    "scale-shift": {},
    "plain, two orders": {"kind": "MACE", "hidden_irreps": "6x0e+6x1o+6x2e", "correlation": 3},
    "odd scalars": {"hidden_irreps": "5x0e+5x0o+5x1o+5x1e"},
    "density, trainable basis": {
        "first": "RealAgnosticDensityInteractionBlock",
        "later": "RealAgnosticDensityResidualInteractionBlock",
        "trainable_bessel": True,
    },
    "nonlinear residual": {
        "first": "RealAgnosticResidualNonLinearInteractionBlock",
        "later": "RealAgnosticResidualNonLinearInteractionBlock",
    },
    "agnostic product": {"use_agnostic_product": True},
}
# what others have in common with these is tested once: scratch and freeze are like full, lora is low rank
SAME_UPDATES = {"scratch", "freeze", "sparse-h", "lora"}
NOT_EQUIVARIANT = {"adapter"}
NEEDS_MODALITIES = {"modality"}
STARTS_ELSEWHERE = {"sparse"}
VARIANTS: dict[str, Method] = {name: method(name) for name in METHODS if name not in SAME_UPDATES | NOT_EQUIVARIANT}
# options of the same updates: on two models, one of them with odd scalars
OPTIONS: dict[str, Method] = {
    "mmea-pure, linear gain": method("mmea-pure", gain="linear"),
    "mmea-pure, skip connections": method("mmea-pure", skip=True),
    "elora, norms": method("elora", norms=True),
    "gates and gains": custom_method(
        "custom", {"linear": [{"update": "Gate", "rank": 4}, {"update": "Gain"}], "readout": [{"update": "LowRank"}]}
    ),
}
NAMED_CASES = [
    (name, label, variant)
    for name in (*MODELS, *SEVENNETS, *NEQUIPS)
    for label, variant in VARIANTS.items()
    if label not in NEEDS_MODALITIES or name == "SevenNet, modalities"
]
WITH_OPTIONS = (
    "scale-shift",
    "odd scalars",
    "SevenNet, fully connected",
    "SevenNet, no parity, linear",
    "NequIP, parity",
)
NAMED_CASES += [(name, label, variant) for name in WITH_OPTIONS for label, variant in OPTIONS.items()]
CASES = [(name, variant) for name, _, variant in NAMED_CASES]
IDS = [f"{name}-{label}" for name, label, _ in NAMED_CASES]
MERGEABLE = [case for case in CASES if case[1].mergeable]


@cache
def known_model(name: str) -> NetworkBackbone:
    if name in NEQUIPS:
        model = nequip_of(NEQUIPS[name])
    else:
        model = backbone_of(SEVENNETS[name]) if name in SEVENNETS else backbone(**MODELS[name])
    for _ in range(3):
        # the library's TorchScript parts sum in another order until they have been optimised
        predictions(model, cluster(), crystal())
    return model


@pytest.fixture(params=CASES, ids=IDS)
def case(request: pytest.FixtureRequest) -> tuple[NetworkBackbone, Method]:
    name, variant = request.param
    return known_model(name), variant


@pytest.fixture
def tuned(case: tuple[NetworkBackbone, Method]) -> Iterator[NetworkBackbone]:
    """A model with a perturbed adapter."""
    model, variant = case
    perturb(attach(model, variant))
    yield model
    detach(model)


def predictions(model: NetworkBackbone, *structures: Atoms) -> Predictions:
    return predict(model, build_graphs(model, frames_of(*structures)), stress=True)


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    scale = np.abs(expected).max()
    assert scale > 0
    assert np.abs(actual - expected).max() <= EXACT * scale


def test_fresh_adapter_changes_nothing_and_leaves_no_trace(case: tuple[NetworkBackbone, Method]) -> None:
    model, variant = case
    structures = (cluster(), crystal())
    before = predictions(model, *structures)
    weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    wanted_gradients = [parameter.requires_grad for parameter in model.model.parameters()]
    kind = type(model.model)
    adapter = attach(model, variant)
    fresh = predictions(model, *structures)
    assert type(model.model) is kind
    if variant.name in STARTS_ELSEWHERE:
        assert 0 < np.abs(fresh.forces - before.forces).max() < 0.2 * np.abs(before.forces).max()
    else:
        same(fresh.energy, before.energy)
        same(fresh.forces, before.forces)
    perturb(adapter)
    model.set_reference_energies({1: 3.0})
    changed = predictions(model, *structures)
    assert np.abs(changed.energy - before.energy).max() > 1e-6
    with disable_adapter(model):
        same(predictions(model, *structures).forces, before.forces)
    same(predictions(model, *structures).forces, changed.forces)
    detach(model)
    after = predictions(model, *structures)
    assert np.array_equal(after.energy, before.energy)
    assert np.array_equal(after.forces, before.forces)
    assert get_adapter(model) is None
    assert [parameter.requires_grad for parameter in model.model.parameters()] == wanted_gradients
    assert model.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.model.state_dict().items())


def knows_parity(model: NetworkBackbone) -> bool:
    """Some SevenNet models call everything even, and so their mirror images have other energies."""
    return not isinstance(model, SevenNetBackbone) or "1o" in model.content.architecture.harmonics


def test_rotation_reflection_translation_permutation(tuned: NetworkBackbone) -> None:
    rng = np.random.default_rng(7)
    for atoms in (cluster(), crystal()):
        one = predictions(tuned, atoms)
        for reflected in (False, True) if knows_parity(tuned) else (False,):
            rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
            rotation *= np.sign(np.linalg.det(rotation)) * (-1 if reflected else 1)
            order = rng.permutation(len(atoms))
            moved = atoms[order]
            moved.set_cell(atoms.cell.array @ rotation.T)
            moved.positions = atoms.positions[order] @ rotation.T + rng.uniform(-5, 5, 3)
            other = predictions(tuned, moved)
            same(other.energy, one.energy)
            same(other.forces, one.forces[order] @ rotation.T)
            assert one.stress is not None
            assert other.stress is not None
            if atoms.pbc.all():
                same(other.stress, rotation @ one.stress @ rotation.T)


def test_forces_and_stress_are_derivatives_of_the_energy(tuned: NetworkBackbone) -> None:
    atoms = crystal()
    prediction = predictions(tuned, atoms)
    assert prediction.stress is not None
    step = 1e-4

    def slope(displaced: Any) -> float:
        plus2, plus, minus, minus2 = (predictions(tuned, displaced(k * step)).energy[0] for k in (2, 1, -1, -2))
        return float((8 * (plus - minus) - (plus2 - minus2)) / (12 * step))

    for atom, axis in ((0, 0), (3, 1), (6, 2)):

        def moved(amount: float, atom: int = atom, axis: int = axis) -> Atoms:
            shifted = atoms.copy()
            shifted.positions[atom, axis] += amount
            return shifted

        assert -slope(moved) == pytest.approx(prediction.forces[atom, axis], rel=1e-6, abs=1e-8)

    def strained(amount: float) -> Atoms:
        strain = np.eye(3)
        strain[0, 1] = strain[1, 0] = amount / 2
        bent = atoms.copy()
        bent.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        return bent

    assert slope(strained) / atoms.get_volume() == pytest.approx(prediction.stress[0, 0, 1], rel=1e-6, abs=1e-8)


def test_batch_equals_one_by_one_and_lone_atoms_have_no_forces(tuned: NetworkBackbone) -> None:
    structures = (cluster(atoms=5), crystal(), Atoms("O"), cluster(seed=9), Atoms("CH", [[0, 0, 0], [0, 0, 30.0]]))
    together = predictions(tuned, *structures)
    alone = [predictions(tuned, atoms) for atoms in structures]
    same(together.energy, np.concatenate([part.energy for part in alone]))
    same(together.forces, np.concatenate([part.forces for part in alone]))
    assert np.array_equal(alone[2].forces, np.zeros((1, 3)))


def test_every_adapter_parameter_receives_a_gradient_and_the_base_none(tuned: NetworkBackbone) -> None:
    batch = build_graphs(tuned, frames_of(crystal()))[0]
    prediction = tuned.predict(batch, create_graph=True)
    (prediction.energy.sum() + prediction.forces.square().sum()).backward()
    adapter = get_adapter(tuned)
    assert adapter is not None
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        parameter.grad = None
    own = {id(parameter) for parameter in adapter.parameters()}
    assert all(p.grad is None for p in tuned.model.parameters() if id(p) not in own)


@pytest.mark.parametrize("mergeable", MERGEABLE, ids=lambda case: f"{case[0]}-{case[1].name}")
def test_merged_weights_equal_the_adapted_model(mergeable: tuple[str, Method]) -> None:
    model = known_model(mergeable[0])
    weights = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    perturb(attach(model, mergeable[1]))
    adapted = predictions(model, cluster(), crystal())
    merge_weights(model)
    merged = predictions(model, cluster(), crystal())
    assert get_adapter(model) is None
    with torch.no_grad():
        for part, parameter in model.model.named_parameters():
            parameter.copy_(weights[part])
    same(merged.energy, adapted.energy)
    same(merged.forces, adapted.forces)
