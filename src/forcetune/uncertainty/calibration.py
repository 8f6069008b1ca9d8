"""From raw standard deviations to ones that can be believed: a scale and conformal intervals from validation frames.

The scale is the maximum-likelihood one of independent normal errors, α² = mean(error² / σ²), in closed form. A
conformal interval prediction ± q σ needs no normal errors: q is the finite-sample quantile of |error| / σ over n
exchangeable frames, the ⌈(n + 1) level⌉-th smallest (Lei et al., JASA 113, 1094, 2018). A frame has many force
components that are not independent of each other; each then counts 1 / ((n + 1) components), which keeps the coverage
of a random component of a new frame (Lee, Barber, Willett, arXiv 2306.06342).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from forcetune.errors import InputError
from forcetune.evaluation.metrics import Predictions
from forcetune.frames.frame import FloatArray, IntArray

LEVELS = (0.5, 0.8, 0.95)
"""Coverages in tables."""
STORED_LEVELS = (0.5, 0.68, 0.8, 0.9, 0.95, 0.99)
"""Coverages of which a file has the conformal quantile."""
SMALLEST = 1e-12
"""eV or eV/Å; a standard deviation below it is none."""


def fit_scale(errors: FloatArray, deviations: FloatArray) -> float:
    """α = √mean(error² / σ²), which maximises the likelihood of normal errors.

    Args:
        errors, deviations: of one shape; NaN errors do not count.

    Raises:
        InputError: no error is known.
    """
    known = np.isfinite(errors)
    if not known.any():
        raise InputError("The validation frames lack this label; calibrate on frames that have it (--valid FILE).")
    ratio = errors[known] / np.maximum(deviations[known], SMALLEST)
    return float(np.sqrt(np.mean(ratio**2)))


def log_likelihood(errors: FloatArray, deviations: FloatArray) -> float:
    """Mean log density of normal errors with the best scale, without constants that all have."""
    known = np.isfinite(errors)
    deviations = np.maximum(deviations[known], SMALLEST)
    return -float(np.log(fit_scale(errors[known], deviations)) + np.mean(np.log(deviations)))


def conformal_quantile(scores: FloatArray, groups: IntArray, level: float) -> float | None:
    """The score that a new one does not exceed with at least this probability.

    Args:
        scores: (n,) |error| / σ; NaN do not count.
        groups: (n,) the frame of each, of which the scores share the weight.
        level: coverage between 0 and 1.

    Returns:
        the quantile; None where there are too few frames for this level: 1 / (frames + 1) > 1 − level.
    """
    known = np.isfinite(scores)
    scores, groups = scores[known], groups[known]
    if not len(scores):
        return None
    _, group_index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    # in units of 1 / (frames + 1), so that frames with one score each add up to whole numbers
    weights = 1.0 / sizes[group_index]
    order = np.argsort(scores, kind="stable")
    cumulative = np.cumsum(weights[order])
    needed = level * (len(sizes) + 1)
    # sums of 1/3 + 1/3 + 1/3 are not exactly 1
    index = int(np.searchsorted(cumulative, needed - 1e-9 * len(sizes)))
    return float(scores[order][index]) if index < len(scores) else None


def rank_correlation(first: FloatArray, second: FloatArray) -> float | None:
    """Spearman's; None where it has no meaning."""
    known = np.isfinite(first) & np.isfinite(second)
    first, second = first[known], second[known]
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(stats.rankdata(first), stats.rankdata(second))[0, 1])


@dataclass(frozen=True, slots=True, eq=False)
class Deviations:
    """Errors of one quantity with their raw standard deviations.

    Attributes:
        errors: (n,) signed, or lengths of vectors; NaN where there is no label.
        deviations: (n,).
        frames: (n,) the frame of each.
        degrees: of freedom of one error: 1 of a number, 3 of the length of a vector.
    """

    errors: FloatArray
    deviations: FloatArray
    frames: IntArray
    degrees: int = 1

    def gaussian_width(self, level: float) -> float:
        """How many standard deviations a normal error stays below with this probability."""
        # the deviation of a vector is that of its length, √3 that of a component
        return float(stats.chi(self.degrees).ppf(level) / np.sqrt(self.degrees))

    @property
    def scores(self) -> FloatArray:
        """|error| / σ."""
        return np.abs(self.errors) / np.maximum(self.deviations, SMALLEST)


