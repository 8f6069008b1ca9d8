"""From a name or a path to a loaded backbone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from forcetune.backbones.models import resolve
from forcetune.backbones.protocol import Backbone
from forcetune.errors import InputError
from forcetune.parallel import place

ENTRY_POINTS = "forcetune.backbones"


def backbone_class(library: str) -> Any:
    """The backbone class of a library, found by entry point and imported only now.

    Raises:
        InputError: the library's extra is not installed.
    """
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if library not in found:
        raise InputError(f"no backbone for {library!r} is installed; known here: {', '.join(sorted(found)) or 'none'}.")
    try:
        return found[library].load()
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; install forcetune with the extra: pip install 'forcetune[{library}]'."
        ) from error


def choose_device(device: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU without one.

    Raises:
        InputError: unknown device, or CUDA asked for where there is none.
    """
    if device == "auto":
        return torch.device("cuda", place().local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"there is no device {device!r}; use cpu, cuda, cuda:1 or auto.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"models do not run on a device of type {chosen.type}; use cpu, cuda, cuda:1 or auto.")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available here; use device cpu or auto.")
    return chosen


def load(
    model: str | Path | Backbone,
    *,
    head: str | None = None,
    elements: Sequence[int] | None = None,
    dtype: str | torch.dtype = "float64",
    device: str = "auto",
    trust: bool = False,
) -> Backbone:
    """Load a foundation model.

    Args:
        model: a published name (``forcetune models``), a path, or a loaded backbone, which is returned as it is.
        head: which head of a multi-head model.
        elements: atomic numbers to cut the element table to; None keeps it whole.
        dtype: ``float64`` or ``float32``.
        device: ``cpu``, ``cuda`` … or ``auto``.
        trust: allow a model file to run its own code where it cannot be rebuilt without.

    Raises:
        InputError: unknown name, unreadable file, unknown head, element or device.
    """
    if not isinstance(model, (str, Path)):
        return model
    found = resolve(str(model))
    precision = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    return backbone_class(found.library).load(
        found.path,
        name=found.name,
        licence=found.licence,
        sha256=found.sha256,
        head=head,
        elements=elements,
        dtype=precision,
        device=choose_device(device),
        trust=trust,
    )
