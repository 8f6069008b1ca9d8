"""Phonon frequencies of a crystal by a tuned model and by its base, with phonopy.

Universal potentials are too soft for crystals, and tuning to frames of one kind may make them softer or unstable. Both
models are compared in the cell of one frame near equilibrium, where each of them relaxes the positions; frequencies
come from central differences of the forces in a supercell (Togo et al., J. Phys.: Condens. Matter 35, 353001, 2023).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Sequence
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
from forcetune.utils.optional import missing_package

NEAR_EQUILIBRIUM = 0.05
"""Largest force label of a crystal that counts as relaxed, eV/Å."""
MOST_ATOMS = 15_000
"""Of all displaced supercells together, unless phonons are asked for: each atom without symmetry takes six of them."""
LOOKED_AT = 2000
"""Frames of each split among which the crystal is looked for."""
IMAGINARY = 0.1
"""Frequencies below minus this are imaginary, THz; acoustic ones at Γ are zero but for rounding."""
_SUPERCELL = 8.0  # Å, least length
_DISPLACEMENT = 0.01  # Å
_MESH = 50.0  # Å: the mesh is as fine as supercells of this length
_BINS = 80
_RELAXED = 1e-3  # eV/Å
_STEPS = 200


def is_installed() -> bool:
    """Whether phonopy is."""
    return importlib.util.find_spec("phonopy") is not None


def choose_crystal(dataset: Dataset, most_atoms: float = MOST_ATOMS) -> Frame | None:
    """The periodic frame nearest to equilibrium: of those with forces below a bound the one with the least stress, or
    force where no frame has stress.

    Args:
        dataset: of the run.
        most_atoms: that all its displaced supercells may have together.

    Returns:
        None where there is no such frame.

    Raises:
        InputError: phonopy is not installed.
    """
    candidates: list[tuple[float, int, Frame]] = []
    for split in dataset.splits.values():
        for frame in islice(split.frames, LOOKED_AT):
            if frame.forces is None or not frame.pbc.all() or not np.isfinite(frame.forces).all():
                continue
            force = float(np.linalg.norm(frame.forces, axis=1).max())
            if force <= NEAR_EQUILIBRIUM:
                strain = force if frame.stress is None else float(np.abs(frame.stress).max())
                candidates.append((strain, len(frame), frame))
    for _, _, frame in sorted(candidates, key=lambda candidate: candidate[:2]):
        if count_displaced_atoms(frame) <= most_atoms:
            return frame
    return None


def measure_phonons(backbone: Backbone, crystal: Frame) -> Phonons:
    """Frequencies of a crystal by a tuned model and its base.

    Args:
        backbone: with the trained adapter attached; left as it was.
        crystal: periodic in all directions, near its equilibrium.

    Raises:
        InputError: phonopy is not installed.
    """
    tuned, supercell_atoms, primitive_atoms = _frequencies(backbone, crystal)
    with disable_adapter(backbone):
        base, _, _ = _frequencies(backbone, crystal)
    known = [result for result in (base, tuned) if not isinstance(result, str)]
    edges = _edges(values for values, _ in known)
    return Phonons(
        str(crystal.origin),
        primitive_atoms,
        supercell_atoms,
        tuple(edges.tolist()),
        _summarize(base, edges),
        _summarize(tuned, edges),
    )


def describe_instability(phonons: Phonons) -> str | None:
    """What is to be warned of: that the tuned model has imaginary frequencies where its base has none."""
    base, tuned = phonons.base, phonons.tuned
    if tuned.failure is not None and base.failure is None:
        return f"{phonons.crystal}: phonons of the tuned model could not be computed: {tuned.failure}"
    if tuned.imaginary and not base.imaginary:
        return (
            f"{phonons.crystal}: {tuned.imaginary:.1%} of the phonon modes of the tuned model are imaginary, down to "
            f"{tuned.lowest_thz:.2f} THz, and none of its base; add displaced or strained frames of this crystal."
        )
    return None


def _make_phonopy(frame: Frame, positions: FloatArray) -> Any:
    """
    Raises:
        InputError: phonopy is not installed.
    """
    try:
        from phonopy import Phonopy
        from phonopy.structure.atoms import PhonopyAtoms
    except ImportError as error:
        raise missing_package("phonopy", "phonons", error) from error
    repeats = np.ceil(_SUPERCELL / np.linalg.norm(frame.cell, axis=1)).astype(int)
    cell = PhonopyAtoms(numbers=frame.numbers, cell=frame.cell, positions=positions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that "auto" is not what version 3 took where it was told nothing
        return Phonopy(cell, supercell_matrix=np.diag(repeats), primitive_matrix="auto", symprec=1e-3, log_level=0)


def count_displaced_atoms(frame: Frame) -> int:
    """Atoms of all supercells whose forces are wanted, by the symmetry of the frame."""
    phonon = _make_phonopy(frame, frame.positions)
    phonon.generate_displacements(distance=_DISPLACEMENT)
    return len(phonon.supercell) * len(phonon.supercells_with_displacements)


def _frequencies(backbone: Backbone, crystal: Frame) -> tuple[tuple[FloatArray, FloatArray] | str, int, int]:
    """Frequencies, THz, with the weight of each, or why there are none; atoms of the supercell and primitive cell."""
    atoms = Atoms(crystal.numbers, crystal.positions, cell=crystal.cell, pbc=True)
    atoms.calc = ForcetuneCalculator(backbone)
    phonon = _make_phonopy(crystal, crystal.positions)
    sizes = len(phonon.supercell), len(phonon.primitive)
    try:
        if not BFGS(atoms, logfile=None).run(fmax=_RELAXED, steps=_STEPS):
            return f"positions did not relax to {_RELAXED} eV/Å in {_STEPS} steps", *sizes
        phonon = _make_phonopy(crystal, atoms.positions)
        phonon.generate_displacements(distance=_DISPLACEMENT)
        frames = [
            build_frame(Atoms(cell.symbols, positions=cell.positions, cell=cell.cell, pbc=True))
            for cell in phonon.supercells_with_displacements
        ]
        # of large supercells a few at a time
        predicted = [predict(backbone, build_graphs(backbone, [frame])).forces for frame in frames]
    except ForcetuneError as error:
        return str(error), *sizes
    phonon.forces = np.array(predicted)
    phonon.produce_force_constants()
    phonon.symmetrize_force_constants()
    phonon.run_mesh(_MESH)
    weights = np.repeat(phonon.mesh.weights, phonon.mesh.frequencies.shape[1]).astype(float)
    return (phonon.mesh.frequencies.ravel(), weights / weights.sum()), *sizes


def _edges(frequencies: Iterable[FloatArray]) -> FloatArray:
    """Of the bins of both densities of states, THz."""
    every = [*frequencies]
    if not every:
        return np.zeros(0)
    low, high = min(float(values.min()) for values in every), max(float(values.max()) for values in every)
    return np.linspace(min(low, 0.0), high + 1e-9, _BINS + 1)


def _summarize(result: tuple[FloatArray, FloatArray] | str, edges: Sequence[float] | FloatArray) -> Frequencies:
    if isinstance(result, str):
        return Frequencies(failure=result)
    frequencies, weights = result
    density, _ = np.histogram(frequencies, bins=np.asarray(edges), weights=weights, density=True)
    imaginary = frequencies < -IMAGINARY
    real = ~imaginary
    return Frequencies(
        mean_thz=float((frequencies * weights)[real].sum() / weights[real].sum()) if real.any() else None,
        highest_thz=float(frequencies.max()),
        lowest_thz=float(frequencies.min()),
        imaginary=float(weights[imaginary].sum()),
        density=tuple(density.tolist()),
    )
