"""Whether a network of ours computes what the modules of a file say.

The network is built from sizes, names and tensors. What else a file says of its modules is compared with it here, and
an attribute that is not known is refused by name: it may be an option of a version of mace that came later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

from torch import nn

from forcetune.backbones.mace.blocks import (
    ACTIVATIONS,
    Interaction,
    NonLinearInteraction,
    NonLinearReadout,
    Product,
    harmonics_text,
)
from forcetune.backbones.mace.compare import (
    compare_irreps,
    compare_value,
    differs,
    entries,
    instructions,
    merged,
    refuse_unknown,
    same_rows,
)
from forcetune.backbones.mace.module_spec import Node, function_name, irreps_text
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.backbones.mace.traced_contraction import CODE, check_traced
from forcetune.irreps import parse_irreps
from forcetune.kernels.layers import Convolution, EquivariantLinear, GatedActivation, SpeciesLinear
from forcetune.kernels.radial import RadialLayer
from forcetune.kernels.symmetric_contraction import Contraction, SymmetricContraction
from forcetune.kernels.tensors import UnfitError

Check = Callable[[Node, MaceNetwork, str], None]


def check_node(root: Node, network: MaceNetwork) -> None:
    """Compare all modules of a file with a network that has their tensors.

    Raises:
        UnfitError: names what is not known, or differs.
    """
    for prefix, node in root.walk():
        path = prefix.rstrip(".")
        where = path or "the model"
        if node.hooked or "forward" in node.attributes:
            raise UnfitError(f"{where} has code of the file's own attached")
        known = _KNOWN.get(node.kind)
        if known is None:
            raise UnfitError(f"{where} is a {node.kind}, which forcetune does not compute")
        attributes, check = known
        try:
            refuse_unknown(node, attributes, where)
            if check is not None:
                check(node, network, path)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError) as error:
            raise UnfitError(f"{where} ({node.kind}) is described in an unknown way ({error})") from error


def _module(network: nn.Module, path: str, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> Any:
    """The network's module of the same name.

    Raises:
        UnfitError: it has none of this kind there.
    """
    try:
        module = network.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, kind):
        raise UnfitError(f"{path} is a layer in an unknown place")
    return module


def _parent(path: str, levels: int) -> str:
    return ".".join(path.split(".")[:-levels])


def _linear(node: Node, network: MaceNetwork, where: str) -> None:
    if node.package == "torch":
        _module(network, where, nn.Linear)  # its sizes are those of its tensors
        return
    module = _module(network, where, EquivariantLinear)
    compare_irreps(node, "irreps_in", module.irreps_in, where)
    compare_irreps(node, "irreps_out", module.irreps_out, where)
    if "instructions" not in node.attributes:
        return
    inputs, outputs = (parse_irreps(irreps_text(node.attributes[name])) for name in ("irreps_in", "irreps_out"))
    start, pieces = 0, []
    for source, target, shape, weight in instructions(node, where):
        if source < 0 and weight != 1:
            raise differs(where, "a factor of its bias", weight, 1)
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


def _same_pieces(pieces: list[tuple[Any, ...]], own: list[tuple[Any, ...]]) -> bool:
    """The same matrices, where pieces of one matrix that follow one another count as one."""
    joined: list[tuple[Any, ...]] = []
    for piece in pieces:
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


def _skip_connection(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, where, SpeciesLinear)
    compare_irreps(node, "irreps_in1", module.irreps_in, where)
    compare_irreps(node, "irreps_in2", f"{module.n_species}x0e", where)
    compare_irreps(node, "irreps_out", module.irreps_out, where)
    inputs = parse_irreps(module.irreps_in)
    rows = instructions(node, where) if "instructions" in node.attributes else None
    expected = []
    for block in module.blocks:
        irrep = inputs[block.source]
        factor = math.sqrt(irrep.dim) * block.factor
        shape = (block.fan_in, module.n_species, block.fan_out)
        expected.append((block.source, 0, block.target, "uvw", True, factor, shape))
    if rows is not None and not same_rows(rows, expected, 1e-6):
        raise UnfitError(f"{where} has paths, or factors of paths, other than those of its irreps")


def _convolution(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, where, Convolution)
    compare_irreps(node, "irreps_in1", module.irreps_in, where)
    compare_irreps(node, "irreps_in2", module.harmonics, where)
    compare_irreps(node, "irreps_out", module.irreps_out, where)
    if "instructions" not in node.attributes:
        return
    rows = instructions(node, where)
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


def _radial_layer(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, where, RadialLayer)
    for name in ("var_in", "var_out"):
        compare_value(node, name, 1, where)
    if (node.children.get("act") is None) != (module.activation is None):
        raise UnfitError(f"{where} has an activation where there should be none, or none where there should be one")


def _sequence(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, where, nn.Sequential)
    expected = {name: type(child).__name__ for name, child in module.named_children()}
    kinds = {name: None if child is None else child.kind for name, child in node.children.items()}
    if kinds != expected:
        raise differs(where, "the layers", list(kinds.values()), list(expected.values()))


# ---- activations --------------------------------------------------------------------------------------------------


def _function(node: Node, network: MaceNetwork, where: str) -> None:
    """A function that is normalised; where it stands decides which one it has to be."""
    compare_value(node, "_is_id", abs(_factor(node) - 1) < 1e-4, where)
    if where.endswith(".act"):
        _compare_function(node, "f", _module(network, _parent(where, 1), RadialLayer).activation, where)
        return
    if where.startswith("readouts."):
        module = _module(network, _parent(where, 3), NonLinearReadout)
        _compare_function(node, "f", module.activation, where)
        return
    module = _module(network, _parent(where, 3), GatedActivation)
    index = ("act_scalars", "act_gates").index(where.split(".")[-3])
    _compare_function(node, "f", (module.scalar, module.gate)[index], where)
    compare_value(node, "cst", module.factors[index], where)


def _factor(node: Node) -> float:
    return float(node.attributes.get("cst", 0.0))


def _compare_function(node: Node, name: str, expected: Any, where: str) -> None:
    name_in_file = function_name(node.attributes.get(name))
    if ACTIVATIONS.get(str(name_in_file)) is not expected or expected is None:
        wanted = next((text for text, function in ACTIVATIONS.items() if function is expected), None)
        raise differs(where, name, name_in_file, wanted)


def _functions(node: Node, network: MaceNetwork, where: str) -> None:
    """One function for each irrep; None stands for the identity."""
    functions = list(node.child("acts").children.values())
    if where.startswith("readouts."):
        identity = _module(network, _parent(where, 1), NonLinearReadout).activation is None
        count = 1
    else:
        module = _module(network, _parent(where, 1), GatedActivation)
        identity = False
        count = len(parse_irreps(irreps_text(node.attributes["irreps_in"])))
        several = len(module.widths) - 1 if where.endswith("act_gates") else 1
        if count != several:
            raise differs(where, "activations of so many irreps:", count, several)
    if len(functions) != count or any((function is None) != identity for function in functions):
        raise UnfitError(f"{where} has other activations than those of its readout or gates")


def _gated_irreps(module: GatedActivation) -> tuple[str, str, str]:
    """Irreps of scalars, gates and what is gated."""
    gates = "+".join(f"{width}x0e" for width in module.widths[1:])
    return f"{module.widths[0]}x0e", gates, module.irreps_out.partition("+")[2]


def _gate(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, where, GatedActivation)
    scalars, gates, gated = _gated_irreps(module)
    for name, text in (("irreps_scalars", scalars), ("irreps_gates", gates), ("irreps_gated", gated)):
        compare_irreps(node, name, text, where)
    compare_irreps(node, "_irreps_in", module.irreps_in, where)
    compare_irreps(node, "_irreps_out", module.irreps_out, where)
    if node.package == "e3nn":
        return
    compare_value(node, "_layout_is_ir_mul", False, where)
    _compare_function(node, "_act_scalar", module.scalar, where)
    _compare_function(node, "_act_gate", module.gate, where)
    together, blocks = sum(module.widths), parse_irreps(module.irreps_in)
    offsets = [0, *accumulate(module.widths[1:])]
    rows = tuple(
        (blocks[index].start, blocks[index].stop - blocks[index].start, blocks[index].dim, width, offset)
        for index, width, offset in sorted(zip(module.gated, module.widths[1:], offsets, strict=False))
    )
    expected = {
        "_scalar_cst": module.factors[0],
        "_gate_cst": module.factors[1],
        "_s_start": 0,
        "_s_len": module.widths[0],
        "_g_start": module.widths[0],
        "_g_len": together - module.widths[0],
        "_gated_info": rows,
    }
    for name, value in expected.items():
        compare_value(node, name, value, where)


def _sorting(node: Node, network: MaceNetwork, where: str) -> None:
    """How e3nn's gate takes scalars, gates and gated features apart."""
    whole = where.endswith(".sc")
    module = _module(network, _parent(where, 1 if whole else 2), GatedActivation)
    compare_irreps(node, "irreps_in", module.irreps_in, where)
    parts = [irreps_text(part) for part in entries(node.attributes["irreps_outs"])]
    if [merged(part) for part in parts] != [merged(part) for part in _gated_irreps(module)]:
        raise differs(where, "irreps_outs", parts, list(_gated_irreps(module)))
    if not whole:
        places = ((0,), (1,), tuple(index + 1 for index in module.gated))
        compare_value(node, "instructions", places, where)


