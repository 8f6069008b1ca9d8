"""Messages summed at their receivers without being written out, with first and second derivatives by hand.

For a path p from input irrep l₁ and spherical harmonic l₂ to l₃, with edges e = (j → i) and channel c,

    out_p[i, k, c] = Σ_{e → i} R_p[e, c] Σ_m T_p[e, m, k] x[j, m, c],    T_p[e, m, k] = Σ_q C_p[m, q, k] Y[e, q].

R, x and T enter linearly. Receivers are treated in chunks (:mod:`forcetune.kernels.plan`): products R x of a chunk
stay in the cache, and the sums over edges are batched matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from forcetune.kernels.phase import Phase
from forcetune.kernels.plan import Chunk, Plan


@dataclass(frozen=True, slots=True)
class Path:
    """One path of the tensor product.

    Attributes:
        source: which input block.
        channels: multiplicity.
        dim_in, dim_out: 2 l₁ + 1, 2 l₃ + 1.
        odd: whether l₂ is odd, so that T changes sign with the direction of an edge.
        radial: first column of its radial weights.
        group: which output.
        column: first channel of the path in its output.
    """

    source: int
    channels: int
    dim_in: int
    dim_out: int
    odd: bool
    radial: int
    group: int
    column: int


@dataclass(frozen=True, slots=True)
class Paths:
    """All paths of a tensor product.

    Attributes:
        paths: in the order of their radial weights.
        groups: (dim, channels) of each output; paths to one irrep lie side by side along the channels.
    """

    paths: tuple[Path, ...]
    groups: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Setting:
    paths: Paths
    plan: Plan
    phase: Phase
    static: bool


def convolve(
    paths: Paths,
    plan: Plan,
    radial: Tensor,
    angular: Sequence[Tensor],
    features: Sequence[Tensor],
    *,
    phase: Phase | None = None,
    static: bool = False,
) -> tuple[Tensor, ...]:
    """Messages of all paths, summed at their receivers.

    Args:
        paths: of the tensor product.
        plan: of the batch.
        radial: (pairs, Σ channels) R.
        angular: for each path T, (pairs, dim_in · dim_out).
        features: for each input irrep x, (atoms, dim, channels), atoms in the plan's order.
        phase: which derivatives are wanted.
        static: the features do not depend on the geometry.

    Returns:
        For each output irrep (atoms, dim, channels). Differentiable twice.
    """
    setting = _Setting(paths, plan, phase or Phase(), static)
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
        n_angular = len(setting.paths.paths)
        needs = list(ctx.needs_input_grad[1:])
        if not setting.phase.geometry:
            needs[1 : 1 + n_angular] = [False] * n_angular
        if not setting.phase.weights and setting.static:
            needs[1 + n_angular :] = [False] * (len(needs) - 1 - n_angular)
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
    @once_differentiable
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        setting: _Setting = ctx.setting
        tensors = ctx.saved_tensors
        grads, radial, rest = tensors[: ctx.n_grads], tensors[ctx.n_grads], tensors[ctx.n_grads + 1 :]
        needs = list(ctx.needs_input_grad[3:])
        n_angular = len(setting.paths.paths)
        first = ctx.n_grads + 1
        if not setting.phase.geometry:
            needs[first : first + n_angular] = [False] * n_angular
        moved = [
            torch.zeros_like(tensor) if tangent is None else tangent.contiguous()
            for tangent, tensor in zip(tangents, (radial, *rest), strict=True)
        ]
        missing = tuple(tangent is None for tangent in tangents)
        found = _double_backward(
            setting,
            tuple(needs),
            grads,
            _Inputs(setting, radial, rest),
            _Inputs(setting, moved[0], tuple(moved[1:])),
            missing,
        )
        return (None, None, None, *found)


class _Inputs:
    """R, T and x with access by chunk."""

    def __init__(self, setting: _Setting, radial: Tensor, rest: Sequence[Tensor]) -> None:
        n_angular = len(setting.paths.paths)
        self.radial = radial
        self.angular = [
            torch.cat((t, -t if path.odd else t, t.new_zeros(1, t.shape[1])))
            for path, t in zip(setting.paths.paths, rest[:n_angular], strict=True)
        ]
        self.features = list(rest[n_angular:])

    def at(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        """R (slots, Σ channels), and x (slots, dim, channels) of every input."""
        return self.radial[chunk.pairs], [x[chunk.senders] for x in self.features]

    def angles(self, index: int, path: Path, chunk: Chunk) -> Tensor:
        """T of a path, (receivers, width · dim_in, dim_out), 0 where there is no edge."""
        return self.angular[index][chunk.oriented].view(chunk.receivers, chunk.width * path.dim_in, path.dim_out)


def _block(path: Path, radial: Tensor) -> Tensor:
    """R of a path, (slots, 1, channels)."""
    return radial[:, path.radial : path.radial + path.channels].unsqueeze(1)


def _products(path: Path, chunk: Chunk, radial: Tensor, features: Tensor) -> Tensor:
    """R x, (receivers, width · dim_in, channels)."""
    return (_block(path, radial) * features).view(chunk.receivers, -1, path.channels)


def _part(path: Path, chunk: Chunk, outputs: Sequence[Tensor]) -> Tensor:
    """A path's part of an output, (receivers, dim_out, channels)."""
    return outputs[path.group][chunk.start : chunk.stop, :, path.column : path.column + path.channels]


