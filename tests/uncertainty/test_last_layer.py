"""The covariance of the last layer against explicit linear algebra, its features against energies and differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import nequip_models
import sevennet_models
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.backbones.network import NetworkBackbone
from forcetune.deployment.calculator import build_frame
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, evaluation_batches, predict
from forcetune.frames.read import frames_from_atoms
from forcetune.graphs.graph import Batch, build_graph, collate
from forcetune.uncertainty.fit import fit_last_layer
from forcetune.uncertainty.last_layer import (
    Posterior,
    compute_deviations,
    compute_training_gram,
    predict_deviations,
    require_network,
)
from models import ARCHITECTURES, structure
from systems import backbone, labelled, library, perturb

MACE = ("scale-shift", "plain", "biased readout", "last readout only", "odd scalars", "three layers", "one layer")


def batch_of(model: NetworkBackbone, count: int = 2) -> Batch:
    elements = model.elements[:4]
    structures = [structure(elements, atoms=7 + k, seed=k) for k in range(count)]
    return collate([build_graph(build_frame(atoms), model.cutoff, model.dtype) for atoms in structures])


def last_weights(model: Any) -> torch.Tensor:
    parts = []
    for layer in model.model.last_layers:
        parts.append(layer.weight.detach().reshape(-1))
        if getattr(layer, "biased", None):
            parts.append(layer.bias.detach())
    return torch.cat(parts)


def interaction_energy(model: NetworkBackbone, batch: Batch) -> torch.Tensor:
    """Without energies of isolated atoms."""
    model.set_reference_energies(dict.fromkeys(model.elements, 0.0))
    return model.predict(batch).energy


def assert_linear(model: NetworkBackbone, *, shift: float = 0.0) -> None:
    """Energies and forces are the last weights times the features and their derivatives."""
    batch = batch_of(model)
    weights = last_weights(model)
    features = model.readout_features(batch, torch.eye(len(weights)))
    energy = interaction_energy(model, batch) - shift * batch.atoms_per_graph.double()
    torch.testing.assert_close(features.graphs @ weights, energy, rtol=0, atol=1e-10)
    assert features.gradients is not None
    forces = torch.einsum("d,dax->ax", weights, features.gradients)
    torch.testing.assert_close(forces, model.predict(batch).forces, rtol=0, atol=1e-10)
    sums = torch.zeros_like(features.graphs).index_add(0, batch.graph_index, features.atoms)
    torch.testing.assert_close(sums, features.graphs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MACE)
def test_mace_is_linear_in_its_last_weights(name: str) -> None:
    model = backbone(**ARCHITECTURES[name])
    scaling = model.model.scale_shift
    assert_linear(model, shift=0.0 if scaling is None else float(scaling.shift))


@pytest.mark.parametrize("name", [name for name, recipe in sevennet_models.RECIPES.items() if recipe.species != "univ"])
def test_sevennet_is_linear_in_its_last_weights(name: str) -> None:
    recipe = sevennet_models.RECIPES[name]
    head = recipe.modalities[0] if recipe.modalities else None
    assert_linear(sevennet_models.backbone_of(recipe, head=head))


@pytest.mark.parametrize("name", sorted(nequip_models.RECIPES))
def test_nequip_is_linear_in_its_last_weights(name: str) -> None:
    model = nequip_models.backbone_of(nequip_models.RECIPES[name])
    if model.model.pair_potential is not None:
        pytest.skip("its repulsion has no trained weights")
    assert_linear(model)


def test_with_a_low_rank_adapter_the_features_are_those_of_the_adapted_model() -> None:
    model = backbone()
    before = model.readout_features(batch_of(model)).graphs
    adapter = attach(model, method("elora", rank=2))
    perturb(adapter)
    batch = batch_of(model)
    features = model.readout_features(batch)
    assert (features.graphs - before).abs().max() > 1e-3
    adapter.enabled = False
    torch.testing.assert_close(model.readout_features(batch).graphs, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["elora", "mmea", "full"])
def test_force_features_are_differences_of_features(name: str) -> None:
    model = backbone()
    perturb(attach(model, method(name)))
    atoms = structure(model.elements, atoms=8)
    direction = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def compute_features(moved: Any, directions: torch.Tensor | None = None) -> Any:
        return model.readout_features(build_graph(build_frame(moved), model.cutoff, model.dtype), directions)

    features = compute_features(atoms, direction)
    assert features.graphs.shape == (1, 12)
    for atom, axis in ((0, 0), (3, 1), (7, 2)):
        ends = []
        for step in (1e-4, -1e-4):
            moved = atoms.copy()
            moved.positions[atom, axis] += step
            ends.append(direction @ compute_features(moved).graphs[0])
        slope = -(ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close(features.gradients[:, atom, axis], slope, rtol=1e-6, atol=1e-7)


def test_posterior_is_explicit_linear_algebra() -> None:
    random = np.random.default_rng(3)
    rows, features = random.normal(size=(20, 6)), random.normal(size=(4, 6))
    gram, ridge = rows.T @ rows, 0.3
    posterior = Posterior.from_gram(gram, ridge)
    explicit = np.einsum("ni,ij,nj->n", features, np.linalg.inv(gram + ridge * np.eye(6)), features)
    np.testing.assert_allclose(posterior.variance(features), explicit, rtol=1e-12)
    whitened = features @ posterior.whitening.T
    np.testing.assert_allclose((whitened**2).sum(axis=1), explicit, rtol=1e-12)


def test_gram_and_deviations_are_those_of_all_rows_laid_out() -> None:
    model = backbone()
    perturb(attach(model, method("elora", rank=2)))
    graphs = build_graphs(model, frames_from_atoms(labelled(5)).frames)
    size = 12
    (batch,) = evaluation_batches(graphs)
    features = model.readout_features(batch, torch.eye(size))
    assert features.gradients is not None
    predictions = predict(model, graphs)
    atoms = predictions.atoms
    energy_rows = features.graphs.numpy() / atoms[:, None]
    force_rows = features.gradients.numpy().reshape(size, -1).T
    noise_e = np.sqrt(np.mean(((predictions.energy - predictions.energy_label) / atoms) ** 2))
    noise_f = np.sqrt(np.mean((predictions.forces - predictions.forces_label) ** 2))
    rows = np.concatenate([energy_rows / noise_e, force_rows / noise_f])
    gram = compute_training_gram(model, graphs)
    np.testing.assert_allclose(gram, rows.T @ rows, rtol=1e-9, atol=1e-9 * np.abs(gram).max())
    energies_only = compute_training_gram(model, graphs, forces=False)
    np.testing.assert_allclose(energies_only, energy_rows.T @ energy_rows / noise_e**2, rtol=1e-9)

    ridge = 1e-3 * float(np.trace(gram)) / size
    inverse = np.linalg.inv(rows.T @ rows + ridge * np.eye(size))
    with_deviations, energy, forces = predict_deviations(model, graphs, Posterior.from_gram(gram, ridge))
    total = features.graphs.numpy()
    np.testing.assert_allclose(energy, np.sqrt(np.einsum("ni,ij,nj->n", total, inverse, total)), rtol=1e-8)
    assert forces is not None
    variances = np.einsum("ni,ij,nj->n", force_rows, inverse, force_rows)
    np.testing.assert_allclose(forces.ravel(), np.sqrt(variances), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(with_deviations.energy, predictions.energy, rtol=1e-12)
    whitening = torch.from_numpy(Posterior.from_gram(gram, ridge).whitening)
    batch_energy, batch_forces = compute_deviations(model, batch, whitening)
    np.testing.assert_allclose(batch_energy, energy, rtol=1e-10)
    assert batch_forces is not None
    np.testing.assert_allclose(batch_forces, forces, rtol=1e-10)


def test_missing_labels_do_not_count() -> None:
    model = backbone()
    structures = labelled(6)
    without = [atoms.copy() for atoms in structures[:3]]
    for atoms in without:
        atoms.info.clear()
        for name in set(atoms.arrays) - {"numbers", "positions"}:
            del atoms.arrays[name]
    labelled_graphs = build_graphs(model, frames_from_atoms(structures[3:]).frames)
    every_graph = build_graphs(model, [build_frame(atoms) for atoms in without]) + list(labelled_graphs)  # pyright: ignore[reportOperatorIssue]
    np.testing.assert_allclose(
        compute_training_gram(model, every_graph), compute_training_gram(model, labelled_graphs), rtol=1e-9
    )
    with pytest.raises(InputError, match="neither energies nor forces"):
        compute_training_gram(model, build_graphs(model, [build_frame(atoms) for atoms in without]))


def test_the_fit_takes_the_likeliest_ridge_and_calibrates_its_own_frames() -> None:
    model = backbone()
    graphs = build_graphs(model, frames_from_atoms(labelled(10)).frames)
    fitted = fit_last_layer(model, graphs[:5], graphs[5:])
    predictions, energy, forces = predict_deviations(model, graphs[5:], fitted.posterior)
    ratio = (predictions.energy - predictions.energy_label) / energy
    assert fitted.calibrations["energy_per_atom"].scale == pytest.approx(np.sqrt(np.mean(ratio**2)), rel=1e-9)
    assert forces is not None
    ratio = (predictions.forces - predictions.forces_label) / forces
    assert fitted.calibrations["forces"].scale == pytest.approx(np.sqrt(np.mean(ratio**2)), rel=1e-9)


def test_models_with_other_last_layers_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="--trust"):
        require_network(library())
    magnetic = backbone()
    magnetic.extension = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match="spin layer"):
        require_network(magnetic)
    with pytest.raises(InputError, match="spin layer"):
        magnetic.readout_features(batch_of(backbone()))
