"""Replay: frames of another kind mixed into the training, so that the model keeps what it knew.

Energies of different origin have different zeros. A replay frame's energy is brought to that of the run by
E + C (E0_run − E0_replay), with C its composition. For labels of the foundation model itself E0_replay are its own
reference energies, so that the model is asked for the interaction energy that it had; for labels in the files they
are estimated from the replay frames alone, and a head of its own takes what E0 cannot explain of another level of
theory (:mod:`forcetune.training.replay_head`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from forcetune.backbones.protocol import Backbone
from forcetune.config import DataConfig, ReplayConfig, TrainingConfig
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Predictions, build_graphs, check_finite, predict
from forcetune.frames.frame import Frame
from forcetune.frames.labels import AUTO, MAGNETIC, NONE, Label
from forcetune.frames.read import read_frames
from forcetune.frames.references import composition_matrix, estimate
from forcetune.frames.splits import separate_isolated
from forcetune.frames.store.stored_frames import list_elements
from forcetune.graphs.graph import Batch
from forcetune.training.replay_head import ReplayHead

MOST_HELD = 50
"""Replay frames that are kept out of the training to tell what was forgotten; at most a fifth of all."""


@dataclass(frozen=True, slots=True)
class ReplayFrames:
    """Replay frames as they were read.

    Attributes:
        frames: those to train on.
        held: those kept out of the training.
        files, sha256: where they came from.
    """

    frames: tuple[Frame, ...]
    held: tuple[Frame, ...]
    files: tuple[str, ...]
    sha256: str

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return list_elements((*self.frames, *self.held))

    @property
    def trained_elements(self) -> tuple[int, ...]:
        """Those in the frames to train on."""
        return list_elements(self.frames)


@dataclass(frozen=True, slots=True)
class Replay:
    """Replay frames ready for the training.

    Attributes:
        graphs: with the labels to train on, their energies at the run's zero, and their weight in the loss.
        held: frames kept out of the training, labelled alike.
        ratio: replay frames per training frame.
        references: E0 of the labels as they were, eV.
        head: of these frames alone; None where they share the model's.
    """

    graphs: tuple[Batch, ...]
    held: tuple[Frame, ...]
    ratio: float
    references: dict[int, float]
    head: ReplayHead | None


def has_own_head(config: ReplayConfig) -> bool:
    """Whether replay frames are predicted with a head of their own."""
    return config.head == "own" or (config.head == "auto" and config.labels == "file")


def read_replay(config: ReplayConfig, data: DataConfig) -> ReplayFrames | None:
    """Read the replay frames of a run and hold some of them out; None if it has none.

    Raises:
        InputError: as :func:`forcetune.frames.read.read_frames`; or there are too few frames.
    """
    if not config.data:
        return None
    own_labels = config.labels == "file"
    expected: tuple[Label, ...] = ("energy", "forces")
    frame_set = read_frames(
        config.data,
        energy_key=(NONE if data.energy_key == NONE else AUTO) if own_labels else NONE,
        forces_key=(NONE if data.forces_key == NONE else AUTO) if own_labels else NONE,
        stress_key=(NONE if data.stress_key == NONE else AUTO) if own_labels else NONE,
        hessian_key=NONE,
        # replay frames are not trained on magnetic labels, whatever layer the run has
        ignored=MAGNETIC,
        require=(),
        expect=expected if own_labels else (),
        name="replay data",
        type_map=data.type_map,
    )
    frames, _ = separate_isolated(frame_set.frames)
    frames = tuple(frame for frame in frames if len(frame) > 1)
    if len(frames) < 2:
        raise InputError(f"{frame_set.files[0]}: replay needs at least 2 frames of several atoms; name more.")
    order = np.random.default_rng(0).permutation(len(frames))
    count = max(1, min(MOST_HELD, len(frames) // 5))
    held, trained = np.sort(order[:count]), np.sort(order[count:])
    return ReplayFrames(
        tuple(frames[i] for i in trained), tuple(frames[i] for i in held), frame_set.files, frame_set.sha256
    )


def prepare_replay(
    replay: ReplayFrames,
    config: ReplayConfig,
    training: TrainingConfig,
    backbone: Backbone,
    references: Mapping[int, float],
) -> Replay:
    """Label replay frames and bring their energies to the run's zero.

    Args:
        replay: the frames.
        config: which labels, and how they count.
        training: its loss says whether stresses are needed.
        backbone: the foundation model without an adapter, with its own reference energies.
        references: the run's E0 of each element of the model, eV.

    Raises:
        InputError: an element that the model does not know, or a frame that it gives no finite numbers for.
    """
    frames = (*replay.frames, *replay.held)
    graphs = build_graphs(backbone, frames)
    stress = max(training.loss.stress_weight, training.second_stage.loss.stress_weight) > 0 and config.labels == "base"
    predicted = predict(backbone, graphs, stress=stress)
    check_finite(predicted, frames)
    model_references = backbone.reference_energies
    if config.labels == "base":
        labelled, zero = _labelled_by(predicted, frames), model_references
    else:
        labelled, zero = list(frames), estimate(frames, predicted.energy, model_references)
    labelled = shifted_frames(labelled, {z: references[z] - zero[z] for z in zero})
    count = len(replay.frames)
    head = None
    if has_own_head(config):
        head = ReplayHead(backbone.n_scalars, seed=training.seed, dtype=backbone.dtype, device=backbone.device)
    return Replay(
        tuple(graph.weighted(config.weight).for_replay() for graph in build_graphs(backbone, labelled[:count])),
        tuple(labelled[count:]),
        config.ratio,
        dict(zero),
        head,
    )


def _labelled_by(predicted: Predictions, frames: Sequence[Frame]) -> list[Frame]:
    """Frames with a model's predictions as labels; stress where it was computed and the frame is periodic."""
    ends = np.cumsum(predicted.atoms)
    return [
        replace(
            frame,
            energy=float(predicted.energy[index]),
            forces=predicted.forces[ends[index] - len(frame) : ends[index]],
            stress=None if predicted.stress is None or not frame.pbc.all() else predicted.stress[index],
        )
        for index, frame in enumerate(frames)
    ]


def shifted_frames(frames: Sequence[Frame], shift: Mapping[int, float]) -> list[Frame]:
    """With energies moved by the shift of each element's reference energy, eV."""
    elements = tuple(sorted(shift))
    moved = composition_matrix(frames, elements) @ [shift[z] for z in elements]
    return [
        frame if frame.energy is None else replace(frame, energy=frame.energy + float(change))
        for frame, change in zip(frames, moved, strict=True)
    ]


def data_hash(training: str, *others: str | None) -> str:
    """What a resumed run compares: the hash of the training frames, and of replay and penalty frames if there are."""
    parts = [training, *(other for other in others if other is not None)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest() if len(parts) > 1 else training
