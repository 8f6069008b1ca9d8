"""How an error falls with the number of training frames, and how many a smaller error would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray

SAMPLES = 2000
"""Of the bootstrap."""
INTERVAL = (2.5, 97.5)
"""Percentiles, of intervals that shall hold the truth in 95 of 100 cases."""
FAR = 10.0
"""Beyond this many times the largest set a power law is a guess."""


@dataclass(frozen=True, slots=True)
class Needed:
    """Frames that a target takes.

    Attributes:
        target: error.
        frames: by the fit; None where the error does not fall.
        low, high: 95 % interval; None is without bound.
        extrapolated: it takes more than ten times the frames of the largest set.
    """

    target: float
    frames: float | None
    low: float | None
    high: float | None
    extrapolated: bool


@dataclass(frozen=True, slots=True, eq=False)
class PowerLaw:
    """error = prefactor · frames^(−exponent), by least squares of the logarithms, with a residual bootstrap.

    Attributes:
        prefactor, exponent: of the fit.
        exponent_interval: 95 %.
        samples: (bootstrap, 2) logarithm of the prefactor, exponent.
        largest: frames of the largest set.
    """

    prefactor: float
    exponent: float
    exponent_interval: tuple[float, float]
    samples: FloatArray
    largest: int

    def at(self, frames: FloatArray) -> FloatArray:
        """The error for so many frames."""
        return self.prefactor * frames**-self.exponent

    def band(self, frames: FloatArray) -> tuple[FloatArray, FloatArray]:
        """95 % interval of the fitted error for so many frames."""
        logs = self.samples[:, :1] - self.samples[:, 1:] * np.log(frames)[None]
        low, high = np.percentile(np.exp(logs), INTERVAL, axis=0)
        return low, high

    def needed(self, target: float) -> Needed:
        """Frames that take the error to a target.

        Raises:
            InputError: the target is not positive.
        """
        if not (np.isfinite(target) and target > 0):
            raise InputError(f"A target error of {target:g} is never reached; give a positive one.")
        counts = np.array([_frames(prefactor, exponent, target) for prefactor, exponent in self.samples])
        low, high = np.percentile(counts, INTERVAL, method="nearest")
        frames = _frames(np.log(self.prefactor), self.exponent, target)
        far = not np.isfinite(frames) or frames > FAR * self.largest
        values = [float(n) if np.isfinite(n) else None for n in (frames, low, high)]
        return Needed(target, values[0], values[1], values[2], bool(far))


def _frames(log_prefactor: float, exponent: float, target: float) -> float:
    """Infinite where the error does not fall far enough with any number that a float can hold."""
    if exponent <= 0:
        return np.inf
    power = (log_prefactor - np.log(target)) / exponent
    return float(np.exp(power)) if power < 300 else np.inf


def fit_power_law(frames: Sequence[int], errors: Sequence[float], *, seed: int = 0) -> PowerLaw:
    """Fit errors of several runs of several sizes.

    Args:
        frames: of each run.
        errors: of each run, positive.
        seed: of the bootstrap.

    Raises:
        InputError: fewer than three runs of fewer than two sizes, or an error that is not positive.
    """
    sizes, values = np.asarray(frames, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if len(sizes) < 3 or len(set(sizes)) < 2:
        raise InputError("A learning curve needs at least two sizes and three runs; add sizes or --seeds.")
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise InputError("A learning curve needs errors that are finite and positive; look at the runs.")
    design = np.stack([np.ones_like(sizes), -np.log(sizes)], axis=1)
    solve = np.linalg.pinv(design)
    logs = np.log(values)
    fitted = solve @ logs
    residuals = logs - design @ fitted
    # two parameters were fitted to these points, so that the residuals are too small
    residuals *= np.sqrt(len(sizes) / (len(sizes) - 2))
    random = np.random.default_rng(seed)
    drawn = random.choice(residuals - residuals.mean(), (SAMPLES, len(sizes)))
    samples = (design @ fitted + drawn) @ solve.T
    low, high = np.percentile(samples[:, 1], INTERVAL)
    return PowerLaw(float(np.exp(fitted[0])), float(fitted[1]), (float(low), float(high)), samples, int(sizes.max()))
