"""Dynamics that collect structures on which a tuned potential is not sure, and end where it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation

from forcetune.config import LearnConfig
from forcetune.deployment.watch import ExtrapolationError, Watch
from forcetune.errors import InputError
from forcetune.frames.unread import CHARGE_KEYS, MULTIPLICITY_KEYS

STATE_ARRAYS = ("numbers", "positions", "initial_magmoms", "initial_charges")
"""What belongs to a structure itself; velocities and labels do not."""
Ending = Literal["length", "uncertainty", "watch", "broken"]


@dataclass(frozen=True, slots=True, eq=False)
class Exploration:
    """One trajectory.

    Attributes:
        collected: structures beyond the bound, in their order; ``info`` has ``learn_step``, ``learn_temperature_k`` (of
            the thermostat) and ``learn_uncertainty`` (of the force, eV/Å).
        ended: after its full ``length``, by ``uncertainty``, by the ``watch``, or ``broken`` where nothing could be
            computed any more.
        reason: in words; empty after the full length.
        steps: carried out.
        looks: structures whose uncertainty was computed.
        beyond: of these beyond the bound.
        mean_std, largest_std: uncertainty over the looks, eV/Å.
    """

    collected: tuple[Atoms, ...]
    ended: Ending
    reason: str
    steps: int
    looks: int
    beyond: int
    mean_std: float
    largest_std: float


def explore(
    start: Atoms, plain: Calculator, sure: Calculator, watch: Watch, bound: float, options: LearnConfig, seed: list[int]
) -> Exploration:
    """Run Langevin dynamics with a temperature that rises evenly, and look at every so many structures.

    A structure is collected where the standard deviation of the force on some atom (root of the summed variances of the
    components) is beyond ``bound``. The dynamics end where it is ``options.stop`` times the bound, where the watch says
    so, or where nothing can be computed any more. If they break before anything was collected, the last structure that
    could be looked at is collected, as the trouble begins there.

    Args:
        start: structure; not changed.
        plain: calculator that moves it.
        sure: calculator with ``forces_std`` among its results.
        watch: what else ends the dynamics; it has to stop them.
        bound: eV/Å.
        options: length, temperatures and the like.
        seed: of velocities and thermostat.
    """
    trajectory = _Trajectory(sure, watch, bound, options)
    atoms = _prepared(start)
    atoms.calc = plain
    random = np.random.default_rng(seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=options.temperature, rng=random)
    Stationary(atoms)
    if not atoms.pbc.any():
        ZeroRotation(atoms)
    dynamics = Langevin(
        atoms,
        options.timestep * units.fs,
        temperature_K=options.temperature,
        friction=options.friction / units.fs,
        fixcm=False,
        rng=random,
    )
    last = max(1, round(1000 * options.picoseconds / options.timestep))
    final = options.temperature if options.final_temperature is None else options.final_temperature
    step = 0
    try:
        for step in range(last + 1):
            temperature = options.temperature + (final - options.temperature) * step / last
            if step:
                dynamics.set_temperature(temperature_K=temperature)
                dynamics.run(1)
            if step % options.every == 0 or step == last:
                trajectory.look(atoms, step, temperature)
            if trajectory.ended != "length":
                break
    except InputError as error:
        trajectory.end("broken", str(error))
    return trajectory.exploration(step)


def _prepared(start: Atoms) -> Atoms:
    """A copy without velocities, labels and remarks; charge and spin stay, and atoms that are held stay held."""
    atoms = start.copy()
    for name in [name for name in atoms.arrays if name not in STATE_ARRAYS]:
        del atoms.arrays[name]
    atoms.info = {name: atoms.info[name] for name in (*CHARGE_KEYS, *MULTIPLICITY_KEYS) if name in atoms.info}
    return atoms


class _Trajectory:
    """What is seen along one trajectory."""

    def __init__(self, sure: Calculator, watch: Watch, bound: float, options: LearnConfig) -> None:
        self.sure, self.watch, self.bound, self.options = sure, watch, bound, options
        self.collected: list[Atoms] = []
        self.deviations: list[float] = []
        self.ended: Ending = "length"
        self.reason = ""
        self._last: Atoms | None = None

    def look(self, atoms: Atoms, step: int, temperature: float) -> None:
        """Compute the uncertainty of a structure, collect it where it is beyond the bound, and see whether to go on."""
        self.sure.calculate(atoms, ["energy", "forces"])
        results: dict[str, Any] = self.sure.results
        deviations = np.linalg.norm(results["forces_std"], axis=1)
        atom, largest = int(deviations.argmax()), float(deviations.max())
        structure = _prepared(atoms)
        structure.info |= {"learn_step": step, "learn_temperature_k": temperature, "learn_uncertainty": largest}
        try:
            self.watch.check(step, atoms, results)
        except ExtrapolationError:
            self.end("watch", self.watch.flagged[-1][1])
            forces = np.linalg.norm(results["forces"], axis=1)
            if not (np.isfinite(forces).all() and forces.max() <= self.options.largest_force):
                return
        self.deviations.append(largest)
        if largest > self.bound or self.ended == "watch":
            self.collected.append(structure)
        if self.ended == "length" and largest > self.options.stop * self.bound:
            self.end(
                "uncertainty",
                f"the force on atom {atom} ({atoms.symbols[atom]}) is uncertain by {largest:.3g} eV/Å, above "
                f"{self.options.stop:g} times the bound of {self.bound:.3g}",
            )
        self._last = structure

    def end(self, ended: Ending, reason: str) -> None:
        """The dynamics end here."""
        self.ended, self.reason = ended, reason

    def exploration(self, steps: int) -> Exploration:
        """All of it."""
        collected = list(self.collected)
        if self.ended in ("broken", "watch") and not collected and self._last is not None:
            collected.append(self._last)
        deviations = self.deviations or [0.0]
        return Exploration(
            collected=tuple(collected),
            ended=self.ended,
            reason=self.reason,
            steps=steps,
            looks=len(self.deviations),
            beyond=sum(one > self.bound for one in self.deviations),
            mean_std=float(np.mean(deviations)),
            largest_std=float(np.max(deviations)),
        )
