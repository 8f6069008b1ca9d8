"""Packages of NequIP (``.nequip.zip``), read without running the code that they hold."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from forcetune.backbones.nequip.architecture import (
    NequIPArchitecture,
    check_version,
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
from forcetune.backbones.nequip.content import NequIPContent, sorted_content
from forcetune.backbones.nequip.module_tree import Node, read_function_name, read_irreps, read_tree
from forcetune.backbones.safe_unpickle.reader import InertPackage, read_inert_package, read_package_text
from forcetune.errors import InputError
from forcetune.irreps import parse_irreps
from forcetune.kernels.tensors import UnfitError
from forcetune.utils.parsing import short

PICKLES = "model/*_model.pkl"
"""A package has the model once for each way to compile it."""
EAGER = "model/eager_model.pkl"
_METADATA = "model/package_metadata.txt"
_LAYER = re.compile(r"layer(\d+)_convnet")
_STAGES = {
    "type_embed": "NodeTypeEmbed",
    "spharm": "SphericalHarmonicEdgeAttrs",
    "edge_norm": "EdgeLengthNormalizer",
    "bessel_encode": "BesselEdgeLengthEncoding",
    "factor": "ApplyFactor",
    "per_atom_energy_readout": "ScalarMLP",
    "per_type_energy_scale_shift": "PerTypeScaleShift",
    "pair_potential": "ZBL",
    "total_energy_sum": "AtomwiseReduce",
}
_HOMES = ("nequip.", "e3nn.", "torch.nn.")
_ACTIVATIONS = {
    "SiLU": "silu",
    "Mish": "mish",
    "GELU": "gelu",
    "ShiftedSoftplus": "ssp",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Softplus": "softplus",
    "Identity": "None",
}
_FUNCTIONS = {
    "silu": "silu",
    "tanh": "tanh",
    "abs": "abs",
    "nequip.nn.nonlinearities.shifted_softplus": "ssp",
}


def read_package(path: str | Path) -> NequIPContent:
    """Read a package.

    Raises:
        InputError: the file is missing, damaged or no package.
        UnfitError: it is one that forcetune does not compute; says what it is that it does not.
    """
    version = _version(path)
    return content_from_package(read_inert_package(path, PICKLES), Path(path), version)


def _version(path: str | Path) -> tuple[int, int]:
    try:
        metadata = yaml.safe_load(read_package_text(path, _METADATA))
        return check_version(metadata["versions"]["nequip"])
    except (yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise UnfitError(f"its {_METADATA} cannot be read ({type(error).__name__})") from error


def content_from_package(package: InertPackage, path: Path, version: tuple[int, int]) -> NequIPContent:
    """As :func:`read_package`, of what was read."""
    if EAGER not in package.contents:
        raise InputError(f"{path} holds no {EAGER}; pass a .nequip.zip that nequip-package wrote.")
    return content_from_tree(energy_model(read_tree(package.contents[EAGER])), version)


def energy_model(tree: Node) -> Node:
    """The network below its wrappers.

    Raises:
        UnfitError: there are several models, or another wrapper.
    """
    if tree.kind != "ModuleDict" or list(tree.children) != ["sole_model"]:
        raise UnfitError(f"it holds the models {short(list(tree.children))}, and only a single one is computed")
    graph = tree.child("sole_model")
    if graph.kind not in ("GraphModel", "CompileGraphModel"):
        raise UnfitError(f"its model is a {graph.kind}")
    inner = graph.child("model")
    if inner.kind == "ForceStressOutput":
        inner = inner.child("func")
    if inner.kind != "SequentialGraphNetwork":
        raise UnfitError(f"its model is a {inner.kind}")
    inner.attributes["type_names"] = graph.attribute("type_names")
    inner.attributes["model_dtype"] = graph.attribute("model_dtype")
    return inner


def content_from_tree(model: Node, version: tuple[int, int]) -> NequIPContent:
    """The content of a network.

    Raises:
        UnfitError: something in it is not computed by forcetune.
    """
    try:
        architecture = _architecture(model, version)
        norms = _numbers_as_norms(model, architecture) if version <= (0, 15) else None
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise UnfitError(f"its modules cannot be read ({type(error).__name__}: {short(str(error))})") from error
    return sorted_content(architecture, model.all_tensors(), norms=norms)


def _numbers_as_norms(model: Node, architecture: NequIPArchitecture) -> Tensor:
    """1/√(neighbors), (1, 1), which was a number and no tensor up to 0.15.

    Raises:
        UnfitError: layers have different ones.
    """
    layers = [model.child(f"layer{index}_convnet.conv") for index in range(architecture.n_layers)]
    norms = {layer.attribute("scatter_norm_factor") for layer in layers}
    if len(norms) != 1:
        raise UnfitError("its layers divide by different numbers of neighbors")
    factor = norms.pop()
    number = 1.0 if factor is None else positive(factor, "scatter_norm_factor", 1e6)
    return torch.tensor([[number]], dtype=getattr(torch, architecture.dtype))


def _architecture(model: Node, version: tuple[int, int]) -> NequIPArchitecture:
    _check_homes(model)
    layers = [name for name in model.children if _LAYER.fullmatch(name)]
    if layers != [f"layer{index}_convnet" for index in range(len(layers))] or not 1 <= len(layers) <= 64:
        raise UnfitError(f"its layers are {short(layers)}")
    for name, child in model.children.items():
        kind = "ConvNetLayer" if name in layers else _STAGES.get(name)
        if child.kind != kind:
            raise UnfitError(f"its {name} is a {child.kind}, which is not computed")
    elements = elements_from_names(model.attributes["type_names"])
    dtype = {torch.float32: "float32", torch.float64: "float64"}.get(model.attributes["model_dtype"])
    if dtype is None:
        raise UnfitError(f"its model_dtype is {short(model.attributes['model_dtype'])}")
    attributes = _embedding(model.child("type_embed"), len(elements))
    cutoff, bessel, power = _radial(model, len(elements))
    harmonics = _harmonics(model.child("spharm"))
    features = [f"{attributes}x0e"]
    layer_contents = [_layer(model.child(name), index, harmonics, features) for index, name in enumerate(layers)]
    scalar, gate = _one_for_all([each.activations for each in layer_contents])
    hidden, activation = _network(model.child("per_atom_energy_readout.mlp_module"))
    _check_energies(model)
    return NequIPArchitecture(
        cutoff=cutoff,
        elements=elements,
        attributes=attributes,
        harmonics=harmonics,
        features=tuple(features),
        bessel=bessel,
        cutoff_power=power,
        radial_hidden=tuple(each.radial for each in layer_contents),
        self_connections=tuple(each.connected for each in layer_contents),
        residual=tuple(each.residual for each in layer_contents),
        scalar_activation=scalar,
        gate_activation=gate,
        readout_hidden=hidden,
        readout_activation=activation,
        repulsion_power=_repulsion(model, version, power),
        dtype=dtype,
    )


def _one_for_all(activations: Sequence[tuple[str, str | None]]) -> tuple[str, str]:
    """The activations of scalars and gates of all layers; some have no gates, and the last never has.

    Raises:
        UnfitError: layers have different ones.
    """
    scalars = {scalar for scalar, _ in activations}
    gates = {gate for _, gate in activations if gate is not None} or {"silu"}
    if len(scalars) != 1 or len(gates) != 1:
        raise UnfitError("its layers have different activations")
    return scalars.pop(), gates.pop()


def _check_homes(node: Node) -> None:
    """Every module is one of nequip, e3nn or PyTorch, not one that only has the name of such.

    Raises:
        UnfitError: one is not.
    """
    if not node.home.startswith(_HOMES):
        raise UnfitError(f"its {node.path} is a {short(node.home)}.{node.kind}, which is not computed")
    for child in node.children.values():
        _check_homes(child)


def _expect(node: Node, **values: Any) -> None:
    """
    Raises:
        UnfitError: an attribute has another value.
    """
    for name, value in values.items():
        stored = node.attribute(name)
        if type(stored) is not type(value) or stored != value:
            raise UnfitError(f"its {node.path} has the {name} {short(stored)}, which is not computed")


def _embedding(node: Node, types: int) -> int:
    if node.attributes.get("do_categorical_graph_field_embed", False) is not False:
        raise UnfitError("it embeds fields of whole graphs (categorical_graph_field_embed), which is not computed")
    _expect(node, num_types=types, set_features=True)
    table = node.child("embed_module", "Embedding")
    if table.attribute("max_norm") is not None or table.attribute("padding_idx") is not None:
        raise UnfitError("its embedding of types has options that are not computed")
    return whole(table.attribute("embedding_dim"), "embedding of types", smallest=1)


def _radial(model: Node, types: int) -> tuple[float, int, float]:
    """Cutoff, number of functions and power of the envelope."""
    edges, basis, factor = (model.child(name) for name in ("edge_norm", "bessel_encode", "factor"))
    cutoff = positive(edges.attribute("r_max"), "r_max")
    _expect(edges, num_types=types, norm_length_field="normed_edge_lengths")
    _expect(basis, norm_length_field="normed_edge_lengths", edge_invariant_field="edge_embedding")
    _expect(factor, in_field="edge_embedding", out_field="edge_embedding")
    number = positive(factor.attribute("factor"), "factor", 1e6)
    if abs(number * cutoff**2 / (2 * math.pi) - 1) > 1e-9:
        raise UnfitError(f"its radial basis is multiplied by {number:.6g}")
    size = whole(basis.attribute("num_bessels"), "num_bessels", 1024, smallest=1)
    return cutoff, size, _power(basis.child("cutoff"))


def _power(node: Node) -> float:
    if node.kind != "PolynomialCutoff":
        raise UnfitError(f"its {node.path} is a {node.kind}")
    return positive(node.attribute("p"), "p of the envelope")


def _harmonics(node: Node) -> str:
    _expect(node.child("sh", "SphericalHarmonics"), normalize=True, normalization="component")
    return checked_harmonics(read_irreps(node.attribute("irreps_edge_sh"), "spherical harmonics"))


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a layer is: hidden widths of its radial network, self-connection, residual, activations."""

    radial: tuple[int, ...]
    connected: bool
    residual: bool
    activations: tuple[str, str | None]


