"""SOAP with schedule-free averaging, path by path: second moments in the directions that gradients really have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from forcetune.backbones.protocol import WeightPath

BASIS_DECAY = 0.95
"""Of the averages that bases come from, as published."""
REFRESH = 10
"""Steps between two turns of the bases, as published."""
FIRST_REFRESHES = (1, 2, 4, 7)
"""Steps at the start, in which the averages are still changing much, that turn them as well."""
WARMUP = 20
"""Fewest steps over which the learning rate rises, until there are bases that mean something."""
MAX_BASIS_SIZE = 256
"""Sides of a matrix that are longer keep the axes that they have: a basis costs the cube of it."""
SHIFT = 1e-2
"""Of an average when a basis is turned, in units of its mean eigenvalue: directions that gradients do not have, of a
tall matrix most, keep what they were instead of what rounding makes of them."""
FLOOR = 1000
"""Of the root of second moments, in units of its largest in the block and of the precision: what turning rounds off is
no gradient, and does not become a step."""


class Block(NamedTuple):
    """A stretch of a parameter that is a matrix of its own, such as one path of a weight."""

    start: int
    rows: int
    columns: int


def path_blocks(paths: Sequence[WeightPath]) -> tuple[Block, ...]:
    """One block for each path, (everything but the last axis, last axis)."""
    return tuple(Block(path.start, path.size // path.shape[-1], path.shape[-1]) for path in paths if path.size)


def whole_block(parameter: Tensor) -> tuple[Block, ...]:
    """A parameter with several axes as one matrix; nothing for one that is a list of numbers."""
    if parameter.ndim < 2 or parameter.numel() == 0:
        return ()
    return (Block(0, parameter.numel() // parameter.shape[-1], parameter.shape[-1]),)


class ScheduleFreeSoap(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's averages, without a schedule.

    For the gradient G of a block, (rows, columns), averages L of G Gᵀ and R of Gᵀ G have eigenvectors Q_L and Q_R;
    the second moments v are those of Q_Lᵀ G Q_R, and the step is along Q_L (Q_Lᵀ G Q_R / (√v̂ + ε)) Q_Rᵀ (Vyas et al.,
    SOAP, arXiv 2409.11321, algorithm 3). Bases are turned now and then, by one step of orthogonal iteration, QR of
    (L + s) Q_L with the small shift s of :data:`SHIFT`, and ε has a part that grows with v (:data:`FLOOR`). Elements
    outside of blocks, blocks of one row or column, and sides longer than ``max_basis_size`` have the axes that they
    have, which is Adam.

    Instead of momentum and a schedule there are two sequences and their average (Defazio et al., arXiv 2405.15682):
    gradients are taken at y = (1 − β₁) z + β₁ x, z steps along them and x averages z; :meth:`eval` puts x into the
    parameters and :meth:`train` y.

    The state of all blocks of one shape in a group is one tensor each, kept with the first parameter that has such a
    block. For n × m weights it takes 2 n m numbers, as AdamW's, and 2 n² + 2 m² for the bases.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        *,
        blocks: Mapping[Tensor, Sequence[Block]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warmup_steps: int = WARMUP,
        max_basis_size: int = MAX_BASIS_SIZE,
    ) -> None:
        """
        Args:
            groups: of parameters, each with ``params``, and ``lr`` and ``weight_decay`` (decoupled) of its own.
            lr: learning rate of groups that name none.
            blocks: of a parameter; those that do not overlap.
            betas: β₁ of the interpolation, β₂ of the second moments.
            eps: ε.
            warmup_steps: over which the learning rate rises.
            max_basis_size: longest side that gets a basis.
        """
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.blocks = {parameter: tuple(parts) for parameter, parts in blocks.items()}
        self.betas, self.eps, self.warmup_steps, self.max_basis_size = betas, eps, warmup_steps, max_basis_size
        for group in self.param_groups:
            for name, value in (("k", 0), ("weight_sum", 0.0), ("lr_max", 0.0), ("train_mode", False)):
                group.setdefault(name, value)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averages into the parameters."""
        self._interpolate(False, 1 - 1 / self.betas[0])

    @torch.no_grad()
    def train(self) -> None:
        """Put the points into the parameters that gradients are taken at."""
        self._interpolate(True, 1 - self.betas[0])

    def _interpolate(self, train_mode: bool, weight: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["z"], weight)
                group["train_mode"] = train_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step with the gradients that the parameters have; nothing computes them again.

        Raises:
            RuntimeError: the parameters hold the averages.
        """
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call train() of the optimizer before a step.")
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        step = group["k"] = group["k"] + 1
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        rate = group["lr"] * warmup
        group["lr_max"] = max(rate, group["lr_max"])
        weight = group["lr_max"] ** 2
        group["weight_sum"] += weight
        averaging_weight = weight / group["weight_sum"] if group["weight_sum"] else 0.0
        for parameter, direction in self._directions(group["params"], step):
            state = self.state[parameter]
            if "z" not in state:
                state["z"] = parameter.clone()
            if group["weight_decay"]:
                direction.add_(parameter, alpha=group["weight_decay"])
            parameter.lerp_(state["z"], averaging_weight)
            parameter.add_(direction, alpha=rate * (self.betas[0] * (1 - averaging_weight) - 1))
            state["z"].sub_(direction, alpha=rate)

    def _directions(self, parameters: Sequence[Tensor], step: int) -> list[tuple[Tensor, Tensor]]:
        """What each parameter that has a gradient moves along, before the learning rate."""
        directions: dict[int, Tensor] = {}
        by_shape: dict[tuple[int, int], list[tuple[int, Block]]] = {}
        for index, parameter in enumerate(parameters):
            blocks = [block for block in self.blocks.get(parameter, ()) if min(block.rows, block.columns) > 1]
            for block in blocks:
                by_shape.setdefault((block.rows, block.columns), []).append((index, block))
            if parameter.grad is not None:
                if sum(block.rows * block.columns for block in blocks) < parameter.numel():
                    gradient = parameter.grad.reshape(1, -1)
                    directions[index] = self._scale(self.state[parameter], "square", gradient, [0])[0]
                else:
                    directions[index] = torch.empty(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        for (rows, columns), members in by_shape.items():
            # those without a gradient have a place in the state, too, and stay as they are
            places = [place for place, (index, _) in enumerate(members) if index in directions]
            if not places:
                continue
            gradients = torch.stack([_part(parameters[members[place][0]].grad, members[place][1]) for place in places])
            state = self.state[parameters[members[0][0]]]
            turned = self._turn_and_scale(state, f"{rows}x{columns}", gradients, (places, len(members)), step)
            for place, direction in zip(places, turned, strict=True):
                index, block = members[place]
                _part(directions[index], block).copy_(direction)
        return [(parameters[index], direction.view(parameters[index].shape)) for index, direction in directions.items()]

    def _turn_and_scale(
        self, state: dict[str, Any], name: str, gradients: Tensor, places: tuple[list[int], int], step: int
    ) -> Tensor:
        """SOAP's direction for (blocks, rows, columns) gradients of one shape, of which there may be more."""
        left = self._basis(state, f"{name}/left", gradients, places, step)
        right = self._basis(state, f"{name}/right", gradients.mT, places, step)
        turned = gradients if left is None else left.mT @ gradients
        turned = turned if right is None else turned @ right
        scaled = self._scale(state, f"{name}/square", turned, *places)
        scaled = scaled if left is None else left @ scaled
        return scaled if right is None else scaled @ right.mT

    def _basis(
        self, state: dict[str, Any], name: str, gradients: Tensor, places: tuple[list[int], int], step: int
    ) -> Tensor | None:
        """Eigenvectors of the average of G Gᵀ, (blocks, rows, rows); None where the axes stay."""
        size = gradients.shape[1]
        if size > self.max_basis_size:
            return None
        chosen, total = places
        outer = gradients @ gradients.mT
        if f"{name}/mean" not in state:
            state[f"{name}/mean"] = outer.new_zeros(total, size, size)
            state[f"{name}/basis"] = torch.eye(size).to(outer).expand(total, size, size).contiguous()
        mean, basis = state[f"{name}/mean"], state[f"{name}/basis"]
        if len(chosen) == total:
            mean.lerp_(outer, 1 - BASIS_DECAY)
        else:
            mean[chosen] = mean[chosen].lerp(outer, 1 - BASIS_DECAY)
        if step in FIRST_REFRESHES or step % REFRESH == 0:
            shift = SHIFT * mean.diagonal(dim1=1, dim2=2).mean(dim=1)
            basis = state[f"{name}/basis"] = torch.linalg.qr(mean @ basis + shift[:, None, None] * basis)[0]
        return basis if len(chosen) == total else basis[chosen]

    def _scale(self, state: dict[str, Any], name: str, gradients: Tensor, chosen: list[int], total: int = 1) -> Tensor:
        """(blocks, …) gradients divided by the root of their second moments, each corrected by its own count."""
        decay = self.betas[1]
        if name not in state:
            state[name] = gradients.new_zeros(total, *gradients.shape[1:])
            state[f"{name}/count"] = [0] * total
        counts = state[f"{name}/count"]
        for place in chosen:
            counts[place] += 1
        if len(chosen) == total:
            square = state[name].mul_(decay).addcmul_(gradients, gradients, value=1 - decay)
        else:
            square = state[name][chosen].mul_(decay).addcmul_(gradients, gradients, value=1 - decay)
            state[name][chosen] = square
        corrections = [1 - decay ** counts[place] for place in chosen]
        if len(set(corrections)) == 1:
            root = (square / corrections[0]).sqrt_()
        else:
            shape = (-1, *[1] * (gradients.ndim - 1))
            root = (square / torch.tensor(corrections).to(square).view(shape)).sqrt_()
        if gradients.ndim == 3:  # turned, which rounds
            root = root + FLOOR * torch.finfo(root.dtype).eps * root.amax(dim=(1, 2), keepdim=True)
        return gradients / root.add_(self.eps)


def _part(tensor: Tensor | None, block: Block) -> Tensor:
    assert tensor is not None
    return tensor.reshape(-1)[block.start : block.start + block.rows * block.columns].view(block.rows, block.columns)
