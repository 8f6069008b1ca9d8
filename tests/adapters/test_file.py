"""The adapter folder: exact round trip, pinning to its base, damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from forcetune.adapters.attach import Adapter, attach, detach, get_adapter
from forcetune.adapters.config import read_adapter_config
from forcetune.adapters.file import CARD_NAME, CONFIG_NAME, TENSORS_NAME, load_adapter, round_to, save_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from systems import METHODS_FOR_MACE, backbone, cluster, frames_of, perturb, write_model


@pytest.fixture(scope="module")
def model() -> MaceBackbone:
    return backbone(elements=(1, 6, 8))


def forces(model: MaceBackbone) -> np.ndarray:
    return predict(model, build_graphs(model, frames_of(cluster((1, 6, 8))))).forces


def saved(model: MaceBackbone, folder: Path, name: str = "mmea", **options: Any) -> Adapter:
    adapter = attach(model, method(name))
    perturb(adapter)
    save_adapter(model, folder, **options)
    return adapter


@pytest.mark.parametrize("name", METHODS_FOR_MACE)
def test_round_trip_is_exact_and_brings_the_reference_energies(model: MaceBackbone, tmp_path: Path, name: str) -> None:
    before = model.reference_energies
    attach(model, method(name))
    adapter = get_adapter(model)
    assert adapter is not None
    perturb(adapter)
    model.set_reference_energies({1: -13.5, 8: -2041.0})
    expected = forces(model)
    save_adapter(model, tmp_path / "adapter", metrics={"errors": {"test": {"forces_mae_mev_per_ang": 12.0}}})
    detach(model)
    assert model.reference_energies == before
    load_adapter(model, tmp_path / "adapter")
    assert np.array_equal(forces(model), expected)
    assert model.reference_energies == before | {1: -13.5, 8: -2041.0}
    detach(model)
    assert "| test | – | 12 |" in (tmp_path / "adapter" / CARD_NAME).read_text(encoding="utf-8")
    content = (tmp_path / "adapter" / CONFIG_NAME).read_text(encoding="utf-8")
    assert json.dumps(json.loads(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n" == content


def test_tensors_are_named_by_site_update_and_path(model: MaceBackbone, tmp_path: Path) -> None:
    saved(model, tmp_path, "full")
    detach(model)
    stored = load_file(tmp_path / TENSORS_NAME)
    assert stored["interactions.1.linear_up.weight/weight/1o->1o"].shape == (8, 8)
    assert stored["products.0.symmetric_contractions.contractions.0.weights_max/weight/order2"].shape[0] == 3


def test_rounded_adapter_is_what_a_float32_file_holds(model: MaceBackbone, tmp_path: Path) -> None:
    adapter = saved(model, tmp_path / "one", stored_dtype=torch.float32)
    round_to(adapter, torch.float32)
    expected = forces(model)
    detach(model)
    load_adapter(model, tmp_path / "one")
    assert np.array_equal(forces(model), expected)
    detach(model)


def test_same_model_from_another_file_is_recognised_and_another_model_is_not(tmp_path: Path) -> None:
    first = MaceBackbone.load(write_model(tmp_path / "a.model"), sha256="a" * 64)
    saved(first, tmp_path / "adapter", "readout")
    again = MaceBackbone.load(write_model(tmp_path / "b.model"), sha256="b" * 64)
    load_adapter(again, tmp_path / "adapter")
    other = MaceBackbone.load(write_model(tmp_path / "c.model", seed=1), sha256="c" * 64)
    with pytest.raises(InputError, match=r"trained on a, which is not the model given \(c\): fingerprint"):
        load_adapter(other, tmp_path / "adapter")
    assert get_adapter(other) is None
    cut = MaceBackbone.load(write_model(tmp_path / "a.model"), sha256="a" * 64, elements=[1, 6])
    with pytest.raises(InputError, match="elements"):
        load_adapter(cut, tmp_path / "adapter")


def test_damaged_folders_are_told_and_leave_the_model_alone(model: MaceBackbone, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    saved(model, folder, "readout")
    detach(model)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    tensors = load_file(folder / TENSORS_NAME)

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_adapter(model, folder)
        assert get_adapter(model) is None

    for change, message in (
        ({"format_version": 99}, "format version 99"),
        ({"method": {"name": "x", "table": {"linear": [{"update": "Magic"}]}}}, "method table cannot be read"),
        ({"reference_energies_ev": {"Q": 1.0}}, "no elements"),
        ({"trainable": "many"}, "trainable"),
    ):
        (folder / CONFIG_NAME).write_text(json.dumps(config | change), encoding="utf-8")
        refused(message)
    (folder / CONFIG_NAME).write_text("{", encoding="utf-8")
    refused("cannot be read")
    (folder / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")

    first = next(iter(tensors))
    for change, message in (
        ({first: tensors[first][..., :1].repeat(1, 3).contiguous()}, "has shape"),
        ({first: torch.full_like(tensors[first], torch.nan)}, "finite"),
        ({"extra": torch.zeros(1)}, "tensor extra is unknown to the method"),
    ):
        save_file(tensors | change, folder / TENSORS_NAME)
        refused(message)
    content = (folder / TENSORS_NAME).read_bytes()
    (folder / TENSORS_NAME).write_bytes(content[: len(content) // 2])
    refused("cannot be read")
    (folder / CONFIG_NAME).unlink()
    refused(f"holds no {CONFIG_NAME}")


def test_nothing_is_left_when_writing_fails(
    model: MaceBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(model, tmp_path / "adapter", "readout")
    before = read_adapter_config(tmp_path / "adapter")
    adapter = get_adapter(model)
    assert adapter is not None
    perturb(adapter)

    def full_disk(*args: object, **options: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("forcetune.adapters.file.save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_adapter(model, tmp_path / "adapter")
    detach(model)
    assert read_adapter_config(tmp_path / "adapter") == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
