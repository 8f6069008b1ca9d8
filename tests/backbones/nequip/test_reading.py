"""NequIP files that forcetune does not compute, or that are damaged, are refused in a sentence; no code runs."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forcetune
from forcetune.backbones import registry
from forcetune.backbones.nequip.backbone import NequIPBackbone
from forcetune.backbones.nequip.checkpoint import MODEL
from forcetune.backbones.registry import find, library_of_file, list_models
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.utils.files import compute_sha256
from loopback import Content, Loopback
from nequip_models import RECIPES, checkpoint, write_checkpoint
from nequip_oracle import NequIPs
from sevennet_models import structures
from systems import frames_of
from terminal import Command

NAMES = ("repulsion", "averaged")
ORIGINAL = {name: checkpoint(RECIPES[name]) for name in NAMES}
Change = Callable[[dict[str, Any]], Any]


def written(folder: Path, change: Change, name: str = NAMES[0]) -> Path:
    content = copy.deepcopy(ORIGINAL[name])
    change(content)
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def option(key: str, value: Any) -> Change:
    return lambda content: content["hyper_parameters"]["model"].update({key: value})


ZBL = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": ["H", "C", "N", "O"]}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("attention", True, "the option 'attention', which forcetune does not know"),
        ("_target_", "allegro.model.AllegroModel", "is built by 'allegro.model.AllegroModel'"),
        ("_target_", "nequip.model.ModelFromPackage", "nequip-package"),
        ("type_names", ["H", "C", "N", "X1"], "its atom type 'X1' is not named after an element"),
        ("type_names", ["H", "C", "N", "N"], "several atom types of one element"),
        ("convnet_nonlinearity_type", "norm", "nonlinearity is of the type 'norm'"),
        ("convnet_nonlinearity_scalars", {"e": "silu", "o": "abs"}, "odd scalars go through abs"),
        ("categorical_graph_field_embed", [{"field": "charge"}], "fields of whole graphs"),
        ("pair_potential", {"_target_": "nequip.nn.pair_potential.LennardJones"}, "and only ZBL is computed"),
        ("pair_potential", ZBL | {"units": "real"}, "in the units 'real'"),
        ("readout_mlp_nonlinearity", "relu", "'relu', which is none of"),
        ("avg_num_neighbors", None, "its avg_num_neighbors is None"),
        ("num_features", 5, "shape of"),
        ("l_max", 9, "its l_max is 9"),
        ("num_layers", 10**6, "its num_layers is 1000000"),
        ("r_max", 5.0, "are divided by 4 Å, not by its r_max of 5.0 Å"),
        ("model_dtype", "bfloat16", "its model_dtype is 'bfloat16'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    tmp_path: Path, command: Command, key: str, value: Any, words: str
) -> None:
    file = written(tmp_path, option(key, value))
    assert library_of_file(file) == "nequip"
    with pytest.raises(InputError) as caught:
        NequIPBackbone.load(file)
    assert words in str(caught.value)
    assert "cannot be rebuilt" in str(caught.value)
    code, _, err = command("methods", "--model", file)
    assert code == 2
    assert words[:20] in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["hyper_parameters"]["info_dict"]["versions"].update(nequip="0.20.0"), "0.13 to 0.19"),
        (lambda c: c["hyper_parameters"]["info_dict"]["versions"].update(nequip="new"), "which is not supported"),
        (
            lambda c: c["hyper_parameters"]["info_dict"]["training_module"].update(_target_="x.ScheduleFreeModule"),
            "whose weights are not those of the model",
        ),
        (lambda c: c["hyper_parameters"]["model"].pop("r_max"), "its configuration has no 'r_max'"),
        (lambda c: c["state_dict"].update({"model.other.model.func.w": torch.ones(1)}), "several models"),
        (lambda c: c["state_dict"].update({f"{MODEL}func.more": torch.ones(3)}), "no place for its tensor more"),
        (
            lambda c: c["state_dict"].pop(f"{MODEL}func.layer1_convnet.conv.sc.weight"),
            "it has no layer1_convnet.conv.sc.weight",
        ),
    ],
)
def test_other_checkpoints_are_refused_by_name(tmp_path: Path, change: Change, words: str) -> None:
    with pytest.raises(InputError, match=r"cannot be rebuilt") as caught:
        NequIPBackbone.load(written(tmp_path, change))
    assert words in str(caught.value)


def test_averages_are_the_model(tmp_path: Path) -> None:
    """nequip uses averaged weights where there are some; those that do not belong to the parameters are refused."""
    state = ORIGINAL["averaged"]["state_dict"]
    backbone = NequIPBackbone.load(written(tmp_path, lambda _: None, "averaged"))
    assert torch.equal(backbone.model.type_embed.embed_module.weight.detach(), state["ema.ema_weight_0"])
    for change, words in (
        (lambda c: c["state_dict"].pop("ema.ema_weight_3"), "averaged weights are not those"),
        (lambda c: c["state_dict"].update({"ema.ema_weight_2": torch.ones(2)}), "averaged weights are not those"),
        (lambda c: c["state_dict"]["ema._extra_state"].update(is_holding_ema_weights=False), "not where they should"),
    ):
        with pytest.raises(InputError, match=words):
            NequIPBackbone.load(written(tmp_path, change, "averaged"))


def test_there_are_no_heads(tmp_path: Path, command: Command) -> None:
    file = write_checkpoint(tmp_path / "one.ckpt", RECIPES[NAMES[0]])
    with pytest.raises(InputError, match=r"has no heads, so none is 'PBE'; leave --head out"):
        NequIPBackbone.load(file, head="PBE")
    with pytest.raises(InputError, match=r"does not know the element Fe"):
        NequIPBackbone.load(file, elements=[1, 26])


def test_published_models_have_addresses_and_checksums() -> None:
    model = find("NequIP-OAM-L")
    assert model is not None
    assert model.library == "nequip"
    assert model.url == "https://zenodo.org/records/18775904/files/NequIP-OAM-L-0.1.nequip.zip"
    assert model.sha256 is not None and model.sha256.startswith("5d01a4fab228abb3")
    assert model.file == "NequIP-OAM-L-0.1.nequip.zip"
    assert model.licence == "CC-BY-4.0"


# ---- hostile files -------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled by the usual means, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_published_models_are_downloaded_by_their_name(
    nequips: NequIPs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a mirror on this machine, with a small package in the place of the published one."""
    published = find("nequip-oam-l")
    assert published is not None
    source = nequips.make(["smallest"])[0].package
    small = dataclasses.replace(published, sha256=compute_sha256(source))
    others = [model for model in list_models() if model.name != small.name]
    monkeypatch.setattr(registry, "PUBLISHED_MODELS", (*others, small))
    monkeypatch.setenv("FORCETUNE_HOME", str(tmp_path))
    with Loopback({f"/{published.file}": Content(source.read_bytes())}) as server:
        monkeypatch.setenv("FORCETUNE_MODELS_URL", server.url)
        model = forcetune.load("NequIP-OAM-L", elements=[1, 8])
        assert [address for address, _ in server.requests] == ["/NequIP-OAM-L-0.1.nequip.zip"]
        monkeypatch.setattr(registry, "PUBLISHED_MODELS", (*others, published))
        with pytest.raises(InputError, match="is not the published one"):
            forcetune.load("nequip-oam-l")
    assert (model.base.name, model.base.licence) == ("nequip-oam-l", "CC-BY-4.0")
    assert model.elements == (1, 8)
    expected = NequIPBackbone.load(source)
    assert model.base.fingerprint == expected.base.fingerprint
    frames = frames_of(*structures(("H", "O"))[:2])
    one, other = (predict(each, build_graphs(each, frames)) for each in (model, expected))
    assert np.array_equal(one.energy, other.energy)
    assert np.array_equal(one.forces, other.forces)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    file = written(tmp_path, lambda content: content["hyper_parameters"].update(extra=Bomb(mark)))
    assert NequIPBackbone.load(file).elements == (1, 6, 7, 8)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()
    with pytest.raises(InputError, match="cannot be rebuilt"):
        NequIPBackbone.load(written(tmp_path, option("r_max", Bomb(mark))))


