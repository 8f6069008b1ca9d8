"""The calculator with neighbors searched on the model's device, on the CPU and on a device without values."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.deployment.calculator import ForcetuneCalculator, build_frame
from forcetune.deployment.moving_batch import MovingBatch
from forcetune.errors import InputError
from forcetune.graphs import verlet_list
from forcetune.kernels.edge_plan import Plan
from forcetune.magnetism.options import Magnetism
from simulations import tuned_mini
from systems import backbone, cluster, crystal, perturb


def tuned(name: str = "mmea", **options: Any) -> MaceBackbone:
    model = backbone(max_ell=1, correlation=2, hidden_irreps="4x0e+4x1o", elements=(1, 6, 7, 8), **options)
    perturb(attach(model, method(name)))
    return model


def slab() -> Atoms:
    atoms = crystal((1, 6))
    atoms.pbc = (True, True, False)
    atoms.set_cell(atoms.cell.array * [[1], [1], [0]])
    return atoms


def tiny() -> Atoms:
    """A cell smaller than the cutoff."""
    atoms = bulk("C", "diamond", a=3.5)
    atoms.rattle(0.05, seed=1)
    return atoms


STRUCTURES = {"cluster": cluster, "crystal": crystal, "slab": slab, "tiny cell": tiny}


def assert_alike(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(np.asarray(value), np.asarray(other[name]), rtol=1e-12, atol=tolerance, err_msg=name)


def results(calculator: ForcetuneCalculator, atoms: Atoms) -> dict[str, Any]:
    atoms.calc = calculator
    atoms.get_forces()
    return dict(calculator.results)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_are_those_with_neighbors_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    model = tuned(dtype=dtype)
    atoms = STRUCTURES[name]()
    here = ForcetuneCalculator(model, neighbors="cpu", compile="off")
    there = ForcetuneCalculator(model, neighbors="device", compile="off")
    assert ForcetuneCalculator(model)._on_device is False
    rng = np.random.default_rng(0)
    for step in range(12):
        atoms.positions += 0.02 * rng.standard_normal(atoms.positions.shape)
        if step == 8 and atoms.pbc.all():
            atoms.set_cell(atoms.cell.array * 1.3, scale_atoms=True)
        assert_alike(results(there, atoms), results(here, atoms), 1e-10 if dtype == torch.float64 else 2e-4)
    moving = there._moving
    assert moving is not None and 1 <= moving.neighbors.searches < 12
    assert here._moving is None


def test_other_structures_one_after_another() -> None:
    model = tuned()
    here, there = ForcetuneCalculator(model), ForcetuneCalculator(model, neighbors="device")
    for make in (*STRUCTURES.values(), cluster):
        assert_alike(results(there, make()), results(here, make()), 1e-10)
    with pytest.raises(InputError, match="are at the same place"):
        results(there, Atoms("HH", [[0, 0, 0], [0, 0, 0]]))
    with pytest.raises(InputError, match="its lattice vectors are zero"):
        results(there, Atoms("H", pbc=True))
    with pytest.raises(InputError, match="Fe"):
        results(there, Atoms("Fe"))
    with pytest.raises(InputError, match="neighbors='gpu'"):
        ForcetuneCalculator(model, neighbors="gpu")  # pyright: ignore[reportArgumentType]


def test_a_spin_layer_and_an_ensemble(tmp_path: Path) -> None:
    model = backbone(max_ell=1, correlation=2, hidden_irreps="4x0e+4x1o", elements=(1, 6, 7, 8))
    perturb(attach(model, replace(method("readout"), magnetism=Magnetism(layer="spin", spin_orbit=True))))
    atoms = crystal()
    atoms.set_initial_magnetic_moments(np.random.default_rng(0).normal(size=(len(atoms), 3)))
    here, there = ForcetuneCalculator(model), ForcetuneCalculator(model, neighbors="device")
    expected = results(here, atoms.copy())
    assert "effective_field" in expected and "magmoms" in expected
    assert_alike(results(there, atoms.copy()), expected, 1e-10)

    runs = [tuned_mini(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    ensemble = forcetune.calculator(adapter=runs, device="cpu")
    expected = results(ensemble, molecule("CH3CH2OH"))
    assert expected["forces_std"].max() > 1e-4
    there = forcetune.calculator(adapter=runs, device="cpu", neighbors="device")
    assert_alike(results(there, molecule("CH3CH2OH")), expected, 1e-10)
    assert there._moving is not None and ensemble._moving is None


def test_the_choice_by_forcetune_calculator() -> None:
    here, there = (forcetune.calculator("mini", device="cpu", neighbors=place) for place in ("cpu", "device"))
    assert (here.neighbors, there.neighbors) == ("cpu", "device")
    assert_alike(results(there, molecule("CH3CH2OH")), results(here, molecule("CH3CH2OH")), 1e-10)
    assert there._moving is not None and here._moving is None
    with pytest.raises(InputError, match="neighbors='gpu'"):
        forcetune.calculator("mini", neighbors="gpu")  # pyright: ignore[reportArgumentType]


def moved(value: Any) -> Any:
    """Tensors, plans and tuples of them without values."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, Plan) or hasattr(value, "oriented"):
        return replace(value, **{one.name: moved(getattr(value, one.name)) for one in fields(value)})
    return tuple(map(moved, value)) if isinstance(value, tuple) else value


def test_a_step_with_a_list_that_serves_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the host waits for is whether the list still serves; a stray tensor of the CPU would fail."""
    model = tuned()
    frame = build_frame(crystal())
    moving = MovingBatch(model, skin=0.5, compile=False)
    (expected,) = moving.predict(moving.frame_batch(frame), stress=True)
    edges, reference, plan = moving.neighbors._edges, moving.neighbors._reference, moving._plan
    assert edges is not None and reference is not None and plan is not None
    model.to("meta")
    there = MovingBatch(model, skin=0.5, compile=False)
    assert not moving.serves(model) and there.serves(model)
    there.neighbors._edges = type(edges)(*map(moved, edges))
    there.neighbors._reference = type(reference)(*map(moved, reference))
    there._plan = (there.neighbors._edges.edge_index, moved(plan[1]))
    waits: list[torch.device] = []

    def serves(values: torch.Tensor) -> list[int]:
        waits.append(values.device)
        return [1]

    monkeypatch.setattr(verlet_list, "read_back", serves)
    there.predict(there.frame_batch(frame), stress=True)
    (prediction,) = there.predict(there.frame_batch(frame), stress=True)
    assert waits == [torch.device("meta")] * 2 and there.neighbors.searches == 0
    for name in ("energy", "forces", "stress", "energies"):
        one, two = getattr(prediction, name), getattr(expected, name)
        assert one.device.type == "meta" and one.shape == two.shape and one.dtype == two.dtype
