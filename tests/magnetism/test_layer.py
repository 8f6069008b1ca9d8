"""Symmetries, derivatives and start of the magnetic layers, on any model and beside any method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation

import forcetune
from forcetune.adapters.attach import attach, detach, disable_adapter, get_adapter, merge_weights, require_adapter
from forcetune.adapters.file import load_adapter, save_adapter
from forcetune.adapters.methods import Method, method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.protocol import Prediction
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.frames.frame import FloatArray, Frame
from forcetune.graphs.graph import Batch, collate
from forcetune.magnetism.layer import SpinLayer, select_half
from forcetune.magnetism.options import Magnetism
from systems import METHODS_FOR_MACE, backbone, cluster, crystal, frames_of, library, perturb

EXACT = 1e-10
LAYERS = {
    "exchange": Magnetism(layer="spin"),
    "spin–orbit": Magnetism(layer="spin", spin_orbit=True),
    "magnitude": Magnetism(layer="magnitude"),
}
MODELS: dict[str, dict[str, Any]] = {
    "scale-shift": {},
    "plain, odd scalars": {"kind": "MACE", "hidden_irreps": "5x0e+5x0o+5x1o+5x1e"},
    "three layers": {"num_interactions": 3},
}


def magnetic(
    model: str = "scale-shift", layer: str = "exchange", name: str = "readout", scale: float = 0.05
) -> MaceBackbone:
    """A model with an adapter and a layer, all of them at random."""
    actual = backbone(**MODELS[model])
    perturb(attach(actual, replace(method(name), magnetism=LAYERS[layer])), scale)
    return actual


def read_spins(atoms: Atoms, seed: int = 7) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((len(atoms), 3))


def frame_with(atoms: Atoms, spins: FloatArray) -> Frame:
    return replace(frames_of(atoms)[0], spins=spins)


def predict(model: MaceBackbone, *frames: Frame) -> Prediction:
    batch = collate(build_graphs(model, frames))
    batch.spins.requires_grad_()
    return model.predict(batch, stress=True).detached()


def same(one: torch.Tensor | None, other: Any) -> None:
    assert one is not None
    other = torch.as_tensor(other)
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= EXACT * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer", ["exchange", "spin–orbit"])
def test_space_and_spins_rotate_together(model: str, layer: str) -> None:
    actual = magnetic(model, layer)
    for atoms in (cluster(), crystal()):
        spins = read_spins(atoms)
        before = predict(actual, frame_with(atoms, spins))
        assert before.moments is not None
        assert before.fields is not None
        assert before.stress is not None
        for inverts in (1, -1):
            rotation = Rotation.random(random_state=5).as_matrix()
            turned = atoms.copy()
            turned.set_cell(atoms.cell.array @ (inverts * rotation).T)
            turned.positions = atoms.positions @ (inverts * rotation).T + [0.3, -0.2, 0.7]
            # spins are axial: the inversion leaves them
            after = predict(actual, frame_with(turned, spins @ rotation.T))
            same(after.energy, before.energy)
            same(after.forces, before.forces @ (inverts * rotation).T)
            same(after.moments, before.moments @ rotation.T)
            same(after.fields, before.fields @ rotation.T)
            same(after.stress, rotation @ before.stress.numpy() @ rotation.T)


@pytest.mark.parametrize("layer", ["exchange", "spin–orbit"])
def test_time_reversal(layer: str) -> None:
    model = magnetic(layer=layer)
    spins = read_spins(crystal())
    before, after = (predict(model, frame_with(crystal(), sign * spins)) for sign in (1, -1))
    assert before.moments is not None
    assert before.fields is not None
    same(after.energy, before.energy)
    same(after.forces, before.forces)
    same(after.moments, -before.moments)
    same(after.fields, -before.fields)


def test_spins_alone_rotate_only_without_spin_orbit_terms() -> None:
    spins = read_spins(crystal())
    rotation = Rotation.random(random_state=9).as_matrix()
    energies = {}
    for layer in ("exchange", "spin–orbit"):
        model = magnetic(layer=layer)
        before, after = (predict(model, frame_with(crystal(), s)) for s in (spins, spins @ rotation.T))
        energies[layer] = float((after.energy - before.energy).abs())
        if layer == "exchange":
            assert before.moments is not None
            same(after.energy, before.energy)
            same(after.forces, before.forces)
            same(after.moments, before.moments @ rotation.T)
    assert energies["spin–orbit"] > 1e-4


@pytest.mark.parametrize("layer", LAYERS)
def test_order_of_atoms_and_company_in_a_batch_do_not_matter(layer: str) -> None:
    model = magnetic(layer=layer)
    atoms, order = crystal(), np.random.default_rng(1).permutation(8)
    spins = read_spins(atoms)
    before = predict(model, frame_with(atoms, spins))
    other = predict(model, frame_with(cluster(), read_spins(cluster())), frame_with(atoms[order], spins[order]))
    assert other.moments is not None
    assert before.moments is not None
    same(other.energy[1:], before.energy)
    same(other.forces[9:], before.forces[torch.as_tensor(order)])
    same(other.moments[9:], before.moments[torch.as_tensor(order)])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer", ["exchange", "spin–orbit"])
def test_forces_stress_and_fields_are_derivatives(model: str, layer: str) -> None:
    actual = magnetic(model, layer)
    atoms = crystal()
    spins = read_spins(atoms)
    prediction = predict(actual, frame_with(atoms, spins))
    assert prediction.fields is not None
    assert prediction.stress is not None
    step = 2e-4

    def energy(
        moved: FloatArray | float = 0.0, turned: FloatArray | float = 0.0, strain: FloatArray | float = 0.0
    ) -> float:
        there = atoms.copy()
        there.positions += moved
        there.set_cell(there.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        return float(predict(actual, frame_with(there, spins + turned)).energy)

    def slope(name: str, direction: FloatArray) -> float:
        """Fourth order in the step."""
        one, two = ([energy(**{name: s * k * step * direction}) for s in (1, -1)] for k in (1, 2))
        return (8 * (one[0] - one[1]) - (two[0] - two[1])) / (12 * step)

    for atom, axis in ((0, 0), (3, 1), (7, 2)):
        change = np.zeros((8, 3))
        change[atom, axis] = 1.0
        assert float(prediction.forces[atom, axis]) == pytest.approx(-slope("moved", change), rel=1e-7, abs=1e-9)
        assert float(prediction.fields[atom, axis]) == pytest.approx(-slope("turned", change), rel=1e-7, abs=1e-9)
    for row, column in ((0, 0), (1, 2)):
        strain = np.zeros((3, 3))
        strain[row, column] += 0.5
        strain[column, row] += 0.5
        stress = slope("strain", strain) / atoms.get_volume()
        assert float(prediction.stress[0, row, column]) == pytest.approx(stress, rel=1e-7, abs=1e-10)


def test_the_dzyaloshinskii_moriya_term_vanishes_where_symmetry_forbids_it() -> None:
    model = magnetic(layer="spin–orbit")
    part = require_adapter(model).magnetic
    assert part is not None
    layer = part.layer
    assert isinstance(layer, SpinLayer)
    with torch.no_grad():  # nothing but this term, and moments as given
        last = layer.pair[-1]
        assert isinstance(last, torch.nn.Linear)
        for index, name in enumerate(layer.names):
            if name not in ("d", "w"):
                last.weight[index] = 0
                last.bias[index] = 0
        for parameter in layer.site.parameters():
            parameter.zero_()
    spins = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, 0, 0]])
    pair = Atoms("O2H", [[0, 0, 0], [1.9, 0, 0], [0.95, 0, 2.0]])
    straight = Atoms("O2H", [[0, 0, 0], [1.9, 0, 0], [30.0, 0, 0]])
    for atoms, allowed in ((pair, True), (straight, False)):
        one = predict(model, frame_with(atoms, spins))
        other = predict(model, frame_with(atoms, spins[[1, 0, 2]]))
        difference = float((one.energy - other.energy).abs())
        # exchanging the two spins changes the sign of their cross product
        assert (difference > 1e-6) is allowed
        if not allowed:
            assert difference < 1e-12


@pytest.mark.parametrize("name", sorted(METHODS_FOR_MACE))
def test_any_method_starts_at_the_foundation_model_and_is_removed_exactly(name: str) -> None:
    model = backbone()
    frame = frame_with(crystal(), read_spins(crystal()))
    plain = predict(model, frame)
    without = None
    for layer in (None, LAYERS["spin–orbit"]):
        attach(model, replace(method(name), magnetism=layer), seed=3)
        prediction = predict(model, frame)
        if layer is None:
            without = prediction
        detach(model)
    assert without is not None
    same(prediction.energy, without.energy)
    same(prediction.forces, without.forces)
    same(prediction.moments, frame.spins)
    after = predict(model, frame)
    assert torch.equal(after.energy, plain.energy)
    assert after.moments is None
    assert model.extension is None


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["mmea", "sparse", "full"])
def test_adapters_with_a_layer_are_saved_and_loaded(tmp_path: Path, layer: str, name: str) -> None:
    model = magnetic(layer=layer, name=name)
    frame = frame_with(crystal(), read_spins(crystal()))
    prediction = predict(model, frame)
    save_adapter(model, tmp_path / "adapter")
    with disable_adapter(model):
        assert predict(model, frame).moments is None
    detach(model)
    load_adapter(model, tmp_path / "adapter")
    again = predict(model, frame)
    assert torch.equal(again.energy, prediction.energy)
    assert torch.equal(again.forces, prediction.forces)
    assert again.moments is not None
    assert torch.equal(again.moments, torch.as_tensor(prediction.moments))
    with pytest.raises(InputError, match="magnetic layer"):
        merge_weights(model)
    detach(model)
    with pytest.raises(InputError, match="magnetic layer"):
        forcetune.combine(model, {"one": tmp_path / "adapter"})
    assert get_adapter(model) is None


@pytest.mark.parametrize("model", MODELS)
def test_nothing_changes_by_our_network_and_every_gradient_is_the_librarys(model: str) -> None:
    results = []
    for make in (library, backbone):
        actual = make(**MODELS[model])
        perturb(attach(actual, replace(method("mmea"), magnetism=LAYERS["spin–orbit"])), 0.1)
        batch = collate(build_graphs(actual, [frame_with(a, read_spins(a)) for a in (cluster(), crystal())]))
        prediction = actual.predict(batch, stress=True, create_graph=True)
        assert prediction.stress is not None
        assert prediction.moments is not None
        loss = prediction.energy.square().sum() + prediction.forces.square().sum() + prediction.stress.square().sum()
        (loss + prediction.moments.pow(3).sum()).backward()
        results.append((prediction.detached(), [p.grad for p in require_adapter(actual).parameters()]))
    (slow, slow_grads), (fast_found, fast_grads) = results
    for one, other in zip(fast_found[:4], slow[:4], strict=True):
        same(one, other)
    for one, other in zip(fast_grads, slow_grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            same(one, other)


def test_every_coefficient_of_the_spin_orbit_terms_learns() -> None:
    """The Dzyaloshinskii–Moriya term is a product of two coefficients: one of them must not start at zero."""
    model = backbone()
    plain = model.predict(collate(build_graphs(model, frames_of(cluster())))).energy.detach()
    layer: Any = attach(model, replace(method("readout"), magnetism=LAYERS["spin–orbit"])).magnetic
    batch = collate(build_graphs(model, [frame_with(cluster(), read_spins(cluster()))]))
    same(model.predict(batch).energy.detach(), plain)
    last = layer.layer.pair[-1]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        prediction = model.predict(batch, create_graph=True)
        assert prediction.moments is not None
        ((prediction.energy - plain - 1.0).square().sum() + (prediction.moments - 1.0).square().sum()).backward()
        optimizer.step()
    largest = dict(zip(layer.layer.names, last.weight.grad.abs().amax(dim=1).tolist(), strict=True))
    assert min(largest.values()) > 0, largest


def test_every_pair_is_counted_once() -> None:
    model = backbone()
    (graph,) = build_graphs(model, frames_of(crystal()))
    half = select_half(graph)
    assert 2 * len(half) == graph.n_edges
    pair_keys = _keys(graph)[half.numpy()]
    reverse = np.concatenate((pair_keys[:, [1, 0]], -pair_keys[:, 2:]), axis=1)
    assert len({*map(tuple, pair_keys), *map(tuple, reverse)}) == graph.n_edges


def _keys(graph: Batch) -> np.ndarray:
    return np.concatenate((graph.edge_index.T.numpy(), graph.unit_shifts.numpy()), axis=1).astype(int)


def test_no_spins_means_no_moments_and_no_magnetic_energy() -> None:
    model = magnetic(layer="spin–orbit", name="readout")
    (frame,) = frames_of(crystal())
    prediction = predict(model, frame)
    same(prediction.moments, np.zeros((8, 3)))
    part = require_adapter(model)
    model.extension = None
    same(predict(model, frame).energy, prediction.energy)
    model.extension = part.magnetic


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layer": "moment"}, "layer"),
        ({"channels": 10**9}, "channels"),
        ({"spin_orbit": "yes"}, "spin_orbit"),
        ({"inputs": 3}, "inputs"),
        ({"other": 1}, "option"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": 10**400}, "learning_rate"),
    ],
)
def test_layers_of_files_are_checked(change: dict[str, Any], word: str) -> None:
    table = replace(method("readout"), magnetism=Magnetism()).to_json()
    assert Method.from_json(table).magnetism == Magnetism()
    table["magnetism"] |= change
    with pytest.raises(InputError, match=word):
        Method.from_json(table)
