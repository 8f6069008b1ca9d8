"""``--foundation_model``: mace's names as those of the registry, or a path."""

from __future__ import annotations

from pathlib import Path

from forcetune.backbones.registry import find
from forcetune.cli.mace_train.parsing import Arguments
from forcetune.errors import InputError

NAMES = {
    "small": "mace-mp-0-small",
    "medium": "mace-mp-0-medium",
    "large": "mace-mp-0-large",
    "small-0b": "mace-mp-0b-small",
    "medium-0b": "mace-mp-0b-medium",
    "small-0b2": "mace-mp-0b2-small",
    "medium-0b2": "mace-mp-0b2-medium",
    "large-0b2": "mace-mp-0b2-large",
    "medium-0b3": "mace-mp-0b3",
    "medium-mpa-0": "mace-mpa-0",
    "small-omat-0": "mace-omat-0-small",
    "medium-omat-0": "mace-omat-0-medium",
    "mace-matpes-pbe-0": "mace-matpes-pbe-0",
    "mace-matpes-r2scan-0": "mace-matpes-r2scan-0",
    "small_off": "mace-off23-small",
    "medium_off": "mace-off23-medium",
    "large_off": "mace-off23-large",
}
"""mace's names of its foundation models, and forcetune's."""
_NOT_PUBLISHED = {
    **dict.fromkeys(("mh-0", "mh-1"), "download its file and name it by its path, with --foundation_head"),
    "mace_omol": "download its file and name it by its path",
    **dict.fromkeys(("polar-1-s", "polar-1-m", "polar-1-l"), "forcetune does not compute PolarMACE"),
}


def translate_model(arguments: Arguments) -> str:
    """The model to start from.

    Raises:
        InputError: none was named, or one that forcetune does not have.
    """
    kind = arguments["model"]
    if kind not in ("MACE", "ScaleShiftMACE"):
        raise InputError(f"--model {kind}: forcetune tunes energies and forces of MACE and ScaleShiftMACE models only.")
    name = arguments["foundation_model"]
    if name is None:
        raise InputError(
            "--foundation_model is missing: forcetune starts from a foundation model, by mace's name such as medium, a "
            "name that `forcetune models` lists, or a path; with --method scratch its weights are drawn at random."
        )
    if Path(name).is_file() or name not in (*NAMES, *_NOT_PUBLISHED):
        # a name of the registry, or a path, which loading checks
        return name
    if name in _NOT_PUBLISHED:
        raise InputError(f"--foundation_model {name}: is not among the published models here; {_NOT_PUBLISHED[name]}.")
    published = find(NAMES[name])
    assert published is not None
    return published.name
