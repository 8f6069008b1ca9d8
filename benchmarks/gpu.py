"""Everything that is to be known of a GPU, in one command: tests, parity with the CPU, times, memory, a profile.

    python benchmarks/gpu.py --out OUT [--data DATA/rmd17] [--minutes 8]
    python benchmarks/gpu.py --out OUT --dry-run

``OUT/gpu.json`` and ``OUT/gpu.md`` are written after every part. A part that fails, or that there is no time left for,
says so there, and the others go on; so does a single row, as where memory does not suffice. ``--dry-run`` does the same
on the CPU with tiny sizes, to see that the script works: its times mean nothing.

Parts, in this order: the tests marked ``gpu``; parity of energies, forces, stress and the gradients of the trained
parameters between CPU and GPU, in float64, by every kind of kernels; neighbor searches and plans on the device, against
the CPU's; steps and predictions by our layers and by Triton's and cuequivariance's kernels in them, against mace-torch
(eager, and with cuequivariance where it is installed) and sevenn; the epoch of the published aspirin runs (50 training
frames in batches of 5, 50 validation frames; their log: 1.4 s); torch-sim; a profile. ``first_seconds`` hold what is
compiled at first use.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from simulate import GATES, MACE, PLAIN, Models, in_torchsim
from step import (
    DTYPES,
    Runs,
    aspirin,
    batch_of,
    compiled_step,
    deployed,
    library_model,
    medians,
    periodic_box,
    random_model,
    step,
    synchronise,
    tuned_model,
)
from torch.profiler import ProfilerActivity, profile

import forcetune
from forcetune.adapters.attach import attach
from forcetune.adapters.methods import METHODS, method
from forcetune.backbones.network import NetworkBackbone
from forcetune.config import TrainingConfig
from forcetune.deployment.calculator import build_frame
from forcetune.diagnostics.memory import measure_peak_memory
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.frames.frame import Frame
from forcetune.graphs.edges import find_edges
from forcetune.graphs.graph import Batch
from forcetune.graphs.neighbor_search import search_neighbors
from forcetune.graphs.verlet_list import VerletList
from forcetune.kernels.compiled.choice import Kernels, choose_kernels
from forcetune.kernels.device_plan import make_device_plan
from forcetune.kernels.edge_plan import make_plan
from forcetune.runs.environment import describe_environment
from forcetune.training.train import train
from forcetune.utils.files import write_text

ROOT = Path(__file__).resolve().parents[1]
TUNED = ("mmea", "elora", "full")
CUEQ = "mace-torch with cuequivariance"
OTHER_KERNELS: tuple[Kernels, ...] = ("triton", "cuequivariance")

Rows = list[dict[str, Any]]


class Bench:
    """What all parts need.

    Attributes:
        device: of the measurements.
        tiny: a dry run.
        end: when no row of the part may begin any more, by ``time.monotonic``.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.tiny: bool = arguments.dry_run
        self.device = "cpu" if self.tiny else "cuda"
        self.data: Path | None = arguments.data
        self.end = time.monotonic() + 60 * arguments.minutes
        self.rounds = 1 if self.tiny else 10

    def guarded(self, rows: Rows, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Add a row, or why there is none."""
        if time.monotonic() > self.end:
            rows.append({"row": name, "not_run": "no time was left"})
            return
        try:
            rows.append({"row": name} | measure())
        except Exception as error:  # whatever it is, the rows after it count
            first_line = (str(error).splitlines() or [""])[0]
            rows.append({"row": name, "not_run": f"{type(error).__name__}: {first_line[:200]}"})
        if self.device == "cuda":
            torch.cuda.empty_cache()


def require(*modules: str) -> None:
    """
    Raises:
        InputError: one is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{module} is not installed.")


# ---- tests and parity ------------------------------------------------------------------------------------------------


def gpu_tests(bench: Bench) -> Rows:
    rows: Rows = []

    def run() -> dict[str, Any]:
        where = "tests/training/test_cuda_graphs.py" if bench.tiny else "tests"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", where]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        return {"exit_code": done.returncode, "summary": "; ".join(lines[-4:]) or done.stderr[-300:]}

    bench.guarded(rows, "pytest -m gpu", run)
    return rows


def small_models() -> dict[str, Callable[[], Any]]:
    sys.path.insert(0, str(ROOT / "tests"))
    from sevennet_models import BATTERY, backbone_of  # pyright: ignore[reportMissingImports]

    return {
        "mini (MACE)": lambda: forcetune.load("mini", elements=[1, 6, 8], dtype="float64", device="cpu"),
        "SevenNet": lambda: backbone_of(BATTERY["SevenNet, modalities"]),
    }


def results(model: NetworkBackbone, batch: Batch) -> dict[str, list[torch.Tensor]]:
    """Energies, forces, stress, and gradients by the trained parameters, on the CPU."""
    parameters = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    found = model.predict(model.place(batch), stress=True, create_graph=True)
    assert found.stress is not None
    loss = found.energy.square().mean() + 1000 * found.forces.square().mean() + found.stress.square().mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    parts = {"energy": [found.energy], "forces": [found.forces], "stress": [found.stress]}
    parts["gradients"] = [gradient for gradient in gradients if gradient is not None]
    return {name: [value.detach().cpu() for value in values] for name, values in parts.items()}


def with_random_adapter(model: Any, name: str) -> Any:
    """A model with an adapter whose factors are not zero, so that every gradient counts."""
    adapter = attach(model, method(name))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def difference(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> float:
    """Largest difference, relative to the largest value."""
    largest = max(float(value.abs().max()) for value in one if value.numel())
    far = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True) if a.numel())
    return far / max(largest, 1e-300)


