"""The modules of a NequIP package as plain tables, from the inert records of its pickles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from forcetune.backbones.safe_unpickle.reader import Global, Record
from forcetune.kernels.tensors import UnfitError
from forcetune.utils.parsing import short

_MOST_MODULES = 20_000
_DEEPEST = 40
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INTERNAL = nn.Module().__dict__.keys() | {"__codegen__"}


@dataclass(slots=True)
class Node:
    """A module.

    Attributes:
        kind: name of its class.
        home: module of its class.
        path: dotted name.
        attributes: what is neither tensor nor module.
        tensors: parameters (as ``nn.Parameter``) and buffers.
        children: modules; compiled code is none.
    """

    kind: str
    home: str
    path: str
    attributes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    children: dict[str, Node] = field(default_factory=dict)

    def child(self, path: str, kind: str | None = None) -> Node:
        """The module at a dotted path.

        Raises:
            UnfitError: there is none, or it is of another class.
        """
        node = self
        for part in path.split("."):
            if part not in node.children:
                raise UnfitError(f"it has no {_joined(self.path, path)}")
            node = node.children[part]
        if kind is not None and node.kind != kind:
            raise UnfitError(f"its {node.path} is a {node.kind}, not a {kind}")
        return node

    def attribute(self, name: str) -> Any:
        """
        Raises:
            UnfitError: there is none of this name.
        """
        if name not in self.attributes:
            raise UnfitError(f"its {self.path} has no {name}")
        return self.attributes[name]

    def all_tensors(self) -> dict[str, Tensor]:
        """Of all modules below and this one, by dotted name from here."""
        tensors = dict(self.tensors)
        for name, child in self.children.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in child.all_tensors().items()}
        return tensors


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def read_tree(record: Any) -> Node:
    """The tree of a module that was read by :func:`~forcetune.backbones.safe_unpickle.reader.read_inert_package`.

    Raises:
        UnfitError: it is no module, or one that would run code of its own when it is called.
    """
    left = [_MOST_MODULES]

    def read_node(record: Any, path: str, depth: int) -> Node:
        left[0] -= 1
        if left[0] < 0 or depth > _DEEPEST:
            raise UnfitError("its modules are nested without end")
        if not isinstance(record, Record) or not isinstance(record.state, dict):
            raise UnfitError(f"it holds {short(record)} where a module should be")
        state = record.state
        node = Node(record.name, record.module, path)
        if any(_table(state, name) for name in _HOOKS):
            raise UnfitError(f"its {path or record.name} has hooks, code that would run when it is called")
        for name in ("_parameters", "_buffers"):
            for key, value in _table(state, name).items():
                if value is not None and not isinstance(value, Tensor):
                    raise UnfitError(f"its tensor {_joined(path, key)} is stored in an unknown way")
                if value is not None:
                    node.tensors[key] = value
        compiled = _table(state, "__codegen__")
        for key, child in _table(state, "_modules").items():
            if child is not None and key not in compiled:
                node.children[key] = read_node(child, _joined(path, key), depth + 1)
        node.attributes = {key: value for key, value in state.items() if isinstance(key, str) and key not in _INTERNAL}
        return node

    return read_node(record, "", 0)


def _table(state: Mapping[Any, Any], name: str) -> Mapping[str, Any]:
    table = state.get(name)
    if isinstance(table, Record):  # an OrderedDict with a state of its own
        table = table.entries
    if table is None:
        return {}
    if not isinstance(table, Mapping) or any(not isinstance(key, str) for key in table):
        raise UnfitError(f"its {name} is no table of names")
    return table


def _fields(value: Any) -> tuple[Any, ...]:
    """Members of a tuple of a class of its own, which is stored by its members or by one tuple of them."""
    args = value.args if isinstance(value, Record) else tuple(value)
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


def read_irreps(value: Any, what: str) -> str:
    """e3nn's irreps as text; text stays as it is.

    Raises:
        UnfitError: they are stored in an unknown way.
    """
    if isinstance(value, str):
        return value.replace(" ", "")
    try:
        entries = [(mul, *_fields(irrep)) for mul, irrep in map(_fields, _fields(value))]
        return "+".join(f"{int(mul)}x{int(order)}{'e' if parity == 1 else 'o'}" for mul, order, parity in entries)
    except (TypeError, ValueError) as error:
        raise UnfitError(f"its {what} are stored in an unknown way") from error


def read_function_name(value: Any) -> str:
    """Name of a function that a module has as an attribute; of functions of other libraries with their home."""
    if isinstance(value, Global):
        home, name = value.module, value.name
    elif isinstance(value, Record) and value.name == "getattr" and len(value.args) == 2:
        # functions of C, such as torch.tanh, are stored as members of a class
        home, name = str(getattr(value.args[0], "module", "?")), str(value.args[1])
    else:
        return short(value)
    return name if home.split(".")[0] == "torch" else f"{home}.{name}"
