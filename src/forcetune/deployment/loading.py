"""From a run, an adapter or a model to a backbone ready to predict."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import yaml

from forcetune.adapters.attach import fold_weights, get_adapter
from forcetune.adapters.config import AdapterConfig, read_adapter_config
from forcetune.adapters.file import CONFIG_NAME, load_adapter
from forcetune.adapters.hub import locate_adapter
from forcetune.backbones.loading import load
from forcetune.backbones.protocol import Backbone
from forcetune.errors import InputError
from forcetune.utils.parsing import parse_yaml, short

BASE_NAME = "base.model"
"""The foundation model in a run folder, where it came from memory and no name or path gives it."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """A model ready to predict, and the adapter on it if there is one."""

    backbone: Backbone
    adapter: AdapterConfig | None


def adapter_folder(path: str | Path) -> Path | None:
    """The adapter folder at ``path``: itself, or ``adapter/`` in a run folder; None if there is none.

    Raises:
        InputError: ``path`` is ``hub:owner/name``, and nothing usable can be downloaded from there.
    """
    path = locate_adapter(path)
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_NAME).is_file():
            return folder
    return None


def base_of_run(path: str | Path) -> str | None:
    """The model stored in the run folder around an adapter, or named in its ``config.yaml``; None if there is none."""
    for folder in (Path(path), Path(path).parent):
        config = folder / "config.yaml"
        if config.is_file() and (folder / BASE_NAME).is_file():
            return str(folder / BASE_NAME)
        if config.is_file():
            try:
                named = parse_yaml(config.read_text(encoding="utf-8"))["model"]["model"]
            except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
                raise InputError(f"{config}: cannot be read ({error}); name the base with --model.") from error
            if not isinstance(named, str):
                raise InputError(f"{config}: the model is no name but {short(named)}; name the base with --model.")
            return named
    return None


def deploy(
    model: str | Path | Backbone | None,
    adapter: str | Path | None = None,
    *,
    head: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    trust: bool = False,
    fold: bool = True,
) -> Deployed:
    """Load a model, or base and adapter together.

    Args:
        model: the base: name, path or loaded backbone. None takes the one the run of ``adapter`` was made with.
            A run folder, an adapter folder or ``hub:owner/name`` here means that adapter on its own base.
        adapter: adapter folder, run folder or ``hub:owner/name``; None for the base alone.
        head: head of a multi-head base without an adapter; adapters know theirs.
        device: ``cpu``, ``cuda`` … or ``auto``.
        dtype: ``float64`` or ``float32``; by default that of the training, or float64.
        trust: allow a model file to run its own code where it cannot be rebuilt without.
        fold: write mergeable updates into the weights of a base loaded here, so that they cost nothing, and compute by
            the kernels. A backbone given as such keeps its weights and carries the adapter afterwards, or a copy of
            it does where it knows more elements than the adapter.

    Raises:
        InputError: nothing usable at a path, the adapter belongs to another base, or a backbone given as such is not
            what is asked for.
    """
    if adapter is None and isinstance(model, (str, Path)) and adapter_folder(model) is not None:
        model, adapter = None, model
    if adapter is None:
        if model is None:
            raise InputError("name a model, a run or an adapter.")
        backbone = load(model, head=head, dtype=dtype, device=device, trust=trust)
        return Deployed(backbone, None)
    folder = adapter_folder(adapter)
    if folder is None:
        raise InputError(f"{adapter}: holds no {CONFIG_NAME}; give a run folder or an adapter folder.")
    config = read_adapter_config(folder)
    check_head(head, folder, config)
    backbone, own = load_base(model, folder, config, device=device, dtype=dtype, trust=trust)
    load_adapter(backbone, folder)
    if fold and own:
        fold_weights(backbone)
    return Deployed(backbone, config)


def check_head(head: str | None, folder: str | Path, config: AdapterConfig) -> None:
    """
    Raises:
        InputError: this is not the head that the adapter was trained on.
    """
    if head is not None and head != config.base.head:
        trained = "a base with one head" if config.base.head is None else f"head {config.base.head}"
        raise InputError(f"{folder}: this adapter was trained on {trained}, not on head {head}; leave out --head.")


def load_base(
    model: str | Path | Backbone | None,
    folder: Path,
    config: AdapterConfig,
    *,
    device: str,
    dtype: str | None,
    trust: bool,
) -> tuple[Backbone, bool]:
    """The base of an adapter, cut to its elements.

    Args:
        model: name, path or loaded backbone; None takes the one the run around the adapter was made with.
        folder, config: of the adapter.
        device, dtype, trust: as :func:`deploy`.

    Returns:
        the backbone, and whether it was loaded here and not given.

    Raises:
        InputError: it cannot be loaded, carries an adapter already, or lacks an element of the adapter.
    """
    if isinstance(model, Backbone):
        if get_adapter(model) is not None:
            raise InputError("this model already carries an adapter; detach it first.")
        known = set(config.numbers) <= set(model.elements)  # otherwise the adapter is refused with all that differs
        return load(model, elements=config.numbers if known else None, dtype=dtype, device=device), False
    named = model if model is not None else base_of_run(folder)
    backbone = load(
        named if named is not None else config.base.name,
        head=config.base.head,
        elements=config.numbers,
        dtype=dtype or config.dtype,
        device=device,
        trust=trust,
    )
    return backbone, True


def deploy_copy(
    model: str | Path | Backbone | None, adapter: str | Path, *, dtype: str | None = None, trust: bool = False
) -> Deployed:
    """Base and adapter with nothing folded, on the CPU; a loaded backbone is copied and stays as it is.

    Raises:
        InputError: as :func:`deploy`.
    """
    if isinstance(model, Backbone):
        model = copy.deepcopy(model)
        return deploy(model, adapter, dtype=dtype, trust=trust, fold=False)
    return deploy(model, adapter, device="cpu", dtype=dtype, trust=trust, fold=False)
