"""The architecture of a NequIP model from the configuration that a training checkpoint carries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forcetune.backbones.nequip.architecture import (
    LARGEST,
    NequIPArchitecture,
    checked_harmonics,
    checked_irreps,
    convolution_activations,
    elements_from_names,
    flag,
    positive,
    reachable,
    scalar_activation,
    whole,
)
from forcetune.irreps import parse_irreps
from forcetune.kernels.tensors import UnfitError
from forcetune.utils.parsing import short

_BUILDERS = {
    "NequIPGNNModel": "simple",
    "NequIPGNNEnergyModel": "simple",
    "PresetNequIPGNNModel": "preset",
    "FullNequIPGNNModel": "full",
    "FullNequIPGNNEnergyModel": "full",
}
_HOMES = ("nequip.model", "nequip.model.nequip_models")
_IGNORED = frozenset(("seed", "compile_mode", "do_derivatives"))
_SIMPLE = frozenset(
    ("num_layers", "l_max", "parity", "num_features", "type_embed_num_features", "radial_mlp_depth", "radial_mlp_width")
)
_FULL = frozenset(
    ("irreps_edge_sh", "feature_irreps_hidden", "type_embed_num_features", "radial_mlp_depth", "radial_mlp_width")
)
_COMMON = frozenset(
    (
        *("model_dtype", "r_max", "type_names", "per_edge_type_cutoff", "num_bessels", "bessel_trainable"),
        *("polynomial_cutoff_p", "avg_num_neighbors", "per_type_energy_scales", "per_type_energy_shifts"),
        *("per_type_energy_scales_trainable", "per_type_energy_shifts_trainable", "pair_potential"),
        *("readout_mlp_hidden_layers_depth", "readout_mlp_hidden_layers_width", "readout_mlp_nonlinearity"),
        *("convnet_sc", "learnable_shift", "convnet_resnet", "convnet_nonlinearity_type"),
        *("convnet_nonlinearity_scalars", "convnet_nonlinearity_gates", "categorical_graph_field_embed"),
    )
)
# sizes of the foundation models, which a preset stands for
_PRESETS: dict[str, dict[str, Any]] = {
    "S": {"num_layers": 2, "l_max": 1, "num_features": [128, 64]},
    "M": {"num_layers": 4, "l_max": 2, "num_features": [128, 64, 32]},
    "L": {"num_layers": 6, "l_max": 3, "num_features": [128, 64, 32, 32]},
    "XL": {"num_layers": 6, "l_max": 4, "num_features": [320, 96, 64, 32, 32]},
}
_OF_ALL_PRESETS = {"parity": False, "type_embed_num_features": 32, "radial_mlp_depth": 1, "radial_mlp_width": 128}
_GATES = {"e": "silu", "o": "tanh"}
# they change nothing about the model, or only numbers that are read from the tensors
_HARMLESS_MODIFIERS = ("enable_OpenEquivariance", "enable_CuEquivariance", "modify_PerTypeScaleShift")


@dataclass(frozen=True, slots=True)
class ConfigurationContent:
    """What a configuration says of the model.

    Attributes:
        architecture: of the model.
        norms: 1/√(neighbors), one number or one for each type, (1, 1) or (types, 1).
        trained: names of tensors that are parameters only where the configuration says so.
    """

    architecture: NequIPArchitecture
    norms: Tensor
    trained: frozenset[str]


def read_configuration(config: Any, version: tuple[int, int]) -> ConfigurationContent:
    """
    Args:
        config: of the model, with its builder under ``_target_``.
        version: of the nequip that built it, which its defaults depend on.

    Raises:
        UnfitError: it describes something that forcetune does not compute, or makes no sense.
    """
    try:
        return _read(config, version)
    except KeyError as error:
        raise UnfitError(f"its configuration has no {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UnfitError(f"its configuration cannot be read ({type(error).__name__}: {short(str(error))})") from error


def builder_config(config: Any) -> tuple[str, dict[str, Any]]:
    """Name of the builder and its options, without modifiers that do not matter.

    Raises:
        UnfitError: the model is built by something else.
    """
    if not isinstance(config, Mapping):
        raise UnfitError(f"its model is {short(config)}")
    target = config["_target_"]
    home, _, name = str(target).rpartition(".")
    if name == "modify" and home in ("nequip.model", "nequip.model.modify_utils"):
        for modifier in config["modifiers"]:
            if modifier["modifier"] not in _HARMLESS_MODIFIERS:
                raise UnfitError(f"its model was changed by {short(modifier['modifier'])}, which is not computed")
        return builder_config(config["model"])
    if name in ("ModelFromPackage", "ModelFromCheckpoint"):
        raise UnfitError(
            "its model was built from another file, which the checkpoint does not carry; write a package with "
            "nequip-package and pass that"
        )
    if home not in _HOMES or name not in _BUILDERS:
        raise UnfitError(f"its model is built by {short(str(target))}, which forcetune does not compute")
    return name, {str(key): value for key, value in config.items() if key != "_target_"}


def _read(config: Any, version: tuple[int, int]) -> ConfigurationContent:
    name, options = builder_config(config)
    kind = _BUILDERS[name]
    if kind == "preset":
        preset = str(options.pop("preset")).upper()
        if preset not in _PRESETS:
            raise UnfitError(f"its preset is {short(preset)}")
        options = _OF_ALL_PRESETS | _PRESETS[preset] | options
    known = _COMMON | _IGNORED | (_FULL if kind == "full" else _SIMPLE)
    if unknown := sorted(set(options) - known):
        raise UnfitError(f"its configuration has the option {short(unknown[0])}, which forcetune does not know")
    if options.get("categorical_graph_field_embed") is not None:
        raise UnfitError("it embeds fields of whole graphs (categorical_graph_field_embed), which is not computed")
    if options.get("convnet_nonlinearity_type", "gate") != "gate":
        raise UnfitError(f"its nonlinearity is of the type {short(options['convnet_nonlinearity_type'])}")
    elements = elements_from_names(options["type_names"])
    shape = _full_shape(options) if kind == "full" else _simple_shape(options, version)
    harmonics, attributes, wanted, radial = shape
    features = [f"{attributes}x0e"]
    for irreps in wanted:
        features.append(reachable(features[-1], harmonics, irreps))
    if any(block.order for block in parse_irreps(wanted[-1])):
        raise UnfitError(f"its last features are {short(wanted[-1])}")
    layers = len(wanted)
    learnable = flag(options.get("learnable_shift", False), "learnable_shift")
    connected = flag(options.get("convnet_sc", True), "convnet_sc")
    residual = flag(options.get("convnet_resnet", False), "convnet_resnet")
    scalars, gates = convolution_activations(
        options.get("convnet_nonlinearity_scalars", _GATES), options.get("convnet_nonlinearity_gates", _GATES)
    )
    hidden, activation = _readout(options, features[-1])
    dtype = options["model_dtype"]
    if dtype not in ("float32", "float64"):
        raise UnfitError(f"its model_dtype is {short(dtype)}")
    power = positive(options.get("polynomial_cutoff_p", 6), "polynomial_cutoff_p")
    architecture = NequIPArchitecture(
        cutoff=positive(options["r_max"], "r_max"),
        elements=elements,
        attributes=attributes,
        harmonics=harmonics,
        features=tuple(features),
        bessel=whole(options.get("num_bessels", 8), "num_bessels", 1024, smallest=1),
        cutoff_power=power,
        radial_hidden=radial,
        self_connections=tuple(connected and (learnable or layer > 0) for layer in range(layers)),
        residual=tuple(
            residual and (learnable or layer > 0) and features[layer] == features[layer + 1] for layer in range(layers)
        ),
        scalar_activation=scalars,
        gate_activation=gates,
        readout_hidden=hidden,
        readout_activation=activation,
        repulsion_power=_repulsion(options, elements, version, power),
        dtype=dtype,
    )
    norms = _norms(options.get("avg_num_neighbors"), options["type_names"], version).to(getattr(torch, dtype))
    trained = {
        "bessel_encode.bessel_weights": "bessel_trainable",
        "per_type_energy_scale_shift.scales": "per_type_energy_scales_trainable",
        "per_type_energy_scale_shift.shifts": "per_type_energy_shifts_trainable",
    }
    return ConfigurationContent(
        architecture, norms, frozenset(name for name, key in trained.items() if flag(options.get(key, False), key))
    )


_Shape = tuple[str, int, list[str], tuple[tuple[int, ...], ...]]


def _simple_shape(options: Mapping[str, Any], version: tuple[int, int]) -> _Shape:
    """Harmonics, embedding, features behind each layer and radial networks of few numbers."""
    early = version <= (0, 15)
    layers = whole(options.get("num_layers", 4), "num_layers", 64, smallest=1)
    highest = whole(options.get("l_max", 1), "l_max", 8)
    parity = flag(options.get("parity", True), "parity")
    features = options.get("num_features", 32)
    features = [features] * (highest + 1) if type(features) is int else features
    if not isinstance(features, (list, tuple)) or len(features) != highest + 1:
        raise UnfitError(f"its num_features are {short(features)}")
    counts = [whole(count, "num_features", smallest=1) for count in features]
    both = ("e", "o")
    if early:
        # without parity everything was even, and irreps were sorted by parity first
        harmonics = [f"1x{order}{'eo'[order % 2] if parity else 'e'}" for order in range(highest + 1)]
        hidden = [f"{counts[order]}x{order}{p}" for p in (both if parity else "e") for order in range(highest + 1)]
    else:
        harmonics = [f"1x{order}{'eo'[order % 2]}" for order in range(highest + 1)]
        hidden = [
            f"{counts[order]}x{order}{p}"
            for order in range(highest + 1)
            for p in (both if parity else ("eo"[order % 2],))
        ]
    attributes = options.get("type_embed_num_features")
    attributes = counts[0] if attributes is None else whole(attributes, "type_embed_num_features", smallest=1)
    defaults = (2, 64) if version <= (0, 16) else (1, 128)
    depth = whole(options.get("radial_mlp_depth", defaults[0]), "radial_mlp_depth", 64)
    width = whole(options.get("radial_mlp_width", defaults[1]), "radial_mlp_width", smallest=1)
    wanted = ["+".join(hidden)] * (layers - 1) + [f"{counts[0]}x0e"]
    return "+".join(harmonics), attributes, wanted, ((width,) * depth,) * layers


def _full_shape(options: Mapping[str, Any]) -> _Shape:
    """The same, each named."""
    harmonics = options["irreps_edge_sh"]
    if type(harmonics) is int:
        order = whole(harmonics, "irreps_edge_sh", 8)
        harmonics = "+".join(f"1x{k}{'eo'[k % 2]}" for k in range(order + 1))
    wanted = options["feature_irreps_hidden"]
    depths, widths = options["radial_mlp_depth"], options["radial_mlp_width"]
    lists = (wanted, depths, widths)
    if not all(isinstance(value, (list, tuple)) for value in lists) or len({len(value) for value in lists}) != 1:
        raise UnfitError("its feature_irreps_hidden, radial_mlp_depth and radial_mlp_width are no lists of one length")
    if not 1 <= len(wanted) <= 64:
        raise UnfitError(f"it has {len(wanted)} layers")
    radial = tuple(
        (whole(width, "radial_mlp_width", smallest=1),) * whole(depth, "radial_mlp_depth", 64)
        for depth, width in zip(depths, widths, strict=True)
    )
    attributes = whole(options["type_embed_num_features"], "type_embed_num_features", smallest=1)
    features = [checked_irreps(irreps, "feature_irreps_hidden") for irreps in wanted]
    return checked_harmonics(harmonics), attributes, features, radial


def _readout(options: Mapping[str, Any], features: str) -> tuple[tuple[int, ...], str | None]:
    depth = whole(options.get("readout_mlp_hidden_layers_depth", 0), "readout_mlp_hidden_layers_depth", 64)
    width = options.get("readout_mlp_hidden_layers_width")
    if width is None:
        width = sum(block.multiplicity for block in parse_irreps(features))
    width = whole(width, "readout_mlp_hidden_layers_width", smallest=1 if depth else 0)
    activation = scalar_activation(options.get("readout_mlp_nonlinearity", "silu"), "readout_mlp_nonlinearity")
    return (width,) * depth, activation if depth else None


def _repulsion(
    options: Mapping[str, Any], elements: tuple[int, ...], version: tuple[int, int], power: float
) -> float | None:
    """p of the envelope of the ZBL potential."""
    potential = options.get("pair_potential")
    if potential is None:
        return None
    if not isinstance(potential, Mapping) or potential["_target_"] != "nequip.nn.pair_potential.ZBL":
        target = potential.get("_target_") if isinstance(potential, Mapping) else potential
        raise UnfitError(f"its pair potential is {short(target)}, and only ZBL is computed")
    if extra := set(potential) - {"_target_", "units", "chemical_species", "polynomial_cutoff_p", "type_names"}:
        raise UnfitError(f"its ZBL potential has the option {short(sorted(map(str, extra))[0])}")
    if potential["units"] != "metal":
        raise UnfitError(f"its ZBL potential is in the units {short(potential['units'])}, not in eV and Å (metal)")
    if elements_from_names(potential["chemical_species"]) != elements:
        raise UnfitError("its ZBL potential knows other elements than its types")
    if version <= (0, 16):
        # it had the envelope of the radial basis then
        if "polynomial_cutoff_p" in potential:
            raise UnfitError("its ZBL potential has the option 'polynomial_cutoff_p'")
        return power
    return positive(potential.get("polynomial_cutoff_p", 6.0), "polynomial_cutoff_p of ZBL")


def _norms(neighbors: Any, types: Any, version: tuple[int, int]) -> Tensor:
    """1/√(neighbors), (1, 1) or (types, 1), float64."""
    if neighbors is None and version <= (0, 15):
        return torch.ones(1, 1, dtype=torch.float64)
    if isinstance(neighbors, Mapping):
        if set(neighbors) != set(types):
            raise UnfitError("its avg_num_neighbors are not those of its types")
        numbers = [neighbors[name] for name in types]
    else:
        numbers = [neighbors]
    values = [1 / math.sqrt(positive(value, "avg_num_neighbors", LARGEST)) for value in numbers]
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)
