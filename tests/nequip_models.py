"""Small NequIP models of any kind: recipes that nequip itself makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    "one element": Recipe(
        _model(type_names=["O"], per_type_energy_shifts=-3.0, per_type_energy_scales=1.5, l_max=2), symbols=("O",)
    ),
}
"""All that forcetune computes, option by option."""