STRANGE: tuple[Any, ...] = (
    *(None, True, "x", "", -1, 0, 10**9, 2**70, 1e308, float("nan"), float("inf"), -2.5),
    *([], [[]], ["x"] * 4, {}, {"a": 1}, {1: "b"}, (1, 2), b"y", 1j),
)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_values_give_a_sentence_or_a_model(tmp_path: Path, name: str) -> None:
    keys = [*ORIGINAL[name]["hyper_parameters"]["model"], "per_edge_type_cutoff", "readout_mlp_hidden_layers_depth"]
    for key in keys:
        for value in STRANGE:
            start = time.monotonic()
            file = written(tmp_path, option(key, value), name)
            try:
                model = NequIPBackbone.load(file)
                frames = frames_of(*structures(RECIPES[name].symbols)[:1])
                predict(model, build_graphs(model, frames), stress=True)
            except InputError as error:
                assert len(str(error)) < 600 + len(str(file))
            assert time.monotonic() - start < 20, (key, value)


def test_damaged_tensors_give_a_sentence(tmp_path: Path) -> None:
    damages: dict[str, Callable[[torch.Tensor], Any]] = {
        "longer": lambda tensor: torch.cat([tensor.flatten(), torch.ones(2)]),
        "whole numbers": lambda tensor: tensor.long(),
        "complex": lambda tensor: tensor.to(torch.complex64),
        "not a number": lambda tensor: tensor * float("nan"),
        "no tensor": lambda _: "weights",
        "more dimensions": lambda tensor: tensor.expand(2, *tensor.shape).clone(),
    }
    keys = [key for key in ORIGINAL[NAMES[0]]["state_dict"] if key.startswith(MODEL)]
    for key in keys:
        for label, damage in damages.items():

            def change(content: dict[str, Any], key: str = key, damage: Callable[..., Any] = damage) -> None:
                content["state_dict"][key] = damage(content["state_dict"][key])

            with pytest.raises(InputError, match="cannot be rebuilt"):
                NequIPBackbone.load(written(tmp_path, change))
                pytest.fail(f"{key}, {label}: was read")


