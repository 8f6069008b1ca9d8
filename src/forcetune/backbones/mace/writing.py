"""MACE models into files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from forcetune.backbones.mace.construction import assemble
from forcetune.backbones.mace.content import MaceContent
from forcetune.backbones.mace.reading import FORMAT, INDEX
from forcetune.errors import ForcetuneError
from forcetune.kernels.tensors import UnfitError
from forcetune.utils.files import atomic_path


def write_model(content: MaceContent, path: str | os.PathLike[str]) -> None:
    """Write a model, atomically, tensors on the CPU.

    Args:
        content: of the model.
        path: ``.safetensors`` is written without pickle and without mace (:func:`write_plain`), anything else as a
            module of mace that its calculator reads, which needs mace-torch.

    Raises:
        InputError: the folder cannot be written, or mace-torch is needed and not installed.
        ForcetuneError: mace cannot build the model.
    """
    if Path(path).suffix == ".safetensors":
        write_plain(content, path)
        return
    try:
        model = assemble(content.architecture, content.tensors, content.constants)
    except UnfitError as error:
        raise ForcetuneError(f"the model cannot be written for mace: {error}.") from error
    with atomic_path(path) as temporary:
        torch.save(model, temporary)


def write_plain(content: MaceContent, path: str | os.PathLike[str]) -> None:
    """Write a model without pickle: tensors as safetensors, the architecture as JSON in the header; atomically.

    Raises:
        InputError: the folder cannot be written.
    """
    header = {
        "format": FORMAT,
        "architecture": content.architecture.to_json(),
        "parameters": json.dumps(sorted(name for name, t in content.tensors.items() if isinstance(t, nn.Parameter))),
        "constants": json.dumps(sorted(content.constants)),
        "couplings": "all",
        "charges": "float32" if content.rounded_charges else "float64",
    }
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in (content.tensors | content.constants).items()
    }
    # nine tenths of a large model's coupling tensors are zeros, and most of a small model's file would be
    sparse = {name: list(tensor.shape) for name, tensor in stored.items() if ".U_matrix_" in name}
    for name in sparse:
        flat = stored[name].flatten()
        index = flat.nonzero()[:, 0]
        stored[name], stored[name + INDEX] = flat[index], index.to(torch.int32)
    header["sparse"] = json.dumps(sparse, sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(stored, temporary, metadata=header)
