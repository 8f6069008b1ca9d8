"""The data that the model ``mini`` is pretrained on: small organic molecules at the GFN2-xTB level.

    python -m recipes.mini.pretraining_data --out FOLDER [--limit MOLECULES] [--share SHARE] [--processes N]

Every molecule, pair of molecules and pair of elements is a shard in ``FOLDER/shards``; a rerun makes what is missing.
The shards are then checked and written as extended XYZ:

- ``train.xyz``, ``valid.xyz``: the same molecules, pairs and diatomics, other frames; free atoms in ``train.xyz``,
- ``test_molecules.xyz``: molecules of which no frame is trained on,
- ``test_compressed.xyz``: the same, with a bond stretched or compressed, or atoms pressed together,
- ``test_dimers.xyz``: pairs of such molecules in contact,

and ``statistics.json``.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols
from rich.console import Console
from rich.table import Table

from forcetune.errors import ForcetuneError
from forcetune.utils.files import compute_sha256, write_text
from recipes.mini import generation
from recipes.mini.generation import ISOLATED, Job, jobs, molecule_pairs, run_job
from recipes.mini.molecules import ELEMENTS, held_out_molecules, is_held_out, training_molecules
from recipes.mini.sample import Sample, read_shard, write_xyz
from recipes.mini.work import guard_settings, run_missing

SEED = 20250
VALID_SHARE = 0.05
PAIRS_PER_MOLECULE = 0.8
STRAINED = ("stretched", "compressed")
FILES = ("train", "valid", "test_molecules", "test_compressed", "test_dimers")


@dataclass(frozen=True, slots=True)
class DataSet:
    """Samples by file, and how many structures were dropped, by reason."""

    files: dict[str, list[Sample]]
    dropped: Counter[str]


def _destination(sample: Sample, held_out: bool, generator: np.random.Generator) -> str:
    """The file that a sample goes to."""
    # drawn for every sample, so that one sample's place does not change that of the others
    valid = generator.random() < VALID_SHARE
    if sample.kind == ISOLATED:
        return "train"
    if not held_out:
        return "valid" if valid else "train"
    if sample.kind == "dimer":
        return "test_dimers"
    return "test_compressed" if sample.kind in STRAINED else "test_molecules"


def gather(work: Sequence[Job], seed: int) -> DataSet:
    """Read the shards, leave out structures that occur twice, and deal the rest out to files.

    Raises:
        ForcetuneError: a number is not finite, or a free atom is missing.
    """
    found = DataSet({name: [] for name in FILES}, Counter())
    seen: set[tuple[bytes, bytes]] = set()
    for job in work:
        samples, dropped = read_shard(job.path)
        found.dropped.update(dropped)
        held_out = job.kind in ("molecule", "dimers") and all(is_held_out(smiles) for smiles in job.subject)
        generator = np.random.default_rng([*job.entropy, seed])
        for sample in samples:
            key = (sample.numbers.tobytes(), sample.positions.tobytes())
            if key in seen:
                found.dropped["duplicate"] += 1
                continue
            if not (np.isfinite(sample.energy) and np.isfinite(sample.forces).all()):
                raise ForcetuneError(f"{job.path}: a label is not finite; delete the file and run again.")
            # free atoms of different elements stand at the same place: their numbers tell them apart
            seen.add(key)
            found.files[_destination(sample, held_out, generator)].append(sample)
    atoms = {int(sample.numbers[0]) for sample in found.files["train"] if sample.kind == ISOLATED}
    if atoms != set(ELEMENTS):
        missing = ", ".join(chemical_symbols[number] for number in sorted(set(ELEMENTS) - atoms))
        raise ForcetuneError(f"no energy of the free atoms of {missing}; the other data cannot be used without.")
    return found


def draw_share(work: Sequence[Job], share: float) -> list[Job]:
    """About ``share`` of the molecules and pairs, at random, and all atoms and diatomics.

    What a smaller share has is part of a larger one, so that a folder can be extended.
    """

    def is_drawn(job: Job) -> bool:
        return job.kind in ("atoms", "diatomic") or np.random.default_rng(job.entropy).random() < share

    return [job for job in work if is_drawn(job)]


def statistics(data: DataSet) -> dict[str, object]:
    """Counts and ranges per file and kind, energies against the free atoms, eV and eV/Å."""
    free = {int(s.numbers[0]): s.energy for s in data.files["train"] if s.kind == ISOLATED}
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for name, samples in data.files.items():
        tables[name] = {}
        for kind in sorted({sample.kind for sample in samples}):
            chosen = [sample for sample in samples if sample.kind == kind]
            cohesive = [(s.energy - sum(free[int(z)] for z in s.numbers)) / len(s.numbers) for s in chosen]
            forces = np.concatenate([sample.forces for sample in chosen])
            tables[name][kind] = {
                "frames": len(chosen),
                "atoms": len(forces),
                "energy_per_atom_min": min(cohesive),
                "energy_per_atom_max": max(cohesive),
                "forces_rms": float(np.sqrt((forces**2).mean())),
                "force_max": max(sample.max_force for sample in chosen),
            }
    energies = {chemical_symbols[number]: energy for number, energy in sorted(free.items())}
    return {"files": tables, "dropped": dict(sorted(data.dropped.items())), "free_atoms": energies}


def show(console: Console, tables: Mapping[str, Mapping[str, Mapping[str, float]]], dropped: Mapping[str, int]) -> None:
    """Print the statistics."""
    table = Table("file", "kind", "frames", "eV/atom from", "to", "rms force", "longest, eV/Å")
    for name, kinds in tables.items():
        for kind, row in kinds.items():
            energies = f"{row['energy_per_atom_min']:.2f}", f"{row['energy_per_atom_max']:.2f}"
            table.add_row(
                name, kind, f"{row['frames']:.0f}", *energies, f"{row['forces_rms']:.2f}", f"{row['force_max']:.1f}"
            )
    console.print(table)
    console.print("dropped:", ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none")


def make(
    out: Path,
    *,
    limit: int | None = None,
    share: float = 1.0,
    seed: int = SEED,
    processes: int = 1,
    console: Console | None = None,
) -> DataSet:
    """Make the data in ``out``; shards that are there already are not repeated.

    Args:
        out: the folder.
        limit: at most so many training and half as many held-out molecules, for a trial.
        share: of the molecules and pairs.
        seed: of all random numbers.
        processes: how many shards are made at the same time; the data do not depend on it.
        console: where progress and the table are printed.

    Raises:
        InputError: ``out`` holds data of other settings.
        ForcetuneError: the data do not pass the checks.
    """
    console = console or Console()
    guard_settings(out, {"seed": seed, "limit": limit, "max_force": generation.MAX_FORCE})
    training, held_out = training_molecules(), held_out_molecules()
    if limit is not None:
        training, held_out = training[:limit], held_out[: max(1, limit // 2)]
    pairs: list[tuple[str, str]] = []
    for group in (training, held_out):
        pairs += molecule_pairs(group, max(1, round(PAIRS_PER_MOLECULE * len(group))), seed)
    work = draw_share(jobs(out, seed, training + held_out, tuple(pairs)), share)
    run_missing(work, run_job, processes=processes, console=console, title="shards")
    data = gather(work, seed)
    for name, samples in data.files.items():
        write_xyz(out / f"{name}.xyz", samples)
    figures = statistics(data)
    figures["molecules"] = sum(job.kind == "molecule" and not is_held_out(job.subject[0]) for job in work)
    figures["sha256"] = {name: compute_sha256(out / f"{name}.xyz") for name in data.files}
    write_text(out / "statistics.json", json.dumps(figures, indent=2) + "\n")
    return data


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the data; a rerun continues there")
    parser.add_argument("--limit", type=int, help="at most so many molecules, for a trial")
    parser.add_argument("--share", type=float, default=1.0, help="of the molecules and pairs, drawn at random")
    parser.add_argument("--processes", type=int, default=1, help="shards that are made at the same time")
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    console = Console()
    data = make(
        given.out, limit=given.limit, share=given.share, seed=given.seed, processes=given.processes, console=console
    )
    stored = json.loads((given.out / "statistics.json").read_text(encoding="utf-8"))
    show(console, stored["files"], data.dropped)


if __name__ == "__main__":
    main()
