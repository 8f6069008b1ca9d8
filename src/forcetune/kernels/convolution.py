"""Messages summed at their receivers without being written out, with first and second derivatives by hand.

For a path p from input irrep l₁ and spherical harmonic l₂ to l₃, with edges e = (j → i) and channel c,

    out_p[i, k, c] = Σ_{e → i} R_p[e, c] Σ_m T_p[e, m, k] x[j, m, c],    T_p[e, m, k] = Σ_q C_p[m, q, k] Y[e, q].

R, x and T enter linearly. Receivers are treated in chunks (:mod:`forcetune.kernels.edge_plan`): products R x of a chunk
stay in the cache, and the sums over edges are batched matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forcetune.kernels.edge_plan import Chunk, Plan
from forcetune.kernels.phase import Phase


@dataclass(frozen=True, slots=True)
class Path:
    """One path of the tensor product.

    Attributes:
        source: which input block.
        channels: multiplicity.
        dim_in, dim_out: 2 l₁ + 1, 2 l₃ + 1.
        odd: whether l₂ is odd, so that T changes sign with the direction of an edge.
        group: which output.
        column: first channel of the path in its output.
    """

    source: int
    channels: int
    dim_in: int
    dim_out: int
    odd: bool
    group: int
    column: int


@dataclass(frozen=True, slots=True)
class Paths:
    """All paths of a tensor product.

    Attributes:
        paths: in the order of their radial weights, which lie side by side.
        groups: (dim, channels) of each output; paths to one irrep lie side by side along the channels.
    """

    paths: tuple[Path, ...]
    groups: tuple[tuple[int, int], ...]

    @property
    def channels(self) -> list[int]:
        """Of each path."""
        return [path.channels for path in self.paths]

    def parts(self, chunk: Chunk, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Each path's part of its output, (receivers, dim_out, channels)."""
        parts: dict[int, Tensor] = {}
        for group, output in enumerate(outputs):
            own = sorted((path.column, index) for index, path in enumerate(self.paths) if path.group == group)
            members = [index for _, index in own]
            widths = [self.paths[index].channels for index in members]
            parts.update(zip(members, output[chunk.start : chunk.stop].split(widths, dim=2), strict=True))
        return [parts[index] for index in range(len(self.paths))]


@dataclass(frozen=True, slots=True)
class _Setting:
    paths: Paths
    plan: Plan
    phase: Phase
    geometric: bool
    trains: tuple[bool, bool]

    def wanted(self, needs: Sequence[bool]) -> list[bool]:
        """Which gradients by R, T and x are asked for."""
        n_angular = len(self.paths.paths)
        radial = self.phase.wants(geometric=True, trains=self.trains[0])
        angular = self.phase.wants(geometric=True, trains=False)
        features = self.phase.wants(geometric=self.geometric, trains=self.trains[1])
        waits = [radial, *[angular] * n_angular, *[features] * (len(needs) - 1 - n_angular)]
        return [need and wait for need, wait in zip(needs, waits, strict=True)]


