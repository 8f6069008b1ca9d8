"""The jobs of the pretraining data: one molecule, one group of molecule pairs, one pair of elements, the free atoms."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, islice
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from recipes.mini.conformers import Molecule, embed, is_whole
from recipes.mini.dynamics import langevin
from recipes.mini.molecules import ELEMENTS
from recipes.mini.sample import FloatArray, Sample, write_shard
from recipes.mini.structures import CONTACTS, compressed, displaced, in_contact, relaxed, stretched
from recipes.mini.xtb import UNPAIRED, Surface, SurfaceError, label

CONFORMERS = 2
TEMPERATURES = (300.0, 600.0, 1000.0, 1500.0)
MD_EVERY = 12
"""Steps of 1 fs from one frame of a trajectory to the next."""
SCAN_POINTS = 60
"""Distances of a diatomic scan."""
WIDTHS = (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16)
MAX_FORCE = 50.0
"""eV/Å; structures with a longer force are dropped: no model needs them, and a loss would see nothing else."""
MAX_FORCE_DIATOMIC = 200.0
"""As above for the scans of element pairs, which show how steep the wall is."""
MAX_NET_FORCE = 1e-3
"""eV/Å; more is left only when the field did not converge."""

ISOLATED = "IsolatedAtom"


@dataclass(frozen=True, slots=True)
class Job:
    """One shard.

    Attributes:
        kind: ``molecule``, ``dimers``, ``diatomic`` or ``atoms``.
        subject: the SMILES, the pairs of SMILES, the element symbols.
        path: the file of the result.
        seed: of the whole data set.
    """

    kind: str
    subject: tuple[str, ...]
    path: Path
    seed: int

    @property
    def entropy(self) -> list[int]:
        """Seeds of this job's random numbers, which no other job shares."""
        digest = hashlib.sha256(" ".join((self.kind, *self.subject)).encode()).digest()
        return [self.seed, int.from_bytes(digest[:8], "big")]


class Collector:
    """Labels structures, keeps the good ones and counts what was dropped and why."""

    def __init__(self, molecule: str) -> None:
        self.molecule = molecule
        self.samples: list[Sample] = []
        self.dropped: Counter[str] = Counter()

    def add(self, surface: Surface, positions: FloatArray, kind: str) -> None:
        """Label one structure."""
        try:
            sample = label(surface, positions, kind, self.molecule)
        except SurfaceError:
            self.dropped["no_convergence"] += 1
            return
        limit = MAX_FORCE_DIATOMIC if kind == "diatomic" else MAX_FORCE
        if np.abs(sample.forces.sum(axis=0)).max() > MAX_NET_FORCE:
            self.dropped["net_force"] += 1
        elif sample.max_force > limit:
            self.dropped["large_force"] += 1
        else:
            self.samples.append(sample)


def _minima(molecule: Molecule, surface: Surface, kept: Collector) -> list[FloatArray]:
    """Minima of the xTB surface below the conformers; a conformer that reacts is counted and left out."""
    minima: list[FloatArray] = []
    for start in molecule.conformers:
        try:
            place = relaxed(surface, start)
        except SurfaceError:
            place = start  # a step of the descent was too long: the structure of the force field is near enough
        if is_whole(molecule, place):
            minima.append(place)
        else:
            kept.dropped["reacted"] += 1
    return minima


def _trajectory(
    molecule: Molecule, surface: Surface, start: FloatArray, generator: np.random.Generator, kept: Collector
) -> None:
    """Frames of Langevin dynamics at rising temperatures; it ends where the molecule reacts."""
    place = start
    for temperature in TEMPERATURES:
        walk = langevin(surface, place, temperature=temperature, every=MD_EVERY, generator=generator)
        try:
            for index, positions in enumerate(islice(walk, 6)):
                place = positions
                if not is_whole(molecule, place):
                    kept.dropped["reacted"] += 1
                    return
                if index > 0:
                    kept.add(surface, place, f"md_{temperature:.0f}K")
        except SurfaceError:
            kept.dropped["no_convergence"] += 1
            return


def molecule_samples(job: Job) -> Collector:
    """Minima, dynamics, noise, bonds stretched and atoms pressed together, for one molecule."""
    generator = np.random.default_rng(job.entropy)
    (smiles,) = job.subject
    kept = Collector(smiles)
    molecule = embed(smiles, CONFORMERS, job.seed)
    surface = Surface(molecule.numbers)
    minima = _minima(molecule, surface, kept)
    if not minima:
        return kept
    for place in minima:
        kept.add(surface, place, "minimum")

    def base() -> FloatArray:
        return minima[int(generator.integers(len(minima)))]

    _trajectory(molecule, surface, base(), generator, kept)
    for width in WIDTHS:
        kept.add(surface, displaced(base(), width, generator), "displaced")
    for _ in range(6):
        kept.add(surface, stretched(molecule, displaced(base(), 0.03, generator), generator), "stretched")
    for _ in range(5):
        kept.add(surface, compressed(molecule, displaced(base(), 0.03, generator), generator), "compressed")
    return kept


