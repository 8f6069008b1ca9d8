"""Whether a network of ours computes what the modules of a file say.

The network is built from sizes, names and tensors. What else a file says of its modules is compared with it here, and
an attribute that is not known is refused by name: it may be an option of a version of mace that came later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from forcetune.backbones.inert import Record
from forcetune.backbones.mace.network import (
    ACTIVATIONS,
    Interaction,
    MaceNetwork,
    NonLinearInteraction,
    NonLinearReadout,
    Product,
)
from forcetune.backbones.mace.tree import UNKNOWN, Node, canonical, function_name, irreps_text
from forcetune.irreps import irreps_text as blocks_text
from forcetune.irreps import merge_neighbours, parse_irreps
from forcetune.kernels.layers import Convolution, EquivariantLinear, SpeciesLinear
from forcetune.kernels.radial import RadialLayer
from forcetune.kernels.symmetric_contraction import Contraction, SymmetricContraction
from forcetune.kernels.tensors import UnfitError

Check = Callable[[Node, Any, str], None]


def check_node(root: Node, network: MaceNetwork) -> None:
    """Compare all modules of a file with a network that has their tensors.

    Raises:
        UnfitError: names what is not known, or differs.
    """
    for prefix, node in root.walk():
        where = prefix.rstrip(".") or "the model"
        if node.hooked or "forward" in node.attributes:
            raise UnfitError(f"{where} has code of the file's own attached")
        known = _KNOWN.get(node.kind)
        if known is None:
            raise UnfitError(f"{where} is a {node.kind}, which forcetune does not compute")
        attributes, check = known
        _refuse_unknown(node, attributes, where)
        if check is not None:
            check(node, _module(network, prefix.rstrip(".")), where)


def _module(network: nn.Module, path: str) -> nn.Module | None:
    """The network's module of the same name, where it has one."""
    try:
        return network.get_submodule(path)
    except AttributeError:
        return None


def _refuse_unknown(node: Node, known: frozenset[str], where: str) -> None:
    for name, value in node.attributes.items():
        if name in known or name in _ALWAYS or value is None or value is False:
            continue
        if isinstance(value, (list, tuple, dict, set)) and not value:
            continue
        plain = canonical(name, value)
        if name.startswith("_") and isinstance(plain, str):
            continue  # descriptions for profilers
        shown = "something" if plain is UNKNOWN else repr(plain)
        raise UnfitError(f"{where} ({node.kind}) has {name} = {shown}, which forcetune does not know")


def _differs(where: str, what: str, found: object, expected: object) -> UnfitError:
    return UnfitError(f"{where} has {what} = {found!r} where {expected!r} was expected")


def _compare_irreps(node: Node, name: str, expected: str | None, where: str) -> None:
    """Irreps as the file names them, equal neighbours counted as one."""
    if name not in node.attributes or expected is None:
        return
    found = irreps_text(node.attributes[name])
    if _merged(found) != _merged(expected):
        raise _differs(where, name, found, expected)


def _merged(text: str) -> str:
    try:
        return blocks_text(merge_neighbours(parse_irreps(text)))
    except ValueError as error:
        raise UnfitError(f"its irreps {text!r} are written in an unknown way") from error


def _compare_value(node: Node, name: str, expected: Any, where: str) -> None:
    if name not in node.attributes:
        return
    found = canonical(name, node.attributes[name])
    same = found == expected
    if isinstance(expected, float) and isinstance(found, (int, float)):
        same = math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-12)
    if not same:
        raise _differs(where, name, None if found is UNKNOWN else found, expected)


def _instructions(node: Node, where: str) -> list[tuple[Any, ...]]:
    found = node.attributes.get("instructions")
    rows = [canonical("instructions", entry) for entry in _entries(found)]
    if any(not isinstance(row, tuple) for row in rows):
        raise UnfitError(f"{where} stores its paths in an unknown way")
    return rows  # pyright: ignore[reportReturnType]


def _entries(value: Any) -> Iterable[Any]:
    if isinstance(value, Record):
        return value.args
    return value if isinstance(value, (list, tuple)) else ()


