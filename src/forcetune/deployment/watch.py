"""Long simulations that stop where the potential is no longer to be trusted, with the structure written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.singlepoint import SinglePointCalculator

from forcetune.deployment.calculator import EnsembleCalculator, build_frame
from forcetune.deployment.environments import Environments
from forcetune.errors import ForcetuneError, InputError, warn
from forcetune.frames.frame import FloatArray
from forcetune.frames.read import read_frames
from forcetune.utils.files import atomic_path

MOST_FRAMES = 100
"""Flagged structures in the file of a simulation that goes on."""


class ExtrapolationError(ForcetuneError):
    """A simulation has left what its potential is to be trusted for.

    Attributes:
        atoms: the structure, with its energy and forces.
        step: how many structures were computed before it.
    """

    def __init__(self, message: str, atoms: Atoms, step: int) -> None:
        super().__init__(message)
        self.atoms = atoms
        self.step = step


@dataclass
class Watch:
    """What to look for in every structure of a simulation, and what to do then.

    Forces that are not finite are looked for always.

    Attributes:
        forces_std: eV/Å, the largest spread of an ensemble's forces on an atom (root of the summed variances of the
            components).
        frames: training frames, a file or ASE's atoms, whose surroundings atoms are compared with, or these
            surroundings where several simulations share them.
        novelty: how far from them an atom's surroundings may be, 1 being usual among the frames themselves
            (:class:`forcetune.deployment.environments.Environments`).
        largest_force: eV/Å, on an atom.
        file: where flagged structures go, as extended XYZ with energy, forces and what was looked at.
        stop: end with an :class:`ExtrapolationError`; otherwise warn once, and store up to 100 structures in the file.
        every: look at every so many structures.
        flagged: steps and reasons so far.
    """

    forces_std: float | None = None
    frames: str | Path | Sequence[Atoms] | Environments | None = None
    novelty: float = 3.0
    largest_force: float | None = None
    file: str | Path = "flagged.xyz"
    stop: bool = True
    every: int = 1
    flagged: list[tuple[int, str]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: a limit that is none, or frames that cannot be read.
        """
        for name in ("forces_std", "novelty", "largest_force", "every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}={value!r}: must be larger than 0.")
        if not isinstance(self.every, int):
            raise InputError(f"every={self.every!r}: must be a whole number of structures.")
        self.step = 0
        self._structures: list[Atoms] = []
        frames = self.frames
        if frames is not None and not isinstance(frames, Environments):
            frames = Environments(_as_frames(frames))
        self._environments = frames

    def look(self, atoms: Atoms, results: dict[str, Any]) -> dict[str, FloatArray]:
        """Look at one structure, and count it.

        Args:
            atoms: the structure.
            results: ``energy``, ``forces`` and of an ensemble ``forces_std``, as an ASE calculator has them.

        Returns:
            ``novelty``, (atoms,), where frames were given and this structure was looked at.

        Raises:
            ExtrapolationError: it is beyond a limit and ``stop`` is set; the structure has been written.
        """
        step, self.step = self.step, self.step + 1
        if step % self.every and np.isfinite(results["forces"]).all():
            return {}
        return self.check(step, atoms, results)

    def check(self, step: int, atoms: Atoms, results: dict[str, Any], place: str = "") -> dict[str, FloatArray]:
        """:meth:`look`, of whatever structure and without counting; ``place`` says which of several it is.

        Raises:
            ExtrapolationError: as :meth:`look`.
        """
        values: dict[str, FloatArray] = {}
        if self._environments is not None:
            values["novelty"] = self._environments.novelty(build_frame(atoms))
        reason = self._reason(atoms, np.asarray(results["forces"]), results, values)
        if reason is not None:
            self._flag(step, place + reason, atoms, results, values)
        return values

    def _reason(
        self, atoms: Atoms, forces: FloatArray, results: dict[str, Any], values: dict[str, FloatArray]
    ) -> str | None:
        def named(atom: int) -> str:
            return f"atom {atom} ({atoms.symbols[atom]})"

        size = np.linalg.norm(forces, axis=1)
        if not np.isfinite(size).all():
            return f"the force on {named(int(np.argmax(~np.isfinite(size))))} is not finite"
        if self.largest_force is not None and size.max() > self.largest_force:
            return f"the force on {named(int(size.argmax()))} is {size.max():.3g} eV/Å, above {self.largest_force:g}"
        if self.forces_std is not None:
            spread = np.linalg.norm(results["forces_std"], axis=1)
            if not spread.max() <= self.forces_std:
                return (
                    f"the members disagree on the force on {named(int(spread.argmax()))} by {spread.max():.3g} eV/Å, "
                    f"above {self.forces_std:g}"
                )
        if "novelty" in values and not values["novelty"].max() <= self.novelty:
            atom = int(values["novelty"].argmax())
            return (
                f"the environment of {named(atom)} is {values['novelty'][atom]:.3g} times as far from the training "
                f"frames as is usual among them, above {self.novelty:g}"
            )
        return None

    def _flag(
        self, step: int, reason: str, atoms: Atoms, results: dict[str, Any], values: dict[str, FloatArray]
    ) -> None:
        self.flagged.append((step, reason))
        structure = atoms.copy()
        structure.calc = SinglePointCalculator(structure, energy=results["energy"], forces=results["forces"])
        structure.info |= {"step": step, "reason": reason}
        for name, value in values.items():
            structure.arrays[name] = np.asarray(value)
        if "forces_std" in results:
            structure.arrays["forces_std"] = np.asarray(results["forces_std"])
        if len(self._structures) < MOST_FRAMES:
            self._structures.append(structure)
            with atomic_path(self.file) as temporary:
                ase.io.write(temporary, self._structures, format="extxyz")
        message = f"structure {step} of the simulation: {reason}; it is in {self.file}."
        if self.stop or not np.isfinite(results["forces"]).all():
            raise ExtrapolationError(message, structure, step)
        if len(self.flagged) == 1:
            warn(f"{message} The simulation continues; later ones are counted and stored without a warning.")


