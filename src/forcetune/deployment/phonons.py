"""Phonon frequencies of a crystal by a tuned model and by its base, with phonopy.

Universal potentials are too soft for crystals, and tuning to frames of one kind may make them softer or unstable. Both
models are compared in the cell of one frame near equilibrium, where each of them relaxes the positions; frequencies
come from central differences of the forces in a supercell (Togo et al., J. Phys.: Condens. Matter 35, 353001, 2023).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from ase import Atoms
from ase.optimize import BFGS

from forcetune.adapters.attach import disable_adapter
from forcetune.backbones.protocol import Backbone
from forcetune.deployment.calculator import ForcetuneCalculator, build_frame
from forcetune.errors import ForcetuneError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.evaluation.summaries import Frequencies, Phonons
from forcetune.frames.dataset import Dataset
from forcetune.frames.frame import FloatArray, Frame

NEAR_EQUILIBRIUM = 0.05
"""Largest force label of a crystal that counts as relaxed, eV/Å."""
MOST_ATOMS = 15_000
"""Of all displaced supercells together, unless phonons are asked for: each atom without symmetry takes six of them."""
LOOKED_AT = 2000
"""Frames of each split among which the crystal is looked for."""
TRIED = 20
"""Crystals whose symmetry is looked for, nearest to equilibrium first."""
EMPTY = 6.0
"""Å along an axis without an atom, from which on a frame is a slab or a molecule in a box and no crystal."""
IMAGINARY = 0.1
"""Frequencies below minus this are imaginary, THz; acoustic ones at Γ are zero but for rounding."""
_SUPERCELL = 8.0  # Å, least distance of opposite faces
_SYMMETRY = 1e-3  # Å
_DISPLACEMENT = 0.01  # Å
_MESH = 50.0  # Å: the mesh is as fine as supercells of this length
_BINS = 80
_RELAXED = 1e-3  # eV/Å
_STEPS = 200


def is_installed() -> bool:
    """Whether phonopy is."""
    return importlib.util.find_spec("phonopy") is not None


def choose_crystal(dataset: Dataset, most_atoms: float = MOST_ATOMS) -> Frame | None:
    """The frame of a crystal that is nearest to equilibrium: of those with forces below a bound the one with the least
    stress; frames without stress come after those that have it, by their forces.

    Args:
        dataset: of the run.
        most_atoms: that all its displaced supercells may have together.

    Returns:
        None where there is no such frame among the :data:`TRIED` nearest.
    """
    candidates: list[tuple[bool, float, int, Frame]] = []
    for split in dataset.splits.values():
        for frame in islice(split.frames, LOOKED_AT):
            if frame.forces is None or not is_crystal(frame) or not np.isfinite(frame.forces).all():
                continue
            force = float(np.linalg.norm(frame.forces, axis=1).max())
            # before symmetry is looked for: one displacement at least
            if force <= NEAR_EQUILIBRIUM and len(frame) * _repeats(frame.cell).prod() <= most_atoms:
                distance = force if frame.stress is None else float(np.abs(frame.stress).max())
                candidates.append((frame.stress is None, distance, len(frame), frame))
    candidates.sort(key=lambda candidate: candidate[:3])
    for *_, frame in candidates[:TRIED]:
        count = count_displaced_atoms(frame)
        if count is not None and count <= most_atoms:
            return frame
    return None


def is_crystal(frame: Frame) -> bool:
    """Whether a frame is periodic in all directions and nowhere empty, as slabs and molecules in boxes are."""
    if frame.cell is None or not frame.pbc.all():
        return False
    fractions = np.sort(np.linalg.solve(frame.cell.T, frame.positions.T) % 1.0, axis=1)
    gaps = np.diff(fractions, axis=1, append=fractions[:, :1] + 1.0).max(axis=1)
    return bool((gaps * _heights(frame.cell) <= EMPTY).all())


def measure_phonons(backbone: Backbone, crystal: Frame, most_atoms: float = MOST_ATOMS) -> Phonons:
    """Frequencies of a crystal by a tuned model and its base.

    Args:
        backbone: with the trained adapter attached; left as it was.
        crystal: periodic in all directions, near its equilibrium.
        most_atoms: of all displaced supercells of a model together.
    """
    tuned = _frequencies(backbone, crystal, most_atoms)
    with disable_adapter(backbone):
        base = _frequencies(backbone, crystal, most_atoms)
    known = [spectrum for spectrum in (base, tuned) if isinstance(spectrum, _Spectrum)]
    edges = _edges(spectrum.frequencies for spectrum in known)
    return Phonons(
        str(crystal.origin),
        known[0].primitive_atoms if known else None,
        known[0].supercell_atoms if known else None,
        tuple(edges.tolist()),
        _summarize(base, edges),
        _summarize(tuned, edges),
    )


def describe_instability(phonons: Phonons) -> str | None:
    """What is to be warned of: that the tuned model has imaginary frequencies where its base has none."""
    base, tuned = phonons.base, phonons.tuned
    if tuned.failure is not None and base.failure is None:
        return (
            f"{phonons.crystal}: phonons of the tuned model could not be computed ({tuned.failure}), those of its base "
            "could; look whether the model is stable there."
        )
    if tuned.imaginary and not base.imaginary:
        beside = "and none of its base" if base.failure is None else f"its base gave no phonons ({base.failure})"
        return (
            f"{phonons.crystal}: {tuned.imaginary:.1%} of the phonon modes of the tuned model are imaginary, down to "
            f"{tuned.lowest_thz:.2f} THz, {beside}; add displaced or strained frames of this crystal."
        )
    return None


@dataclass(frozen=True, slots=True)
class _Spectrum:
    """Frequencies, THz, with the weight of each, and atoms of the primitive cell and the supercell."""

    frequencies: FloatArray
    weights: FloatArray
    primitive_atoms: int
    supercell_atoms: int


def _heights(cell: FloatArray) -> FloatArray:
    """Distances between opposite faces, Å."""
    return 1.0 / np.linalg.norm(np.linalg.inv(cell), axis=0)


def _repeats(cell: FloatArray) -> np.ndarray:
    """Of the cell in the supercell."""
    return np.ceil(_SUPERCELL / _heights(cell) - 1e-9).astype(int)


def _displaced(frame: Frame, positions: FloatArray) -> Any:
    """The crystal in phonopy, with its displacements."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    cell = PhonopyAtoms(numbers=frame.numbers, cell=frame.cell, positions=positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that "auto" was not the default of version 3
        phonon = Phonopy(
            cell,
            supercell_matrix=np.diag(_repeats(frame.cell)),
            primitive_matrix="auto",
            symprec=_SYMMETRY,
            log_level=0,
        )
    phonon.generate_displacements(distance=_DISPLACEMENT)
    return phonon


