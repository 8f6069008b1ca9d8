"""The convolution by Triton's kernels, with first and second derivatives: operators and what launches the kernels.

The autograd functions are those of :mod:`forcetune.kernels.compiled.convolution`. No operation asks the device for a
value.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forcetune.kernels.compiled.convolution import Setting, contiguous, flat_paths, get_structure, run, spread_out
from forcetune.kernels.convolution import Paths
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.phase import Phase
from forcetune.kernels.triton import convolution_code
from forcetune.kernels.triton.convolution_code import Flags, Member, Shape
from forcetune.kernels.triton.library import kernel_from

PAIRS = 64
"""Pairs that a program treats at once for gradients by coupled harmonics."""

_WRITERS = {
    "gather": convolution_code.write_gather,
    "collect": convolution_code.write_collect,
    "to_radial": convolution_code.write_to_radial,
    "to_angular": convolution_code.write_to_angular,
}


@functools.lru_cache(maxsize=1024)
def _kernel(name: str, shape: Shape) -> Any:
    return kernel_from(name, _WRITERS[name](shape))


class _Product:
    """A tensor product with its paths in groups, each of which a kernel computes."""

    def __init__(self, flat: tuple[int, ...]) -> None:
        structure = get_structure(flat)
        self.groups = structure.groups
        self.members = convolution_code.list_members(structure.paths, [width for _, width in structure.groups])
        self.together = convolution_code.group_members(self.members)
        self.radial_width = sum(path.channels for path in structure.paths)
        self.angular_width = sum(path.dim_in * path.dim_out for path in structure.paths)

    def from_source(self, source: int) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.path.source == source)

    def shape(self, members: tuple[Member, ...], moved: Flags | None) -> Shape:
        return Shape(members, self.radial_width, self.angular_width, moved)


@functools.lru_cache(maxsize=256)
def tensor_product(flat: tuple[int, ...]) -> _Product:
    """The product of the paths that :func:`flat_paths` lists."""
    return _Product(flat)


def channel_block(channels: int, size: int) -> int:
    """Channels that a warp treats at once: 16 bytes of them for each of its 32 threads, or all."""
    return min(32 * (16 // size), 1 << max(0, channels - 1).bit_length())


def _launch(name: str, shape: Shape, rows: int, tensors: Mapping[str, Tensor]) -> None:
    kernel = _kernel(name, shape)
    size = next(tensor.element_size() for tensor in tensors.values() if tensor.is_floating_point())
    block = channel_block(shape.channels, size)
    blocks = -(-shape.channels // block)
    kernel[(rows, blocks)](
        **{one: tensors[one] for one in kernel.arg_names if one in tensors}, BLOCK=block, num_warps=1
    )


def _named(name: str, tensors: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {f"{name}{number}": tensor for number, tensor in enumerate(tensors) if tensor is not None}


def _directions(moved: Sequence[Tensor], present: Sequence[bool]) -> tuple[Flags | None, dict[str, Tensor]]:
    """Which factors have a direction, and the directions as kernels name them."""
    if not present:
        return None, {}
    radial, angular, *features = spread_out(moved, present)
    named = {"h_radial": radial, "h_angular": angular}
    return tuple(present), {name: one for name, one in named.items() if one is not None} | _named("h_x", features)


def _gather(
    paths: list[int],
    starts: Tensor,
    edges: Tensor,
    radial: Tensor,
    angular: Tensor,
    features: list[Tensor],
    moved: list[Tensor],
    present: list[bool],
) -> list[Tensor]:
    product = tensor_product(tuple(paths))
    n_atoms = len(starts) - 1
    outputs = [radial.new_empty(n_atoms, dim, width) for dim, width in product.groups]
    flags, directions = _directions(moved, present)
    tensors = {"starts": starts, "edges": edges, "radial": radial, "angular": angular} | directions
    tensors |= _named("x", features) | _named("out", outputs)
    for members in product.together if n_atoms else ():
        _launch("gather", product.shape(members, flags), n_atoms, tensors)
    return outputs


def _pull(
    paths: list[int],
    ends: list[Tensor],
    leaving: list[Tensor],
    outer: list[Tensor],
    radial: Tensor,
    angular: Tensor,
    features: list[Tensor],
    moved: list[Tensor],
    present: list[bool],
    wanted: list[bool],
) -> list[Tensor]:
    product = tensor_product(tuple(paths))
    flags, directions = _directions(moved, present)
    tensors = dict(zip(("directions", "senders", "receivers"), ends, strict=True))
    tensors |= {"radial": radial, "angular": angular} | directions | _named("x", features) | _named("g", outer)
    n_pairs = len(radial)
    results: list[Tensor] = []
    if wanted[0]:
        results.append(torch.empty_like(radial))
        for members in product.together if n_pairs else ():
            _launch("to_radial", product.shape(members, flags), n_pairs, tensors | {"result": results[-1]})
    if wanted[1]:
        results.append(torch.empty_like(angular))
        for member in product.members if n_pairs else ():
            _launch_to_angular(product.shape((member,), flags), n_pairs, tensors | {"result": results[-1]})
    for source, (x, want) in enumerate(zip(features, wanted[2:], strict=True)):
        if want:
            members = product.from_source(source)
            results.append(torch.empty_like(x) if members else torch.zeros_like(x))
            if members and len(x):
                own = tensors | {"starts": leaving[0], "edges": leaving[1], "to_x": results[-1]}
                _launch("collect", product.shape(members, flags), len(x), own)
    return results


def _launch_to_angular(shape: Shape, n_pairs: int, tensors: Mapping[str, Tensor]) -> None:
    kernel = _kernel("to_angular", shape)
    block = 16 // tensors["result"].element_size()
    named = {one: tensors[one] for one in kernel.arg_names if one in tensors}
    kernel[(-(-n_pairs // PAIRS),)](n_pairs=n_pairs, **named, PAIRS=PAIRS, BLOCK=block, num_warps=2)


def _gather_meta(paths: list[int], starts: Tensor, edges: Tensor, radial: Tensor, *others: Any) -> list[Tensor]:
    return [radial.new_empty(len(starts) - 1, dim, width) for dim, width in get_structure(tuple(paths)).groups]


def _pull_meta(paths: list[int], ends: list[Tensor], leaving: list[Tensor], *others: Any) -> list[Tensor]:
    _, radial, angular, features, _, _, wanted = others
    return [torch.empty_like(x) for x, want in zip((radial, angular, *features), wanted, strict=True) if want]


_LIBRARY = torch.library.Library("forcetune", "FRAGMENT")
_LIBRARY.define(
    "triton_convolution_gather(int[] paths, Tensor starts, Tensor edges, Tensor radial, Tensor angular, "
    "Tensor[] features, Tensor[] moved, bool[] present) -> Tensor[]"
)
_LIBRARY.define(
    "triton_convolution_pull(int[] paths, Tensor[] ends, Tensor[] leaving, Tensor[] outer, Tensor radial, "
    "Tensor angular, Tensor[] features, Tensor[] moved, bool[] present, bool[] wanted) -> Tensor[]"
)
for _key in ("CPU", "CUDA"):  # on a CPU for Triton's interpreter
    _LIBRARY.impl("triton_convolution_gather", _gather, _key)
    _LIBRARY.impl("triton_convolution_pull", _pull, _key)
_LIBRARY.impl("triton_convolution_gather", _gather_meta, "Meta")
_LIBRARY.impl("triton_convolution_pull", _pull_meta, "Meta")


def edges_by_sender(plan: Plan, n_senders: int) -> tuple[Tensor, Tensor]:
    """The edges of a plan sorted by sender; nothing is read from the device.

    Args:
        plan: of the batch.
        n_senders: atoms, and ghosts behind them.

    Returns:
        (n_senders + 1,) the first row of each sender, and (rows, 3) pair, receiver and direction.
    """
    pair, sender, direction = plan.edges.unbind(1)
    rows = torch.arange(len(pair), device=pair.device)
    receiver = torch.searchsorted(plan.starts, rows, right=True) - 1
    # rows behind the last receiver's mean nothing
    key = torch.where(rows < plan.starts[-1], sender, n_senders)
    order = torch.argsort(key, stable=True)
    table = torch.stack((pair, receiver, direction), dim=1).index_select(0, order)
    starts = torch.searchsorted(key.index_select(0, order), torch.arange(n_senders + 1, device=pair.device))
    return starts, table


@dataclass(frozen=True, slots=True)
class _TritonSetting(Setting):
    leaving: tuple[Tensor, ...]

    def gather(
        self, values: Sequence[Tensor], moved: Sequence[Tensor] = (), present: Sequence[bool] = ()
    ) -> list[Tensor]:
        plan, (radial, angular, *features) = self.plan, contiguous(values)
        return torch.ops.forcetune.triton_convolution_gather(
            self.paths, plan.starts, plan.edges, radial, angular, features, contiguous(moved), list(present)
        )

    def pull_wanted(
        self,
        outer: Sequence[Tensor],
        values: Sequence[Tensor],
        wanted: Sequence[bool],
        moved: Sequence[Tensor],
        present: Sequence[bool],
    ) -> list[Tensor]:
        plan, (radial, angular, *features) = self.plan, contiguous(values)
        return torch.ops.forcetune.triton_convolution_pull(
            *(self.paths, [plan.directions, plan.sender, plan.receiver], list(self.leaving), contiguous(outer)),
            *(radial, angular, features, contiguous(moved), list(present), list(wanted)),
        )


def convolve(
    paths: Paths,
    plan: Plan,
    radial: Tensor,
    angular: Tensor,
    features: Sequence[Tensor],
    *,
    phase: Phase | None = None,
    geometric: bool = True,
    trains: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, ...]:
    """As :func:`forcetune.kernels.compiled.convolution.convolve`, on a CUDA device."""
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in features)
    leaving = edges_by_sender(plan, len(features[0])) if differentiated else ()
    setting = _TritonSetting(flat_paths(paths), plan, phase or Phase(), geometric, trains, leaving)
    return run(setting, radial, angular, features)
