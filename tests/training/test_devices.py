"""Training and prediction on a device that is not the CPU, acted out on PyTorch's device without values.

An operation that meets a tensor from the CPU fails there, and so does whatever asks the device for a value: on a GPU
the one would be an error, the other would wait for all work that the device still has to do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forcetune.adapters.attach import attach, detach, get_adapter, merge_weights, reattach, require_adapter
from forcetune.adapters.methods import METHODS, method
from forcetune.backbones.loading import choose_device
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.protocol import Prediction
from forcetune.backbones.sevennet.backbone import SevenNetBackbone
from forcetune.config import LossConfig, TrainingConfig
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from forcetune.graphs.loader import BatchLoader
from forcetune.kernels.compiled.choice import choose_kernels, kernels_in_use
from forcetune.magnetism.layer import select_half
from forcetune.magnetism.options import Magnetism
from forcetune.training.module import FineTuning
from forcetune.training.replay_head import ReplayHead
from sevennet_models import BATTERY, backbone_of
from systems import METHODS_FOR_MACE, backbone, cluster, crystal, frames_of, perturb

Model = MaceBackbone | SevenNetBackbone
META = torch.device("meta")
MAKERS: dict[str, Callable[[], Model]] = {
    "MACE": lambda: backbone(max_ell=1, correlation=2, hidden_irreps="4x0e+4x1o", elements=(1, 6, 7, 8)),
    "SevenNet": lambda: backbone_of(BATTERY["SevenNet, modalities"]),
}
TRANSFORMED: dict[str, dict[str, Any]] = {
    "Agnesi": {"distance_transform": "Agnesi", "pair_repulsion": True},
    "Soft": {"distance_transform": "Soft"},
}
CASES = [(name, one) for name in MAKERS for one in METHODS if name != "MACE" or one in METHODS_FOR_MACE]
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal")
"""Operations whose results the host has to wait for."""
LOSS = LossConfig(stress=1.0)


class Crossings(TorchDispatchMode):
    """Notes what leaves the device or comes to it.

    Attributes:
        copies: shapes of the tensors that moved to the device.
        waits: operations whose results the host waits for.
        mixed: operations that had tensors from both sides, numbers apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.copies: list[tuple[int, ...]] = []
        self.waits: list[str] = []
        self.mixed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        before = {one.device.type for one in tensors_in([*args, *(kwargs or {}).values()]) if one.ndim}
        if name in WAITING and any(one.device == META for one in tensors_in(args)):
            self.waits.append(name)
        result = func(*args, **(kwargs or {}))
        after = {one.device.type for one in tensors_in([result])}
        self.operations += after == {"meta"}
        if before == {"cpu"} and after == {"meta"}:
            self.copies += [tuple(one.shape) for one in tensors_in([result])]
        elif before == {"meta"} and "cpu" in after:
            self.waits.append(f"{name} to the CPU")
        elif len(before) > 1:
            self.mixed.append(name)
        return result


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def without_values(model: Model) -> Model:
    """The model on the device without values; what is arranged from values was arranged before."""
    batch = collate(labelled_graphs(model))
    model.predict(batch, stress=True)
    model.to("meta")
    return model


def labelled_graphs(model: Model) -> list[Batch]:
    frames = [
        replace(
            frame,
            energy=1.5 * index,
            forces=np.full((len(frame), 3), 0.1),
            stress=np.eye(3) if frame.has_volume else None,
            spins=np.ones((len(frame), 3)),
            moments=np.ones((len(frame), 3)),
        )
        for index, frame in enumerate(frames_of(cluster(), crystal(), cluster(seed=5, atoms=7)))
    ]
    return list(build_graphs(model, frames))


