"""``--restart_latest``: whether there is a run to resume, and whether it is the same one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forcetune.config import load_config
from forcetune.errors import InputError
from forcetune.runs.folder import CONFIG_NAME, is_run_folder
from forcetune.utils.option_defaults import get_value, leaf_names
from forcetune.utils.parsing import short

_WHEREABOUTS = ("output.run", "output.overwrite", "model.device")
"""Options that do not make it another run."""


def is_begun(folder: Path) -> bool:
    """Whether an earlier call began this run."""
    return is_run_folder(folder)


def check_same_run(folder: Path, options: Mapping[str, Any]) -> None:
    """
    Args:
        folder: of the run that is to be resumed.
        options: of this call, nested.

    Raises:
        InputError: the run has another value for an option of this call.
    """
    stored = load_config(folder / CONFIG_NAME).model_dump(mode="json")
    stored["method"] |= load_config(folder / CONFIG_NAME).method.options()
    for name in leaf_names(options):
        if name in _WHEREABOUTS:
            continue
        mine, theirs = get_value(options, name), get_value(stored, name)
        if mine != theirs:
            raise InputError(
                f"{folder}: began with {name}={short(theirs)}, this call has {short(mine)}; write the same "
                "arguments to resume it, or leave out --restart_latest and choose another --name."
            )
