"""A further modality for a multi-modal SevenNet checkpoint, which leaves the others what they were."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from forcetune.backbones.nequip.interaction import ModalLinear
from forcetune.backbones.sevennet.architecture import read_architecture
from forcetune.backbones.sevennet.content import RESCALING, Cut, SevenNetContent, with_references
from forcetune.backbones.sevennet.network import SevenNetNetwork
from forcetune.kernels.tensors import UnfitError


def with_new_modality(
    cut: Cut, network: SevenNetNetwork, name: str, dtype: torch.dtype | None = None
) -> SevenNetContent:
    """The checkpoint with one more modality: the rows and reference energies of the network.

    A layer divides by the root of its number of inputs, which is now one more, so that all weights that lead to its
    scalars are multiplied by √((n + m + 1)/(n + m)) for n scalars and m modalities.

    Args:
        cut: elements, and the modality that the new one started from.
        network: with the new rows and reference energies; all its other weights are those of the checkpoint.
        name: of the new modality.
        dtype: of the tensors; None keeps that of each.

    Raises:
        UnfitError: other weights have changed, too, so that other modalities would no longer be what they were.
    """
    content = cut.content
    _check_only_rows(cut, network)
    own = {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for key, tensor in content.tensors.items():
        place = cut.modal_place(key)
        if place is None:
            tensors[key] = tensor.detach().to(dtype or tensor.dtype, copy=True)
            continue
        layer = network.get_submodule(key.removesuffix(".weight"))
        assert isinstance(layer, ModalLinear)
        row = own[f"{key.removesuffix('.weight')}.modality"]
        tensors[key] = _with_row(tensor.detach().double(), place[0], layer, row).to(dtype or tensor.dtype)
    rescaling, config = _rescaling(cut, own[f"{RESCALING}shift"], dtype)
    tensors |= rescaling
    modal_map = dict(content.config["_modal_map"]) | {name: cut.n_modalities}
    config |= {"_modal_map": modal_map, "_number_of_modalities": len(modal_map)}
    if isinstance(content.config.get("modal_list"), list):
        config["modal_list"] = [*content.config["modal_list"], name]
    changed = content.replaced(tensors, config)
    return SevenNetContent(
        read_architecture(changed.config),
        changed.tensors,
        changed.names,
        changed.constants,
        changed.config,
        changed.state,
    )


def _check_only_rows(cut: Cut, network: SevenNetNetwork) -> None:
    """
    Raises:
        UnfitError: weights that all modalities share are no longer those of the checkpoint.
    """
    before = cut.content.tensors
    for key, tensor in cut.written_back(network).tensors.items():
        place = cut.modal_place(key)
        shared = slice(None) if place is None else slice(place[0])
        if not key.startswith(RESCALING) and not torch.equal(tensor[shared], before[key][shared]):
            raise UnfitError(f"{key} has changed, which all modalities share")


def _with_row(values: Tensor, start: int, layer: ModalLinear, row: Tensor) -> Tensor:
    """The weight of a layer with the row of one more modality behind the others."""
    weights, rows = values[:start].clone(), values[start:]
    factor = math.sqrt((layer.scalar_inputs + 1) / layer.scalar_inputs)
    if len(weights) == layer.weight.numel():
        for block in layer.blocks:
            if block.target == layer.scalars:
                weights[block.start : block.start + block.fan_in * block.fan_out] *= factor
    else:  # the embedding, whose elements were cut; all its inputs are scalars
        weights *= factor
    return torch.cat([weights, rows * factor, row.double() * factor])


def _rescaling(cut: Cut, energies: Tensor, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Shift and scale with those of one more modality, and what changes in the configuration."""
    before = {key: cut.content.tensors[f"{RESCALING}{key}"].detach() for key in ("shift", "scale")}
    before = {key: tensor.to(dtype or tensor.dtype) for key, tensor in before.items()}
    changed, config = with_references(cut, energies, dtype)
    tensors: dict[str, Tensor] = {}
    for key, tensor in before.items():
        tuned = changed.get(f"{RESCALING}{key}", tensor)
        if tuned.ndim == 2:
            assert cut.modality is not None
            others = tensor if tensor.ndim == 2 else tensor.expand(cut.n_modalities, cut.n_species)
            tuned = torch.cat([others, tuned[cut.modality : cut.modality + 1]])
        tensors[f"{RESCALING}{key}"] = tuned.clone()
    return tensors, config
