"""Simulations stop where the potential is no longer to be trusted, and leave the structure behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.io import read
from ase.md.verlet import VelocityVerlet

import forcetune
from forcetune.deployment.calculator import build_frame
from forcetune.deployment.environments import Environments
from forcetune.errors import ForcetuneWarning, InputError
from simulations import alloy, ethanol, tuned_mini, with_velocities


def _stretched(by: float) -> Atoms:
    """Ethanol whose hydroxyl hydrogen is farther out, Å."""
    atoms = ethanol()
    bond = atoms.positions[3] - atoms.positions[2]
    atoms.positions[3] += by * bond / np.linalg.norm(bond)
    return atoms


def test_novelty_of_surroundings() -> None:
    frames = [build_frame(ethanol(seed)) for seed in range(40)]
    environments = Environments(frames)
    # the definition: 99 % of the set's own atoms are nearer than 1 to one of another frame
    others = [Environments([*frames[:index], *frames[index + 1 :]]) for index in (0, 17)]
    assert environments.novelty(frames[3]).max() == pytest.approx(0.0, abs=1e-9)
    usual = np.concatenate([others[0].novelty(frames[0]), others[1].novelty(frames[17])])
    assert 0.1 < np.median(usual) < 1.0 and usual.max() < 2.5
    assert environments.novelty(build_frame(ethanol(99))).max() < 2.5
    turned = ethanol(7)
    turned.rotate(40, (1, 2, 3))
    turned.translate([3, -2, 9])
    assert environments.novelty(build_frame(turned)).max() < 1e-6
    novelty = [environments.novelty(build_frame(_stretched(by))) for by in (0.2, 0.6, 1.5)]
    assert [int(one.argmax()) for one in novelty] == [3, 3, 3]
    assert 1 < novelty[0].max() < novelty[1].max() < novelty[2].max()
    strange = ethanol()
    strange.numbers[0] = 7
    actual = environments.novelty(build_frame(strange))
    assert np.isinf(actual[0]) and np.isinf(actual[1])
    far = ethanol() + Atoms("N", [[30.0, 0, 0]])
    assert np.isfinite(environments.novelty(build_frame(far))).sum() == len(far) - 1


def test_dynamics_stop_at_surroundings_unlike_the_frames(tmp_path: Path) -> None:
    """A bond is pulled apart by a push; the structure that ended it is in the file."""
    frames = [ethanol(seed) for seed in range(30)]
    file = tmp_path / "flagged.xyz"
    atoms = ethanol()
    atoms.calc = forcetune.watch(forcetune.calculator("mini", compile="off"), frames=frames, novelty=4.0, file=file)
    momenta = np.zeros((len(atoms), 3))
    momenta[3] = 2.0 * (atoms.positions[3] - atoms.positions[2])
    atoms.set_momenta(momenta)
    dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
    with pytest.raises(forcetune.ExtrapolationError, match=r"environment of atom \d \(\w\) is .* above 4") as stopped:
        dynamics.run(200)
    stored = read(file)
    assert stopped.value.step == stored.info["step"] > 1
    np.testing.assert_allclose(stored.positions, atoms.positions, rtol=0, atol=1e-7)
    assert stored.arrays["novelty"].max() > 4 and "environment" in stored.info["reason"]
    calm = stored.copy()
    calm.calc = forcetune.calculator("mini", compile="off")
    assert stored.get_potential_energy() == pytest.approx(calm.get_potential_energy(), abs=1e-6)


def test_members_that_disagree(tmp_path: Path) -> None:
    folders = [tuned_mini(tmp_path / f"a{seed}", seed=seed) for seed in (1, 2)]
    ensemble = forcetune.calculator("mini", folders)
    atoms = with_velocities(ethanol(), 300)
    ensemble.calculate(atoms)
    spread = np.linalg.norm(ensemble.results["forces_std"], axis=1)
    file = tmp_path / "flagged.xyz"
    atoms.calc = forcetune.watch(ensemble, forces_std=1.01 * spread.max(), file=file)
    assert np.isfinite(atoms.get_potential_energy())
    assert not file.exists()
    atoms.calc = forcetune.watch(ensemble, forces_std=0.99 * spread.max(), file=file)
    with pytest.raises(
        forcetune.ExtrapolationError, match=rf"force on atom {spread.argmax()} .* by {spread.max():.3g}"
    ):
        atoms.get_potential_energy()
    np.testing.assert_allclose(read(file).arrays["forces_std"], ensemble.results["forces_std"], rtol=0, atol=1e-7)


def test_a_simulation_that_goes_on(tmp_path: Path) -> None:
    """It warns once, counts, and stores; results are the calculator's."""
    file = tmp_path / "flagged.xyz"
    atoms = with_velocities(alloy((1, 1, 1)), 300)
    watched = forcetune.watch(EMT(), largest_force=1e-3, file=file, stop=False, every=2)
    atoms.calc = watched
    with pytest.warns(ForcetuneWarning, match=r"force on atom \d .* above 0\.001; .* continues"):
        VelocityVerlet(atoms, units.fs).run(6)
    assert [step for step, _ in watched.watch.flagged] == [0, 2, 4, 6]
    assert [one.info["step"] for one in read(file, ":")] == [0, 2, 4, 6]
    alone = atoms.copy()
    alone.calc = EMT()
    np.testing.assert_allclose(atoms.get_forces(), alone.get_forces(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(atoms.get_stress(), alone.get_stress(), rtol=0, atol=1e-12)


class _Broken(EMT):
    def calculate(self, *arguments: object, **options: object) -> None:
        super().calculate(*arguments, **options)
        self.results["forces"][1] = np.nan


@pytest.mark.parametrize("stop", [True, False])
def test_forces_that_are_not_finite_stop_always(tmp_path: Path, stop: bool) -> None:
    atoms = alloy((1, 1, 1))
    atoms.calc = forcetune.watch(_Broken(), largest_force=1e9, file=tmp_path / "f.xyz", every=1000, stop=stop)
    atoms.calc.watch.step = 1
    with pytest.raises(forcetune.ExtrapolationError, match=r"force on atom 1 \(Cu\) is not finite"):
        atoms.get_forces()
    assert (tmp_path / "f.xyz").exists()


def test_refusals(tmp_path: Path) -> None:
    mini = forcetune.calculator("mini")
    for options, message in (
        ({"forces_std": 0.1}, "needs an ensemble"),
        ({}, "nothing to look for"),
        ({"largest_force": 0}, "largest_force=0"),
        ({"frames": [ethanol()]}, "1 frames are too few"),
        ({"frames": tmp_path / "missing.xyz"}, "missing.xyz"),
    ):
        with pytest.raises(InputError, match=message):
            forcetune.watch(mini, **options)


def test_frames_of_a_file() -> None:
    watched = forcetune.watch(forcetune.calculator("mini"), frames=forcetune.demo_file("train"), novelty=1.5)
    atoms = read(forcetune.demo_file("test"), 0)
    atoms.calc = watched
    assert np.isfinite(atoms.get_potential_energy())
    assert watched.results["novelty"].shape == (len(atoms),)