def _gating(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, _parent(where, 1), GatedActivation)
    _, gates, gated = _gated_irreps(module)
    for name, text in (("irreps_in1", gated), ("irreps_in2", gates), ("irreps_out", gated)):
        compare_irreps(node, name, text, where)
    expected = [
        (k, k, k, "uuu", False, math.sqrt(block.dim), (block.multiplicity,))
        for k, block in enumerate(parse_irreps(gated))
    ]
    if not same_rows(instructions(node, where), expected, 1e-6):
        raise UnfitError(f"{where} has paths, or factors of paths, other than those of its irreps")


# ---- blocks -------------------------------------------------------------------------------------------------------


def _interaction(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, where, (Interaction, NonLinearInteraction))
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
    if isinstance(module, NonLinearInteraction):
        expected["irreps_nonlin"] = module.equivariant_nonlin.irreps_in
    for name, text in expected.items():
        compare_irreps(node, name, text, where)
    _refuse_accelerators(node, where)


def _refuse_accelerators(node: Node, where: str) -> None:
    """Layers that were made for an accelerator keep their tensors in another order."""
    for name in ("cueq_config", "oeq_config"):
        config = node.attributes.get(name)
        state = getattr(config, "state", None) or getattr(config, "__dict__", None)
        if config is not None and (not isinstance(state, dict) or state.get("enabled", True)):
            raise UnfitError(f"{where} was made for an accelerator; convert it to e3nn by mace_cueq_to_e3nn first")


