"""Reading files of ``torch.save`` without running anything that they contain.

A pickle is a program: it may import any module and call any function, and those of models do so to restore compiled
code. Here the program is carried out by a machine of our own that knows no import and no call. Tensors and plain
values come out as themselves, everything else as a :class:`Record`.
"""

from __future__ import annotations

import io
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import torch

from forcetune.backbones.safe_unpickle.machine import Machine
from forcetune.backbones.safe_unpickle.values import STORAGES, Global, MalformedError, Record, Storage
from forcetune.errors import InputError
from forcetune.utils.parsing import short

__all__ = [
    "Global",
    "InertFile",
    "InertPackage",
    "Record",
    "read_inert",
    "read_inert_bytes",
    "read_inert_file",
    "read_inert_package",
    "read_package_text",
]

_PICKLE_LIMIT = 1 << 27  # bytes; the pickles of the largest published models have a few million
_RATIO_LIMIT = 20  # torch stores without compression, so anything far above 1 is a decompression bomb
_TEXT_LIMIT = 1 << 24
_MOST_PICKLES = 32
_PACKAGE_MARK = "/.data/extern_modules"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class _Archive:
    """The members of a zip archive of torch, of which storages are some."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._zip = zipfile.ZipFile(stream)
        members = self._zip.infolist()
        self._names = {member.filename: member for member in members}
        if len(self._names) != len(members):
            raise MalformedError("two members of the archive have the same name")
        if sum(member.file_size for member in members) > _RATIO_LIMIT * size:
            raise MalformedError(f"the archive would unpack to more than {_RATIO_LIMIT} times its size")
        self.prefix = self._find_prefix()
        self._storages: dict[str, tuple[str, Storage]] = {}
        self._check_byte_order()

    def _find_prefix(self) -> str:
        """Folder of all members, with a slash behind it; empty where there is none."""
        raise NotImplementedError

    def _places(self, key: str) -> list[str]:
        """Where a storage may lie below the prefix."""
        raise NotImplementedError

    def _check_byte_order(self) -> None:
        name = f"{self.prefix}byteorder"
        order = self._zip.read(name).decode("ascii", "replace") if name in self._names else sys.byteorder
        if order != sys.byteorder:
            raise MalformedError(f"it was written on a {order}-endian machine, which cannot be read here")

    def storages(self) -> dict[str, torch.Tensor]:
        """Storages that were read, flat, by the name of their member."""
        return {member: storage.flat for member, storage in self._storages.values()}

    def read(self, name: str, limit: int = _PICKLE_LIMIT) -> bytes:
        """The content of a member below the prefix.

        Raises:
            MalformedError: there is none, or it has more bytes than the limit.
        """
        member = self._names.get(f"{self.prefix}{name}")
        if member is None:
            raise MalformedError(f"the archive holds no {name}")
        if member.file_size > limit:
            raise MalformedError(f"its {name} has {member.file_size} bytes, more than any model needs")
        return self._zip.read(member)

    @property
    def names(self) -> list[str]:
        """Of members, below the prefix."""
        return [name.removeprefix(self.prefix) for name in self._names if name.startswith(self.prefix)]

    def persistent(self, reference: Any) -> Any:
        """What a persistent id stands for."""
        return self.storage(reference)

    def storage(self, reference: Any) -> Storage:
        """The storage that a persistent id ``('storage', type, key, location, numel)`` stands for, on the CPU."""
        if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
            raise MalformedError("a persistent id is not that of a storage")
        _, kind, key, _, count = reference[:5]
        dtype = STORAGES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or type(key) not in (str, int) or type(count) is not int:
            raise MalformedError(f"a storage has the unknown type {short(kind)}")
        name = str(key)
        if name not in self._storages:
            self._storages[name] = self._read_storage(name, dtype)
        storage = self._storages[name][1]
        if storage.flat.dtype != dtype or storage.flat.numel() < count:
            raise MalformedError(f"storage {name} holds fewer elements than the {count} it should, or others")
        return storage

    def _read_storage(self, key: str, dtype: torch.dtype) -> tuple[str, Storage]:
        for place in self._places(key):
            member = self._names.get(f"{self.prefix}{place}")
            if member is not None:
                return member.filename, _storage_from(bytearray(self._zip.read(member)), key, dtype)
        raise MalformedError(f"storage {key} is missing from the archive")


def _storage_from(content: bytearray, key: str, dtype: torch.dtype) -> Storage:
    if len(content) % torch.empty(0, dtype=dtype).element_size():
        raise MalformedError(f"storage {key} ends within an element")
    if not content:
        return Storage(torch.empty(0, dtype=dtype))
    if dtype is torch.bool:  # bytes other than 0 and 1 would be undefined as bool
        return Storage(torch.frombuffer(content, dtype=torch.uint8) != 0)
    return Storage(torch.frombuffer(content, dtype=dtype))


class _Saved(_Archive):
    """What ``torch.save`` writes: one pickle and its storages."""

    def _find_prefix(self) -> str:
        pickles = [name for name in self._names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise MalformedError("the archive holds no data.pkl, or several")
        return pickles[0].removesuffix("data.pkl")

    @property
    def scripted(self) -> bool:
        return any(name.startswith(f"{self.prefix}code/") for name in self._names)

    def _places(self, key: str) -> list[str]:
        return [f"data/{key}", f"constants/{key}"]


class _Package(_Archive):
    """What ``torch.package`` writes: code, several pickles, and storages that they share."""

    def _find_prefix(self) -> str:
        markers = [name for name in self._names if name.endswith(_PACKAGE_MARK)]
        if len(markers) != 1:
            raise MalformedError("the archive is no package of torch")
        return markers[0].removesuffix(_PACKAGE_MARK.removeprefix("/"))

    def _places(self, key: str) -> list[str]:
        return [f".data/{key}.storage"]

    def persistent(self, reference: Any) -> Any:
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "reduce_package":
            # an object that code of the package would make
            _, _, function, args = reference
            named = function if isinstance(function, Global) else Global("?", "?")
            return Record(named.module, named.name, args if isinstance(args, tuple) else ())
        return self.storage(reference)


@dataclass(frozen=True, slots=True)
class InertFile:
    """What a file of ``torch.save`` holds.

    Attributes:
        content: as :func:`read_inert` gives it.
        storages: the memory that its tensors are views of, flat, by the name of the archive's member.
    """

    content: Any
    storages: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class InertPackage:
    """What some pickles of a package hold.

    Attributes:
        contents: as :func:`read_inert` gives them, by their names.
        storages: as of :class:`InertFile`; pickles share them.
    """

    contents: dict[str, Any]
    storages: dict[str, torch.Tensor]


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """
    Raises:
        InputError: for whatever a damaged archive or pickle leads to.
    """
    try:
        yield
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


def _read(stream: BinaryIO, size: int, what: str, *, scripted: bool) -> InertFile:
    with _named_errors(what):
        archive = _Saved(stream, size)
        if archive.scripted and not scripted:
            raise InputError(
                f"{what} is a TorchScript archive (such as mace writes for LAMMPS), which holds compiled code only; "
                "pass the .model file that it was made from."
            )
        content = Machine(archive.persistent).run(archive.read("data.pkl"))
        return InertFile(content, archive.storages())


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
                problem = "is empty" if size == 0 else "is not a file of torch.save, or an incomplete one"
                raise InputError(f"{file} {problem}; pass the .model file that mace wrote, or download it again.")
            stream.seek(0)
            return _read(stream, size, str(file), scripted=False)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); check the path.") from error


def read_inert_bytes(content: bytes, what: str) -> Any:
    """As :func:`read_inert`, for an archive in memory, which may be a TorchScript one; its code is not looked at."""
    return _read(io.BytesIO(content), len(content), what, scripted=True).content


def read_inert_package(path: str | os.PathLike[str], pattern: str) -> InertPackage:
    """Pickles of an archive of ``torch.package``, as :func:`read_inert` reads those of others; its code is not read.

    Args:
        path: of the archive.
        pattern: which pickles, below the archive's folder, such as ``model/*.pkl``.

    Raises:
        InputError: no such file, no package, damaged, or built to exhaust memory.
    """
    file = Path(path)
    with _named_errors(str(file)), file.open("rb") as stream:
        archive = _Package(stream, file.stat().st_size)
        names = sorted(name for name in archive.names if fnmatchcase(name, pattern))
        contents = {name: Machine(archive.persistent).run(archive.read(name)) for name in names[:_MOST_PICKLES]}
        return InertPackage(contents, archive.storages())


def read_package_text(path: str | os.PathLike[str], name: str) -> str:
    """A text of an archive of ``torch.package``.

    Raises:
        InputError: as :func:`read_inert_package`, or there is none of this name.
    """
    file = Path(path)
    with _named_errors(str(file)), file.open("rb") as stream:
        return _Package(stream, file.stat().st_size).read(name, _TEXT_LIMIT).decode("utf-8")
