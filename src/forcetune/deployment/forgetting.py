"""What a tuned model forgot of its base, and whether it is safe to run: three short checks after every fit.

1. Structures it was not tuned on: tuned model against base, reference energies taken out, forces as they are. These
   are the replay frames held out, where the run has replay. Without, they are small molecules of the data's elements
   (from ASE's G2 set, shaken, compositions of the data left out): they come with ASE, and a base for molecules knows
   their chemistry. Where the elements form too few of them (oxides, metals) validation frames are shaken so hard that
   no training frame is like them. A level of theory moves these predictions, too, so that the figure is a distance
   and no error.
2. Dimers of all pairs of elements at short distances: does the model repel? Fits to equilibrium data may open holes
   that dynamics then fall into. A hole is named where the base has none.
3. Dynamics at constant energy from the first validation frame: does the energy stay?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.collections import g2
from ase.data import chemical_symbols, covalent_radii

from forcetune.adapters.attach import disable_adapter
from forcetune.backbones.protocol import Backbone
from forcetune.deployment.calculator import ForcetuneCalculator, build_frame
from forcetune.deployment.dynamics import energy_conservation
from forcetune.errors import ForcetuneError
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from forcetune.evaluation.summaries import Dimer, Distance, Forgetting, Stability
from forcetune.frames.dataset import Dataset
from forcetune.frames.frame import Frame

MOST_MOLECULES = 24
LEAST_MOLECULES = 4
DISTANCES = np.linspace(0.4, 1.2, 17)
"""Of dimers, in units of the sum of covalent radii."""
_REPELS_BELOW = 0.7
_HOLE = 0.1  # eV/Å that pull two atoms together at such a distance
_REACHED = 10.0  # eV; what two atoms may climb in dynamics that are not themselves nonsense
_MOST_PAIRS = 36
_PICOSECONDS = 0.1
_SECONDS = 5.0


def measure_forgetting(backbone: Backbone, dataset: Dataset, held: Sequence[Frame] = ()) -> Forgetting:
    """Compare a tuned model with its base where it was not tuned.

    Args:
        backbone: with the trained adapter attached; left as it was.
        dataset: of the run.
        held: replay frames that were not trained on.
    """
    source, frames = _structures(dataset, held)
    distance = _distance(backbone, source, frames)
    dimers = _dimers(backbone, dataset.elements)
    stability = _stability(backbone, dataset.valid.frames[0])
    warnings = [
        f"{dimer.pair}: the tuned model pulls the atoms together below {dimer.tuned_hole_ang:.2f} Å, where its base "
        f"repels, behind a barrier of {dimer.tuned_barrier_ev:.1f} eV only; hot dynamics may collapse there. Add short "
        "distances to the data."
        for dimer in dimers
        if dimer.tuned_hole_ang is not None
        and dimer.base_hole_ang is None
        and dimer.tuned_barrier_ev is not None
        and dimer.tuned_barrier_ev < _REACHED
    ]
    if stability.failure is not None:
        warnings.append(f"dynamics from the first validation frame broke down: {stability.failure}")
    return Forgetting(distance, dimers, stability, tuple(warnings))


def _structures(dataset: Dataset, held: Sequence[Frame]) -> tuple[str, list[Frame]]:
    if held:
        return "replay frames", list(held)
    generator = np.random.default_rng(0)
    known = set(dataset.elements)
    tuned_on = {tuple(np.sort(frame.numbers)) for part in dataset.splits.values() for frame in part.frames}
    molecules = [
        atoms
        for atoms in map(molecule, g2.names)
        if len(atoms) > 2 and known.issuperset(atoms.numbers) and tuple(np.sort(atoms.numbers)) not in tuned_on
    ]
    if len(molecules) >= LEAST_MOLECULES:
        chosen = [molecules[int(i)] for i in np.linspace(0, len(molecules) - 1, min(MOST_MOLECULES, len(molecules)))]
        return "molecules", [_shaken(build_frame(atoms), 0.05, generator) for atoms in chosen]
    frames = dataset.valid.frames[:10]
    return "shaken validation frames", [_shaken(frame, 0.2, generator) for frame in frames]


def _shaken(frame: Frame, width: float, generator: np.random.Generator) -> Frame:
    moved = frame.positions + width * generator.standard_normal(frame.positions.shape)
    return replace(frame, positions=moved, energy=None, forces=None, stress=None)


def _both(backbone: Backbone, frames: Sequence[Frame]) -> tuple[Predictions, Predictions]:
    """Predictions of base and tuned model without reference energies."""
    graphs = build_graphs(backbone, [replace(frame, stress=None) for frame in frames])

    def bare() -> Predictions:
        return predict(backbone, graphs).shifted({z: -energy for z, energy in backbone.reference_energies.items()})

    tuned = bare()
    with disable_adapter(backbone):
        return bare(), tuned


def _distance(backbone: Backbone, source: str, frames: Sequence[Frame]) -> Distance:
    base, tuned = _both(backbone, frames)
    energy = np.abs(tuned.energy - base.energy) / base.atoms
    forces = np.abs(tuned.forces - base.forces)
    return Distance(source, len(frames), 1e3 * float(energy.mean()), 1e3 * float(forces.mean()))


def _dimers(backbone: Backbone, elements: Sequence[int]) -> tuple[Dimer, ...]:
    # dozens of elements have thousands of pairs
    pairs = list(combinations_with_replacement(elements, 2))[:_MOST_PAIRS]
    frames = []
    for one, other in pairs:
        for distance in DISTANCES * (covalent_radii[one] + covalent_radii[other]):
            frames.append(build_frame(Atoms([one, other], [(0, 0, 0), (0, 0, distance)])))
    base, tuned = _both(backbone, frames)
    curves = []
    for index, (one, other) in enumerate(pairs):
        rows = slice(index * len(DISTANCES), (index + 1) * len(DISTANCES))
        radii = covalent_radii[one] + covalent_radii[other]
        walls = [float(model.energy[rows][0] - model.energy[rows][-1]) for model in (base, tuned)]
        holes = [_hole(model.forces.reshape(-1, 2, 3)[rows], radii) for model in (base, tuned)]
        barrier = None
        if holes[1] is not None:
            outside = tuned.energy[rows][(1 - 1e-9) * holes[1] <= radii * DISTANCES]
            barrier = float(outside.max() - outside.min())
        symbols = f"{chemical_symbols[one]}–{chemical_symbols[other]}"
        curves.append(
            Dimer(
                pair=symbols,
                closest_ang=float(DISTANCES[0] * radii),
                base_wall_ev=walls[0],
                tuned_wall_ev=walls[1],
                base_hole_ang=holes[0],
                tuned_hole_ang=holes[1],
                tuned_barrier_ev=barrier,
            )
        )
    return tuple(curves)


def _hole(forces: np.ndarray, radii: float) -> float | None:
    """The largest short distance where the second atom is pulled to the first, Å; forces (distances, 2, 3), eV/Å."""
    pulled = (forces[:, 1, 2] < -_HOLE) & (DISTANCES < _REPELS_BELOW)
    return float(DISTANCES[pulled].max() * radii) if pulled.any() else None


def _stability(backbone: Backbone, frame: Frame) -> Stability:
    atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
    if frame.spins is not None:
        atoms.set_initial_magnetic_moments(frame.spins)
    atoms.calc = ForcetuneCalculator(backbone)
    try:
        run = energy_conservation(atoms, picoseconds=_PICOSECONDS, seconds=_SECONDS)
    except ForcetuneError as error:
        return Stability(0.0, None, None, str(error))
    return Stability(float(run.time[-1]), run.drift, run.fluctuation)
