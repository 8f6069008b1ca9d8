"""The whole job on what is in the package: the model ``mini`` meets DFT data of a molecule it has never seen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ase.io
from ase import Atoms
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from forcetune.adapters.methods import build_method
from forcetune.config import SCHEDULE_FREE, RunConfig, load_config
from forcetune.deployment.calculator import calculator
from forcetune.deployment.dynamics import EnergyConservation, energy_conservation
from forcetune.reports.run_page import write_report
from forcetune.runs.environment import process_peak_memory
from forcetune.runs.fit import Run, run_fit
from forcetune.runs.results import DynamicsSummary, Results, write_results
from forcetune.runs.runtime import limited_threads

DATA = Path(__file__).parents[1] / "frames" / "aminoethanol"
PARTS = ("test", "hot")
# one thread: the model and the batches are so small that more of them would wait for each other
TRAINING: dict[str, Any] = {
    "epochs": 50,
    "valid_every": 2,
    "schedule": {"name": "cosine", "warmup_epochs": 2},
    "ema": 0.99,
    "loss": {"energy": 40.0},
    "threads": 1,
}


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo did.

    Attributes:
        run: the fine-tuning; its ``before`` and ``after`` have the parts ``test`` and ``hot``.
        dynamics: NVE with the tuned potential.
        seconds: wall time of everything.
        peak_memory: largest resident memory of this process, bytes; None where the system does not tell.
    """

    run: Run
    dynamics: EnergyConservation
    seconds: float
    peak_memory: int | None


def demo_file(part: str) -> Path:
    """A file of the DFT data in this package: ``train``, ``valid``, ``test`` or ``hot``."""
    return DATA / f"{part}.xyz.gz"


def demo(
    out: str | Path = "demo",
    *,
    method: str = "elora",
    picoseconds: float = 2.0,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Demo:
    """Tune ``mini`` (GFN2-xTB) to 50 frames of 2-aminoethanol at PBE0/def2-SVP, test it, and run dynamics with it.

    Args:
        out: run folder.
        method: as of :func:`forcetune.fit`.
        picoseconds: length of the dynamics.
        overwrite: replace an existing run folder.
        settings: options by dotted name that come before the demo's own.
        console: where progress is printed; standard error by default.

    Raises:
        InputError: the run folder is taken, or an option is wrong.
    """
    began = time.monotonic()
    console = console or Console(stderr=True, soft_wrap=True, emoji=False)
    options: dict[str, Any] = {
        "data": {
            "train": [str(demo_file("train"))],
            "valid": [str(demo_file("valid"))],
            "test": [str(demo_file(part)) for part in PARTS],
        },
        "model": {"model": "mini"},
        "method": {"name": method},
        "output": {"run": str(out), "overwrite": overwrite},
    }
    options["training"] = _training(load_config(given=options, overrides=settings))
    run = run_fit(load_config(given=options, overrides=settings), console=console)
    with limited_threads(TRAINING["threads"]):
        dynamics = _dynamics(run, picoseconds, console)
    summary = DynamicsSummary.model_validate(dynamics.to_json())
    results = Results.model_validate(run.results).model_copy(update={"dynamics": summary})
    run = replace(run, results=results.to_json())
    write_results(run.folder, results)
    write_report(run.folder)
    return Demo(run, dynamics, time.monotonic() - began, process_peak_memory())


def _training(config: RunConfig) -> dict[str, Any]:
    """The demo's options of the training that go with the optimizer; schedule-free averages and decays by itself."""
    if config.choose_optimizer(build_method(config.method).optimizer) not in SCHEDULE_FREE:
        return TRAINING
    warmup = {"warmup_epochs": TRAINING["schedule"]["warmup_epochs"]}
    return {key: value for key, value in TRAINING.items() if key != "ema"} | {"schedule": warmup}


def _dynamics(run: Run, picoseconds: float, console: Console) -> EnergyConservation:
    atoms = ase.io.read(demo_file("test"), index=0)
    assert isinstance(atoms, Atoms)
    atoms.calc = calculator(run.folder, dtype="float64")
    columns = (TextColumn("dynamics"), BarColumn(bar_width=24), TextColumn("{task.completed:.2f} ps"))
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=picoseconds)
        timestep = 0.5
        return energy_conservation(
            atoms,
            picoseconds=picoseconds,
            timestep=timestep,
            progress=lambda step: bar.update(task, completed=step * timestep / 1000),
        )
