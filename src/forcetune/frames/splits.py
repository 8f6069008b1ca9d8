"""Setting frames aside: for validation, and isolated atoms for reference energies."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np

from forcetune.errors import InputError
from forcetune.frames.frame import Frame
from forcetune.frames.store.stored_frames import StoredFrames

ISOLATION_DISTANCE = 8.0
"""Å; a lone atom whose periodic images are nearer than this is a crystal, not an isolated atom."""


def split(frames: Sequence[Frame], valid: float | int, seed: int = 123) -> tuple[Sequence[Frame], Sequence[Frame]]:
    """Split frames at random into training and validation, the same way for the same seed.

    The indices are shuffled by ``np.random.default_rng(seed)``; the last ones validate. With a fraction this
    is the split of mace and of the published few-shot runs on rMD17 (fraction 0.5 of 100 frames, seed 123).
    Separate isolated atoms first, see :func:`separate_isolated`.

    Args:
        frames: what to split.
        valid: the fraction of the frames that validates, above 0 and below 1 and rounded down to whole
            frames, but to one at least, or their number.
        seed: of the shuffle.

    Returns:
        training and validation frames, in shuffled order.

    Raises:
        InputError: ``valid`` is neither, or nothing is left for training.
    """
    if len(frames) == 1:
        raise InputError(
            f"{frames[0].origin.file}: holds one frame to train on and none to validate on; add frames, or name a "
            "validation file (--valid)."
        )
    count = _validation_count(len(frames), valid)
    indices = list(range(len(frames)))
    # a list and not an array: the published split shuffles a list
    np.random.default_rng(seed).shuffle(indices)
    boundary = len(frames) - count
    if isinstance(frames, StoredFrames):
        order = frames.indices[np.array(indices)]
        return frames.take(order[:boundary]), frames.take(order[boundary:])
    return tuple(frames[i] for i in indices[:boundary]), tuple(frames[i] for i in indices[boundary:])


def take_some(frames: Sequence[Frame], count: int | None, seed: int) -> Sequence[Frame]:
    """So many of the frames at random; of one seed smaller sets lie in larger ones.

    Args:
        frames: to choose from.
        count: None takes all.
        seed: of the choice.

    Raises:
        InputError: there are not so many.
    """
    if count is None:
        return frames
    if count > len(frames):
        raise InputError(
            f"data.train_frames is {count}, but there are {len(frames)} frames to train on; give fewer or more data."
        )
    chosen = np.random.default_rng(seed).permutation(len(frames))[:count]
    if isinstance(frames, StoredFrames):
        return frames.take(frames.indices[chosen])
    return tuple(frames[int(index)] for index in chosen)


def _validation_count(total: int, valid: float | int) -> int:
    if isinstance(valid, Integral) and not isinstance(valid, bool):
        count = int(valid)
        if count < 1:
            raise InputError(f"Validation by {count} frames: give 1 or more, or a fraction such as 0.1.")
    elif isinstance(valid, float) and 0.0 < valid < 1.0:
        count = max(1, int(valid * total))
    else:
        raise InputError(f"Validation by {valid!r}: give a fraction above 0 and below 1, or a whole number of frames.")
    if count >= total:
        raise InputError(
            f"Validation with {count} of {total} frames leaves none for training; give fewer or more data."
        )
    return count


def separate_isolated(frames: Sequence[Frame]) -> tuple[Sequence[Frame], Sequence[Frame]]:
    """Take isolated atoms out of the data, because their energies are references and not examples.

    An isolated atom is a frame of one atom with an energy and no periodic image nearer than
    ``ISOLATION_DISTANCE``; a primitive cell of a metal is not one.

    Returns:
        the other frames and the isolated atoms, each in the order given.
    """
    if isinstance(frames, StoredFrames):
        return frames.take(frames.indices[~frames.alone]), frames.take(frames.indices[frames.alone])
    isolated = [is_isolated(frame) for frame in frames]
    others = tuple(frame for frame, alone in zip(frames, isolated, strict=True) if not alone)
    return others, tuple(frame for frame, alone in zip(frames, isolated, strict=True) if alone)


def is_isolated(frame: Frame) -> bool:
    """Whether a frame is an isolated atom as :func:`separate_isolated` means it."""
    if len(frame) != 1 or frame.energy is None:
        return False
    vectors = frame.cell[frame.pbc]
    if len(vectors) == 0:
        return True
    steps = np.stack(np.meshgrid(*[np.arange(-2, 3)] * len(vectors), indexing="ij"), axis=-1).reshape(-1, len(vectors))
    distances = np.linalg.norm(steps[steps.any(axis=1)] @ vectors, axis=1)
    return bool(distances.min() >= ISOLATION_DISTANCE)