def _forward(setting: _Setting, inputs: _Inputs) -> tuple[Tensor, ...]:
    atoms = setting.plan.n_atoms
    outputs = tuple(inputs.radial.new_empty(atoms, dim, channels) for dim, channels in setting.paths.groups)
    for chunk in setting.plan.chunks:
        radial, features = inputs.at(chunk)
        for index, path in enumerate(setting.paths.paths):
            products = _products(path, chunk, radial, features[path.source])
            angles = inputs.angles(index, path, chunk)
            _part(path, chunk, outputs).copy_(torch.bmm(angles.transpose(1, 2), products))
    return outputs


class _Gradients:
    """Gradients by R, T and x, collected slot by slot."""

    def __init__(self, setting: _Setting, needs: Sequence[bool], inputs: _Inputs) -> None:
        self.setting = setting
        slots = setting.plan.n_slots + 1
        n_angular = len(setting.paths.paths)
        like = inputs.radial
        self.radial = like.new_empty(slots, like.shape[1]) if needs[0] else None
        self.angular = [
            like.new_empty(slots, path.dim_in * path.dim_out) if need else None
            for path, need in zip(setting.paths.paths, needs[1 : 1 + n_angular], strict=True)
        ]
        self.features = [
            like.new_empty(slots, *x.shape[1:]) if need else None
            for x, need in zip(inputs.features, needs[1 + n_angular :], strict=True)
        ]
        for buffer in (self.radial, *self.angular, *self.features):
            if buffer is not None:
                buffer[-1] = 0

    def collected(self) -> tuple[Tensor | None, ...]:
        """By R and T of each pair, and by x of each atom."""
        plan = self.setting.plan
        radial = None
        if self.radial is not None:
            radial = self.radial[plan.slot] + self.radial[plan.reverse_slot]
        angular: list[Tensor | None] = []
        for path, buffer in zip(self.setting.paths.paths, self.angular, strict=True):
            if buffer is None:
                angular.append(None)
            else:
                angular.append(buffer[plan.slot].add_(buffer[plan.reverse_slot], alpha=-1 if path.odd else 1))
        features: list[Tensor | None] = []
        for buffer in self.features:
            if buffer is None:
                features.append(None)
                continue
            found = buffer.new_empty(plan.n_atoms, *buffer.shape[1:])
            for chunk, outgoing in zip(plan.chunks, plan.outgoing, strict=True):
                torch.sum(buffer[outgoing], 1, out=found[chunk.start : chunk.stop])
            features.append(found)
        return (radial, *angular, *features)


def _backward(
    setting: _Setting, needs: tuple[bool, ...], grads: Sequence[Tensor], inputs: _Inputs
) -> tuple[Tensor | None, ...]:
    gradients = _Gradients(setting, needs, inputs)
    for chunk in setting.plan.chunks:
        radial, features = inputs.at(chunk)
        seen: set[int] = set()
        for index, path in enumerate(setting.paths.paths):
            x, g = features[path.source], _part(path, chunk, grads)
            pulled = torch.bmm(inputs.angles(index, path, chunk), g).view(-1, path.dim_in, path.channels)
            _collect_radial(gradients, path, chunk, (pulled, x))
            _collect_features(gradients, path, chunk, seen, (pulled, _block(path, radial)))
            target = gradients.angular[index]
            if target is not None:
                products = _products(path, chunk, radial, x)
                target[chunk.slots] = torch.bmm(products, g.transpose(1, 2)).view(-1, target.shape[1])
    return gradients.collected()


def _collect_radial(gradients: _Gradients, path: Path, chunk: Chunk, *factors: tuple[Tensor, Tensor]) -> None:
    if gradients.radial is None:
        return
    target = gradients.radial[chunk.slots, path.radial : path.radial + path.channels]
    product = factors[0][0] * factors[0][1]
    for left, right in factors[1:]:
        product.addcmul_(left, right)
    if path.dim_in == 1:
        target.copy_(product[:, 0])
    else:
        target.copy_(product.sum(1))


def _collect_features(
    gradients: _Gradients, path: Path, chunk: Chunk, seen: set[int], *factors: tuple[Tensor, Tensor]
) -> None:
    buffer = gradients.features[path.source]
    if buffer is None:
        return
    target = buffer[chunk.slots]
    if path.source not in seen:
        seen.add(path.source)
        torch.mul(*factors[0], out=target)
        factors = factors[1:]
    for left, right in factors:
        target.addcmul_(left, right)


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
        seen: set[int] = set()
        for index, path in enumerate(setting.paths.paths):
            x, hx, g = features[path.source], moved_features[path.source], _part(path, chunk, grads)
            r, hr = _block(path, radial), _block(path, moved_radial)
            angles = inputs.angles(index, path, chunk)
            still = missing[1 + n_angular + path.source]
            change = hr * x if still else (hr * x).addcmul_(r, hx)
            change = change.view(chunk.receivers, -1, path.channels)
            result = torch.bmm(angles.transpose(1, 2), change)
            pulled = torch.bmm(angles, g).view(-1, path.dim_in, path.channels)
            factors = [] if still else [(pulled, hx)]
            factors_of_x = [(pulled, hr)]
            if not missing[1 + index]:
                turned = moved.angles(index, path, chunk)
                result += torch.bmm(turned.transpose(1, 2), (r * x).view(change.shape))
                moved_pulled = torch.bmm(turned, g).view(pulled.shape)
                factors.append((moved_pulled, x))
                factors_of_x.append((moved_pulled, r))
            _part(path, chunk, outputs).copy_(result)
            _collect_radial(gradients, path, chunk, *(factors or [(torch.zeros_like(pulled), x)]))
            _collect_features(gradients, path, chunk, seen, *factors_of_x)
            target = gradients.angular[index]
            if target is not None:
                target[chunk.slots] = torch.bmm(change, g.transpose(1, 2)).view(-1, target.shape[1])
    return (*outputs, *gradients.collected())
