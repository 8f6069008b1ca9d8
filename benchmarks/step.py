"""Time of a training step and of inference: mace-torch and forcetune in turn, in one process, on the same frames.

    python benchmarks/step.py [--data DATA/rmd17] [--json FILE] [--threads 2] [--device cuda] [--quick] [--keep-memory]
    python benchmarks/step.py --data DATA/rmd17 --profile
    python benchmarks/step.py --kernels compiled,torch --quick --methods mmea

A step is energies and forces with their graph, the loss mean (E − E*)² + 1000 mean (F − F*)², and its gradient by
the trainable parameters; no optimizer. Models have the size of MACE-OFF23-medium (128x0e+128x1o, correlation 3,
l up to 3, cutoff 5 Å) for H, C, O, with random weights. Frames are aspirin: those of rMD17 where ``--data`` names its
folder, otherwise a shaken molecule of the same composition.

Codes take turns and medians are given, so that a busy machine slows all of them. Rows called "compiled" are steps as
``training.compile=on`` makes them; beside them stands what the first one took, with all that compiling costs. Memory is
the largest growth of what torch has allocated during one step, in a run of its own: by the profiler on a CPU, by CUDA's
allocator there. Page faults are those of a step: memory that is given back after a step has to be asked for again,
and filled with zeros, in the next. Processor time is that of all threads of the process, the fairer figure where other
jobs share the cores. ``--kernels`` says what computes convolutions and contractions; of several each has its rows.
What page faults cost is a matter of the machine, and is high on virtual ones; with
``--keep-memory`` glibc's allocator keeps all memory, and it costs nothing.
``--profile`` shows instead where the time of an mmea step goes, and what it costs to make a batch ready. Predictions
called "compiled" are those of the ASE calculator in dynamics of small systems. What gates cost says ``gates.py``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from forcetune.adapters.attach import attach, fold_weights
from forcetune.adapters.methods import method
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.library import import_mace
from forcetune.backbones.mace.trusted import LibraryMace
from forcetune.backbones.network import NetworkBackbone
from forcetune.backbones.protocol import Base
from forcetune.config import LossConfig, TrainingConfig
from forcetune.deployment.calculator import build_frame
from forcetune.deployment.compiled_prediction import CHECKED, COMPILED_AFTER, MOST_EDGES, CompiledPrediction
from forcetune.diagnostics.memory import measure_peak_memory
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate, split_batch
from forcetune.graphs.loader import BatchLoader
from forcetune.kernels.compiled.choice import choose_kernels
from forcetune.kernels.edge_plan import make_plan
from forcetune.runs.environment import describe_environment
from forcetune.training.compiled import CompiledStep, Workers, choose_layouts, frames_of_part
from forcetune.utils.files import write_text

ELEMENTS = (1, 6, 8)
METHODS = ("mmea", "elora", "full", "readout")
LIBRARY = "mace-torch, all parameters"
LORA = "mace-torch, --lora rank 16"
DTYPES = {"float64": torch.float64, "float32": torch.float32}

Runs = dict[str, Callable[[], object]]


def library_model(model: torch.nn.Module, dtype: torch.dtype, device: str = "cpu") -> LibraryMace:
    """A module of mace, computed by its own forward pass."""
    options = {"head": None, "elements": None, "dtype": dtype, "device": device}
    return LibraryMace(model, Base("random", "", "", "MIT"), reason="a benchmark", **options)


def random_model(dtype: torch.dtype, device: str = "cpu") -> LibraryMace:
    """A model of MACE-OFF23-medium size; always the same weights."""
    modules = import_mace()
    from e3nn import o3

    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = modules.ScaleShiftMACE(
                r_max=5.0,
                num_bessel=8,
                num_polynomial_cutoff=5,
                max_ell=3,
                interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
                interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
                num_interactions=2,
                num_elements=len(ELEMENTS),
                hidden_irreps=o3.Irreps("128x0e+128x1o"),
                MLP_irreps=o3.Irreps("16x0e"),
                gate=torch.nn.functional.silu,
                atomic_energies=np.zeros(len(ELEMENTS)),
                avg_num_neighbors=14.4,
                atomic_numbers=list(ELEMENTS),
                correlation=3,
                atomic_inter_scale=1.0,
                atomic_inter_shift=0.0,
                radial_MLP=[64, 64, 64],
            )
    finally:
        torch.set_default_dtype(torch.float32)
    return library_model(model, dtype, device)


def aspirin(data: Path | None, count: int) -> list[Atoms]:
    """Frames of rMD17 aspirin, or shaken grids of the same composition and density."""
    if data is not None:
        return list(itertools.islice(itertools.cycle(read(data / "aspirin" / "train.xyz", ":")), count))
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(range(3), range(3), range(3)), axis=-1).reshape(-1, 3)[:21] * 1.55
    numbers = rng.permutation([6] * 9 + [1] * 8 + [8] * 4)
    return [Atoms(numbers, grid + rng.uniform(-0.2, 0.2, grid.shape)) for _ in range(count)]


def periodic_box(atoms: int, seed: int = 0) -> Atoms:
    """A box at 0.1 atoms per Å³, as in an organic liquid."""
    rng = np.random.default_rng(seed)
    side = round(atoms ** (1 / 3)) + 1
    grid = np.stack(np.meshgrid(*3 * [np.arange(side)]), axis=-1).reshape(-1, 3)[:atoms]
    length = (atoms / 0.1) ** (1 / 3)
    positions = (grid + rng.uniform(-0.15, 0.15, grid.shape)) * length / side
    return Atoms(rng.choice(ELEMENTS, atoms, p=(8 / 21, 9 / 21, 4 / 21)), positions, cell=[length] * 3, pbc=True)


def batch_of(model: NetworkBackbone, structures: Sequence[Atoms], dtype: torch.dtype) -> Batch:
    frames = [build_frame(Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc)) for a in structures]
    return collate(build_graphs(model, frames)).to(device=model.device, dtype=dtype)


def lora_model(base: LibraryMace) -> LibraryMace:
    """As ``mace_run_train --lora=True --lora_rank=16`` makes it: only the added weights train."""
    from mace.modules.lora import inject_lora

    model = copy.deepcopy(base.model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inject_lora(model, rank=16, alpha=16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return library_model(model, base.dtype, str(base.device))


def tuned_model(base: LibraryMace, name: str | None) -> NetworkBackbone:
    """Our network with its weights, and an adapter whose parameters are no longer those of the start."""
    tuned = MaceBackbone.from_module(base.model, dtype=base.dtype, device=base.device)
    if name is not None:
        adapter = attach(tuned, method(name))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(1e-2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return tuned


def deployed(tuned: NetworkBackbone) -> NetworkBackbone:
    """As an adapter is used for prediction: weight updates folded into the weights, gates left."""
    fold_weights(tuned)
    return tuned


def step(model: NetworkBackbone, batch: Batch) -> None:
    parameters = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    found = model.predict(batch, create_graph=True)
    loss = found.energy.square().mean() + 1000 * found.forces.square().mean()
    loss.backward()


def compiled_step(model: NetworkBackbone, batch: Batch, threads: int | None = None) -> tuple[Callable[[], None], float]:
    """The same step as ``training.compile=on`` computes it, and the seconds until the first was done."""
    labels = {name: torch.zeros_like(getattr(batch, name)) for name in ("energy", "forces")}
    known = replace(batch, **labels)
    graphs = split_batch(known.to("cpu"), 1)
    on_cpu = batch.positions.device.type == "cpu"
    parameters = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    workers = Workers(threads or (len(graphs) if on_cpu else 1))
    frames = frames_of_part(len(graphs), batch.n_atoms / len(graphs), workers.count) if on_cpu else len(graphs)
    config = TrainingConfig(batch_size=len(graphs), compile="on")
    layouts = choose_layouts(model, config, BatchLoader(graphs, len(graphs)), frames)
    compiled = CompiledStep(model, None, LossConfig(), layouts, parameters, workers)

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss = compiled.loss(known)
        assert loss is not None
        loss.backward()

    start = time.perf_counter()
    run()
    return run, time.perf_counter() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def page_faults() -> int:
    """Of this process so far; 0 where the system does not count them."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def faults_of(run: Callable[[], object]) -> int:
    """Page faults of a run that is not the first."""
    before = page_faults()
    run()
    return page_faults() - before


