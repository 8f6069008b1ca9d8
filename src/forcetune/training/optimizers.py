"""Optimizers, the learning rate over a run, and averages of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import schedulefree
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from forcetune.adapters.attach import Adapter
from forcetune.adapters.updates.base import ParameterOptions
from forcetune.config import SCHEDULE_FREE, ScheduleConfig, TrainingConfig
from forcetune.training.replay_head import LEARNING_RATE, ReplayHead
from forcetune.training.soap import WARMUP, Block, ScheduleFreeSoap, path_blocks, whole_block

DECAYED_KINDS = frozenset({"linear", "contraction", "contraction_lower"})


def make_optimizer(
    adapter: Adapter,
    config: TrainingConfig,
    learning_rate: float,
    steps_per_epoch: int,
    head: ReplayHead | None = None,
    *,
    first_rate: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over the adapter's parameters, and those of a head for replay frames.

    The run's weight decay acts on linear and contraction sites only, and on what asks for it. Parameters that say how
    they are trained have a group of their own; ``rate`` is the factor of its learning rate. A resumed run, too, says
    the ``first_rate`` that it began with, so that its groups are the same.
    """
    begun = learning_rate if first_rate is None else first_rate
    parameter_groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for kind, parameter, options in adapter.parameter_kinds():
        if options is None:
            key = (config.weight_decay if kind in DECAYED_KINDS else 0.0, 1.0, False)
        else:
            rate = _rate(options, begun)
            decay = config.weight_decay if options.decay is None else options.decay
            if options.shrink is not None:
                decay = decay_that_shrinks(options.shrink, rate * begun, rate, steps_per_epoch, config)
            key = (decay, rate, True)
        parameter_groups.setdefault(key, []).append(parameter)
    if head is not None:
        parameter_groups.setdefault((0.0, LEARNING_RATE / begun, True), []).extend(head.parameters())
    groups: list[dict[str, Any]] = [
        {"params": members, "weight_decay": decay, "lr": rate * learning_rate, "rate": rate}
        | ({"decoupled_weight_decay": True} if options and config.optimizer in (None, "adam") else {})
        for (decay, rate, options), members in parameter_groups.items()
    ]
    if config.optimizer == "schedulefree":
        warmup = config.schedule.warmup_epochs * steps_per_epoch
        return schedulefree.AdamWScheduleFree(groups, lr=learning_rate, warmup_steps=warmup)
    if config.optimizer == "soap":
        warmup = max(WARMUP, config.schedule.warmup_epochs * steps_per_epoch)
        return ScheduleFreeSoap(groups, learning_rate, blocks=_blocks(adapter, head), warmup_steps=warmup)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, foreach=True)
    return torch.optim.Adam(groups, lr=learning_rate, amsgrad=True, foreach=True)


def _blocks(adapter: Adapter, head: ReplayHead | None) -> dict[Tensor, Sequence[Block]]:
    """The matrices in every parameter: the paths of a weight, or the parameter as a whole; none where entries count."""
    parameters = [*adapter.parameters(), *(head.parameters() if head else ())]
    blocks: dict[Tensor, Sequence[Block]] = {parameter: whole_block(parameter) for parameter in parameters}
    return blocks | {parameter: path_blocks(paths) for parameter, paths in adapter.parameter_paths()}


def _rate(options: ParameterOptions, begun: float) -> float:
    return options.rate if options.learning_rate is None else options.learning_rate / begun


def decay_that_shrinks(factor: float, rate: float, share: float, steps_per_epoch: int, config: TrainingConfig) -> float:
    """The decoupled weight decay λ that alone brings a parameter to ``factor`` of its value at the end of the run.

    Each step multiplies by 1 − η λ, together exp(−λ Σ η). Schedule-free averages lag behind, which
    :func:`_shrunk_average` says.

    Args:
        factor: between 0 and 1.
        rate: learning rate of the parameter before any schedule.
        share: of the parameter in learning rates of the run, as that of a second stage is one.
        steps_per_epoch, config: how long the run is, and its schedule. A plateau is counted as if it never lowered
            the rate.
    """
    if factor >= 1:
        return 0.0
    exponent = -math.log(factor)
    if config.optimizer in SCHEDULE_FREE:
        low, high = 0.0, 3.6  # there the average is zero
        for _ in range(40):
            exponent = (low + high) / 2
            low, high = (exponent, high) if _shrunk_average(exponent) > factor else (low, exponent)
    schedule = LearningRate(config.schedule, rate, config.epochs)
    start, total = config.second_stage.start, 0.0
    for part in range(1000):
        done = (part + 0.5) * config.epochs / 1000
        if start is not None and done >= start - 1:
            schedule.base = share * config.second_stage.learning_rate
        total += schedule.at(done)
    return exponent / (total / 1000 * steps_per_epoch * config.epochs)


