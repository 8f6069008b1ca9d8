"""The loss of a batch and all its gradients as one recorded graph, without Python between its operations.

A step of eager PyTorch spends much of its time on the way to its many small operations. Here the operations of a step,
those of both derivatives included, are recorded once (:mod:`forcetune.kernels.recording`) for batches filled up to one
shape or two (:mod:`forcetune.kernels.padding`). Recording takes as long as about ten steps; reading a recording from a
file would take as long, so none is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forcetune.backbones.protocol import Backbone
from forcetune.config import LossConfig, TrainingConfig
from forcetune.graphs.graph import Batch, split_batch
from forcetune.graphs.loader import BatchLoader
from forcetune.graphs.stored_graphs import StoredGraphs
from forcetune.kernels.edge_plan import Plan, with_plan
from forcetune.kernels.padding import CUDA_CHUNK_COST, Layout, build_layout, fitted, list_tensors, plan_with
from forcetune.kernels.recording import CompileError, Recording, record
from forcetune.training.losses import label_weights
from forcetune.training.replay_head import ReplayHead, objective
from forcetune.utils import distributed

PAYS_AFTER = 200
"""Steps after which the graph has earned the time it took to record, with a margin."""

PART_ATOMS = 100
"""Atoms that are computed at once; larger graphs take longer to compile and are not faster."""

SMALLEST_FILL = 0.6
"""Share of a filled-up batch that is not filling, below which the filling costs more than compiling gains."""

CHECKED = 2
"""Batches for which the graph is compared with the eager step: the recorded one and one that it has not seen."""

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
"""Largest difference of the loss in the comparison, and of a gradient relative to the largest of all gradients."""


class CompiledStep:
    """The loss of batches, with its gradients by all trainable parameters.

    A batch is cut into parts of :func:`frames_of_part`, as equal as can be, and each thread runs the graph for some of
    them: operations this small gain little from two threads each. Where they differ by a frame there is a graph for
    either size, as filling costs as much time as a frame does. The sums of the parts do not depend on who is ready
    first.

    Attributes:
        layouts: of parts, smallest first.
        recordings: by layout, once there are some.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: ReplayHead | None,
        config: LossConfig,
        layouts: Sequence[Layout],
        parameters: Sequence[Tensor],
        workers: Workers,
    ) -> None:
        """
        Args:
            backbone: carries the adapter.
            head: of replay frames.
            config: the loss.
            layouts: of parts, one for each size.
            parameters: that the loss is differentiated by.
            workers: compute the parts.
        """
        self.backbone = backbone
        self.head = head
        self.config = config
        self.layouts = sorted(layouts, key=lambda layout: layout.frames)
        self.parameters = list(parameters)
        self.workers = workers
        self.recordings: dict[Layout, Recording] = {}
        self._checks = CHECKED

    def loss(self, batch: Batch) -> Tensor | None:
        """The loss, whose backward pass hands out gradients that are known already; None where a batch has no room.

        Raises:
            CompileError: the step cannot be recorded, or what was recorded differs from the eager step.
        """
        here = batch.to("cpu")
        wholes = label_weights(self.config, here)
        jobs: list[tuple[Layout, list[Tensor]]] = []
        for part in split_batch(here, self.layouts[-1].frames):
            layout = next(layout for layout in self.layouts if layout.frames >= part.n_graphs)
            filled = fitted(part, layout, self.backbone.elements)
            if filled is None:
                return None
            inputs = [*list_tensors(filled[0]), *list_tensors(filled[1]), *wholes]
            if layout not in self.recordings:
                self.recordings[layout] = self._record(*filled, inputs)
                self._checks = CHECKED
            jobs.append((layout, inputs))
        loss, *known = self._sums(jobs)
        if self._checks:
            self._check(batch, loss, known)
            self._checks -= 1
        left = iter(known)
        used = next(iter(self.recordings.values())).used
        grads = [next(left) if one else None for one in used[1:]]
        result: Tensor = _Known.apply(loss, grads, *self.parameters)  # pyright: ignore[reportAssignmentType]
        return result

    def _sums(self, jobs: Sequence[tuple[Layout, Sequence[Tensor]]]) -> list[Tensor]:
        """Loss and gradients, summed over the parts."""
        runs = [(self.recordings[layout], (*inputs, *self.parameters)) for layout, inputs in jobs]
        first, *others = self.workers.map(runs)
        sums = list(first)
        for other in others:
            sums = torch._foreach_add(sums, list(other))  # pyright: ignore[reportPrivateImportUsage]
        return list(sums)

    def _eager(self, batch: Batch, wholes: Sequence[Tensor]) -> Tensor:
        left = iter(wholes)
        return objective(self.backbone, self.head, self.config, batch, total=lambda _: next(left))

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def _record(self, full: Batch, plan: Plan, inputs: Sequence[Tensor]) -> Recording:
        n_batch, n_plan = len(list_tensors(full)), len(list_tensors(plan))
        device = self.backbone.device
        plan = replace(plan, present=plan.present.to(device), species=plan.species.to(device))

        def step(*values: Tensor) -> list[Tensor | None]:
            with with_plan(self.backbone, plan_with(plan, values[n_batch : n_batch + n_plan])):
                loss = self._eager(Batch(*values[:n_batch]), values[n_batch + n_plan : len(inputs)])
            return [loss, *self._gradients(loss)]

        if device.type == "cpu":
            # the first pass makes tables of frozen radial networks from values of weights, which no recording may read
            with with_plan(self.backbone, plan_with(plan, inputs[n_batch : n_batch + n_plan])):
                self.backbone.predict(Batch(*inputs[:n_batch]))
        return record(step, inputs, self.parameters)

    def _check(self, batch: Batch, loss: Tensor, known: Sequence[Tensor]) -> None:
        placed = self.backbone.place(batch)
        eager = self._eager(placed, label_weights(self.config, placed))
        if not torch.isfinite(eager):
            return  # for the training to tell
        grads = [grad for grad in self._gradients(eager) if grad is not None]
        for mine, expected in (([loss], [eager.detach()]), (known, grads)):
            largest = max((float(one.abs().max()) for one in expected if one.numel()), default=0.0)
            pairs = [(one, two) for one, two in zip(mine, expected, strict=True) if one.numel()]
            far = max((float((one - two).abs().max()) for one, two in pairs), default=0.0)
            if not far <= TOLERANCE[self.backbone.dtype] * largest:
                raise CompileError(f"its compiled step is {far:.1e} off the eager one, of {largest:.1e}")


