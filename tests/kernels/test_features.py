"""Features by blocks pass for the flat vector, without making it where it is not needed."""

from __future__ import annotations

import pytest
import torch

from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import collate
from forcetune.kernels.features import Features, make_features
from systems import backbone, cluster, frames_of

LAYOUT = ((1, 3), (3, 2), (1, 2))


def features() -> tuple[torch.Tensor, Features]:
    flat = torch.randn(4, 11, dtype=torch.float64)
    return flat, make_features(flat, LAYOUT)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "part",
    [
        slice(0, 3),
        slice(1, 2),
        slice(3, 9),
        slice(9, 11),
        slice(2, 10),
        slice(None),
        slice(3, None),
        slice(9, None),
        slice(-2, None),
        slice(0, 99),
    ],
)
def test_slices_are_those_of_the_flat_vector(part: slice, known: bool) -> None:
    flat, parts = features()
    assert not known or torch.equal(parts.flat, flat)
    assert torch.equal(parts[..., part], flat[..., part])
    assert torch.equal(parts[:, part], flat[:, part])


def test_what_is_known_without_the_flat_vector_makes_none() -> None:
    _, parts = features()
    assert (parts.ndim, parts.shape, len(parts), parts.layout) == (2, (4, 11), 4, LAYOUT)
    assert parts[..., 0:3].shape == (4, 3) and parts[..., 3:9].shape == (4, 6)
    assert parts._flat is None


def test_layers_hand_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but scalars becomes a flat vector."""
    made: list[tuple[tuple[int, int], ...]] = []
    original = Features.flat.fget
    assert original is not None

    def counted(self: Features) -> torch.Tensor:
        if self._flat is None:
            made.append(self.layout)
        return original(self)

    model = backbone()
    attach(model, method("mmea"))
    monkeypatch.setattr(Features, "flat", property(counted))
    model.predict(collate(build_graphs(model, frames_of(cluster(), cluster(seed=4)))), create_graph=True)
    assert [layout for layout in made if len(layout) > 1] == []