def _shrunk_average(exponent: float, steps: int = 500, momentum: float = 0.9) -> float:
    """What decay makes of a schedule-free average that begins at 1, with λ Σ η = ``exponent`` and without gradients.

    Schedule-free AdamW (arXiv 2405.15682) decays the sequence z by what it has at y = (1 − β) z + β x, and x is the
    average of z.
    """
    average = raw = 1.0
    for step in range(1, steps + 1):
        raw -= exponent / steps * ((1 - momentum) * raw + momentum * average)
        average += (raw - average) / step
    return average


@torch.no_grad()
def restart_average(optimizer: Any) -> None:
    """Let a schedule-free optimizer go on from its average and begin a new one, as for a stage with another rate.

    Otherwise what the first stage's rate scattered would weigh in the average for as long as that stage took.
    """
    optimizer.eval()
    for group in optimizer.param_groups:
        group["weight_sum"] = group["lr_max"] = 0.0
        for parameter in group["params"]:
            if "z" in optimizer.state[parameter]:
                optimizer.state[parameter]["z"].copy_(parameter)
    optimizer.train()


class LearningRate:
    """The learning rate of every step: warm-up × (plateau | cosine | constant).

    Attributes:
        base: learning rate of the stage before any factor.
    """

    def __init__(self, config: ScheduleConfig, base: float, epochs: int) -> None:
        self.config = config
        self.base = base
        self.epochs = epochs
        self.plateau = 1.0
        self.lowest = math.inf
        self.waited = 0

    def at(self, done: float) -> float:
        """The learning rate of the step after which ``done`` epochs are done; 0.5 is the middle of the first."""
        warmup = self.config.warmup_epochs
        if done < warmup:
            return self.base * done / warmup
        value = self.base * self.plateau
        if self.config.name == "cosine":
            progress = (done - warmup) / max(1, self.epochs - warmup)
            value = self.config.minimum + 0.5 * (self.base - self.config.minimum) * (1 + math.cos(math.pi * progress))
        return max(value, min(self.config.minimum, self.base))

    def observe(self, valid_loss: float) -> None:
        """Take in a validation loss; a plateau lowers the rate after ``patience`` of them without improvement.

        Improvement means at least one part in ten thousand, as in PyTorch's ReduceLROnPlateau.
        """
        if valid_loss < self.lowest * (1 - 1e-4):
            self.lowest, self.waited = valid_loss, 0
            return
        self.waited += 1
        if self.config.name == "plateau" and self.waited > self.config.patience:
            self.plateau *= self.config.factor
            self.waited = 0

    def restart(self, base: float) -> None:
        """Begin a stage with a new rate."""
        self.base, self.plateau, self.lowest, self.waited = base, 1.0, math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("base", "plateau", "lowest", "waited")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in self.state_dict():
            setattr(self, key, state[key])


class MovingAverage:
    """Exponential moving average of trainable parameters: a ← d a + (1 − d) p, d = min(decay, (1 + n) / (10 + n)).

    The growing decay keeps the random start of a short run out of the average.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.averages: list[Tensor] = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters in after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        get_ema_multi_avg_fn(decay)(self.averages, [parameter.detach() for parameter in self.parameters], 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters have the averaged values."""
        saved = [parameter.detach().clone() for parameter in self.parameters]
        self._assign(self.averages)
        try:
            yield
        finally:
            self._assign(saved)

    def _assign(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "averages": [average.clone() for average in self.averages]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        for average, stored in zip(self.averages, state["averages"], strict=True):
            average.copy_(stored)