def _layer(node: Node, index: int, harmonics: str, features: list[str]) -> _Layer:
    """Read a layer, and append the irreps behind it."""
    before = features[-1]
    wanted = checked_irreps(read_irreps(node.attribute("feature_irreps_hidden"), "features"), "features")
    after = reachable(before, harmonics, wanted)
    gate = node.child("equivariant_nonlin", "Gate")
    conv = node.child("conv", "InteractionBlock")
    behind = checked_irreps(read_irreps(gate.attribute("_irreps_out"), "features"), "features")
    if behind != after:
        raise UnfitError(f"its features behind layer {index} are {behind}, not {after}")
    features.append(after)
    _check_convolution(conv, before, harmonics)
    radial, activation = _network(conv.child("edge_mlp"))
    if activation not in (None, "silu"):
        raise UnfitError(f"its radial networks have the activation {activation}")
    use_sc = flag(conv.attribute("use_sc"), "use_sc")
    if use_sc != ("sc" in conv.children):
        raise UnfitError(f"its {conv.path} has a self-connection that it does not use, or none")
    if use_sc:
        conv.child("sc", "FullyConnectedTensorProduct")
    residual = flag(node.attribute("resnet"), "resnet")
    if residual and before != after:
        raise UnfitError(f"its {node.path} adds {before} to {after}")
    return _Layer(radial, use_sc, residual, _activations(gate, after))


