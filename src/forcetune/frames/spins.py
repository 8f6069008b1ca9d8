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


def resolved_inputs(inputs: SpinInputs, keys: LabelKeys) -> SpinInputs:
    """What ``auto`` stands for: the state in the file where there is one, otherwise the directions of the moments."""
    if inputs != "auto":
        return inputs
    return "directions" if keys.spins is None else "initial"


def with_spins(frames: Sequence[Frame], inputs: SpinInputs) -> tuple[Frame, ...]:
    """The frames with the state that the layer is given.

    Args:
        frames: with moments, or with spins of their own.
        inputs: ``initial`` keeps the spins of the file, ``directions`` takes unit vectors along the moments (zero for
            moments below :data:`SMALLEST_MOMENT`), ``moments`` the moments themselves.

    Raises:
        InputError: a frame lacks what is needed; names file and frame.
    """
    result = []
    for frame in frames:
        given = frame.spins if inputs == "initial" else frame.moments
        if given is None:
            what, key = ("spins", "spins") if inputs == "initial" else ("magnetic moments", "moments")
            raise InputError(
                f"{frame.origin}: has no {what}, which the spin-aware layer starts from; add them to the frame, set "
                f"data.{key}_key, or choose other inputs (magnetism.inputs)."
            )
        result.append(replace(frame, spins=directions(given) if inputs == "directions" else given))
    return tuple(result)


def directions(moments: FloatArray) -> FloatArray:
    """Unit vectors along (atoms, 3) moments; zero where there is next to none."""
    lengths = np.linalg.norm(moments, axis=1, keepdims=True)
    return np.where(lengths < SMALLEST_MOMENT, 0.0, moments / np.maximum(lengths, SMALLEST_MOMENT))