def parity(bench: Bench) -> Rows:
    rows: Rows = []
    names = ("mmea", "elora") if bench.tiny else tuple(METHODS)
    structures = [aspirin(bench.data, 1)[0], periodic_box(40)]
    for kind, make in small_models().items():
        for name in names:

            def measure(make: Callable[[], Any] = make, name: str = name) -> dict[str, Any]:
                model = with_random_adapter(make(), name)
                batch = batch_of(model, structures, torch.float64)
                on_cpu = results(model, batch)
                model.to(bench.device)
                elsewhere = results(model, batch)
                return {part: difference(values, elsewhere[part]) for part, values in on_cpu.items()}

            bench.guarded(rows, f"{kind}, {name}", measure)

        for kernels in OTHER_KERNELS:

            def by_others(make: Callable[[], Any] = make, kernels: Kernels = kernels) -> dict[str, Any]:
                model = with_random_adapter(make(), "elora")
                batch = batch_of(model, structures, torch.float64)
                on_cpu = results(model, batch)
                model.to(bench.device)
                elsewhere = results(computed_by(kernels, model), batch)
                return {part: difference(values, elsewhere[part]) for part, values in on_cpu.items()}

            bench.guarded(rows, f"{kind}, elora, kernels={kernels}", by_others)
    return rows


# ---- neighbors -------------------------------------------------------------------------------------------------------


def neighbors(bench: Bench) -> Rows:
    """Searches on the device and on the CPU, whether their pairs are the same, and updates of a list that serves."""
    rows: Rows = []
    cutoff = 5.0
    for atoms in (64,) if bench.tiny else (64, 512, 2000, 10000):

        def measure(atoms: int = atoms) -> dict[str, Any]:
            frame = build_frame(periodic_box(atoms))
            tensors = [
                torch.as_tensor(values, device=bench.device)
                for values in (frame.numbers, frame.positions, frame.cell[None], frame.pbc[None])
            ]
            system = torch.zeros(len(frame), dtype=torch.int64, device=bench.device)
            numbers, positions, cell, pbc = tensors
            moving = VerletList(cutoff, 0.4)
            found = search_neighbors(positions, cell, pbc, system, cutoff)
            index, shifts = find_edges(frame, cutoff)
            on_cpu = torch.as_tensor(index), torch.as_tensor(shifts), numbers.cpu()
            pairs = [
                sorted(map(tuple, np.concatenate((one.T, np.rint(two).astype(int)), axis=1).tolist()))
                for one, two in ((index, shifts), (found.edge_index.cpu().numpy(), found.unit_shifts.cpu().numpy()))
            ]
            seconds = medians(
                {
                    "search": lambda: search_neighbors(positions, cell, pbc, system, cutoff),
                    "update": lambda: moving.update(numbers, positions, cell, pbc, system),
                    "cpu": lambda: find_edges(frame, cutoff),
                    "plan": lambda: make_device_plan(found.edge_index, found.unit_shifts, numbers),
                    "cpu plan": lambda: make_plan(*on_cpu, paired=True),
                },
                min(bench.rounds, 3),  # the CPU's take up to seconds
                {},
            )
            plan, expected = make_device_plan(*(one.to(bench.device) for one in on_cpu)), make_plan(*on_cpu)
            same = all(
                torch.equal(getattr(plan, name).cpu(), getattr(expected, name))
                for name in ("order", "edges", "starts", "sender", "receiver", "directions")
            )
            return {"edges": len(pairs[0]), "same_pairs": pairs[0] == pairs[1], "same_plan": same, "seconds": seconds}

        bench.guarded(rows, f"{atoms} atoms, {cutoff:g} Å", measure)
    return rows