def _check_convolution(conv: Node, before: str, harmonics: str) -> None:
    scatter = conv.child("tp_scatter")
    if scatter.kind not in (
        "TensorProductScatter",
        "OpenEquivarianceTensorProductScatter",
        "CuEquivarianceTensorProductScatter",
    ):
        raise UnfitError(f"its {scatter.path} is a {scatter.kind}, which is not computed")
    for name, irreps in (("feature_irreps_in", before), ("irreps_edge_attr", harmonics)):
        if read_irreps(scatter.attribute(name), name) != irreps:
            raise UnfitError(f"its {scatter.path} has other irreps than the features before it")
    for name in ("linear_1", "linear_2"):
        conv.child(name, "Linear")
    if "avg_num_neighbors_norm" in conv.children:
        conv.child("avg_num_neighbors_norm", "AvgNumNeighborsNorm")


def _activations(gate: Node, after: str) -> tuple[str, str | None]:
    """Activations of even scalars and of gates; None where there are no gates."""

    def names(part: str) -> list[str]:
        activations = []
        for child in gate.child(part).child("acts").children.values():
            name = read_function_name(child.attributes.get("f"))
            if child.kind != "normalize2mom" or name not in _FUNCTIONS:
                raise UnfitError(f"its {part} are {short(name)}")
            activations.append(_FUNCTIONS[name])
        return activations

    scalars = [block.irrep for block in parse_irreps(after) if block.order == 0]
    activations = names("act_scalars")
    gates = names("act_gates")
    if len(activations) != len(scalars) or len(set(gates)) > 1:
        raise UnfitError("its activations do not fit its features")
    table = dict(zip(scalars, activations, strict=True))
    own = {"e": gates[0] if gates else "silu", "o": "tanh"}
    scalar, even = convolution_activations({"e": table["0e"], "o": table.get("0o", "tanh")}, own)
    return scalar, even if gates else None