class Workers:
    """Threads, each of which has its share of the processor's cores for operations of its own."""

    def __init__(self, most: int) -> None:
        """
        Args:
            most: no more threads than this are of use.
        """
        self._cores = torch.get_num_threads()
        self.count = min(most, self._cores)
        self._pool: ThreadPoolExecutor | None = None

    def map(self, calls: Sequence[tuple[Callable[..., Any], tuple[Tensor, ...]]]) -> list[Any]:
        """Results of all functions for their arguments, in their order."""

        def one(call: tuple[Callable[..., Any], tuple[Tensor, ...]]) -> Any:
            function, arguments = call
            return function(*arguments)

        if self.count == 1 or len(calls) == 1:
            return list(map(one, calls))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, initializer=self._begin)
            # threads that torch starts later go by what was set last, whoever set it
            list(self._pool.map(lambda _: time.sleep(0.01), range(self.count)))
            torch.set_num_threads(self._cores)
        return list(self._pool.map(one, calls))

    def _begin(self) -> None:
        # a thread takes over the process's number when it first asks for it; only then it can have one of its own
        torch.get_num_threads()
        torch.set_num_threads(max(1, self._cores // self.count))


class _Known(torch.autograd.Function):
    """A loss whose gradients by some parameters are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        present = [grad for grad in ctx.grads if grad is not None]
        scaled = iter(torch._foreach_mul(present, outer[0]) if present else ())  # pyright: ignore[reportPrivateImportUsage]
        return (None, None, *(None if grad is None else next(scaled) for grad in ctx.grads))


def choose_layouts(backbone: Backbone, config: TrainingConfig, loader: BatchLoader, frames: int) -> list[Layout]:
    """The layouts of parts of a run's batches, of so many frames at most; one for each size of the parts of a batch.

    Raises:
        CompileError: they have none, or none that is worth it.
    """
    device = backbone.device.type
    if device == "cuda" and config.compile != "on":
        raise CompileError("CUDA graphs have to be asked for, with training.compile=on")
    if device not in ("cpu", "cuda"):
        raise CompileError("it is for CPUs and CUDA only")
    if backbone.paired is None:
        raise CompileError("the kernels do not cover this model")
    if distributed.joined():
        raise CompileError("several processes share its batches")
    if config.batch_atoms is not None or config.batch_edges is not None:
        raise CompileError("its batches are packed by a budget")
    if backbone.extension is not None:
        raise CompileError("it has a spin layer")
    graphs = loader.graphs
    if isinstance(graphs, StoredGraphs):
        raise CompileError("its frames are streamed")
    chunks = {"limit": None, "cost": CUDA_CHUNK_COST} if device == "cuda" else {}
    batch = min(config.batch_size, len(graphs))
    count = -(-batch // frames)
    layouts = [
        build_layout(graphs, size, backbone.elements, backbone.cutoff, backbone.paired, **chunks)
        for size in sorted({batch // count, -(-batch // count)})
    ]
    fill = min(layout.fill for layout in layouts)
    if fill < SMALLEST_FILL:
        raise CompileError(f"its frames differ so much that {1 - fill:.0%} of each batch would be filling")
    return layouts


def frames_of_part(frames: int, atoms: float, threads: int) -> int:
    """Frames that are computed at once, so that all threads have as many parts and none is much over PART_ATOMS.

    Args:
        frames: of a batch.
        atoms: of a frame, on average.
        threads: that there are.
    """
    rounds = math.ceil(frames * atoms / (threads * PART_ATOMS))
    return math.ceil(frames / (threads * max(1, rounds)))


class CompiledTraining:
    """The compiled steps of a run, as far as they are wanted and possible.

    Whether a step is compiled depends on the run's options and data alone, so that a resumed run does as before.

    Attributes:
        operations: of the graph, once there is one.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: ReplayHead | None,
        config: TrainingConfig,
        loader: BatchLoader,
        parameters: Sequence[Tensor],
    ) -> None:
        """
        Args:
            backbone: carries the adapter.
            head: of replay frames.
            config: of the run.
            loader: of its batches.
            parameters: that are trained.

        Raises:
            CompileError: why the steps will be eager; for ``auto`` also where compiling takes longer than it saves.
        """
        self.operations = 0
        stages = _steps(config, loader.n_batches)
        self._wanted = [loss for loss, steps in stages if config.compile == "on" or steps >= PAYS_AFTER]
        if config.compile == "off":
            raise CompileError("training.compile=off", wanted=True)
        if not self._wanted:
            most = max(steps for _, steps in stages)
            raise CompileError(f"{most} steps are over before compiling pays, from {PAYS_AFTER} on", wanted=True)
        one_part = backbone.device.type != "cpu"
        self._workers = Workers(1 if one_part else config.batch_size)
        atoms = float(loader.sizes[:, 0].mean())
        frames = config.batch_size if one_part else frames_of_part(config.batch_size, atoms, self._workers.count)
        self._layouts = choose_layouts(backbone, config, loader, frames)
        self._arguments = (backbone, head)
        self._parameters = list(parameters)
        self._step: CompiledStep | None = None

    def loss(self, config: LossConfig, batch: Batch) -> Tensor | None:
        """The loss of a batch, or None where it has to be computed eagerly.

        Raises:
            CompileError: for good.
        """
        if config not in self._wanted:
            return None
        if self._step is None or self._step.config != config:
            self._step = CompiledStep(*self._arguments, config, self._layouts, self._parameters, self._workers)
        loss = self._step.loss(batch)
        self.operations = max((one.operations for one in self._step.recordings.values()), default=0)
        return loss


def _steps(config: TrainingConfig, batches: int) -> list[tuple[LossConfig, int]]:
    """Loss and steps of each stage, if nothing ends the run early."""
    second = config.second_stage
    if second.start is None:
        return [(config.loss, config.epochs * batches)]
    first = min(second.start - 1, config.epochs)
    return [(config.loss, first * batches), (second.loss, (config.epochs - first) * batches)]