def convolve(
    paths: Paths,
    plan: Plan,
    radial: Tensor,
    angular: Sequence[Tensor],
    features: Sequence[Tensor],
    *,
    phase: Phase | None = None,
    geometric: bool = True,
    trains: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, ...]:
    """Messages of all paths, summed at their receivers.

    Args:
        paths: of the tensor product.
        plan: of the batch.
        radial: (pairs, Σ channels) R.
        angular: for each path T, (pairs, dim_in · dim_out).
        features: for each input irrep x, (atoms, dim, channels), atoms in the plan's order.
        phase: which derivatives are wanted.
        geometric: whether the features depend on the geometry.
        trains: whether R and whether the features depend on trainable weights.

    Returns:
        For each output irrep (atoms, dim, channels). Differentiable twice.
    """
    setting = _Setting(paths, plan, phase or Phase(), geometric, trains)
    result: tuple[Tensor, ...] = _Convolution.apply(setting, radial, *angular, *features)  # pyright: ignore[reportAssignmentType]
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: _Setting, radial: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.setting = setting
        ctx.save_for_backward(radial, *tensors)
        return _forward(setting, _Inputs(setting, radial, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        setting: _Setting = ctx.setting
        radial, *tensors = ctx.saved_tensors
        needs = setting.wanted(ctx.needs_input_grad[1:])
        grads = tuple(grad.contiguous() for grad in grads)
        return (None, *_ConvolutionBackward.apply(setting, tuple(needs), len(grads), *grads, radial, *tensors))  # pyright: ignore[reportGeneralTypeIssues]


class _ConvolutionBackward(torch.autograd.Function):
    """Gradients of Σ g out with respect to R, T and x."""

    @staticmethod
    def forward(
        ctx: Any, setting: _Setting, needs: tuple[bool, ...], n_grads: int, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.setting, ctx.needs, ctx.n_grads = setting, needs, n_grads
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        grads, radial, rest = tensors[:n_grads], tensors[n_grads], tensors[n_grads + 1 :]
        return _backward(setting, needs, grads, _Inputs(setting, radial, rest))

    @staticmethod
    def _twice(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        setting: _Setting = ctx.setting
        tensors = ctx.saved_tensors
        grads, radial, rest = tensors[: ctx.n_grads], tensors[ctx.n_grads], tensors[ctx.n_grads + 1 :]
        needs = [True] * ctx.n_grads + setting.wanted(ctx.needs_input_grad[3 + ctx.n_grads :])
        moved = [
            torch.zeros_like(tensor) if tangent is None else tangent.contiguous()
            for tangent, tensor in zip(tangents, (radial, *rest), strict=True)
        ]
        missing = tuple(tangent is None for tangent in tangents)
        gradients = _double_backward(
            setting,
            tuple(needs),
            grads,
            _Inputs(setting, radial, rest),
            _Inputs(setting, moved[0], tuple(moved[1:])),
            missing,
        )
        return (None, None, None, *gradients)

    backward: Any = staticmethod(once_differentiable(_twice))


class _Inputs:
    """R, T and x with access by chunk."""

    def __init__(self, setting: _Setting, radial: Tensor, rest: Sequence[Tensor]) -> None:
        paths = setting.paths.paths
        self.radial = radial
        self.features = list(rest[len(paths) :])
        self.channels = setting.paths.channels
        # T of all paths from one input side by side, for edges along their pair, for those against it, and for none
        self.angular: list[tuple[list[int], list[int], Tensor]] = []
        for source in range(len(self.features)):
            members = [index for index, path in enumerate(paths) if path.source == source]
            shapes = [(len(radial), paths[index].dim_in, paths[index].dim_out) for index in members]
            along = [rest[index].view(shape) for index, shape in zip(members, shapes, strict=True)]
            if along:
                against = [-t if paths[index].odd else t for index, t in zip(members, along, strict=True)]
                table = torch.cat((torch.cat(along, dim=2), torch.cat(against, dim=2)))
                table = torch.cat((table, table.new_zeros(1, *table.shape[1:])))
                self.angular.append((members, [t.shape[2] for t in along], table))

    def at(self, chunk: Chunk) -> tuple[Sequence[Tensor], list[Tensor]]:
        """R of every path (slots, 1, channels), and x (slots, dim, channels) of every input."""
        radial = self.radial.index_select(0, chunk.pairs).unsqueeze(1).split(self.channels, dim=2)
        return radial, [x.index_select(0, chunk.senders) for x in self.features]

    def angles(self, chunk: Chunk) -> list[Tensor]:
        """T of every path, (receivers, width · dim_in, dim_out), 0 where there is no edge."""
        angles: dict[int, Tensor] = {}
        for members, widths, table in self.angular:
            shape = (chunk.receivers, chunk.width * table.shape[1], table.shape[2])
            own = table.index_select(0, chunk.oriented).view(shape)
            angles.update(zip(members, own.split(widths, dim=2), strict=True))
        return [angles[index] for index in range(len(angles))]


def _products(path: Path, chunk: Chunk, radial: Tensor, features: Tensor) -> Tensor:
    """R x, (receivers, width · dim_in, channels)."""
    shape = (chunk.receivers, chunk.width * path.dim_in, path.channels)
    return (radial * features).view(shape)


def _forward(setting: _Setting, inputs: _Inputs) -> tuple[Tensor, ...]:
    atoms = setting.plan.n_atoms
    outputs = tuple(inputs.radial.new_empty(atoms, dim, channels) for dim, channels in setting.paths.groups)
    for chunk in setting.plan.chunks:
        radial, features = inputs.at(chunk)
        angles, parts = inputs.angles(chunk), setting.paths.parts(chunk, outputs)
        for index, path in enumerate(setting.paths.paths):
            products = _products(path, chunk, radial[index], features[path.source])
            parts[index].copy_(torch.bmm(angles[index].transpose(1, 2), products))
    return outputs


class _Gradients:
    """Gradients by R, T and x, summed chunk by chunk."""

    def __init__(self, setting: _Setting, needs: Sequence[bool], inputs: _Inputs) -> None:
        self.setting = setting
        plan, like = setting.plan, inputs.radial
        n_angular = len(setting.paths.paths)
        self.radial = torch.zeros_like(like) if needs[0] else None
        self.angular = [
            like.new_zeros(2 * plan.n_pairs + 1, path.dim_in * path.dim_out) if need else None
            for path, need in zip(setting.paths.paths, needs[1 : 1 + n_angular], strict=True)
        ]
        self.features = [
            torch.zeros_like(x) if need else None
            for x, need in zip(inputs.features, needs[1 + n_angular :], strict=True)
        ]

    def at(self, chunk: Chunk) -> _ChunkGradients:
        return _ChunkGradients(self, chunk)

    def collected(self) -> tuple[Tensor | None, ...]:
        """By R and T of each pair, and by x of each atom."""
        pairs = self.setting.plan.n_pairs
        angular = [
            None if both is None else both[:pairs].add(both[pairs : 2 * pairs], alpha=-1 if path.odd else 1)
            for path, both in zip(self.setting.paths.paths, self.angular, strict=True)
        ]
        return (self.radial, *angular, *self.features)


class _ChunkGradients:
    """The part of one chunk."""

    def __init__(self, whole: _Gradients, chunk: Chunk) -> None:
        self.whole = whole
        self.chunk = chunk
        slots = chunk.receivers * chunk.width
        self.radial = None if whole.radial is None else whole.radial.new_empty(slots, whole.radial.shape[1])
        self.radial_parts = () if self.radial is None else self.radial.split(whole.setting.paths.channels, dim=1)
        self.features: list[Tensor | None] = [None] * len(whole.features)

    def add_radial(self, index: int, *factors: tuple[Tensor, Tensor]) -> None:
        """Add products (slots, dim, channels) summed over the components; one path at a time."""
        if self.radial is None:
            return
        target = self.radial_parts[index]
        if not factors:
            target.zero_()
            return
        pairs = [pair for left, right in factors for pair in zip(left.unbind(1), right.unbind(1), strict=True)]
        torch.mul(*pairs[0], out=target)
        for left, right in pairs[1:]:
            target.addcmul_(left, right)

    def add_features(self, path: Path, *factors: tuple[Tensor, Tensor]) -> None:
        """Add products (slots, dim, channels)."""
        if self.whole.features[path.source] is None:
            return
        target = self.features[path.source]
        if target is None:
            self.features[path.source] = target = factors[0][0] * factors[0][1]
            factors = factors[1:]
        for left, right in factors:
            target.addcmul_(left, right)

    def add_angular(self, index: int, left: Tensor, right: Tensor) -> None:
        """Add products of (receivers, width · dim_in, channels) and (receivers, dim_out, channels)."""
        target = self.whole.angular[index]
        if target is not None:
            part = torch.bmm(left, right.transpose(1, 2))
            target.index_add_(0, self.chunk.oriented, part.view(-1 if part.numel() else 0, target.shape[1]))

    def finish(self) -> None:
        if self.radial is not None and self.whole.radial is not None:
            self.whole.radial.index_add_(0, self.chunk.pairs, self.radial)
        for target, part in zip(self.whole.features, self.features, strict=True):
            if target is not None and part is not None:
                target.index_add_(0, self.chunk.senders, part)


def _backward(
    setting: _Setting, needs: tuple[bool, ...], grads: Sequence[Tensor], inputs: _Inputs
) -> tuple[Tensor | None, ...]:
    gradients = _Gradients(setting, needs, inputs)
    for chunk in setting.plan.chunks:
        radial, features = inputs.at(chunk)
        own = gradients.at(chunk)
        angles, pulls = inputs.angles(chunk), setting.paths.parts(chunk, grads)
        for index, path in enumerate(setting.paths.paths):
            x, g = features[path.source], pulls[index]
            if needs[0] or own.whole.features[path.source] is not None:
                pulled = torch.bmm(angles[index], g).view(x.shape)
                own.add_radial(index, (pulled, x))
                own.add_features(path, (pulled, radial[index]))
            if gradients.angular[index] is not None:
                own.add_angular(index, _products(path, chunk, radial[index], x), g)
        own.finish()
    return gradients.collected()


def _double_backward(
    setting: _Setting,
    needs: tuple[bool, ...],
    grads: Sequence[Tensor],
    inputs: _Inputs,
    moved: _Inputs,
    missing: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of Σ (h_R ∂_R + h_T ∂_T + h_x ∂_x) Σ g out with respect to g, R, T and x, for directions h."""
    n_grads = len(grads)
    n_angular = len(setting.paths.paths)
    outputs = tuple(torch.empty_like(g) for g in grads)
    gradients = _Gradients(setting, needs[n_grads:], inputs)
    for chunk in setting.plan.chunks:
        radial, features = inputs.at(chunk)
        moved_radial, moved_features = moved.at(chunk)
        own = gradients.at(chunk)
        angles, turned = inputs.angles(chunk), moved.angles(chunk)
        parts, pulls = setting.paths.parts(chunk, outputs), setting.paths.parts(chunk, grads)
        for index, path in enumerate(setting.paths.paths):
            x, hx, g = features[path.source], moved_features[path.source], pulls[index]
            r, hr = radial[index], moved_radial[index]
            still = missing[1 + n_angular + path.source]
            change = hr * x if still else (hr * x).addcmul_(r, hx)
            change = change.view(chunk.receivers, chunk.width * path.dim_in, path.channels)
            result = torch.bmm(angles[index].transpose(1, 2), change)
            pulled = torch.bmm(angles[index], g).view(x.shape)
            factors = [] if still else [(pulled, hx)]
            factors_of_x = [(pulled, hr)]
            if not missing[1 + index]:
                result.baddbmm_(turned[index].transpose(1, 2), (r * x).view(change.shape))
                moved_pulled = torch.bmm(turned[index], g).view(pulled.shape)
                factors.append((moved_pulled, x))
                factors_of_x.append((moved_pulled, r))
            parts[index].copy_(result)
            own.add_radial(index, *factors)
            own.add_features(path, *factors_of_x)
            if gradients.angular[index] is not None:
                own.add_angular(index, change, g)
        own.finish()
    return (*outputs, *gradients.collected())
