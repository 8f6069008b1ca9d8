"""Weights that a file gives its frames and labels, under the keys that mace reads.

- ``config_weight``: of the frame. With 0 the frame is left out, as if it were not in the file.
- ``config_energy_weight``, ``config_forces_weight``, ``config_stress_weight`` (or ``config_virials_weight``): of one
  label, times that of the frame. With 0 the label is left out.

A weight multiplies the error of its label in the loss; the mean stays that over the number of labels, so that a weight
of 10 counts ten times. Errors in tables are not weighted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from forcetune.errors import InputError
from forcetune.frames.frame import LabelKeys
from forcetune.frames.labels import RawFrame

FRAME_KEY = "config_weight"
ENERGY_KEYS = ("config_energy_weight",)
FORCES_KEYS = ("config_forces_weight", "config_force_weight")
STRESS_KEYS = ("config_stress_weight",)
VIRIAL_KEYS = ("config_virials_weight", "config_virial_weight")
WEIGHT_KEYS = (FRAME_KEY, *ENERGY_KEYS, *FORCES_KEYS, *STRESS_KEYS, *VIRIAL_KEYS)


class LabelWeights(NamedTuple):
    """How much each label of a frame counts in the loss; 0 leaves it out."""

    energy: float = 1.0
    forces: float = 1.0
    stress: float = 1.0
    moments: float = 1.0
    hessian: float = 1.0


def weight_under(raw: RawFrame, key: str) -> float | None:
    """
    Raises:
        InputError: what stands there is no number, negative or not finite; names file and frame.
    """
    value = raw.named.get(key)
    if value is None:
        return None
    try:
        number = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        number = np.asarray(np.nan)
    if number.size != 1 or isinstance(value, bool) or not np.isfinite(number).all() or number.item() < 0:
        raise InputError(
            f"{raw.origin}: the weight under '{key}' is {str(value)[:40]!r}; give a number that is not negative."
        )
    return float(number.item())


def is_left_out(raw: RawFrame) -> bool:
    """Whether the weight of a frame is 0.

    Raises:
        InputError: as :func:`weight_under`.
    """
    return weight_under(raw, FRAME_KEY) == 0


def read_weights(raw: RawFrame, keys: LabelKeys) -> LabelWeights:
    """The weights of a frame's labels, that of the frame included.

    Args:
        raw: the frame.
        keys: of its labels; a virial has its own key for a weight.

    Raises:
        InputError: as :func:`weight_under`.
    """

    def first(names: Iterable[str]) -> float:
        weights = (weight_under(raw, name) for name in names)
        return next((weight for weight in weights if weight is not None), 1.0)

    whole = first((FRAME_KEY,))
    is_virial = "virial" in (keys.stress or "").lower()
    of_stress = (*VIRIAL_KEYS, *STRESS_KEYS) if is_virial else (*STRESS_KEYS, *VIRIAL_KEYS)
    return LabelWeights(whole * first(ENERGY_KEYS), whole * first(FORCES_KEYS), whole * first(of_stress), whole, whole)


@dataclass(slots=True)
class WeightTally:
    """What weights the frames of a set have.

    Attributes:
        frames, left_out: how many, and how many of them have ``config_weight`` 0.
        ranges: key to the smallest and largest weight under it.
    """

    frames: int = 0
    left_out: int = 0
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, raw: RawFrame) -> None:
        """Count a frame.

        Raises:
            InputError: as :func:`weight_under`.
        """
        self.frames += 1
        left_out = is_left_out(raw)
        self.left_out += left_out
        for key in (FRAME_KEY,) if left_out else WEIGHT_KEYS:
            weight = weight_under(raw, key)
            if weight is not None:
                self._widen(key, weight, weight)

    def merge(self, other: WeightTally) -> None:
        """Count what another has counted."""
        self.frames += other.frames
        self.left_out += other.left_out
        for key, (low, high) in other.ranges.items():
            self._widen(key, low, high)

    def _widen(self, key: str, low: float, high: float) -> None:
        known = self.ranges.get(key, (low, high))
        self.ranges[key] = (min(known[0], low), max(known[1], high))

    def check(self, name: str, file: object) -> None:
        """
        Raises:
            InputError: no frame is left.
        """
        if self.frames and self.left_out == self.frames:
            raise InputError(f"{name} ({file}): every frame has {FRAME_KEY} 0 and is left out; give some a weight.")

    def sentence(self) -> str | None:
        """What the weights do, in one line; None where all of them are 1."""
        named = [
            f"{key} {low:g}" + ("" if low == high else f" to {high:g}")
            for key, (low, high) in self.ranges.items()
            if (low, high) != (1.0, 1.0)
        ]
        if not named:
            return None
        text = f"weights of the file count in the loss ({', '.join(named)})"
        if self.left_out:
            text += f"; {self.left_out} of {self.frames} frames have {FRAME_KEY} 0 and are left out"
        if any(low == 0 for key, (low, _) in self.ranges.items() if key != FRAME_KEY):
            text += "; labels with weight 0 are left out"
        return text + "."
