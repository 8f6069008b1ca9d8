"""Symmetric contractions that mace has traced into a list of operations, as ``prepare`` does since 0.3.15.

The tensors are in the file under their usual names. The operations are carried out once, on random features, by an
interpreter of our own that knows the few that contractions consist of, and compared with our own layer.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from forcetune.backbones.mace.module_spec import Node, node_from_record
from forcetune.backbones.safe_unpickle.reader import Record
from forcetune.irreps import parse_irreps
from forcetune.kernels.edge_plan import make_plan
from forcetune.kernels.features import Features
from forcetune.kernels.phase import Phase
from forcetune.kernels.step import Step
from forcetune.kernels.symmetric_contraction import SymmetricContraction
from forcetune.kernels.tensors import UnfitError

CODE = "traced_code"
"""Attribute of the node of a traced contraction."""

_LONGEST = 200_000  # characters of code
_LARGEST = 1 << 25  # elements of a result
_MOST_PRODUCTS = 1 << 32  # of numbers; the largest published models have a thousandth of that for three atoms
_ATOMS = 3
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}
_ERRORS = (ValueError, TypeError, IndexError, KeyError, OverflowError, RuntimeError, AttributeError, SyntaxError)


def traced_contraction(modules: Mapping[str, Any], code: str, read_graph: Callable[[Record], Node]) -> Node:
    """The node of a symmetric contraction from the parts and the code of its graph.

    Raises:
        UnfitError: it has other parts.
    """
    if len(code) > _LONGEST:
        raise UnfitError("one of its contractions was traced in an unknown way")
    contractions = node_from_record(modules["contractions"], read_graph)
    members: dict[str, Node | None] = {}
    for name, member in contractions.children.items():
        weights = None if member is None else member.children.get("weights")
        if member is None or weights is None:
            raise UnfitError("one of its contractions was traced in an unknown way")
        weights = replace(weights, kind="ParameterList", package="torch")
        members[name] = replace(member, kind="Contraction", package="mace", children={"weights": weights})
    listed = Node("ModuleList", "torch", children=members)
    return Node("SymmetricContraction", "mace", {CODE: code}, children={"contractions": listed})


def check_traced(node: Node, module: SymmetricContraction, n_species: int, agnostic: bool, where: str) -> None:
    """Compare what was traced with our layer of the same tensors.

    Args:
        node: as :func:`traced_contraction` returns it.
        module: ours.
        n_species: elements of the model.
        agnostic: all elements share the weights.
        where: for messages.

    Raises:
        UnfitError: it computes something else, or in an unknown way.
    """
    weight = next(iter(node.all_tensors().values()))
    dtype = weight.dtype
    generator = torch.Generator().manual_seed(0)
    blocks = parse_irreps(module.irreps_in)
    size = sum(block.dim for block in blocks)
    x = torch.randn(_ATOMS, blocks[0].multiplicity, size, generator=generator, dtype=torch.float64).to(dtype)
    species = torch.arange(_ATOMS).clamp(max=n_species - 1)
    kinds = torch.ones(_ATOMS, 1) if agnostic else functional.one_hot(species, n_species)
    parts, start = [], 0
    for block in blocks:
        parts.append(x[:, :, start : start + block.dim].transpose(1, 2))
        start += block.dim
    plan = make_plan(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3), species)
    empty = torch.zeros(0, 1, dtype=dtype)
    step = Step(plan, Phase(), empty, empty, None, kinds.to(dtype))
    with torch.no_grad():
        expected = module(Features(parts, geometric=False, trains=False), step).flat
        try:
            result = _Interpreter(node.all_tensors(), x, kinds.to(dtype)).run(node.attributes[CODE])
        except (*_ERRORS, MemoryError) as error:
            raise UnfitError(f"{where} was traced in an unknown way ({error})") from error
        same = isinstance(result, Tensor) and result.shape == expected.shape
        if not same or not bool((result - expected).abs().max() <= _TOLERANCE[dtype] * expected.abs().max()):
            raise UnfitError(f"{where} was traced to compute something else than a symmetric contraction")


class _Interpreter:
    """Carries out the code of a traced contraction.

    Args:
        tensors: of the graph, by dotted name.
        x: (atoms, channels, components) features.
        y: (atoms, elements) one-hot.
    """

    def __init__(self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor) -> None:
        self._tensors = tensors
        self._known: dict[str, Any] = {"x": x, "y": y}
        self._left = _MOST_PRODUCTS

    def run(self, code: str) -> Any:
        """What the code returns."""
        (function,) = ast.parse(code.strip()).body
        if not isinstance(function, ast.FunctionDef) or [a.arg for a in function.args.args] != ["self", "x", "y"]:
            raise ValueError("it is no function of features and elements")
        for line in function.body:
            if isinstance(line, ast.Return) and line.value is not None:
                return self._value(line.value)
            targets = line.targets if isinstance(line, ast.Assign) else []
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if not isinstance(line, ast.Assign) or len(names) < len(targets):
                raise ValueError("it is no list of operations")
            # x = y = None forgets both
            self._known.update(dict.fromkeys(names, self._value(line.value)))
        raise ValueError("it returns nothing")

    def _value(self, value: ast.expr) -> Any:
        if isinstance(value, ast.Constant):
            return value.value
        if isinstance(value, ast.Name):
            return self._known[value.id]
        path = _path(value)
        if path is not None:
            return self._tensors[path]
        if isinstance(value, ast.Attribute) and value.attr == "shape":
            return tuple(self._tensor(value.value).shape)
        if isinstance(value, ast.Subscript):
            return self._value(value.value)[int(ast.literal_eval(value.slice))]
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            one, other = self._tensor(value.left), self._tensor(value.right)
            if one.shape != other.shape:
                raise ValueError("a sum of different shapes")
            return one + other
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            return self._called(value, value.func)
        raise ValueError(f"an unknown operation, {ast.unparse(value)[:80]}")

    def _tensor(self, value: ast.expr) -> Tensor:
        tensor = self._value(value)
        if not isinstance(tensor, Tensor):
            raise TypeError("a number where a tensor should be")
        return tensor

    def _called(self, call: ast.Call, function: ast.Attribute) -> Tensor:
        name, options = function.attr, {word.arg: word.value for word in call.keywords}
        home = ast.unparse(function.value)
        if home == "torch.functional" and name == "tensordot":
            one, other = map(self._tensor, call.args)
            first, second = map(list, ast.literal_eval(options["dims"]))
            summed = max(1, math.prod(one.shape[axis] for axis in first))
            self._spend((one.numel() // summed) * (other.numel() // summed), summed)
            return torch.tensordot(one, other, dims=(first, second))  # pyright: ignore[reportArgumentType]
        if home == "torch.functional" and name == "einsum":
            return self._einsum(str(self._value(call.args[0])), list(map(self._tensor, call.args[1:])))
        if home == "torch" and name == "cat" and isinstance(call.args[0], ast.List):
            return torch.cat(list(map(self._tensor, call.args[0].elts)), dim=ast.literal_eval(options["dim"]))
        if name in ("view", "reshape", "permute"):
            numbers = [-1 if isinstance(part, ast.UnaryOp) else int(self._value(part)) for part in call.args]
            moved = self._tensor(function.value)
            return moved.permute(numbers) if name == "permute" else moved.reshape(numbers)
        raise ValueError(f"an unknown operation, {ast.unparse(call)[:80]}")

    def _einsum(self, equation: str, factors: list[Tensor]) -> Tensor:
        sources, _, target = equation.replace(" ", "").partition("->")
        sizes: dict[str, int] = {}
        for letters, factor in zip(sources.split(","), factors, strict=True):
            if not letters.isalpha():
                raise ValueError(f"a sum {equation[:40]}")
            sizes.update(zip(letters, factor.shape, strict=True))
        elements = math.prod(sizes[letter] for letter in target)
        self._spend(elements, math.prod(sizes.values()) // max(elements, 1))
        return torch.einsum(equation, *factors)

    def _spend(self, elements: int, terms: int) -> None:
        """Refuse results, or more work, than any contraction of a few atoms has."""
        self._left -= elements * max(terms, 1)
        if self._left < 0 or elements > _LARGEST:
            raise ValueError("results larger than any contraction's")


def _path(value: ast.expr) -> str | None:
    """Dotted name of one of the graph's own tensors; None for anything else."""
    if isinstance(value, ast.Name):
        return "" if value.id == "self" else None
    if isinstance(value, ast.Attribute):
        owner, name = _path(value.value), value.attr
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "getattr":
        owner, name = _path(value.args[0]), str(ast.literal_eval(value.args[1]))
    else:
        return None
    return None if owner is None else f"{owner}.{name}".lstrip(".")
