"""Time of a training step and of inference: sevenn and forcetune in turn, each in a process of its own, on SevenNet-0.

    python3 -m venv .sevenn && .sevenn/bin/pip install -c constraints/sevennet.txt sevenn
    python benchmarks/sevennet_step.py --python .sevenn/bin/python [--json FILE] [--threads 2] [--model sevennet-0]
                                       [--quick] [--keep-memory]
    python benchmarks/sevennet_step.py --python .sevenn/bin/python --scaling [--largest 1000]

A step is energies and forces with their graph, the loss mean E² + 1000 mean F², and its gradient by the trainable
parameters; no optimizer. A prediction is energies, forces and stress; sevenn computes the stress in training, too.
Frames are shaken crystals of 32 (copper) and 64 (silicon) atoms, alone and in batches of 4 and 16, or (``--scaling``)
one frame of silicon of 64 to 1,000 atoms; neighbours are given. The checkpoint is the published one, in sevenn with all
parameters trained. sevenn has no float64 of its own: there its one-hot elements are made in float64. Memory is how far
torch's allocations rise during one more run.

Both processes stay; in each round they take turns, and medians are given, so that a busy machine slows both. Rows
called "compiled" are steps as ``training.compile=on`` makes them, and predictions of the ASE calculator in dynamics.
Page faults are those of one run that is not the first; with ``--keep-memory`` glibc's allocator keeps all memory in
both processes (benchmarks/step.py says what that is about).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

LIBRARY = "sevenn, all parameters"
METHODS = ("full", "elora", "mmea")
CASES = [(atoms, frames, dtype) for dtype in ("float32", "float64") for atoms in (32, 64) for frames in (1, 4, 16)]
CELLS = {32: ("Cu", 2), 64: ("Si", 2), 216: ("Si", 3), 512: ("Si", 4), 1000: ("Si", 5)}
"""Element and repetitions of its cubic cell for so many atoms."""
SIZES = (64, 216, 512, 1000)

Runs = dict[str, Callable[[], object]]


def crystals(atoms: int, frames: int) -> list[Atoms]:
    """Shaken copper or silicon."""
    element, repetitions = CELLS[atoms]
    structures = [bulk(element, cubic=True).repeat(repetitions) for _ in range(frames)]
    for seed, structure in enumerate(structures):
        structure.rattle(0.05, seed=seed)
    return structures


def growth_mb(run: Callable[[], object]) -> float:
    """How far torch's allocations rise during one run; as forcetune's own, which sevenn's process does without."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most / 2**20


def page_faults() -> int:
    """Of this process so far; 0 where the system does not count them."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


# ---- sevenn, in a process without forcetune --------------------------------------------------------------------------


def _one_hot(self: Any, data: Any) -> Any:
    """As sevenn's, in the precision of the edges."""
    indices = data[self.key_x]
    embedding = torch.nn.functional.one_hot(indices, self.num_classes).to(data["edge_vec"].dtype)
    data[self.key_output] = embedding
    if self.key_additional_output is not None:
        data[self.key_additional_output] = embedding
    if self.key_save is not None:
        data[self.key_save] = indices
    return data