def _linear(node: Node, module: Any, where: str) -> None:
    if node.package == "torch":
        return  # its sizes are those of its tensors
    if not isinstance(module, EquivariantLinear):
        raise UnfitError(f"{where} is a linear layer in an unknown place")
    _compare_irreps(node, "irreps_in", module.irreps_in, where)
    _compare_irreps(node, "irreps_out", module.irreps_out, where)
    if "instructions" not in node.attributes:
        return
    inputs, outputs = (parse_irreps(irreps_text(node.attributes[name])) for name in ("irreps_in", "irreps_out"))
    start, pieces = 0, []
    for source, target, shape, weight in _instructions(node, where):
        if source < 0 or math.prod(shape) == 0:
            continue
        pieces.append((inputs[source].irrep, outputs[target].irrep, shape[0], shape[1], start, float(weight)))
        start += shape[0] * shape[1]
    own = _pieces_of(module)
    if not _same_pieces(pieces, own):
        raise UnfitError(f"{where} has paths, or factors of paths, other than those of its irreps")


def _pieces_of(module: EquivariantLinear) -> list[tuple[Any, ...]]:
    inputs, outputs = parse_irreps(module.irreps_in), parse_irreps(module.irreps_out)
    return [
        (inputs[b.source].irrep, outputs[b.target].irrep, b.fan_in, b.fan_out, b.start, b.factor) for b in module.blocks
    ]


def _same_pieces(found: list[tuple[Any, ...]], own: list[tuple[Any, ...]]) -> bool:
    """The same matrices, where pieces of one matrix that follow one another count as one."""
    joined: list[tuple[Any, ...]] = []
    for piece in found:
        last = joined[-1] if joined else None
        together = last is not None and (*last[:2], last[3]) == (*piece[:2], piece[3])
        if last is not None and together and math.isclose(last[5], piece[5], rel_tol=1e-9):
            joined[-1] = (*last[:2], last[2] + piece[2], *last[3:])
        else:
            joined.append(piece)
    return len(joined) == len(own) and all(
        one[:5] == other[:5] and math.isclose(one[5], other[5], rel_tol=1e-9)
        for one, other in zip(joined, own, strict=True)
    )


def _skip_connection(node: Node, module: Any, where: str) -> None:
    if not isinstance(module, SpeciesLinear):
        raise UnfitError(f"{where} is a tensor product in an unknown place")
    _compare_irreps(node, "irreps_in1", module.irreps_in, where)
    _compare_irreps(node, "irreps_in2", f"{module.n_species}x0e", where)
    _compare_irreps(node, "irreps_out", module.irreps_out, where)
    inputs = parse_irreps(module.irreps_in)
    rows = _instructions(node, where) if "instructions" in node.attributes else None
    expected = []
    for block in module.blocks:
        irrep = inputs[block.source]
        factor = math.sqrt(irrep.dim) * block.factor
        shape = (block.fan_in, module.n_species, block.fan_out)
        expected.append((block.source, 0, block.target, "uvw", True, factor, shape))
    if rows is not None and not _same_rows(rows, expected, 1e-6):
        raise UnfitError(f"{where} has paths, or factors of paths, other than those of its irreps")


def _convolution(node: Node, module: Any, where: str) -> None:
    if not isinstance(module, Convolution):
        raise UnfitError(f"{where} is a tensor product in an unknown place")
    _compare_irreps(node, "irreps_out", module.irreps_out, where)
    if "instructions" not in node.attributes:
        return
    rows = _instructions(node, where)
    factors = [math.sqrt(path.dim_out) for path in module.structure.paths]
    same = len(rows) == len(module.paths) and all(
        row[:2] == (path.source, path.harmonic)
        and row[2] == path.target
        and row[3] == "uvu"
        and row[4] is True
        and math.isclose(row[5], factor, rel_tol=1e-6)
        for row, path, factor in zip(rows, module.paths, factors, strict=True)
    )
    if not same:
        raise UnfitError(f"{where} has paths, or factors of paths, other than those of its irreps")


def _same_rows(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], tolerance: float) -> bool:
    return len(found) == len(expected) and all(
        (*one[:5], tuple(one[6])) == (*other[:5], other[6]) and math.isclose(one[5], other[5], rel_tol=tolerance)
        for one, other in zip(found, expected, strict=True)
    )


