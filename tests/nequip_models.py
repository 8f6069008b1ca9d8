"""Small NequIP models of any kind: recipes that nequip itself makes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forcetune.backbones.nequip.backbone import NequIPBackbone
from forcetune.backbones.nequip.checkpoint import MODEL, content_from_checkpoint
from forcetune.backbones.nequip.configuration import builder_config, read_configuration
from forcetune.backbones.nequip.content import SCALES, SHIFTS
from forcetune.backbones.nequip.network import NequIPNetwork
from forcetune.backbones.protocol import Base
from forcetune.backbones.safe_unpickle.reader import InertFile
from forcetune.kernels.tensors import TensorSource

NEWEST = "0.19.1"
ALL_VERSIONS = ("0.15.0", "0.16.2", "0.17.1", "0.18.0", NEWEST)
_SINCE_16 = ALL_VERSIONS[1:]
_SINCE_17 = ALL_VERSIONS[2:]
_SINCE_18 = ALL_VERSIONS[3:]
FOUR = ("H", "C", "N", "O")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A small model.

    Attributes:
        config: of the model, in JSON's types.
        trainer: class of the training module.
        versions: of nequip that can make it.
        symbols: elements.
    """

    config: Mapping[str, Any]
    trainer: str = "NequIPLightningModule"
    versions: tuple[str, ...] = ALL_VERSIONS
    symbols: tuple[str, ...] = FOUR