def sevenn_runs(
    checkpoint: str, atoms: int, frames: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Runs, Runs, int]:
    """Step and prediction of sevenn, and the number of edges."""
    import sevenn._keys as KEY
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.checkpoint import SevenNetCheckpoint
    from sevenn.nn.node_embedding import OnehotEmbedding
    from sevenn.train.dataload import unlabeled_atoms_to_graph
    from torch_geometric.loader.dataloader import Collater

    OnehotEmbedding.forward = _one_hot  # pyright: ignore[reportAttributeAccessIssue]
    loaded = SevenNetCheckpoint(checkpoint)
    model = loaded.build_model().to(dtype=dtype, device=device)
    model.set_is_batch_data(True)
    graphs = [
        AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(one, loaded.config["cutoff"]))
        for one in crystals(atoms, frames)
    ]
    batch = Collater(graphs)(graphs).to(device)
    for key, value in list(batch.to_dict().items()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            batch[key] = value.to(dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        model.train()
        for parameter in parameters:
            parameter.grad = None
        found = model(batch.clone())
        loss = found[KEY.PRED_TOTAL_ENERGY].square().mean() + 1000 * found[KEY.PRED_FORCE].square().mean()
        loss.backward()

    def predict() -> None:
        model.eval()
        model(batch.clone())

    return {LIBRARY: step}, {"sevenn": predict}, batch[KEY.EDGE_IDX].shape[1]


# ---- forcetune -------------------------------------------------------------------------------------------------------


def forcetune_runs(
    checkpoint: str,
    atoms: int,
    frames: int,
    dtype: torch.dtype,
    device: str = "cpu",
    methods: Sequence[str] = METHODS,
) -> tuple[Runs, Runs, int]:
    """Steps of each method, eager and compiled, and predictions of the base."""
    from step import batch_of, compiled_step, recorded
    from step import step as eager_step

    from forcetune.adapters.attach import attach
    from forcetune.adapters.methods import method
    from forcetune.backbones.sevennet.backbone import SevenNetBackbone

    structures = crystals(atoms, frames)
    numbers = sorted(set(structures[0].numbers.tolist()))
    steps: Runs = {}
    predictions: Runs = {}
    plain = SevenNetBackbone.load(checkpoint, dtype=dtype, elements=numbers, device=device)
    plain.model.requires_grad_(False)
    batch = batch_of(plain, structures, dtype)
    for name in methods:
        tuned = SevenNetBackbone.load(checkpoint, dtype=dtype, elements=numbers, device=device)
        attach(tuned, method(name))
        steps[name] = lambda tuned=tuned: eager_step(tuned, batch)
        steps[f"{name}, compiled"] = compiled_step(tuned, batch)[0]
    predictions["forcetune"] = lambda: plain.predict(batch, stress=True)
    if (played := recorded(plain, batch)) is not None:
        predictions["forcetune, compiled"] = played
    return steps, predictions, batch.n_edges


# ---- processes -------------------------------------------------------------------------------------------------------


def serve(kind: str, checkpoint: str, threads: int, methods: Sequence[str]) -> None:
    """Carry out what comes in, a JSON object a line; ``make`` a case, then ``run`` one of its codes once."""
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # libraries print
    make = {"sevenn": sevenn_runs, "forcetune": partial(forcetune_runs, methods=methods)}[kind]
    runs: dict[str, Runs] = {}
    for line in sys.stdin:
        work = json.loads(line)
        if "make" in work:
            atoms, frames, dtype = work["make"]
            steps, predictions, edges = make(checkpoint, atoms, frames, getattr(torch, dtype))
            runs = {"step": steps, "prediction": predictions}
            answer: Any = {"edges": edges} | {part: list(found) for part, found in runs.items()}
        elif "memory" in work:
            answer = {"mb": growth_mb(runs[work["part"]][work["memory"]])}
        else:
            before, start, taken = page_faults(), time.perf_counter(), time.process_time()
            runs[work["part"]][work["run"]]()
            seconds, processor = time.perf_counter() - start, time.process_time() - taken
            answer = {"seconds": seconds, "processor": processor, "faults": page_faults() - before}
        print(json.dumps(answer), file=answers, flush=True)


class Server:
    """One of the two processes."""

    def __init__(self, kind: str, arguments: argparse.Namespace, checkpoint: str) -> None:
        python = arguments.python if kind == "sevenn" else sys.executable
        command = [str(python), "-W", "ignore", __file__, "--serve", kind, "--checkpoint", checkpoint]
        environment = dict(os.environ)
        if kind == "sevenn":
            environment.pop("PYTHONPATH", None)
            if arguments.path:
                environment["PYTHONPATH"] = arguments.path
        if arguments.keep_memory:
            from step import KEPT

            environment |= KEPT
        self.process = subprocess.Popen(
            [*command, "--threads", str(arguments.threads), "--methods", ",".join(arguments.methods)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **work: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(work), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process failed with exit code {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(servers: Sequence[Server], case: tuple[int, int, str], rounds: int) -> dict[str, Any]:
    """Median seconds and page faults of every code, taken in turn; the first round warms up."""
    made = [server.ask(make=case) for server in servers]
    edges = {found["edges"] for found in made}
    if len(edges) != 1:
        raise SystemExit(f"the codes have different numbers of edges: {sorted(edges)}")
    atoms, frames, dtype = case
    result: dict[str, Any] = {"atoms": atoms, "frames": frames, "dtype": dtype, "edges": edges.pop()}
    for part in ("step", "prediction"):
        found: dict[str, list[dict[str, float]]] = {}
        for turn in range(rounds + 1):
            for server, codes in zip(servers, made, strict=True):
                for name in codes[part]:
                    answer = server.ask(part=part, run=name)
                    if turn:
                        found.setdefault(name, []).append(answer)
        rows = {
            name: {
                "seconds": statistics.median(answer["seconds"] for answer in answers),
                "processor_seconds": statistics.median(answer["processor"] for answer in answers),
                "page_faults": statistics.median(answer["faults"] for answer in answers),
            }
            for name, answers in found.items()
        }
        for server, codes in zip(servers, made, strict=True):
            for name in codes[part]:
                rows[name]["growth_mb"] = server.ask(part=part, memory=name)["mb"]
        first = next(iter(rows.values()))
        result[part] = {
            name: row
            | {
                "speedup_over_sevenn": first["seconds"] / row["seconds"],
                "processor_speedup": first["processor_seconds"] / row["processor_seconds"],
            }
            for name, row in rows.items()
        }
    return result


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = "{frames} × {atoms} atoms, {edges:,} edges, {dtype}".format(**result)
    columns = ("", "code", "seconds", "times faster", "processor, s", "times less", "page faults", "MB")
    table = Table(*columns, title=title, title_justify="left")
    for part in ("step", "prediction"):
        for name, row in result[part].items():
            numbers = f"{row['seconds']:.4f}", f"{row['speedup_over_sevenn']:.2f}"
            processor = f"{row['processor_seconds']:.4f}", f"{row['processor_speedup']:.2f}"
            counts = f"{row['page_faults']:,.0f}", f"{row['growth_mb']:,.0f}"
            table.add_row(part, name, *numbers, *processor, *counts)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of an environment with sevenn")
    parser.add_argument("--path", help="PYTHONPATH for it")
    parser.add_argument("--model", default="sevennet-0", help="a published SevenNet model without modalities")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each code")
    parser.add_argument("--quick", action="store_true", help="only one frame of 32 atoms in float32")
    parser.add_argument("--atoms", type=int, choices=(32, 64), help="only frames of so many atoms")
    parser.add_argument("--frames", type=int, choices=(1, 4, 16), help="only batches of so many frames")
    parser.add_argument("--scaling", action="store_true", help="one frame of up to --largest atoms instead")
    parser.add_argument("--largest", type=int, default=max(SIZES), help="most atoms of --scaling")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="only in this precision")
    parser.add_argument("--methods", type=lambda text: tuple(text.split(",")), default=METHODS, help="what is trained")
    parser.add_argument("--keep-memory", action="store_true", help="let the allocators keep all memory (Linux)")
    parser.add_argument("--serve", choices=("sevenn", "forcetune"), help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.checkpoint, arguments.threads, arguments.methods)
        return
    from forcetune.backbones.registry import resolve
    from forcetune.runs.environment import describe_environment
    from forcetune.utils.files import write_text

    checkpoint = str(resolve(arguments.model).path)
    servers = [Server(kind, arguments, checkpoint) for kind in ("sevenn", "forcetune")]
    results = []
    every = CASES[:1] if arguments.quick else CASES
    if arguments.scaling:
        sizes = [atoms for atoms in SIZES if atoms <= arguments.largest]
        every = [(atoms, 1, dtype) for dtype in ("float32", "float64") for atoms in sizes]
    cases = [
        (atoms, frames, dtype)
        for atoms, frames, dtype in every
        if arguments.atoms in (None, atoms) and arguments.frames in (None, frames) and arguments.dtype in (None, dtype)
    ]
    for case in cases:
        results.append(measure(servers, case, arguments.rounds))
        show(results[-1])
    for server in servers:
        server.close()
    content = {
        "model": arguments.model,
        "cases": results,
        "machine": {
            "processor": describe_environment(torch.device("cpu"))["device"],
            "threads": arguments.threads,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "memory_kept": arguments.keep_memory,
        },
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