def _network(node: Node) -> tuple[tuple[int, ...], str | None]:
    """Widths of the hidden layers of a network of scalars, and its activation."""
    if node.kind != "ScalarMLPFunction":
        raise UnfitError(f"its {node.path} is a {node.kind}")
    _expect(node, bias=False)
    dims = node.attribute("dims")
    if not isinstance(dims, list) or not 2 <= len(dims) <= 66:
        raise UnfitError(f"its {node.path} has the widths {short(dims)}")
    hidden = tuple(whole(width, "width", smallest=1) for width in dims[1:-1])
    mlp = node.child("mlp")
    if mlp.kind == "DeepLinearMLP":
        _check_alpha(mlp, math.prod(1 / math.sqrt(width) for width in dims[:-1]))
        return hidden, None
    kinds = [child.kind for child in mlp.children.values()]
    between = set(kinds[1::2])
    if mlp.kind != "Sequential" or set(kinds[::2]) != {"ScalarLinearLayer"} or len(between) > 1:
        raise UnfitError(f"its {mlp.path} has the layers {short(kinds)}")
    if len(kinds) != 2 * len(hidden) + 1 or not between <= set(_ACTIVATIONS):
        raise UnfitError(f"its {mlp.path} has the layers {short(kinds)}")
    for index, child in enumerate(list(mlp.children.values())[::2]):
        _check_alpha(child, math.sqrt(2 if index else 1) / math.sqrt(dims[index]))
    for child in list(mlp.children.values())[1::2]:
        if child.kind == "GELU":
            _expect(child, approximate="none")
    return hidden, scalar_activation(_ACTIVATIONS[between.pop()], "activation") if between else None


def _check_alpha(node: Node, expected: float) -> None:
    alpha = node.tensors.get("alpha", node.attributes.get("alpha"))
    value = alpha.item() if isinstance(alpha, Tensor) and alpha.numel() == 1 else alpha
    if not isinstance(value, float) or abs(value / expected - 1) > 1e-5:
        raise UnfitError(f"its {node.path} multiplies by {short(value)}, not by {expected:.6g}")


def _check_energies(model: Node) -> None:
    readout, rescale = model.child("per_atom_energy_readout"), model.child("per_type_energy_scale_shift")
    _expect(readout, field="node_features", out_field="atomic_energy")
    _expect(rescale, field="atomic_energy", out_field="atomic_energy", type_names=model.attributes["type_names"])
    _expect(model.child("total_energy_sum"), constant=1.0, reduce="sum", field="atomic_energy")
    names: Sequence[str] = list(model.children)
    if names.index("per_type_energy_scale_shift") < names.index("per_atom_energy_readout"):
        raise UnfitError("its energies are scaled before they are computed")


def _repulsion(model: Node, version: tuple[int, int], power: float) -> float | None:
    if "pair_potential" not in model.children:
        return None
    names = list(model.children)
    if names.index("pair_potential") < names.index("per_type_energy_scale_shift"):
        raise UnfitError("its pair potential is scaled, which is not computed")
    return power if version <= (0, 16) else _power(model.child("pair_potential.cutoff"))