def medians(
    runs: Runs, rounds: int, repeats: Mapping[str, int], processor: dict[str, float] | None = None
) -> dict[str, float]:
    """Median seconds of each run; all take turns, faster ones several times.

    Args:
        runs: by their names.
        rounds: that count.
        repeats: of each in a round; 1 where there is none.
        processor: is filled with the medians of processor time.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            for _ in range(repeats.get(name, 1)):
                synchronise()
                start, before = time.perf_counter(), time.process_time()
                run()
                synchronise()
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - start)
                    taken[name].append(time.process_time() - before)
    if processor is not None:
        processor.update({name: statistics.median(values) for name, values in taken.items()})
    return {name: statistics.median(values) for name, values in times.items()}


def training(
    models: Mapping[str, NetworkBackbone], batch: Batch, rounds: int, *, memory: bool
) -> dict[str, dict[str, float]]:
    """Seconds, speed over the library and memory of a step."""
    runs = {name: (lambda model=model: step(model, batch)) for name, model in models.items()}
    compiled: Runs = {}
    starts: dict[str, float] = {}
    for name in (name for name in models if name.split(",")[0] in METHODS):
        row = f"{name}, compiled"
        compiled[row], starts[row] = compiled_step(models[name], batch)
    repeats = dict.fromkeys((*(name for name in models if name.split(",")[0] in METHODS), *compiled), 2)
    processor: dict[str, float] = {}
    found = medians(runs | compiled, rounds, repeats, processor)
    result = {
        name: {
            "seconds": seconds,
            "speedup_over_mace_full": found[LIBRARY] / seconds,
            "processor_seconds": processor[name],
        }
        | ({"start_seconds": starts[name]} if name in starts else {})
        for name, seconds in found.items()
    }
    for name, run in (runs | compiled).items():
        result[name]["page_faults"] = faults_of(run)
    if memory:
        for name, run in runs.items():
            result[name]["peak_mb"] = measure_peak_memory(run, batch.positions.device) / 1e6
    return result


def recorded(model: NetworkBackbone, batch: Batch) -> Callable[[], object] | None:
    """Predictions as the ASE calculator makes them after a while, or None where it goes on as before."""
    compiled = CompiledPrediction(model)
    for _ in range(COMPILED_AFTER + CHECKED):
        compiled.predict(batch, stress=False)
    return None if compiled.recording is None else lambda: compiled.predict(batch, stress=False)


def inference(models: Mapping[str, NetworkBackbone], batch: Batch, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of energies and forces, neighbours given."""
    runs: Runs = {name: (lambda model=model: model.predict(batch)) for name, model in models.items()}
    for name, model in models.items():
        if name.startswith("forcetune") and batch.n_edges <= MOST_EDGES and (played := recorded(model, batch)):
            runs[f"{name}, compiled"] = played
    found = medians(runs, rounds, {})
    first = next(iter(found.values()))
    return {name: {"seconds": seconds, "speedup_over_mace": first / seconds} for name, seconds in found.items()}