def _as_frames(frames: str | Path | Sequence[Atoms]) -> Any:
    if isinstance(frames, (str, Path)):
        keys = dict.fromkeys(("energy_key", "forces_key", "stress_key"), "none")
        return read_frames(frames, require=(), **keys).frames
    return [build_frame(atoms) for atoms in frames]


class WatchedCalculator(Calculator):
    """A calculator that looks at every structure it computes; ``results["novelty"]`` is added where it is known.

    Attributes:
        inner: the calculator.
        watch: what is looked for, and what was flagged.
    """

    def __init__(self, inner: Calculator, watch: Watch) -> None:
        super().__init__()
        self.inner = inner
        self.watch = watch
        self.implemented_properties = list(inner.implemented_properties)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """
        Raises:
            ExtrapolationError: as :meth:`Watch.look`.
            InputError: as the calculator.
        """
        super().calculate(atoms, list(properties), list(system_changes))
        self.results = {}
        assert self.atoms is not None
        self.inner.calculate(self.atoms, list(properties), list(system_changes))
        further = self.watch.look(self.atoms, self.inner.results)
        self.results = {**self.inner.results, **further}


def watch(
    calculator: Calculator,
    *,
    forces_std: float | None = None,
    frames: str | Path | Sequence[Atoms] | None = None,
    novelty: float = 3.0,
    largest_force: float | None = None,
    file: str | Path = "flagged.xyz",
    stop: bool = True,
    every: int = 1,
) -> WatchedCalculator:
    """A calculator that stops a simulation where the potential is no longer to be trusted.

    It works wherever an ASE calculator does: ASE, LAMMPS, OpenMM, i-PI.

    >>> atoms.calc = forcetune.watch(forcetune.calculator(adapter=["run1", "run2", "run3"]), forces_std=0.5)

    Args:
        calculator: of ASE; for ``forces_std`` one of an ensemble.
        forces_std, frames, novelty, largest_force, file, stop, every: as :class:`Watch`.

    Raises:
        InputError: ``forces_std`` without an ensemble, nothing to look for, or as :class:`Watch`.
    """
    if forces_std is not None and not isinstance(calculator, EnsembleCalculator):
        raise InputError(
            "forces_std needs an ensemble, whose members can disagree: forcetune.calculator(adapter=['run1', 'run2'])."
        )
    if forces_std is None and frames is None and largest_force is None:
        raise InputError("nothing to look for: give forces_std, frames or largest_force.")
    watcher = Watch(
        forces_std=forces_std,
        frames=frames,
        novelty=novelty,
        largest_force=largest_force,
        file=file,
        stop=stop,
        every=every,
    )
    return WatchedCalculator(calculator, watcher)
