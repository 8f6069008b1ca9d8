"""One view of a MACE model for both of its forms: the module in memory and the inert records of a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from forcetune.backbones.safe_unpickle.reader import Global, Record, read_inert_bytes
from forcetune.kernels.tensors import UnfitError

ADAPTER = "forcetune_adapter"
_MOST_MODULES = 20_000
_DEEPEST = 40
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GRAPHS = frozenset(("reduce_graph_module", "reduce_package_graph_module", "reduce_deploy_graph_module"))
# graphs of contractions, which evaluate the polynomials of their couplings and weights
_CONTRACTION_GRAPHS = ("graph_opt_main", "contractions_weighting", "contractions_features")
UNKNOWN = object()


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
        hooked: code of the file's own would run when it is called.
    """

    kind: str
    package: str
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    children: dict[str, Node | None] = field(default_factory=dict)
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
    part = state.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping) or any(not isinstance(key, str) for key in part):
        raise UnfitError(f"its {name} is no table of names")
    return part


def node_from_record(
    record: Any, read_graph: Callable[[Record], Node], _budget: _Budget | None = None, _path: tuple[str, ...] = ()
) -> Node:
    """The view of a module read by :func:`~forcetune.backbones.safe_unpickle.reader.read_inert`.

    Args:
        record: of the module.
        read_graph: gives the node of a part that was traced into a graph.

    Raises:
        UnfitError: it is no module.
        InputError: compiled code in it is damaged.
    """
    budget = _budget or _Budget()
    budget.spend(len(_path))
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
        elif not (isinstance(child, Record) and child.name in _GRAPHS):
            node.children[name] = node_from_record(child, read_graph, budget, (*_path, name))
        elif not any(part in _CONTRACTION_GRAPHS for part in (*_path[-1:], name)):
            node.children[name] = read_graph(child)
    node.hooked = any(state.get(name) for name in _HOOKS)
    internal = nn.Module().__dict__.keys() | {"__codegen__"}
    node.attributes = {name: v for name, v in state.items() if isinstance(name, str) and name not in internal}
    return node


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
        elif not isinstance(child, fx.GraphModule):
            node.children[name] = node_from_module(child)
    node.hooked = any(getattr(module, table, None) for table in _HOOKS)
    internal = nn.Module().__dict__.keys() | {"__codegen__"}
    node.attributes = {name: v for name, v in vars(module).items() if name not in internal}
    return node


def _fields(value: Any) -> tuple[Any, ...]:
    """Members of a tuple of a class of its own, which is stored by its members or by one tuple of them."""
    args = value.args if isinstance(value, Record) else tuple(value)
    return args[0] if len(args) == 1 and isinstance(args[0], tuple) else args


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
    """Name of a function in either form, with its module unless that is PyTorch's; None for what is no function."""
    if isinstance(value, Global):
        name, home = value.name, value.module
    elif isinstance(value, Record) and value.name == "getattr" and len(value.args) == 2:
        # functions of C, such as torch.tanh, are stored as members of a class
        name, home = str(value.args[1]), str(getattr(value.args[0], "module", "?"))
    elif callable(value) and hasattr(value, "__name__"):
        name, home = str(value.__name__), str(getattr(value, "__module__", None) or "torch")
    else:
        return None
    return name if home.split(".")[0] == "torch" else f"{home}.{name}"


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
