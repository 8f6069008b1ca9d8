"""How an adapter starts: weights of elements that nothing is trained on stay as they are."""

from __future__ import annotations

import pytest
import torch

from forcetune.adapters.attach import Adapter
from forcetune.adapters.methods import method
from forcetune.config import TrainingConfig
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import collate
from forcetune.training.initialization import attach_for_training
from systems import backbone, cluster, frames_of


def moved_elements(adapter: Adapter, weights: dict[str, torch.Tensor], count: int) -> dict[str, list[bool]]:
    """Which elements' weights an adapter changes, for every site with a slice for each."""
    moved: dict[str, list[bool]] = {}
    for site in adapter.sites:
        weight = weights[site.name]
        change = (adapter.effective_weight(site, weight) - weight).detach().reshape(-1)
        for path in site.paths:
            if path.by_element is not None and path.by_element[1] == count:
                by_element = change[path.start : path.start + path.size].view(path.by_element).abs().sum((0, 2))
                if bool(by_element.any()):
                    moved[f"{site.name}/{path.name}"] = (by_element > 0).tolist()
    return moved


@pytest.mark.parametrize("name", ["elora", "sparse"])
def test_elements_that_are_absent_from_the_data_keep_their_weights(name: str) -> None:
    model = backbone(elements=(1, 6, 7, 8))
    graphs = build_graphs(model, frames_of(cluster((1, 7)), cluster((1, 7), 5, seed=1)))
    adapter = attach_for_training(
        model, method(name), TrainingConfig(), graphs, model.reference_energies, elements=(1, 7)
    )
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        prediction = model.predict(collate(graphs), create_graph=True)
        (prediction.energy.square().sum() + prediction.forces.square().sum()).backward()
        optimizer.step()
    moved = moved_elements(adapter, dict(model.model.named_parameters()), 4)
    kinds = {place.split(".")[0] for place in moved}
    assert kinds >= {"interactions"} and len(moved) >= 3
    assert all(elements == [True, False, True, False] for elements in moved.values()), moved
