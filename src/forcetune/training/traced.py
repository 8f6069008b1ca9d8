"""The loss of a batch and all its gradients as one traced graph, without Python between its operations.

A step of eager PyTorch spends much of its time on the way to its many small operations. Here the operations of a step,
those of both derivatives included, are recorded once (``make_fx``) for batches filled up to one shape
(:mod:`forcetune.kernels.layout`) and then run by TorchScript's interpreter, operation by operation and with the same
rounding. Nothing is fused: Inductor does not get to the end of graphs of this size in a reasonable time.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from forcetune import parallel
from forcetune.backbones.protocol import Backbone
from forcetune.config import LossConfig, TrainingConfig
from forcetune.errors import ForcetuneError
from forcetune.graphs.graph import Batch, parts_of
from forcetune.graphs.loader import BatchLoader
from forcetune.graphs.stored import StoredGraphs
from forcetune.kernels.install import is_accelerated, pairs_edges, with_plan
from forcetune.kernels.layout import Layout, fitted, layout_of, plan_with, tensors_of
from forcetune.kernels.plan import Plan
from forcetune.training.losses import label_weights, loss_of
from forcetune.training.replay_head import ReplayHead, replay_head

PAYS_AFTER = 1500
"""Steps after which a graph of USUAL_OPERATIONS has earned the time it took to trace."""

USUAL_OPERATIONS = 20_000
"""Of the graph for some dozens of atoms; the time to trace more of them grows faster than what they save."""

PART_ATOMS = 100
"""Atoms that are computed at once; larger graphs take longer to trace and are not faster."""

SMALLEST_FILL = 0.6
"""Share of a filled-up batch that is not filling, below which the filling costs more than tracing gains."""

CHECKED = 2
"""Batches for which the graph is compared with the eager step: the traced one and one that it has not seen."""

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
"""Largest difference of the loss in the comparison, and of a gradient relative to the largest of all gradients."""

# results that depend on values, or values that became numbers: their graph would be that of one batch only
_DEPENDS_ON_VALUES = frozenset(
    {
        *("nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount"),
        *("repeat_interleave", "_local_scalar_dense"),
    }
)


class UntraceableError(ForcetuneError):
    """Why a step is computed eagerly.

    Attributes:
        wanted: nothing is missed by that.
    """

    def __init__(self, message: str, *, wanted: bool = False) -> None:
        super().__init__(message)
        self.wanted = wanted


class TracedStep:
    """The loss of batches, with its gradients by all trainable parameters.

    A batch is cut into parts of :func:`frames_of_part`, and each thread runs the graph for some of them: operations
    this small gain little from two threads each. The sums of the parts do not depend on who is ready first.

    Attributes:
        layout: of a part.
        most_operations: a larger graph is given up.
        operations: of the graph.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: ReplayHead | None,
        config: LossConfig,
        layout: Layout,
        parameters: Sequence[Tensor],
        workers: Workers,
        most_operations: float = math.inf,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.config = config
        self.layout = layout
        self.parameters = list(parameters)
        self.workers = workers
        self.most_operations = most_operations
        self.operations = 0
        self._checks = CHECKED
        self._run: Any = None
        self._used: list[bool] = []

    def loss(self, batch: Batch) -> Tensor | None:
        """The loss, whose backward pass hands out gradients that are known already; None where a batch has no room.

        Raises:
            UntraceableError: the graph of the first batch is not that of the eager step for this one.
        """
        parts = [fitted(part, self.layout, self.backbone.elements) for part in parts_of(batch, self.layout.frames)]
        wholes = label_weights(self.config, batch)
        inputs = [[*tensors_of(part[0]), *tensors_of(part[1]), *wholes] for part in parts if part is not None]
        if len(inputs) < len(parts):
            return None
        if self._run is None:
            assert parts[0] is not None
            self._trace(*parts[0], inputs[0])
        loss, *known = self._sums([(*part, *self.parameters) for part in inputs])
        if self._checks:
            self._check(batch, wholes, loss, known)
            self._checks -= 1
        left = iter(known)
        grads = [next(left) if used else None for used in self._used]
        result: Tensor = _Known.apply(loss, grads, *self.parameters)  # pyright: ignore[reportAssignmentType]
        return result

    def _sums(self, inputs: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        """Loss and gradients, summed over the parts."""
        first, *others = self.workers.map(self._run, inputs)
        sums = list(first)
        for other in others:
            sums = torch._foreach_add(sums, list(other))  # pyright: ignore[reportPrivateImportUsage]
        return list(sums)

    def _eager(self, batch: Batch, wholes: Sequence[Tensor]) -> Tensor:
        with replay_head(self.backbone, self.head):
            found = self.backbone.predict(batch, stress=self.config.stress > 0, create_graph=True)
        left = iter(wholes)
        return loss_of(self.config, found, batch, total=lambda _: next(left))

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss, self.parameters, allow_unused=True)

    def _trace(self, full: Batch, plan: Plan, inputs: Sequence[Tensor]) -> None:
        n_batch, n_plan = len(tensors_of(full)), len(tensors_of(plan))

        def step(*values: Tensor) -> list[Tensor]:
            with with_plan(self.backbone, plan_with(plan, values[n_batch : n_batch + n_plan])):
                loss = self._eager(Batch(*values[:n_batch]), values[n_batch + n_plan : len(inputs)])
            grads = self._gradients(loss)
            self._used = [grad is not None for grad in grads]
            return [loss.detach(), *(grad for grad in grads if grad is not None)]

        try:
            graph = make_fx(step)(*inputs, *self.parameters)
            _tidy(graph)
            self.operations = len(graph.graph.nodes)
            if self.operations > self.most_operations:
                raise UntraceableError(f"the graph has {self.operations:,} operations, too many for so few steps")
            self._run = _without_python(graph, (*inputs, *self.parameters))
        except UntraceableError:
            raise
        except Exception as error:
            raise UntraceableError(f"its step cannot be traced ({_first_line(error)})") from error

    def _check(self, batch: Batch, wholes: Sequence[Tensor], loss: Tensor, known: Sequence[Tensor]) -> None:
        eager = self._eager(batch, wholes)
        if not torch.isfinite(eager):
            return  # for the training to tell
        grads = [grad for grad in self._gradients(eager) if grad is not None]
        for mine, expected in (([loss], [eager.detach()]), (known, grads)):
            largest = max((float(one.abs().max()) for one in expected if one.numel()), default=0.0)
            pairs = [(one, two) for one, two in zip(mine, expected, strict=True) if one.numel()]
            far = max((float((one - two).abs().max()) for one, two in pairs), default=0.0)
            if not far <= TOLERANCE[self.backbone.dtype] * largest:
                raise UntraceableError(f"its traced step is {far:.1e} off the eager one, of {largest:.1e}")


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

    def map(self, run: Callable[..., Any], inputs: Sequence[tuple[Tensor, ...]]) -> list[Any]:
        """Results for all inputs in their order, without gradients."""

        def one(own: tuple[Tensor, ...]) -> Any:
            # unoptimised: nothing is merged or reordered after the first calls, which would round differently
            with torch.no_grad(), torch.jit.optimized_execution(False):  # pyright: ignore[reportPrivateImportUsage]
                return run(*own)

        if self.count == 1 or len(inputs) == 1:
            return list(map(one, inputs))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, initializer=self._begin)
            # threads that torch starts later go by what was set last, whoever set it
            list(self._pool.map(lambda _: time.sleep(0.01), range(self.count)))
            torch.set_num_threads(self._cores)
        return list(self._pool.map(one, inputs))

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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _tidy(graph: torch.fx.GraphModule) -> None:
    """Take out what nobody needs; what writes into tensors stays.

    Raises:
        UntraceableError: an operation depends on values.
    """

    def stays(node: torch.fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return node.op in ("output", "placeholder") or (schema is not None and schema.is_mutable)

    for node in list(graph.graph.nodes):
        name = getattr(getattr(node.target, "_schema", None), "name", "").split("::")[-1]
        if name in _DEPENDS_ON_VALUES or (name in ("index", "index_put", "index_put_") and _by_mask(node)):
            raise UntraceableError(f"its step depends on values ({name})")
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code(stays)
    graph.recompile()


def _without_python(graph: torch.fx.GraphModule, inputs: tuple[Tensor, ...]) -> Any:
    """The same function for TorchScript's interpreter.

    As ``torch.jit.trace``, which would keep every graph it has made, some hundred megabytes, until the process ends.
    """
    binding: Any = torch._C

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(graph(*values))

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        recorded, _ = binding._create_graph_by_tracing(outputs, inputs, lambda _: "", False, False, None, [])
    return binding._create_function_from_graph("step", recorded)


def _by_mask(node: torch.fx.Node) -> bool:
    """Whether an index chooses by truth values, so that how many are chosen depends on them."""
    indices: Any = node.args[1]
    found = [index.meta.get("val") for index in indices if isinstance(index, torch.fx.Node)]
    return any(value is not None and value.dtype in (torch.bool, torch.uint8) for value in found)


def layout_for(backbone: Backbone, config: TrainingConfig, loader: BatchLoader, frames: int) -> Layout:
    """The layout of parts of a run's batches, so many frames each.

    Raises:
        UntraceableError: they have none, or none that is worth it.
    """
    if backbone.device.type != "cpu":
        raise UntraceableError("tracing is for CPUs")
    if not is_accelerated(backbone):
        raise UntraceableError("the kernels do not cover this model")
    if parallel.joined():
        raise UntraceableError("several processes share its batches")
    if config.batch_atoms is not None or config.batch_edges is not None:
        raise UntraceableError("its batches are packed by a budget")
    if backbone.extension is not None:
        raise UntraceableError("it has a spin layer")
    graphs = loader.graphs
    if isinstance(graphs, StoredGraphs):
        raise UntraceableError("its frames are streamed")
    layout = layout_of(graphs, frames, backbone.elements, backbone.cutoff, pairs_edges(backbone))
    if layout.fill < SMALLEST_FILL:
        raise UntraceableError(f"its frames differ so much that {1 - layout.fill:.0%} of each batch would be filling")
    return layout


def frames_of_part(frames: int, atoms: float, threads: int) -> int:
    """Frames that are computed at once, so that all threads have as many parts and none is much over PART_ATOMS.

    Args:
        frames: of a batch.
        atoms: of a frame, on average.
        threads: that there are.
    """
    rounds = math.ceil(frames * atoms / (threads * PART_ATOMS))
    return math.ceil(frames / (threads * max(1, rounds)))


class TracedTraining:
    """The traced steps of a run, as far as they are wanted and possible.

    Whether a step is traced depends on the run's options and data alone, so that a resumed run does as before.

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
        tell: Callable[[str], None],
    ) -> None:
        """
        Args:
            backbone: carries the adapter.
            head: of replay frames.
            config: of the run.
            loader: of its batches.
            parameters: that are trained.
            tell: is told when a step is traced, which takes a while.

        Raises:
            UntraceableError: why the steps will be eager; for ``auto`` also where tracing takes longer than it saves.
        """
        self.operations = 0
        self._tell = tell
        stages = _steps(config, loader.n_batches)
        always = config.compile == "on"
        self._wanted = {
            loss: math.inf if always else USUAL_OPERATIONS * steps / PAYS_AFTER
            for loss, steps in stages
            if always or steps >= PAYS_AFTER
        }
        if config.compile == "off":
            raise UntraceableError("training.compile=off", wanted=True)
        if not self._wanted:
            most = max(steps for _, steps in stages)
            raise UntraceableError(f"{most} steps are over before tracing pays, from {PAYS_AFTER} on", wanted=True)
        self._workers = Workers(config.batch_size)
        atoms = float(loader.sizes[:, 0].mean())
        self._layout = layout_for(
            backbone, config, loader, frames_of_part(config.batch_size, atoms, self._workers.count)
        )
        self._arguments = (backbone, head)
        self._parameters = list(parameters)
        self._step: TracedStep | None = None

    def loss(self, config: LossConfig, batch: Batch) -> Tensor | None:
        """The loss of a batch, or None where it has to be found eagerly.

        Raises:
            UntraceableError: for good.
        """
        if config not in self._wanted:
            return None
        if self._step is None or self._step.config != config:
            self._tell("tracing the training step (training.compile), about half a minute")
            most = self._wanted[config]
            self._step = TracedStep(*self._arguments, config, self._layout, self._parameters, self._workers, most)
        found = self._step.loss(batch)
        self.operations = self._step.operations
        return found


def _steps(config: TrainingConfig, batches: int) -> list[tuple[LossConfig, int]]:
    """Loss and steps of each stage, if nothing ends the run early."""
    second = config.second_stage
    if second.start is None:
        return [(config.loss, config.epochs * batches)]
    first = min(second.start - 1, config.epochs)
    return [(config.loss, first * batches), (second.loss, (config.epochs - first) * batches)]