# ---- times -----------------------------------------------------------------------------------------------------------


def with_cuequivariance(model: Any, device: str) -> Any:
    require("cuequivariance", "cuequivariance_torch")
    from mace.cli.convert_e3nn_cueq import run as convert

    converted: Any = convert(model.model, device=device)
    return library_model(converted, model.dtype, device)


def timed(bench: Bench, rows: Rows, case: str, runs: dict[str, Callable[[], Callable[[], object]]]) -> None:
    """A row for each code: it is prepared, measured alone, and let go."""
    for name, prepare in runs.items():

        def measure(prepare: Callable[[], Callable[[], object]] = prepare) -> dict[str, Any]:
            begun = time.perf_counter()
            run = prepare()
            run()
            synchronise()
            first = time.perf_counter() - begun
            seconds = medians({"run": run}, bench.rounds, {})["run"]
            peak = measure_peak_memory(run, torch.device(bench.device)) / 1e6
            return {"seconds": seconds, "first_seconds": first, "peak_mb": peak}

        bench.guarded(rows, f"{case}: {name}", measure)


def steps(bench: Bench) -> Rows:
    require("mace")
    rows: Rows = []
    counts = (1,) if bench.tiny else (5, 32)
    for dtype in ("float64",) if bench.tiny else ("float32", "float64"):
        base = random_model(DTYPES[dtype], bench.device)
        for count in counts:
            batch = batch_of(base, aspirin(bench.data, count), DTYPES[dtype])
            runs: dict[str, Callable[[], Callable[[], object]]] = {
                "mace-torch": lambda base=base, batch=batch: lambda: step(base, batch),
                CUEQ: lambda base=base, batch=batch: stepping(with_cuequivariance(base, bench.device), batch),
            }
            for name in TUNED[:1] if bench.tiny else TUNED:
                for kernels in ("auto", *OTHER_KERNELS) if name in TUNED[:2] else ("auto",):
                    runs[row_for(name, kernels)] = lambda name=name, base=base, batch=batch, kernels=kernels: stepping(
                        computed_by(kernels, tuned_model(base, name)), batch
                    )
                for kernels in ("auto", "triton") if name == TUNED[0] else ("auto",):
                    runs[f"{row_for(name, kernels)}, compiled"] = (
                        lambda name=name, base=base, batch=batch, kernels=kernels: compiled_step(
                            computed_by(kernels, tuned_model(base, name)), batch
                        )[0]
                    )
            timed(bench, rows, f"{count} aspirin frames, {dtype}", runs)
    return rows


def computed_by(kernels: Kernels, model: NetworkBackbone) -> NetworkBackbone:
    """The model with its layers set to such kernels."""
    choose_kernels(model.model, kernels)
    return model


def row_for(name: str, kernels: Kernels) -> str:
    return name if kernels == "auto" else f"{name}, kernels={kernels}"


def stepping(model: NetworkBackbone, batch: Batch) -> Callable[[], None]:
    return lambda: step(model, batch)


def predicting(model: NetworkBackbone, batch: Batch) -> Callable[[], object]:
    model.model.requires_grad_(False)
    return lambda: model.predict(batch)