def _radial_layer(node: Node, module: Any, where: str) -> None:
    if not isinstance(module, RadialLayer):
        raise UnfitError(f"{where} is a layer in an unknown place")
    for name in ("var_in", "var_out"):
        _compare_value(node, name, 1, where)
    if (node.children.get("act") is None) != (module.activation is None):
        raise UnfitError(f"{where} has an activation where there should be none, or none where there should be one")


def _activation(node: Node, module: Any, where: str) -> None:
    """A normalised function; where it stands decides which functions it may be."""
    name = function_name(node.attributes.get("f"))
    allowed = ("silu",) if where.startswith("interactions.") and "gate" not in where else tuple(ACTIVATIONS)
    if where.startswith("interactions.") and "equivariant_nonlin" in where:
        allowed = ("silu", "sigmoid")
    if name not in allowed:
        raise UnfitError(f"{where} is the function {name}, not {' or '.join(allowed)}")


def _interaction(node: Node, module: Any, where: str) -> None:
    if not isinstance(module, (Interaction, NonLinearInteraction)):
        raise UnfitError(f"{where} is an interaction in an unknown place")
    irreps = module.irreps
    expected = {
        "node_feats_irreps": irreps.features,
        "edge_irreps": irreps.edges,
        "edge_attrs_irreps": irreps.harmonics,
        "target_irreps": irreps.target,
        "irreps_out": irreps.target,
        "hidden_irreps": irreps.hidden,
        "node_attrs_irreps": f"{irreps.n_species}x0e",
        "edge_feats_irreps": f"{irreps.radial[0]}x0e",
    }
    for name, text in expected.items():
        _compare_irreps(node, name, text, where)
    _refuse_accelerators(node, where)


def _refuse_accelerators(node: Node, where: str) -> None:
    """Layers that were made for an accelerator keep their tensors in another order."""
    for name in ("cueq_config", "oeq_config"):
        config = node.attributes.get(name)
        state = getattr(config, "state", None) or getattr(config, "__dict__", None)
        if config is not None and (not isinstance(state, dict) or state.get("enabled", True)):
            raise UnfitError(f"{where} was made for an accelerator; convert it to e3nn by mace_cueq_to_e3nn first")


def _product(node: Node, module: Any, where: str) -> None:
    if not isinstance(module, Product):
        raise UnfitError(f"{where} is a product in an unknown place")
    _compare_value(node, "use_sc", module.uses_skip, where)
    _refuse_accelerators(node, where)


def _symmetric_contraction(node: Node, module: Any, where: str) -> None:
    if not isinstance(module, SymmetricContraction):
        raise UnfitError(f"{where} is a contraction in an unknown place")
    _compare_irreps(node, "irreps_in", module.irreps_in, where)
    _compare_irreps(node, "irreps_out", module.irreps_out, where)


def _contraction(node: Node, module: Any, where: str) -> None:
    if not isinstance(module, Contraction):
        raise UnfitError(f"{where} is a contraction in an unknown place")
    _compare_value(node, "correlation", module.order, where)
    _compare_irreps(node, "coupling_irreps", module.irreps_in, where)


def _readout(node: Node, module: Any, where: str) -> None:
    if not isinstance(module, NonLinearReadout):
        raise UnfitError(f"{where} is a readout in an unknown place")
    _compare_irreps(node, "hidden_irreps", module.linear_1.irreps_out, where)


def _harmonics(node: Node, module: Any, where: str) -> None:
    _compare_value(node, "normalize", True, where)
    _compare_value(node, "normalization", "component", where)


def _layer_norm(node: Node, module: Any, where: str) -> None:
    _compare_value(node, "eps", 1e-5, where)
    _compare_value(node, "elementwise_affine", True, where)


