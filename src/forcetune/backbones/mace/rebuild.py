"""MACE models in and out of files without running code from them.

A file's tensors and plain values are read inertly, the model is made anew by mace's own constructors, and every
parameter, buffer and coupling tensor of the file is put in its place.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forcetune.backbones.inert import Record, read_inert
from forcetune.backbones.mace.architecture import MaceArchitecture, architecture_of, read_architecture
from forcetune.backbones.mace.construction import build, construct
from forcetune.backbones.mace.converted import check_not_converted
from forcetune.backbones.mace.library import import_mace
from forcetune.backbones.mace.tree import (
    ADAPTER,
    Node,
    UnfitError,
    check_same,
    dtype_of,
    node_from_module,
    node_from_record,
)
from forcetune.errors import ForcetuneError, InputError, warn
from forcetune.files import atomic_path
from forcetune.parsing import short

__all__ = [
    "MaceArchitecture",
    "architecture_of",
    "assemble",
    "build",
    "fingerprint",
    "import_mace",
    "read_mace",
    "read_plain",
    "save_mace",
    "save_plain",
]

_FORMAT = "forcetune-mace-1"
_INDEX = ":index"
_UNPACKED = 64  # elements of a coupling tensor for each byte of a file that stores its nonzero ones
# shapes of these depend on how a model was made, not on its architecture
_FREE_SHAPE = ("atomic_energies_fn.atomic_energies", "scale_shift.scale", "scale_shift.shift")


def _derived(name: str) -> bool:
    """Buffers that follow from the others, and that files of older versions may lack."""
    return name.endswith(("output_mask", "_zeroed"))


def read_mace(path: str | os.PathLike[str], *, trust: bool = False) -> nn.Module:
    """Read a MACE model onto the CPU, in the precision of the file and in evaluation mode.

    Args:
        path: a ``.model`` file of mace-torch, or a ``.safetensors`` file of :func:`save_plain`.
        trust: where the model cannot be rebuilt, load it by ``torch.load``, which runs code from the file.

    Raises:
        InputError: the file is missing, damaged, no MACE model, converted to an accelerator, or cannot be rebuilt and
            is not trusted.
    """
    file = Path(path)
    if file.suffix == ".safetensors":
        return read_plain(file)
    content = read_inert(file)
    _check_whole_model(content, file)
    check_not_converted(content, file)
    try:
        return _rebuild(node_from_record(content))
    except UnfitError as error:
        if trust:
            warn(f"{file} cannot be rebuilt ({error}); it is loaded as pickled code, as --trust allows.")
            return _load_pickled(file)
        raise InputError(
            f"{file} cannot be rebuilt: {error}. If you trust where it comes from, --trust loads it as pickled code."
        ) from error


def _check_whole_model(content: Any, file: Path) -> None:
    if isinstance(content, Record):
        return
    found = f"a {type(content).__name__}"
    if isinstance(content, dict):
        tensors = content and all(isinstance(value, Tensor) for value in content.values())
        found = "only the tensors of a model (a state dict)" if tensors else "a checkpoint or another table"
    raise InputError(
        f"{file} holds {found}; pass the whole model that mace wrote by torch.save(model), mostly *.model."
    )


def _load_pickled(file: Path) -> nn.Module:
    import_mace()
    try:
        model = torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle may raise anything
        raise InputError(
            f"{file} cannot be loaded as pickled code either ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{file} holds a {type(model).__name__} and no model; pass the .model file that mace wrote.")
    return model.eval()


def _rebuild(node: Node) -> nn.Module:
    """A new model like the one seen, on the CPU."""
    model = assemble(read_architecture(node), node.all_tensors(), node.all_constants())
    check_same(node, node_from_module(model))
    return model


def assemble(
    architecture: MaceArchitecture, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build a model and give it these tensors, all of them.

    Args:
        architecture: what to build.
        tensors: parameters (as ``nn.Parameter``) and buffers by dotted name; copied, with their dtype.
        constants: buffers of compiled code (Wigner 3j symbols) by dotted name; copied where they fit.

    Raises:
        UnfitError: a tensor has no place, has another shape, or one is missing.
    """
    couplings = {name: tensor.detach().cpu() for name, tensor in tensors.items() if ".U_matrix_" in name}
    elements = sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in tensors.values())
    model = construct(architecture, couplings=couplings, elements=elements, dtype=dtype_of(tensors))
    places = node_from_module(model).all_tensors()
    for name, tensor in tensors.items():
        if name in places:
            if places[name].shape != tensor.shape and name not in _FREE_SHAPE:
                shapes = f"{tuple(tensor.shape)} and {tuple(places[name].shape)}"
                raise UnfitError(f"the shape of {name} differs from what its architecture needs: {shapes}")
            _place(model, name, tensor, places[name])
        elif tensor.numel() and not _derived(name):
            raise UnfitError(f"there is no place for its tensor {name}")
    missing = sorted(n for n, t in places.items() if n not in tensors and t.numel() and not _derived(n))
    if missing:
        raise UnfitError(f"it has no {', '.join(missing[:5])}")
    _check_free_shapes(model, architecture)
    _copy_constants(model, constants or {})
    return model