def show(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    columns = ("code", "seconds", "times faster", "processor, s", "page faults", "peak MB", "start, s")
    table = Table(*columns, title=title, title_justify="left")
    for name, row in rows.items():
        ratio = next(value for key, value in row.items() if key.startswith("speedup"))
        memory = f"{row['peak_mb']:.0f}" if "peak_mb" in row else ""
        start = f"{row['start_seconds']:.1f}" if "start_seconds" in row else ""
        faults = f"{row['page_faults']:,.0f}" if "page_faults" in row else ""
        processor = f"{row['processor_seconds']:.4f}" if "processor_seconds" in row else ""
        table.add_row(name, f"{row['seconds']:.4f}", f"{ratio:.2f}", processor, faults, memory, start)
    Console().print(table)


def step_table(arguments: argparse.Namespace, dtype: str, frames: int, *, memory: bool) -> dict[str, Any]:
    base = random_model(DTYPES[dtype], arguments.device)
    models: dict[str, NetworkBackbone] = {LIBRARY: base, LORA: lora_model(base)}
    for name in arguments.methods:
        for kernels in arguments.kernels:
            row = name if len(arguments.kernels) == 1 else f"{name}, {kernels} kernels"
            models[row] = tuned_model(base, name)
            choose_kernels(models[row].model, kernels)
    batch = batch_of(base, aspirin(arguments.data, frames), DTYPES[dtype])
    rows = training(models, batch, arguments.rounds, memory=memory)
    show(f"step, {frames} frames, {batch.n_atoms} atoms, {batch.n_edges} edges, {dtype}", rows)
    return {"frames": frames, "dtype": dtype, "atoms": batch.n_atoms, "edges": batch.n_edges, "codes": rows}


def inference_table(arguments: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    base = random_model(DTYPES[dtype], arguments.device)
    models = {
        "mace-torch, base": base,
        "forcetune, base": tuned_model(base, None),
        "forcetune, mmea": deployed(tuned_model(base, "mmea")),
    }
    for model in models.values():
        model.model.requires_grad_(False)
    result = []
    for name, atoms in (("21-atom molecule", aspirin(arguments.data, 1)[0]), ("500-atom box", periodic_box(500))):
        if arguments.quick and len(atoms) > 100:
            continue
        batch = batch_of(base, [atoms], DTYPES[dtype])
        rows = inference(models, batch, arguments.rounds * (5 if len(atoms) < 100 else 1))
        show(f"energy and forces, {name}, {batch.n_edges} edges, {dtype}", rows)
        result.append({"system": name, "dtype": dtype, "atoms": len(atoms), "edges": batch.n_edges, "codes": rows})
    return result


LAYERS = ("contraction", "convolution", "radial")
"""What compiled kernels compute, as their operations are named; splined convolutions are convolutions."""


KINDS = {
    "matrix products": ("mm", "bmm", "addmm", "baddbmm"),
    "moving and filling": (
        *("copy_", "index_select", "index_add_", "index_add", "index", "cat", "stack", "clone", "zero_", "fill_"),
        *("zeros_like", "new_zeros", "zeros", "_index_put_impl_", "contiguous", "_to_copy", "select_backward"),
        *("slice_backward", "empty", "empty_like", "new_empty", "empty_strided", "resize_"),
    ),
    "views": (
        *("slice", "select", "view", "_unsafe_view", "reshape", "transpose", "t", "unsqueeze", "squeeze", "expand"),
        *(
            "as_strided",
            "alias",
            "detach",
            "split",
            "split_with_sizes",
            "unbind",
            "permute",
            "narrow",
            "_reshape_alias",
        ),
    ),
}
"""Operations by what they do; all others of PyTorch's are arithmetic by elements, sums included."""


def kind_of(operation: str) -> str:
    if operation.startswith("forcetune::"):
        return "compiled kernels"
    if not operation.startswith("aten::"):
        return "between the operations"
    name = operation.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() if name in names), "arithmetic by elements")


