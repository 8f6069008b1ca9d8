"""Small SevenNet models of any kind: recipes that sevenn itself makes, and checkpoints made without it; structures."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.data import atomic_numbers
from torch import Tensor

from forcetune.adapters.attach import Adapter
from forcetune.backbones.protocol import Base
from forcetune.backbones.sevennet.architecture import read_architecture
from forcetune.backbones.sevennet.backbone import SevenNetBackbone
from forcetune.backbones.sevennet.content import content_from_state
from forcetune.backbones.sevennet.network import SevenNetNetwork
from forcetune.kernels.tensors import TensorSource

OXIDE = ("Hf", "O")
ORGANIC = ("H", "C", "O")
ALL_VERSIONS = ("0.9.3.post1", "0.10.4", "0.11.2.post1", "0.12.1", "0.13.0")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A small model.

    Attributes:
        config: what differs from sevenn's defaults, in JSON's types.
        species: symbols, or ``univ`` for sevenn's table of everything.
        modalities: names.
        versions: of sevenn that can make it.
        lost: those whose checkpoints of it the newest sevenn no longer reads.
    """

    config: Mapping[str, Any]
    species: Sequence[str] | str = OXIDE
    modalities: tuple[str, ...] = ()
    versions: tuple[str, ...] = ALL_VERSIONS
    lost: tuple[str, ...] = ()

    @property
    def symbols(self) -> tuple[str, ...]:
        """Of structures to compute with it."""
        return ("Hf", "O") if self.species == "univ" else tuple(self.species)


_SMALL = {"channel": 4, "cutoff": 4.0, "weight_nn_hidden_neurons": [8, 8], "num_convolution_layer": 2}
_XPLOR = {"cutoff_function_name": "XPLOR", "cutoff_on": 3.2}
_ALL_MODAL = {
    "use_modal_self_inter_intro": True,
    "use_modal_self_inter_outro": True,
    "use_modal_output_block": True,
}
_SINCE_11 = ("0.11.2.post1", "0.12.1", "0.13.0")
_LATE = ("0.10.4", *_SINCE_11)

