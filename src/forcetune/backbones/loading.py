"""From a name or a path to a loaded backbone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols

from forcetune.backbones.protocol import ADAPTER, Backbone
from forcetune.backbones.registry import resolve
from forcetune.config import ModelConfig, RunConfig
from forcetune.errors import ForcetuneError, InputError
from forcetune.kernels.compiled.choice import Kernels, choose_kernels, chosen_kernels
from forcetune.utils.distributed import place

ENTRY_POINTS = "forcetune.backbones"


def backbone_class(library: str) -> Any:
    """The backbone class of a library, found by entry point and imported only now.

    Raises:
        InputError: the library's extra is not installed.
    """
    entries = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if library not in entries:
        known = ", ".join(sorted(entries)) or "none"
        raise InputError(f"no backbone for {library!r} is installed; known here: {known}.")
    try:
        return entries[library].load()
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; install forcetune with the extra: pip install 'forcetune[{library}]'."
        ) from error


def choose_device(device: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU without one.

    Raises:
        InputError: unknown device, or CUDA asked for where there is none.
    """
    if device == "auto":
        return torch.device("cuda", place().local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"there is no device {device!r}; use cpu, cuda, cuda:1 or auto.") from error
    if chosen.type == "mps":
        raise InputError(
            "models do not run on Apple's GPU (mps), which has no float64, and energies are summed in float64; use "
            "device cpu or auto."
        )
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"models do not run on a device of type {chosen.type}; use cpu, cuda, cuda:1 or auto.")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is available here; use device cpu or auto.")
    return chosen


def load(
    model: str | Path | Backbone,
    *,
    head: str | None = None,
    elements: Sequence[int] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "auto",
    trust: bool = False,
    kernels: Kernels | None = None,
) -> Backbone:
    """Load a foundation model.

    Args:
        model: a published name (``forcetune models``), a path, or a loaded backbone, which is returned as it is, or a
            copy of it where it knows more than the ``elements`` asked for.
        head: which head of a multi-head model.
        elements: atomic numbers to cut the element table to; None keeps it whole.
        dtype: ``float64`` or ``float32``; by default float64, or that of a loaded backbone.
        device: ``cpu``, ``cuda`` … or ``auto``, which leaves a loaded backbone where it is.
        trust: allow a model file to run its own code where it cannot be rebuilt without.
        kernels: what computes convolutions and contractions: ``compiled`` loops, ``torch`` operations,
            ``triton`` kernels, ``cuequivariance``'s or ``auto``, compiled on a CPU where llvmlite is installed; by
            default auto, or that of a loaded backbone.

    Raises:
        InputError: unknown name, unreadable file, unknown head, element or device, kernels
            that are not there, or a loaded backbone that is not what is asked for.
    """
    precision = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if isinstance(model, Backbone):
        loaded = _loaded_already(model, head, elements, precision, device)
        if kernels is not None:
            choose_kernels(loaded.model, kernels)
        return loaded
    if not isinstance(model, str | Path):
        raise InputError(
            f"a model is a name, a path or what forcetune.load returned, and no {type(model).__name__}; an own module "
            "of the library is saved by torch.save(model, 'own.model') and named by its path."
        )
    resolved = resolve(str(model))
    backbone = backbone_class(resolved.library).load(
        resolved.path,
        name=resolved.name,
        licence=resolved.licence,
        sha256=resolved.sha256,
        source=str(model),
        head=head,
        elements=elements,
        dtype=precision or torch.float64,
        device=choose_device(device),
        trust=trust,
    )
    choose_kernels(backbone.model, kernels or "auto")
    return backbone


