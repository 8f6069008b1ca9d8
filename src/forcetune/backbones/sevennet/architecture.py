"""The architecture of a SevenNet model as plain values, read from the configuration of a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from forcetune.backbones.nequip.interaction import ACTIVATIONS, product_irreps
from forcetune.irreps import irreps_text, merge_neighbours, parse_irreps
from forcetune.kernels.tensors import UnfitError
from forcetune.utils.parsing import short

_LARGEST = 16384

# what sevenn's configurations say of data, training and logs; it changes nothing about what a model computes
_TRAINING_KEYS = frozenset(
    (
        *("preprocess_num_cores", "save_dataset_path", "save_dataset", "save_by_label", "save_by_train_valid"),
        *(
            "data_format",
            "data_format_args",
            "structure_list",
            "load_dataset_path",
            "load_dataset",
            "load_trainset_path",
        ),
        *(
            "load_validset_path",
            "load_validset",
            "load_testset_path",
            "load_memory_path",
            "rehearsal",
            "mem_batch_size",
        ),
        *("mem_ratio", "format_outputs_for_ase", "compute_statistics", "dataset_type", "random_seed"),
        *("data_divide_ratio", "use_testset", "epoch", "loss", "loss_param", "optimizer", "optim_param", "scheduler"),
        *("scheduler_param", "force_loss_weight", "stress_loss_weight", "device", "dtype", "train_shuffle"),
        *("is_train_stress", "continue", "checkpoint", "reset_optimizer", "reset_scheduler", "reset_epoch"),
        *("use_statistic_values_of_checkpoint", "opt_params", "fisher_information", "ewc_lambda", "csv_log"),
        *("error_record", "best_metric", "num_workers", "_num_workers", "rank", "local_rank", "world_size", "is_ddp"),
        *("ddp_backend", "per_epoch", "use_weight", "default_modal", "batch_size", "data_shuffle", "shift_cp"),
        *("scale_cp", "avg_num_neigh_cp", "conv_denominator_cp", "_modal_map_cp", "use_modality_cp"),
        *("_number_of_modalities_cp", "modal_list", "version", "_model_type", "model_type", "data_weight"),
        *(
            "skip_output_until",
            "draw_learning_curve",
            "draw_parity",
            "output_per_epoch",
            "wandb_project",
            "modal_map_cp",
        ),
        *("use_train_valid", "train_denominator_cp", "_is_trace_stress", "train_shift_scale", "train_denominator"),
        *("train_avg_num_neigh", "chemical_species", "data_info", "_chemical_species_by_atomic_number"),
        *("use_species_wise_shift_scale", "avg_num_neigh", "conv_denominator", "_data_info", "scaled_energy"),
        *("use_mliap", "_flash_lammps", "sevennet_version", "hash", "time", "plot_parity"),
    )
)
_MODEL_KEYS = frozenset(
    (
        *("cutoff", "channel", "radial_basis", "cutoff_function", "interaction_type", "lmax", "lmax_edge", "lmax_node"),
        *("is_parity", "num_convolution_layer", "weight_nn_hidden_neurons", "act_radial", "act_scalar", "act_gate"),
        *("self_connection_type", "irreps_manual", "readout_as_fcn", "readout_fcn_hidden_neurons"),
        *("readout_fcn_activation", "use_bias_in_linear", "_normalize_sph", "shift", "scale", "_number_of_species"),
        *("_type_map", "optimize_by_reduce", "use_modality", "_number_of_modalities", "_modal_map"),
        *("use_modal_node_embedding", "use_modal_self_inter_intro", "use_modal_self_inter_outro"),
        *("use_modal_output_block", "use_modal_wise_shift", "use_modal_wise_scale", "use_flash_tp"),
        *("cuequivariance_config", "use_oeq"),
    )
)


@dataclass(frozen=True, slots=True)
class SevenNetArchitecture:
    """All that a SevenNet model needs besides its tensors.

    Attributes:
        cutoff: Å.
        type_map: atomic number of each species, in the order of the tensors; sevenn's table of everything begins
            with 0, which is no element.
        harmonics: irreps of the directions.
        solid_harmonics: they are not normalised (models of early versions).
        features: irreps of the embedding and of the features behind each layer.
        message_orders: highest order of the messages of each layer.
        bessel: functions of the radial basis.
        cutoff_function: ``XPLOR`` or ``poly_cut``, with
        cutoff_parameter: where it begins (Å), or its power.
        radial_hidden: widths of the hidden layers of the radial networks, with
        radial_activation: between them.
        scalar_activations: of even and odd scalars in the gates, with
        gate_activation: of even gates.
        self_connections: of each layer, ``linear``, ``nequip`` (a matrix for each species) or ``none``.
        biases: linear layers have biases.
        readout_hidden: hidden layers of the readout if it is a network, with
        readout_activation: between them; None for two linear layers.
        modalities: names in the order of the tensors; none for models without.
        modal_layers: kinds of layers that know the modality.
        sorted_paths: radial weights are sorted by the outputs of their paths (since version 0.11).
    """

    cutoff: float
    type_map: tuple[int, ...]
    harmonics: str
    solid_harmonics: bool
    features: tuple[str, ...]
    message_orders: tuple[int, ...]
    bessel: int
    cutoff_function: str
    cutoff_parameter: float
    radial_hidden: tuple[int, ...]
    radial_activation: str
    scalar_activations: tuple[str, str]
    gate_activation: str
    self_connections: tuple[str, ...]
    biases: bool
    readout_hidden: tuple[int, ...] | None
    readout_activation: str | None
    modalities: tuple[str, ...]
    modal_layers: tuple[str, ...]
    sorted_paths: bool

    @property
    def n_layers(self) -> int:
        return len(self.features) - 1

    def to_json(self) -> str:
        """One line with sorted keys; equal architectures give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def convolution_targets(self, layer: int) -> str:
        """Irreps that the messages of a layer may have."""
        only_even = layer == self.n_layers - 1
        return product_irreps(
            self.features[layer], self.harmonics, highest=self.message_orders[layer], only_even=only_even
        )