RECIPES: dict[str, Recipe] = {
    "parity, fully connected": Recipe(_SMALL | {"lmax": 2, "num_convolution_layer": 3}),
    "no parity, linear, XPLOR": Recipe(
        _SMALL | {"lmax": 3, "is_parity": False, "self_connection_type": "linear", "cutoff_function": _XPLOR}
    ),
    "biases": Recipe(_SMALL | {"use_bias_in_linear": True, "channel": 5}, ORGANIC),
    "network as readout": Recipe(
        _SMALL
        | {"readout_as_fcn": True, "readout_fcn_hidden_neurons": [8, 6], "readout_fcn_activation": "relu", "lmax": 2}
    ),
    "orders of edges and nodes": Recipe(_SMALL | {"lmax": 2, "lmax_edge": 3, "lmax_node": 1}, versions=_LATE),
    "irreps by hand, odd scalars": Recipe(
        _SMALL | {"lmax": 2, "irreps_manual": ["6x0e", "4x0o+6x0e+4x1o+3x1e+2x2e", "5x0e"]}, ORGANIC
    ),
    "irreps by hand, linear": Recipe(
        _SMALL
        | {"irreps_manual": ["6x0e", "6x0e+3x1e+2x2e", "6x0e+2x1e", "6x0e"], "num_convolution_layer": 3}
        | {"lmax": 2, "is_parity": False, "self_connection_type": "linear"},
        lost=("0.9.3.post1", "0.10.4"),
    ),
    "each self-connection another, trained denominators": Recipe(
        _SMALL
        | {"self_connection_type": ["nequip", "linear", "nequip"], "num_convolution_layer": 3}
        | {"conv_denominator": [2.5, 3.0, 3.5], "train_denominator": True},
        versions=_SINCE_11,
    ),
    "shift and scale by species": Recipe(_SMALL | {"shift": [-1.5, 0.3], "scale": [1.2, 0.7], "lmax": 2}),
    "shift by species, trained": Recipe(
        _SMALL | {"shift": [-1.5, 0.3, 2.5], "scale": 1.6, "train_shift_scale": True}, ORGANIC
    ),
    "other activations": Recipe(
        _SMALL
        | {"act_radial": "ssp", "act_scalar": {"e": "ssp", "o": "tanh"}, "act_gate": {"e": "ssp", "o": "abs"}}
        | {"weight_nn_hidden_neurons": [8], "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 5}}
        | {"cutoff_function": {"cutoff_function_name": "poly_cut", "poly_cut_p_value": 4}}
    ),
    "harmonics as polynomials": Recipe(_SMALL | {"_normalize_sph": False, "lmax": 2}),
    "all elements": Recipe(_SMALL, "univ", versions=_LATE),
    "one element": Recipe(_SMALL | {"lmax": 2}, ("O",)),
    "modalities, all by modality": Recipe(
        _SMALL
        | _ALL_MODAL
        | {"use_modal_node_embedding": True, "use_modal_wise_shift": True, "use_modal_wise_scale": True}
        | {"shift": {"a": 1.5, "b": -0.5, "c": 0.1}, "scale": {"a": 1.5, "b": 0.5, "c": 0.9}, "lmax": 2},
        ORGANIC,
        ("a", "b", "c"),
        _SINCE_11,
    ),
    "modalities, one shift": Recipe(
        _SMALL
        | _ALL_MODAL
        | {"is_parity": False, "self_connection_type": "linear", "shift": [-1.5, 0.3], "scale": 1.3},
        OXIDE,
        ("a", "b"),
        _SINCE_11,
    ),
    "modalities, biases": Recipe(
        _SMALL | {"use_modal_self_inter_intro": True, "use_bias_in_linear": True, "lmax": 2},
        OXIDE,
        ("a", "b"),
        _SINCE_11,
    ),
}
"""All that forcetune computes, option by option."""


def structures(symbols: Sequence[str], seed: int = 2) -> list[Atoms]:
    """A skewed crystal, a cluster, a slab, one atom, and two atoms out of reach, of these elements."""
    rng = np.random.default_rng(seed)
    systems = []
    for count, periodic in ((9, True), (7, False)):
        grid = np.stack(np.meshgrid(*3 * [np.arange(3)]), axis=-1).reshape(-1, 3)[:count] * 1.8
        numbers = [atomic_numbers[symbols[i % len(symbols)]] for i in range(count)]
        atoms = Atoms(numbers, grid + rng.uniform(-0.3, 0.3, (count, 3)))
        if periodic:
            atoms.set_cell(np.diag([5.4, 5.6, 5.8]) + 0.3 * np.tri(3, k=-1))
            atoms.pbc = True
        systems.append(atoms)
    slab = systems[0].copy()
    slab.set_cell(np.diag([5.4, 5.6, 25.0]))
    slab.pbc = (True, True, False)
    far = Atoms([symbols[0], symbols[-1]], [[0, 0, 0], [0, 0, 30.0]])
    return [*systems, slab, Atoms([symbols[-1]], [[0.0, 0.0, 0.0]]), far]


def universal_structures() -> list[Atoms]:
    """A metal, an oxide, a strained semiconductor, a molecule, a slab, one atom, two atoms out of reach."""
    rng = np.random.default_rng(0)
    metal, oxide = bulk("Cu", cubic=True), bulk("NiO", "rocksalt", a=4.2, cubic=True)
    silicon = bulk("Si") * (2, 1, 1)
    silicon.set_cell(silicon.cell.array @ (np.eye(3) + 0.03 * rng.standard_normal((3, 3))), scale_atoms=True)
    slab = fcc111("Al", (1, 1, 3), vacuum=8.0)
    slab.pbc = (True, True, False)
    systems = [metal, oxide, silicon, molecule("CH3CH2OH"), slab]
    for k, atoms in enumerate(systems):
        atoms.rattle(0.07, seed=k)
    return [*systems, Atoms("O", [[0.0, 0.0, 0.0]]), Atoms("FeO", [[0, 0, 0], [0, 0, 30.0]])]


def perturb(adapter: Adapter, scale: float = 0.1, seed: int = 5) -> None:
    """Random values on top of every adapter parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))


# ---- checkpoints without sevenn --------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {
    "cutoff": 4.0,
    "channel": 4,
    "irreps_manual": False,
    "lmax": 1,
    "lmax_edge": -1,
    "lmax_node": -1,
    "is_parity": True,
    "num_convolution_layer": 2,
    "radial_basis": {"radial_basis_name": "bessel"},
    "cutoff_function": {"cutoff_function_name": "poly_cut"},
    "act_radial": "silu",
    "act_scalar": {"e": "silu", "o": "tanh"},
    "act_gate": {"e": "silu", "o": "tanh"},
    "weight_nn_hidden_neurons": [8, 8],
    "conv_denominator": 3.3,
    "train_denominator": False,
    "train_shift_scale": False,
    "use_bias_in_linear": False,
    "use_modal_node_embedding": False,
    "use_modal_self_inter_intro": False,
    "use_modal_self_inter_outro": False,
    "use_modal_output_block": False,
    "readout_as_fcn": False,
    "self_connection_type": "nequip",
    "interaction_type": "nequip",
    "_normalize_sph": True,
    "shift": 0.0,
    "scale": 1.0,
    "version": "0.13.0",
}


def config_of(recipe: Recipe) -> dict[str, Any]:
    """The configuration of a checkpoint as sevenn would write it."""
    symbols = sorted(recipe.species)
    config = DEFAULTS | {
        "chemical_species": symbols,
        "_number_of_species": len(symbols),
        "_type_map": {atomic_numbers[symbol]: index for index, symbol in enumerate(symbols)},
    }
    if recipe.modalities:
        config |= {
            "use_modality": True,
            "_number_of_modalities": len(recipe.modalities),
            "_modal_map": {name: index for index, name in enumerate(recipe.modalities)},
            "use_modal_wise_shift": False,
            "use_modal_wise_scale": False,
        }
    return config | dict(recipe.config)


def checkpoint(recipe: Recipe, seed: int = 0) -> dict[str, Any]:
    """A checkpoint with random weights, made without sevenn; equal seeds give equal ones."""
    config = config_of(recipe)
    architecture = read_architecture(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SevenNetNetwork(architecture, tuple(sorted(architecture.type_map)), TensorSource(None))

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    count, known = len(architecture.modalities), len(architecture.type_map)
    own = network.state_dict()
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in own.items():
        if name.endswith(".modality"):
            continue
        value = tensor + 0.1 * noise(*tensor.shape)
        if (rows := own.get(f"{name.removesuffix('.weight')}.modality")) is not None and name.endswith(".weight"):
            value = torch.cat([value, noise(count * len(rows))])
        state[name] = value
    for key, base in (("shift", 0.0), ("scale", 1.0)):
        by_modality = count and config[f"use_modal_wise_{key}"]
        single = not count and all(isinstance(config[name], float) for name in ("shift", "scale"))
        shape = (count, known) if by_modality else (1,) if single else (known,)
        state[f"rescale_atomic_energy.{key}"] = base + 0.3 * noise(*shape)
    return {"config": config, "epoch": 1, "model_state_dict": OrderedDict((k, v.float()) for k, v in state.items())}


def write_checkpoint(path: Path, recipe: Recipe, seed: int = 0) -> Path:
    """:func:`checkpoint` in a file."""
    torch.save(checkpoint(recipe, seed), path)
    return path


def backbone_of(recipe: Recipe, *, head: str | None = None, seed: int = 0, **options: Any) -> SevenNetBackbone:
    """The backbone of :func:`checkpoint`; of its first modality unless another is named."""
    made = checkpoint(recipe, seed)
    content = content_from_state(read_architecture(made["config"]), made["model_state_dict"], made["config"])
    base = Base("small", "", content.fingerprint, "unknown")
    return SevenNetBackbone.from_content(content, base, head=head or next(iter(recipe.modalities), None), **options)


FOUR = ("H", "C", "N", "O")
BATTERY = {
    "SevenNet, fully connected": replace(RECIPES["parity, fully connected"], species=FOUR),
    "SevenNet, no parity, linear": replace(RECIPES["no parity, linear, XPLOR"], species=FOUR),
    "SevenNet, modalities": replace(RECIPES["modalities, all by modality"], species=FOUR),
}
"""One of each sort, for the elements of ``systems.py``, for tests of everything that works on any backbone."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published checkpoint, by its folder in the wheel.

    Attributes:
        modalities: each of them, or None for a model without.
    """

    folder: str
    modalities: tuple[str | None, ...] = field(default=(None,))


PUBLISHED = {
    "sevennet-0": Published("SevenNet_0__11Jul2024"),
    "sevennet-0-may2024": Published("SevenNet_0__22May2024"),
    "sevennet-mf-0": Published("SevenNet_MF_0", ("PBE", "R2SCAN")),
    "sevennet-l3i5": Published("SevenNet_l3i5"),
}
