"""The card of the fine-tuning data."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

import numpy as np
from ase.data import chemical_symbols

from recipes.mini.dft import Level
from recipes.mini.sample import IntArray

TEXT = """# Fine-tuning data of `forcetune demo`

Molecule: `{smiles}` ({formula}, {atoms} atoms), neutral, closed shell, without a cell.

**Labels.** {level}, restricted Kohn–Sham, density fitting with PySCF's auxiliary basis, integration grid level {grid},
energy converged to {tolerance:g} hartree. The analytic gradients include the response of the grid; they differ from
finite differences of the energy by at most {error:.1e} eV/Å (checked on the first training frame). `REF_energy` is the
total energy in eV, `REF_forces` are in eV/Å, with the constants of ASE (CODATA 2014).

**Structures.** Langevin dynamics on the GFN2-xTB surface, {every} fs from frame to frame. Every part has a trajectory
of its own at every temperature, so that no test frame is a neighbour in time of a training frame. Frames in which a
bond broke are not taken.

| part | K | frames | dropped | mean energy, eV | its spread, eV | rms force component, eV/Å | longest force, eV/Å |
|---|---|---|---|---|---|---|---|
{rows}

Dropped are frames whose field did not converge, or with a net force or torque above 0.02 eV/Å (eV), or with a force
above {max_force:.0f} eV/Å.

**How.** `python -m recipes.mini.finetuning_data --out FOLDER`, with {codes}, Python {python}.

**Limits.** One molecule, one basis of double-zeta size: made to show and test fine-tuning, not to study the molecule.

**Licence.** MIT, as the package.
"""


def card(
    smiles: str,
    numbers: IntArray,
    level: Level,
    temperatures: Mapping[str, tuple[float, ...]],
    figures: Mapping[str, Mapping[str, float]],
    *,
    every: int,
    error: float,
    max_force: float,
) -> str:
    """The data card, markdown.

    Args:
        smiles, numbers: the molecule.
        level: of the labels.
        temperatures: per part, K.
        figures: per part, as :func:`recipes.mini.finetuning_data.make` returns them.
        every: fs between frames.
        error: of the forces against finite differences, eV/Å.
        max_force: eV/Å.
    """
    rows = [
        f"| {name} | {', '.join(f'{value:.0f}' for value in temperatures[name])} | {row['frames']:.0f} | "
        f"{row['dropped']:.0f} | {row['energy_mean']:.3f} | {row['energy_std']:.3f} | {row['forces_rms']:.3f} | "
        f"{row['force_max']:.2f} |"
        for name, row in figures.items()
    ]
    kinds, counts = np.unique(numbers, return_counts=True)
    return TEXT.format(
        smiles=smiles,
        formula="".join(f"{chemical_symbols[kind]}{count}" for kind, count in zip(kinds, counts, strict=True)),
        atoms=len(numbers),
        level=level,
        grid=level.grid,
        tolerance=level.tolerance,
        error=error,
        every=every,
        rows="\n".join(rows),
        max_force=max_force,
        codes=", ".join(f"{name} {version(name)}" for name in ("pyscf", "tblite", "rdkit", "ase", "numpy")),
        python=platform.python_version(),
    )
