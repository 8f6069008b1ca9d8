"""The adapter folder: ``adapter_config.json``, ``adapter_model.safetensors`` and a model card. No pickle.

Tensors are named by site, update and path. The configuration pins the foundation model by the SHA-256 of its file
and by a fingerprint of its architecture and tensors; on any other base an adapter is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ase.data import atomic_numbers, chemical_symbols
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from forcetune._version import __version__
from forcetune.adapters.attach import Adapter, attach, check_loaded, detach, folded_note, reattach, require_adapter
from forcetune.adapters.card import describe_adapter
from forcetune.adapters.combined import CombinedAdapter
from forcetune.adapters.config import FORMAT_VERSION, AdapterConfig, BaseRecord, MemberRecord, read_adapter_config
from forcetune.adapters.hub import CARD_NAME, CONFIG_NAME, FILE_NAMES, TENSORS_NAME, locate_adapter
from forcetune.adapters.methods import Method
from forcetune.backbones.protocol import Backbone
from forcetune.errors import InputError
from forcetune.utils.files import atomic_folder

OF_TRAINING = ("description", "learning_rate", "optimizer")
"""What an adapter says of its method that does not change what it is; another version may have other defaults."""
_STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32)


def _base_record(backbone: Backbone) -> BaseRecord:
    base = backbone.base
    return BaseRecord(
        name=base.name,
        library=backbone.library,
        sha256=base.sha256,
        fingerprint=base.fingerprint,
        licence=base.licence,
        head=backbone.head,
        elements=[chemical_symbols[z] for z in backbone.elements],
        cutoff_ang=backbone.cutoff,
        parameters=sum(site.numel for site in backbone.sites()),
    )


def _canonical(key: str) -> str:
    return key.replace("/", ".").replace("|", "/")


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """What a file keeps of an adapter, under canonical names ``site/update/path``."""
    return {
        f"{_canonical(key)}/{name}": tensor
        for key, part in adapter.trainable_parts()
        for name, tensor in part.packed().items()
    }


def set_adapter_tensors(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter what :func:`adapter_tensors` returned.

    Raises:
        ValueError: a tensor has the wrong shape or type.
    """
    for key, part in adapter.trainable_parts():
        prefix = f"{_canonical(key)}/"
        try:
            part.unpack({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
        except ValueError as error:
            raise ValueError(f"{prefix}{error}") from error


def stored_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU; numbers in ``dtype``, places as they are."""
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device="cpu", dtype=kind).contiguous().clone()


def round_to(adapter: Adapter, dtype: torch.dtype) -> None:
    """Round the adapter to what a file of ``dtype`` can hold, so that what was measured is what is stored."""
    set_adapter_tensors(adapter, {name: stored_as(t, dtype) for name, t in adapter_tensors(adapter).items()})


def save_adapter(
    backbone: Backbone,
    folder: str | Path,
    *,
    stored_dtype: torch.dtype = torch.float64,
    training_data_sha256: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> AdapterConfig:
    """Write the attached adapter as a folder; an existing one is replaced in one step, other files in it stay.

    Args:
        backbone: carries the adapter.
        folder: the adapter folder.
        stored_dtype: precision of the tensors in the file; see :func:`round_to` for what float32 means.
        training_data_sha256: of the frames it was trained on.
        metrics: errors and the like, kept in the configuration and the card.

    Raises:
        InputError: no adapter is attached, or the place cannot be written, such as a folder of something else with a
            file of the same name.
    """
    adapter = require_adapter(backbone)
    if adapter.folded:
        raise InputError(
            "the weight updates of this adapter are folded into the weights of the model, so that it can no longer be "
            "saved; load it again without folding (forcetune.load_adapter)."
        )
    check_adapter_place(Path(folder))
    config = AdapterConfig(
        format_version=FORMAT_VERSION,
        forcetune=__version__,
        base=_base_record(backbone),
        method=adapter.method.to_json(),
        reference_energies_ev={chemical_symbols[z]: energy for z, energy in backbone.reference_energies.items()},
        dtype="float64" if backbone.dtype == torch.float64 else "float32",
        stored_dtype="float64" if stored_dtype == torch.float64 else "float32",
        trainable=adapter.trainable,
        training_data_sha256=training_data_sha256,
        metrics=dict(metrics or {}),
        combination=_member_records(adapter),
    )
    tensors = {name: stored_as(tensor, stored_dtype) for name, tensor in adapter_tensors(adapter).items()}
    with atomic_folder(folder) as temporary:
        (temporary / TENSORS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        unused = {"combination"} if config.combination is None else None
        text = json.dumps(config.model_dump(mode="json", exclude=unused), indent=2, sort_keys=True, ensure_ascii=False)
        (temporary / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        (temporary / CARD_NAME).write_text(describe_adapter(config), encoding="utf-8")
    return config


def _member_records(adapter: Adapter) -> tuple[MemberRecord, ...] | None:
    if not isinstance(adapter, CombinedAdapter):
        return None
    return tuple(
        MemberRecord(name=name, method=method.to_json(), scale=adapter.scales[name])
        for name, method in adapter.methods.items()
    )


def is_member_name(name: str) -> bool:
    """Whether an adapter of a combination can be called that."""
    return bool(name) and not set(name) & set("./\\|")


def check_adapter_place(folder: Path) -> None:
    """
    Raises:
        InputError: an adapter written to this folder would replace a file of something else.
    """
    if not (folder / CONFIG_NAME).exists():
        taken = [name for name in FILE_NAMES if (folder / name).exists()]
        if taken:
            raise InputError(
                f"{folder}: is no adapter folder (no {CONFIG_NAME}), and its {taken[0]} would be replaced; choose "
                "another folder."
            )


def check_base(config: AdapterConfig, backbone: Backbone, folder: str | Path) -> None:
    """Refuse a base other than the one the adapter was trained on.

    The same file is recognised by its SHA-256, the same model from another file by its fingerprint.

    Raises:
        InputError: names what differs.
    """
    wanted, actual = config.base, _base_record(backbone)
    same_file = bool(wanted.sha256) and wanted.sha256 == actual.sha256
    differences = [
        f"{what} {getattr(wanted, key)} there, {getattr(actual, key)} here"
        for key, what in (
            ("library", "library"),
            ("head", "head"),
            ("elements", "elements"),
            ("cutoff_ang", "cutoff in Å"),
            ("parameters", "number of weights"),
        )
        if getattr(wanted, key) != getattr(actual, key)
    ]
    if not same_file and wanted.fingerprint != actual.fingerprint:
        differences.insert(0, f"fingerprint {wanted.fingerprint[:12]} there, {actual.fingerprint[:12]} here")
    if differences:
        raise InputError(
            f"{folder}: this adapter was trained on {wanted.name}, which is not the model given ({actual.name}"
            f"{folded_note(backbone.base)}): {'; '.join(differences)}. Load the adapter on its own base."
        )


def load_adapter(backbone: Backbone, folder: str | Path) -> Adapter:
    """Attach the adapter of a folder (or ``hub:owner/name``) to its base, reference energies included.

    Raises:
        InputError: damaged folder, or a base it was not trained on; the backbone is then left as it was.
    """
    check_loaded(backbone)
    folder = locate_adapter(folder)
    config = read_adapter_config(folder)
    check_base(config, backbone, folder)
    try:
        adapter = _attach_for(config, backbone)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: the method of this adapter cannot be built ({error}).") from error
    try:
        _load_tensors(adapter, Path(folder) / TENSORS_NAME)
        references = {atomic_numbers[symbol]: energy for symbol, energy in config.reference_energies_ev.items()}
        backbone.set_reference_energies(references)
    except BaseException:
        detach(backbone)
        raise
    return adapter


def start_from(adapter: Adapter, backbone: Backbone, folder: str | Path) -> None:
    """Set an attached adapter to the values of another one, from which its training is to begin.

    Args:
        adapter: attached to ``backbone``; its reference energies stay.
        backbone: the base.
        folder: adapter folder or ``hub:owner/name``, of the same base and method.

    Raises:
        InputError: damaged folder, another base, or another method.
    """
    folder = locate_adapter(folder)
    config = read_adapter_config(folder)
    check_base(config, backbone, folder)
    if config.combination is not None:
        raise InputError(f"{folder}: is a combination of adapters; training starts from a single one.")
    theirs, ours = (
        {key: value for key, value in method.items() if key not in OF_TRAINING}
        for method in (config.method, adapter.method.to_json())
    )
    if theirs != ours:
        name = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
        raise InputError(
            f"{folder}: has another method than this run ({name} differs); start from an adapter of the same method "
            "with the same options."
        )
    _load_tensors(adapter, Path(folder) / TENSORS_NAME)


def _attach_for(config: AdapterConfig, backbone: Backbone) -> Adapter:
    """Attach what a configuration describes, whose tensors are to follow."""
    if config.combination is None:
        return attach(backbone, Method.from_json(config.method))
    names = [member.name for member in config.combination]
    methods = dict(zip(names, config.methods, strict=True))
    if not names or len(methods) < len(names) or not all(map(is_member_name, names)):
        raise ValueError("a combination needs adapters, with different names without dots and slashes")
    if any(method.magnetism is not None for method in methods.values()):
        raise ValueError("adapters with a magnetic layer cannot be combined")
    with torch.random.fork_rng(devices=[]):
        members = {name: Adapter(method, backbone) for name, method in methods.items()}
    scales = {member.name: member.scale for member in config.combination}
    if not all(map(math.isfinite, scales.values())):
        raise ValueError("a scale is not finite")
    adapter = CombinedAdapter(backbone, members, scales)
    reattach(backbone, adapter)
    return adapter


def _load_tensors(adapter: Adapter, path: Path) -> None:
    expected = adapter_tensors(adapter)
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            if names != set(expected):
                odd = sorted(names ^ set(expected))[0]
                where = "unknown to the method" if odd in names else "missing from the file"
                raise InputError(f"{path}: tensor {odd} is {where}; tensors and configuration do not belong together.")
            tensors: dict[str, Tensor] = {name: stored.get_tensor(name) for name in names}
        for name, value in tensors.items():
            if value.dtype not in _STORED:
                raise ValueError(f"{name} has the type {value.dtype}, which no adapter has")
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} holds numbers that are not finite")
        set_adapter_tensors(adapter, tensors)
        if not all(bool(parameter.isfinite().all()) for parameter in adapter.parameters()):
            raise ValueError("of the file holds numbers beyond the precision of the model")
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: tensor {error}; copy the adapter folder again.") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy the adapter folder again.") from error