def _place(model: nn.Module, name: str, tensor: Tensor, current: Tensor) -> None:
    """Put a tensor where its name says; whether it is a parameter follows the tensor."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    value = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    owner._parameters.pop(attribute, None)
    owner._buffers.pop(attribute, None)
    if isinstance(tensor, nn.Parameter):
        # weights that the library holds at zero are parameters without gradient
        trains = current.requires_grad or not isinstance(current, nn.Parameter)
        owner.register_parameter(attribute, nn.Parameter(value, requires_grad=trains))
    else:
        owner.register_buffer(attribute, value)


def _check_free_shapes(model: Any, architecture: MaceArchitecture) -> None:
    heads, elements = len(architecture.heads), len(architecture.atomic_numbers)
    energies = torch.atleast_2d(model.atomic_energies_fn.atomic_energies)
    if tuple(energies.shape) != (heads, elements):
        raise UnfitError(
            f"it has reference energies of shape {tuple(energies.shape)} for {heads} heads, {elements} elements"
        )
    if architecture.kind == "ScaleShiftMACE":
        for name in ("scale", "shift"):
            found = tuple(torch.atleast_1d(getattr(model.scale_shift, name)).shape)
            if found != (heads,):
                raise UnfitError(f"it has a {name} of shape {found} for {heads} heads")


def _copy_constants(model: nn.Module, constants: Mapping[str, Tensor]) -> None:
    """Carry over rounding: a model converted from float32 to float64 keeps 3j symbols of 7 digits."""
    places = dict(model.named_buffers())
    for name, tensor in constants.items():
        place = places.get(name)
        if place is None or place.shape != tensor.shape:
            continue
        if not torch.allclose(place.double(), tensor.detach().cpu().double(), atol=1e-5):
            raise UnfitError(f"its constant {name} has other values than the library gives")
        place.copy_(tensor.detach())


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the architecture and all parameters, buffers and coupling tensors, as 64 hexadecimal digits.

    Numbers enter as float64 (integers and flags as int64), so that a float32 model has the same fingerprint before
    and after conversion to float64; conversion to float32 changes it where it rounds. Buffers that follow from
    others are left out, so are compiled code and its constants, the device and whether a tensor is trainable.
    The fingerprint of a model that cannot be described covers its class and tensors.
    """
    node = node_from_module(model)
    try:
        description = read_architecture(node).to_json()
    except UnfitError:
        description = f"{node.package}.{node.kind}"
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(node.all_tensors().items()):
        if _derived(name) or not tensor.numel():
            continue
        wide = torch.float64 if tensor.dtype.is_floating_point else torch.int64
        values = tensor.detach().cpu().to(wide).contiguous().numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {wide}".encode())
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU made of mace's classes only: no adapter, no hooks.

    Raises:
        UnfitError: the model cannot be rebuilt.
    """
    return _rebuild(node_from_module(model))


def _copy_as_it_is(model: nn.Module, reason: Exception) -> nn.Module:
    """A copy of a model that cannot be rebuilt, where nothing of ours clings to it.

    Raises:
        ForcetuneError: something does.
    """
    for name, module in model.named_modules():
        hooks = any(getattr(module, table) for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))
        if hooks or name.split(".")[0] == ADAPTER or type(module).__module__.startswith("forcetune"):
            raise ForcetuneError(
                f"the model cannot be written: {reason}, and an adapter is attached to it; merge the adapter first."
            )
    return copy.deepcopy(model).cpu()


def save_mace(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a plain ``.model`` file that mace's calculator reads, atomically, tensors on the CPU.

    An adapter attached to the model is not written; merge it first.

    Raises:
        InputError: the folder cannot be written.
        ForcetuneError: the model cannot be rebuilt and an adapter is attached to it.
    """
    import_mace()
    try:
        plain = plain_copy(model)
    except UnfitError as error:
        plain = _copy_as_it_is(model, error)
    with atomic_path(path) as temporary:
        torch.save(plain, temporary)


