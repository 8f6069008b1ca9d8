"""Whether the activations and gates of a file are those of a network of ours."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

from forcetune.backbones.mace.blocks import (
    ACTIVATIONS,
    NonLinearReadout,
)
from forcetune.backbones.mace.compare import (
    compare_irreps,
    compare_value,
    differs,
    entries,
    find_module,
    instructions,
    merged,
    parent_path,
    same_rows,
)
from forcetune.backbones.mace.module_spec import Node, function_name, irreps_text
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.irreps import parse_irreps
from forcetune.kernels.layers import GatedActivation
from forcetune.kernels.radial import RadialLayer
from forcetune.kernels.tensors import UnfitError


def check_normalised_function(node: Node, network: MaceNetwork, where: str) -> None:
    """A function that is normalised; where it stands decides which one it has to be."""
    compare_value(node, "_is_id", abs(_factor(node) - 1) < 1e-4, where)
    if where.endswith(".act"):
        _compare_function(node, "f", find_module(network, parent_path(where, 1), RadialLayer).activation, where)
        return
    if where.startswith("readouts."):
        module = find_module(network, parent_path(where, 3), NonLinearReadout)
        _compare_function(node, "f", module.activation, where)
        return
    module = find_module(network, parent_path(where, 3), GatedActivation)
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


def check_activation(node: Node, network: MaceNetwork, where: str) -> None:
    """One function for each irrep; None stands for the identity."""
    functions = list(node.child("acts").children.values())
    if where.startswith("readouts."):
        identity = find_module(network, parent_path(where, 1), NonLinearReadout).activation is None
        count = 1
    else:
        module = find_module(network, parent_path(where, 1), GatedActivation)
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


def check_gate(node: Node, network: MaceNetwork, where: str) -> None:
    """A gate's irreps, functions, normalization and places of its parts are ours.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, where, GatedActivation)
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


def check_sorting(node: Node, network: MaceNetwork, where: str) -> None:
    """How e3nn's gate takes scalars, gates and gated features apart."""
    whole = where.endswith(".sc")
    module = find_module(network, parent_path(where, 1 if whole else 2), GatedActivation)
    compare_irreps(node, "irreps_in", module.irreps_in, where)
    parts = [irreps_text(part) for part in entries(node.attributes["irreps_outs"])]
    if [merged(part) for part in parts] != [merged(part) for part in _gated_irreps(module)]:
        raise differs(where, "irreps_outs", parts, list(_gated_irreps(module)))
    if not whole:
        places = ((0,), (1,), tuple(index + 1 for index in module.gated))
        compare_value(node, "instructions", places, where)


def check_gating(node: Node, network: MaceNetwork, where: str) -> None:
    """The product of gates and gated features of e3nn's gate has our irreps, paths, and factors of paths.

    Raises:
        UnfitError: it differs.
    """
    module = find_module(network, parent_path(where, 1), GatedActivation)
    _, gates, gated = _gated_irreps(module)
    for name, text in (("irreps_in1", gated), ("irreps_in2", gates), ("irreps_out", gated)):
        compare_irreps(node, name, text, where)
    expected = [
        (k, k, k, "uuu", False, math.sqrt(block.dim), (block.multiplicity,))
        for k, block in enumerate(parse_irreps(gated))
    ]
    if not same_rows(instructions(node, where), expected, 1e-6):
        raise UnfitError(f"{where} has paths, or factors of paths, other than those of its irreps")
