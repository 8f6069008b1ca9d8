"""A machine that carries out pickles, which knows no import and no call."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from forcetune.backbones.safe_unpickle.values import (
    Global,
    MalformedError,
    Record,
    Storage,
    check_key,
    fill_array,
    make,
    named,
)

_COPIES = 2  # times the size of its pickle
_SIZED = (list, tuple, dict, set, frozenset, str, bytes, bytearray)


class Machine:
    """Carries out the opcodes of a pickle."""

    def __init__(self, load_storage: Callable[[Any], Storage]) -> None:
        self._load_storage = load_storage
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0
        self._most_copied = 0

    def run(self, program: bytes) -> Any:
        self._most_copied = _COPIES * len(program) + (1 << 20)
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return self._stack.pop()
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _LITERALS:
                self._stack.append(argument)
            elif opcode.name not in _IGNORED:
                operation = _OPERATIONS.get(opcode.name)
                if operation is None:
                    raise MalformedError(f"its pickle uses {opcode.name}, which torch.save does not")
                operation(self, argument)
        raise MalformedError("its pickle has no end")

    def _pop_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._below.pop()
        return values

    def mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def pop(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def pop_mark(self, _: Any) -> None:
        self._pop_mark()

    def duplicate(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def remember(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def recall(self, index: Any) -> None:
        self._stack.append(self._memo[index])

    def tuple_of(self, length: int) -> None:
        if len(self._stack) < length:
            raise MalformedError("its pickle takes more values than there are")
        self._stack[-length:] = [tuple(self._stack[-length:])]

    def tuple_marked(self, _: Any) -> None:
        values = tuple(self._pop_mark())
        self._stack.append(values)

    def list_marked(self, _: Any) -> None:
        values = self._pop_mark()
        self._stack.append(values)

    def frozenset_marked(self, _: Any) -> None:
        values = frozenset(check_key(value) for value in self._pop_mark())
        self._stack.append(values)

    def dict_marked(self, _: Any) -> None:
        values = self._pop_mark()
        self._stack.append({})
        self._set(values)

    def append(self, _: Any) -> None:
        value = self._stack.pop()
        self._extend([value])

    def appends(self, _: Any) -> None:
        self._extend(self._pop_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Record):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            raise MalformedError(f"values are appended to a {type(target).__name__}")

    def add_items(self, _: Any) -> None:
        values = self._pop_mark()
        target = self._stack[-1]
        if not isinstance(target, set):
            raise MalformedError(f"values are added to a {type(target).__name__}")
        target.update(check_key(value) for value in values)

    def set_item(self, _: Any) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._set([key, value])

    def set_items(self, _: Any) -> None:
        self._set(self._pop_mark())

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        entries = target.entries if isinstance(target, Record) else target
        if not isinstance(entries, dict) or len(values) % 2:
            raise MalformedError(f"entries are set in a {type(target).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            entries[check_key(key)] = value

    def global_name(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(named(module, name))

    def stack_global(self, _: Any) -> None:
        name = self._stack.pop()
        module = self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedError("a name is not a text")
        self._stack.append(named(module, name))

    def _make(self, function: Any, args: Any) -> Any:
        """Make a value; those that it is made from may be named again and again, and each time is a copy."""
        if isinstance(args, tuple):
            self._spend(*args)
        return make(function, args)

    def _spend(self, *values: Any) -> None:
        self._copied += sum(len(value) for value in values if isinstance(value, _SIZED))
        if self._copied > self._most_copied:
            raise MalformedError("its pickle copies more than any model needs")

    def reduce(self, _: Any) -> None:
        args = self._stack.pop()
        self._stack.append(self._make(self._stack.pop(), args))

    def new_object(self, _: Any) -> None:
        args = self._stack.pop()
        kind = self._stack.pop()
        if not isinstance(kind, Global) or not isinstance(args, tuple):
            raise MalformedError("an object has no class")
        self._stack.append(self._make(kind, args))

    def new_object_with_names(self, _: Any) -> None:
        names = self._stack.pop()
        args = self._stack.pop()
        kind = self._stack.pop()
        if not isinstance(kind, Global) or not isinstance(args, tuple):
            raise MalformedError("an object has no class")
        self._stack.append(Record(kind.module, kind.name, (*args, names)))

    def build(self, _: Any) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, np.ndarray):
            if isinstance(state, tuple):
                self._spend(*state)
            fill_array(target, state)
        elif isinstance(target, Record):
            target.state = state
        elif not isinstance(target, (dict, list, set, torch.Tensor)):
            raise MalformedError(f"a {type(target).__name__} is filled with a state")

    def persistent(self, _: Any) -> None:
        self._stack.append(self._load_storage(self._stack.pop()))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_LITERALS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
_IGNORED = frozenset(("PROTO", "FRAME"))
_OPERATIONS: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": Machine.pop_mark,
    "DUP": Machine.duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine.recall),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": Machine.tuple_marked,
    "LIST": Machine.list_marked,
    "DICT": Machine.dict_marked,
    "FROZENSET": Machine.frozenset_marked,
    "APPEND": Machine.append,
    "APPENDS": Machine.appends,
    "ADDITEMS": Machine.add_items,
    "SETITEM": Machine.set_item,
    "SETITEMS": Machine.set_items,
    "GLOBAL": Machine.global_name,
    "STACK_GLOBAL": Machine.stack_global,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.new_object,
    "NEWOBJ_EX": Machine.new_object_with_names,
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent,
}