def profiled(run: Callable[[], object], title: str, rounds: int) -> tuple[dict[str, Any], Any]:
    """Time of a step by operation and by kind of operation, in milliseconds; shows the table."""
    for _ in range(3):
        run()
    plain = medians({"step": run}, rounds, {})["step"]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(rounds):
            run()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    operations = [
        {
            "operation": row.key,
            "share": row.self_cpu_time_total / total,
            "milliseconds": row.self_cpu_time_total / rounds / 1000,
            "calls": row.count / rounds,
        }
        for row in rows
    ]
    table = Table("operation", "share", "ms", "calls", title=title, title_justify="left")
    for row in operations[:15]:
        texts = (f"{100 * row['share']:.1f} %", f"{row['milliseconds']:.1f}", f"{row['calls']:.0f}")
        table.add_row(row["operation"][:40], *texts)
    Console().print(table)
    calls = sum(row["calls"] for row in operations)
    kinds: dict[str, float] = {}
    for row in operations:
        kinds[kind_of(row["operation"])] = kinds.get(kind_of(row["operation"]), 0.0) + row["share"]
    print(f"{1000 * plain:.0f} ms unwatched; {calls:,.0f} calls, {total / rounds / 1000:.0f} ms watched")
    print(", ".join(f"{kind} {100 * share:.0f} %" for kind, share in sorted(kinds.items(), key=lambda row: -row[1])))
    return {"milliseconds": 1000 * plain, "calls": calls, "kinds": kinds, "operations": operations[:15]}, rows


