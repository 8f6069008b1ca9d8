"""The data that ``forcetune demo`` tunes on: one flexible molecule, hot, labelled by density-functional theory.

    python -m recipes.mini.finetuning_data --out FOLDER [--processes N]

1. Every part has trajectories of its own, so that no test frame is a neighbour in time of a training frame: Langevin
   dynamics on the GFN2-xTB surface from another conformer, at 500, 750 and 1000 K (``hot``: at 1500 K).
2. Every frame is labelled by PySCF and kept in ``FOLDER/frames``; a rerun computes what is missing.
3. ``train``, ``valid``, ``test`` and ``hot`` are written as compressed extended XYZ, with a card.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from forcetune.errors import InputError
from forcetune.utils.files import write_text
from recipes.mini.conformers import embed, is_whole
from recipes.mini.dft import Calculation, ConvergenceError, Level, calculate, gradient_error
from recipes.mini.dynamics import langevin
from recipes.mini.finetuning_card import card
from recipes.mini.molecules import FINE_TUNING
from recipes.mini.sample import FloatArray, IntArray, Sample, read_shard, rounded, write_shard, write_xyz
from recipes.mini.work import guard_settings, run_missing
from recipes.mini.xtb import Surface, SurfaceError

LEVEL = Level()
TEMPERATURES = (500.0, 750.0, 1000.0)
HOT = (1500.0,)
EQUILIBRATION = 4
"""Structures thrown away at the start of a trajectory."""
MAX_FORCE = 50.0
"""eV/Å; a frame with a longer force is a failure."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file: its name, its number of frames, the temperatures (K) that they are shared among."""

    name: str
    frames: int
    temperatures: tuple[float, ...] = TEMPERATURES


PARTS = (Part("train", 50), Part("valid", 50), Part("test", 200), Part("hot", 50, HOT))


@dataclass(frozen=True, slots=True)
class Task:
    """One frame to label, and where its labels are kept."""

    part: str
    path: Path
    numbers: IntArray
    positions: FloatArray
    temperature: float
    molecule: str
    level: Level


def trajectory_frames(
    smiles: str, part: str, temperature: float, count: int, *, every: int, seed: int
) -> list[FloatArray]:
    """``count`` structures (atoms, 3), Å, at one temperature, ``every`` femtoseconds apart.

    A trajectory that reacts, or whose field fails, is left there and another one goes on from another conformer.

    Raises:
        SurfaceError: twenty trajectories did not give enough structures.
    """
    molecule = embed(smiles, 10, seed)
    surface = Surface(molecule.numbers)
    structures: list[FloatArray] = []
    for attempt in range(20):
        key = [seed, *part.encode(), int(temperature), attempt]
        generator = np.random.default_rng(key)
        start = molecule.conformers[int(generator.integers(len(molecule.conformers)))]
        walk = langevin(surface, start, temperature=temperature, every=every, generator=generator)
        try:
            for step, positions in enumerate(walk):
                if len(structures) == count:
                    return structures
                if not is_whole(molecule, positions):
                    break
                if step >= EQUILIBRATION:
                    structures.append(rounded(positions))
        except SurfaceError:
            continue
    raise SurfaceError(f"{smiles}: {len(structures)} of {count} structures at {temperature:.0f} K in 20 trajectories")


def tasks(out: Path, parts: Sequence[Part], smiles: str, level: Level, *, every: int, seed: int) -> list[Task]:
    """The structures of all parts, made once and then read from ``out/structures``."""
    numbers = embed(smiles, 1, seed).numbers
    found: list[Task] = []
    for part in parts:
        shares = np.array_split(np.arange(part.frames), len(part.temperatures))
        for temperature, share in zip(part.temperatures, shares, strict=True):
            path = out / "structures" / f"{part.name}-{temperature:.0f}.npz"
            if not path.exists():
                structures = trajectory_frames(smiles, part.name, temperature, len(share), every=every, seed=seed)
                blank = np.zeros_like(structures[0])
                samples = [Sample(numbers, place, 0.0, blank, "unlabelled", smiles) for place in structures]
                write_shard(path, samples)
            for index, sample in zip(share, read_shard(path)[0], strict=True):
                shard = out / "frames" / f"{part.name}-{index:04d}.npz"
                found.append(Task(part.name, shard, numbers, sample.positions, temperature, smiles, level))
    return found


