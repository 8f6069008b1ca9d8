"""Steps as a GPU would play them, as far as a CPU can tell; with a GPU, as it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forcetune.adapters.attach import attach, require_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.config import LossConfig, TrainingConfig
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from forcetune.graphs.loader import BatchLoader
from forcetune.kernels import recording
from forcetune.kernels.edge_plan import with_plan
from forcetune.kernels.padding import CUDA_CHUNK_COST, build_layout, fitted, list_tensors, plan_with
from forcetune.kernels.recording import CompileError
from forcetune.training.compiled import CompiledStep, Workers, choose_layouts
from forcetune.training.losses import label_weights
from systems import backbone, cluster, frames_of, perturb

SMALL = {"max_ell": 1, "correlation": 2, "hidden_irreps": "4x0e+4x1o", "elements": (1, 6, 7, 8)}
MOLECULES = [cluster(seed=seed, atoms=5 + seed % 3) for seed in range(9)]


def tuned(name: str = "mmea", seed: int = 5, **options: Any) -> MaceBackbone:
    model = backbone(**SMALL | options)
    perturb(attach(model, method(name)), seed=seed)
    return model


def labelled_graphs(model: MaceBackbone) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        replace(
            graph,
            energy=torch.randn(1, generator=generator, dtype=torch.float64),
            forces=torch.randn(graph.forces.shape, generator=generator, dtype=graph.forces.dtype),
        )
        for graph in build_graphs(model, frames_of(*MOLECULES))
    ]


def results(step: CompiledStep, batch: Batch) -> list[torch.Tensor]:
    """Loss and gradients."""
    loss = step.loss(batch)
    assert loss is not None
    return [loss.detach(), *(g for g in torch.autograd.grad(loss, step.parameters, allow_unused=True) if g is not None)]


class Everything(TorchDispatchMode):
    """Remembers every operation with what it was given and what came of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Played:
    """Stands in for a CUDA graph: the operations of the recording again, on the memory of the recording."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, before in self.calls:
                now = func(*args, **kwargs)
                for old, new in zip(tensors(before), tensors(now), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for one in value for item in tensors(one)] if isinstance(value, list | tuple) else []


@pytest.fixture
def gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's CUDA graphs, acted out on the CPU."""

    class Stream:
        def __init__(self, device: Any = None) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            pass

    @contextmanager
    def capture(graph: Played) -> Iterator[None]:
        with Everything() as mode:
            yield
        graph.calls = mode.calls

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Played)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(recording, "_find_gpu", lambda _: torch.device("cpu"))


@pytest.mark.parametrize("name", ["mmea", "elora", "full"])
def test_a_step_played_again_computes_other_batches(name: str, gpu_of_its_own: None) -> None:
    """What varies goes through the recording's own inputs; nothing of the first batch is left in it."""
    model = tuned(name)
    graphs = labelled_graphs(model)
    config = LossConfig(energy_per_atom=True)
    layout = build_layout(graphs, 2, model.elements, model.cutoff, True, limit=None, cost=CUDA_CHUNK_COST)
    step = CompiledStep(model, None, config, [layout], list(require_adapter(model).parameters()), Workers(1))
    before: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for index in (0, 3, 5, 7):
        batch = collate(graphs[index : index + 2])
        mine = results(step, batch)
        # results are the caller's: the next call does not write into them
        assert all(torch.equal(one, two) for one, two in zip(before, copies, strict=True))
        before, copies = mine, [one.clone() for one in mine]
        eager = step._eager(batch, label_weights(config, batch))
        wanted = [eager.detach(), *(g for g in step._gradients(eager) if g is not None)]
        assert len(mine) == len(wanted)
        for one, two in zip(mine, wanted, strict=True):
            assert torch.allclose(one, two, rtol=1e-9, atol=1e-11)
        perturb(require_adapter(model), seed=index)
    moved = [parameter.detach().clone().requires_grad_() for parameter in step.parameters]
    step.parameters = moved
    with pytest.raises(CompileError, match="no longer where they were"):
        step.loss(collate(graphs[:2]))


@pytest.mark.parametrize("name", ["mmea", "elora", "sparse", "full"])
def test_a_step_neither_waits_for_the_device_nor_leaves_it(name: str) -> None:
    """On a device without values whatever asks for one fails, and so does what meets a tensor from elsewhere."""
    model = tuned(name)
    graphs = labelled_graphs(model)
    config = LossConfig(energy_per_atom=True, stress=1.0)
    layout = build_layout(graphs, 3, model.elements, model.cutoff, True, limit=None, cost=CUDA_CHUNK_COST)
    batch = collate(graphs[:3])
    padded = fitted(batch, layout, model.elements)
    assert padded is not None
    full, plan = padded[0].to("meta"), padded[1]
    plan = replace(
        plan_with(plan, [value.to("meta") for value in list_tensors(plan)]),
        present=plan.present.to("meta"),
        species=plan.species.to("meta"),
    )
    wholes = [value.to("meta") for value in label_weights(config, batch)]
    for module in model.model.modules():
        _ = getattr(module, "coefficients", None)  # arranged from values, which tensors on meta lack
    model.model.to("meta")
    for attribute, value in list(vars(model).items()):
        if isinstance(value, torch.Tensor):
            setattr(model, attribute, value.to("meta"))
    step = CompiledStep(model, None, config, [layout], list(require_adapter(model).parameters()), Workers(1))

    def once() -> None:
        with with_plan(model, plan):
            loss = step._eager(full, wholes)
        grads = [one for one in step._gradients(loss) if one is not None]
        assert grads and all(one.device.type == "meta" for one in grads)

    once()
    # constants are where they are needed by now: whatever still comes from the CPU would come again at each step
    with Everything() as mode:
        once()
    foreign = [
        str(func)
        for func, args, kwargs, made in mode.calls
        for one in tensors([*args, *kwargs.values(), made])
        if one.device.type != "meta"
    ]
    assert len(mode.calls) > 100 and not foreign


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["mmea", "elora", "full"])
def test_a_cuda_graph_computes_what_the_eager_step_does(name: str) -> None:
    model = backbone(**SMALL, device="cuda")
    perturb(attach(model, method(name)))
    graphs = labelled_graphs(model)
    config = TrainingConfig.model_validate({"batch_size": 2, "compile": "on"})
    layouts = choose_layouts(model, config, BatchLoader(graphs, 2), 2)
    step = CompiledStep(model, None, LossConfig(), layouts, list(require_adapter(model).parameters()), Workers(1))
    for index in (0, 3, 5, 7):
        batch = collate(graphs[index : index + 2]).to("cuda")
        mine = results(step, batch)
        eager = step._eager(batch, label_weights(step.config, batch))
        wanted = [eager.detach(), *(g for g in step._gradients(eager) if g is not None)]
        for one, two in zip(mine, wanted, strict=True):
            assert torch.allclose(one, two, rtol=1e-9, atol=1e-11)
        perturb(require_adapter(model), seed=index)
