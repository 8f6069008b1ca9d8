"""``--restart_latest``: whether the run to resume is the same one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forcetune.config import load_config
from forcetune.errors import InputError
from forcetune.runs.folder import CONFIG_NAME
from forcetune.utils.option_defaults import get_value, leaf_names
from forcetune.utils.parsing import short

_LOCATION_OPTIONS = ("output.run", "output.overwrite", "model.device")
"""Options that do not make it another run."""


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
        if name in _LOCATION_OPTIONS:
            continue
        value, stored_value = get_value(options, name), get_value(stored, name)
        if value != stored_value:
            raise InputError(
                f"{folder}: began with {name}={short(stored_value)}, this call has {short(value)}; write the same "
                "arguments to resume it, or leave out --restart_latest and choose another --name."
            )
