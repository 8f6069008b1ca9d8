"""A stand-in for LAMMPS: what its ML-IAP interface hands to a unified object, and what it makes of the answers.

It follows the documentation and the Python couple of LAMMPS (KOKKOS): every rank owns the atoms of a slab, has ghosts
around it (atoms of other ranks and periodic images), a full list of neighbors of its own atoms nearer than the cutoff,
and functions that exchange rows of numbers. Pair forces act on both atoms of a pair, those on ghosts are sent back to
their owners, and the virial is −Σ r f over the pairs. Arrays without an entry cannot be looked at, as in Cython.

Ranks are threads that wait for each other where MPI would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from ase.data import chemical_symbols

from forcetune.errors import ForcetuneError
from forcetune.frames.frame import FloatArray, Frame

PATIENCE = 120.0
"""Seconds that a rank waits for the others before it takes them to be stuck."""


class Unified(Protocol):
    """What LAMMPS asks of a unified object."""

    interface: Any
    ndescriptors: int
    nparams: int

    @property
    def element_types(self) -> Sequence[str]: ...
    @property
    def rcutfac(self) -> float: ...
    def compute_descriptors(self, data: Any) -> None: ...
    def compute_gradients(self, data: Any) -> None: ...
    def compute_forces(self, data: Any) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class LammpsResult:
    """What LAMMPS would print.

    Attributes:
        energy: eV.
        energies: (atoms,), eV.
        forces: (atoms, 3), eV/Å.
        virial: (3, 3), eV; minus the stress of ASE's sign times the volume. LAMMPS keeps the components on and above
            the diagonal; the others are the same as far as the model is symmetric under rotations, which is as far
            as the couplings in its file have digits.
        ghosts: number of ghosts of each rank.
        exchanges: calls of ``forward_exchange`` and ``reverse_exchange`` of each rank.
    """

    energy: float
    energies: FloatArray
    forces: FloatArray
    virial: FloatArray
    ghosts: tuple[int, ...]
    exchanges: tuple[tuple[int, int], ...]


class LammpsData:
    """One rank's atoms and neighbors, by the names that LAMMPS gives them.

    Local atoms come first, ghosts behind them; ``rij`` points from atom i to its neighbor j.
    """

    def __init__(self, ranks: _Ranks, rank: int, elements: np.ndarray, positions: FloatArray, cutoff: float) -> None:
        """
        Args:
            ranks: all of them.
            rank: this one.
            elements: (local + ghosts,) indices of the element types.
            positions: (local + ghosts, 3), Å.
            cutoff: Å.
        """
        self._ranks, self._rank = ranks, rank
        self.nlocal = self.nlistatoms = self.natomneigh = len(ranks.local[rank])
        self.ntotal = len(elements)
        self._elements = elements.astype(np.int32)
        apart = positions[None] - positions[: self.nlocal, None]
        near = (apart**2).sum(axis=2) < cutoff**2
        near[np.arange(self.nlocal), np.arange(self.nlocal)] = False
        first, second = np.nonzero(near)
        self.npairs = len(first)
        self._first, self._second = first.astype(np.int32), second.astype(np.int32)
        self._apart = np.ascontiguousarray(apart[first, second])
        self._energies = np.full(self.nlocal, np.nan)
        self._forces = np.zeros((self.ntotal, 3))
        self.virial = np.zeros((3, 3))
        self.energy = np.nan
        self.calls = [0, 0]

    def _shown(self, values: np.ndarray) -> np.ndarray:
        if not len(values):
            raise ValueError("Invalid shape in axis 0: 0.")
        return values

    @property
    def elems(self) -> np.ndarray:
        return self._shown(self._elements)

    @property
    def iatoms(self) -> np.ndarray:
        return self._shown(np.arange(self.nlocal, dtype=np.int32))

    @property
    def pair_i(self) -> np.ndarray:
        return self._shown(self._first)

    @property
    def pair_j(self) -> np.ndarray:
        return self._shown(self._second)

    @property
    def rij(self) -> FloatArray:
        return self._shown(self._apart)

    @property
    def eatoms(self) -> FloatArray:
        return self._shown(self._energies)

    @property
    def f(self) -> FloatArray:
        return self._shown(self._forces)

    def update_pair_forces(self, forces: FloatArray) -> None:
        """Add (pairs, 3) forces on atoms i, and their opposites on atoms j, contiguous and in float64."""
        if forces.dtype != np.float64 or not forces.flags.c_contiguous or forces.shape != (self.npairs, 3):
            raise ValueError("Buffer has wrong number of dimensions or dtype mismatch")
        np.add.at(self._forces, self._first, forces)
        np.add.at(self._forces, self._second, -forces)
        self.virial -= self._apart.T @ forces

    def update_pair_forces_gpu(self, forces: torch.Tensor) -> None:
        """The same of a tensor, which LAMMPS reads by its address."""
        self.update_pair_forces(np.ascontiguousarray(forces.detach().numpy()))

    def forward_exchange(self, source: torch.Tensor, target: torch.Tensor, width: int) -> None:
        """Rows of local atoms to where they are ghosts; (local + ghosts, width), contiguous."""
        self._check_rows(source, target, width)
        self.calls[0] += 1
        target.copy_(source)
        rows = self._ranks.share(self._rank, target[: self.nlocal].clone())
        owner, place = self._ranks.ghosts[self._rank]
        for rank, theirs in enumerate(rows):
            from_it = owner == rank
            target[self.nlocal :][from_it] = theirs[place[from_it]]

    def reverse_exchange(self, source: torch.Tensor, target: torch.Tensor, width: int) -> None:
        """Rows of ghosts added to those of their owners; rows of ghosts are zero afterwards."""
        self._check_rows(source, target, width)
        self.calls[1] += 1
        target.copy_(source)
        target[self.nlocal :] = 0
        rows = self._ranks.share(self._rank, source[self.nlocal :].clone())
        for theirs, (owner, place) in zip(rows, self._ranks.ghosts, strict=True):
            ours = owner == self._rank
            target.index_add_(0, place[ours], theirs[ours])

    def _check_rows(self, source: torch.Tensor, target: torch.Tensor, width: int) -> None:
        for rows in (source, target):
            if tuple(rows.shape) != (self.ntotal, width) or not rows.is_contiguous():
                raise ValueError(f"rows of shape {tuple(rows.shape)} for {self.ntotal} atoms and ghosts of {width}")

    def returned_forces(self) -> FloatArray:
        """Forces on local atoms, those on their ghosts included."""
        forces = torch.from_numpy(self._forces.copy())
        collected = torch.empty_like(forces)
        self.reverse_exchange(forces, collected, 3)
        return collected[: self.nlocal].numpy()


class SerialData(LammpsData):
    """The same of a LAMMPS without KOKKOS: no exchange, and energies that can only be written."""

    @property
    def eatoms(self) -> FloatArray:
        raise AttributeError("unreadable attribute")

    @eatoms.setter
    def eatoms(self, values: FloatArray) -> None:
        self._energies[:] = values

    def __getattribute__(self, name: str) -> Any:
        if name == "forward_exchange":
            raise AttributeError(name)
        return super().__getattribute__(name)


class _Ranks:
    """Who owns which atoms, who has which ghosts, and how they wait for each other.

    Attributes:
        local: for each rank the atoms that it owns.
        ghosts: for each rank the owner, and the place among the owner's atoms, of each ghost; (ghosts,) both.
    """

    def __init__(self, local: list[np.ndarray], ghosts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.local, self.ghosts = local, ghosts
        self._barrier = threading.Barrier(len(local), timeout=PATIENCE)
        self._shared: list[Any] = [None] * len(local)

    def share(self, rank: int, rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows of all ranks, once all have shared theirs."""
        self._shared[rank] = rows
        self._barrier.wait()
        shared = list(self._shared)
        self._barrier.wait()
        return shared

    def run(self, work: Callable[[int], None]) -> None:
        """Let every rank work in a thread of its own.

        Raises:
            Exception: the first that one of them raised.
        """
        errors: list[BaseException] = []

        def guarded(rank: int) -> None:
            try:
                work(rank)
            except threading.BrokenBarrierError:
                errors.append(ForcetuneError(f"rank {rank} waited in vain for an exchange with the others"))
            except BaseException as error:
                errors.insert(0, error)
                self._barrier.abort()

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(len(self.local))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def run_lammps(
    load: Callable[[], Unified],
    frame: Frame,
    *,
    bounds: Sequence[float] = (),
    serial: bool = False,
    seed: int = 0,
) -> LammpsResult:
    """Energies, forces and virial of a frame as LAMMPS would find them.

    Args:
        load: gives the unified object; called once for every rank.
        frame: to compute.
        bounds: where slabs of the ranks meet along x, as shares of the extent of the atoms; n of them make n + 1 ranks.
        serial: a LAMMPS without KOKKOS, of one rank.
        seed: of the order of ghosts.
    """
    objects = [load() for _ in range(len(bounds) + 1)]
    cutoff = 2 * objects[0].rcutfac
    types = [chemical_symbols.index(symbol) for symbol in objects[0].element_types]
    elements = np.array([types.index(int(z)) for z in frame.numbers])
    positions = _wrapped(frame)
    ranks, copies = _decomposed(frame, positions, cutoff, bounds, seed)
    kind = SerialData if serial else LammpsData
    data = [kind(ranks, rank, elements[atoms], places, cutoff) for rank, (atoms, places) in enumerate(copies)]
    forces = np.zeros((len(frame), 3))

    def work(rank: int) -> None:
        unified = objects[rank]
        for compute in (unified.compute_descriptors, unified.compute_gradients, unified.compute_forces):
            compute(data[rank])
        data[rank].calls, counted = [0, 0], data[rank].calls
        forces[ranks.local[rank]] = data[rank].returned_forces()
        data[rank].calls = counted

    ranks.run(work)
    energies = np.zeros(len(frame))
    for one, atoms in zip(data, ranks.local, strict=True):
        energies[atoms] = one._energies
    return LammpsResult(
        energy=sum(one.energy for one in data),
        energies=energies,
        forces=forces,
        virial=np.sum([one.virial for one in data], axis=0),
        ghosts=tuple(one.ntotal - one.nlocal for one in data),
        exchanges=tuple((one.calls[0], one.calls[1]) for one in data),
    )


