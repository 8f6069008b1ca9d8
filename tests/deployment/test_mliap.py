"""The potential inside LAMMPS: by a stand-in that hands over ghosts, exchanges features and sums pair forces."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import molecule

import nequip_models
from forcetune.adapters.attach import attach, merge_weights
from forcetune.adapters.methods import method
from forcetune.backbones.network import NetworkBackbone
from forcetune.deployment.mliap import unified
from forcetune.deployment.mliap.stand_in import LammpsResult, run_lammps
from forcetune.deployment.mliap.unified import UnifiedPotential
from forcetune.errors import ForcetuneError
from forcetune.frames.frame import Frame
from forcetune.graphs.graph import build_graph
from models import ARCHITECTURES, default_dtype, make_mace
from sevennet_models import RECIPES, backbone_of, structures
from systems import backbone, cluster, crystal, frames_of, perturb


def copies(model: NetworkBackbone) -> Callable[[], UnifiedPotential]:
    """A potential for each rank, from a pickle as LAMMPS opens it."""
    written = pickle.dumps(UnifiedPotential(model))
    return lambda: pickle.loads(written)


def assert_same_as_predicted(
    model: NetworkBackbone, frame: Frame, result: LammpsResult, tolerance: float = 1e-10
) -> None:
    """Within an absolute tolerance, or a relative one where energies of random models are beyond 1 eV."""
    prediction = model.predict(build_graph(frame, model.cutoff, model.dtype), stress=True).detached()
    assert prediction.energies is not None and prediction.stress is not None
    pairs = [
        (np.array(result.energy), prediction.energy.numpy()[0]),
        (result.energies, prediction.energies.numpy()),
        (result.forces, prediction.forces.double().numpy()),
    ]
    # of random models with derivatives beyond all measure a backbone gives no stress
    if frame.pbc.all() and np.abs(result.virial).max() < 1e8:
        pairs.append((result.virial, -prediction.stress[0].double().numpy() * abs(np.linalg.det(frame.cell))))
    for ours, wanted in pairs:
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


RANKS: dict[str, Sequence[float]] = {
    "one rank": (),
    "two ranks": (0.5,),
    "one of four ranks is empty": (0.3, 0.31, 0.6),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mace_in_lammps(name: str) -> None:
    """Each architecture with gates: a molecule, and a skewed cell smaller than the cutoff, by one rank and two."""
    model = backbone(**ARCHITECTURES[name])
    perturb(attach(model, method("mmea")))
    for frame in frames_of(cluster(), crystal()):
        for bounds in ((), (0.5,)):
            assert_same_as_predicted(model, frame, run_lammps(copies(model), frame, bounds=bounds))


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.species != "univ"])
def test_sevennet_in_lammps(name: str) -> None:
    """A crystal, a cluster, a slab, one atom, and two out of reach of each other."""
    recipe = RECIPES[name]
    model = backbone_of(recipe, head=recipe.modalities[0] if recipe.modalities else None)
    perturb(attach(model, method("mmea")))
    for frame in frames_of(*structures(recipe.symbols)):
        assert_same_as_predicted(model, frame, run_lammps(copies(model), frame))


@pytest.mark.parametrize("name", nequip_models.RECIPES)
def test_nequip_in_lammps(name: str) -> None:
    """The same with two ranks, as ghosts have types that cutoffs, repulsion and norms depend on."""
    recipe = nequip_models.RECIPES[name]
    model = nequip_models.backbone_of(recipe)
    perturb(attach(model, method("mmea")))
    tolerance = 1e-4 if model.dtype == torch.float32 else 1e-10
    for frame in frames_of(*structures(recipe.symbols)):
        assert_same_as_predicted(model, frame, run_lammps(copies(model), frame, bounds=(0.5,)), tolerance)


@pytest.mark.parametrize("bounds", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("kind", ["mace", "sevennet", "nequip"])
def test_ranks_wait_for_each_other(kind: str, bounds: Sequence[float]) -> None:
    """Every rank exchanges as often as the others, one without atoms, too; features of the first layer are not sent."""
    model: NetworkBackbone
    if kind == "mace":
        model, layers = backbone(), 2
    elif kind == "sevennet":
        model, layers = backbone_of(RECIPES["parity, fully connected"]), 3
    else:
        model, layers = nequip_models.backbone_of(nequip_models.RECIPES["repulsion"]), 2
    frames = frames_of(
        cluster(model.elements), crystal(model.elements), cluster((8,), 3) if kind == "sevennet" else molecule("CO")
    )
    for frame in frames:
        result = run_lammps(copies(model), frame, bounds=bounds)
        assert_same_as_predicted(model, frame, result)
        assert result.exchanges == ((layers - 1, layers - 1),) * (len(bounds) + 1)


def test_a_box_smaller_than_the_cutoff_has_many_ghosts() -> None:
    model = backbone(elements=(6,))
    atoms = cluster((6,), 2)
    atoms.set_cell(np.diag([2.6, 2.4, 2.5]) + 0.3 * np.tri(3, k=-1))
    atoms.pbc = True
    (frame,) = frames_of(atoms)
    result = run_lammps(copies(model), frame)
    assert result.ghosts[0] > 30 * len(atoms)
    assert_same_as_predicted(model, frame, result)


@pytest.mark.parametrize("name", ["mmea", "elora", "bias"])
def test_adapters_merged_and_attached(name: str) -> None:
    model = backbone()
    adapter = attach(model, method(name))
    perturb(adapter)
    (frame,) = frames_of(crystal())
    attached = run_lammps(copies(model), frame)
    assert_same_as_predicted(model, frame, attached)
    if name == "elora":
        merge_weights(model)
        merged = run_lammps(copies(model), frame)
        assert_same_as_predicted(model, frame, merged)
        np.testing.assert_allclose(merged.forces, attached.forces, rtol=0, atol=1e-10)


def test_single_precision() -> None:
    model = backbone(dtype=torch.float32)
    (frame,) = frames_of(crystal())
    result = run_lammps(copies(model), frame, bounds=(0.4,))
    assert_same_as_predicted(model, frame, result, 1e-4)
    assert result.forces.dtype == np.float64


def test_lammps_without_exchange() -> None:
    """One layer needs none; more say what is missing."""
    (frame,) = frames_of(crystal())
    single = backbone(num_interactions=1)
    assert_same_as_predicted(single, frame, run_lammps(copies(single), frame, serial=True))
    with pytest.raises(ForcetuneError, match="cannot exchange features of ghost atoms"):
        run_lammps(copies(backbone()), frame, serial=True)


def test_neighbors_of_ghosts_are_refused() -> None:
    class WithGhosts(UnifiedPotential):
        def compute_forces(self, data: Any) -> None:
            data._first[-1] = data.nlocal
            super().compute_forces(data)

    (frame,) = frames_of(crystal())
    with pytest.raises(ForcetuneError, match="write 0 behind the file"):
        run_lammps(lambda: WithGhosts(backbone()), frame)


def test_what_the_comparison_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Derivatives that are not sent back, or features that are not sent, change forces."""
    model = backbone()
    (frame,) = frames_of(crystal())
    right = run_lammps(lambda: UnifiedPotential(model), frame)
    whole = unified._Exchange

    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> torch.Tensor:
            ctx.n_atoms = len(args[0])
            return whole.forward(ctx, *args)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return grads[0][: ctx.n_atoms], None, None

    monkeypatch.setattr(unified, "_Exchange", Forgetful)
    wrong = run_lammps(lambda: UnifiedPotential(model), frame)
    assert wrong.energy == pytest.approx(right.energy, abs=1e-12)
    assert np.abs(wrong.forces - right.forces).max() > 1e-3


def test_another_formats_file_says_who_wrote_it(monkeypatch: pytest.MonkeyPatch) -> None:
    written = pickle.dumps(UnifiedPotential(backbone()))
    monkeypatch.setattr(unified, "FORMAT", 2)
    with pytest.raises(ForcetuneError, match=r"written by forcetune .* in another format"):
        pickle.loads(written)


def test_the_stand_in_agrees_with_maces_own_object() -> None:
    """Signs, directions and exchanges are those that mace-torch's object for LAMMPS expects."""
    library = pytest.importorskip("mace.calculators.lammps_mliap_mace")
    module = make_mace()
    setattr(module, "lammps_mliap", True)  # noqa: B010 (mace's own flag, which no module declares)
    model = backbone()

    def load() -> Any:
        own = library.LAMMPS_MLIAP_MACE(pickle.loads(pickle.dumps(module)))
        own.interface = None
        return own

    with default_dtype(torch.float64):
        for frame in frames_of(cluster(), crystal()):
            assert_same_as_predicted(model, frame, run_lammps(load, frame))
