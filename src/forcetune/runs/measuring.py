"""What is measured of a tuned model after its training, beside its predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rich.console import Console

from forcetune.adapters.attach import disable_adapter
from forcetune.deployment.forgetting import measure_forgetting
from forcetune.deployment.phonons import describe_instability, measure_phonons
from forcetune.evaluation.hessian import LARGEST, hessian_errors, with_hessians
from forcetune.evaluation.metrics import Errors, Predictions, list_worse_errors
from forcetune.evaluation.softening import measure_softening
from forcetune.evaluation.streamed import StreamedPredictions, shown, shown_frames
from forcetune.evaluation.summaries import Forgetting, Phonons, Softening
from forcetune.evaluation.symmetry import rotation_error
from forcetune.frames.frame import Frame
from forcetune.frames.store.stored_frames import StoredFrames
from forcetune.runs.preparation import PreparedRun

HESSIANS = 10
"""Frames of a split whose whole Hessians are compared; each takes 6 predictions for every atom, by either model."""

PredictionsBySplit = Mapping[str, Predictions | StreamedPredictions]


@dataclass(frozen=True, slots=True)
class Measuring:
    """Measures the tuned model of a run.

    Attributes:
        run: what it had before its training; its backbone carries the trained adapter.
        forgetting: whether to measure what was forgotten.
        most_phonon_atoms: of all displaced supercells together.
        rate: the learning rate, for advice.
        console: where progress is printed.
        warn: takes what belongs to the run's warnings.
    """

    run: PreparedRun
    forgetting: bool
    most_phonon_atoms: float
    rate: float
    console: Console
    warn: Callable[[str], None]

    def compute_errors(self, after: PredictionsBySplit) -> tuple[dict[str, Errors], dict[str, Errors]]:
        """Errors of every split before and after; what became worse, Hessians left aside, is warned of."""
        with_labels = self._frames_with_hessians()
        tuned = self._with_hessians({name: predictions.errors() for name, predictions in after.items()}, with_labels)
        with disable_adapter(self.run.backbone):
            base = self._with_hessians({name: self.run.before[name].errors() for name in after}, with_labels)
        self._warn_of_worse_errors(base, tuned)
        return base, tuned

    def measure_further(self, after: PredictionsBySplit) -> dict[str, Any]:
        """All else by its name in ``results.json``; what does not concern the run is left out."""
        run = self.run
        measured: dict[str, Any] = {"rotation_error": rotation_error(run.backbone, run.dataset.valid.frames)}
        if self.forgetting:
            measured["forgetting"] = self._forgetting()
        if run.crystal is not None:
            measured["phonons"] = self._phonons(run.crystal)
        softening = self._softening(after)
        if softening:
            measured["softening"] = softening
        return measured

    def _frames_with_hessians(self) -> dict[str, list[Frame]]:
        """Of every split that was not trained on; streamed frames have none."""
        splits = {name: split.frames for name, split in self.run.dataset.splits.items() if name != "train"}
        return {
            name: list(
                islice((frame for frame in frames if frame.hessian is not None and len(frame) <= LARGEST), HESSIANS)
            )
            for name, frames in splits.items()
            if not isinstance(frames, StoredFrames)
        }

    def _with_hessians(
        self, errors: dict[str, Errors], with_labels: Mapping[str, Sequence[Frame]]
    ) -> dict[str, Errors]:
        """With errors of Hessians by the model as it is."""
        for name, frames in with_labels.items():
            with self.console.status(f"{name}: Hessians"):
                errors[name] = with_hessians(errors[name], hessian_errors(self.run.backbone, frames))
        return errors

    def _softening(self, after: PredictionsBySplit) -> dict[str, Softening]:
        """Of all splits with periodic frames that were not trained on."""
        by_split = {}
        for name in after:
            frames, before = self.run.dataset.splits[name].frames, self.run.before[name]
            if name != "train" and len(frames):
                softening = measure_softening(shown_frames(frames, before), shown(before), shown(after[name]))
                if softening is not None:
                    by_split[name] = softening
        return by_split

    def _forgetting(self) -> Forgetting:
        """What the tuned model forgot; what is dangerous in use goes to the run's warnings."""
        run = self.run
        with self.console.status("what was forgotten"):
            forgetting = measure_forgetting(run.backbone, run.dataset, run.replay.held if run.replay else ())
        for text in forgetting.warnings:
            self.warn(text)
        return forgetting

    def _phonons(self, crystal: Frame) -> Phonons:
        """Frequencies before and after; instabilities that are new go to the run's warnings."""
        with self.console.status("phonons"):
            phonons = measure_phonons(self.run.backbone, crystal, self.most_phonon_atoms)
        text = describe_instability(phonons)
        if text is not None:
            self.warn(text)
        return phonons

    def _warn_of_worse_errors(self, before: Mapping[str, Errors], after: Mapping[str, Errors]) -> None:
        """A fit that made something worse says so where it ends, not only in a table."""
        for name in after:
            worse = list_worse_errors(before[name], after[name])
            if worse and name != "train":
                self.warn(
                    f"the tuned model is worse than the untouched one on the {name} frames: {'; '.join(worse)}. "
                    f"Try a lower training.learning_rate (now {self.rate:g}), more epochs or other weights of the loss."
                )