_ALWAYS = frozenset(("training", "_is_torch_compile"))
_CODE = (
    "_specialized_code",
    "_optimize_einsums",
    "_profiling_str",
    "weight_numel",
    "internal_weights",
    "shared_weights",
)
_BLOCK = (
    *("node_attrs_irreps", "node_feats_irreps", "edge_attrs_irreps", "edge_feats_irreps", "target_irreps"),
    *("hidden_irreps", "edge_irreps", "irreps_out", "avg_num_neighbors", "radial_MLP", "cueq_config", "oeq_config"),
)


def _known(names: Iterable[str] = (), check: Check | None = None) -> tuple[frozenset[str], Check | None]:
    return frozenset(names), check


_MODEL = (
    *("heads", "pair_repulsion", "apply_cutoff", "edge_irreps", "use_reduced_cg", "use_agnostic_product", "use_so3"),
    *("use_last_readout_only", "use_edge_irreps_first", "keep_last_layer_irreps", "lammps_mliap"),
)
_KNOWN: dict[str, tuple[frozenset[str], Check | None]] = {
    "MACE": _known(_MODEL),
    "ScaleShiftMACE": _known(_MODEL),
    "LinearNodeEmbeddingBlock": _known(),
    "RadialEmbeddingBlock": _known(("out_dim", "apply_cutoff")),
    "BesselBasis": _known(),
    "GaussianBasis": _known(("coeff",)),
    "ChebychevBasis": _known(("num_basis", "r_max")),
    "PolynomialCutoff": _known(),
    "AgnesiTransform": _known(),
    "SoftTransform": _known(),
    "ZBLBasis": _known(),
    "SphericalHarmonics": _known(
        ("normalize", "normalization", "irreps_in", "irreps_out", "_ls_list", "_lmax", "_is_range_lmax", "_prof_str"),
        _harmonics,
    ),
    "AtomicEnergiesBlock": _known(),
    "ScaleShiftBlock": _known(),
    "ModuleList": _known(),
    "ParameterList": _known(("_size",)),
    "Sequential": _known(),
    "SiLU": _known(("inplace",)),
    "LayerNorm": _known(("normalized_shape", "eps", "elementwise_affine"), _layer_norm),
    "RealAgnosticInteractionBlock": _known(_BLOCK, _interaction),
    "RealAgnosticResidualInteractionBlock": _known(_BLOCK, _interaction),
    "RealAgnosticDensityInteractionBlock": _known(_BLOCK, _interaction),
    "RealAgnosticDensityResidualInteractionBlock": _known(_BLOCK, _interaction),
    "RealAgnosticResidualNonLinearInteractionBlock": _known((*_BLOCK, "irreps_nonlin"), _interaction),
    "Linear": _known(
        ("irreps_in", "irreps_out", "instructions", "bias_numel", "in_features", "out_features", *_CODE), _linear
    ),
    "TensorProduct": _known(
        ("irreps_in1", "irreps_in2", "irreps_out", "instructions", "_in1_dim", "_in2_dim", *_CODE), _convolution
    ),
    "FullyConnectedTensorProduct": _known(
        ("irreps_in1", "irreps_in2", "irreps_out", "instructions", "_in1_dim", "_in2_dim", *_CODE), _skip_connection
    ),
    "FullyConnectedNet": _known(("hs",)),
    "RadialMLP": _known(("hs",)),
    "_Layer": _known(("h_in", "h_out", "var_in", "var_out", "_profiling_str", "act"), _radial_layer),
    "normalize2mom": _known(("_is_id", "f", "cst"), _activation),
    "Activation": _known(("irreps_in", "irreps_out", "paths")),
    "reshape_irreps": _known(("irreps", "dims", "muls", "cueq_config")),
    "EquivariantProductBasisBlock": _known(
        ("use_sc", "use_agnostic_product", "cueq_config", "use_reduced_cg"), _product
    ),
    "SymmetricContraction": _known(
        ("irreps_in", "irreps_out", "internal_weights", "shared_weights"), _symmetric_contraction
    ),
    "Contraction": _known(("num_features", "coupling_irreps", "correlation"), _contraction),
    "LinearReadoutBlock": _known(),
    "NonLinearReadoutBlock": _known(("hidden_irreps", "num_heads"), _readout),
    "NonLinearBiasReadoutBlock": _known(("hidden_irreps", "num_heads"), _readout),
}