def training_of(
    model: Model,
    loss: LossConfig = LOSS,
    replay: Sequence[Batch] = (),
    head: ReplayHead | None = None,
    **options: Any,
) -> tuple[FineTuning, list[Batch]]:
    """A training of three steps an epoch, and the batches of its first epoch."""
    given = {"batch_size": 2, "compile": "off", "clip": 10.0, "ema": 0.9, "loss": loss}
    config = TrainingConfig.model_validate(given | options)
    graphs = labelled_graphs(model)
    loader = BatchLoader(graphs, 2, shuffle=True, replay=replay, replay_ratio=1.0 if replay else 0.0)
    training = FineTuning(model, config, 1e-3, loader, lambda errors: None, head=head)
    training._in_epoch = True
    training._start_epoch()
    return training, list(loader)


def check_steps(training: FineTuning, batches: Sequence[Batch]) -> None:
    """Steps stay on the device and wait for nothing; what moves there is the batch and its plan, before the step."""
    training._step(batches[0], 0)  # makes constants and the state of the optimizer
    for index, batch in enumerate(batches):
        with Crossings() as placing:
            placed = training.backbone.place(batch)
        assert not placing.waits and not placing.mixed
        with Crossings() as seen:
            training._step(placed, index)
        assert seen.operations > 100
        assert not seen.waits
        assert not seen.mixed
        assert not seen.copies
    assert all(parameter.device == META for parameter in training.adapter.parameters())
    assert all(loss.device == META for loss in training._losses)


@pytest.mark.parametrize("kind, name", CASES, ids=[" ".join(case) for case in CASES])
def test_training_steps_stay_on_the_device_and_wait_for_nothing(kind: str, name: str) -> None:
    model = MAKERS[kind]()
    perturb(attach(model, method(name)))
    check_steps(*training_of(without_values(model)))


@pytest.mark.parametrize("name", ["full", "elora"])
@pytest.mark.parametrize("kind", MAKERS)
def test_steps_of_soap_turn_their_bases_on_the_device(kind: str, name: str) -> None:
    model = MAKERS[kind]()
    perturb(attach(model, method(name)))
    check_steps(*training_of(without_values(model), optimizer="soap", ema=None))


@pytest.mark.parametrize("name", TRANSFORMED)
def test_distances_are_transformed_on_the_device(name: str) -> None:
    """Transforms and the repulsion of nuclei look up what elements have by their species."""
    options: dict[str, Any] = {"max_ell": 1, "correlation": 2, "hidden_irreps": "4x0e+4x1o", "elements": (1, 6, 7, 8)}
    model = backbone(**options, **TRANSFORMED[name])
    perturb(attach(model, method("elora")))
    check_steps(*training_of(without_values(model)))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("kind", MAKERS)
def test_training_steps_by_tritons_kernels_stay_on_the_device(kind: str) -> None:
    """Without values kernels are not launched; what prepares them, their derivatives and their plans is computed."""
    model = MAKERS[kind]()
    perturb(attach(model, method("elora")))
    model = without_values(model)
    choose_kernels(model.model, "triton")
    assert kernels_in_use(model.model) == "triton"
    check_steps(*training_of(model))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_head_for_replay_frames_and_a_spin_layer_stay_on_the_device(kind: str) -> None:
    model = MAKERS[kind]()
    magnetic = replace(method("readout"), magnetism=Magnetism(layer="spin", spin_orbit=True))
    perturb(attach(model, magnetic))
    head = ReplayHead(model.n_scalars, seed=1, dtype=model.dtype, device=model.device)
    replay = [graph.for_replay() for graph in labelled_graphs(model)]
    training, batches = training_of(without_values(model), LOSS.model_copy(update={"moments": 1.0}), replay, head)
    head.to("meta")
    assert any(bool(batch.replayed.any()) for batch in batches)
    check_steps(training, batches)


