"""SevenNet checkpoints that forcetune does not compute, or that are damaged: refused in a sentence."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forcetune.backbones.registry import library_of_file
from forcetune.backbones.sevennet.backbone import SevenNetBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from sevennet_models import RECIPES, checkpoint, structures, write_checkpoint
from systems import frames_of
from terminal import Command

NAMES = ("parity, fully connected", "modalities, all by modality")
ORIGINAL = {name: checkpoint(RECIPES[name]) for name in NAMES}


def written(folder: Path, change: Callable[[dict[str, Any]], None], name: str = NAMES[0]) -> Path:
    content = copy.deepcopy(ORIGINAL[name])
    change(content)
    torch.save(content, folder / "changed.pth")
    return folder / "changed.pth"


def changed(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["config"].update({key: value})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("use_dispersion", True, "the option 'use_dispersion', which forcetune does not know"),
        ("interaction_type", "mace", "interactions are of the type 'mace'"),
        ("radial_basis", {"radial_basis_name": "gaussian"}, "its radial basis is"),
        ("cutoff_function", {"cutoff_function_name": "cosine"}, "its cutoff function is"),
        ("self_connection_type", "gated", "its self-connections are 'gated'"),
        ("act_radial", "gelu", "its activation is 'gelu', which is none of"),
        ("optimize_by_reduce", False, "optimize_by_reduce = False"),
        ("cuequivariance_config", {"use": True}, "trained with cuEquivariance, whose layout"),
        ("use_flash_tp", True, "trained with FlashTP, whose layout"),
        ("use_oeq", True, "trained with OpenEquivariance, whose layout"),
        ("channel", 5, "shape of"),
        ("lmax", 9, "its lmax is 9"),
        ("lmax_edge", 10**9, "its lmax_edge is 1000000000"),
        ("num_convolution_layer", 10**6, "its num_convolution_layer is 1000000"),
        ("_type_map", {8: 0, 72: 2}, "its _type_map has gaps"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    tmp_path: Path, command: Command, key: str, value: Any, words: str
) -> None:
    file = written(tmp_path, changed(key, value))
    code, _, err = command("methods", "--model", file)
    assert code == 2
    assert words in err
    assert f"{file} cannot be rebuilt" in err or "cannot be rebuilt" in err


def test_checkpoints_converted_for_an_accelerator_are_refused_by_what_they_hold(tmp_path: Path) -> None:
    def convert(content: dict[str, Any]) -> None:
        content["model_state_dict"]["0_convolution.convolution.f.tp.f_fx.module.c"] = torch.ones(3)

    with pytest.raises(InputError, match=r"no place for its tensor 0_convolution\.convolution\.f\.tp"):
        SevenNetBackbone.load(written(tmp_path, convert))


def test_a_missing_option_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its configuration has no 'cutoff'"):
        SevenNetBackbone.load(written(tmp_path, lambda content: content["config"].pop("cutoff")))
    name = "1_self_interaction_2.linear.weight"
    with pytest.raises(InputError, match=rf"it has no {name}"):
        SevenNetBackbone.load(written(tmp_path, lambda content: content["model_state_dict"].pop(name)))


def test_heads_are_named(tmp_path: Path) -> None:
    several = write_checkpoint(tmp_path / "several.pth", RECIPES[NAMES[1]])
    with pytest.raises(InputError, match=r"several has the modalities a, b, c .*choose one with --head, such as"):
        SevenNetBackbone.load(several)
    with pytest.raises(InputError, match=r"no modality 'PBE'; it has a, b, c"):
        SevenNetBackbone.load(several, head="PBE")
    one = write_checkpoint(tmp_path / "one.pth", RECIPES[NAMES[0]])
    with pytest.raises(InputError, match=r"one has no modalities, and so no head 'PBE'; leave --head out"):
        SevenNetBackbone.load(one, head="PBE")
    assert SevenNetBackbone.load(several, head="b").head == "b"


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    torch.save({"model_state_dict": {}, "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="is no checkpoint of sevenn"):
        SevenNetBackbone.load(tmp_path / "other.pth")
    file = write_checkpoint(tmp_path / "one.pth", RECIPES[NAMES[0]])
    assert library_of_file(file) == "sevennet"


STRANGE: tuple[Any, ...] = (
    *(None, True, "x", "", -1, 0, 10**9, 2**70, 1e308, float("nan"), float("inf"), -2.5),
    *([], [[]], ["x"] * 4, {}, {"a": 1}, {1: "b"}, {0: 0}, (1, 2), b"y", 1j),
)


def readings(folder: Path, name: str) -> list[tuple[str, Any, float]]:
    """Each option with each strange value: a model that computes, or a sentence; and how long that took."""
    result = []
    for key in ORIGINAL[name]["config"]:
        for value in STRANGE:
            start = time.monotonic()
            file = written(folder, changed(key, value), name)
            try:
                model = SevenNetBackbone.load(file, head=next(iter(RECIPES[name].modalities), None))
                frames = frames_of(*structures(RECIPES[name].symbols)[:1])
                predict(model, build_graphs(model, frames), stress=True)
            except InputError as error:
                assert len(str(error)) < 500 + len(str(file))
            result.append((key, value, time.monotonic() - start))
    return result


@pytest.mark.parametrize("name", NAMES)
def test_wrong_values_give_a_sentence_or_a_model(tmp_path: Path, name: str) -> None:
    for key, value, seconds in readings(tmp_path, name):
        assert seconds < 20, (key, value)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_tensors_give_a_sentence(tmp_path: Path, name: str) -> None:
    head = next(iter(RECIPES[name].modalities), None)
    damages: dict[str, Callable[[torch.Tensor], Any]] = {
        "longer": lambda tensor: torch.cat([tensor.flatten(), torch.ones(2)]),
        "empty": lambda tensor: tensor.flatten()[:0],
        "one number": lambda _: torch.tensor(1.0),
        "whole numbers": lambda tensor: tensor.long(),
        "complex": lambda tensor: tensor.to(torch.complex64),
        "not a number": lambda tensor: tensor * float("nan"),
        "no tensor": lambda _: "weights",
        "more dimensions": lambda tensor: tensor.expand(2, *tensor.shape).clone(),
    }
    for key in ORIGINAL[name]["model_state_dict"]:
        for label, damage in damages.items():

            def change(content: dict[str, Any], key: str = key, damage: Callable[..., Any] = damage) -> None:
                content["model_state_dict"][key] = damage(content["model_state_dict"][key])

            file = written(tmp_path, change, name)
            try:
                SevenNetBackbone.load(file, head=head)
            except InputError as error:
                assert "cannot be rebuilt" in str(error), (key, label)
            else:
                pytest.fail(f"{key}, {label}: was read")
