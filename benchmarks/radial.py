"""What the kernels for radial weights are worth in training: each step with and without them, in turn, in one process.

    python benchmarks/radial.py [--data rmd17] [--model off23|mini] [--methods mmea,elora,full,mmea-pure,readout] \
        [--rounds 16] [--json FILE]

Where the radial networks train, their activations and derivatives are compiled (``RadialNetwork.fused``); where they do
not, radial weights come from splines. A step is energies and forces of five frames of aspirin with their graph, a loss
and its gradient by what is trained, float64, one thread; eager and recorded (``training.compile``). Time is the
processor's. The cost is the median of the quotients round by round; page faults are counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import aspirin, batch_of, compiled_step, faults_of, keep_memory, random_model, step, tuned_model

import forcetune
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.backbones.network import NetworkBackbone
from forcetune.graphs.graph import Batch
from forcetune.kernels.radial import RadialNetwork
from forcetune.kernels.splines import RadialSplines


class NoSplines(RadialSplines):
    """The networks are always computed."""

    def at(self, *arguments: Any, **options: Any) -> None:
        return None


def without_kernels(model: NetworkBackbone) -> NetworkBackbone:
    """The same model, radial networks by PyTorch's operations."""
    assert isinstance(model.model, MaceNetwork)
    model.model._splines = NoSplines()
    for module in model.model.modules():
        if isinstance(module, RadialNetwork):
            module.fused = False
    return model


def processor_times(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, all in turn; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else reversed(runs):
            start = time.process_time()
            runs[name]()
            if number:
                times[name].append(time.process_time() - start)
    return times


def compare(models: dict[str, NetworkBackbone], batch: Batch, rounds: int) -> dict[str, Any]:
    """Milliseconds, quotients and page faults of eager and recorded steps."""
    row: dict[str, Any] = {}
    for kind in ("eager", "recorded"):
        if kind == "eager":
            runs = {name: (lambda model=model: step(model, batch)) for name, model in models.items()}
        else:
            runs = {name: compiled_step(model, batch, threads=1)[0] for name, model in models.items()}
        times = processor_times(runs, rounds)
        quotients = [new / old for new, old in zip(times["with"], times["without"], strict=True)]
        row[kind] = {
            "ms": {name: 1e3 * statistics.median(values) for name, values in times.items()},
            "quotient": statistics.median(quotients),
            "page_faults": {name: faults_of(run) for name, run in runs.items()},
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="what kernels for radial weights are worth in training")
    parser.add_argument("--data", type=Path, help="folder of rMD17, with aspirin/train.xyz in it")
    parser.add_argument("--model", choices=("off23", "mini"), default="off23", help="off23: random weights of its size")
    parser.add_argument("--methods", default="mmea,elora,full,mmea-pure,readout")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    base: Any = random_model(torch.float64) if arguments.model == "off23" else forcetune.load("mini")
    rows = {}
    print("| method | eager, ms: without | with | quotient | recorded, ms: without | with | quotient |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in arguments.methods.split(","):
        models = {"without": without_kernels(tuned_model(base, name)), "with": tuned_model(base, name)}
        batch = batch_of(models["with"], aspirin(arguments.data, 5), torch.float64)
        rows[name] = row = compare(models, batch, arguments.rounds)
        cells = [
            f"{row[kind]['ms']['without']:.1f} | {row[kind]['ms']['with']:.1f} | {row[kind]['quotient']:.2f}"
            for kind in ("eager", "recorded")
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
