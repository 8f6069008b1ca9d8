"""Reading files of ``torch.save`` without running anything that they contain.

A pickle is a program: it may import any module and call any function, and those of models do so to restore compiled
code. Here the program is carried out by a machine of our own that knows no import and no call. Tensors and plain
values come out as themselves, everything else as a :class:`Record`.
"""

from __future__ import annotations

import io
import os
import pickletools
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from forcetune.backbones.safe_unpickle.values import (
    STORAGES,
    Global,
    MalformedError,
    Record,
    Storage,
    check_key,
    fill_array,
    make,
    named,
)
from forcetune.errors import InputError
from forcetune.utils.parsing import short

__all__ = ["Global", "InertFile", "Record", "read_inert", "read_inert_bytes", "read_inert_file"]

_PICKLE_LIMIT = 1 << 27  # bytes; the pickles of the largest published models have a few million
_RATIO_LIMIT = 20  # torch stores without compression, so anything far above 1 is a decompression bomb
_COPIES = 2  # times the size of its pickle
_SIZED = (list, tuple, dict, set, frozenset, str, bytes, bytearray)
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _Archive:
    """The members of a zip archive of ``torch.save``."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._zip = zipfile.ZipFile(stream)
        members = self._zip.infolist()
        self._names = {member.filename: member for member in members}
        if len(self._names) != len(members):
            raise MalformedError("two members of the archive have the same name")
        if sum(member.file_size for member in members) > _RATIO_LIMIT * size:
            raise MalformedError(f"the archive would unpack to more than {_RATIO_LIMIT} times its size")
        pickles = [name for name in self._names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise MalformedError("the archive holds no data.pkl, or several")
        self.prefix = pickles[0].removesuffix("data.pkl")
        self.scripted = any(name.startswith(f"{self.prefix}code/") for name in self._names)
        self._storages: dict[str, Storage] = {}
        self._check_byte_order()

    def _check_byte_order(self) -> None:
        name = f"{self.prefix}byteorder"
        order = self._zip.read(name).decode("ascii", "replace") if name in self._names else sys.byteorder
        if order != sys.byteorder:
            raise MalformedError(f"it was written on a {order}-endian machine, which cannot be read here")

    def storages(self) -> dict[str, torch.Tensor]:
        """Storages that were read, flat, by the name of their member."""
        found = {}
        for key, storage in self._storages.items():
            folders = (folder for folder in ("data", "constants") if f"{self.prefix}{folder}/{key}" in self._names)
            found[f"{self.prefix}{next(folders)}/{key}"] = storage.flat
        return found

    def pickle(self) -> bytes:
        member = self._names[f"{self.prefix}data.pkl"]
        if member.file_size > _PICKLE_LIMIT:
            raise MalformedError(f"its pickle has {member.file_size} bytes, more than any model needs")
        return self._zip.read(member)

    def storage(self, reference: Any) -> Storage:
        """The storage that a persistent id ``('storage', type, key, location, numel)`` stands for, on the CPU."""
        if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
            raise MalformedError("a persistent id is not that of a storage")
        _, kind, key, _, count = reference[:5]
        dtype = STORAGES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or not isinstance(key, str) or type(count) is not int:
            raise MalformedError(f"a storage has the unknown type {short(kind)}")
        if key not in self._storages:
            self._storages[key] = self._read_storage(key, dtype)
        found = self._storages[key]
        if found.flat.dtype != dtype or found.flat.numel() < count:
            raise MalformedError(f"storage {key} holds fewer elements than the {count} it should, or others")
        return found

    def _read_storage(self, key: str, dtype: torch.dtype) -> Storage:
        for folder in ("data", "constants"):
            member = self._names.get(f"{self.prefix}{folder}/{key}")
            if member is not None:
                content = bytearray(self._zip.read(member))
                width = torch.empty(0, dtype=dtype).element_size()
                if len(content) % width:
                    raise MalformedError(f"storage {key} ends within an element")
                if not content:
                    return Storage(torch.empty(0, dtype=dtype))
                if dtype is torch.bool:  # bytes other than 0 and 1 would be undefined as bool
                    return Storage(torch.frombuffer(content, dtype=torch.uint8) != 0)
                return Storage(torch.frombuffer(content, dtype=dtype))
        raise MalformedError(f"storage {key} is missing from the archive")


class _Machine:
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
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": _Machine.tuple_marked,
    "LIST": _Machine.list_marked,
    "DICT": _Machine.dict_marked,
    "FROZENSET": _Machine.frozenset_marked,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "NEWOBJ_EX": _Machine.new_object_with_names,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


@dataclass(frozen=True, slots=True)
class InertFile:
    """What a file of ``torch.save`` holds.

    Attributes:
        content: as :func:`read_inert` gives it.
        storages: the memory that its tensors are views of, flat, by the name of the archive's member.
    """

    content: Any
    storages: dict[str, torch.Tensor]


def _read(stream: BinaryIO, size: int, what: str, *, scripted: bool) -> InertFile:
    try:
        archive = _Archive(stream, size)
        if archive.scripted and not scripted:
            raise InputError(
                f"{what} is a TorchScript archive (such as mace writes for LAMMPS), which holds compiled code only; "
                "pass the .model file that it was made from."
            )
        content = _Machine(archive.storage).run(archive.pickle())
        return InertFile(content, archive.storages())
    except MalformedError as error:
        raise InputError(f"{what} cannot be read: {error}. Get a fresh copy of the file.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise InputError(f"{what} is damaged or incomplete ({error}); get a fresh copy of the file.") from error
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        RuntimeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise InputError(f"{what} holds a damaged pickle ({error}); get a fresh copy of the file.") from error


def read_inert(path: str | os.PathLike[str]) -> Any:
    """What a file of ``torch.save`` holds, tensors on the CPU, without running anything that it contains.

    Returns:
        The content of :func:`read_inert_file`.

    Raises:
        InputError: as that.
    """
    return read_inert_file(path).content


def read_inert_file(path: str | os.PathLike[str]) -> InertFile:
    """As :func:`read_inert`, with the storages that tensors are views of.

    Returns:
        Tensors and plain values (numbers, text, bytes, containers, dtypes, sizes, devices, slices, numpy arrays) as
        themselves; every other object as a :class:`Record`; names of classes and functions as :class:`Global`.

    Raises:
        InputError: no such file, not a file of ``torch.save``, damaged, or built to exhaust memory.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(len(_LEGACY))
            if start == _LEGACY:
                raise InputError(
                    f"{file} is in the format of torch before 1.6, which is not read; load it where you trust it and "
                    "write it again with torch.save."
                )
            if not zipfile.is_zipfile(stream):
                found = "is empty" if size == 0 else "is not a file of torch.save, or an incomplete one"
                raise InputError(f"{file} {found}; pass the .model file that mace wrote, or download it again.")
            stream.seek(0)
            return _read(stream, size, str(file), scripted=False)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); check the path.") from error


def read_inert_bytes(content: bytes, what: str) -> Any:
    """As :func:`read_inert`, for an archive in memory, which may be a TorchScript one; its code is not looked at."""
    return _read(io.BytesIO(content), len(content), what, scripted=True).content
