"""The folder of a run: made, checked, and its state stored so that nothing is lost when the run dies."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from forcetune.adapters.file import CONFIG_NAME as ADAPTER_CONFIG_NAME
from forcetune.adapters.file import FILE_NAMES as ADAPTER_FILES
from forcetune.adapters.file import TENSORS_NAME
from forcetune.config import RunConfig
from forcetune.deployment.loading import BASE_NAME
from forcetune.errors import ForcetuneError, InputError
from forcetune.frames.sources import expand
from forcetune.reports.run_page import REPORT_NAME
from forcetune.runs.environment import ENVIRONMENT_NAME
from forcetune.runs.predictions import PREDICTIONS_NAME
from forcetune.runs.results import RESULTS_NAME
from forcetune.training.callbacks import METRICS_NAME
from forcetune.training.trackers import TENSORBOARD_NAME, TRACKERS_NAME
from forcetune.uncertainty.file import FILE_NAMES as UNCERTAINTY_FILES
from forcetune.utils.files import as_path, atomic_path, is_inside, retire_folder
from forcetune.utils.parsing import check_archive

CONFIG_NAME = "config.yaml"
ADAPTER_NAME = "adapter"
FINISHED = ("finished", "stopped early")
CHECKPOINT = Path("checkpoints") / "last.pt"
ANCHOR = Path("checkpoints") / "penalty.safetensors"
"""What the penalty compares with, where the run has one."""
UNREFINED = Path("checkpoints") / "unrefined"
"""The adapter as training left it, where a refinement follows."""
KEYS = {"training", "reference_energies", "data", "base"}

_RUN_FILES = (CONFIG_NAME, ENVIRONMENT_NAME, RESULTS_NAME, PREDICTIONS_NAME, METRICS_NAME, REPORT_NAME, BASE_NAME)
_ROOT = (*_RUN_FILES, *UNCERTAINTY_FILES, TRACKERS_NAME)
OWN_FILES: dict[str, tuple[str, ...]] = {
    # those with a dot are of a write that was interrupted
    "": (*_ROOT, *(f".{name}.*" for name in _ROOT)),
    ADAPTER_NAME: ADAPTER_FILES,
    f".{ADAPTER_NAME}.*": ADAPTER_FILES,
    UNREFINED.as_posix(): ADAPTER_FILES,
    (UNREFINED.parent / f".{UNREFINED.name}.*").as_posix(): ADAPTER_FILES,
    CHECKPOINT.parent.as_posix(): (CHECKPOINT.name, f".{CHECKPOINT.name}.*", ANCHOR.name, f".{ANCHOR.name}.*"),
    TENSORBOARD_NAME: ("events.out.tfevents.*", "hparams.yaml"),
}
"""What forcetune writes into a run folder: patterns of folders in it, inner ones first, with patterns of files."""


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
        left.remove(aside[0])
    for path in left:
        retire_folder(path, folder, ADAPTER_FILES)


def read_status(folder: Path) -> str | None:
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


def input_files(config: RunConfig, others: Sequence[str | Path] = ()) -> list[Path]:
    """The files, and the folder of an adapter to start from, that a run reads.

    Args:
        config: of the run.
        others: further ones, such as the YAML file that the configuration came from.

    Raises:
        InputError: a file of frames is missing.
    """
    data = config.data
    named = [*data.train, *data.train_only, *(data.valid if isinstance(data.valid, list) else ()), *data.test]
    named += [*config.replay.data, *config.training.penalty.data]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever reads them says what is named twice
        frames = [file for name in named for file in expand(name)]
    places = [config.model.model, *others]
    if config.training.start_from is not None:
        places.append(config.training.start_from)
    return [file for file in (*frames, *map(as_path, places)) if file.exists()]


def check_folder(folder: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """
    Args:
        folder: where a run is to be written.
        overwrite: whether it may take the place of another run.
        inputs: files that the new run reads.

    Raises:
        InputError: the run folder exists and is not empty, and may not or cannot be replaced.
    """
    as_path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another run folder with --out.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{folder}: is not empty; choose another run folder with --out, or add --overwrite.")
    for file in inputs:
        if is_inside(file, folder):
            raise InputError(
                f"{folder}: holds {file}, which this run reads, so it is not overwritten; choose another run folder "
                "with --out."
            )
    if not is_run_folder(folder):
        raise InputError(
            f"{folder}: is no run folder ({CONFIG_NAME} and {ENVIRONMENT_NAME} of a run), so it is not overwritten; "
            "choose another one with --out."
        )
    own_files(folder)


def is_run_folder(folder: Path) -> bool:
    """Whether forcetune wrote a run to this folder, finished or not."""
    try:
        environment = json.loads((folder / ENVIRONMENT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return (folder / CONFIG_NAME).is_file() and isinstance(environment, dict) and "forcetune" in environment


def own_files(folder: Path) -> list[Path]:
    """The files that forcetune wrote to a run folder, and nothing else that lies there.

    Raises:
        InputError: a folder or a link has the name of such a file.
    """
    files: list[Path] = []
    for place, names in own_folders(folder).items():
        for path in sorted(place.iterdir()):
            if any(path.match(name) for name in names):
                if path.is_symlink() or not path.is_file():
                    raise InputError(f"{path}: is not what forcetune wrote there; move it away first.")
                files.append(path)
    return files


def own_folders(folder: Path) -> dict[Path, tuple[str, ...]]:
    """Folders that forcetune makes in a run folder, inner ones first and itself last, with the names of their files.

    Raises:
        InputError: a file or a link has the name of such a folder.
    """
    folders: dict[Path, tuple[str, ...]] = {}
    for pattern, names in OWN_FILES.items():
        for path in sorted(folder.glob(pattern)) if pattern else ():
            if path.is_symlink() or not path.is_dir():
                raise InputError(f"{path}: is not what forcetune wrote there; move it away first.")
            folders[path] = names
    return folders | {folder: OWN_FILES[""]}


def prepare_folder(
    folder: Path, overwrite: bool, inputs: Iterable[Path] = (), *, keep: Collection[str] = ()
) -> list[str]:
    """Make the run folder; of one that is overwritten only what forcetune wrote is removed.

    Args:
        folder, overwrite, inputs: as :func:`check_folder`.
        keep: names of files in the folder itself that stay although forcetune wrote them.

    Returns:
        what else is in it, by name.

    Raises:
        InputError: it cannot be created.
    """
    check_folder(folder, overwrite, inputs)
    try:
        if folder.exists():
            for file in own_files(folder):
                if file.parent != folder or file.name not in keep:
                    file.unlink()
            for place in own_folders(folder):
                if place != folder:
                    with suppress(OSError):  # something else is in it
                        place.rmdir()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be created ({error.strerror}); choose another run folder.") from error
    return sorted(path.name for path in folder.iterdir() if path.name not in keep)
