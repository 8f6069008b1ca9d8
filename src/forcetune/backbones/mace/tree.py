"""One view of a MACE model for both of its forms: the module in memory and the inert records of a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from forcetune.backbones.inert import Global, Record, read_inert_bytes
from forcetune.irreps import merge_neighbours, parse_irreps

ADAPTER = "forcetune_adapter"
_MOST_MODULES = 20_000
_DEEPEST = 40
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GRAPHS = frozenset(("reduce_graph_module", "reduce_package_graph_module", "reduce_deploy_graph_module"))
UNKNOWN = object()

# attributes that do not tell one function from another, or that the architecture carries
_NOT_COMPARED = frozenset(
    ("training", "cst", "coeff", "r_max", "avg_num_neighbors", "heads", "use_reduced_cg", "lammps_mliap")
)


class UnfitError(Exception):
    """The model cannot be rebuilt; says why, in words that complete "cannot be rebuilt: …"."""


@dataclass(slots=True)
class Node:
    """A module, whichever form it has.

    Attributes:
        kind: class name.
        package: first part of the class's module.
        attributes: what is neither tensor nor module.
        tensors: parameters (as ``nn.Parameter``) and buffers by name.
        constants: buffers of compiled code, by dotted name.
        children: modules by name; compiled code is none; None where an activation is the identity.
        traced: names of children that are graphs of torch.fx, which are code and not looked into.
        hooked: code of the file's own would run when it is called.
    """

    kind: str
    package: str
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    children: dict[str, Node | None] = field(default_factory=dict)
    traced: list[str] = field(default_factory=list)
    hooked: bool = False

    def child(self, path: str) -> Node:
        """The module at a dotted path.

        Raises:
            UnfitError: there is none.
        """
        node: Node | None = self
        for part in path.split("."):
            node = None if node is None else node.children.get(part)
        if node is None:
            raise UnfitError(f"it has no {path}")
        return node

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer ``name``.

        Raises:
            UnfitError: there is none.
        """
        if name not in self.tensors:
            raise UnfitError(f"its {self.kind} has no {name}")
        return self.tensors[name]

    def walk(self, prefix: str = "") -> Iterator[tuple[str, Node]]:
        """Every module below and this one, with its dotted name followed by a dot (nothing for the root)."""
        yield prefix, self
        for name, child in self.children.items():
            if child is not None:
                yield from child.walk(f"{prefix}{name}.")

    def all_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of all modules by dotted name."""
        return {f"{prefix}{name}": t for prefix, node in self.walk() for name, t in node.tensors.items()}

    def all_constants(self) -> dict[str, Tensor]:
        """Buffers of all compiled code by dotted name."""
        return {f"{prefix}{name}": t for prefix, node in self.walk() for name, t in node.constants.items()}


class _Budget:
    """Counts modules: a file may refer to one module from many, which multiplies from level to level."""

    def __init__(self) -> None:
        self.left = _MOST_MODULES
        self._compiled: dict[int, Any] = {}

    def compiled(self, blob: bytes, what: str) -> Any:
        """What compiled code holds; the same bytes may belong to many modules and are read once."""
        if id(blob) not in self._compiled:
            self._compiled[id(blob)] = getattr(read_inert_bytes(blob, f"compiled code of {what}"), "state", None)
        return self._compiled[id(blob)]

    def spend(self, depth: int) -> None:
        self.left -= 1
        if self.left < 0 or depth > _DEEPEST:
            raise UnfitError("its modules are nested without end")


def _part(state: Mapping[Any, Any], name: str) -> Mapping[str, Any]:
    found = state.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping) or any(not isinstance(key, str) for key in found):
        raise UnfitError(f"its {name} is no table of names")
    return found


def node_from_record(record: Any, _budget: _Budget | None = None, _depth: int = 0) -> Node:
    """The view of a module read by :func:`~forcetune.backbones.inert.read_inert`.

    Raises:
        UnfitError: it is no module.
        InputError: compiled code in it is damaged.
    """
    budget = _budget or _Budget()
    budget.spend(_depth)
    if isinstance(record, Record) and record.name == "OptimizedModule":  # what torch.compile wraps around a model
        return node_from_record(_inside(record), budget, _depth + 1)
    if not isinstance(record, Record) or not isinstance(record.state, dict):
        raise UnfitError(f"it holds a {getattr(record, 'name', type(record).__name__)} where a module should be")
    state = record.state
    node = Node(record.name, record.module.split(".")[0])
    for table in ("_parameters", "_buffers"):
        for name, value in _part(state, table).items():
            if value is not None and not isinstance(value, Tensor):
                raise UnfitError(f"its tensor {name} is stored in an unknown way")
            if value is not None:
                node.tensors[name] = value
    for name, blob in _part(state, "__codegen__").items():
        if not isinstance(blob, bytes):
            raise UnfitError("its compiled code is stored in an unknown way")
        constants = budget.compiled(blob, record.name)
        for key, value in (constants if isinstance(constants, dict) else {}).items():
            if isinstance(value, Tensor):
                node.constants[f"{name}.{key}"] = value
    for name, child in _part(state, "_modules").items():
        if child is None:
            node.children[name] = None
        elif isinstance(child, Record) and child.name in _GRAPHS:
            node.traced.append(name)
        else:
            node.children[name] = node_from_record(child, budget, _depth + 1)
    node.hooked = any(state.get(name) for name in _HOOKS)
    internal = nn.Module().__dict__.keys() | {"__codegen__"}
    node.attributes = {name: v for name, v in state.items() if isinstance(name, str) and name not in internal}
    _leave_unread_parts_out(node)
    return node


def _inside(compiled: Record) -> Any:
    """The model in a record of ``torch.compile``, which is the first argument or a module by name."""
    if compiled.args:
        return compiled.args[0]
    state = compiled.state if isinstance(compiled.state, dict) else {}
    return _part(state, "_modules").get("_orig_mod")


def node_from_module(module: nn.Module) -> Node:
    """The view of a module in memory; an adapter that is attached to it is left out."""
    node = Node(type(module).__name__, type(module).__module__.split(".")[0])
    for table in (module._parameters, module._buffers):
        node.tensors.update({name: t for name, t in table.items() if t is not None})
    compiled = set(getattr(module, "__codegen__", ()))
    for name, child in module._modules.items():
        if name == ADAPTER:
            continue
        if child is None:
            node.children[name] = None
        elif name in compiled:
            node.constants.update({f"{name}.{key}": t for key, t in child.named_buffers()})
        elif isinstance(child, fx.GraphModule):
            node.traced.append(name)
        else:
            node.children[name] = node_from_module(child)
    internal = nn.Module().__dict__.keys() | {"__codegen__"}
    node.attributes = {name: v for name, v in vars(module).items() if name not in internal}
    _leave_unread_parts_out(node)
    return node


def _leave_unread_parts_out(node: Node) -> None:
    """Remove what a version of mace stored but never read.

    Up to 0.3.9 the pair repulsion carried the model's cutoff and an envelope with it; what it computes with are the
    covalent radii.
    """
    if node.kind == "ZBLBasis":
        node.tensors.pop("r_max", None)
        node.children.pop("cutoff", None)


def with_tensors(node: Node, tensors: Mapping[str, Tensor], prefix: str = "") -> Node:
    """The same view with other tensors, by dotted name; all have to be there."""
    children = {
        name: None if child is None else with_tensors(child, tensors, f"{prefix}{name}.")
        for name, child in node.children.items()
    }
    return replace(node, children=children, tensors={name: tensors[f"{prefix}{name}"] for name in node.tensors})


def _fields(value: Any) -> tuple[Any, ...]:
    """Members of a tuple of a class of its own, which is stored by its members or by one tuple of them."""
    args = value.args if isinstance(value, Record) else tuple(value)
    return args[0] if len(args) == 1 and isinstance(args[0], tuple) else args


def weighted_shapes(product: Node) -> list[tuple[int, ...]]:
    """Shapes (first, second, out) of the paths of a tensor product that have weights, in the order of these.

    Raises:
        UnfitError: they are stored in an unknown way.
    """
    try:
        entries = [_fields(entry) for entry in product.attributes["instructions"]]
        return [tuple(int(n) for n in shape) for _, _, _, _, has_weight, _, shape in entries if has_weight]
    except (KeyError, TypeError, ValueError) as error:
        raise UnfitError("the paths of a tensor product are stored in an unknown way") from error


def irreps_text(value: Any) -> str:
    """Irreps, given as text, as e3nn's object or as its record, written as ``8x0e+8x1o``.

    Raises:
        UnfitError: they are stored in an unknown way.
    """
    if isinstance(value, Record):
        try:
            entries = [(mul, *_fields(irrep)) for mul, irrep in map(_fields, _fields(value))]
            return "+".join(f"{int(mul)}x{int(ell)}{'e' if parity == 1 else 'o'}" for mul, ell, parity in entries)
        except (TypeError, ValueError) as error:
            raise UnfitError("its irreps are stored in an unknown way") from error
    return str(value).replace(" ", "")


def function_name(value: Any) -> str | None:
    """Name of a function in either form, without its module; None for what is no function."""
    if isinstance(value, Global):
        return value.name
    if isinstance(value, Record) and value.name == "getattr" and len(value.args) == 2:
        return str(value.args[1])  # functions of C, such as torch.tanh, are stored as members of a class
    return getattr(value, "__name__", None) if callable(value) else None


def canonical(name: str, value: Any) -> Any:
    """A plain form of an attribute, equal for both forms of a model; ``UNKNOWN`` for what has none."""
    if type(value).__name__ == "Irreps" or (isinstance(value, Record) and value.name == "Irreps"):
        return irreps_text(value)
    if isinstance(value, str) and "irreps" in name:
        return irreps_text(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    name_of_function = function_name(value)
    if name_of_function is not None:
        return name_of_function
    if isinstance(value, Record):
        return UNKNOWN if value.state is not None else canonical(name, _fields(value))
    if isinstance(value, (list, tuple)):
        parts = tuple(canonical(name, part) for part in value)
        return UNKNOWN if any(part is UNKNOWN for part in parts) else parts
    return UNKNOWN


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        return numbers and math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left == right


def _compared(node: Node) -> dict[str, Any]:
    """Attributes to compare; of an equivariant linear in the form it has on simplified irreps.

    Up to 0.3.8 mace simplified the irreps of the linear layer after the convolution: 64 inputs of one block, where
    later versions have two blocks of 32. Weights lie in memory in the same order, and either way they are divided
    by the root of all inputs of an output.
    """
    if node.kind != "Linear" or not {"instructions", "irreps_in"} <= node.attributes.keys():
        return node.attributes
    instructions = canonical("instructions", node.attributes["instructions"])
    irreps = irreps_text(node.attributes["irreps_in"])
    if instructions is UNKNOWN or not irreps:
        return node.attributes
    irrep_of_block = [block.partition("x")[2] for block in irreps.split("+")]
    merged: list[tuple[Any, ...]] = []
    last = None
    for i_in, i_out, shape, weight in instructions:
        entry = (irrep_of_block[i_in] if i_in >= 0 else "bias", i_out, shape, weight)
        if last is not None and (entry[0], i_in, i_out, shape[1:], weight) == last:
            entry = (entry[0], i_out, (merged.pop()[2][0] + shape[0], *shape[1:]), weight)
        merged.append(entry)
        last = (entry[0], i_in + 1, i_out, shape[1:], weight) if i_in >= 0 else None
    simplified = tuple((block.multiplicity, block.irrep) for block in merge_neighbours(parse_irreps(irreps)))
    return node.attributes | {"instructions": tuple(merged), "irreps_in": simplified}


def check_same(found: Node, built: Node, prefix: str = "") -> None:
    """Check that two models compute the same function of their tensors, as far as their attributes tell.

    Attributes that only one of them has come from another version of the library and are not looked at.

    Raises:
        UnfitError: they do not, or code of the file's own belongs to one.
    """
    where = prefix.rstrip(".") or "the model"
    if (found.kind, found.package) != (built.kind, built.package):
        raise UnfitError(f"{where} is a {found.package}…{found.kind}, not a {built.package}…{built.kind}")
    if found.hooked or "forward" in found.attributes:
        raise UnfitError(f"{where} has code of the file's own attached")
    if set(found.children) != set(built.children):
        different = ", ".join(sorted(set(found.children) ^ set(built.children)))
        raise UnfitError(f"{where} differs in the parts {different}")
    one, other = _compared(found), _compared(built)
    for name in one.keys() & other.keys() - _NOT_COMPARED:
        left, right = canonical(name, one[name]), canonical(name, other[name])
        private_text = name.startswith("_") and isinstance(left, str)  # descriptions for profilers
        if left is UNKNOWN or right is UNKNOWN or private_text:
            continue
        if not _equal(left, right):
            raise UnfitError(f"{where} has {name} = {left!r} where {right!r} was expected")
    for name, child in found.children.items():
        counterpart = built.children[name]
        if (child is None) != (counterpart is None):
            raise UnfitError(f"{prefix}{name} is missing")
        if child is not None and counterpart is not None:
            check_same(child, counterpart, f"{prefix}{name}.")


def number(value: Any, what: str) -> float:
    """A number stored as such or as a tensor of one element.

    Raises:
        UnfitError: it is none, or not finite.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise UnfitError(f"its {what} is {type(value).__name__} and no finite number")
    return float(value)


def dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The precision of a model: that of its embedding."""
    found = tensors.get("node_embedding.linear.weight")
    if found is None or found.dtype not in (torch.float32, torch.float64):
        raise UnfitError("it is neither in float32 nor in float64")
    return found.dtype
