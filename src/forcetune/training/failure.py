"""Why a training loss is no longer finite: weights that diverged, or a frame whose loss cannot be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from forcetune.backbones.protocol import Backbone
from forcetune.config import LossConfig
from forcetune.graphs.graph import Batch, collate
from forcetune.graphs.loader import BatchLoader
from forcetune.training.replay_head import ReplayHead, objective


class Cause(NamedTuple):
    """What is not finite although the weights are.

    Attributes:
        what: ``prediction`` or ``gradient``.
        graphs: numbers of the graphs in the batch; empty where it is no single one.
    """

    what: str
    graphs: tuple[int, ...]


def cause_in(
    backbone: Backbone, head: ReplayHead | None, config: LossConfig, graphs: Sequence[Batch], batch: Batch
) -> Cause | None:
    """What of a batch is not finite with the weights as they are; None where everything is.

    Args:
        backbone: carries the adapter, with finite weights.
        head: of replay frames, or None.
        config: the loss.
        graphs: of the batch, one by one.
        batch: all of them.
    """
    parameters = _trained(backbone, head)
    what = _not_finite(backbone, head, config, batch, parameters)
    if what is None:
        return None
    alone = [k for k, graph in enumerate(graphs) if _not_finite(backbone, head, config, graph, parameters)]
    return Cause(what, tuple(alone))


def cause_in_step(
    backbone: Backbone, head: ReplayHead | None, config: LossConfig, loader: BatchLoader, step: int
) -> tuple[Cause | None, Sequence[int]]:
    """What is not finite in the batch of a step or of the one before it, from which its weights come.

    Args:
        backbone, head, config: as :func:`cause_in`.
        loader: of the epoch.
        step: of the epoch, from 0.

    Returns:
        The cause, None where everything is finite, and numbers of the graphs among those of the loader.
    """
    for index in range(max(0, step - 1), step + 1):
        numbers = loader.numbers(index)
        graphs = [loader.graph(number).to(device=backbone.device) for number in numbers]
        cause = cause_in(backbone, head, config, graphs, collate(graphs))
        if cause is not None:
            return cause, numbers
    return None, ()


def _trained(backbone: Backbone, head: ReplayHead | None) -> list[nn.Parameter]:
    parameters = [*backbone.model.parameters(), *(() if head is None else head.parameters())]
    return [parameter for parameter in parameters if parameter.requires_grad]


def _not_finite(
    backbone: Backbone, head: ReplayHead | None, config: LossConfig, batch: Batch, parameters: Sequence[nn.Parameter]
) -> str | None:
    with torch.enable_grad():
        loss = objective(backbone, head, config, batch)
        if not bool(loss.isfinite()):
            return "prediction"
        if not loss.requires_grad:
            return None
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    finite = all(bool(one.isfinite().all()) for one in gradients if one is not None)
    return None if finite else "gradient"


def describe_failure(
    cause: Cause | None, loss: float, epoch: int, rate: float, name_of: Callable[[int], str] | None = None
) -> str:
    """The message of a training whose loss is no longer finite.

    Args:
        cause: what is not finite with the weights that the training began with; None where nothing is, so that it is
            the training that made them what they are.
        loss: nan or inf.
        epoch: in which it happened.
        rate: the learning rate.
        name_of: names the graph of a number in the batch.
    """
    start = f"the training loss became {loss} in epoch {epoch}"
    if cause is None:
        return (
            f"{start}: the weights diverged; lower training.learning_rate (now {rate:g}) or training.clip. The best "
            "adapter so far is kept."
        )
    names = [name_of(graph) for graph in cause.graphs] if name_of is not None else []
    where = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    of = f" of {where}" if where else ", but of no frame by itself"
    what = "the model's prediction" if cause.what == "prediction" else "the gradient of the loss by the weights"
    advice = "Look at the structure and labels there, or leave the frame out" if where else "Please report this"
    return (
        f"{start}, and not because of the learning rate: with finite weights {what}{of} is not finite. {advice}. The "
        "best adapter so far is kept."
    )


def copy_values(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The values of parameters, to be put back by :func:`put_back`."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def put_back(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give parameters the values that :func:`copy_values` took."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
