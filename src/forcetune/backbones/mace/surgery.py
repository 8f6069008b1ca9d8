"""Smaller models that give the same numbers: one head of several, or some elements of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from forcetune.backbones.mace.architecture import MaceArchitecture
from forcetune.backbones.mace.content import MaceContent, build_network
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.errors import InputError
from forcetune.kernels.layers import SpeciesLinear
from forcetune.kernels.symmetric_contraction import Contraction
from forcetune.kernels.tensors import UnfitError

_ONE_HOT = ("node_embedding.linear", "source_embedding", "target_embedding")


def select_head(content: MaceContent, head: str) -> MaceContent:
    """The model with one head, which gives that head's energies, forces and stress.

    Raises:
        InputError: the model has no such head.
    """
    heads = content.architecture.heads
    if head not in heads:
        raise InputError(f"the model has no head {head!r}; it has {', '.join(heads)}.")
    if len(heads) == 1:
        return content
    changed = _one_head(content.architecture, content.tensors, heads.index(head))
    return _changed(content, replace(content.architecture, heads=(head,)), changed)


def cut_elements(content: MaceContent, numbers: Iterable[int]) -> MaceContent:
    """The model that knows only these elements, in ascending order, and gives the same results.

    Args:
        content: of a model.
        numbers: atomic numbers.

    Raises:
        InputError: no element is left, or the model does not know one of them.
    """
    table = list(content.architecture.atomic_numbers)
    wanted = sorted({int(z) for z in numbers})
    unknown = [z for z in wanted if z not in table]
    if unknown or not wanted:
        reason = f"does not know the atomic numbers {', '.join(map(str, unknown))}" if unknown else "needs an element"
        raise InputError(f"the model {reason}; choose among {', '.join(map(str, table))}.")
    keep = torch.tensor([table.index(z) for z in wanted])
    try:
        network = build_network(content)
    except UnfitError as error:
        raise InputError(f"the model cannot be cut: {error}; pass it uncut.") from error
    changed = _some_elements(content.architecture, network, content.tensors, keep)
    changed["atomic_numbers"] = torch.tensor(wanted, dtype=content.tensors["atomic_numbers"].dtype)
    return _changed(content, replace(content.architecture, atomic_numbers=tuple(wanted)), changed)


def cut_of_tensors(
    content: MaceContent, head: str, numbers: Iterable[int]
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """What :func:`select_head` and :func:`cut_elements` do to the tensors of this model, as a linear map.

    Raises:
        InputError: as those.
        UnfitError: tensors and architecture do not belong together.
    """
    heads, table = content.architecture.heads, content.architecture.atomic_numbers
    single = select_head(content, head)
    network = build_network(single)
    keep = torch.tensor([table.index(z) for z in sorted(set(numbers))])

    def cut(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = dict(tensors)
        if len(heads) > 1:
            result |= _one_head(content.architecture, result, heads.index(head))
        if len(keep) < len(table):
            result |= _some_elements(single.architecture, network, result, keep)
        return result

    return cut


def _changed(content: MaceContent, architecture: MaceArchitecture, tensors: dict[str, Tensor]) -> MaceContent:
    """The model with some tensors replaced; which are parameters stays as it is."""
    result = dict(content.tensors)
    for name, value in tensors.items():
        parameter = isinstance(content.tensors[name], nn.Parameter)
        result[name] = nn.Parameter(value.detach(), requires_grad=False) if parameter else value.detach()
    return replace(content, architecture=architecture, tensors=result)


def _one_head(architecture: MaceArchitecture, tensors: Mapping[str, Tensor], head: int) -> dict[str, Tensor]:
    """Tensors of the readouts, scale, shift and reference energies that belong to one head.

    Hidden features of the readout are ordered by head and those of other heads are masked, so that only the block
    of this head matters. A linear layer divides by the root of its number of inputs, masked ones included.
    """
    heads, mixed = len(architecture.heads), architecture.mixed_heads > 1
    changed = {"atomic_energies_fn.atomic_energies": tensors["atomic_energies_fn.atomic_energies"][head : head + 1]}
    for name in ("scale_shift.scale", "scale_shift.shift"):
        if name in tensors:
            changed[name] = tensors[name][head : head + 1]
    readouts = sorted({name.split(".")[1] for name in tensors if name.startswith("readouts.")})
    for index in readouts:
        prefix = f"readouts.{index}."
        if f"{prefix}linear.weight" in tensors:
            name = f"{prefix}linear.weight"
            changed[name] = tensors[name].reshape(-1, heads)[:, head].flatten()
        else:
            changed |= _one_head_of_mlp(tensors, prefix, head, heads, mixed=mixed)
    return changed


def _one_head_of_mlp(
    tensors: Mapping[str, Tensor], prefix: str, head: int, heads: int, *, mixed: bool
) -> dict[str, Tensor]:
    """``mixed``: the middle layer reads the hidden features of all heads."""
    first, last = tensors[f"{prefix}linear_1.weight"], tensors[f"{prefix}linear_2.weight"]
    width = last.numel() // heads**2
    fewer_inputs = 1 / math.sqrt(heads)
    changed = {f"{prefix}linear_2.weight": last.reshape(heads, width, heads)[head, :, head] * fewer_inputs}
    if not mixed:
        changed[f"{prefix}linear_1.weight"] = first.reshape(-1, heads, width)[:, head].flatten()
    if (bias := tensors.get(f"{prefix}linear_2.bias")) is not None:
        changed[f"{prefix}linear_2.bias"] = bias.reshape(heads)[head : head + 1]
    if (middle := tensors.get(f"{prefix}linear_mid.weight")) is not None:
        blocks = middle.reshape(heads, width, heads, width)
        own = blocks[:, :, head] if mixed else blocks[head, :, head] * fewer_inputs
        changed[f"{prefix}linear_mid.weight"] = own.flatten()
        changed[f"{prefix}linear_mid.bias"] = tensors[f"{prefix}linear_mid.bias"].reshape(heads, width)[head]
    return changed


def _some_elements(
    architecture: MaceArchitecture, network: MaceNetwork, tensors: Mapping[str, Tensor], keep: Tensor
) -> dict[str, Tensor]:
    """Tensors with an axis of elements, cut.

    Layers that take one-hot elements divide by the root of the number of elements (e3nn's path normalisation), so
    their weights shrink by √(kept/total) when that number does.
    """
    total, changed = len(architecture.atomic_numbers), {}
    fewer_elements = math.sqrt(len(keep) / total)
    for name, module in network.named_modules():
        if name.endswith(_ONE_HOT):
            weight = tensors[f"{name}.weight"].detach()
            changed[f"{name}.weight"] = weight.reshape(total, -1)[keep].flatten() * fewer_elements
        elif isinstance(module, SpeciesLinear):
            weight = tensors[f"{name}.weight"].detach()
            blocks = [
                weight[path.start : path.start + path.size].reshape(-1, total, path.shape[1])[:, keep].flatten()
                for site in module.sites(name)
                for path in site.paths
            ]
            changed[f"{name}.weight"] = torch.cat(blocks) * fewer_elements if blocks else weight
        elif isinstance(module, Contraction) and not architecture.use_agnostic_product:
            for weight_name in ("weights_max", *(f"weights.{k}" for k in range(module.order - 1))):
                changed[f"{name}.{weight_name}"] = tensors[f"{name}.{weight_name}"].detach()[keep]
    energies = tensors["atomic_energies_fn.atomic_energies"]
    changed["atomic_energies_fn.atomic_energies"] = energies[..., keep]
    return changed
