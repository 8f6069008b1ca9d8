"""Time of the compiled kernels by themselves, and the share of the processor's peak that they reach.

    python benchmarks/kernels.py [--model mini] [--atoms 375] [--dtype float64] [--threads 1,2] [--json FILE]

A model predicts energies and forces of a structure, with frozen weights and then with all of them trained, as in a
training step; its calls of convolution and symmetric contraction are noted, and repeated alone. Structures are those of
``predict.py``. Shown are the shortest time that passed and the processor time of that call, which all threads of the
process took; the latter is the fairer figure where other jobs share the cores. Multiply-adds are those that the sums
have, whoever computes them; the peak is that of a loop of multiply-adds in registers, on one thread, measured in the
same run. ``first, ms`` is what the first call took with an empty folder of compiled code, compiling included; kernels
of one shape are compiled once, by the first layer that has it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from predict import structure
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import forcetune
from forcetune.deployment.calculator import build_frame
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate
from forcetune.kernels.compiled import assembly, threads
from forcetune.kernels.compiled.assembly import Writer
from forcetune.kernels.compiled.convolution_form import SPLINE_ROWS
from forcetune.kernels.compiled.machine import compiled, target
from forcetune.runs.environment import describe_environment
from forcetune.utils.files import write_text

DTYPES = {"float64": torch.float64, "float32": torch.float32}
PATH = ("source", "channels", "dim_in", "dim_out", "odd", "group", "column")


@dataclass
class Call:
    """A call of a kernel.

    Attributes:
        name: of the operation.
        title: for the table.
        run: the call again.
        work: multiply-adds.
        first: seconds of the first call.
    """

    name: str
    title: str
    run: Callable[[], object]
    work: float
    first: float


class Notes(TorchDispatchMode):
    """Notes the calls of compiled kernels within this context."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.calls = when, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        result = func(*args, **(kwargs or {}))
        taken = time.thread_time() - start
        name = func.name().removeprefix("forcetune::")
        if func.namespace == "forcetune" and name in WORK:
            work, title = WORK[name](args)
            self.calls.append(Call(name, f"{title}, {self.when}", lambda: func(*args), work, taken))
        return result


# ---- multiply-adds ---------------------------------------------------------------------------------------------------


def _paths(flat: Sequence[int]) -> list[dict[str, int]]:
    return [dict(zip(PATH, flat[start : start + len(PATH)], strict=True)) for start in range(0, len(flat), len(PATH))]


def _sums(paths: Sequence[int]) -> tuple[int, int, int]:
    """Multiply-adds of an edge with T, of R with x, and channels of all paths."""
    rows = _paths(paths)
    coupled = sum(p["dim_in"] * p["dim_out"] * p["channels"] for p in rows)
    return coupled, sum(p["dim_in"] * p["channels"] for p in rows), sum(p["channels"] for p in rows)


def gather_work(args: Any) -> tuple[float, str]:
    paths, starts, present = args[0], args[1], args[7]
    coupled, products, _ = _sums(paths)
    forms = 1 if not present else (present[0] or any(present[2:])) + present[1]
    return float(starts[-1]) * (forms * coupled + products), f"convolution of {len(paths) // 7} paths: sums"


def _pull_sums(paths: Sequence[int], present: Sequence[bool], wanted: Sequence[bool]) -> float:
    """Multiply-adds of the gradients for an edge, without what splines take."""
    coupled, products, _ = _sums(paths)
    work = (wanted[0] or any(wanted[2:])) * coupled + wanted[0] * products + any(wanted[2:]) * products
    return (2 if present else 1) * (work + wanted[1] * (coupled + products))


def pull_work(args: Any) -> tuple[float, str]:
    paths, directions, present, wanted = args[0], args[1], args[9], args[10]
    work = _pull_sums(paths, present, wanted)
    return float(directions.sum()) * work, f"convolution of {len(paths) // 7} paths: gradients"


def splined_gather_work(args: Any) -> tuple[float, str]:
    paths, starts, present = args[0], args[1], args[10]
    coupled, products, channels = _sums(paths)
    forms = 1 if not present else (present[0] or any(present[2:])) + present[1]
    work = forms * coupled + products + (2 if present and present[0] else 1) * SPLINE_ROWS * channels
    return float(starts[-1]) * work, f"convolution of {len(paths) // 7} paths with splines: sums"


def splined_pull_work(args: Any) -> tuple[float, str]:
    paths, directions, present, wanted = args[0], args[1], args[12], args[13]
    channels = _sums(paths)[2]
    work = float(directions.sum()) * _pull_sums(paths, present, wanted)
    total = work + len(directions) * 2 * SPLINE_ROWS * channels
    return total, f"convolution of {len(paths) // 7} paths with splines: gradients"


def _terms(structure: Sequence[torch.Tensor], coefficients: torch.Tensor) -> tuple[int, str]:
    """Multiply-adds of the values for one atom and all channels."""
    monomials, terms, rows = len(structure[0]) // 2, len(structure[3]), len(structure[2]) // 3
    channels = coefficients.shape[1] * coefficients.shape[3]
    return (monomials + terms + rows) * channels, f"contraction of {terms} terms"


def value_work(args: Any) -> tuple[float, str]:
    work, title = _terms(args[0], args[4])
    return float(sum(args[2])) * work, f"{title}: values"


def contraction_pull_work(args: Any) -> tuple[float, str]:
    work, title = _terms(args[0], args[4])
    return float(sum(args[1])) * work * (2 * args[5][0] + args[5][1]), f"{title}: gradients"