def repacked(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of a package with other members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def test_code_in_a_package_does_not_run(nequips: NequIPs, tmp_path: Path) -> None:
    """Neither that of modules, which a package brings with it, nor what a pickle calls."""
    (made,) = nequips.make(["parity"])
    mark = tmp_path / "ran"
    program = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n".encode()

    def poison(name: str, content: bytes) -> bytes:
        return program + content if name.endswith(".py") else content

    file = repacked(made.package, tmp_path / "poisoned.nequip.zip", poison)
    trusted, honest = NequIPBackbone.load(file, trust=True), NequIPBackbone.load(made.package)
    assert trusted.base.fingerprint == honest.base.fingerprint
    assert not mark.exists()

    def replace(name: str, content: bytes) -> bytes:
        return pickle.dumps(Bomb(mark), protocol=3) if name.endswith("eager_model.pkl") else content

    with pytest.raises(InputError, match="cannot be rebuilt"):
        NequIPBackbone.load(repacked(made.package, tmp_path / "called.nequip.zip", replace))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"nequip.nn.interaction_block", b"nequiq.nn.interaction_block", "nequiq.nn.interaction_block"),
        (b"InteractionBlock", b"InteractionBlocc", "InteractionBlocc, not a InteractionBlock"),
        (b"torch.nn.modules.activation\nSiLU", b"torch.nn.modules.activation\nReLU", "layers"),
        (b"component", b"integral_", "the normalization 'integral_'"),
        (b"torch.nn.functional\nsilu", b"torch.nn.functional\nrelu", "are 'relu'"),
    ],
)
def test_other_packages_are_refused_by_name(
    nequips: NequIPs, tmp_path: Path, old: bytes, new: bytes, words: str
) -> None:
    (made,) = nequips.make(["parity"])

    def change(name: str, content: bytes) -> bytes:
        if name.endswith("eager_model.pkl"):
            assert old in content
            return content.replace(old, new)
        return content

    with pytest.raises(InputError, match="cannot be rebuilt") as caught:
        NequIPBackbone.load(repacked(made.package, tmp_path / "changed.nequip.zip", change))
    assert words in str(caught.value)


def test_damaged_packages_give_a_sentence(nequips: NequIPs, tmp_path: Path) -> None:
    (made,) = nequips.make(["parity"])

    def without(*parts: str) -> Callable[[str, bytes], bytes | None]:
        return lambda name, content: None if any(part in name for part in parts) else content

    def of_version(version: bytes) -> Callable[[str, bytes], bytes | None]:
        old = b"nequip: 0.19.1"
        return lambda name, content: content.replace(old, version) if name.endswith("metadata.txt") else content

    for change, words in (
        (without("12.storage"), "missing from the archive"),
        (without("package_metadata"), "holds no model/package_metadata.txt"),
        (of_version(b"nequip: 0.20.0"), "0.13 to 0.19"),
        (of_version(b"nequip: [1"), "cannot be read"),
        (lambda name, content: content[:900] if name.endswith("eager_model.pkl") else content, "."),
        (lambda name, content: content[:4] if name.endswith("/12.storage") else content, "."),
    ):
        with pytest.raises(InputError, match=words):
            NequIPBackbone.load(repacked(made.package, tmp_path / "changed.nequip.zip", change))
    data = made.package.read_bytes()
    (tmp_path / "cut.nequip.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError):
        NequIPBackbone.load(tmp_path / "cut.nequip.zip")


def test_other_files_are_neither(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="is no checkpoint of nequip"):
        NequIPBackbone.load(tmp_path / "other.ckpt")