def save_plain(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model without pickle: tensors as safetensors, the architecture as JSON in the header; atomically.

    Raises:
        InputError: the model cannot be described, or the folder cannot be written.
    """
    node = node_from_module(model)
    architecture = architecture_of(model)
    tensors, constants = node.all_tensors(), node.all_constants()
    header = {
        "format": _FORMAT,
        "architecture": architecture.to_json(),
        "parameters": json.dumps(sorted(name for name, t in tensors.items() if isinstance(t, nn.Parameter))),
        "constants": json.dumps(sorted(constants)),
    }
    content = {
        n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in (tensors | constants).items()
    }
    # nine tenths of a large model's coupling tensors are zeros, and most of a small model's file would be
    sparse = {name: list(tensor.shape) for name, tensor in content.items() if ".U_matrix_" in name}
    for name in sparse:
        flat = content[name].flatten()
        index = flat.nonzero()[:, 0]
        content[name], content[name + _INDEX] = flat[index], index.to(torch.int32)
    header["sparse"] = json.dumps(sparse, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(content, temporary, metadata=header)


def read_plain(path: str | os.PathLike[str]) -> nn.Module:
    """Read a model of :func:`save_plain`, on the CPU.

    Raises:
        InputError: the file is missing, damaged or something else.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file} cannot be read (no such file); check the path.")
    try:
        with safe_open(file, framework="pt") as archive:
            header = archive.metadata() or {}
            if header.get("format") != _FORMAT:
                raise InputError(
                    f"{file} is no MACE model of forcetune (format {header.get('format', 'unknown')}); pass a .model "
                    "file, or for an adapter its folder."
                )
            content = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        largest = _UNPACKED * file.stat().st_size
        for name, shape in json.loads(header.get("sparse", "{}")).items():
            if math.prod(shape) > largest:
                raise ValueError(f"{name} has shape {short(shape)}")
            values, index = content[name], content.pop(name + _INDEX).long()
            content[name] = values.new_zeros(math.prod(shape)).index_put((index,), values).reshape(shape)
        architecture = MaceArchitecture.from_json(header["architecture"])
        trainable, constants = set(json.loads(header["parameters"])), set(json.loads(header["constants"]))
        tensors = {
            name: nn.Parameter(tensor) if name in trainable else tensor
            for name, tensor in content.items()
            if name not in constants
        }
        return assemble(architecture, tensors, {name: content[name] for name in constants})
    except (SafetensorError, OSError, KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{file} is damaged or incomplete ({error}); get a fresh copy of the file.") from error
    except UnfitError as error:
        raise InputError(
            f"{file} cannot be rebuilt: {error}; write it again with this version of forcetune."
        ) from error
