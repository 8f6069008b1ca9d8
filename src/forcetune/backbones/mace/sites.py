"""The learnable weights of a MACE model, with their equivariant meaning.

Layers are recognised by class name and by what they carry, not by ``isinstance``: packaged and converted models
bring their own copies of the classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from forcetune.backbones.protocol import Site, WeightPath

ADAPTER_PREFIX = "forcetune_adapter"


def mace_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every learnable weight of a MACE model, in the order of its modules.

    Weights that the library itself holds at zero because no coupling exists (``weights_*_zeroed``) are no sites.
    """
    sites: list[Site] = []
    for name, module in model.named_modules():
        if name.split(".")[0] != ADAPTER_PREFIX:
            sites.extend(_sites_of(name, module))
    found = {site.name for site in sites}
    for name, module in model.named_modules():
        if name.split(".")[0] == ADAPTER_PREFIX or name.split(".")[-1] == "weights":
            continue
        for parameter, tensor in module.named_parameters(recurse=False):
            full = f"{name}.{parameter}".lstrip(".")
            if full not in found:
                whole = WeightPath("all", 0, tuple(tensor.shape) or (1,))
                kind = "radial_basis" if "bessel" in parameter or "gaussian" in parameter else "other"
                sites.append(Site(full, name, parameter, name, kind, (whole,)))
    n_layers = len(model.get_submodule("interactions")) if "interactions" in model._modules else 0  # pyright: ignore[reportArgumentType]
    return tuple(replace(site, layers_behind=_layers_behind(site.name, n_layers)) for site in sites)


def _layers_behind(name: str, n_layers: int) -> int:
    """Readouts count with the last layer; what comes before the layers counts as one more."""
    first, *rest = name.split(".")
    if first in ("interactions", "products"):
        return n_layers - 1 - int(rest[0])
    return 0 if first in ("readouts", "scale_shift", "embedding_readout") else n_layers


def _sites_of(name: str, module: Any) -> Iterator[Site]:
    kind = type(module).__name__
    if kind == "Linear" and hasattr(module, "irreps_in") and "weight" in module._parameters:
        yield _equivariant_linear(name, module)
    elif kind == "FullyConnectedTensorProduct" and "weight" in module._parameters:
        yield _tensor_product(name, module)
    elif kind == "_Layer" or isinstance(module, nn.Linear):
        yield _radial_layer(name, module, transposed=isinstance(module, nn.Linear))
    elif kind == "Contraction":
        yield from _contraction(name, module)


def _unique(names: list[str]) -> list[str]:
    """Numbered where a name occurs more than once."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if names.count(name) == 1 else f"{name}#{seen[name]}")
    return result


def _equivariant_linear(name: str, module: Any) -> Site:
    """Blocks of equal irreps that follow one another are one path, as if the irreps were simplified.

    The weight's memory is the same either way, and so is the normalisation, which counts all inputs of an output.
    """
    labels: list[str] = []
    starts: list[int] = []
    shapes: list[tuple[int, int]] = []
    outputs: list[int] = []
    start = 0
    for instruction in module.instructions:
        if instruction.i_in < 0:
            continue
        fan_in, fan_out = instruction.path_shape
        label = f"{module.irreps_in[instruction.i_in].ir}->{module.irreps_out[instruction.i_out].ir}"
        if fan_in * fan_out == 0:
            continue
        if labels and labels[-1] == label and outputs[-1] == instruction.i_out:
            shapes[-1] = (shapes[-1][0] + fan_in, fan_out)
        else:
            labels.append(label)
            starts.append(start)
            shapes.append((fan_in, fan_out))
            outputs.append(instruction.i_out)
        start += fan_in * fan_out
    paths = tuple(
        WeightPath(*entry, by_element=(1, *entry[2]) if _takes_elements(name) else None)
        for entry in zip(_unique(labels), starts, shapes, strict=True)
    )
    kind = "readout" if name.split(".")[0] in ("readouts", "embedding_readout") else "linear"
    irreps = (str(module.irreps_in), str(module.irreps_out))
    return Site(f"{name}.weight", name, "weight", name, kind, paths, *irreps)


def _takes_elements(name: str) -> bool:
    """Whether the input of a linear layer is the one-hot element, of the atom or of the ends of an edge."""
    return name == "node_embedding.linear" or name.split(".")[-1] in ("source_embedding", "target_embedding")


def _tensor_product(name: str, module: Any) -> Site:
    """A product of features and the one-hot element."""
    labels: list[str] = []
    factors: list[tuple[int, int, int]] = []
    for instruction in module.instructions:
        if not instruction.has_weight:
            continue
        first, second, out = instruction.path_shape
        labels.append(
            f"{module.irreps_in1[instruction.i_in1].ir}*{module.irreps_in2[instruction.i_in2].ir}"
            f"->{module.irreps_out[instruction.i_out].ir}"
        )
        factors.append((first, second, out))
    starts = [sum(math.prod(shape) for shape in factors[:k]) for k in range(len(factors))]
    paths = tuple(
        WeightPath(label, start, (first * second, out), by_element=(first, second, out))
        for label, start, (first, second, out) in zip(_unique(labels), starts, factors, strict=True)
    )
    irreps = (str(module.irreps_in1), str(module.irreps_out))
    return Site(f"{name}.weight", name, "weight", name, "tensor_product", paths, *irreps)


def _radial_layer(name: str, module: Any, transposed: bool) -> Site:
    shape = tuple(module._parameters["weight"].shape)
    label = "out->in" if transposed else "in->out"
    return Site(f"{name}.weight", name, "weight", name, "radial_mlp", (WeightPath(label, 0, shape, transposed),))


def _contraction(name: str, module: Any) -> Iterator[Site]:
    order = len(module.weights) + 1

    def site(owner: str, parameter: str, nu: int, kind: str, weight: Any) -> Site:
        elements, *rest = weight.shape
        path = WeightPath(f"order{nu}", 0, tuple(weight.shape), by_element=(1, elements, math.prod(rest)))
        return Site(f"{owner}.{parameter}", owner, parameter, name, kind, (path,))

    def zeroed(which: str) -> bool:
        flag = getattr(module, f"weights_{which}_zeroed", None)
        return flag is not None and bool(flag)

    if not zeroed("max"):
        yield site(name, "weights_max", order, "contraction", module.weights_max)
    for k in range(order - 1):
        if not zeroed(str(k)):
            yield site(f"{name}.weights", str(k), order - 1 - k, "contraction_lower", module.weights[k])
