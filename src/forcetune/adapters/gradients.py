"""What the loss asks of each weight before anything is trained: start and ranks of low-rank updates."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from forcetune.adapters.attach import Adapter, get_adapter
from forcetune.adapters.methods import Method
from forcetune.adapters.updates import LowRank
from forcetune.adapters.updates.base import WeightUpdate
from forcetune.adapters.updates.low_rank import LowRankWeight, as_matrix, full_rank
from forcetune.backbones.protocol import Backbone, Prediction, Site
from forcetune.errors import InputError
from forcetune.graphs.graph import Batch


def weight_gradients(
    backbone: Backbone, batches: Iterable[Batch], loss: Callable[[Prediction, Batch], Tensor], *, stress: bool = False
) -> dict[str, Tensor]:
    """Gradient of the mean loss by every weight of a foundation model that carries no adapter.

    Args:
        backbone: left as it was.
        batches: graphs with labels.
        loss: of one batch.
        stress: whether the loss needs stresses.

    Returns:
        By site name, with the shape of the weight; zeros where the loss does not depend on it.
    """
    assert get_adapter(backbone) is None
    parameters = dict(backbone.model.named_parameters())
    wanted = {site.name: parameters[site.name] for site in backbone.sites()}
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    total = {name: torch.zeros_like(parameter) for name, parameter in wanted.items()}
    count = 0
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in wanted)
        for batch in batches:
            prediction = backbone.predict(batch, stress=stress, create_graph=True)
            pulls = torch.autograd.grad(loss(prediction, batch), list(wanted.values()), allow_unused=True)
            for name, pull in zip(wanted, pulls, strict=True):
                if pull is not None:
                    total[name] += pull
            count += 1
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
    return {name: gradient / max(1, count) for name, gradient in total.items()}


def start_from_gradients(adapter: Adapter, gradients: Mapping[str, Tensor]) -> None:
    """Give low-rank updates that ask for it their start from the gradient."""
    for site in adapter.sites:
        part = adapter.part(site, WeightUpdate)
        if isinstance(part, LowRankWeight) and part.spec.init == "gradient":
            part.start_from(gradients[site.name])


def within_budget(method: Method, sites: tuple[Site, ...], gradients: Mapping[str, Tensor]) -> Method:
    """The method with a rank for each path, such that it trains at most ``method.budget`` parameters.

    Every unit of rank goes to the path where it captures most of the squared gradient for each parameter it costs:
    the k-th unit captures the k-th squared singular value. Updates that are not of low rank keep what they need.

    Raises:
        InputError: the budget does not even bear the other updates, or nothing is of low rank.
    """
    assert method.budget is not None
    queue: list[tuple[float, str, int]] = []
    values: dict[str, Tensor] = {}
    costs: dict[str, int] = {}
    spent = 0
    for site in sites:
        for update in method.updates_at(site):
            if not isinstance(update, LowRank):
                spent += _parameters(update, site, gradients[site.name])
                continue
            flat = gradients[site.name].detach().reshape(-1)
            for path in site.paths:
                key = f"{site.name}/{path.name}"
                values[key] = torch.linalg.svdvals(as_matrix(flat, path)).square()[: full_rank(path)]
                costs[key] = update.cost(path)
                spent += update.n_norms(path)
                queue.append((-float(values[key][0]) / costs[key], key, 1))
    if not queue:
        raise InputError(f"method.budget: {method.name} has no low-rank updates to share a budget among.")
    cheapest = min(costs.values())
    if spent + cheapest > method.budget:
        raise InputError(
            f"method.budget: {method.budget:,} parameters are fewer than the other updates of {method.name} need "
            f"({spent:,}) with one rank beside them ({cheapest:,}); give it more."
        )
    ranks = dict.fromkeys(costs, 0)
    heapq.heapify(queue)
    while queue:
        worth, key, rank = heapq.heappop(queue)
        if worth == 0 or spent + costs[key] > method.budget:
            continue
        spent += costs[key]
        ranks[key] = rank
        if rank < len(values[key]):
            heapq.heappush(queue, (-float(values[key][rank]) / costs[key], key, rank + 1))
    table = {
        kind: tuple(replace(update, ranks=ranks) if isinstance(update, LowRank) else update for update in updates)
        for kind, updates in method.table.items()
    }
    return replace(method, table=table, budget=None)


def _parameters(update: object, site: Site, weight: Tensor) -> int:
    part = update.build(site, weight)  # pyright: ignore[reportAttributeAccessIssue]
    return 0 if part is None else sum(parameter.numel() for parameter in part.parameters())