def collect_deviations(
    predictions: Predictions, energy: FloatArray, forces: FloatArray | None
) -> dict[str, Deviations]:
    """Errors and raw standard deviations of energies per atom, force components and force vectors, by quantity.

    Args:
        predictions: with labels.
        energy: (frames,) raw standard deviations, eV.
        forces: (atoms, 3), eV/Å, or None.
    """
    atoms, frames = predictions.atoms, np.arange(len(predictions.atoms))
    deviations = {
        "energy_per_atom": Deviations((predictions.energy - predictions.energy_label) / atoms, energy / atoms, frames)
    }
    if forces is not None:
        error, atom_frames = predictions.forces - predictions.forces_label, np.repeat(frames, atoms)
        deviations["forces"] = Deviations(error.ravel(), forces.ravel(), np.repeat(atom_frames, 3))
        lengths = np.linalg.norm(error, axis=1), np.linalg.norm(forces, axis=1)
        deviations["forces_of_atoms"] = Deviations(*lengths, atom_frames, degrees=3)
    return deviations


@dataclass(frozen=True, slots=True)
class Calibration:
    """What validation frames say about one quantity.

    Attributes:
        scale: α, by which raw standard deviations are multiplied.
        quantiles: of |error| / σ (raw), by coverage; None where there are too few frames.
        n_frames, n_values: counted.
    """

    scale: float
    quantiles: dict[float, float | None]
    n_frames: int
    n_values: int

    @staticmethod
    def fit(measured: Deviations) -> Calibration:
        """Scale and quantiles from the errors of validation frames.

        Raises:
            InputError: as :func:`fit_scale`.
        """
        known = np.isfinite(measured.errors)
        return Calibration(
            fit_scale(measured.errors, measured.deviations),
            {level: conformal_quantile(measured.scores, measured.frames, level) for level in STORED_LEVELS},
            len(np.unique(measured.frames[known])),
            int(known.sum()),
        )


def calibrate_all(measured: dict[str, Deviations]) -> dict[str, Calibration]:
    """The calibration of every quantity that has labels.

    Raises:
        InputError: none has.
    """
    calibrations = {
        name: Calibration.fit(deviations)
        for name, deviations in measured.items()
        if np.isfinite(deviations.errors).any()
    }
    if not calibrations:
        raise InputError("The validation frames have neither energies nor forces; name others with --valid FILE.")
    return calibrations


@dataclass(frozen=True, slots=True)
class IntervalCoverage:
    """How many errors lie within an interval that shall hold ``level`` of them.

    Attributes:
        level: share of errors that the interval shall hold.
        before: share within normal intervals of the raw standard deviations.
        after: the same with the calibrated ones.
        conformal: share within conformal intervals; None where calibration had too few frames.
        half_width: mean half width of the conformal intervals, eV/atom or eV/Å; None as above.
    """

    level: float
    before: float
    after: float
    conformal: float | None
    half_width: float | None


@dataclass(frozen=True, slots=True)
class Reliability:
    """How well calibrated standard deviations of one quantity predict the errors of these frames.

    Attributes:
        n_values: errors counted.
        rms_error, mean_deviation: eV/atom or eV/Å.
        ratio: root mean square error over root mean square deviation; 1 is calibrated, above is too sure of itself.
        correlation: Spearman's rank correlation of standard deviation and absolute error.
        coverage: of each level in the table.
        curve: (level, share before, share after) for a plot.
    """

    n_values: int
    rms_error: float
    mean_deviation: float
    ratio: float | None
    correlation: float | None
    coverage: tuple[IntervalCoverage, ...]
    curve: tuple[tuple[float, float, float], ...]


def measure_reliability(
    measured: Deviations, calibration: Calibration, levels: Sequence[float] = LEVELS
) -> Reliability | None:
    """Compare intervals with errors; None where nothing has a label."""
    known = np.isfinite(measured.errors)
    if not known.any():
        return None
    scores, deviations, errors = measured.scores[known], measured.deviations[known], np.abs(measured.errors[known])

    def share_within(limit: float) -> float:
        # the frames of the calibration themselves lie on the limit, but for rounding
        return float((scores <= limit * (1 + 1e-9)).mean())

    def measure_coverage(level: float) -> IntervalCoverage:
        width, quantile = measured.gaussian_width(level), calibration.quantiles.get(level)
        return IntervalCoverage(
            level,
            share_within(width),
            share_within(width * calibration.scale),
            None if quantile is None else share_within(quantile),
            None if quantile is None else quantile * float(deviations.mean()),
        )

    rms = float(np.sqrt(np.mean(errors**2)))
    rms_deviation = calibration.scale * float(np.sqrt(np.mean(deviations**2)))
    curve = []
    for level in np.arange(0.05, 1.0, 0.05):
        width = measured.gaussian_width(float(level))
        curve.append((round(float(level), 2), share_within(width), share_within(width * calibration.scale)))
    return Reliability(
        int(known.sum()),
        rms,
        calibration.scale * float(deviations.mean()),
        rms / rms_deviation if rms_deviation > 0 else None,
        rank_correlation(deviations, errors),
        tuple(map(measure_coverage, levels)),
        tuple(curve),
    )
