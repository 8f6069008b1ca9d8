"""NequIP models from files of either form, without running code from them."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from forcetune.backbones.nequip.checkpoint import read_checkpoint
from forcetune.backbones.nequip.content import NequIPContent
from forcetune.backbones.nequip.package import EAGER, read_package


def is_package(path: str | Path) -> bool:
    """Whether a file is an archive with the model of a NequIP package."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name == EAGER or name.endswith(f"/{EAGER}") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, zlib.error, RuntimeError):
        return False


def read_content(path: str | Path) -> NequIPContent:
    """Read a checkpoint or a package, whichever it is by what it holds.

    Raises:
        InputError: the file is missing, damaged or neither.
        UnfitError: it is one that forcetune does not compute; says what it is that it does not.
    """
    return read_package(path) if is_package(path) else read_checkpoint(path)
