"""Predictions for frames that are not in memory: errors over all of them, arrays of some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from forcetune.backbones.protocol import Backbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Errors, Predictions, Tally, evaluation_batches, predict
from forcetune.frames.frame import FloatArray, Frame
from forcetune.frames.store.stored_frames import StoredFrames
from forcetune.graphs.graph import Batch
from forcetune.graphs.stored_graphs import StoredGraphs, any_label

SHOWN = 1000
"""Frames of a streamed set of which every prediction is kept, for plots and comparisons; evenly spread."""


def choose_shown(count: int) -> np.ndarray:
    """Which frames of so many are shown, ascending."""
    return np.unique(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class StreamedPredictions:
    """Predictions and labels of a set of frames on disk.

    Attributes:
        frames: the set.
        energy, energy_label: (frames,), eV; of all.
        tally: of forces and stresses of all.
        shown: everything of the frames that :func:`choose_shown` chooses.
    """

    frames: StoredFrames
    energy: FloatArray
    energy_label: FloatArray
    tally: Tally
    shown: Predictions

    def shifted(self, shift: Mapping[int, float]) -> StreamedPredictions:
        """With energies moved by the shift of each element's reference energy, eV."""
        moved = np.array([sum(shift[int(z)] for z in frame.numbers) for frame in self.frames])
        return replace(self, energy=self.energy + moved, shown=self.shown.shifted(shift))

    def errors(self) -> Errors:
        """Over all frames."""
        tally = Tally()
        tally.merge(self.tally)
        atoms, empty = self.frames.atoms, np.zeros((0, 3))
        energies = Tally()
        energies.add(Predictions(np.zeros(0), atoms, self.energy, self.energy_label, empty, empty, None, None))
        tally.sums[:2] = energies.sums[:2]
        return tally.errors()


def shown(predictions: Predictions | StreamedPredictions) -> Predictions:
    """Of a streamed set those that are shown, otherwise all."""
    return predictions.shown if isinstance(predictions, StreamedPredictions) else predictions


def shown_frames(frames: Sequence[Frame], predictions: Predictions | StreamedPredictions) -> Sequence[Frame]:
    """The frames of :func:`shown`."""
    return (
        [frames[int(k)] for k in choose_shown(len(frames))] if isinstance(predictions, StreamedPredictions) else frames
    )


def predict_shown(
    backbone: Backbone, graphs: StoredGraphs, progress: Callable[[int], None] | None = None
) -> Predictions:
    """Predict for the frames that :func:`choose_shown` chooses."""
    return predict(
        backbone, graphs.take(choose_shown(len(graphs))), stress=any_label(graphs, "stress"), progress=progress
    )


def predict_streamed(
    backbone: Backbone, graphs: StoredGraphs, progress: Callable[[int], None] | None = None, *, finite: bool = True
) -> StreamedPredictions:
    """Predict for graphs on disk, in the batches of :func:`forcetune.evaluation.metrics.predict`.

    Args:
        backbone: the model.
        graphs: of frames on disk.
        progress: called with the number of frames done after each batch.
        finite: whether every frame must have a number; otherwise errors are NaN where one has none.

    Raises:
        InputError: the model gives no number for a frame, and it must; names file and frame.
    """
    stress = any_label(graphs, "stress")
    energy, label = np.zeros(len(graphs)), np.zeros(len(graphs))
    tally, done = Tally(), 0
    for batch in evaluation_batches(graphs):
        prediction = backbone.predict(backbone.place(batch), stress=stress).detached()
        part = Predictions.of(batch, prediction.to(batch.energy.device))
        if finite:
            _check_finite(graphs.frames, done, batch, part)
        here = slice(done, done + batch.n_graphs)
        energy[here], label[here] = part.energy, part.energy_label
        tally.add(part)
        done += batch.n_graphs
        if progress is not None:
            progress(batch.n_graphs)
    return StreamedPredictions(graphs.frames, energy, label, tally, predict_shown(backbone, graphs))


def _check_finite(frames: StoredFrames, start: int, batch: Batch, predictions: Predictions) -> None:
    bad = ~np.isfinite(predictions.energy)
    bad[batch.graph_index.numpy()[~np.isfinite(predictions.forces).all(axis=1)]] = True
    if bad.any():
        raise InputError(
            f"{frames[start + int(np.argmax(bad))].origin}: the model's energy or forces are not finite; look for "
            "atoms on top of each other."
        )
