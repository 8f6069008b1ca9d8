"""One run, step by step: frames and a foundation model become a trained adapter, its errors and a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from forcetune._version import __version__
from forcetune.adapters.attach import detach, disable_adapter, require_adapter
from forcetune.adapters.changes import weight_changes
from forcetune.adapters.file import TENSORS_NAME, load_adapter, save_adapter
from forcetune.adapters.methods import build_method
from forcetune.backbones.loading import store_base
from forcetune.backbones.protocol import Backbone
from forcetune.config import RunConfig
from forcetune.deployment.loading import BASE_NAME
from forcetune.deployment.phonons import MOST_ATOMS
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Errors, Predictions
from forcetune.evaluation.streamed import (
    StreamedPredictions,
    choose_shown,
    predict_shown,
    shown,
)
from forcetune.graphs.stored_graphs import StoredGraphs
from forcetune.reports.run_page import write_report
from forcetune.runs.environment import ENVIRONMENT_NAME, describe_environment
from forcetune.runs.folder import (
    ADAPTER_NAME,
    ANCHOR,
    CONFIG_NAME,
    UNREFINED,
    check_folder,
    input_files,
    prepare_folder,
    read_checkpoint,
    recover_adapter,
    write_checkpoint,
)
from forcetune.runs.measuring import Measuring
from forcetune.runs.method_defaults import with_run_defaults
from forcetune.runs.predictions import PREDICTIONS_NAME, save_predictions
from forcetune.runs.preparation import Preparation, PreparedRun, counting, predict_split
from forcetune.runs.results import ErrorPair, Results, TrainingSummary, write_results
from forcetune.runs.summaries import (
    summarize_data,
    summarize_method,
    summarize_model,
    summarize_references,
    summarize_replay,
)
from forcetune.training.anchor import save_anchor
from forcetune.training.hessian import HessianLoss
from forcetune.training.label_weights import weighs_hessians
from forcetune.training.outcome import Refinement, TrainingOutcome
from forcetune.training.penalty import Penalty
from forcetune.training.refine import refine
from forcetune.training.trackers import check_trackers, start_trackers
from forcetune.training.train import train
from forcetune.utils.file_lock import FolderLock
from forcetune.utils.files import write_json


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        folder: the run folder; the adapter stands in ``folder / "adapter"``.
        before, after: errors of every split: the foundation model with the run's reference energies, and tuned.
        results: everything in ``results.json``.
        backbone: the model with the trained adapter attached.
    """

    folder: Path
    before: dict[str, Errors]
    after: dict[str, Errors]
    results: dict[str, Any]
    backbone: Backbone

    @property
    def adapter(self) -> Path:
        """The adapter folder."""
        return self.folder / ADAPTER_NAME


