"""One writer for a file or a folder: by ``flock``; for a file by a lock file where there is no ``flock``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from forcetune.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_STALE_LOCK = 300.0  # s without a byte, after which a lock file is taken to be left over


@contextmanager
def locked(target: Path, part: Path) -> Iterator[None]:
    """Hold the right to write ``target``, against other threads and processes; waits for whoever holds it.

    Args:
        target: the file to write.
        part: what its holder writes to; as long as it grows, a lock file is in use.
    """
    lock = target.with_name(f".{target.name}.lock")
    handle = _flock(lock)
    if handle is None:
        lock = target.with_name(f".{target.name}.lock-file")
        _create_lock(lock, part)
    try:
        yield
    finally:
        # Removed while still held: whoever waits for it finds it gone and takes a new one.
        lock.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _flock(lock: Path) -> int | None:
    """Descriptor of a lock file held by this caller; None where the system or file system has no flock."""
    if fcntl is None:
        return None
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            os.close(handle)
            lock.unlink(missing_ok=True)
            return None
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == lock.stat().st_ino:
                return handle
        os.close(handle)


def _create_lock(lock: Path, part: Path) -> None:
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return
        except FileExistsError:
            signs = [path.stat().st_mtime for path in (lock, part) if path.exists()]
            if signs and time.time() - max(signs) > _STALE_LOCK:
                lock.unlink(missing_ok=True)
            else:
                time.sleep(0.2)


class FolderLock:
    """Keeps other commands out of a folder while one writes to it; leaves nothing there.

    Used in a ``with`` statement. A folder that is not there yet is held from :meth:`create` on. Where the system or the
    file system has no ``flock`` for folders (Windows, some network file systems), other commands are not kept out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None

    def __enter__(self) -> FolderLock:
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def create(self) -> None:
        """Make the folder where it is not there, and hold it; what was checked before has to be checked again.

        Raises:
            InputError: another command writes to it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()

    def _take(self) -> None:
        if fcntl is None or self._handle is not None or not self.folder.is_dir():
            return
        try:
            handle = os.open(self.folder, os.O_RDONLY)
        except OSError:
            return  # the first read or write there says what is wrong
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InputError(
                f"{self.folder}: another forcetune command is writing to it; wait until it ends, or name another one."
            ) from None
        except OSError:
            os.close(handle)
        else:
            self._handle = handle
