"""The fine-tuning of an attached adapter: epochs, steps, validation, and what a resumed run needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forcetune.adapters.attach import require_adapter
from forcetune.adapters.summaries import Sparsity
from forcetune.backbones.protocol import Backbone, Prediction
from forcetune.config import SCHEDULE_FREE, LossConfig, TrainingConfig
from forcetune.errors import ForcetuneError, warn
from forcetune.evaluation.metrics import Errors, Predictions, Tally, gather
from forcetune.graphs.graph import Batch
from forcetune.graphs.loader import BatchLoader
from forcetune.kernels.recording import CompileError
from forcetune.training.compiled import CompiledTraining
from forcetune.training.failure import cause_in_step, copy_values, describe_failure, put_back
from forcetune.training.hessian import HessianLoss
from forcetune.training.losses import LossSums, compute_loss
from forcetune.training.optimizers import LearningRate, MovingAverage, make_optimizer, restart_average
from forcetune.training.penalty import Penalty
from forcetune.training.replay_head import ReplayHead, objective
from forcetune.utils import distributed

_COUNTERS = (
    *("stage", "best_loss", "best_epoch", "valid_loss", "train_loss", "waited"),
    *("epochs_done", "steps_done", "stopped", "skipped"),
)


class Observer:
    """What is reported of a training while it runs; every method may be left out."""

    def on_start(self, training: FineTuning) -> None:
        """Before the first step."""

    def on_step(self, training: FineTuning) -> None:
        """After every step."""

    def on_epoch(self, training: FineTuning) -> None:
        """After every epoch, and after its validation if it has one."""

    def close(self) -> None:
        """After the training, whatever ended it."""


def _close(observers: Sequence[Observer], *, failed: bool) -> None:
    """Close all, whatever one of them raises; the first such error is raised at the end unless the training failed."""
    first: Exception | None = None
    for observer in observers:
        try:
            observer.close()
        except Exception as error:
            if failed or first is not None:
                warn(f"{type(observer).__name__}: could not be closed ({error}).")
            else:
                first = error
    if first is not None:
        raise first


class FineTuning:
    """Trains the adapter attached to a backbone.

    Attributes:
        stage: 1, or 2 once the second stage has begun.
        best_loss, best_epoch: lowest validation loss of the current stage and its epoch, counted from 1.
        valid_loss, valid_errors, sparsity: of the last validation.
        train_loss: mean over the steps of the epoch, without the penalty.
        train_penalty: the same of the penalty; None without one.
        waited: validations since the last improvement.
        epochs_done, steps_done: complete epochs and optimizer steps, those before a resumption included.
        stopped: early stopping ended the run.
        skipped: epochs of the first stage that early stopping left out; the second stage begins so much earlier.
        tell: shows a line of text.
        compiled: steps without Python between their operations, or None where they are eager.
        eager_reason: why they are.
        shares_validation: every process validates on other frames.
        keeps_validation: predictions are kept until a validation ends; otherwise only sums of them.
        frame_name: what to call the training frame of a number, for messages.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: TrainingConfig,
        learning_rate: float,
        loader: BatchLoader,
        save_best: Callable[[Errors], None],
        observe: Callable[[int, Errors], None] | None = None,
        head: ReplayHead | None = None,
        penalty: Penalty | None = None,
        hessian: HessianLoss | None = None,
    ) -> None:
        self.backbone = backbone
        self.adapter = require_adapter(backbone)
        self.config = config
        self.loader = loader
        self.save_best = save_best
        self.observe = observe
        self.head = head
        self.penalty = penalty
        self.hessian = hessian
        self.first_rate = learning_rate
        self.schedule = LearningRate(config.schedule, learning_rate, config.epochs)
        averaged = config.ema is not None and config.optimizer not in SCHEDULE_FREE
        self.average = MovingAverage(list(self.adapter.parameters()), config.ema or 0.0) if averaged else None
        self.stage = 1
        self.best_loss = math.inf
        self.best_epoch = 0
        self.valid_loss = math.nan
        self.valid_errors: Errors | None = None
        self.sparsity: Sparsity | None = None
        self.train_loss = math.nan
        self.train_penalty: float | None = None
        self.waited = 0
        self.epochs_done = 0
        self.steps_done = 0
        self.stopped = False
        self.skipped = 0
        self.tell: Callable[[str], None] = lambda text: None
        self.compiled: CompiledTraining | None = None
        self.eager_reason: str | None = None
        self.shares_validation = False
        self.keeps_validation = True
        self.frame_name: Callable[[int], str] | None = None
        self._optimizer_state: dict[str, Any] | None = None
        self._made_optimizer: torch.optim.Optimizer | None = None
        self._in_epoch = False
        self._n_batches = 0
        self._losses: list[Tensor] = []
        self._penalties: list[Tensor] = []
        self._began_with: list[Tensor] = []

    @property
    def loss_config(self) -> LossConfig:
        return self.config.loss if self.stage == 1 else self.config.second_stage.loss

    @property
    def epoch(self) -> int:
        """The epoch in progress, or the last one between two, counted from 1 over the whole run."""
        return self.epochs_done + self._in_epoch

    @property
    def epochs(self) -> int:
        """Epochs of the whole run; early stopping before the second stage leaves some out."""
        return self.config.epochs - self.skipped

    @property
    def is_over(self) -> bool:
        """Whether no epoch is left; the last one of a stage that began early is one that was validated."""
        if self.stopped or self.epochs_done >= self.config.epochs:
            return True
        return self.skipped > 0 and self.epochs_done >= self.epochs and self.epochs_done % self.config.valid_every == 0

    @property
    def progress(self) -> float:
        """Epochs done, as a fraction, after the last step."""
        return self.epoch - 1 + len(self._losses) / max(1, self._n_batches)

    @property
    def learning_rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        if self._made_optimizer is None:
            self._made_optimizer = make_optimizer(
                self.adapter,
                self.config,
                self.schedule.base,
                self.loader.n_batches,
                self.head,
                first_rate=self.first_rate,
            )
            if self._optimizer_state is not None:
                self._made_optimizer.load_state_dict(self._optimizer_state)
                self._optimizer_state = None
        return self._made_optimizer

    def training_state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, after a complete epoch: tensors and plain values only."""
        return {
            "adapter": self.adapter.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "head": None if self.head is None else self.head.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            **{name: getattr(self, name) for name in _COUNTERS},
            "epochs_done": self.epoch,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`training_state` was taken; to be called before the training begins."""
        self.adapter.load_state_dict(state["adapter"])
        self._optimizer_state = state["optimizer"]
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.head is not None:
            self.head.load_state_dict(state["head"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        for name in _COUNTERS:
            if name in state or name != "skipped":  # which checkpoints of earlier versions do not have
                setattr(self, name, state[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the adapter has the weights that count: averaged, where the optimizer or EMA averages."""
        optimizer: Any = self._optimizer if self.config.optimizer in SCHEDULE_FREE else None
        if optimizer is not None:
            optimizer.eval()
        try:
            if self.average is None:
                yield
            else:
                with self.average.applied():
                    yield
        finally:
            if optimizer is not None:
                optimizer.train()

    def run(self, validation: Iterable[Batch], observers: Sequence[Observer] = ()) -> None:
        """All epochs that are left.

        Args:
            validation: batches of the validation frames.
            observers: called as things happen, in this order.

        Raises:
            ForcetuneError: the loss is no longer finite.
        """
        self._began_with = copy_values(self._trained())
        try:
            for observer in observers:
                observer.on_start(self)
            while not self.is_over:
                self._run_epoch(validation, observers)
        except BaseException:
            _close(observers, failed=True)
            raise
        _close(observers, failed=False)

    def _run_epoch(self, validation: Iterable[Batch], observers: Sequence[Observer]) -> None:
        self._in_epoch = True
        self._start_epoch()
        for index, batch in enumerate(self.loader):
            self._step(batch, index)
            for observer in observers:
                observer.on_step(self)
        self.train_loss = float(distributed.total(torch.stack(self._losses).mean()))
        if not math.isfinite(self.train_loss):
            raise ForcetuneError(self._why_not_finite())
        self.train_penalty = float(torch.stack(self._penalties).mean()) if self._penalties else None
        if self.epoch % self.config.valid_every == 0:
            self._validate(validation)
        for observer in observers:
            observer.on_epoch(self)
        self._in_epoch = False
        self.epochs_done += 1

    def _start_epoch(self) -> None:
        self.loader.epoch = self.epoch - 1
        self._n_batches = self.loader.n_batches
        self._losses.clear()
        self._penalties.clear()
        if self.config.optimizer in SCHEDULE_FREE:
            optimizer: Any = self._optimizer
            optimizer.train()
        second = self.config.second_stage
        if self.stage == 1 and second.start is not None and self.epoch + self.skipped >= second.start:
            self.stage = 2
            self.schedule.restart(second.learning_rate)
            self._set_rate(second.learning_rate)
            if self.config.optimizer in SCHEDULE_FREE:
                restart_average(self._optimizer)
            self.best_loss, self.waited = math.inf, 0

    def _step(self, batch: Batch, index: int) -> None:
        """One step of the optimizer, for a batch on the CPU: on a GPU nothing of it waits for the device."""
        if self.config.optimizer not in SCHEDULE_FREE:
            self._set_rate(self.schedule.at(self.epoch + self.skipped - 1 + (index + 1) / self._n_batches))
        loss = self._compiled_loss(batch)
        if loss is None:
            placed = self.backbone.place(batch)
            loss = objective(self.backbone, self.head, self.loss_config, placed, total=distributed.total)
        if self.hessian is not None:
            hessian_loss = self.hessian.compute(self.loss_config, self.loader.numbers(index), self.epoch)
            loss = loss if hessian_loss is None else loss + hessian_loss
        self._losses.append(loss.detach())
        if self.penalty is not None:
            cost = self.penalty.compute()
            self._penalties.append(cost.detach())
            loss = loss + distributed.share(cost)
        self._optimizer.zero_grad()
        loss.backward()
        distributed.sum_gradients([*self.adapter.parameters(), *(self.head.parameters() if self.head else ())])
        if self.config.clip is not None:
            parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        self._optimizer.step()
        self.steps_done += 1
        if self.average is not None:
            self.average.update()

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["rate"]

    def compile_steps(self, tell: Callable[[str], None]) -> None:
        """Compile the steps where the run asks for it and it can be done."""
        try:
            self.compiled = CompiledTraining(self.backbone, self.head, self.config, self.loader, self._trained())
        except CompileError as error:
            self.eager_reason = str(error)
            if not error.wanted:
                tell(f"training steps are eager, not compiled (training.compile): {error}")

    def _compiled_loss(self, batch: Batch) -> Tensor | None:
        if self.compiled is None:
            return None
        try:
            return self.compiled.loss(self.loss_config, batch)
        except CompileError as error:
            self.compiled, self.eager_reason = None, str(error)
            warn(f"The steps of this run are eager, not compiled (training.compile): {error}.")
            return None

    def _why_not_finite(self) -> str:
        """What to say of an epoch whose loss is not finite, judged with the weights that the training began with."""
        step = next((k for k, loss in enumerate(self._losses) if not bool(loss.isfinite())), 0)
        put_back(self._trained(), self._began_with)
        cause, numbers = None, ()
        if not distributed.joined():
            cause, numbers = cause_in_step(self.backbone, self.head, self.loss_config, self.loader, step)
        name_of = partial(self._name_of, numbers)
        return describe_failure(cause, self.train_loss, self.epoch, self.learning_rate, name_of)

    def _name_of(self, numbers: Sequence[int], index: int) -> str:
        number = numbers[index]
        is_own = number < self.loader.n_own
        if is_own and self.frame_name is not None:
            return self.frame_name(number)
        return f"training frame {number}" if is_own else f"replay frame {number - self.loader.n_own}"

    def _trained(self) -> list[torch.nn.Parameter]:
        parameters = [*self.adapter.parameters(), *(() if self.head is None else self.head.parameters())]
        return [parameter for parameter in parameters if parameter.requires_grad]

    def _validation(self, validation: Iterable[Batch]) -> tuple[float, Errors]:
        """Loss and errors over the validation frames of all processes."""
        pairs: list[tuple[Batch, Prediction]] = []
        counted = (LossSums(self.loss_config), Tally())
        for batch in validation:
            prediction = self.backbone.predict(self.backbone.place(batch), stress=self.loss_config.stress_weight > 0)
            prediction = prediction.detached().to(torch.device("cpu"))
            if self.keeps_validation:
                pairs.append((batch, prediction))
            else:
                counted[0].add(prediction, batch)
                counted[1].add(Predictions.of(batch, prediction))
        if self.keeps_validation:
            batch, prediction = gather(distributed.collected(pairs) if self.shares_validation else pairs)
            return float(compute_loss(self.loss_config, prediction, batch)), Predictions.of(batch, prediction).errors()
        parts = distributed.collected([counted]) if self.shares_validation else [counted]
        (losses, errors), *others = parts
        for more_losses, more_errors in others:
            losses.sums += more_losses.sums
            errors.merge(more_errors)
        return losses.loss(), errors.errors()

    def _validate(self, validation: Iterable[Batch]) -> None:
        with self.averaged():
            self.valid_loss, self.valid_errors = self._validation(validation)
            if self.hessian is not None:
                self.valid_loss += self.hessian.validate(self.loss_config)
            self._judge(self.valid_errors)

    def _judge(self, errors: Errors) -> None:
        """What a validation means for the best adapter, the learning rate and the end of the stage."""
        self.sparsity = self.adapter.sparsity()
        self.schedule.observe(self.valid_loss)
        self.waited += 1
        if self.valid_loss < self.best_loss:
            self.save_best(errors)
            self.best_loss, self.best_epoch, self.waited = self.valid_loss, self.epoch, 0
        if self.observe is not None:
            self.observe(self.epoch, errors)
        if self.config.early_stopping is not None and self.waited >= self.config.early_stopping:
            self._end_stage()

    def _end_stage(self) -> None:
        """Early stopping ends the stage: the second one begins, with as many epochs as planned, or the run is over."""
        second = self.config.second_stage.start
        if self.stage == 2 or second is None:
            self.stopped = True
            return
        self.skipped = second - 1 - self.epoch
        if self.skipped:
            self.tell(
                f"no improvement in {self.waited} validations: the second stage begins in epoch {self.epoch + 1} "
                f"instead of {second}"
            )
