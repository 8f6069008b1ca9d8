"""Formats of other programs, one module each.

A module of this folder that has a :class:`~forcetune.frames.formats.format.Format` named ``FORMAT`` is a format; there
is no other list. What ASE reads well as it stands needs no module.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from forcetune.errors import note
from forcetune.frames.formats.format import Format
from forcetune.frames.text import read_head


def _collect() -> dict[str, Format]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    collected = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return {one.name: one for one in collected}


FORMATS: Mapping[str, Format] = _collect()
"""By name."""


def recognize(path: Path, head: str) -> str | None:
    """The name of the format of a file or folder, None where it is none of these.

    Args:
        path: of it.
        head: the beginning of a file as text (:func:`forcetune.frames.text.read_head`).
    """
    folder = path.is_dir()
    return next(
        (name for name, one in FORMATS.items() if one.is_folder == folder and one.recognizes(path, head)),
        None,
    )


def data_folders(path: Path) -> list[Path]:
    """The folder itself where it is data of a format, otherwise all such folders below it, sorted."""
    for one in FORMATS.values():
        if one.folders_in is not None and (folders := one.folders_in(path)):
            return folders
    return []


def list_files(path: Path) -> list[Path]:
    """All files that are read when a file or folder is named; of what cannot be opened only itself."""
    try:
        name = recognize(path, "" if path.is_dir() else read_head(path))
    except Exception:
        # a damaged compressed file raises whatever its library raises; its reader will say so
        name = None
    return [path] if name is None else FORMATS[name].parts(path)


def say_conversions(files: Iterable[tuple[Path, str]]) -> None:
    """One note for each format among these files: what its numbers mean, and what is in it and not used.

    Args:
        files: each with the name of its format, ours or another.
    """
    by_format: dict[str, list[Path]] = {}
    for path, name in files:
        if name in FORMATS:
            by_format.setdefault(name, []).append(path)
    for name, paths in by_format.items():
        unused = sorted({part for path in paths for part in FORMATS[name].unused(path)})
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        left = f" Not used: {', '.join(unused)}." if unused else ""
        note(f"{paths[0]}{more}, {FORMATS[name].title}: {FORMATS[name].conversion}{left}")
