"""The file that a model was read from, with other weights in it.

A merged model is the user's own file with other numbers: it opens in whatever version of mace the base opens in, keeps
all elements and heads, and only what was trained differs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from forcetune.backbones.mace.reading import content_from_record
from forcetune.backbones.mace.surgery import cut_of_tensors
from forcetune.backbones.safe_unpickle.reader import read_inert_file
from forcetune.backbones.safe_unpickle.rewriting import rewrite_storages
from forcetune.kernels.tensors import UnfitError
from forcetune.utils.files import atomic_path

Cut = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

_DERIVED = ("output_mask", "_zeroed", "atomic_numbers")


def write_into_original(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    head: str,
    numbers: tuple[int, ...],
) -> None:
    """Write a copy of a ``.model`` file in which a trained model's weights stand, atomically.

    Args:
        source: the file that the model was read from.
        target: file to write.
        tensors: parameters and buffers of the trained model by dotted name, in any precision; they are rounded to the
            file's.
        head, numbers: head and elements that the model was cut to.

    Raises:
        UnfitError: the file is not one that this can be done with.
        InputError: the file cannot be read, or the target not be written.
    """
    file = read_inert_file(source)
    content = content_from_record(file.content, Path(source))
    stored = content.tensors
    changed = changes_to_whole(stored, cut_of_tensors(content, head, numbers), tensors)
    member_of = {flat.data_ptr(): name for name, flat in file.storages.items() if flat.numel()}
    touched = {}
    for name, value in changed.items():
        member = member_of.get(stored[name].untyped_storage().data_ptr())
        if member is None:
            raise UnfitError(f"its tensor {name} is stored in an unknown way")
        stored[name].detach().copy_(value)
        touched[member] = file.storages[member]
    if any(not torch.equal(stored[name].detach(), value) for name, value in changed.items()):
        raise UnfitError("some of its weights share their memory with others")
    with atomic_path(target) as temporary:
        rewrite_storages(Path(source), temporary, touched)


def changes_to_whole(whole: Mapping[str, Tensor], cut: Cut, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors of a whole model that differ once the numbers that were trained in a part of it are put back.

    What a cut does to each number, to take it from some place and to scale it, is seen by cutting a model whose
    numbers are their places, and one of ones.

    Args:
        whole: tensors of the whole model by dotted name.
        cut: from tensors of the whole model to those of the part that was trained.
        trained: tensors of the part after the training.

    Raises:
        UnfitError: the part has other tensors than the cut gives.
    """
    # cut in the precision in which the part was made
    wide = cut({name: t.detach().double() if t.dtype.is_floating_point else t for name, t in whole.items()})
    stored = cut(whole)
    places = cut({name: torch.arange(t.numel(), dtype=torch.float64).reshape(t.shape) for name, t in whole.items()})
    factors = cut({name: torch.ones(t.shape, dtype=torch.float64) for name, t in whole.items()})
    changed = {}
    for name, value in trained.items():
        if name.endswith(_DERIVED) or not value.numel():
            continue
        before = wide if value.dtype == torch.float64 else stored
        if name not in before or before[name].shape != value.shape:
            raise UnfitError(f"it has no tensor {name} of shape {tuple(value.shape)}")
        value = value.detach().cpu()
        differs = before[name].to(value.dtype) != value
        if not differs.any():
            continue
        place = (places[name] / factors[name]).round().long()[differs]
        tensor = whole[name].detach().clone(memory_format=torch.contiguous_format)
        tensor.view(-1)[place] = (value.double() / factors[name])[differs].to(tensor.dtype)
        changed[name] = tensor
    return changed
