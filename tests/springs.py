"""A labeller for tests: methanol held by springs, as the frames of :func:`systems.labelled` are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes

STIFFNESS = 5.0
"""eV/Å², as in :mod:`systems`."""


class Springs(Calculator):
    """E = −3000 eV + ½ k Σ (d − d₀)² over pairs.

    Args:
        log: file that gets a line for every structure that is computed.
        fails: structures from so many on raise an error, counted over all calculators that share the log.
        unconverged: it says that it has not converged.
        shift: eV, added to the energy.
    """

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 (as ASE declares it)

    def __init__(
        self,
        log: str | None = None,
        fails: tuple[int, ...] | list[int] = (),
        unconverged: bool = False,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.log, self.fails, self.shift = log, fails, shift
        self.converged = not unconverged

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        count = 0
        if self.log is not None:
            with Path(self.log).open("a") as stream:
                stream.write(" ".join(f"{value:.6f}" for value in atoms.positions.ravel()) + "\n")
            count = len(Path(self.log).read_text().splitlines())
        if count in self.fails:
            raise RuntimeError(f"the field of structure {count} did not converge")
        start = molecule("CH3OH")
        rest = start.get_all_distances() + np.eye(len(start))
        apart = atoms.positions[None] - atoms.positions[:, None]
        distance = np.linalg.norm(apart, axis=-1) + np.eye(len(start))
        energy = -3000.0 + self.shift + 0.25 * STIFFNESS * float(((distance - rest) ** 2).sum())
        forces = ((STIFFNESS * (distance - rest) / distance)[..., None] * apart).sum(axis=1)
        self.results = {"energy": energy, "forces": forces}


def no_calculator() -> object:
    """What makes no calculator."""
    return object()


def stops() -> object:
    """What ends the process, as scripts do."""
    raise SystemExit("no licence")
