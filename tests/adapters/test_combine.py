"""Several adapters on one base."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forcetune
from forcetune.adapters.attach import attach, detach, get_adapter, merge_weights, reattach, require_adapter
from forcetune.adapters.changes import recorded_gates, weight_changes
from forcetune.adapters.combine import Combination, combine
from forcetune.adapters.file import load_adapter, save_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.network import NetworkBackbone
from forcetune.deployment.ensemble import load_ensemble
from forcetune.deployment.merge import merge
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from forcetune.utils.files import compute_sha256
from systems import backbone, cluster, crystal, frames_of, library, perturb, write_model

EXACT = 1e-10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    adapters = {}
    for seed, name in enumerate(("elora", "sparse", "mmea", "bias")):
        model = backbone()
        perturb(attach(model, method(name)), seed=seed)
        model.set_reference_energies({1: float(seed), 6: 2.0})
        adapters[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(model, adapters[name])
    return adapters


def predictions(model: NetworkBackbone) -> Predictions:
    return predict(model, build_graphs(model, frames_of(cluster(), crystal())), stress=True)


def alone(folder: Path) -> Predictions:
    model = backbone()
    load_adapter(model, folder)
    return predictions(model)


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(actual - expected).max() <= EXACT * np.abs(expected).max()


@pytest.mark.parametrize("make", [library, backbone], ids=["mace", "network"])
def test_switch_disable_and_remove(folders: dict[str, Path], make: Callable[[], NetworkBackbone]) -> None:
    model = make()
    model.base = backbone().base  # that adapters are pinned to
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
        prediction = predictions(tuned)
        references = tuned.reference_energies
        assert references[1] == pytest.approx(model.reference_energies[1] * (1 - 2 * share) + share * (0 + 1))
        plain = backbone()
        with torch.no_grad():
            for name, parameter in plain.model.named_parameters():
                for delta in weights.get(name, []):
                    parameter.add_(share * delta)
        plain.set_reference_energies(references)
        same(prediction.forces, predictions(plain).forces)
        same(prediction.energy, predictions(plain).energy)
        merge_weights(tuned)
        same(predictions(tuned).forces, prediction.forces)


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
    one, other = (predict(model, build_graphs(model, frames_of(a))) for a in (atoms, turned))
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


def test_a_saved_combination_is_what_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    model = backbone()
    made = combine(model, folders)
    for name, scale in zip(folders, (0.7, -0.3, 0.5, 1.0), strict=True):
        made.set_scale(name, scale)
    expected = predictions(model)
    save_adapter(model, tmp_path / "all")
    made.switch("bias")  # what was saved stays as it was
    other = backbone()
    loaded = load_adapter(other, tmp_path / "all")
    same(predictions(other).energy, expected.energy)
    same(predictions(other).forces, expected.forces)
    assert other.reference_energies == pytest.approx({**backbone().reference_energies, **_mixed_references(folders)})
    # also the order, which matters to gates
    assert loaded.coverage() == require_adapter(model).coverage()
    again = tmp_path / "again"
    save_adapter(other, again)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    detach(other)
    same(predictions(other).forces, predictions(backbone()).forces)
    with pytest.raises(InputError, match="is a combination itself"):
        combine(backbone(), {"all": tmp_path / "all"})


def _mixed_references(folders: dict[str, Path]) -> dict[int, float]:
    own = backbone().reference_energies
    scales = dict(zip(folders, (0.7, -0.3, 0.5, 1.0), strict=True))
    references = {}
    for z in (1, 6):
        tuned = {name: float(seed) if z == 1 else 2.0 for seed, name in enumerate(folders)}
        references[z] = own[z] + sum(scale * (tuned[name] - own[z]) for name, scale in scales.items())
    return references


def test_a_saved_combination_is_deployed_and_merged(folders: dict[str, Path], tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.model")
    model = MaceBackbone.load(base)
    members = {}
    for name in ("elora", "sparse"):
        perturb(attach(model, method(name)))
        save_adapter(model, tmp_path / name)
        detach(model)
        members[name] = tmp_path / name
    combine(model, members, average=True)
    save_adapter(model, tmp_path / "both")
    expected = predictions(model)
    structure = cluster()
    structure.calc = forcetune.calculator(base, adapter=tmp_path / "both")
    assert structure.get_potential_energy() == pytest.approx(expected.energy[0], rel=1e-12)
    merge(tmp_path / "both", tmp_path / "tuned.model", model=base)
    same(predictions(MaceBackbone.load(tmp_path / "tuned.model")).forces, expected.forces)
    # one that may not be used alone may not be used in company
    detach(model)
    perturb(attach(model, method("adapter")))
    save_adapter(model, tmp_path / "bottleneck")
    detach(model)
    combine(model, members | {"third": tmp_path / "bottleneck"})
    save_adapter(model, tmp_path / "three")
    with pytest.raises(InputError, match="breaks rotational symmetry"):
        forcetune.calculator(base, adapter=tmp_path / "three")


def test_what_a_combination_changed(folders: dict[str, Path]) -> None:
    model = backbone()
    made = combine(model, {name: folders[name] for name in ("elora", "sparse", "mmea")})
    changes = weight_changes(model)
    # gates change no weights; of the gated method the readouts are trained whole
    assert {name for change in changes for name in change.update.split(" + ")} == {"LowRank", "SoftThreshold", "Dense"}
    assert "LowRank + SoftThreshold" in {change.update for change in changes}
    made.switch("elora")
    alone = backbone()
    load_adapter(alone, folders["elora"])
    expected = {(change.site, change.path): change.relative for change in weight_changes(alone)}
    result = {(change.site, change.path): change.relative for change in weight_changes(model)}
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert max((value for key, value in result.items() if key not in expected), default=0.0) == 0
    made.switch("mmea")
    with recorded_gates(model) as gates:
        predictions(model)
    gated = backbone()
    load_adapter(gated, folders["mmea"])
    with recorded_gates(gated) as single:
        predictions(gated)
    assert [(gate.site, gate.irrep) for gate in gates] == [(f"{gate.site} (mmea)", gate.irrep) for gate in single]
    assert [gate.mean for gate in gates] == pytest.approx([gate.mean for gate in single], abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "needs adapters"),
        ([{"name": "a.b"}], "names without dots"),
        ([{}, {}], "different names"),
        ([{"scale": float("inf")}], "not finite"),
        ([{"method": {"name": "x"}}], "method table cannot be read"),
        ([{"method": "elora"}], r"combination\.0\.method"),
    ],
)
def test_damaged_combinations_are_told(
    folders: dict[str, Path], tmp_path: Path, change: list[dict[str, Any]], message: str
) -> None:
    model = backbone()
    combine(model, {"one": folders["elora"]})
    save_adapter(model, tmp_path / "saved")
    path = tmp_path / "saved" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    (record,) = config["combination"]
    path.write_text(json.dumps(config | {"combination": [record | one for one in change]}), encoding="utf-8")
    other = backbone()
    with pytest.raises(InputError, match=message):
        load_adapter(other, tmp_path / "saved")
    assert get_adapter(other) is None


def test_single_adapters_are_written_as_before(folders: dict[str, Path]) -> None:
    config = json.loads((folders["elora"] / "adapter_config.json").read_text(encoding="utf-8"))
    assert "combination" not in config


def test_a_second_adapter_does_not_go_onto_folded_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """It was 5.7 eV off, without a word."""
    base = write_model(tmp_path / "base.model")
    model = MaceBackbone.load(base, sha256=compute_sha256(base))
    adapter = attach(model, method("readout"))
    perturb(adapter)
    save_adapter(model, tmp_path / "one")
    detach(model)
    mixed = method("mmea")  # gates stay where weights are folded
    perturb(attach(model, mixed))
    save_adapter(model, tmp_path / "two")
    detach(model)
    for first in ("one", "two"):
        folded = forcetune.calculator(base, adapter=tmp_path / first).backbone
        if get_adapter(folded) is not None:
            with pytest.raises(InputError, match="can no longer be saved"):
                save_adapter(folded, tmp_path / "saved")
            detach(folded)
        prediction = predictions(folded)  # pyright: ignore[reportArgumentType]
        one, two = tmp_path / "one", tmp_path / "two"
        for use in (
            partial(load_adapter, folded, one),
            partial(combine, folded, {"one": one}),
            partial(forcetune.calculator, folded, adapter=one),
            partial(load_ensemble, [one, two], folded),
            partial(reattach, folded, adapter),
        ):
            with pytest.raises(InputError, match=r"into whose weights an adapter \(.*\) is folded already"):
                use()
        assert get_adapter(folded) is None
        same(predictions(folded).forces, prediction.forces)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "saved").exists()
    made = combine(model, {"one": tmp_path / "one"})
    merge_weights(model)
    with pytest.raises(InputError, match="is folded already"):
        made.add("another", tmp_path / "one")


def test_an_adapter_trained_on_folded_weights_belongs_to_them(folders: dict[str, Path], tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.model")
    model = MaceBackbone.load(base, sha256=compute_sha256(base))
    perturb(attach(model, method("elora")))
    merge_weights(model)
    model.save(tmp_path / "merged.model")
    perturb(attach(model, method("gain"), seed=3))
    save_adapter(model, tmp_path / "second")
    expected = predictions(model)
    merged = MaceBackbone.load(tmp_path / "merged.model")
    load_adapter(merged, tmp_path / "second")
    same(predictions(merged).forces, expected.forces)
    with pytest.raises(InputError, match="not the model given"):
        load_adapter(MaceBackbone.load(base, sha256=compute_sha256(base)), tmp_path / "second")


def test_bad_input_leaves_the_combination_as_it_was(folders: dict[str, Path]) -> None:
    model = backbone()
    made = combine(model, {"one": folders["elora"]})
    prediction = predictions(model)
    other = backbone(seed=5)
    for name, message in (("one", "take another one"), ("a.b", "take another one"), ("a/b", "take another one")):
        with pytest.raises(InputError, match=message):
            made.add(name, folders["sparse"])
    with pytest.raises(InputError, match="holds no adapter_config"):
        made.add("two", folders["elora"].parent / "nothing")
    same(predictions(model).forces, prediction.forces)
    with pytest.raises(InputError, match="there is no adapter 'two'"):
        made.switch("two")
    with pytest.raises(InputError, match="not the model given"):
        combine(other, {"one": folders["elora"]})
    with pytest.raises(InputError, match="already carries"):
        combine(model, {"one": folders["elora"]})
