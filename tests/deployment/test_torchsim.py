"""The potential in torch-sim, against the ASE calculator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.io import read
from ase.md.verlet import VelocityVerlet

import forcetune
from forcetune.errors import ForcetuneWarning, InputError
from forcetune.magnetism.options import Magnetism
from sevennet_models import perturb, write_checkpoint
from simulations import (
    METALS,
    alloy,
    ethanol,
    metal_model,
    published_metal_model,
    skewed_water,
    total_energy_drift,
    tuned_mini,
    water_box,
    with_velocities,
)
from systems import backbone, cluster, crystal

torch_sim: Any = pytest.importorskip("torch_sim", reason="torch-sim is not installed (pip install forcetune[torchsim])")

from forcetune.torchsim import ForcetuneModel, mixed_state  # noqa: E402 (only with torch-sim)


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_mini(tmp_path_factory.mktemp("gates") / "adapter")


@pytest.fixture(scope="module")
def metals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return metal_model(tmp_path_factory.mktemp("metals"))


def state_of(structures: list[Atoms], model: ForcetuneModel) -> Any:
    return torch_sim.io.atoms_to_state(structures, model.device, model.dtype)


def started(state: Any, model: ForcetuneModel, timestep: float) -> tuple[Any, Any]:
    """A state of NVE at rest, and the function that makes a step of it; torch-sim 0.4 and later have other names."""
    step, cold = torch.tensor(timestep, dtype=model.dtype), torch.tensor(0.0, dtype=model.dtype)
    if hasattr(torch_sim, "nve"):
        init, update = torch_sim.nve(model, dt=step, kT=cold)
        return init(state), update
    return torch_sim.nve_init(state, model, kT=cold), lambda now: torch_sim.nve_step(now, model, dt=step)


def compare(output: dict[str, torch.Tensor], structures: list[Atoms], calculator: Any, exact: float = 1e-10) -> None:
    """Energies, forces, shares of atoms and stresses of a batch with those of each structure alone."""
    first = 0
    for index, atoms in enumerate(structures):
        one, part = atoms.copy(), slice(first, first + len(atoms))
        one.calc = calculator
        first += len(atoms)
        assert output["energy"][index].item() == pytest.approx(one.get_potential_energy(), abs=exact * len(atoms))
        np.testing.assert_allclose(output["forces"][part].numpy(), one.get_forces(), rtol=0, atol=exact)
        np.testing.assert_allclose(output["energies"][part].numpy(), one.get_potential_energies(), rtol=0, atol=exact)
        wanted = one.get_stress(voigt=False) if "stress" in calculator.results else np.zeros((3, 3))
        np.testing.assert_allclose(output["stress"][index].numpy(), wanted, rtol=0, atol=exact)
    assert len(output["forces"]) == first


@pytest.mark.parametrize("skin", [0.0, 0.5])
@pytest.mark.parametrize("count", [1, 8, 64])
def test_batches_of_molecules(count: int, skin: float, gates: Path) -> None:
    names = ("CH3CH2OH", "C6H6", "H2O", "CH3CHO", "C2H2")
    structures = [molecule(names[index % len(names)]) for index in range(count)]
    for index, atoms in enumerate(structures):
        atoms.rattle(0.05, seed=index)
    model = ForcetuneModel("mini", gates, skin=skin)
    output = model(state_of(structures, model))
    assert not any(value.requires_grad for value in output.values())
    compare(output, structures, forcetune.calculator("mini", gates, compile="off"))


def test_crystals_of_different_sizes(metals: Path) -> None:
    structures = [alloy((1, 1, 1)), bulk("Cu", "fcc", a=3.55), alloy((3, 2, 2), seed=7), bulk("Ni", "bcc", a=2.9)]
    model = ForcetuneModel(metals)
    compare(model(state_of(structures, model)), structures, forcetune.calculator(metals, compile="off"))


def test_a_published_model_of_metals() -> None:
    structures = [alloy((1, 1, 1)), bulk("Cu", "fcc", a=3.55)]
    model = ForcetuneModel(published_metal_model(), dtype="float64")
    calculator = forcetune.calculator("sevennet-0", dtype="float64", compile="off")
    compare(model(state_of(structures, model)), structures, calculator)


def test_periodic_boxes_of_a_molecular_model(gates: Path) -> None:
    structures = [water_box(), skewed_water(), water_box(1)]
    model = ForcetuneModel("mini", gates)
    compare(model(state_of(structures, model)), structures, forcetune.calculator("mini", gates, compile="off"))


def test_systems_periodic_in_different_directions(metals: Path) -> None:
    slab = fcc111("Cu", (1, 1, 3), vacuum=8.0)
    slab.pbc = (True, True, False)
    slab.rattle(0.05, seed=1)
    no_third_vector = slab.copy()
    no_third_vector.cell[2] = 0
    structures = [alloy((1, 1, 1)), no_third_vector, cluster((28, 29)), bulk("Cu", "fcc", a=3.6)]
    model = ForcetuneModel(metals, periodic="cell")
    calculator = forcetune.calculator(metals, compile="off")
    compare(model(mixed_state(structures, model)), structures, calculator)
    # a vector along an open direction belongs to no state; ASE's volume and with it the stress are another
    output = model(mixed_state([slab], model))
    slab.calc = calculator
    np.testing.assert_allclose(output["forces"].numpy(), slab.get_forces(), rtol=0, atol=1e-10)
    # a state that tells the directions, as torch-sim 0.6 has them
    for one in (structures := [slab.copy(), slab.copy()]):
        one.pbc = False
    state = state_of(structures, model)
    structures[0].pbc, structures[1].pbc = True, (True, True, False)
    state.pbc = torch.from_numpy(np.stack([one.pbc for one in structures]))
    compare(ForcetuneModel(metals)(state), structures, calculator)
    state.pbc = torch.tensor([True, True, False])
    structures[0].pbc = (True, True, False)
    compare(ForcetuneModel(metals)(state), structures, calculator)


def test_the_same_batch_while_atoms_move(gates: Path) -> None:
    """Neighbor lists and plans that serve several steps give what new ones give."""
    structures = [ethanol(seed) for seed in range(3)] + [molecule("C6H6")]
    model = ForcetuneModel("mini", gates, skin=0.6)
    calculator = forcetune.calculator("mini", gates, compile="off")
    rng = np.random.default_rng(0)
    for _ in range(12):
        for atoms in structures:
            atoms.positions += 0.04 * rng.standard_normal(atoms.positions.shape)
        compare(model(state_of(structures, model)), structures, calculator)
    assert 1 < model.batches.neighbors.searches < 7
    # other systems, as autobatching brings them
    others = structures[1:3]
    compare(model(state_of(others, model)), others, calculator)


def test_constant_energy_as_in_ase(gates: Path) -> None:
    """100 steps of velocity Verlet from the same velocities, and the drift."""
    structures = [with_velocities(ethanol(seed), 300, seed) for seed in range(3)]
    model = ForcetuneModel("mini", gates)
    state = state_of(structures, model)
    timestep = 0.5 * units.fs
    state, update = started(state, model, timestep)
    state.momenta = torch.tensor(np.concatenate([atoms.get_momenta() for atoms in structures]))
    calculators = [forcetune.calculator("mini", gates, compile="off") for _ in structures]
    dynamics = []
    for atoms, calculator in zip(structures, calculators, strict=True):
        atoms.calc = calculator
        dynamics.append(VelocityVerlet(atoms, timestep))
    totals = []
    for _ in range(101):
        kinetic = torch.zeros(3, dtype=model.dtype).index_add(
            0, state.system_idx, 0.5 * (state.momenta**2).sum(1) / state.masses
        )
        totals.append((state.energy + kinetic).numpy())
        state = update(state)
    for one in dynamics:
        one.run(101)
    wanted = np.concatenate([atoms.positions for atoms in structures])
    np.testing.assert_allclose(state.positions.numpy(), wanted, rtol=0, atol=1e-8)
    for energies, atoms in zip(np.array(totals).T, structures, strict=True):
        assert abs(total_energy_drift(energies, 0.5, len(atoms))) < 5.0


def test_relaxations_and_autobatching(metals: Path) -> None:
    structures = [alloy((1, 1, 1)), alloy((2, 1, 1)), alloy((1, 1, 1), seed=9)]
    model = ForcetuneModel(metals)
    assert model.memory_scales_with == "n_atoms_x_density"
    batcher = torch_sim.autobatching.BinningAutoBatcher(
        model, memory_scales_with=model.memory_scales_with, max_memory_scaler=800.0
    )
    properties = torch_sim.static(structures, model, autobatcher=batcher)
    calculator = forcetune.calculator(metals, compile="off")
    for atoms, row in zip(structures, properties, strict=True):
        atoms.calc = calculator
        assert row["potential_energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(row["stress"][0].numpy(), atoms.get_stress(voigt=False), rtol=0, atol=1e-10)
    assert len(batcher.index_bins) > 1


def test_single_precision(gates: Path) -> None:
    structures = [ethanol(), molecule("C6H6")]
    model = ForcetuneModel("mini", gates, dtype=torch.float32)
    output = model(state_of(structures, model))
    assert output["energy"].dtype == torch.float64 and output["forces"].dtype == torch.float32
    exact = ForcetuneModel("mini", gates, dtype="float64")
    wanted = exact(state_of(structures, exact))
    assert (output["forces"] - wanted["forces"]).abs().max() < 1e-4 * wanted["forces"].abs().max()
    assert (output["energy"] - wanted["energy"]).abs().max() < 1e-3


def test_ensembles(tmp_path: Path) -> None:
    folders = [tuned_mini(tmp_path / f"a{seed}", seed=seed) for seed in (1, 2, 3)]
    structures = [ethanol(), molecule("H2O")]
    model = ForcetuneModel("mini", folders)
    output = model(state_of(structures, model))
    calculator = forcetune.calculator("mini", folders)
    first = 0
    for index, atoms in enumerate(structures):
        atoms.calc = calculator
        assert output["energy"][index].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        assert output["energy_std"][index].item() == pytest.approx(calculator.results["energy_std"], abs=1e-9)
        part = slice(first, first + len(atoms))
        np.testing.assert_allclose(output["forces"][part], calculator.results["forces"], rtol=0, atol=1e-10)
        np.testing.assert_allclose(output["forces_std"][part], calculator.results["forces_std"], rtol=0, atol=1e-10)
        first += len(atoms)
    assert output["forces_std"].abs().max() > 1e-4


def test_watched_batches(tmp_path: Path, gates: Path) -> None:
    file = tmp_path / "flagged.xyz"
    frames = [ethanol(seed) for seed in range(10)]
    model = ForcetuneModel("mini", gates, watch=forcetune.Watch(frames=frames, novelty=5.0, file=file))
    structures = [ethanol(20), ethanol(21)]
    model(state_of(structures, model))
    structures[1].positions[3] += 1.2
    with pytest.raises(forcetune.ExtrapolationError, match="structure 1 of the simulation: system 1: the environment"):
        model(state_of(structures, model))
    np.testing.assert_allclose(read(file).positions, structures[1].positions, rtol=0, atol=1e-7)
    with pytest.raises(InputError, match="forces_std needs an ensemble"):
        ForcetuneModel("mini", gates, watch=forcetune.Watch(forces_std=0.1))


def test_torch_sims_own_validation(tmp_path: Path) -> None:
    """Its structures are of silicon and iron, and in later versions of magnesium and benzene."""
    from torch_sim.models.interface import validate_model_outputs

    checkpoint = write_checkpoint(tmp_path / "five.pth", replace(METALS, species=("H", "C", "Mg", "Si", "Fe")))
    model = ForcetuneModel(checkpoint, compute_stress=False)
    validate_model_outputs(model, model.device, model.dtype)
    assert model.compute_stress


def test_dictionaries_of_tensors(gates: Path) -> None:
    model = ForcetuneModel("mini", gates)
    state = state_of([ethanol()], model)
    names = ("positions", "cell", "pbc", "atomic_numbers", "system_idx")
    compare(model({name: getattr(state, name) for name in names}), [ethanol()], forcetune.calculator("mini", gates))


def test_refusals(gates: Path, metals: Path) -> None:
    model = ForcetuneModel("mini", gates)
    with pytest.raises(InputError, match="does not know the element Ni"):
        model(state_of([alloy()], model))
    with pytest.raises(InputError, match="lattice vectors are zero"):
        model({**vars(state_of([ethanol()], model)), "pbc": True})
    with pytest.raises(InputError, match="periodic='cell'"):
        mixed_state(ethanol(), model)
    with pytest.raises(InputError, match="structure 0 is periodic in a direction without"):
        mixed_state(Atoms("Cu", pbc=True), ForcetuneModel(metals, periodic="cell"))
    with pytest.raises(InputError, match="'state' or 'cell'"):
        ForcetuneModel("mini", periodic="mixed")
    with pytest.raises(InputError, match="skin=-1"):
        ForcetuneModel("mini", skin=-1)
    with pytest.raises(InputError, match="memory_scales_with"):
        ForcetuneModel("mini", memory_scales_with="n_edges")
    with pytest.raises(InputError, match="stays as it is"):
        model.to(torch.float32)
    with pytest.raises(InputError, match="no argument forces"):
        model(state_of([ethanol()], model), forces=True)
    state = state_of([ethanol()], model)
    state.charge = torch.tensor([1.0])
    with pytest.warns(ForcetuneWarning, match=r"have a charge \(charge\)"):
        model(state)


def test_spin_layers_are_refused_and_magnitudes_predicted() -> None:
    spins = backbone()
    forcetune.attach(spins, replace(forcetune.method("elora"), magnetism=Magnetism(layer="spin")))
    with pytest.raises(InputError, match="spin layer"):
        ForcetuneModel(spins)
    magnitudes = backbone()
    adapter = forcetune.attach(magnitudes, replace(forcetune.method("elora"), magnetism=Magnetism(layer="magnitude")))
    perturb(adapter)
    structures = [cluster(), crystal()]
    model = ForcetuneModel(magnitudes, periodic="cell")
    output = model(mixed_state(structures, model))
    for index, atoms in enumerate(structures):
        atoms.calc = forcetune.calculator(magnitudes, compile="off")
        part = slice(9 * index, 9 * index + len(atoms))
        np.testing.assert_allclose(output["magmoms"][part, 0].numpy(), atoms.get_magnetic_moments(), rtol=0, atol=1e-10)
        np.testing.assert_allclose(output["forces"][part].numpy(), atoms.get_forces(), rtol=0, atol=1e-10)
    assert output["magmoms"].abs().max() > 1e-3