def label_frame(task: Task) -> None:
    """Compute one frame and keep it; a failure is kept as a shard without a frame."""
    began = time.monotonic()
    result: Calculation | None = None
    try:
        result = calculate(task.level, task.numbers, task.positions)
    except ConvergenceError:
        result = None
    samples: list[Sample] = []
    if result is not None:
        kind = f"md_{task.temperature:.0f}K"
        sample = Sample(task.numbers, task.positions, result.energy, result.forces, kind, task.molecule)
        if sample.max_force <= MAX_FORCE:
            samples.append(sample)
    milliseconds = round(1000 * (time.monotonic() - began))
    write_shard(task.path, samples, milliseconds=milliseconds, cycles=0 if result is None else result.cycles)


def checked_gradient(out: Path, task: Task) -> float:
    """Largest error of the analytic forces of one frame by finite differences, eV/Å; computed once per folder."""
    path = out / "gradient.json"
    if not path.exists():
        error = gradient_error(task.level, task.numbers, task.positions)
        write_text(path, json.dumps({"largest_error_ev_per_ang": error}) + "\n")
    return float(json.loads(path.read_text(encoding="utf-8"))["largest_error_ev_per_ang"])


def collect(out: Path, work: Sequence[Task], parts: Iterable[Part]) -> dict[str, dict[str, float]]:
    """Write the parts and return per part the counts, the spread of energies and the forces.

    Raises:
        InputError: two frames are the same structure.
    """
    figures: dict[str, dict[str, float]] = {}
    seen: set[bytes] = set()
    for part in parts:
        shards = [read_shard(task.path) for task in work if task.part == part.name]
        samples = [sample for found, _ in shards for sample in found]
        for sample in samples:
            if sample.positions.tobytes() in seen:
                raise InputError(f"{part.name}: a structure occurs twice; start from an empty folder.")
            seen.add(sample.positions.tobytes())
        write_xyz(out / f"{part.name}.xyz.gz", samples)
        energies = np.array([sample.energy for sample in samples])
        forces = np.concatenate([sample.forces for sample in samples])
        figures[part.name] = {
            "frames": len(samples),
            "dropped": len(shards) - len(samples),
            "energy_mean": float(energies.mean()),
            "energy_std": float(energies.std()),
            "forces_rms": float(np.sqrt((forces**2).mean())),
            "force_max": max(sample.max_force for sample in samples),
            "seconds_per_frame": float(np.median([counts["milliseconds"] for _, counts in shards])) / 1000,
        }
    return figures


def make(
    out: Path,
    *,
    parts: Sequence[Part] = PARTS,
    smiles: str = FINE_TUNING[0],
    level: Level = LEVEL,
    every: int = 250,
    seed: int = 20250,
    processes: int = 1,
    console: Console | None = None,
) -> dict[str, dict[str, float]]:
    """Make the data in ``out``; what is there already is not repeated.

    Returns:
        Per part: ``frames``, ``dropped``, ``energy_mean`` and ``energy_std`` (eV), ``forces_rms`` and ``force_max``
        (eV/Å), ``seconds_per_frame``.

    Raises:
        InputError: ``out`` holds frames of other settings.
        SurfaceError: the dynamics did not give enough structures.
    """
    console = console or Console()
    shares = {part.name: [part.frames, *part.temperatures] for part in parts}
    guard_settings(out, {"level": level.record, "molecule": smiles, "every_fs": every, "seed": seed, "parts": shares})
    with console.status("structures on the GFN2-xTB surface"):
        work = tasks(out, parts, smiles, level, every=every, seed=seed)
    error = checked_gradient(out, work[0])
    console.print(f"{smiles} at {level}: largest error of a force by finite differences {error:.1e} eV/Å")
    run_missing(work, label_frame, processes=processes, console=console, title="DFT frames")
    figures = collect(out, work, parts)
    temperatures = {part.name: part.temperatures for part in parts}
    text = card(smiles, work[0].numbers, level, temperatures, figures, every=every, error=error, max_force=MAX_FORCE)
    write_text(out / "README.md", text)
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the data; a rerun continues there")
    parser.add_argument("--processes", type=int, default=1, help="frames that are labelled at the same time")
    parser.add_argument("--functional", default=LEVEL.functional, help="a name that libxc knows")
    parser.add_argument("--basis", default=LEVEL.basis)
    parser.add_argument("--limit", type=int, help="at most so many frames per part, for a trial")
    given = parser.parse_args()
    parts = [Part(p.name, min(p.frames, given.limit or p.frames), p.temperatures) for p in PARTS]
    console = Console()
    level = Level(functional=given.functional, basis=given.basis)
    figures = make(given.out, parts=parts, level=level, processes=given.processes, console=console)
    for name, row in figures.items():
        console.print(name, row)


if __name__ == "__main__":
    main()