@pytest.mark.parametrize("kind", MAKERS)
def test_predictions_wait_for_nothing_and_their_plan_is_made_once(kind: str) -> None:
    model = MAKERS[kind]()
    batch = collate(labelled_graphs(model))
    placed = without_values(model).place(batch)
    model.predict(placed, stress=True)  # constants come once
    with Crossings() as seen:
        prediction = model.predict(placed, stress=True)
    assert not seen.waits and not seen.mixed and not seen.copies
    assert prediction.stress is not None
    assert {one.device for one in (prediction.energy, prediction.forces, prediction.stress)} == {META}
    again = model.place(batch)
    plans = [model._plans.placed(one.edge_index, one.numbers) for one in (placed, again)]
    assert plans[0] is not None and plans[0] is plans[1]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_validation_brings_back_predictions_and_nothing_else(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MAKERS["MACE"]()
    attach(model, method("gain"))
    training, batches = training_of(without_values(model))
    training.keeps_validation = keeps
    brought: list[Prediction] = []

    def bring(prediction: Prediction, device: torch.device) -> Prediction:
        assert device.type == "cpu"
        brought.append(prediction)
        zeros: list[Any] = [None if one is None else torch.zeros(one.shape, dtype=one.dtype) for one in prediction]
        return Prediction(*zeros)

    monkeypatch.setattr(Prediction, "to", bring)
    loss, errors = training._validation(batches)
    assert len(brought) == len(batches) and all(one.energy.device == META for one in brought)
    # predictions of nothing are off by the labels themselves: energies of 0, 1.5 and 3 eV, forces of 0.1 eV/Å
    assert errors.energy_mae_mev == pytest.approx(1500.0) and errors.forces_mae_mev_per_ang == pytest.approx(100.0)
    # the stress label of the one crystal is the unit matrix
    expected = (0.0 + 1.5**2 + 3.0**2) / 3 + LOSS.forces * 0.1**2 + 3 / 9
    assert loss == pytest.approx(expected)


def test_a_batch_changed_in_place_is_planned_and_checked_again() -> None:
    model = MAKERS["MACE"]()
    batch = collate(labelled_graphs(model))
    without_values(model).place(batch)
    batch.numbers[0] = 26
    assert model._plans.placed(batch.edge_index, batch.numbers) is None
    with pytest.raises(InputError, match="does not know the element Fe"):
        model.place(batch)


@pytest.mark.parametrize("seed", [4, 7])
def test_half_of_the_edges_is_the_same_however_it_is_chosen(seed: int) -> None:
    """What a GPU does instead of counting, on the CPU."""
    for atoms in (cluster(seed=seed), crystal(seed=seed)):
        batch = build_graphs(MAKERS["MACE"](), frames_of(atoms))[0]
        half = select_half(batch)
        assert len(half) == batch.n_edges // 2
        chosen = torch.zeros(batch.n_edges, dtype=torch.bool)
        chosen[half] = True
        assert torch.equal(torch.argsort((~chosen).to(torch.uint8), stable=True)[: batch.n_edges // 2], half)


@pytest.mark.parametrize("kind", MAKERS)
def test_adapters_come_off_go_on_and_are_merged_on_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_values(MAKERS[kind]())
    batch = collate(labelled_graphs(MAKERS[kind]()))
    attach(model, method("gain"))
    reattach(model, detach(model))
    assert {parameter.device for parameter in require_adapter(model).parameters()} == {META}
    assert model.predict(model.place(batch)).forces.device == META
    detach(model)
    monkeypatch.setattr(type(model), "fingerprint", lambda self: "of values")  # read on the host, for a file
    attach(model, method("elora"))
    merge_weights(model)
    assert get_adapter(model) is None
    assert {tensor.device for tensor in model.model.state_dict().values()} == {META}


def test_a_batch_of_graphs_on_the_device_is_laid_out_there() -> None:
    graphs = [graph.to("meta") for graph in labelled_graphs(MAKERS["MACE"]())]
    batch = collate(graphs)
    assert batch.ptr.device == META and batch.ptr.shape == (len(graphs) + 1,)


def test_apples_gpu_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(InputError, match="float64") as refusal:
        choose_device("mps")
    assert str(refusal.value).count(". ") == 0
    assert choose_device("auto").type != "mps"
