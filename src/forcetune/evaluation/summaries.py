"""What is measured of a tuned model besides its errors, in numbers, as ``results.json`` holds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RotationError:
    """Largest differences between a structure and the same structure rotated and reflected.

    Attributes:
        energy_mev_per_atom: of energies.
        forces_mev_per_ang: of force components, rotated back.
    """

    energy_mev_per_atom: float
    forces_mev_per_ang: float


@dataclass(frozen=True, slots=True)
class Distance:
    """How far the tuned model is from its base on structures that it was not tuned on.

    Attributes:
        source: ``replay frames``, ``molecules`` or ``shaken validation frames``.
        n_frames: how many.
        energy_mev_per_atom, forces_mev_per_ang: mean absolute differences from the base, reference energies taken out.
    """

    source: str
    n_frames: int
    energy_mev_per_atom: float
    forces_mev_per_ang: float


@dataclass(frozen=True, slots=True)
class Dimer:
    """Two atoms at short distances.

    Attributes:
        pair: symbols.
        closest_ang: the smallest distance, Å.
        base_wall_ev, tuned_wall_ev: energy there relative to 1.2 sums of covalent radii, eV; positive repels.
        base_hole_ang, tuned_hole_ang: largest distance below 0.7 sums of covalent radii where the atoms attract each
            other, Å; None where they repel all the way.
        tuned_barrier_ev: energy that has to be climbed to get there, from the lowest on the way, eV.
    """

    pair: str
    closest_ang: float
    base_wall_ev: float
    tuned_wall_ev: float
    base_hole_ang: float | None
    tuned_hole_ang: float | None
    tuned_barrier_ev: float | None


@dataclass(frozen=True, slots=True)
class Stability:
    """A short run at constant energy with the tuned model.

    Attributes:
        picoseconds: how long it was.
        drift_mev_per_atom_per_ps, fluctuation_mev_per_atom: of the total energy; None where it broke down.
        failure: how it broke down.
    """

    picoseconds: float
    drift_mev_per_atom_per_ps: float | None
    fluctuation_mev_per_atom: float | None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Forgetting:
    """All three checks."""

    distance: Distance
    dimers: tuple[Dimer, ...]
    stability: Stability
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Softening:
    """Slopes of predicted over reference forces of periodic frames; 1 is neither soft nor stiff.

    Attributes:
        n_frames: periodic frames with force labels.
        base, tuned: over all atoms of these.
        base_large, tuned_large: over the tenth of the atoms with the largest reference forces, which are those of
            displaced or hot structures.
    """

    n_frames: int
    base: float
    tuned: float
    base_large: float
    tuned_large: float


@dataclass(frozen=True, slots=True)
class Frequencies:
    """Phonon frequencies of a crystal by one model, on a mesh in the Brillouin zone.

    Attributes:
        mean_thz: of all that are not imaginary.
        highest_thz, lowest_thz: imaginary ones are negative.
        imaginary: their share.
        density: of states in bins of frequency, 1/THz, with an area of 1.
        failure: why there are none.
    """

    mean_thz: float | None = None
    highest_thz: float | None = None
    lowest_thz: float | None = None
    imaginary: float = 0.0
    density: tuple[float, ...] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Phonons:
    """Phonon frequencies of a crystal before and after training.

    Attributes:
        crystal: the frame; its cell is kept, its positions are relaxed by either model.
        primitive_atoms, supercell_atoms: atoms; None where neither model gave frequencies.
        edges_thz: of the bins of both densities of states.
        base, tuned: of the foundation model and of what it was tuned to.
    """

    crystal: str
    primitive_atoms: int | None
    supercell_atoms: int | None
    edges_thz: tuple[float, ...]
    base: Frequencies
    tuned: Frequencies
