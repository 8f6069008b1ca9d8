"""Whether a network of ours computes what the modules of a file say.

The network is built from sizes, names and tensors. What else a file says of its modules is compared with it here, and
an attribute that is not known is refused by name: it may be an option of a version of mace that came later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from forcetune.backbones.mace.check_activations import (
    check_activation,
    check_gate,
    check_gating,
    check_normalised_function,
    check_sorting,
)
from forcetune.backbones.mace.check_blocks import (
    check_contraction,
    check_harmonics,
    check_interaction,
    check_layer_norm,
    check_product,
    check_readout,
    check_symmetric_contraction,
)
from forcetune.backbones.mace.check_layers import (
    check_convolution,
    check_linear,
    check_radial_layer,
    check_sequence,
    check_skip_connection,
)
from forcetune.backbones.mace.compare import (
    refuse_unknown,
)
from forcetune.backbones.mace.module_spec import Node
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.backbones.mace.traced_contraction import CODE
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


# attributes of a module by its kind, and what compares them
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
        check_harmonics,
    ),
    "AtomicEnergiesBlock": _known(),
    "ScaleShiftBlock": _known(),
    "ModuleList": _known(),
    "ParameterList": _known(("_size",)),
    "Sequential": _known((), check_sequence),
    "SiLU": _known(("inplace",)),
    "LayerNorm": _known(("normalized_shape", "eps", "elementwise_affine"), check_layer_norm),
    "RealAgnosticInteractionBlock": _known(_BLOCK, check_interaction),
    "RealAgnosticResidualInteractionBlock": _known(_BLOCK, check_interaction),
    "RealAgnosticDensityInteractionBlock": _known(_BLOCK, check_interaction),
    "RealAgnosticDensityResidualInteractionBlock": _known(_BLOCK, check_interaction),
    "RealAgnosticResidualNonLinearInteractionBlock": _known((*_BLOCK, "irreps_nonlin"), check_interaction),
    "Linear": _known(
        ("irreps_in", "irreps_out", "instructions", "bias_numel", "in_features", "out_features", *_CODE), check_linear
    ),
    "TensorProduct": _known(
        ("irreps_in1", "irreps_in2", "irreps_out", "instructions", "_in1_dim", "_in2_dim", *_CODE), check_convolution
    ),
    "FullyConnectedTensorProduct": _known(
        ("irreps_in1", "irreps_in2", "irreps_out", "instructions", "_in1_dim", "_in2_dim", *_CODE),
        check_skip_connection,
    ),
    "FullyConnectedNet": _known(("hs",)),
    "RadialMLP": _known(("hs",)),
    "_Layer": _known(("h_in", "h_out", "var_in", "var_out", "_profiling_str", "act"), check_radial_layer),
    "normalize2mom": _known(("_is_id", "f", "cst"), check_normalised_function),
    "Activation": _known(("irreps_in", "irreps_out", "paths"), check_activation),
    "Gate": _known(_GATE, check_gate),
    "GatedEquivariantBlock": _known(_GATE, check_gate),
    "_Sortcut": _known(("irreps_outs", "irreps_in"), check_sorting),
    "Extract": _known(("irreps_outs", "irreps_in", "instructions"), check_sorting),
    "ElementwiseTensorProduct": _known(
        ("irreps_in1", "irreps_in2", "irreps_out", "instructions", "_in1_dim", "_in2_dim", *_CODE), check_gating
    ),
    "reshape_irreps": _known(("irreps", "dims", "muls", "cueq_config")),
    "EquivariantProductBasisBlock": _known(
        ("use_sc", "use_agnostic_product", "cueq_config", "use_reduced_cg"), check_product
    ),
    "SymmetricContraction": _known(
        ("irreps_in", "irreps_out", "internal_weights", "shared_weights", CODE), check_symmetric_contraction
    ),
    "Contraction": _known(("num_features", "coupling_irreps", "correlation"), check_contraction),
    "LinearReadoutBlock": _known(),
    "NonLinearReadoutBlock": _known(("hidden_irreps", "num_heads"), check_readout),
    "NonLinearBiasReadoutBlock": _known(("hidden_irreps", "num_heads"), check_readout),
}
