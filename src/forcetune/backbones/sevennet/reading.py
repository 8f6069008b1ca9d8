"""SevenNet checkpoints from files, without running code from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forcetune.backbones.safe_unpickle.reader import read_inert
from forcetune.backbones.sevennet.architecture import read_architecture
from forcetune.backbones.sevennet.content import SevenNetContent, content_from_state
from forcetune.errors import InputError


def read_content(path: str | Path) -> SevenNetContent:
    """Read a checkpoint.

    Raises:
        InputError: the file is missing, damaged or no checkpoint of sevenn.
        UnfitError: it is one that forcetune does not compute; says what it is that it does not.
    """
    file = Path(path)
    checkpoint = read_inert(file)
    if not is_checkpoint(checkpoint):
        raise InputError(f"{file} is no checkpoint of sevenn; pass a checkpoint_*.pth that sevenn wrote.")
    config, state = checkpoint["config"], checkpoint["model_state_dict"]
    return content_from_state(read_architecture(config), state, config)


def is_checkpoint(content: object) -> bool:
    """Whether what a file holds looks like a checkpoint of sevenn."""
    return (
        isinstance(content, Mapping)
        and isinstance(content.get("config"), Mapping)
        and isinstance(content.get("model_state_dict"), Mapping)
    )