def moved_work(args: Any) -> tuple[float, str]:
    work, title = _terms(args[0], args[4])
    wanted = args[6]
    return float(sum(args[1])) * work * 2 * (1 + wanted[1] + wanted[2]), f"{title}: gradients of gradients"


WORK: dict[str, Callable[[Any], tuple[float, str]]] = {
    "convolution_gather": gather_work,
    "convolution_pull": pull_work,
    "splined_convolution_gather": splined_gather_work,
    "splined_convolution_pull": splined_pull_work,
    "contraction_value": value_work,
    "contraction_pull": contraction_pull_work,
    "contraction_moved": moved_work,
}


# ---- measurements ----------------------------------------------------------------------------------------------------


def peak(dtype: str) -> float:
    """Multiply-adds a second of one thread that does nothing else."""
    own = target(dtype)
    count = min(own.registers - 4, 16)

    def text() -> str:
        w = Writer("peak", own)
        place = w.address(0)
        factor, term = w.load(place), w.load(place, own.lanes)
        sums = w.loop("%first", "%last", 1, [w.zero] * count, lambda _, s: [w.multiply_add(factor, v, term) for v in s])
        for number, value in enumerate(sums):
            w.store(value, place, number * own.lanes)
        return assembly.module_text([w])

    function = threads.function(compiled(f"peak {own} {count}", text).address("peak"))
    values = torch.full((count * own.lanes,), 0.5, dtype=DTYPES[dtype])
    table = np.array([values.data_ptr()], dtype=np.int64)
    turns, best = 2_000_000, 0.0
    for _ in range(5):
        start = time.thread_time()
        function(table.ctypes.data, 0, turns)
        best = max(best, turns * count * own.lanes / (time.thread_time() - start))
    return best


def calls_of(model: Any, batch: Batch) -> list[Call]:
    """Of a prediction with frozen weights, and of a training step; each kind once."""
    model.model.requires_grad_(False)
    with Notes("prediction") as prediction:
        model.predict(batch)
    model.model.requires_grad_(True)
    with Notes("training") as training:
        found = model.predict(batch, create_graph=True)
        (found.energy.square().sum() + found.forces.square().sum()).backward()
    calls: dict[tuple[str, float], Call] = {}
    for call in [*prediction.calls, *training.calls]:
        # contractions of a prediction are those of a step
        calls.setdefault((call.name, call.work), call)
    return list(calls.values())


def measure(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Shortest time that passed and shortest processor time, seconds."""
    passed, taken = [], []
    with torch.no_grad():
        for _ in range(rounds):
            start, processor = time.perf_counter(), time.process_time()
            run()
            passed.append(time.perf_counter() - start)
            taken.append(time.process_time() - processor)
    return min(passed), min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="name or path")
    parser.add_argument("--atoms", type=int, default=375, help="of the structure, as predict.py takes them")
    parser.add_argument("--dtype", default="float64", choices=tuple(DTYPES))
    parser.add_argument("--threads", default="1,2", help="numbers of threads")
    parser.add_argument("--rounds", type=int, default=10, help="calls, of which the shortest counts")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.threads.split(",")]
    torch.set_num_threads(1)
    model = forcetune.load(arguments.model, dtype=arguments.dtype, device="cpu", kernels="compiled")
    frames = [build_frame(structure(arguments.atoms))]
    batch = collate(build_graphs(model, frames)).to(dtype=DTYPES[arguments.dtype])
    home = os.environ.get("FORCETUNE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FORCETUNE_HOME"] = folder  # nothing is compiled yet
        start = time.process_time()
        calls = calls_of(model, batch)
        together = time.process_time() - start
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.o"))
        most = peak(arguments.dtype)
    if home is None:
        del os.environ["FORCETUNE_HOME"]
    else:
        os.environ["FORCETUNE_HOME"] = home
    title = f"{arguments.atoms} atoms, {batch.n_edges} edges, {arguments.dtype}, peak {most / 1e9:.1f} G/s a thread"
    columns = ("kernel", "10⁶ m.-a.", "first, ms", "threads", "ms", "processor, ms", "of peak")
    table, result = Table(*columns, title=title, title_justify="left"), []
    for call in calls:
        row: dict[str, Any] = {"kernel": call.title, "multiply_adds": call.work, "first_seconds": call.first}
        for count in counts:
            torch.set_num_threads(count)
            passed, taken = measure(call.run, arguments.rounds)
            share = call.work / taken / most
            row[f"{count}_threads"] = {"seconds": passed, "processor_seconds": taken, "share_of_peak": share}
            about = (call.title, f"{call.work / 1e6:.1f}", f"{1e3 * call.first:.0f}")
            figures = (f"{count}", f"{1e3 * passed:.2f}", f"{1e3 * taken:.2f}", f"{100 * share:.0f} %")
            table.add_row(*(about if count == counts[0] else ("", "", "")), *figures)
        result.append(row)
    Console().print(table)
    print(f"first prediction and step, compiling included: {together:.1f} s of processor time, {size / 1e3:.0f} kB")
    if arguments.json is not None:
        machine = {"processor": describe_environment(torch.device("cpu"))["device"], "torch": torch.__version__}
        content = {"model": arguments.model, "atoms": arguments.atoms, "edges": batch.n_edges, "kernels": result}
        content |= {"dtype": arguments.dtype, "peak": most, "first_seconds": together, "machine": machine}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
