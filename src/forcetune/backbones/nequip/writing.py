"""NequIP models into copies of the files that they were read from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.backbones.nequip.checkpoint import average_names, content_from_checkpoint
from forcetune.backbones.nequip.content import SHIFTS, NequIPContent, network_name
from forcetune.backbones.nequip.module_tree import read_tree
from forcetune.backbones.nequip.package import PICKLES, energy_model, read_package
from forcetune.backbones.nequip.reading import is_package
from forcetune.backbones.safe_unpickle.reader import InertFile, read_inert_file, read_inert_package
from forcetune.backbones.safe_unpickle.rewriting import rewrite_storages
from forcetune.backbones.safe_unpickle.values import Global, Record
from forcetune.errors import InputError
from forcetune.kernels.tensors import UnfitError
from forcetune.utils.files import atomic_path

# what a checkpoint needs to be loaded as a model; the states of the training belong to other weights
_NEEDED = ("epoch", "global_step", "pytorch-lightning_version", "state_dict", "hparams_name", "hyper_parameters")


@dataclass(frozen=True, slots=True)
class Original:
    """The file that a model was read from.

    Attributes:
        path: of the file.
        fingerprint: of what it held then.
    """

    path: Path
    fingerprint: str


def write_content(content: NequIPContent, original: Original, path: str | Path) -> None:
    """Write a copy of a file in which other numbers stand, atomically.

    Numbers are replaced storage by storage, and everything else stays byte for byte. A checkpoint whose tensors would
    change their shape or precision is written again, with its description of the training changed accordingly.

    Args:
        content: what to write; its names are those of the file.
        original: the file.
        path: to write.

    Raises:
        UnfitError: the file has no place for the numbers.
        InputError: the file is gone or another one, or the target cannot be written.
    """
    if is_package(original.path):
        _write_package(content, original, path)
        return
    file = read_inert_file(original.path)
    before = content_from_checkpoint(file, original.path)
    _check_unchanged(before, original)
    tensors = _tensors_of_checkpoint(content, file.content["state_dict"])
    stored = file.content["state_dict"]
    if all(stored[key].shape == value.shape and stored[key].dtype == value.dtype for key, value in tensors.items()):
        _rewrite(original.path, path, [(stored[key], value) for key, value in tensors.items()], file.storages)
    else:
        _write_anew(content, file, tensors, path)


def _check_unchanged(content: NequIPContent, original: Original) -> None:
    if content.fingerprint != original.fingerprint:
        raise InputError(f"{original.path}: is no longer the file that the model was read from; load it again.")


def _rewrite(
    source: Path, target: str | Path, changes: list[tuple[Tensor, Tensor]], storages: Mapping[str, Tensor]
) -> None:
    """Copy an archive with other numbers in the storages of some tensors."""
    members = {flat.data_ptr(): name for name, flat in storages.items() if flat.numel()}
    touched: dict[str, Tensor] = {}
    for stored, value in changes:
        member = members.get(stored.untyped_storage().data_ptr())
        if not value.numel():
            continue
        if member is None:
            raise UnfitError("its tensors are stored in an unknown way")
        stored.detach().copy_(value)
        touched[member] = storages[member]
    if any(not torch.equal(stored.detach(), value.detach()) for stored, value in changes):
        raise UnfitError("some of its tensors share their memory with others")
    with atomic_path(target) as temporary:
        rewrite_storages(source, temporary, touched)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def _tensors_of_checkpoint(content: NequIPContent, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by their names in the state dictionary; averaged weights are written beside those that are trained on."""
    tensors = {key: content.tensors[name].detach() for name, key in content.names.items()}
    if "ema._extra_state" in state:
        tensors |= {key: content.tensors[name].detach() for name, key in average_names(content).items()}
    return tensors


def _write_anew(content: NequIPContent, file: InertFile, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    whole = file.content
    if (odd := _odd_value(whole["hyper_parameters"])) is not None:
        raise UnfitError(f"its description of the training holds {odd}, which is not written")
    parameters = copy.deepcopy(whole["hyper_parameters"])
    state = {key: tensors.get(key, value) for key, value in whole["state_dict"].items()}
    state = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    _cast(state, whole["state_dict"], content)
    for config in (parameters["model"], parameters["info_dict"]["training_module"]["model"]):
        _change_options(_innermost(config), content, whole["state_dict"])
    written = {key: whole[key] for key in _NEEDED if key in whole}
    written |= {"state_dict": state, "hyper_parameters": parameters}
    with atomic_path(path) as temporary:
        torch.save(written, temporary)


def _cast(state: dict[str, Any], before: Mapping[str, Any], content: NequIPContent) -> None:
    """Tensors of the model's precision that are not read follow it."""
    for key, value in before.items():
        if isinstance(value, Tensor) and value.dtype == torch.float32 and key.startswith("model."):
            state[key] = state[key].to(content.dtype)


def _innermost(config: dict[str, Any]) -> dict[str, Any]:
    """The options of the builder below modifiers."""
    while str(config["_target_"]).endswith("modify"):
        config = config["model"]
    return config


def _change_options(options: dict[str, Any], content: NequIPContent, before: Mapping[str, Any]) -> None:
    if options["model_dtype"] != content.architecture.dtype:
        options["model_dtype"] = content.architecture.dtype
        if options.get("avg_num_neighbors") is not None:
            # what follows from them was rounded to the precision that the model had
            norms = content.tensors["layer0_convnet.conv.avg_num_neighbors_norm.norm_const"].double().flatten()
            numbers = (1 / norms.square()).tolist()
            by_type = dict(zip(options["type_names"], numbers, strict=False))
            options["avg_num_neighbors"] = numbers[0] if len(numbers) == 1 else by_type
    shifts = content.tensors[SHIFTS]
    if shifts.shape != before[content.names[SHIFTS]].shape:
        values = shifts.detach().flatten().tolist()
        options["per_type_energy_shifts"] = dict(zip(options["type_names"], values, strict=True))


def _odd_value(value: Any) -> str | None:
    """What in a value is no plain one."""
    if isinstance(value, Mapping):
        return next((odd for part in value.values() if (odd := _odd_value(part)) is not None), None)
    if isinstance(value, (list, tuple)):
        return next((odd for part in value if (odd := _odd_value(part)) is not None), None)
    if isinstance(value, (Record, Global)):
        return f"a {value.module}.{value.name}"
    return None


# ---- packages ------------------------------------------------------------------------------------------------------


def _write_package(content: NequIPContent, original: Original, path: str | Path) -> None:
    _check_unchanged(read_package(original.path), original)
    package = read_inert_package(original.path, PICKLES)
    changes: list[tuple[Tensor, Tensor]] = []
    for name, record in package.contents.items():
        own = {network_name(key): tensor for key, tensor in energy_model(read_tree(record)).all_tensors().items()}
        for key in content.names:
            value = content.tensors[key]
            if key not in own or own[key].dtype != value.dtype:
                raise UnfitError(f"its {name} has no {key} of {value.dtype}")
            if own[key].shape != value.shape and key == SHIFTS:
                raise UnfitError(
                    "its package has one energy shift for all types, or none, and so no place for reference energies "
                    "of each element; write a checkpoint with per_type_energy_shifts for each type"
                )
            if own[key].shape != value.shape:
                raise UnfitError(f"its {name} has another shape of {key}")
            if isinstance(own[key], nn.Parameter) or not torch.equal(own[key], value):
                changes.append((own[key], value))
    _rewrite(original.path, path, changes, package.storages)
