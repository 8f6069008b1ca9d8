"""Files of ``torch.save`` with other numbers in them."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Mapping

import torch
from torch import Tensor

from forcetune.errors import InputError

_ALIGNED = 64  # bytes; torch.save begins every member at a multiple of it, so that a file can be mapped to memory
_HEADER = 30  # bytes of a member's header before its name


def rewrite_storages(
    source: str | os.PathLike[str], target: str | os.PathLike[str], storages: Mapping[str, Tensor]
) -> None:
    """Copy an archive of ``torch.save`` with other content in some of its storages.

    The pickle, and with it all that the library reads its version, classes and options from, is the source's byte for
    byte, and so is every member that is not named.

    Args:
        source: file to copy.
        target: file to write; not atomic.
        storages: flat tensors by the name of their member, of the size and dtype that the source has.

    Raises:
        InputError: the source cannot be read, or has no such members.
        ValueError: a storage has another size than in the source.
    """
    try:
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
            missing = storages.keys() - set(old.namelist())
            if missing:
                raise InputError(
                    f"{os.fspath(source)}: holds no {', '.join(sorted(missing))}; it has changed meanwhile."
                )
            for member in old.infolist():
                content = old.read(member)
                if member.filename in storages:
                    content = _bytes_like(storages[member.filename], member.filename, len(content))
                _append(new, member, content)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{os.fspath(source)}: cannot be copied ({error}); get a fresh copy of the file.") from error


def _bytes_like(storage: Tensor, name: str, size: int) -> bytes:
    content = storage.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    if len(content) != size:
        raise ValueError(f"{name} has {size} bytes, and {len(content)} would be written")
    return content


def _append(archive: zipfile.ZipFile, member: zipfile.ZipInfo, content: bytes) -> None:
    """Write a member so that its content begins at a multiple of 64 bytes, as torch.save does."""
    copied = zipfile.ZipInfo(member.filename, member.date_time)
    copied.external_attr = member.external_attr
    start = archive.start_dir + _HEADER + len(member.filename.encode()) + 4
    padding = -start % _ALIGNED
    copied.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(copied, content)
