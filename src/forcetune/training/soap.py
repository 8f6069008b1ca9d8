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
LARGEST = 256
"""Sides of a matrix that are longer keep the axes that they have: a basis costs the cube of it."""


class Block(NamedTuple):
    """A stretch of a parameter that is a matrix of its own, such as one path of a weight."""

    start: int
    rows: int
    columns: int


def path_blocks(paths: Sequence[WeightPath]) -> tuple[Block, ...]:
    """One block for each path, (everything but channels, channels)."""
    return tuple(Block(path.start, path.size // path.shape[-1], path.shape[-1]) for path in paths)


def own_block(parameter: Tensor) -> tuple[Block, ...]:
    """A parameter with several axes as one matrix; nothing for one that is a list of numbers."""
    if parameter.ndim < 2 or parameter.numel() == 0:
        return ()
    return (Block(0, parameter.numel() // parameter.shape[-1], parameter.shape[-1]),)


class ScheduleFreeSoap(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's averages, without a schedule.

    For the gradient G of a block, (rows, columns), averages L of G Gᵀ and R of Gᵀ G have eigenvectors Q_L and Q_R;
    the second moments v are those of Q_Lᵀ G Q_R, and the step is along Q_L (Q_Lᵀ G Q_R / (√v̂ + ε)) Q_Rᵀ (Vyas et al.,
    SOAP, arXiv 2409.11321, algorithm 3). Bases are turned now and then, by one step of orthogonal iteration, QR of
    L Q_L. Elements outside of blocks, and sides longer than ``largest``, have the axes that they have, which is Adam.

    Instead of momentum and a schedule there are two sequences and their average (Defazio et al., arXiv 2405.15682):
    gradients are taken at y = (1 − β₁) z + β₁ x, z steps along them and x averages z; :meth:`eval` puts x into the
    parameters and :meth:`train` y.

    The state of all blocks of one shape is one tensor each, kept with the first parameter that has such a block.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        *,
        blocks: Mapping[Tensor, Sequence[Block]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warmup_steps: int = 0,
        largest: int = LARGEST,
    ) -> None:
        """
        Args:
            groups: of parameters, each with ``params``, and ``lr`` and ``weight_decay`` (decoupled) of its own.
            lr: learning rate of groups that name none.
            blocks: of a parameter; those that do not overlap.
            betas: β₁ of the interpolation, β₂ of the second moments.
            eps: ε.
            warmup_steps: over which the learning rate rises.
            largest: longest side that gets a basis.
        """
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.blocks = {parameter: tuple(parts) for parameter, parts in blocks.items()}
        self.betas, self.eps, self.warmup_steps, self.largest = betas, eps, warmup_steps, largest
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
        """One step with the gradients that the parameters have; nothing computes them anew.

        Raises:
            RuntimeError: the parameters hold the averages.
        """
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("call train() of the optimizer before a step.")
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        number = group["k"] = group["k"] + 1
        warmup = min(1.0, number / self.warmup_steps) if self.warmup_steps else 1.0
        rate = group["lr"] * warmup
        group["lr_max"] = max(rate, group["lr_max"])
        weight = group["lr_max"] ** 2
        group["weight_sum"] += weight
        share = weight / group["weight_sum"] if group["weight_sum"] else 0.0
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        directions = self._directions(parameters, number)
        for parameter, direction in zip(parameters, directions, strict=True):
            state = self.state[parameter]
            if "z" not in state:
                state["z"] = parameter.clone()
            if group["weight_decay"]:
                direction.add_(parameter, alpha=group["weight_decay"])
            parameter.lerp_(state["z"], share)
            parameter.add_(direction, alpha=rate * (self.betas[0] * (1 - share) - 1))
            state["z"].sub_(direction, alpha=rate)

    def _directions(self, parameters: Sequence[Tensor], number: int) -> list[Tensor]:
        """What each parameter moves along, before the learning rate."""
        directions = [torch.empty_like(parameter) for parameter in parameters]
        by_shape: dict[tuple[int, int], list[tuple[int, Block]]] = {}
        for index, parameter in enumerate(parameters):
            parts = self.blocks.get(parameter, ())
            covered = sum(block.rows * block.columns for block in parts)
            if covered < parameter.numel():
                assert parameter.grad is not None
                directions[index] = self._scale(self.state[parameter], "square", parameter.grad, number)
            for block in parts:
                by_shape.setdefault((block.rows, block.columns), []).append((index, block))
        for (rows, columns), members in by_shape.items():
            gradients = torch.stack([_part(parameters[index].grad, block) for index, block in members])
            state = self.state[parameters[members[0][0]]]
            turned = self._turn_and_scale(state, f"{rows}x{columns}", gradients, number)
            for (index, block), direction in zip(members, turned, strict=True):
                _part(directions[index], block).copy_(direction)
        return directions

    def _turn_and_scale(self, state: dict[str, Any], name: str, gradients: Tensor, number: int) -> Tensor:
        """SOAP's direction for (blocks, rows, columns) gradients of one shape."""
        left = self._basis(state, f"{name}/left", gradients, number)
        right = self._basis(state, f"{name}/right", gradients.mT, number)
        turned = gradients if left is None else left.mT @ gradients
        turned = turned if right is None else turned @ right
        scaled = self._scale(state, f"{name}/square", turned, number)
        scaled = scaled if left is None else left @ scaled
        return scaled if right is None else scaled @ right.mT

    def _basis(self, state: dict[str, Any], name: str, gradients: Tensor, number: int) -> Tensor | None:
        """Eigenvectors of the average of G Gᵀ, (blocks, rows, rows); None where the axes stay."""
        size = gradients.shape[1]
        if not 1 < size <= self.largest:
            return None
        outer = gradients @ gradients.mT
        if f"{name}/mean" not in state:
            state[f"{name}/mean"] = torch.zeros_like(outer)
            state[f"{name}/basis"] = torch.eye(size).to(outer).expand_as(outer).contiguous()
        mean = state[f"{name}/mean"].lerp_(outer, 1 - BASIS_DECAY)
        if number in FIRST_REFRESHES or number % REFRESH == 0:
            state[f"{name}/basis"] = torch.linalg.qr(mean @ state[f"{name}/basis"])[0]
        return state[f"{name}/basis"]

    def _scale(self, state: dict[str, Any], name: str, gradients: Tensor, number: int) -> Tensor:
        """Divided by the root of their second moments."""
        decay = self.betas[1]
        if name not in state:
            state[name] = torch.zeros_like(gradients)
        square = state[name].mul_(decay).addcmul_(gradients, gradients, value=1 - decay)
        return gradients / (square / (1 - decay**number)).sqrt_().add_(self.eps)


def _part(tensor: Tensor | None, block: Block) -> Tensor:
    assert tensor is not None
    return tensor.reshape(-1)[block.start : block.start + block.rows * block.columns].view(block.rows, block.columns)
