"""What MMEA's gates cost: predictions and training steps of ``mini`` with and without them, in turn, in one process.

    python benchmarks/gates.py [--atoms 21,50,100,200] [--turns 60] [--predictions] [--json FILE]

A prediction is energies and forces of one structure, the adapter's weight updates folded into the weights as for any
prediction; beside it stands the base without an adapter. A training step is energies and forces with their graph, a
loss and its gradient by the trainable parameters; beside it stands the same method without its gates, and all weights
trained (``full``), which is the base's own step. Molecules are shaken grids of C, H and O up to 21 atoms, periodic
boxes of organic density above.

Time is the processor's, of one thread, so that other programs hardly matter. Each turn runs every case some times; the
cost is the median of the quotients turn by turn. ``--predictions`` leaves out training steps; a second copy of the base
then takes part in the turns, and its cost beside the first says how far to believe the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

import forcetune
from forcetune.adapters.attach import attach, fold_weights
from forcetune.adapters.methods import Method, method
from forcetune.adapters.updates.gate import Gate
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.deployment.calculator import build_frame
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import Batch, collate

REPEATS = 3
Runs = dict[str, Callable[[], object]]


def structure(atoms: int, seed: int = 0) -> Atoms:
    """A molecule of at most 21 atoms, or a periodic box at 0.1 atoms per Å³."""
    rng = np.random.default_rng(seed)
    if atoms <= 21:
        grid = np.stack(np.meshgrid(range(3), range(3), range(3)), axis=-1).reshape(-1, 3)[:atoms] * 1.55
        numbers = rng.choice((1, 6, 8), atoms, p=(8 / 21, 9 / 21, 4 / 21))
        return Atoms(numbers, grid + rng.uniform(-0.2, 0.2, grid.shape))
    side = round(atoms ** (1 / 3)) + 1
    grid = np.stack(np.meshgrid(*3 * [np.arange(side)]), axis=-1).reshape(-1, 3)[:atoms]
    length = (atoms / 0.1) ** (1 / 3)
    positions = (grid + rng.uniform(-0.15, 0.15, grid.shape)) * length / side
    return Atoms(rng.choice((1, 6, 8), atoms, p=(8 / 21, 9 / 21, 4 / 21)), positions, cell=[length] * 3, pbc=True)


def without_gates(whole: Method) -> Method:
    table = {
        kind: tuple(update for update in updates if not isinstance(update, Gate))
        for kind, updates in whole.table.items()
    }
    return replace(
        whole, name="mmea without gates", table={kind: updates for kind, updates in table.items() if updates}
    )


def tuned(chosen: Method | None) -> MaceBackbone:
    """``mini`` with an adapter whose gates do something."""
    backbone = forcetune.load("mini")
    assert isinstance(backbone, MaceBackbone)
    if chosen is None:
        backbone.model.requires_grad_(False)
        return backbone
    adapter = attach(backbone, chosen)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return backbone


def prediction(backbone: MaceBackbone) -> MaceBackbone:
    """Weight updates folded, nothing trainable."""
    fold_weights(backbone)
    backbone.model.requires_grad_(False)
    return backbone


def training_step(backbone: MaceBackbone, batch: Batch) -> None:
    parameters = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    found = backbone.predict(batch, create_graph=True)
    loss = found.energy.square().mean() + 1000 * found.forces.square().mean()
    loss.backward()


def measure(runs: Runs, turns: int) -> dict[str, list[float]]:
    """Processor seconds of each case, one number a turn; the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in list(runs) if turn % 2 else reversed(runs):
            found = []
            for _ in range(REPEATS + 1):
                start = time.process_time()
                runs[name]()
                found.append(time.process_time() - start)
            if turn:
                times[name].append(statistics.median(found[1:]))
    return times


def cost(times: dict[str, list[float]], name: str, reference: str) -> float:
    return statistics.median(one / other for one, other in zip(times[name], times[reference], strict=True)) - 1


def compare_predictions(atoms: int, turns: int) -> dict[str, Any]:
    """Milliseconds and costs for one size, beside those of a second copy of the base."""
    models = {"base": tuned(None), "base again": tuned(None), "mmea": prediction(tuned(method("mmea")))}
    batch = collate(build_graphs(models["base"], [build_frame(structure(atoms))])).to(dtype=models["base"].dtype)
    times = measure({name: lambda model=model: model.predict(batch) for name, model in models.items()}, turns)
    return {
        "atoms": atoms,
        "prediction_ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "prediction_cost": cost(times, "mmea", "base"),
        "base_again_cost": cost(times, "base again", "base"),
    }


def compare(atoms: int, turns: int) -> dict[str, Any]:
    """Milliseconds and costs for one size."""
    base, gated = tuned(None), prediction(tuned(method("mmea")))
    batch = collate(build_graphs(base, [build_frame(structure(atoms))])).to(dtype=base.dtype)
    times = measure({"base": lambda: base.predict(batch), "mmea": lambda: gated.predict(batch)}, turns)
    found: dict[str, Any] = {
        "atoms": atoms,
        "prediction_ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "prediction_cost": cost(times, "mmea", "base"),
    }
    models = {
        "full": tuned(method("full")),
        "mmea without gates": tuned(without_gates(method("mmea"))),
        "mmea": tuned(method("mmea")),
    }
    times = measure({name: lambda model=model: training_step(model, batch) for name, model in models.items()}, turns)
    return found | {
        "step_ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "step_cost": cost(times, "mmea", "mmea without gates"),
        "step_cost_beside_full": cost(times, "mmea", "full"),
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    print("| atoms | prediction, ms | with gates | cost | step without gates, ms | with gates | cost | beside full |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        one, two = row["prediction_ms"], row["step_ms"]
        print(
            f"| {row['atoms']} | {one['base']:.2f} | {one['mmea']:.2f} | {row['prediction_cost']:+.1%} "
            f"| {two['mmea without gates']:.2f} | {two['mmea']:.2f} | {row['step_cost']:+.1%} "
            f"| {row['step_cost_beside_full']:+.1%} |",
            flush=True,
        )


def show_predictions(rows: Sequence[dict[str, Any]]) -> None:
    print("| atoms | prediction, ms | with gates | cost | base again |")
    print("|---|---|---|---|---|")
    for row in rows:
        times = row["prediction_ms"]
        print(
            f"| {row['atoms']} | {times['base']:.2f} | {times['mmea']:.2f} | {row['prediction_cost']:+.1%} "
            f"| {row['base_again_cost']:+.1%} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="what gates cost")
    parser.add_argument("--atoms", default="21,50,100,200")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--predictions", action="store_true", help="no training steps")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(count) for count in arguments.atoms.split(",")]
    if arguments.predictions:
        rows = [compare_predictions(atoms, arguments.turns) for atoms in sizes]
        show_predictions(rows)
    else:
        rows = [compare(atoms, arguments.turns) for atoms in sizes]
        show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
