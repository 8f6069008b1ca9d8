"""Time of energies and forces in ASE: forcetune with both kinds of kernels, mace-torch and symmetrix, in one process.

    python benchmarks/predict.py [--model mini] [--sizes 9,81,375] [--threads 2] [--dtype float64] [--json FILE]
    python benchmarks/predict.py --codes compiled --sizes 9,81,375,1029,5184 --threads 1,2
    python benchmarks/predict.py --codes torch,compiled,mace,symmetrix --symmetrix mini.json

Structures are ethanol (9 atoms) and periodic water, 3 Å between molecules (81 and 375 atoms, or what --sizes names),
of which all atoms move a little before every call, as in dynamics. Codes take turns on the same structures; medians of
the time that passed, and of the processor time that all threads of the process took, which is the fairer figure where
other jobs share the cores. ``mace`` is mace-torch's own calculator on the model's file. ``symmetrix`` needs
symmetrix-xl and the model converted by ``forcetune export MODEL --to symmetrix``; it compiles the model at its first
use, for minutes. Energies and forces of all codes are compared with those of the first. Each number of threads gets a
process of its own, since symmetrix decides on its threads once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator
from rich.console import Console
from rich.table import Table

import forcetune
from forcetune.deployment.calculator import ForcetuneCalculator
from forcetune.runs.environment import describe_environment
from forcetune.utils.files import write_text

STEP = 0.003
"""Å that every atom moves between calls, along each axis."""


def structure(atoms: int) -> Atoms:
    """Ethanol, or as many whole molecules of water in a periodic box.

    Raises:
        SystemExit: there is no such box.
    """
    if atoms == 9:
        # symmetrix's neighbor search wants a cell, which makes no difference where nothing is periodic
        return molecule("CH3CH2OH", vacuum=10.0)
    side = round((atoms / 3) ** (1 / 3))
    if 3 * side**3 != atoms:
        raise SystemExit(f"{atoms} atoms: sizes are 9, and 3 n³ for boxes of water such as 81, 375 and 1029")
    rng = np.random.default_rng(0)
    box = Atoms(cell=3 * [3.0 * side], pbc=True)
    for place in np.ndindex(side, side, side):
        water = molecule("H2O")
        water.rotate(rng.uniform(0, 360), rng.normal(size=3))
        water.translate(3.0 * np.array(place))
        box += water
    return box


def own(arguments: argparse.Namespace, kernels: Any) -> Calculator:
    backbone = forcetune.load(arguments.model, dtype=arguments.dtype, device="cpu", kernels=kernels)
    backbone.model.requires_grad_(False)
    return ForcetuneCalculator(backbone)


def library(arguments: argparse.Namespace) -> Calculator:
    from mace.calculators import MACECalculator

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.model"
        forcetune.load(arguments.model, dtype=arguments.dtype, device="cpu").save(path)
        return MACECalculator(model_paths=str(path), device="cpu", default_dtype=arguments.dtype)


def symmetrix(arguments: argparse.Namespace) -> Calculator:
    from symmetrix import Symmetrix

    if arguments.symmetrix is None:
        raise SystemExit("--symmetrix names the model as symmetrix_extract_mace writes it")
    options = {} if arguments.streamed is None else {"streamed_edges": arguments.streamed}
    return Symmetrix(str(arguments.symmetrix), dtype=arguments.dtype, **options)


CODES: dict[str, Callable[[argparse.Namespace], Calculator]] = {
    "torch": lambda arguments: own(arguments, "torch"),
    "compiled": lambda arguments: own(arguments, "compiled"),
    "mace": library,
    "symmetrix": symmetrix,
}


def measure(calculators: dict[str, Calculator], atoms: Atoms, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of each code, and how far its results are from the first code's; the first rounds warm up."""
    rng = np.random.default_rng(1)
    warm = 3
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calculators}
    far = dict.fromkeys(calculators, (0.0, 0.0))
    first: dict[str, float] = {}
    for turn in range(rounds + warm):
        atoms.positions += rng.normal(scale=STEP, size=atoms.positions.shape)
        expected: tuple[float, np.ndarray] | None = None
        for name, calculator in calculators.items():
            own = atoms.copy()
            own.calc = calculator
            passed, taken = time.perf_counter(), time.process_time()
            forces, energy = own.get_forces(), own.get_potential_energy()
            measured = time.perf_counter() - passed, time.process_time() - taken
            first.setdefault(name, measured[0])
            expected = expected or (energy, forces)
            if turn >= warm:
                times[name].append(measured)
                change = abs(energy - expected[0]), float(np.abs(forces - expected[1]).max())
                far[name] = max(far[name][0], change[0]), max(far[name][1], change[1])
    return {
        name: {
            "seconds": statistics.median(passed for passed, _ in found),
            "processor_seconds": statistics.median(taken for _, taken in found),
            "first_seconds": first[name],
            "energy_difference_ev": far[name][0],
            "force_difference_ev_per_ang": far[name][1],
        }
        for name, found in times.items()
    }


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    columns = ("code", "ms", "processor, ms", "first, ms", "energy, eV", "forces, eV/Å")
    table = Table(*columns, title=title, title_justify="left")
    for name, row in rows.items():
        numbers = [f"{1e3 * row[key]:.1f}" for key in ("seconds", "processor_seconds", "first_seconds")]
        table.add_row(name, *numbers, f"{row['energy_difference_ev']:.1e}", f"{row['force_difference_ev_per_ang']:.1e}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="name or path")
    parser.add_argument("--codes", default="torch,compiled,mace", help=f"of {', '.join(CODES)}")
    parser.add_argument("--sizes", default="9,81,375", help="numbers of atoms")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"))
    parser.add_argument("--threads", default="2", help="numbers of threads, each in a process of its own")
    parser.add_argument("--rounds", type=int, default=10, help="calls of each code that count")
    parser.add_argument("--symmetrix", type=Path, help="the model as symmetrix_extract_mace writes it")
    parser.add_argument("--streamed", help="symmetrix's streamed_edges, such as non-compiled")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    arguments = parser.parse_args()
    counts = list(map(int, arguments.threads.split(",")))
    result = run(arguments, counts[0]) if len(counts) == 1 else in_processes(counts)
    if arguments.json is not None:
        machine = {"processor": describe_environment(torch.device("cpu"))["device"], "torch": torch.__version__}
        content = {"model": arguments.model, "results": result, "machine": machine}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(content, indent=1, sort_keys=True) + "\n")


def in_processes(counts: Sequence[int]) -> list[dict[str, Any]]:
    """Results of this command by one process for each number of threads."""
    result = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in counts:
            path = Path(folder) / f"{threads}.json"
            # of an option that is there twice, the last counts
            command = [sys.executable, *sys.argv, "--threads", str(threads), "--json", str(path)]
            subprocess.run(command, check=True)
            result += json.loads(path.read_text(encoding="utf-8"))["results"]
    return result


def run(arguments: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """Medians for every size."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when symmetrix is imported
    result = []
    for size in map(int, arguments.sizes.split(",")):
        calculators = {name: CODES[name](arguments) for name in arguments.codes.split(",")}
        torch.set_num_threads(threads)  # behind the calculators, as libraries set it, too
        rows = measure(calculators, structure(size), arguments.rounds)
        show(f"energy and forces, {size} atoms, {arguments.dtype}, {threads} threads", rows)
        result.append({"atoms": size, "dtype": arguments.dtype, "threads": threads, "codes": rows})
    return result


if __name__ == "__main__":
    main()
