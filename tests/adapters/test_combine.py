"""Several adapters on one base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from forcetune.adapters.attach import attach, detach, merge_weights
from forcetune.adapters.combine import Combination, combine
from forcetune.adapters.file import load_adapter, save_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.network import NetworkBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Predictions, graphs_of, predict
from systems import backbone, cluster, crystal, frames_of, library, perturb

EXACT = 1e-10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for seed, name in enumerate(("elora", "sparse", "mmea", "bias")):
        model = backbone()
        perturb(attach(model, method(name)), seed=seed)
        model.set_reference_energies({1: float(seed), 6: 2.0})
        found[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(model, found[name])
    return found


def predictions(model: NetworkBackbone) -> Predictions:
    return predict(model, graphs_of(model, frames_of(cluster(), crystal())), stress=True)


def alone(folder: Path) -> Predictions:
    model = backbone()
    load_adapter(model, folder)
    return predictions(model)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= EXACT * np.abs(expected).max()


@pytest.mark.parametrize("make", [library, backbone], ids=["mace", "network"])
def test_switch_disable_and_remove(folders: dict[str, Path], make: Callable[[], NetworkBackbone]) -> None:
    model = make()
    before = predictions(model)
    made = combine(model, folders)
    for name, folder in folders.items():
        made.switch(name)
        expected = alone(folder)
        same(predictions(model).forces, expected.forces)
        same(predictions(model).energy, expected.energy)
    made.set_scale("bias", 0)
    same(predictions(model).forces, before.forces)
    made.remove("mmea")
    made.switch("sparse")
    same(predictions(model).energy, alone(folders["sparse"]).energy)
    made.detach()
    same(predictions(model).energy, before.energy)


def test_weights_add_and_average_exactly(folders: dict[str, Path]) -> None:
    weights: dict[str, list[torch.Tensor]] = {}
    names = ("elora", "sparse")
    model = backbone()
    for name in names:
        adapter = load_adapter(model, folders[name])
        for site in adapter.sites:
            weight = dict(model.model.named_parameters())[site.name]
            weights.setdefault(site.name, []).append((adapter.effective_weight(site, weight) - weight).detach())
        detach(model)
    for average, share in ((False, 1.0), (True, 0.5)):
        tuned = backbone()
        made = combine(tuned, {name: folders[name] for name in names}, average=average)
        assert made.scales == dict.fromkeys(names, share)
        found = predictions(tuned)
        references = tuned.reference_energies
        assert references[1] == pytest.approx(model.reference_energies[1] * (1 - 2 * share) + share * (0 + 1))
        plain = backbone()
        with torch.no_grad():
            for name, parameter in plain.model.named_parameters():
                for delta in weights.get(name, []):
                    parameter.add_(share * delta)
        plain.set_reference_energies(references)
        same(found.forces, predictions(plain).forces)
        same(found.energy, predictions(plain).energy)
        merge_weights(tuned)
        same(predictions(tuned).forces, found.forces)


def test_a_scale_between_blends_gates_and_keeps_symmetry(folders: dict[str, Path]) -> None:
    model = backbone()
    made = Combination(model)
    made.add("gates", folders["mmea"], scale=0.5)
    made.add("shift", folders["bias"])
    half = predictions(model)
    assert np.abs(half.forces - alone(folders["mmea"]).forces).max() > 1e-6
    atoms = cluster()
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    turned = atoms.copy()
    turned.positions = atoms.positions @ rotation.T
    one, other = (predict(model, graphs_of(model, frames_of(a))) for a in (atoms, turned))
    same(other.energy, one.energy)
    same(other.forces, one.forces @ rotation.T)
    with pytest.raises(InputError, match="depend on the input"):
        merge_weights(model)


def test_a_second_adapter_on_a_merged_first(folders: dict[str, Path], tmp_path: Path) -> None:
    model = backbone()
    load_adapter(model, folders["elora"])
    merge_weights(model)
    merged = predictions(model)
    attach(model, method("sparse"), seed=3)
    stacked = predictions(model)
    detach(model)
    same(predictions(model).forces, merged.forces)
    assert np.abs(stacked.forces - merged.forces).max() > 0


def test_bad_input_leaves_the_combination_as_it_was(folders: dict[str, Path]) -> None:
    model = backbone()
    made = combine(model, {"one": folders["elora"]})
    found = predictions(model)
    other = backbone(seed=5)
    for name, message in (("one", "take another one"), ("a.b", "take another one")):
        with pytest.raises(InputError, match=message):
            made.add(name, folders["sparse"])
    with pytest.raises(InputError, match="holds no adapter_config"):
        made.add("two", folders["elora"].parent / "nothing")
    same(predictions(model).forces, found.forces)
    with pytest.raises(InputError, match="there is no adapter 'two'"):
        made.switch("two")
    with pytest.raises(InputError, match="not the model given"):
        combine(other, {"one": folders["elora"]})
    with pytest.raises(InputError, match="already carries"):
        combine(model, {"one": folders["elora"]})
