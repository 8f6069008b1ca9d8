"""Smaller models that give the same numbers: one head of several, or some elements of the table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from forcetune.backbones.mace.architecture import MaceArchitecture, read_architecture
from forcetune.backbones.mace.rebuild import assemble
from forcetune.backbones.mace.tree import Node, UnfitError, node_from_module, weighted_shapes, with_tensors
from forcetune.errors import InputError


def select_head(model: nn.Module, head: str) -> nn.Module:
    """A new model, on the CPU, with one head, which gives that head's energies, forces and stress.

    Raises:
        InputError: the model has no such head, or cannot be rebuilt.
    """
    heads = [str(name) for name in getattr(model, "heads", None) or ["Default"]]
    if head not in heads:
        raise InputError(f"the model has no head {head!r}; it has {', '.join(heads)}.")
    node, architecture = _described(model)
    tensors = node.all_tensors()
    changed = _one_head(node, tensors, heads.index(head), len(heads)) if len(heads) > 1 else {}
    return _assembled(replace(architecture, heads=(head,)), node, tensors, changed)


def cut_elements(model: nn.Module, numbers: Iterable[int]) -> nn.Module:
    """A new model, on the CPU, that knows only these elements, in ascending order, and gives the same results.

    Args:
        model: a MACE model.
        numbers: atomic numbers.

    Raises:
        InputError: no element is left, the model does not know one of them, or it cannot be rebuilt.
    """
    node, architecture = _described(model)
    table = list(architecture.atomic_numbers)
    wanted = sorted({int(z) for z in numbers})
    unknown = [z for z in wanted if z not in table]
    if unknown or not wanted:
        found = f"does not know the atomic numbers {', '.join(map(str, unknown))}" if unknown else "needs an element"
        raise InputError(f"the model {found}; choose among {', '.join(map(str, table))}.")
    tensors = node.all_tensors()
    keep = torch.tensor([table.index(z) for z in wanted])
    changed = _some_elements(node, tensors, keep, len(table), architecture.use_agnostic_product)
    changed["atomic_numbers"] = torch.tensor(wanted, dtype=tensors["atomic_numbers"].dtype)
    return _assembled(replace(architecture, atomic_numbers=tuple(wanted)), node, tensors, changed)


def cut_tensors(
    node: Node, architecture: MaceArchitecture, tensors: Mapping[str, Tensor], head: str, numbers: Iterable[int]
) -> dict[str, Tensor]:
    """Tensors of a model of this shape after :func:`select_head` and :func:`cut_elements`, by dotted name.

    Args:
        node, architecture: of the whole model.
        tensors: its parameters and buffers, or others in their place.
        head: to select; of a model with one head its name does not matter.
        numbers: atomic numbers to keep, all known to the model.
    """
    heads, table = list(architecture.heads), list(architecture.atomic_numbers)
    wanted = sorted({int(z) for z in numbers})
    result = dict(tensors)
    if len(heads) > 1:
        result |= _one_head(with_tensors(node, result), result, heads.index(head), len(heads))
    if len(wanted) < len(table):
        keep = torch.tensor([table.index(z) for z in wanted])
        changed = _some_elements(
            with_tensors(node, result), result, keep, len(table), architecture.use_agnostic_product
        )
        result |= changed | {"atomic_numbers": tensors["atomic_numbers"][keep]}
    return result


def _described(model: nn.Module) -> tuple[Node, MaceArchitecture]:
    node = node_from_module(model)
    try:
        return node, read_architecture(node)
    except UnfitError as error:
        raise InputError(f"this {type(model).__name__} cannot be cut: {error}; pass it uncut.") from error


def _assembled(
    architecture: MaceArchitecture, node: Node, tensors: dict[str, Tensor], changed: dict[str, Tensor]
) -> nn.Module:
    """The model with some tensors replaced; which are parameters stays as it is."""
    result = {}
    for name, tensor in tensors.items():
        value = changed.get(name, tensor)
        is_parameter = isinstance(tensor, nn.Parameter)
        result[name] = nn.Parameter(value.detach(), requires_grad=False) if is_parameter else value
    # masks of irreps that are absent follow from the new irreps
    kept = {name: tensor for name, tensor in result.items() if name in changed or not name.endswith("output_mask")}
    try:
        return assemble(architecture, kept, node.all_constants())
    except UnfitError as error:
        raise InputError(f"the model cannot be cut: {error}; pass it uncut.") from error


def _one_head(node: Node, tensors: dict[str, Tensor], head: int, heads: int) -> dict[str, Tensor]:
    """Tensors of the readouts, scale, shift and reference energies that belong to one head.

    Hidden features of the readout are ordered by head and those of other heads are masked, so that only the block
    of this head matters. A linear layer divides by the root of its number of inputs, masked ones included.
    """
    changed = {"atomic_energies_fn.atomic_energies": tensors["atomic_energies_fn.atomic_energies"][head : head + 1]}
    for name in ("scale_shift.scale", "scale_shift.shift"):
        if name in tensors:
            changed[name] = tensors[name][head : head + 1]
    for index, readout in node.child("readouts").children.items():
        if readout is None:
            continue
        prefix = f"readouts.{index}."
        if "linear" in readout.children:
            name = f"{prefix}linear.weight"
            changed[name] = tensors[name].reshape(-1, heads)[:, head].flatten()
        else:
            changed |= _one_head_of_mlp(readout, prefix, head, heads)
    return changed


def _one_head_of_mlp(readout: Node, prefix: str, head: int, heads: int) -> dict[str, Tensor]:
    first, last = readout.child("linear_1").tensor("weight"), readout.child("linear_2")
    width = last.tensor("weight").numel() // heads**2
    fewer_inputs = 1 / math.sqrt(heads)
    changed = {
        f"{prefix}linear_1.weight": first.reshape(-1, heads, width)[:, head].flatten(),
        f"{prefix}linear_2.weight": last.tensor("weight").reshape(heads, width, heads)[head, :, head] * fewer_inputs,
    }
    if last.tensor("bias").numel():
        changed[f"{prefix}linear_2.bias"] = last.tensor("bias").reshape(heads)[head : head + 1]
    if "linear_mid" in readout.children:
        middle = readout.child("linear_mid")
        block = middle.tensor("weight").reshape(heads, width, heads, width)[head, :, head]
        changed[f"{prefix}linear_mid.weight"] = block.flatten() * fewer_inputs
        changed[f"{prefix}linear_mid.bias"] = middle.tensor("bias").reshape(heads, width)[head]
    return changed


def _some_elements(
    node: Node, tensors: dict[str, Tensor], keep: Tensor, total: int, agnostic: bool
) -> dict[str, Tensor]:
    """Tensors with an axis of elements, cut.

    Layers that take one-hot elements divide by the root of the number of elements (e3nn's path normalisation), so
    their weights shrink by √(kept/total) when that number does.
    """
    changed: dict[str, Tensor] = {}
    fewer_elements = math.sqrt(len(keep) / total)

    def put(name: str, tensor: Tensor) -> None:
        changed[name] = tensor

    for prefix, module in node.walk():
        part = prefix.rstrip(".").split(".")[-1]
        if part in ("source_embedding", "target_embedding") or prefix == "node_embedding.linear.":
            weight = module.tensor("weight").detach()
            put(f"{prefix}weight", weight.reshape(total, -1)[keep.to(weight.device)].flatten() * fewer_elements)
        elif module.kind == "FullyConnectedTensorProduct":
            put(f"{prefix}weight", _cut_product(module, keep, total) * fewer_elements)
        elif module.kind == "Contraction" and not agnostic:
            put(
                f"{prefix}weights_max",
                module.tensor("weights_max").detach()[keep.to(tensors[f"{prefix}weights_max"].device)],
            )
            for name, weight in module.child("weights").tensors.items():
                put(f"{prefix}weights.{name}", weight.detach()[keep.to(weight.device)])
    energies = tensors["atomic_energies_fn.atomic_energies"]
    put("atomic_energies_fn.atomic_energies", energies[..., keep.to(energies.device)])
    return changed


def _cut_product(module: Node, keep: Tensor, total: int) -> Tensor:
    """Weight of a fully connected tensor product of features with one-hot elements, of some elements only."""
    weight = module.tensor("weight").detach()
    blocks: list[Tensor] = []
    start = 0
    for first, second, out in weighted_shapes(module):
        if second != total:
            raise InputError("the model's skip connection is not over its elements; it cannot be cut, pass it uncut.")
        block = weight[start : start + first * second * out].reshape(first, second, out)
        blocks.append(block[:, keep.to(weight.device)].flatten())
        start += first * second * out
    return torch.cat(blocks) if blocks else weight