def show_profile(arguments: argparse.Namespace, rounds: int = 5) -> dict[str, Any]:
    """Time of the mmea step, eager and compiled, and of collating and planning a batch, in milliseconds.

    Eager with as many threads as were asked for; compiled on one, where every operation is seen.
    """
    model = tuned_model(random_model(torch.float64), "mmea")
    structures = aspirin(arguments.data, 5)
    batch = batch_of(model, structures, torch.float64)
    eager, rows = profiled(lambda: step(model, batch), "mmea, 5 frames, float64, eager", rounds)
    eager["layers"] = {
        layer: sum(row.self_cpu_time_total for row in rows if row.key.startswith("forcetune::") and layer in row.key)
        / rounds
        / 1000
        for layer in LAYERS
    }
    print("compiled kernels: " + ", ".join(f"{layer} {time:.0f} ms" for layer, time in eager["layers"].items()))
    graphs = build_graphs(model, [build_frame(Atoms(a.numbers, a.positions)) for a in structures])
    species = torch.tensor([model.elements.index(int(number)) for number in batch.numbers])
    works = {
        "collate": lambda: collate(graphs),
        "plan": lambda: make_plan(batch.edge_index, batch.unit_shifts, species),
    }
    ready = medians(works, 20, {})
    print(", ".join(f"{name} {1000 * time:.2f} ms" for name, time in ready.items()) + " a batch")
    torch.set_num_threads(1)
    compiled, _ = profiled(compiled_step(model, batch, threads=1)[0], "the same, compiled, one thread", rounds)
    return {"eager": eager, "compiled": compiled, "batch": ready}


KEPT = {
    "MALLOC_TRIM_THRESHOLD_": "64000000000",
    "MALLOC_MMAP_THRESHOLD_": "64000000000",
    "MALLOC_TOP_PAD_": "100000000",
}
"""What glibc reads when a process starts."""


def keep_memory() -> None:
    """Start again with an allocator that gives nothing back to the system."""
    if not sys.platform.startswith("linux"):
        raise SystemExit("--keep-memory is for glibc's allocator, on Linux")
    if any(os.environ.get(name) != value for name, value in KEPT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of rMD17, with aspirin/train.xyz in it")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each code")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument(
        "--kernels", type=lambda text: text.split(","), default=["auto"], help="of auto, compiled and torch"
    )
    parser.add_argument("--quick", action="store_true", help="only the float64 batch of five and the molecule")
    parser.add_argument("--profile", action="store_true", help="only the profile of the mmea step")
    parser.add_argument("--keep-memory", action="store_true", help="let the allocator keep all memory (Linux)")
    arguments = parser.parse_args()
    if arguments.keep_memory:
        keep_memory()
    torch.set_num_threads(arguments.threads)
    if arguments.profile:
        found = show_profile(arguments)
        if arguments.json is not None:
            write_text(arguments.json, json.dumps(found, indent=1) + "\n")
        return
    first = step_table(arguments, "float64", 5, memory=True)
    steps = [first]
    if not arguments.quick:
        steps += [step_table(arguments, *case, memory=False) for case in (("float32", 5), ("float64", 1))]
        steps += [step_table(arguments, dtype, 32, memory=False) for dtype in DTYPES]
    predictions = [
        row for dtype in (["float64"] if arguments.quick else DTYPES) for row in inference_table(arguments, dtype)
    ]
    result = {
        "speedup_over_mace_full": {
            name: row["speedup_over_mace_full"] for name, row in first["codes"].items() if name != LIBRARY
        },
        "steps": steps,
        "inference": predictions,
        "machine": {
            "processor": describe_environment(torch.device(arguments.device))["device"],
            "threads": arguments.threads,
            "torch": torch.__version__,
            "memory_kept": arguments.keep_memory,
        },
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
