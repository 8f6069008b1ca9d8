"""The folder of a new store: it appears when it is complete, and what a killed process left behind is removed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from forcetune.errors import InputError
from forcetune.frames.store.rows import WriteError, bring_to_disk, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LOCK = "lock"


@contextmanager
def new_store(place: Path) -> Iterator[Path]:
    """Yield a new folder that becomes ``place`` when all is well, unless another process was faster.

    Raises:
        InputError: the folder cannot be written, or there is no room.
    """
    try:
        with ExitStack() as stack:
            with writing():
                place.parent.mkdir(parents=True, exist_ok=True)
                _remove_abandoned(place)
                store = stack.enter_context(_scratch(place)) / "store"
                store.mkdir()
            yield store
            with writing():
                bring_to_disk(store)
                try:
                    store.replace(place)
                except OSError:
                    if not place.exists():
                        raise
                bring_to_disk(place.parent)
    except WriteError as error:
        raise InputError(
            f"{place.parent}: streamed data cannot be written ({error.strerror or error}); set data.store to another "
            "folder."
        ) from error


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    """A folder beside ``place`` that is removed in the end; its lock is held for as long as this process lives."""
    while True:
        with tempfile.TemporaryDirectory(
            prefix=f".{place.name}.", dir=place.parent, ignore_cleanup_errors=True
        ) as scratch:
            lock = Path(scratch) / _LOCK
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if fcntl is not None:
                    with suppress(OSError):  # not every file system has locks; then nothing is taken for abandoned
                        fcntl.flock(handle, fcntl.LOCK_EX)
                # before it was locked another process may have taken the folder for abandoned
                if lock.exists():
                    yield Path(scratch)
                    return
            finally:
                os.close(handle)


def _remove_abandoned(place: Path) -> None:
    """Remove half stores of processes that were killed while they made this one."""
    if fcntl is None:
        return
    for scratch in place.parent.glob(f".{place.name}.*"):
        with suppress(OSError):
            handle = os.open(scratch / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(scratch, ignore_errors=True)
            finally:
                os.close(handle)