def predictions(bench: Bench) -> Rows:
    require("mace")
    rows: Rows = []
    dtype = "float32"
    base = random_model(DTYPES[dtype], bench.device)
    for atoms in (64,) if bench.tiny else (64, 512, 2000, 10000):
        batch = batch_of(base, [periodic_box(atoms)], DTYPES[dtype])
        runs: dict[str, Callable[[], Callable[[], object]]] = {
            "mace-torch": lambda batch=batch: predicting(base, batch),
            CUEQ: lambda batch=batch: predicting(with_cuequivariance(base, bench.device), batch),
            "forcetune": lambda batch=batch: predicting(tuned_model(base, None), batch),
            **{
                f"forcetune, kernels={kernels}": lambda batch=batch, kernels=kernels: predicting(
                    computed_by(kernels, tuned_model(base, None)), batch
                )
                for kernels in OTHER_KERNELS
            },
            "forcetune, mmea": lambda batch=batch: predicting(deployed(tuned_model(base, "mmea")), batch),
        }
        timed(bench, rows, f"{atoms} atoms, {dtype}", runs)
    return rows


def sevennet(bench: Bench) -> Rows:
    require("sevenn")
    from sevenn.util import pretrained_name_to_path  # pyright: ignore[reportMissingImports]
    from sevennet_step import forcetune_runs, sevenn_runs

    checkpoint = str(pretrained_name_to_path("7net-0"))
    rows: Rows = []
    for atoms, frames in ((32, 1),) if bench.tiny else ((32, 1), (64, 4)):
        for label, make in (("sevenn", sevenn_runs), ("forcetune", forcetune_runs)):

            def measure(make: Any = make, atoms: int = atoms, frames: int = frames) -> dict[str, Any]:
                training, inference, edges = make(checkpoint, atoms, frames, torch.float32, bench.device)
                both: Runs = {f"step: {k}": v for k, v in training.items()}
                both |= {f"prediction: {k}": v for k, v in inference.items()}
                return {"edges": edges} | medians(both, bench.rounds, {})

            bench.guarded(rows, f"SevenNet-0, {frames} × {atoms} atoms, float32: {label}", measure)
    return rows


# ---- an epoch, dynamics, a profile -----------------------------------------------------------------------------------


def frames_with_labels(structures: Sequence[Atoms]) -> list[Frame]:
    """Labels of any size: an epoch takes as long."""
    rng = np.random.default_rng(0)
    return [
        replace(build_frame(one), energy=0.1 * index, forces=rng.standard_normal((len(one), 3)))
        for index, one in enumerate(structures)
    ]


def epochs(bench: Bench) -> Rows:
    require("mace")
    rows: Rows = []
    count, n_epochs = (5, 2) if bench.tiny else (50, 6)
    frames = frames_with_labels(aspirin(bench.data, 2 * count))
    for dtype in ("float64",) if bench.tiny else ("float64", "float32"):
        base = random_model(DTYPES[dtype], bench.device)
        for name in ("mmea",) if bench.tiny else ("mmea", "elora"):
            for compiled in ("off", "on"):

                def measure(
                    base: Any = base, name: str = name, dtype: str = dtype, compiled: str = compiled
                ) -> dict[str, Any]:
                    model: Any = tuned_model(base, name)
                    graphs = [graph.to(dtype=DTYPES[dtype]) for graph in build_graphs(model, frames)]
                    config = TrainingConfig.model_validate({"epochs": n_epochs, "batch_size": 5, "compile": compiled})
                    ends: list[float] = []
                    with tempfile.TemporaryDirectory() as folder:
                        outcome = train(
                            model,
                            config,
                            1e-3,
                            graphs[:count],
                            graphs[count:],
                            Path(folder),
                            lambda errors: None,
                            observe=lambda epoch, errors: ends.append(time.perf_counter()),
                        )
                    seconds = float(np.median(np.diff(ends)))
                    return {"seconds_per_epoch": seconds, "steps": outcome.steps, "eager_because": outcome.untraced}

                bench.guarded(rows, f"{name}, {dtype}, compile={compiled}", measure)
    return rows