_SHIFTS = {"H": -1.5, "C": 0.3, "N": 2.5, "O": -4.0}
_SCALES = {"H": 1.2, "C": 0.7, "N": 1.1, "O": 0.9}
_ZBL = {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal", "chemical_species": list(FOUR)}


def _model(builder: str = "NequIPGNNModel", **options: Any) -> dict[str, Any]:
    small = {
        "_target_": f"nequip.model.{builder}",
        "seed": 3,
        "model_dtype": "float64",
        "type_names": list(FOUR),
        "r_max": 4.0,
        "avg_num_neighbors": 9.5,
        "per_type_energy_shifts": _SHIFTS,
        "per_type_energy_scales": _SCALES,
    }
    if builder == "NequIPGNNModel":
        small |= {"num_layers": 2, "l_max": 1, "num_features": 4, "radial_mlp_depth": 1, "radial_mlp_width": 8}
    return small | options


RECIPES: dict[str, Recipe] = {
    "parity": Recipe(_model(l_max=2, num_layers=3, parity=True)),
    "no parity": Recipe(_model(l_max=2, num_layers=3, parity=False)),
    "features by order": Recipe(
        _model(l_max=3, parity=False, num_features=[5, 3, 2, 2], type_embed_num_features=3, num_layers=3),
        versions=_SINCE_16,
    ),
    "cutoffs by pair": Recipe(
        _model(per_edge_type_cutoff={"H": {"H": 2.5, "C": 3.1}, "C": {"H": 3.1}, "O": {"O": 3.5}})
    ),
    "cutoffs by pair and direction": Recipe(
        _model(per_edge_type_cutoff={"H": 2.5, "C": {"H": 3.8}}, l_max=2, parity=False)
    ),
    "repulsion": Recipe(_model(pair_potential=_ZBL, polynomial_cutoff_p=5, l_max=2, parity=False)),
    "repulsion with an envelope of its own": Recipe(
        _model(pair_potential=_ZBL | {"polynomial_cutoff_p": 4}), versions=_SINCE_17
    ),
    "neighbors by type, one shift": Recipe(
        _model(
            avg_num_neighbors={"H": 7.0, "C": 11.0, "N": 9.0, "O": 8.5},
            per_type_energy_shifts=-2.5,
            per_type_energy_scales=None,
        ),
        versions=_SINCE_16,
    ),
    "neither shift nor scale": Recipe(_model(per_type_energy_shifts=None, per_type_energy_scales=1.7)),
    "everything trained": Recipe(
        _model(
            bessel_trainable=True,
            num_bessels=5,
            radial_mlp_depth=2,
            radial_mlp_width=6,
            per_type_energy_shifts_trainable=True,
            per_type_energy_scales_trainable=True,
        )
    ),
    "network as readout": Recipe(
        _model(readout_mlp_hidden_layers_depth=2, readout_mlp_hidden_layers_width=6, readout_mlp_nonlinearity="mish"),
        versions=_SINCE_17,
    ),
    "several linear readouts": Recipe(
        _model(readout_mlp_hidden_layers_depth=1, readout_mlp_nonlinearity=None), versions=_SINCE_17
    ),
    "all by hand": Recipe(
        _model(
            "FullNequIPGNNModel",
            irreps_edge_sh="1x0e+1x1o+1x2e",
            type_embed_num_features=4,
            feature_irreps_hidden=["3x0o+4x0e+2x1o+2x1e+2x2e"] * 3 + ["5x0e"],
            radial_mlp_depth=[1, 2, 0, 1],
            radial_mlp_width=[8, 6, 4, 8],
            convnet_resnet=True,
            convnet_nonlinearity_scalars={"e": "ssp", "o": "tanh"},
            convnet_nonlinearity_gates={"e": "ssp", "o": "abs"},
        )
    ),
    "no self-connections": Recipe(_model(convnet_sc=False), versions=_SINCE_17),
    "self-connection of the first layer": Recipe(_model(learnable_shift=True), versions=_SINCE_17),
    "preset": Recipe(
        _model("PresetNequIPGNNModel", preset="s", num_features=[4, 3], radial_mlp_width=8), versions=_SINCE_18
    ),
    "averaged": Recipe(_model(l_max=2, parity=False), trainer="EMALightningModule"),
    "single precision": Recipe(_model(l_max=2, model_dtype="float32"), trainer="EMALightningModule"),
    "modified": Recipe(
        {
            "_target_": "nequip.model.modify",
            "modifiers": [{"modifier": "modify_PerTypeScaleShift", "shifts": {"H": -7.0}}],
            "model": _model(per_type_energy_shifts=-2.5),
        }
    ),
    "smallest": Recipe(
        _model(
            type_names=["H", "O"],
            num_layers=1,
            per_type_energy_shifts={"H": -1.5, "O": -4.0},
            per_type_energy_scales={"H": 1.2, "O": 0.9},
        ),
        symbols=("H", "O"),
    ),
    "one element": Recipe(
        _model(type_names=["O"], per_type_energy_shifts=-3.0, per_type_energy_scales=1.5, l_max=2), symbols=("O",)
    ),
}
"""All that forcetune computes, option by option."""


# ---- checkpoints without nequip ------------------------------------------------------------------------------------


def checkpoint(recipe: Recipe, seed: int = 0, version: str = NEWEST) -> dict[str, Any]:
    """A checkpoint with random weights, made without nequip; equal seeds give equal ones."""
    config = copy.deepcopy(dict(recipe.config))
    minor = int(version.split(".")[1])
    described = read_configuration(config, (0, minor))
    architecture, options = described.architecture, builder_config(config)[1]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NequIPNetwork(architecture, architecture.elements, TensorSource(None))
    dtype = getattr(torch, architecture.dtype)
    state: OrderedDict[str, Tensor] = OrderedDict({"run_stage": torch.zeros(1, dtype=torch.long)})
    parameters = dict(network.named_parameters())
    averages: list[Tensor] = []
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        value = (tensor + 0.1 * noise).to(dtype) if name in parameters else tensor
        if name.endswith("norm_const"):
            continue  # nequip does not save it
        if name == "edge_norm._rmax_recip":
            value = _cutoffs(options)
        elif name in (SHIFTS, SCALES):
            value = _of_types(options, "shifts" if name == SHIFTS else "scales")
        state[f"{MODEL}func.{name}"] = value
        if name in parameters:
            averages.append(value + 0.1 * torch.randn(value.shape, generator=generator).to(dtype))
    if architecture.repulsion_power is not None:
        state[f"{MODEL}func.pair_potential.atomic_numbers"] = torch.tensor(architecture.elements, dtype=dtype)
    if recipe.trainer.startswith("EMA"):
        state |= {f"ema.ema_weight_{index}": value for index, value in enumerate(averages)}
        extra: Any = {"decay": 0.99, "num_updates": 3, "is_holding_ema_weights": True}
        state["ema._extra_state"] = extra
    training = {"_target_": f"nequip.train.{recipe.trainer}", "model": copy.deepcopy(config)}
    info = {"versions": {"nequip": version, "torch": "2.13.0"}, "training_module": training, "data": {}, "runs": []}
    return {
        "epoch": 0,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state,
        "hyper_parameters": {"model": config, "info_dict": info, "num_datasets": {"train": 1}},
    }


def _cutoffs(options: Mapping[str, Any]) -> Tensor:
    """1/cutoff, one for all pairs or a table by the type of the center and that of the neighbor."""
    largest, names = options["r_max"], options["type_names"]
    stored = options.get("per_edge_type_cutoff")
    if stored is None:
        return torch.tensor(1 / largest, dtype=torch.float64)
    rows = [stored.get(name, {}) for name in names]
    table = [[row if isinstance(row, float) else row.get(other, largest) for other in names] for row in rows]
    return 1 / torch.tensor(table, dtype=torch.float64).flatten()


def _of_types(options: Mapping[str, Any], what: str) -> Tensor:
    stored = options.get(f"per_type_energy_{what}")
    if stored is None:
        return torch.zeros(0)
    values = [stored[name] for name in options["type_names"]] if isinstance(stored, dict) else [stored]
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def write_checkpoint(path: Path, recipe: Recipe, seed: int = 0, version: str = NEWEST) -> Path:
    """:func:`checkpoint` in a file."""
    torch.save(checkpoint(recipe, seed, version), path)
    return path


def backbone_of(recipe: Recipe, *, seed: int = 0, version: str = NEWEST, **options: Any) -> NequIPBackbone:
    """The backbone of :func:`checkpoint`."""
    content = content_from_checkpoint(InertFile(checkpoint(recipe, seed, version), {}), Path("small.ckpt"))
    base = Base("small", "", content.fingerprint, "unknown")
    return NequIPBackbone.from_content(content, base, **options)


BATTERY = {
    "NequIP, parity": RECIPES["parity"],
    "NequIP, cutoffs by direction": RECIPES["cutoffs by pair and direction"],
    "NequIP, repulsion": RECIPES["repulsion with an envelope of its own"],
}
"""One of each sort, for the elements of ``systems.py``, for tests of everything that works on any backbone."""
