"""Writing files so that a reader never sees half of one, and naming files by their content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from forcetune.errors import InputError

HOME_VARIABLE = "FORCETUNE_HOME"
"""Names the folder for all that is kept between runs."""


def as_path(name: str | os.PathLike[str]) -> Path:
    """The path that a name given by a user stands for, ``~`` included.

    Raises:
        InputError: no file can have this name.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
        os.fsencode(path)
    except (OSError, ValueError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)[:80]
        raise InputError(f"{str(name)[:80]!r}: is no name that a file can have ({why}).") from error
    if "\0" in str(path):
        raise InputError(f"{str(name)[:80]!r}: is no name that a file can have.")
    return path


def cache_folder(name: str) -> Path:
    """Where things of one kind are kept between runs.

    ``$FORCETUNE_HOME/NAME``; without that variable the user's cache, ``$XDG_CACHE_HOME/forcetune/NAME`` or
    ``~/.cache/forcetune/NAME``.
    """
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute() / name
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the XDG standard says to ignore relative ones
        cache = Path.home() / ".cache"
    return cache / "forcetune" / name


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is moved onto ``path``, on failure removed.

    Raises:
        InputError: ``path`` is a folder, its folder cannot be created or written, or the file cannot be replaced, as on
            Windows one that another program has open.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}); choose another place.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as written:  # Windows brings nothing to the disk that is open for reading only
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        _replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, target: Path) -> None:
    """
    Raises:
        InputError: the file cannot be replaced.
    """
    try:
        temporary.replace(target)
    except PermissionError as error:
        raise InputError(
            f"{target}: cannot be replaced ({error.strerror}); close the programs that have it open, or choose another "
            "place."
        ) from error


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path``, on failure it is removed.

    Files of ``path`` that are not written again stay where they are.

    Raises:
        InputError: ``path`` is a file, or its parent folder cannot be created or written.
    """
    target = Path(path)
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file; name a folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}); choose another place.") from error
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if target.exists():
            written = {file.name for file in temporary.iterdir()}
            # a folder cannot replace a folder with content in one step: the old one steps aside first
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            aside.rmdir()  # on Windows nothing replaces a folder, not even an empty one
            target.replace(aside)
            temporary.replace(target)
            retire_folder(aside, target, written)
        else:
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def retire_folder(old: Path, new: Path, replaced: Collection[str]) -> None:
    """Remove an old folder: of what is in it, ``replaced`` is deleted and everything else is moved to ``new``.

    Args:
        old: the folder; it stays where something in it cannot be moved, as there is another of its name.
        new: the folder that has its place now.
        replaced: names of files.
    """
    for entry in old.iterdir():
        if entry.name in replaced and (entry.is_symlink() or entry.is_file()):
            entry.unlink()
        elif not (new / entry.name).exists():
            entry.replace(new / entry.name)
    with suppress(OSError):
        old.rmdir()


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is ``folder`` or lies in it, links followed."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def compute_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    return compute_checksum(path, "sha256")


def compute_checksum(path: str | os.PathLike[str], name: str) -> str:
    """A checksum of a file's bytes, hexadecimal, by the name that hashlib gives it."""
    digest = hashlib.new(name, usedforsecurity=False)
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