def dynamics(bench: Bench) -> Rows:
    require("torch_sim", "mace")
    rows: Rows = []
    atoms_of = {"64 atoms": 64} if bench.tiny else {"64 atoms": 64, "512 atoms": 512}
    copies = (1,) if bench.tiny else (1, 16)
    with tempfile.TemporaryDirectory() as folder:
        models = Models(Path(folder), "float32", bench.device)
        for system, atoms in atoms_of.items():
            for count in copies:
                for way in (MACE, PLAIN, GATES):

                    def measure(way: str = way, atoms: int = atoms, count: int = count) -> dict[str, Any]:
                        run = in_torchsim(models, way, periodic_box(atoms), count)
                        n_steps = 2 if bench.tiny else 30
                        run(n_steps)
                        synchronise()
                        begun = time.perf_counter()
                        run(n_steps)
                        synchronise()
                        per_second = n_steps / (time.perf_counter() - begun)
                        return {"steps_per_second": per_second, "atom_steps_per_second": per_second * atoms * count}

                    bench.guarded(rows, f"{count} × {system}: {way}", measure)
    return rows


def profiled(bench: Bench) -> Rows:
    require("mace")
    rows: Rows = []

    def measure() -> dict[str, Any]:
        base = random_model(torch.float32, bench.device)
        model = tuned_model(base, "mmea")
        batch = batch_of(base, aspirin(bench.data, 1 if bench.tiny else 5), torch.float32)
        run = stepping(model, batch)
        run()
        synchronise()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.device == "cuda" else [])
        with profile(activities=activities) as recorded:
            run()
            synchronise()
        on_gpu = bench.device == "cuda"

        def cost(row: Any) -> float:
            return row.self_device_time_total if on_gpu else row.self_cpu_time_total

        busiest = sorted(recorded.key_averages(), key=cost, reverse=True)[:20]
        return {
            "calls": sum(row.count for row in recorded.key_averages()),
            "microseconds": {row.key[:60]: round(cost(row), 1) for row in busiest},
        }

    bench.guarded(rows, "mmea step, float32", measure)
    return rows


# ---- the report ------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Bench], Rows]] = {
    "tests": gpu_tests,
    "parity": parity,
    "neighbors": neighbors,
    "steps": steps,
    "predictions": predictions,
    "epoch": epochs,
    "sevennet": sevennet,
    "torch-sim": dynamics,
    "profile": profiled,
}


def as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_text(one)}" for key, one in value.items())
    return str(value).replace("|", "/")


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    title = "Dry run on the CPU; times mean nothing" if report["dry_run"] else "GPU"
    lines = [f"# {title}", "", as_text(report["machine"]), ""]
    for part, rows in report["parts"].items():
        keys = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"## {part}", "", f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
        lines += [f"| {' | '.join(as_text(row.get(key, '')) for key in keys)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--data", type=Path, help="folder of rMD17, with aspirin/train.xyz in it")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row begins later")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --dry-run tries the script on the CPU")
    if unknown := sorted(set(arguments.only) - set(PARTS)):
        raise SystemExit(f"there is no part {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    bench = Bench(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = describe_environment(torch.device(bench.device))
    report: dict[str, Any] = {"dry_run": bench.tiny, "machine": machine, "parts": {}}
    whole = bench.end
    for index, name in enumerate(arguments.only):
        begun = time.monotonic()
        # no part takes more than twice its share of the time that is left, so that the last ones have some
        bench.end = min(whole, begun + 2 * (whole - begun) / (len(arguments.only) - index))
        try:
            rows = PARTS[name](bench)
        except Exception as error:  # of a part as a whole, such as a library that is not installed
            rows = [{"row": name, "not_run": f"{type(error).__name__}: {error}"}]
        report["parts"][name] = rows
        failed = sum("not_run" in row for row in rows)
        print(f"{name}: {len(rows) - failed} rows, {failed} not run, {time.monotonic() - begun:.0f} s", flush=True)
        write_text(arguments.out / "gpu.json", json.dumps(report, indent=1, default=str) + "\n")
        write_text(arguments.out / "gpu.md", markdown(report))


if __name__ == "__main__":
    main()
