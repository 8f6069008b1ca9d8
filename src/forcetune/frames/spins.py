"""The magnetic state of each frame, as a spin-aware layer is given it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from forcetune.config import SpinInputs
from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray, Frame, LabelKeys

SMALLEST_MOMENT = 0.05
"""Moments below this, μB, have no direction."""
UNIT_TOLERANCE = 1e-3
UNIT_FRAMES = 1000
"""So many frames are looked at to see whether spins are unit vectors."""
OF_FILE: tuple[SpinInputs, ...] = ("initial", "unit")
"""Inputs that come from the spins of a frame, the others from its moments."""
DIRECTIONS: tuple[SpinInputs, ...] = ("unit", "directions")
"""Inputs that are unit vectors: the length of what is given makes no difference."""


def resolved_inputs(inputs: SpinInputs, keys: LabelKeys, frames: Sequence[Frame]) -> SpinInputs:
    """What ``auto`` stands for: the state in the file where there is one, otherwise the directions of the moments.

    Args:
        inputs: as asked for.
        keys: of the training frames.
        frames: those. Where their spins are unit vectors, directions is all that spins can say.
    """
    if inputs != "auto":
        return inputs
    if keys.spins is None:
        return "directions"
    return "unit" if are_unit(frames) else "initial"


def are_unit(frames: Sequence[Frame]) -> bool:
    """Whether all spins of the first :data:`UNIT_FRAMES` frames are unit vectors or zero: they say directions."""
    any_spins = False
    for frame in frames[:UNIT_FRAMES]:
        if frame.spins is None:
            return False
        lengths = np.linalg.norm(frame.spins, axis=1)
        spinning = lengths > 0
        if np.abs(lengths[spinning] - 1).max(initial=0.0) > UNIT_TOLERANCE:
            return False
        any_spins = any_spins or bool(spinning.any())
    return any_spins


def with_spins(frames: Sequence[Frame], inputs: SpinInputs) -> tuple[Frame, ...]:
    """The frames with the state that the layer is given.

    Args:
        frames: with moments, or with spins of their own.
        inputs: ``initial`` keeps the spins of the file, ``unit`` takes unit vectors along them, ``directions`` unit
            vectors along the moments (zero for moments below :data:`SMALLEST_MOMENT`), ``moments`` the moments
            themselves. Magnetic forces of directions become those that turn them.

    Raises:
        InputError: a frame lacks what is needed; names file and frame.
    """
    result = []
    for frame in frames:
        vectors = frame.spins if inputs in OF_FILE else frame.moments
        if vectors is None:
            what, key = ("spins", "spins") if inputs in OF_FILE else ("magnetic moments", "moments")
            raise InputError(
                f"{frame.origin}: has no {what}, which the spin-aware layer starts from; add them to the frame, set "
                f"data.{key}_key, or choose other inputs (magnetism.inputs)."
            )
        if inputs in DIRECTIONS:
            frame = replace(frame, magforces=_turning(frame, vectors if frame.moments is None else frame.moments))
            vectors = directions(vectors)
        result.append(replace(frame, spins=vectors))
    return tuple(result)


def _turning(frame: Frame, moments: FloatArray) -> FloatArray | None:
    """Magnetic forces by the direction of each moment m, eV per radian: m (F − (F·m̂) m̂), NaN where there is none."""
    if frame.magforces is None:
        return None
    unit = directions(moments)
    across = frame.magforces - (frame.magforces * unit).sum(axis=1, keepdims=True) * unit
    return np.where(unit.any(axis=1, keepdims=True), np.linalg.norm(moments, axis=1, keepdims=True) * across, np.nan)


def directions(moments: FloatArray) -> FloatArray:
    """Unit vectors along (atoms, 3) moments; zero where there is next to none."""
    lengths = np.linalg.norm(moments, axis=1, keepdims=True)
    return np.where(lengths < SMALLEST_MOMENT, 0.0, moments / np.maximum(lengths, SMALLEST_MOMENT))
