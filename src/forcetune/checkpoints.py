"""The state of a run on the disk, so that nothing is lost when it dies."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from forcetune.adapters.file import CONFIG_NAME, TENSORS_NAME
from forcetune.errors import ForcetuneError, InputError
from forcetune.files import atomic_path

CHECKPOINT = Path("checkpoints") / "last.pt"
KEYS = {"training", "reference_energies", "data", "base"}


def has_checkpoint(folder: Path) -> bool:
    """Whether a run folder has a checkpoint."""
    return (folder / CHECKPOINT).is_file()


def write_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a run, atomically: a reader sees the last state or this one, never half of it.

    Args:
        folder: run folder.
        state: tensors and plain values.

    Raises:
        ForcetuneError: the disk does not take it; what was there stays.
    """
    path = folder / CHECKPOINT
    try:
        with atomic_path(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError, InputError) as error:
        raise ForcetuneError(
            f"{path}: the checkpoint could not be written ({error}). Make room, then `forcetune resume {folder}` goes "
            "on from the one before."
        ) from error


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the state of a run; no code in the file is run.

    Raises:
        InputError: the file is damaged or something else.
    """
    path = folder / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: is no checkpoint that can be read ({error}); start a new run.") from error
    if not isinstance(state, dict) or set(state) != KEYS:
        raise InputError(f"{path}: is no checkpoint of this version of forcetune; start a new run.")
    return state


def recover_adapter(folder: Path) -> None:
    """Where a run died between taking the old adapter folder away and putting the new one in place, finish that.

    Args:
        folder: the adapter folder.
    """
    left = [path for path in folder.parent.glob(f".{folder.name}.*") if path.is_dir()]
    complete = [path for path in left if (path / CONFIG_NAME).is_file() and (path / TENSORS_NAME).is_file()]
    if not folder.exists() and complete:
        # the old folder that stepped aside; a new one beside it is written again by the epoch that is repeated
        aside = sorted(complete, key=lambda path: ".old." not in path.name)
        aside[0].replace(folder)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