def count_displaced_atoms(frame: Frame) -> int | None:
    """Atoms of all supercells whose forces are wanted, by the symmetry of the frame; None where phonopy fails."""
    try:
        phonon = _displaced(frame, frame.positions)
    except Exception:  # phonopy's and spglib's errors have no common kind
        return None
    return len(phonon.supercell) * len(phonon.supercells_with_displacements)


def _frequencies(backbone: Backbone, crystal: Frame, most_atoms: float) -> _Spectrum | str:
    """Frequencies of the relaxed crystal, or why there are none."""
    atoms = Atoms(crystal.numbers, crystal.positions, cell=crystal.cell, pbc=True)
    atoms.calc = ForcetuneCalculator(backbone)
    try:
        if not BFGS(atoms, logfile=None).run(fmax=_RELAXED, steps=_STEPS):
            return f"positions did not relax to {_RELAXED} eV/Å in {_STEPS} steps"
        phonon = _displaced(crystal, atoms.positions)
        supercells = phonon.supercells_with_displacements
        if len(supercells) * len(phonon.supercell) > most_atoms:
            return (
                f"the relaxed crystal has so little symmetry that {len(supercells)} displaced supercells would be "
                "needed; output.phonons=on computes them"
            )
        frames = [
            build_frame(Atoms(cell.symbols, positions=cell.positions, cell=cell.cell, pbc=True)) for cell in supercells
        ]
        # one at a time, as supercells may be large
        phonon.forces = np.array([predict(backbone, build_graphs(backbone, [frame])).forces for frame in frames])
        phonon.produce_force_constants()
        phonon.symmetrize_force_constants()
        phonon.run_mesh(_MESH)
    except Exception as error:  # a check after the training must not cost its results, and phonopy raises any kind
        return str(error) if isinstance(error, ForcetuneError) else f"{type(error).__name__}: {error}"
    frequencies, weights = phonon.mesh.frequencies, phonon.mesh.weights.astype(float)
    every = np.repeat(weights, frequencies.shape[1])
    return _Spectrum(frequencies.ravel(), every / every.sum(), len(phonon.primitive), len(phonon.supercell))


def _edges(frequencies: Iterable[FloatArray]) -> FloatArray:
    """Of the bins of both densities of states, THz."""
    every = [*frequencies]
    if not every:
        return np.zeros(0)
    low, high = min(float(values.min()) for values in every), max(float(values.max()) for values in every)
    return np.linspace(min(low, 0.0), high + 1e-9, _BINS + 1)


def _summarize(spectrum: _Spectrum | str, edges: FloatArray) -> Frequencies:
    if isinstance(spectrum, str):
        return Frequencies(failure=spectrum)
    frequencies, weights = spectrum.frequencies, spectrum.weights
    density, _ = np.histogram(frequencies, bins=edges, weights=weights, density=True)
    imaginary = frequencies < -IMAGINARY
    real = ~imaginary
    return Frequencies(
        mean_thz=float((frequencies * weights)[real].sum() / weights[real].sum()) if real.any() else None,
        highest_thz=float(frequencies.max()),
        lowest_thz=float(frequencies.min()),
        imaginary=float(weights[imaginary].sum()),
        density=tuple(density.tolist()),
    )