def _loaded_already(
    model: Backbone, head: str | None, elements: Sequence[int] | None, dtype: torch.dtype | None, device: str
) -> Backbone:
    """A loaded backbone, or a copy of it that is cut to ``elements``.

    Raises:
        InputError: something else was asked for than what it is.
    """
    name = model.base.name
    wanted = None if device == "auto" else choose_device(device)
    for what, here, asked in (("head", model.head, head), ("precision", model.dtype, dtype)):
        if asked is not None and asked != here:
            raise InputError(f"the loaded model {name} has the {what} {here}, not {asked}; load it with that one.")
    if wanted is not None and (wanted.type, wanted.index or 0) != (model.device.type, model.device.index or 0):
        raise InputError(f"the loaded model {name} is on the device {model.device}, not {device}; load it there.")
    if elements is None or set(elements) == set(model.elements):
        return model
    if ADAPTER in model.model._modules:
        raise InputError(
            f"the loaded model {name} carries an adapter and knows other elements than those asked for; detach the "
            "adapter first, or load the model with these elements."
        )
    cut = model.cut_to(elements)
    choose_kernels(cut.model, chosen_kernels(model.model))
    return cut


def is_as_loaded(backbone: Backbone) -> bool:
    """Whether the name or path that a backbone was loaded by gives the same model, bit for bit, once more."""
    base = backbone.base
    if not base.source:
        return False
    options: dict[str, Any] = {"head": backbone.head, "elements": backbone.elements, "trust": base.trusted}
    try:
        again = load(base.source, dtype=backbone.dtype, device="cpu", **options)
    except ForcetuneError:  # the file is gone or another one
        return False
    return has_same_weights(again, backbone)


def has_same_weights(one: Backbone, other: Backbone) -> bool:
    """Whether all parameters and buffers of two backbones are the same, bit for bit; adapters do not count."""
    first, second = (
        {name: value for name, value in backbone.model.state_dict().items() if not name.startswith(f"{ADAPTER}.")}
        for backbone in (one, other)
    )
    if one.elements != other.elements or first.keys() != second.keys():
        return False
    return all(torch.equal(value.cpu(), second[name].cpu()) for name, value in first.items())


def store_base(backbone: Backbone, path: str | Path) -> None:
    """Write a model that no file gives, so that it can be loaded again; its identity is from now on that of the file.

    Args:
        backbone: without an adapter, or with one that is switched off.
        path: the file to write; one that holds the model already stays.

    Raises:
        InputError: the place cannot be written.
        ForcetuneError: what was written is not the same model.
    """
    options: dict[str, Any] = {"dtype": backbone.dtype, "device": "cpu", "trust": backbone.base.trusted}
    # some writers keep the whole table of elements
    options["elements"] = backbone.elements
    again = None
    if Path(path).is_file():
        with suppress(ForcetuneError):
            again = load(path, head=backbone.head, **options)
    if again is None or not has_same_weights(again, backbone):
        backbone.save(path)
        again = load(path, head=backbone.head, **options)
        if not has_same_weights(again, backbone):
            raise ForcetuneError(
                f"{path}: the model written there is not the one in memory; save it yourself and load it."
            )
    backbone.base = replace(again.base, name=backbone.base.name, licence=backbone.base.licence, source=str(path))


def with_loaded(config: RunConfig, backbone: Backbone, place: Path) -> tuple[RunConfig, bool]:
    """The configuration of a run on a loaded backbone, such that the run can be repeated and opened from files.

    Args:
        config: what it says of the model gives way to what the backbone is.
        backbone: the model of the run.
        place: where the model is to be stored if no name or path gives it.

    Returns:
        the configuration, and whether the model is to be stored.
    """
    stored = not is_as_loaded(backbone)
    options = {
        "model": str(place) if stored else backbone.base.source,
        "head": backbone.head,
        "elements": [chemical_symbols[z] for z in backbone.elements],
        "dtype": "float64" if backbone.dtype == torch.float64 else "float32",
        "trust": backbone.base.trusted,
    }
    if config.model.device == "auto" and backbone.device.type != choose_device("auto").type:
        options["device"] = str(backbone.device)
    return config.model_copy(update={"model": config.model.model_copy(update=options)}), stored


def asked_of_loaded(config: ModelConfig) -> dict[str, Any]:
    """What a configuration says of the model beside its name, as arguments of :func:`load`; no defaults."""
    names = ("head", "dtype", "device", "kernels")
    return {name: getattr(config, name) for name in names if name in config.model_fields_set}
