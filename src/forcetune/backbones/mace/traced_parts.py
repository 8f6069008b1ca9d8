"""Parts that mace has traced into a list of operations, as ``prepare`` makes them, read back as layers.

The operations are only looked at: two linear layers as products of tensors, one activation between them, and numbers.
Versions from 0.3.14 on trace the activation alone.
"""

from __future__ import annotations

import ast
import math
from typing import Any

from torch import Tensor

from forcetune.backbones.mace.module_spec import Node
from forcetune.backbones.mace.traced_contraction import traced_contraction
from forcetune.backbones.safe_unpickle.reader import Global, Record
from forcetune.kernels.tensors import UnfitError

# operations that move numbers and do not change them
_MOVES = frozenset(("reshape", "permute", "narrow", "view", "size", "contiguous"))
_LONGEST = 20_000  # characters of code
_ACTIVATIONS = frozenset(("silu", "tanh", "abs", "elu", "relu", "sigmoid", "gelu", "softplus"))


def traced_part(record: Record) -> Node:
    """The node of a nonlinear readout, of its activation, or of a contraction, from the record of its graph.

    Raises:
        UnfitError: the graph does something else.
    """
    state = record.args[0] if record.args and isinstance(record.args[0], dict) else {}
    modules, code = state.get("_modules"), state.get("_code")
    if isinstance(modules, dict) and set(modules) == {"contractions"} and isinstance(code, str):
        return traced_contraction(modules, code, traced_part)
    if not isinstance(modules, dict) or set(modules) not in (set(), {"linear_1", "linear_2"}):
        raise UnfitError("a part of it was traced into a graph, as by mace's prepare; save the model without that")
    if not isinstance(code, str) or len(code) > _LONGEST:
        raise UnfitError("its last readout was traced in an unknown way")
    try:
        return _traced_readout(modules, code) if modules else _traced_activation(code)
    except (ValueError, TypeError, IndexError, OverflowError, RecursionError, MemoryError, ZeroDivisionError) as error:
        raise UnfitError(f"its last readout was traced in an unknown way ({error})") from error


def _traced_readout(modules: dict[str, Any], code: str) -> Node:
    """Two linear layers and an activation between them."""
    weights = {name: _weight(modules[name]) for name in modules}
    steps = _steps(code)
    hidden = _hidden(steps, weights)
    inputs = weights["linear_1"].numel() // hidden
    heads = weights["linear_2"].numel() // hidden
    activations = [name for kind, name in steps if kind == "activation"]
    split = next((k for k, (kind, _) in enumerate(steps) if kind == "activation"), None)
    first, rest = (steps, []) if split is None else (steps[:split], steps[split + 1 :])
    if [kind for kind, _ in steps].count("product") != 2 or len(activations) > 1:
        raise UnfitError("its last readout was traced with other layers than two linear ones")
    after = math.prod(value for kind, value in rest if kind == "factor")
    before = math.prod(value for kind, value in first if kind == "factor")
    factor = after * math.sqrt(hidden)
    if not math.isclose(before, 1 / math.sqrt(inputs), rel_tol=1e-9) or not factor > 0 or split is None:
        raise UnfitError("its last readout was traced with other factors than those of its layers")
    irreps = f"{hidden}x0e"
    return Node(
        "NonLinearReadoutBlock",
        "mace",
        {"hidden_irreps": irreps, "num_heads": heads},
        children={
            "linear_1": _linear(f"{inputs}x0e", irreps, weights["linear_1"]),
            "non_linearity": _activation(irreps, activations[0], factor),
            "linear_2": _linear(irreps, f"{heads}x0e", weights["linear_2"]),
        },
    )


def _activation(irreps: str, name: str, factor: float) -> Node:
    is_identity = abs(factor - 1) < 1e-4  # then e3nn leaves the factor out
    attributes = {"f": Global("torch", name), "cst": factor, "_is_id": is_identity}
    acts = Node("ModuleList", "torch", children={"0": Node("normalize2mom", "e3nn", attributes)})
    return Node("Activation", "e3nn", {"irreps_in": irreps, "irreps_out": irreps}, children={"acts": acts})


