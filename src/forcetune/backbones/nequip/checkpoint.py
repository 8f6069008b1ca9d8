"""Training checkpoints of NequIP (``.ckpt``), read without running code from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from forcetune.backbones.nequip.architecture import check_version
from forcetune.backbones.nequip.configuration import read_configuration
from forcetune.backbones.nequip.content import NequIPContent, sorted_content
from forcetune.backbones.safe_unpickle.reader import InertFile, read_inert_file
from forcetune.errors import InputError
from forcetune.kernels.tensors import UnfitError
from forcetune.utils.parsing import short

MODEL = "model.sole_model.model."
"""Before the names of a model's tensors in a checkpoint."""
_FUNCTION = "func."
AVERAGE = "ema.ema_weight_"
# how their weights become those of the model that is used: as they are, or those that were averaged
_AS_THEY_ARE = ("NequIPLightningModule", "ConFIGLightningModule")
_AVERAGED = ("EMALightningModule", "EMAConFIGLightningModule")


def is_checkpoint(content: object) -> bool:
    """Whether what a file holds looks like a training checkpoint of nequip."""
    return (
        isinstance(content, Mapping)
        and isinstance(content.get("state_dict"), Mapping)
        and isinstance(content.get("hyper_parameters"), Mapping)
        and isinstance(content["hyper_parameters"].get("info_dict"), Mapping)
    )


def read_checkpoint(path: str | Path) -> NequIPContent:
    """Read a checkpoint: the model that nequip would use, which is the averaged one where an average was kept.

    Raises:
        InputError: the file is missing, damaged or no checkpoint of nequip.
        UnfitError: it is one that forcetune does not compute; says what it is that it does not.
    """
    return content_from_checkpoint(read_inert_file(path), Path(path))


def content_from_checkpoint(file: InertFile, path: Path) -> NequIPContent:
    """As :func:`read_checkpoint`, of what was read."""
    if not is_checkpoint(file.content):
        raise InputError(f"{path} is no checkpoint of nequip; pass a .ckpt that nequip-train wrote, or a .nequip.zip.")
    parameters, state = file.content["hyper_parameters"], file.content["state_dict"]
    info = parameters["info_dict"]
    try:
        version = check_version(info["versions"]["nequip"])
        trainer = str(info["training_module"]["_target_"]).rpartition(".")[2]
        config = parameters["model"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UnfitError(f"its description of the training cannot be read ({short(str(error))})") from error
    if trainer not in _AS_THEY_ARE + _AVERAGED:
        raise UnfitError(
            f"it was trained by {short(trainer)}, whose weights are not those of the model; write a package with "
            "nequip-package and pass that"
        )
    described = read_configuration(config, version)
    own = {str(key): value for key, value in state.items() if str(key).startswith("model.")}
    if other := [key for key in own if not key.startswith(MODEL)]:
        raise UnfitError(f"it holds several models, or one that is stored in another way ({short(other[0])})")
    names = {key: key.removeprefix(MODEL).removeprefix(_FUNCTION) for key in own}
    result = sorted_content(
        described.architecture,
        {names[key]: value for key, value in own.items()},
        norms=described.norms,
        trained=described.trained,
    )
    places = {short_name: key for key, short_name in names.items()}
    content = NequIPContent(
        result.architecture,
        result.tensors,
        {name: places[key] for name, key in result.names.items()},
    )
    return with_averages(content, state) if trainer in _AVERAGED else content


def average_names(content: NequIPContent) -> dict[str, str]:
    """For each parameter the name of its average, which are numbered in the order of the parameters."""
    parameters = [name for name, tensor in content.tensors.items() if isinstance(tensor, nn.Parameter)]
    return {name: f"{AVERAGE}{index}" for index, name in enumerate(parameters)}


def with_averages(content: NequIPContent, state: Mapping[str, Any]) -> NequIPContent:
    """With the averaged weights in the places of the parameters.

    Raises:
        UnfitError: they do not belong to these parameters.
    """
    names = average_names(content)
    extra = state.get("ema._extra_state")
    if not isinstance(extra, Mapping) or extra.get("is_holding_ema_weights") is not True:
        raise UnfitError("its averaged weights are not where they should be")
    count = sum(str(key).startswith(AVERAGE) for key in state)
    tensors = dict(content.tensors)
    for name, key in names.items():
        value = state.get(key)
        if count != len(names) or not isinstance(value, Tensor) or value.shape != tensors[name].shape:
            raise UnfitError("its averaged weights are not those of its parameters")
        if value.dtype != tensors[name].dtype or not bool(value.isfinite().all()):
            raise UnfitError(f"its averaged weight {key} has another dtype, or is not finite")
        tensors[name] = nn.Parameter(value.detach())
    return NequIPContent(content.architecture, tensors, content.names)
