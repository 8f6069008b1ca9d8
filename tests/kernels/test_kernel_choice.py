"""Which kernels compute a model, and that it makes no difference to what is computed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.backbones.network import NetworkBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from forcetune.kernels.compiled import choice, machine
from forcetune.kernels.compiled.choice import choose_kernels, kernels_in_use
from sevennet_models import RECIPES, backbone_of, structures
from systems import backbone, cluster, crystal, frames_of, perturb

compiled_only = pytest.mark.skipif(choice.missing_reason() is not None, reason="there are no compiled kernels")

MACE: dict[str, dict[str, Any]] = {
    "default": {},
    "low order": {"max_ell": 1, "correlation": 2, "hidden_irreps": "4x0e+4x1o"},
    "float32": {"dtype": torch.float32},
}


def results(model: NetworkBackbone, batch: Batch) -> list[torch.Tensor]:
    """Energies, forces and stress, and the gradients of a loss by everything that is trained."""
    parameters = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    prediction = model.predict(batch, stress=True, create_graph=True)
    assert prediction.stress is not None
    loss = prediction.energy.square().mean() + prediction.forces.square().sum() + prediction.stress.square().sum()
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [prediction.energy, prediction.forces, prediction.stress, *(grad for grad in grads if grad is not None)]


def assert_equal(model: NetworkBackbone, batch: Batch) -> None:
    """Within 1e-10 of the largest value in float64; in float32 within 1e-3 of it, as sums come in another order."""
    tolerance = 1e-10 if model.dtype == torch.float64 else 1e-3
    choose_kernels(model.model, "torch")
    assert kernels_in_use(model.model) == "torch"
    expected = results(model, batch)
    choose_kernels(model.model, "compiled")
    assert kernels_in_use(model.model) == "compiled"
    floor = 1e-6 * max(float(value.detach().abs().max()) for value in expected[3:])
    for one, other in zip(results(model, batch), expected, strict=True):
        assert one.shape == other.shape
        scale = max(float(other.detach().abs().max()), floor) if other.numel() else 1.0
        assert torch.allclose(one, other, rtol=0, atol=tolerance * scale)


@compiled_only
@pytest.mark.parametrize("name", list(MACE))
@pytest.mark.parametrize("adapter", ["full", "mmea", "elora", "sparse"])
def test_mace_is_the_same_by_both(name: str, adapter: str) -> None:
    model = backbone(**MACE[name])
    perturb(attach(model, method(adapter)))
    alone = cluster()[:1]
    batch = collate(build_graphs(model, frames_of(cluster(), alone, crystal())))
    assert_equal(model, batch.to(dtype=model.dtype))


@compiled_only
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.species != "univ"])
def test_sevennet_is_the_same_by_both(name: str) -> None:
    recipe = RECIPES[name]
    model = backbone_of(recipe)
    perturb(attach(model, method("elora")))
    batch = collate(build_graphs(model, frames_of(*structures(recipe.symbols))))
    assert_equal(model, batch.to(dtype=model.dtype))


@compiled_only
def test_compiled_kernels_are_chosen_where_they_can_be_had() -> None:
    model = forcetune.load("mini")
    assert kernels_in_use(model.model) == "compiled"
    assert kernels_in_use(forcetune.load("mini", kernels="torch").model) == "torch"
    slow = forcetune.load(model, kernels="torch")
    assert slow is model and kernels_in_use(copy.deepcopy(slow).model) == "torch"
    assert kernels_in_use(forcetune.load(slow, elements=[1, 6]).model) == "torch"


def test_without_a_compiler_torch_computes_and_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "missing_reason", lambda: "llvmlite is not installed (pip install llvmlite)")
    model = forcetune.load("mini")
    assert kernels_in_use(model.model) == "torch"
    with pytest.raises(InputError, match="llvmlite is not installed"):
        choose_kernels(model.model, "compiled")


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(InputError, match=r"model\.kernels='fast'"):
        forcetune.load("mini", kernels="fast")  # pyright: ignore[reportArgumentType]


def test_compiled_code_that_cannot_be_kept_is_used_all_the_same(tmp_path: Path) -> None:
    """A cache where nothing can be written is no reason against compiled kernels."""
    place = tmp_path / "file"
    place.write_bytes(b"in the way")
    machine._write(place / "kernels" / "code", b"code")
    assert place.read_bytes() == b"in the way" and list(tmp_path.iterdir()) == [place]