def dimer_samples(job: Job) -> Collector:
    """A pair of molecules at every contact distance, in a new orientation each time."""
    generator = np.random.default_rng(job.entropy)
    kept = Collector(".".join(job.subject))
    pair = [embed(smiles, 1, job.seed) for smiles in job.subject]
    numbers = (pair[0].numbers, pair[1].numbers)
    surface = Surface(np.concatenate(numbers))
    try:
        places = [relaxed(Surface(molecule.numbers), molecule.conformers[0]) for molecule in pair]
    except SurfaceError:
        kept.dropped["no_convergence"] += 1
        return kept
    for contact in CONTACTS:
        first, second = (displaced(place, 0.04, generator) for place in places)
        kept.add(surface, in_contact(numbers, (first, second), contact, generator), "dimer")
    return kept


def diatomic_samples(job: Job) -> Collector:
    """Two atoms from 0.5 to 5 Å, with as few unpaired electrons as possible."""
    kept = Collector(".".join(f"[{symbol}]" for symbol in job.subject))
    numbers = np.array([chemical_symbols.index(symbol) for symbol in job.subject], dtype=np.int64)
    for length in np.geomspace(0.5, 5.0, SCAN_POINTS):
        # a new surface each time, because a field that failed must not trouble the next
        kept.add(Surface(numbers), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, length]]), "diatomic")
    return kept


def atom_samples(job: Job) -> Collector:
    """The free atoms, with unpaired electrons by Hund's rule."""
    kept = Collector("atoms")
    for symbol in job.subject:
        number = chemical_symbols.index(symbol)
        kept.molecule = f"[{symbol}]"
        kept.add(Surface(np.array([number], dtype=np.int64), UNPAIRED[number]), np.zeros((1, 3)), ISOLATED)
    return kept


MAKERS: dict[str, Callable[[Job], Collector]] = {
    "molecule": molecule_samples,
    "dimers": dimer_samples,
    "diatomic": diatomic_samples,
    "atoms": atom_samples,
}


def run_job(job: Job) -> None:
    """Make and keep one shard; a molecule of which RDKit finds no structure is an empty one."""
    try:
        kept = MAKERS[job.kind](job)
    except ValueError:
        kept = Collector(job.subject[0])
        kept.dropped["no_structure"] += 1
    write_shard(job.path, kept.samples, **kept.dropped)


def _shard(out: Path, kind: str, subject: tuple[str, ...]) -> Path:
    """A readable name that no two subjects share, on systems that ignore case too."""
    text = ".".join(subject)
    plain = "".join(letter if letter.isalnum() else "_" for letter in text)[:40]
    return out / "shards" / f"{kind}-{plain}-{zlib.crc32(text.encode()):08x}.npz"


def molecule_pairs(smiles: tuple[str, ...], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Distinct pairs of molecules; every one comes up about equally often, the last draws aside."""
    generator = np.random.default_rng([seed, len(smiles), 7])
    seen: set[tuple[str, str]] = set()
    limit = len(smiles) * (len(smiles) + 1) // 2
    while len(seen) < min(count, limit):
        order = generator.permutation(len(smiles))
        partners = generator.permutation(len(smiles))
        for first, second in zip(order, partners, strict=True):
            pair = (smiles[min(first, second)], smiles[max(first, second)])
            if pair not in seen and len(seen) < min(count, limit):
                seen.add(pair)
                yield pair


def jobs(out: Path, seed: int, molecules: tuple[str, ...], pairs: tuple[tuple[str, str], ...]) -> list[Job]:
    """All jobs of the data set in the order in which their frames are written."""
    symbols = tuple(chemical_symbols[number] for number in ELEMENTS)
    subjects: list[tuple[str, tuple[str, ...]]] = [("atoms", symbols)]
    subjects += [("diatomic", pair) for pair in combinations_with_replacement(symbols, 2)]
    subjects += [("molecule", (smiles,)) for smiles in molecules]
    subjects += [("dimers", pair) for pair in pairs]
    return [Job(kind, subject, _shard(out, kind, subject), seed) for kind, subject in subjects]
