"""The folder of a run: made, checked, and its state kept so that nothing is lost when the run dies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from forcetune.adapters.file import CONFIG_NAME as ADAPTER_CONFIG_NAME
from forcetune.adapters.file import TENSORS_NAME
from forcetune.errors import ForcetuneError, InputError
from forcetune.files import atomic_path, path_of
from forcetune.parsing import check_archive
from forcetune.records import RESULTS_NAME

CONFIG_NAME = "config.yaml"
ADAPTER_NAME = "adapter"
FINISHED = ("finished", "stopped early")
CHECKPOINT = Path("checkpoints") / "last.pt"
UNREFINED = Path("checkpoints") / "unrefined"
"""The adapter as training left it, where a refinement follows."""
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
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # damaged pickles raise whatever their last instruction did
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
    complete = [path for path in left if (path / ADAPTER_CONFIG_NAME).is_file() and (path / TENSORS_NAME).is_file()]
    if not folder.exists() and complete:
        # the old folder that stepped aside; a new one beside it is written again by the epoch that is repeated
        aside = sorted(complete, key=lambda path: ".old." not in path.name)
        aside[0].replace(folder)
    for path in left:
        shutil.rmtree(path, ignore_errors=True)


def status_of(folder: Path) -> str | None:
    """How the run of a folder ended, None if it has not.

    Raises:
        InputError: its results are damaged.
    """
    try:
        return json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8")).get("status")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder / RESULTS_NAME}: cannot be read ({error}); remove it and resume again.") from error


def check_folder(folder: Path, overwrite: bool) -> None:
    """
    Raises:
        InputError: the run folder exists and is not empty, and may not or cannot be replaced.
    """
    path_of(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another run folder with --out.")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise InputError(f"{folder}: is not empty; choose another run folder with --out, or add --overwrite.")
        if not (folder / CONFIG_NAME).is_file():
            raise InputError(f"{folder}: is no run folder (no {CONFIG_NAME}), so it is not overwritten.")


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make the run folder, empty.

    Raises:
        InputError: it cannot be made.
    """
    check_folder(folder, overwrite)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); choose another run folder.") from error