def read_architecture(config: Mapping[str, Any]) -> SevenNetArchitecture:
    """The architecture that a configuration describes.

    Raises:
        UnfitError: it has options that forcetune does not compute, or values that make no sense.
    """
    try:
        return _read(config)
    except KeyError as error:
        raise UnfitError(f"its configuration has no {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError, StopIteration, OverflowError) as error:
        raise UnfitError(f"its configuration cannot be read ({type(error).__name__}: {short(str(error))})") from error


def _read(config: Mapping[str, Any]) -> SevenNetArchitecture:
    _refuse_unknown(config)
    version = _version(config)
    layers = _whole(config["num_convolution_layer"], "num_convolution_layer", 64, smallest=1)
    parity = _flag(config, "is_parity", default=True)
    highest = _whole(config["lmax"], "lmax", 8)
    edge = _whole(config.get("lmax_edge", -1), "lmax_edge", 8, smallest=-1)
    harmonics = "+".join(
        f"1x{order}{'o' if parity and order % 2 else 'e'}" for order in range((edge if edge > 0 else highest) + 1)
    )
    cutoff_function, parameter = _cutoff_function(config["cutoff_function"])
    basis = dict(config["radial_basis"])
    if basis.pop("radial_basis_name") != "bessel" or set(basis) - {"bessel_basis_num", "trainable_coeff"}:
        raise UnfitError(f"its radial basis is {short(config['radial_basis'])}")
    scalars, gates = dict(config["act_scalar"]), dict(config["act_gate"])
    readout_network = _flag(config, "readout_as_fcn")
    modal_keys = {
        "use_modal_node_embedding": "node_embedding",
        "use_modal_self_inter_intro": "self_interaction_1",
        "use_modal_self_inter_outro": "self_interaction_2",
        "use_modal_output_block": "reduce_input_to_hidden",
    }
    modal_map = _table(config["_modal_map"], "_modal_map", str) if _flag(config, "use_modality") else {}
    type_map = _table(config["_type_map"], "_type_map", int)
    if not all(0 <= z < 119 for z in type_map):
        raise UnfitError("its table of elements has atomic numbers that there are not")
    features = _features(config, layers, harmonics, highest)
    orders = [max(block.order for block in parse_irreps(after)) for after in features[1:]]
    if version < (0, 11):
        # paths to orders that the features do not have were there, too, and nothing read them
        orders = [_highest_order(config, highest)] * (layers - 1) + [0]
    connections = config.get("self_connection_type", "nequip")
    connections = (connections,) * layers if isinstance(connections, str) else tuple(connections)
    if len(connections) != layers:
        raise UnfitError("its self_connection_type does not fit its number of layers")
    activation = _known(config.get("act_radial", "silu"))
    normalised = _flag(config, "_normalize_sph", default=version >= (0, 10))
    cutoff = _number(config["cutoff"], "cutoff")
    if cutoff_function == "XPLOR" and parameter >= cutoff:
        raise UnfitError(f"its cutoff_on is {parameter}, which is not below its cutoff")
    return SevenNetArchitecture(
        cutoff=cutoff,
        type_map=tuple(sorted(type_map, key=lambda z: type_map[z])),
        harmonics=harmonics,
        solid_harmonics=not normalised,
        features=features,
        message_orders=tuple(orders),
        bessel=_whole(basis.get("bessel_basis_num", 8), "bessel_basis_num", 1024),
        cutoff_function=cutoff_function,
        cutoff_parameter=parameter,
        radial_hidden=tuple(_whole(n, "weight_nn_hidden_neurons") for n in config["weight_nn_hidden_neurons"]),
        radial_activation=activation,
        scalar_activations=(_known(scalars.get("e", "silu")), _known(scalars.get("o", "tanh"))),
        gate_activation=_known(gates.get("e", "silu")),
        self_connections=tuple(_self_connection(kind) for kind in connections),
        biases=_flag(config, "use_bias_in_linear"),
        readout_hidden=tuple(_whole(n, "readout_fcn_hidden_neurons") for n in config["readout_fcn_hidden_neurons"])
        if readout_network
        else None,
        readout_activation=_known(config["readout_fcn_activation"]) if readout_network else None,
        modalities=tuple(sorted(modal_map, key=lambda name: modal_map[name])),
        modal_layers=tuple(kind for key, kind in modal_keys.items() if modal_map and _flag(config, key)),
        sorted_paths=version >= (0, 11),
    )


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    unknown = [str(key) for key in config if str(key) not in _TRAINING_KEYS | _MODEL_KEYS]
    if unknown:
        raise UnfitError(f"its configuration has the option {short(unknown[0])}, which forcetune does not know")
    if config.get("interaction_type", "nequip") != "nequip":
        raise UnfitError(f"its interactions are of the type {short(config['interaction_type'])}")
    if config.get("optimize_by_reduce") is False:
        raise UnfitError("it was trained with optimize_by_reduce = False, which sevenn no longer reads either")
    accelerated = dict(config.get("cuequivariance_config") or {}).get("use", False)
    for name, used in (
        ("cuEquivariance", accelerated),
        ("FlashTP", config.get("use_flash_tp")),
        ("OpenEquivariance", config.get("use_oeq")),
    ):
        if used:
            raise UnfitError(
                f"it was trained with {name}, whose layout forcetune does not read; in sevenn, "
                "SevenNetCheckpoint(FILE).build_model().state_dict() has the weights in the usual one"
            )


def _version(config: Mapping[str, Any]) -> tuple[int, int]:
    """Major and minor version of sevenn; checkpoints from before versions were written count as the oldest."""
    parts = str(config.get("version", "0.0.0")).split(".")
    release = int(parts[0]), int(parts[1])
    return (0, 10) if release == (0, 11) and len(parts) > 3 and parts[3] == "dev0" else release


def _features(config: Mapping[str, Any], layers: int, harmonics: str, highest: int) -> tuple[str, ...]:
    manual = config.get("irreps_manual", False)
    if manual:
        if not isinstance(manual, (list, tuple)) or len(manual) != layers + 1:
            raise UnfitError("its irreps_manual do not fit its number of layers")
        return tuple(_checked_irreps(str(irreps)) for irreps in manual)
    channels = _whole(config["channel"], "channel")
    features = [f"{channels}x0e"]
    for layer in range(layers):
        last = layer == layers - 1
        order = 0 if last else _highest_order(config, highest)
        features.append(product_irreps(features[-1], harmonics, highest=order, only_even=last, multiplicity=channels))
    return tuple(features)


def _highest_order(config: Mapping[str, Any], highest: int) -> int:
    node = _whole(config.get("lmax_node", -1), "lmax_node", 8, smallest=-1)
    return node if node > 0 else highest


def _checked_irreps(text: str) -> str:
    blocks = parse_irreps(text.replace(" ", ""))
    if len(merge_neighbours(blocks)) != len(blocks) or sum(b.multiplicity for b in blocks) > _LARGEST:
        raise UnfitError(f"its irreps are {short(text)}")
    if any(block.order > 8 for block in blocks):
        raise UnfitError(f"its irreps are {short(text)}")
    return irreps_text(blocks)


def _cutoff_function(function: Mapping[str, Any]) -> tuple[str, float]:
    options = dict(function)
    name = options.pop("cutoff_function_name")
    key = {"XPLOR": "cutoff_on", "poly_cut": "poly_cut_p_value"}.get(name)
    if key is None or set(options) - {"cutoff_on", "poly_cut_p_value"}:
        raise UnfitError(f"its cutoff function is {short(function)}")
    return name, _number(options.get(key, 6) if name == "poly_cut" else options[key], key)


def _self_connection(kind: Any) -> str:
    if not isinstance(kind, str) or kind not in ("linear", "nequip", "none"):
        raise UnfitError(f"its self-connections are {short(kind)}")
    return str(kind)


def _known(name: Any) -> str:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UnfitError(f"its activation is {short(name)}, which is none of {', '.join(ACTIVATIONS)}")
    return str(name)


def _whole(value: Any, what: str, largest: int = _LARGEST, *, smallest: int = 0) -> int:
    if type(value) is not int or not smallest <= value <= largest:
        raise UnfitError(f"its {what} is {short(value)}")
    return value


def _flag(config: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    value = config.get(key, default)
    if not isinstance(value, (bool, np.bool_)):
        raise UnfitError(f"its {key} is {short(value)}")
    return bool(value)


def _table(value: Any, what: str, kind: type) -> dict[Any, int]:
    """A table of places, in their order, without gaps."""
    if not isinstance(value, Mapping) or not value or len(value) > _LARGEST:
        raise UnfitError(f"its {what} is {short(value)}")
    numbers = (int, np.integer)
    kinds = numbers if kind is int else kind
    if any(isinstance(part, bool) for entry in value.items() for part in entry) or not all(
        isinstance(key, kinds) and isinstance(place, numbers) for key, place in value.items()
    ):
        raise UnfitError(f"its {what} is {short(value)}")
    if sorted(value.values()) != list(range(len(value))):
        raise UnfitError(f"its {what} has gaps")
    return {kind(key): int(place) for key, place in value.items()}


def _number(value: Any, what: str) -> float:
    if isinstance(value, (np.ndarray, Tensor)):
        value = value.item()
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not 0 < value < 100
    ):
        raise UnfitError(f"its {what} is {short(value)}")
    return float(value)
