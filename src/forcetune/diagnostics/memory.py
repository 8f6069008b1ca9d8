"""Memory of a training step, measured on frames of the data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from forcetune.backbones.protocol import Backbone
from forcetune.graphs.graph import Batch, collate

MEASURED_EDGES = 4_000
"""Edges that one measured step has at most, so that measuring stays within seconds and far from the limit."""
LARGEST_MEASURED = 100_000
"""Edges of a single frame above which nothing is measured."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What a training step takes.

    Attributes:
        bytes_per_edge: measured growth, bytes for each edge.
        measured_bytes: growth during the largest step that was run.
        measured_atoms, measured_edges: size of that step.
        batch_atoms, batch_edges: size of the largest batch of the data.
        estimate_bytes: for that batch: measured, and scaled by edges where it is larger than what was run.
    """

    bytes_per_edge: float
    measured_bytes: int
    measured_atoms: int
    measured_edges: int
    batch_atoms: int
    batch_edges: int
    estimate_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes by which torch's allocations grow during a run: by the profiler on a CPU, by the allocator of CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    level = most = 0
    for event in sorted(_memory_events(profiler), key=lambda event: event.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most


@contextmanager
def _silent() -> Iterator[None]:
    """Within this context nothing reaches standard error: some builds of the profiler report their own starts there."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _memory_events(profiler: Any) -> list[Any]:
    assert profiler.profiler is not None
    return [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]


def training_step(backbone: Backbone, batch: Batch) -> None:
    """Energies, forces, a loss of both and its gradient by every parameter, as training all of them does."""
    parameters = [parameter for parameter in backbone.model.parameters() if parameter.is_leaf]
    wanted = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        prediction = backbone.predict(batch, create_graph=True)
        (prediction.energy.square().mean() + prediction.forces.square().mean()).backward()
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.grad = None
            parameter.requires_grad_(before)


def step_memory(backbone: Backbone, graphs: Sequence[Batch], batch_size: int) -> StepMemory | None:
    """Memory of a training step with the largest frames, all parameters trained; None without frames of a sane size.

    Two steps are run, with few and with more of the smallest frames; the second is the measurement, the difference of
    both gives bytes for each edge, by which the batch of the largest frames is extrapolated.

    Args:
        backbone: the model; its parameters and their gradients are left as they were.
        graphs: the frames.
        batch_size: frames a batch.
    """
    ascending = sorted(graphs, key=lambda graph: graph.n_edges)
    if not graphs or ascending[0].n_edges > LARGEST_MEASURED:
        return None
    largest = ascending[-batch_size:]
    atoms, edges = sum(g.n_atoms for g in largest), sum(g.n_edges for g in largest)
    measured: list[Batch] = []
    for graph in ascending[: max(2, batch_size)]:
        if measured and sum(g.n_edges for g in measured) + graph.n_edges > MEASURED_EDGES:
            break
        measured.append(graph)
    training_step(backbone, _on(backbone, measured[:1]))  # what is allocated once and kept does not count
    small, small_edges = _measure(backbone, measured[: max(1, len(measured) // 2)])
    big, big_edges = _measure(backbone, measured)
    per_edge = (big - small) / (big_edges - small_edges) if big_edges > small_edges else big / max(1, big_edges)
    estimate = big + max(0.0, per_edge) * (edges - big_edges)
    return StepMemory(per_edge, big, sum(g.n_atoms for g in measured), big_edges, atoms, edges, round(estimate))


def _on(backbone: Backbone, graphs: Sequence[Batch]) -> Batch:
    return collate(graphs).to(device=backbone.device)


def _measure(backbone: Backbone, graphs: Sequence[Batch]) -> tuple[int, int]:
    """Peak bytes and edges of a step with these frames."""
    batch = _on(backbone, graphs)
    return measure_peak_memory(lambda: training_step(backbone, batch), backbone.device), batch.n_edges
