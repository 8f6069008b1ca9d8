"""Predictions that are played from a recording: those of the model, until something changes."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

from forcetune.adapters.attach import attach, get_adapter
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.deployment import compiled_prediction
from forcetune.deployment.calculator import ForcetuneCalculator, build_frame
from forcetune.deployment.compiled_prediction import CompiledPrediction
from forcetune.errors import InputError
from forcetune.graphs.graph import Batch, build_graph
from forcetune.kernels.recording import record
from systems import backbone, cluster, crystal, perturb

SMALL = {"max_ell": 1, "correlation": 2, "hidden_irreps": "4x0e+4x1o", "elements": (1, 6, 7, 8)}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_prediction, "COMPILED_AFTER", 3)


def tuned(**options: Any) -> MaceBackbone:
    model = backbone(**SMALL | options)
    perturb(attach(model, method("mmea")))
    return model


def moved(atoms: Atoms, seed: int, by: float = 0.03) -> Atoms:
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(scale=by, size=atoms.positions.shape)
    return atoms


def graph(model: MaceBackbone, atoms: Atoms) -> Batch:
    return build_graph(build_frame(atoms), model.cutoff, model.dtype)


def assert_model(compiled: CompiledPrediction, batch: Batch, *, stress: bool = False, tolerance: float = 1e-11) -> None:
    mine, expected = compiled.predict(batch, stress=stress), compiled.backbone.predict(batch, stress=stress).detached()
    assert mine.forces.shape == expected.forces.shape and mine.energy.shape == expected.energy.shape
    assert torch.allclose(mine.energy, expected.energy, rtol=tolerance, atol=tolerance)
    assert torch.allclose(mine.forces, expected.forces, rtol=0, atol=tolerance * float(expected.forces.abs().max()))
    assert (mine.stress is None) == (expected.stress is None)
    if mine.stress is not None and expected.stress is not None:
        assert mine.stress.shape == expected.stress.shape
        assert torch.allclose(mine.stress, expected.stress, rtol=0, atol=tolerance * float(expected.stress.abs().max()))


@pytest.mark.parametrize("name", ["molecule", "crystal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_moves_is_predicted_as_by_the_model(name: str, dtype: torch.dtype) -> None:
    """In float32 within 1e-5: sums come in another order."""
    model = tuned(dtype=dtype)
    atoms = cluster() if name == "molecule" else crystal()
    compiled = CompiledPrediction(model)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for seed in range(12):
        assert_model(compiled, graph(model, moved(atoms, seed)), stress=name == "crystal", tolerance=tolerance)
        assert (compiled.recording is None) == (seed < 2)
    assert compiled.eager_reason is None and compiled.recording is not None and compiled.recording.operations > 100


def recorded(model: MaceBackbone, structures: Sequence[Atoms]) -> CompiledPrediction:
    compiled = CompiledPrediction(model)
    for atoms in structures:
        compiled.predict(graph(model, atoms), stress=False)
    assert compiled.recording is not None
    return compiled


def test_a_recording_lasts_as_long_as_the_model_is_the_same() -> None:
    model = tuned()
    atoms = cluster()
    structures = [moved(atoms, seed) for seed in range(4)]

    def weights() -> None:
        with torch.no_grad():
            model.model.interactions[0].linear_up.weight.mul_(1.5)

    def gates() -> None:
        adapter = get_adapter(model)
        assert adapter is not None
        perturb(adapter, seed=8)

    def without_adapter() -> None:
        adapter = get_adapter(model)
        assert adapter is not None
        adapter.enabled = False

    def other_weights() -> None:
        state = {name: 1.1 * value for name, value in model.model.state_dict().items() if value.is_floating_point()}
        model.model.load_state_dict(model.model.state_dict() | state, assign=True)

    def other_memory() -> None:
        weight = model.model.interactions[0].linear_up.weight
        weight.data = 1.3 * weight.data

    def references() -> None:
        model.set_reference_energies({6: -3.0})

    changes = [weights, gates, references, other_memory, other_weights, without_adapter]
    for change in changes:
        compiled = recorded(model, structures)
        first = compiled.predict(graph(model, atoms), stress=False)
        change()
        second = compiled.predict(graph(model, atoms), stress=False)
        assert compiled.recording is None
        assert float(second.energy) != float(first.energy)
        for other in structures:
            assert_model(compiled, graph(model, other))
        assert compiled.recording is not None


def test_other_atoms_and_other_questions_begin_anew() -> None:
    model = tuned()
    atoms = cluster()
    compiled = recorded(model, [moved(atoms, seed) for seed in range(4)])
    assert_model(compiled, graph(model, atoms[::-1]))
    assert compiled.recording is None
    crystals = [moved(crystal(), seed) for seed in range(4)]
    compiled = recorded(model, crystals)
    assert_model(compiled, graph(model, crystals[0]), stress=True)
    assert compiled.recording is None


def test_atoms_that_come_closer_need_another_recording() -> None:
    model = tuned(r_max=2.5)
    atoms = cluster(atoms=12)
    atoms.positions *= 1.6
    compiled = recorded(model, [moved(atoms, seed) for seed in range(4)])
    first = compiled.recording
    for scale in (0.9, 0.8, 0.6, 0.5, 0.45, 0.4):
        closer = atoms.copy()
        closer.positions *= scale
        assert_model(compiled, graph(model, closer))
    assert compiled.recording is not first
    for seed in range(6):
        assert_model(compiled, graph(model, moved(closer, seed, 0.01)))
    # what is far apart again fits as before
    recording = compiled.recording
    assert recording is not None
    assert_model(compiled, graph(model, atoms))
    assert compiled.recording is recording


def test_a_wrong_recording_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned()
    structures = [moved(cluster(), seed) for seed in range(6)]

    def wrong(step: Any, inputs: Any, parameters: Any) -> Any:
        return record(lambda *values: [value * 1.001 for value in step(*values)], inputs, parameters)

    monkeypatch.setattr(compiled_prediction, "record", wrong)
    compiled = CompiledPrediction(model)
    for atoms in structures:
        assert_model(compiled, graph(model, atoms))
    assert compiled.recording is None and compiled.eager_reason is not None and "off" in compiled.eager_reason


def test_what_is_never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_prediction, "MOST_EDGES", 1000)
    model = tuned()
    structures = [moved(cluster(), seed) for seed in range(5)]
    unwanted = CompiledPrediction(model, wanted=False)
    for atoms in structures:
        assert_model(unwanted, graph(model, atoms))
    assert unwanted.recording is None
    large = CompiledPrediction(model)
    single = CompiledPrediction(model)
    many = crystal().repeat((3, 3, 3))
    for seed in range(4):
        batch = graph(model, moved(many, seed))
        assert batch.n_edges > compiled_prediction.MOST_EDGES
        assert_model(large, batch, stress=True)
        assert_model(single, graph(model, Atoms("C")))
    assert large.recording is None and single.recording is None


def test_a_calculator_is_given_another_model() -> None:
    one, two = tuned(), tuned(seed=3)
    atoms = cluster()
    calculator = ForcetuneCalculator(one)
    for seed in range(5):
        calculator.calculate(moved(atoms, seed))
    calculator.backbone = two
    calculator.calculate(atoms)
    expected = two.predict(graph(two, atoms), stress=False)
    assert calculator.results["energy"] == pytest.approx(float(expected.energy.detach()), rel=1e-13)


def test_recording_leaves_other_threads_alone() -> None:
    """A plan is handed to the model in one thread, while another predicts other atoms with the same model."""
    model = tuned()
    batches = [graph(model, cluster(atoms=atoms)) for atoms in (9, 7)]
    expected = [model.predict(batch).detached() for batch in batches]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:

        def often(index: int) -> float:
            far = 0.0
            for _ in range(6):
                compiled = CompiledPrediction(model)
                for _ in range(5):
                    forces = compiled.predict(batches[index], stress=False).forces
                    far = max(far, float((forces - expected[index].forces).abs().max()))
            return far

        with ThreadPoolExecutor(2) as pool:
            assert max(pool.map(often, range(2))) < 1e-10
    finally:
        sys.setswitchinterval(switching)


def test_calculators_are_copied_and_stored_without_their_recordings() -> None:
    model = tuned()
    atoms = cluster()
    calculator = ForcetuneCalculator(model)
    for seed in range(5):
        calculator.calculate(moved(atoms, seed))
    assert calculator.compiled.recording is not None
    calculator.calculate(atoms)
    for other in (copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        assert other.compiled.recording is None and other.compiled.eager_reason is None
        for seed in range(4):
            other.calculate(moved(atoms, seed))
        other.calculate(atoms)
        assert other.results["energy"] == pytest.approx(calculator.results["energy"], rel=1e-13)
    off = ForcetuneCalculator(model, compile="off")
    for seed in range(5):
        off.calculate(moved(atoms, seed))
    assert off.compiled.recording is None
    with pytest.raises(InputError, match="'auto' or 'off'"):
        ForcetuneCalculator(model, compile="on")  # pyright: ignore[reportArgumentType]