class Fitting:
    """One run, step by step; every check comes before the first thing written."""

    def __init__(
        self,
        config: RunConfig,
        console: Console,
        messages: list[str],
        observe: Callable[[int, Errors], None] | None = None,
        inputs: Sequence[str | Path] = (),
    ) -> None:
        self.method = build_method(config.method)
        self._takes_rate = config.training.learning_rate is None
        self.config = with_run_defaults(config)
        self.console = console
        self.messages = messages
        self.observe = observe
        self.folder = Path(config.output.run)
        self.inputs = inputs
        self._stores_base = False
        self.training = self.config.training

    @property
    def rate(self) -> float:
        assert self.training.learning_rate is not None
        return self.training.learning_rate

    def run(self, backbone: Backbone | None, *, from_the_beginning: bool = False) -> Run:
        """The whole run.

        Args:
            backbone: a loaded model instead of the one that the configuration names.
            from_the_beginning: the folder is that of this very run, which died early; its base stays.
        """
        with FolderLock(self.folder) as lock:
            return self._run(backbone, from_the_beginning, lock)

    def _run(self, backbone: Backbone | None, from_the_beginning: bool, lock: FolderLock) -> Run:
        overwrite = self.config.output.overwrite
        keep, inputs = ({BASE_NAME}, []) if from_the_beginning else (set(), input_files(self.config, self.inputs))
        check_folder(self.folder, overwrite, inputs)
        start = self._start(backbone)
        lock.create()
        others = prepare_folder(self.folder, overwrite, inputs, keep=keep)
        if others:
            self.console.print(f"{self.folder}: what forcetune did not write stays: {', '.join(others)}")
        write_json(self.folder / ENVIRONMENT_NAME, describe_environment(start.backbone.device))
        if self._stores_base:
            with disable_adapter(start.backbone):
                store_base(start.backbone, self.folder / BASE_NAME)
        if start.anchor is not None:
            save_anchor(self.folder / ANCHOR, start.anchor, start.anchor_key)
        self.config.save(self.folder / CONFIG_NAME)
        return self._finish(start, None)

    def resume(self) -> Run:
        """The rest of a run that was interrupted; the configuration is that of its folder."""
        with FolderLock(self.folder):
            return self._resume()

    def _resume(self) -> Run:
        checkpoint = read_checkpoint(self.folder)
        self._progress(checkpoint)
        start = self._start(None, checkpoint)
        for name, current, stored in (
            ("the training frames", start.data, checkpoint["data"]),
            ("the model", start.backbone.base.fingerprint, checkpoint["base"]),
        ):
            if current != stored:
                raise InputError(f"{self.folder}: {name} changed since the run began; start a new run with `fit`.")
        recover_adapter(self.folder / ADAPTER_NAME)
        epochs, planned = self._progress(checkpoint)
        over = epochs == planned or checkpoint["training"]["stopped"]
        text = f"training ended after epoch {epochs}: " if over else f"going on after epoch {epochs} of {planned}"
        self.console.print(text + ("making the results" if over else ""), highlight=False)
        return self._finish(start, checkpoint["training"])

    def _progress(self, checkpoint: Mapping[str, Any]) -> tuple[int, int]:
        """Epochs done, and those of the whole run.

        Raises:
            InputError: more are done than there shall be.
        """
        done, skipped = checkpoint["training"]["epochs_done"], checkpoint["training"].get("skipped", 0)
        planned = self.config.training.epochs
        # a second stage that began early goes on to its next validation
        if done + skipped > planned + (self.config.training.valid_every - 1 if skipped else 0):
            raise InputError(
                f"{self.folder / CONFIG_NAME}: training.epochs is {planned}, but {done + skipped} epochs are behind "
                f"the run; set it to {done + skipped} to end the run there, or to more to go on."
            )
        return done, max(done, planned - skipped)

    def _start(self, backbone: Backbone | None, checkpoint: Mapping[str, Any] | None = None) -> PreparedRun:
        """Everything before the training; nothing is written."""
        check_trackers(self.config.output.all_trackers)
        preparation = Preparation(self.config, self.method, self.console, takes_rate=self._takes_rate)
        start = preparation.prepare(backbone, checkpoint)
        self.config, self.method, self.training = preparation.config, preparation.method, preparation.training
        self._stores_base = preparation.stores_base
        return start

    def _finish(self, start: PreparedRun, state: dict[str, Any] | None) -> Run:
        """Training and everything after it."""
        outcome = self._train(start, state)
        refines = self.config.training.refine is not None and outcome.status != "interrupted"
        refinement = self._refine(start) if refines else None
        after = self._best(start)
        arrays = [
            {name: shown(split_predictions) for name, split_predictions in by_split.items()}
            for by_split in (start.before, after)
        ]
        save_predictions(self.folder / PREDICTIONS_NAME, *arrays)
        output = self.config.output
        most_atoms = math.inf if output.phonons == "on" else MOST_ATOMS
        measuring = Measuring(start, output.forgetting, most_atoms, self.rate, self.console, self._warn)
        errors = measuring.compute_errors(after)
        further = measuring.measure_further(after)
        results = self._results(start, self._training_summary(outcome, refinement), *errors, further)
        write_results(self.folder, results)
        write_report(self.folder)
        return Run(self.folder, *errors, results.to_json(), start.backbone)

    def _train(self, start: PreparedRun, state: dict[str, Any] | None) -> TrainingOutcome:
        def save_best(errors: Errors) -> None:
            self._save(start, {"valid": errors})

        def save_state(training: dict[str, Any]) -> None:
            write_checkpoint(
                self.folder,
                {
                    "training": training,
                    "reference_energies": start.backbone.reference_energies,
                    "data": start.data,
                    "base": start.backbone.base.fingerprint,
                },
            )

        return train(
            start.backbone,
            self.training,
            self.rate,
            start.graphs["train"],
            start.graphs["valid"],
            self.folder,
            save_best,
            trackers=start_trackers(
                self.config.output.all_trackers,
                self.folder,
                self.config.output.project,
                self.config.model_dump(mode="json"),
                resumed=state is not None,
            ),
            state=state,
            save_state=save_state,
            observe=self.observe,
            console=self.console,
            replay=start.replay,
            penalty=self._penalty(start),
            hessian=self._hessian_loss(start),
            frame_name=lambda number: str(start.dataset.train.frames[number].origin),
        )

    def _hessian_loss(self, start: PreparedRun) -> HessianLoss | None:
        """Where some stage of the training has such a term."""
        if not weighs_hessians(self.training):
            return None
        dataset = start.dataset
        return HessianLoss(start.backbone, dataset.train.frames, dataset.valid.frames, self.training.seed)

    def _penalty(self, start: PreparedRun) -> Penalty | None:
        """Of the adapter that is attached now."""
        return None if start.anchor is None else Penalty(self.training.penalty, start.backbone, start.anchor)

    def _refine(self, start: PreparedRun) -> Refinement:
        """Refine the best adapter; a run that died meanwhile begins this again from the same weights."""
        detach(start.backbone)
        unrefined = self.folder / UNREFINED
        if not unrefined.exists():
            load_adapter(start.backbone, self.folder / ADAPTER_NAME)
            save_adapter(start.backbone, unrefined)
            detach(start.backbone)
        load_adapter(start.backbone, unrefined)
        with Progress(console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("refining", total=self.config.training.refine)
            refinement = refine(
                start.backbone,
                self.training,
                start.graphs["train"],
                start.graphs["valid"],
                replay=start.replay,
                penalty=self._penalty(start),
                progress=lambda done: bar.update(task, completed=done),
            )
        self.console.print(
            f"refined by {refinement.iterations} iterations of L-BFGS: validation loss "
            f"{refinement.valid_loss_before:.4g} → {refinement.valid_loss_after:.4g}, training loss "
            f"{refinement.train_loss_before:.4g} → {refinement.train_loss_after:.4g}",
            highlight=False,
        )
        self._save(start, {})
        return refinement

    def _save(self, start: PreparedRun, errors: Mapping[str, Errors]) -> None:
        save_adapter(
            start.backbone,
            self.folder / ADAPTER_NAME,
            stored_dtype=torch.float32 if self.config.output.adapter_dtype == "float32" else torch.float64,
            training_data_sha256=start.data,
            metrics={"errors": {name: split_errors.to_json() for name, split_errors in errors.items()}},
        )

    def _best(self, start: PreparedRun) -> dict[str, Predictions | StreamedPredictions]:
        """Predictions of the best adapter as its file gives it; its errors go into the file."""
        detach(start.backbone)
        load_adapter(start.backbone, self.folder / ADAPTER_NAME)
        after = {name: self._again(start, name) for name in start.graphs}
        self._save(start, {name: predictions.errors() for name, predictions in after.items()})
        return after

    def _again(self, start: PreparedRun, name: str) -> Predictions | StreamedPredictions:
        """Predictions after the training; of streamed training frames those shown."""
        graphs, label = start.graphs[name], f"{name}, after"
        if name == "train" and isinstance(graphs, StoredGraphs):
            with counting(self.console, label, len(choose_shown(len(graphs)))) as advance:
                return predict_shown(start.backbone, graphs, advance)
        # a training that diverged shows in its errors: days of it should not end without results
        return predict_split(self.console, start.backbone, graphs, label, finite=False)

    def _training_summary(self, outcome: TrainingOutcome, refinement: Refinement | None) -> TrainingSummary:
        training = self.training
        assert training.optimizer is not None
        return TrainingSummary(
            **asdict(outcome),
            epochs=training.epochs,
            optimizer=training.optimizer,
            learning_rate=self.rate,
            batch_size=training.batch_size,
            seed=training.seed,
            loss=training.loss.model_dump(),
            refinement=refinement,
        )

    def _results(
        self,
        start: PreparedRun,
        training: TrainingSummary,
        before: Mapping[str, Errors],
        after: Mapping[str, Errors],
        further: Mapping[str, Any],
    ) -> Results:
        """Everything that goes into ``results.json``; what does not concern the run is left out."""
        backbone = start.backbone
        optional: dict[str, Any] = dict(further)
        sparsity = require_adapter(backbone).sparsity()
        if sparsity is not None:
            optional["sparsity"] = sparsity
        if start.replay_frames is not None:
            optional["replay"] = summarize_replay(start.replay_frames, self.config.replay)
        penalty = self._penalty(start)
        if penalty is not None:
            optional["penalty"] = penalty.terms()
        return Results(
            forcetune=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            status=training.status,
            model=summarize_model(backbone),
            method=summarize_method(self.method),
            parameters=start.parameters,
            reference_energies=summarize_references(start.references, start.model_references),
            data=summarize_data(start.dataset),
            training=training,
            environment=describe_environment(backbone.device),
            adapter_bytes=(self.folder / ADAPTER_NAME / TENSORS_NAME).stat().st_size,
            changes=list(weight_changes(backbone)),
            **optional,
            warnings=list(self.messages),
            errors={name: ErrorPair(before=before[name].to_json(), after=after[name].to_json()) for name in after},
        )

    def _warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)
        self.messages.append(text)