def _traced_activation(code: str) -> Node:
    """One activation of all features."""
    steps = _steps(code)
    widths = [value for kind, value in steps if kind == "narrow"]
    kinds = [kind for kind, _ in steps if kind != "narrow"]
    if len(widths) != 1 or kinds not in (["activation"], ["activation", "factor"]):
        raise UnfitError("its last readout was traced with another activation than one of all features")
    values = dict(steps)
    return _activation(f"{widths[0]}x0e", values["activation"], values.get("factor", 1.0))


def _weight(record: Any) -> Tensor:
    state = getattr(record, "state", None)
    parameters = state.get("_parameters") if isinstance(state, dict) else None
    weight = parameters.get("weight") if isinstance(parameters, dict) else None
    if not isinstance(weight, Tensor):
        raise UnfitError("its last readout was traced in an unknown way")
    return weight


def _linear(irreps_in: str, irreps_out: str, weight: Tensor) -> Node:
    return Node("Linear", "e3nn", {"irreps_in": irreps_in, "irreps_out": irreps_out}, {"weight": weight})


def _hidden(steps: list[tuple[str, Any]], weights: dict[str, Tensor]) -> int:
    """Hidden features: the shape that the second weight is brought to before its product."""
    shapes = [value for kind, value in steps if kind == "matrix"]
    sizes = [shape[0] for shape in shapes if math.prod(shape) == weights["linear_2"].numel()]
    if not sizes or sizes[-1] < 1 or weights["linear_1"].numel() % sizes[-1]:
        raise UnfitError("its last readout was traced with weights of unknown shape")
    return sizes[-1]


def _steps(code: str) -> list[tuple[str, Any]]:
    """What the operations do, in order: products, factors, activations, matrices.

    Raises:
        UnfitError: one of them does something else.
    """
    try:
        (function,) = ast.parse(code).body
    except SyntaxError as error:
        raise UnfitError("the code of its last readout cannot be read") from error
    if not isinstance(function, ast.FunctionDef):
        raise UnfitError("the code of its last readout is no function")
    steps: list[tuple[str, Any]] = []
    for line in function.body:
        if isinstance(line, (ast.Assign, ast.Return)) and line.value is not None:
            steps.extend(_step(line.value))
        elif not isinstance(line, ast.Expr):
            raise UnfitError("the code of its last readout is no list of operations")
    return steps


def _step(value: ast.expr) -> list[tuple[str, Any]]:
    if isinstance(value, (ast.Name, ast.Constant, ast.Subscript, ast.Attribute)):
        return []
    if isinstance(value, ast.BinOp) and isinstance(value.right, ast.Constant) and isinstance(value.op, ast.Mult):
        return [("factor", float(value.right.value))]  # pyright: ignore[reportArgumentType]
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) and isinstance(value.right, ast.Tuple):
        return []  # a shape
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        name, arguments = value.func.attr, value.args
        if name == "reshape" and len(arguments) == 1 and isinstance(arguments[0], ast.Tuple):
            return [("matrix", tuple(int(ast.literal_eval(part)) for part in arguments[0].elts))]
        if name == "narrow" and len(arguments) == 3:
            start, width = (ast.literal_eval(argument) for argument in arguments[1:])
            if start != 0:
                raise UnfitError("its last readout was traced with an activation of some features only")
            return [("narrow", int(width))]
        if name in _MOVES:
            return []
        if name == "tensordot":
            return [("product", None)]
        if name == "mul" and len(arguments) == 1 and isinstance(arguments[0], ast.Constant):
            return [("factor", float(arguments[0].value))]  # pyright: ignore[reportArgumentType]
        if name in _ACTIVATIONS:
            return [("activation", name)]
    raise UnfitError(
        f"its last readout was traced with an operation that forcetune does not know ({ast.unparse(value)})"
    )