def _wrapped(frame: Frame) -> FloatArray:
    """(atoms, 3) positions with those in periodic directions within the cell, as LAMMPS moves them."""
    if not frame.pbc.any():
        return frame.positions.copy()
    inverse = np.linalg.pinv(frame.cell)
    whole = np.floor(frame.positions @ inverse)
    whole[:, ~frame.pbc] = 0
    return frame.positions - whole @ frame.cell


def _images(frame: Frame, positions: FloatArray, cutoff: float) -> FloatArray:
    """(images, 3) shifts of the cell by which copies of atoms may be near its atoms, none of them 0, Å."""
    counts = np.zeros(3, dtype=int)
    if frame.pbc.any():
        heights = 1 / np.maximum(np.linalg.norm(np.linalg.pinv(frame.cell), axis=0), 1e-12)
        counts[frame.pbc] = np.ceil(cutoff / heights[frame.pbc]).astype(int) + 1
    shifts = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in counts), indexing="ij"), axis=-1).reshape(-1, 3)
    return shifts[np.any(shifts != 0, axis=1)] @ frame.cell


def _decomposed(
    frame: Frame, positions: FloatArray, cutoff: float, bounds: Sequence[float], seed: int
) -> tuple[_Ranks, list[tuple[np.ndarray, FloatArray]]]:
    """The ranks; for each the atoms that its local atoms and ghosts are, and where they stand."""
    extent = positions[:, 0].min(), np.ptp(positions[:, 0])
    owner = np.searchsorted(np.asarray(bounds, dtype=float), (positions[:, 0] - extent[0]) / max(extent[1], 1e-9))
    local = [np.flatnonzero(owner == rank) for rank in range(len(bounds) + 1)]
    place = np.empty(len(frame), dtype=int)
    for atoms in local:
        place[atoms] = np.arange(len(atoms))
    shifts = _images(frame, positions, cutoff)
    everywhere = np.concatenate([positions, (positions[None] + shifts[:, None]).reshape(-1, 3)])
    which = np.tile(np.arange(len(frame)), len(shifts) + 1)
    rng = np.random.default_rng(seed)
    ghosts: list[tuple[torch.Tensor, torch.Tensor]] = []
    copies: list[tuple[np.ndarray, FloatArray]] = []
    for atoms in local:
        here = positions[atoms] if len(atoms) else positions
        low, high = here.min(axis=0) - cutoff, here.max(axis=0) + cutoff
        around = np.all((everywhere >= low) & (everywhere <= high), axis=1)
        around[atoms] = False
        chosen = rng.permutation(np.flatnonzero(around))
        ghosts.append((torch.from_numpy(owner[which[chosen]]), torch.from_numpy(place[which[chosen]])))
        copies.append((np.concatenate([atoms, which[chosen]]), np.concatenate([positions[atoms], everywhere[chosen]])))
    return _Ranks(local, ghosts), copies