def _product(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, where, Product)
    compare_value(node, "use_sc", module.uses_skip, where)
    _refuse_accelerators(node, where)


def _symmetric_contraction(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, where, SymmetricContraction)
    compare_irreps(node, "irreps_in", module.irreps_in, where)
    compare_irreps(node, "irreps_out", module.irreps_out, where)
    if CODE in node.attributes:
        plain = network.architecture
        check_traced(node, module, len(plain.atomic_numbers), plain.use_agnostic_product, where)


def _contraction(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, where, Contraction)
    compare_value(node, "correlation", module.order, where)
    compare_irreps(node, "coupling_irreps", module.irreps_in, where)


def _readout(node: Node, network: MaceNetwork, where: str) -> None:
    module = _module(network, where, NonLinearReadout)
    compare_irreps(node, "hidden_irreps", module.linear_1.irreps_out, where)


def _harmonics(node: Node, network: MaceNetwork, where: str) -> None:
    compare_irreps(node, "irreps_out", harmonics_text(network.architecture), where)
    compare_value(node, "normalize", True, where)
    compare_value(node, "normalization", "component", where)


def _layer_norm(node: Node, network: MaceNetwork, where: str) -> None:
    _module(network, where, nn.LayerNorm)
    compare_value(node, "eps", 1e-5, where)
    compare_value(node, "elementwise_affine", True, where)


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


_GATE = (
    *("irreps_scalars", "irreps_gates", "irreps_gated", "_irreps_in", "_irreps_out", "_layout_is_ir_mul"),
    *("_act_scalar", "_act_gate", "_scalar_cst", "_gate_cst", "_s_start", "_s_len", "_g_start", "_g_len"),
    "_gated_info",
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
    "Sequential": _known((), _sequence),
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
    "normalize2mom": _known(("_is_id", "f", "cst"), _function),
    "Activation": _known(("irreps_in", "irreps_out", "paths"), _functions),
    "Gate": _known(_GATE, _gate),
    "GatedEquivariantBlock": _known(_GATE, _gate),
    "_Sortcut": _known(("irreps_outs", "irreps_in"), _sorting),
    "Extract": _known(("irreps_outs", "irreps_in", "instructions"), _sorting),
    "ElementwiseTensorProduct": _known(
        ("irreps_in1", "irreps_in2", "irreps_out", "instructions", "_in1_dim", "_in2_dim", *_CODE), _gating
    ),
    "reshape_irreps": _known(("irreps", "dims", "muls", "cueq_config")),
    "EquivariantProductBasisBlock": _known(
        ("use_sc", "use_agnostic_product", "cueq_config", "use_reduced_cg"), _product
    ),
    "SymmetricContraction": _known(
        ("irreps_in", "irreps_out", "internal_weights", "shared_weights", CODE), _symmetric_contraction
    ),
    "Contraction": _known(("num_features", "coupling_irreps", "correlation"), _contraction),
    "LinearReadoutBlock": _known(),
    "NonLinearReadoutBlock": _known(("hidden_irreps", "num_heads"), _readout),
    "NonLinearBiasReadoutBlock": _known(("hidden_irreps", "num_heads"), _readout),
}
