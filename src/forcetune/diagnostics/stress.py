"""What a foundation model's stress says about the stress labels of a set: sign, unit, order of components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np

from forcetune.diagnostics.finding import Finding, in_set
from forcetune.diagnostics.label_statistics import Agreement, LabelledPredictions, cosine, saturated, stress_agreement
from forcetune.diagnostics.units import STRESS, Unit, candidates, is_usual, named, times, two
from forcetune.frames.frame import FloatArray

FEWEST = 3
"""Frames; each has six numbers."""
AGREES = 0.6
"""Correlation from which the model speaks for or against a sign or unit."""
RESTORED = 0.7
LEAD = 0.3
"""Correlation that another order of components must bring, and by how much it must be better."""

ASE_ORDER = ("xx", "yy", "zz", "yz", "xz", "xy")
_NAMED_ORDERS = {
    ("xx", "yy", "zz", "xy", "yz", "xz"): "xx yy zz xy yz zx, as VASP does",
    ("xx", "yy", "zz", "xy", "xz", "yz"): "xx yy zz xy xz yz, as LAMMPS does",
    ("xx", "xy", "xz", "yy", "yz", "zz"): "xx xy xz yy yz zz",
    ("xx", "xy", "yy", "xz", "yz", "zz"): "xx xy yy xz yz zz",
}
_OTHERS = [("xx", "yy", "zz", *rest) for rest in permutations(ASE_ORDER[3:]) if rest != ASE_ORDER[3:]]
ORDERS: dict[tuple[str, ...], str] = {order: " ".join(order) for order in _OTHERS} | _NAMED_ORDERS
"""Orders in which six components may have been written, and how they are named."""

_ROWS, _COLUMNS = [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]
_FULL = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])


class Order(NamedTuple):
    """An order of components that brings labels and model together: in words, correlation before and after."""

    text: str
    before: float
    after: float


def check_stress(predictions: LabelledPredictions, forces: Agreement | None) -> list[Finding]:
    """Everything that predictions for a set say about its stress labels.

    Args:
        predictions: frames with stress labels.
        forces: how the model agrees with their forces, which says how far to believe it; None where they have none.
    """
    agreement = stress_agreement(predictions)
    if (
        agreement is None
        or agreement.n_frames < FEWEST
        or predictions.stress is None
        or predictions.stress_label is None
    ):
        return []
    if forces is not None and abs(forces.correlation) < AGREES:
        return []
    least = max(AGREES, 3.5 / math.sqrt(6 * agreement.n_frames))
    order = find_order(predictions.stress_label, predictions.stress)
    if order is not None and abs(order.after) >= least:
        text = (
            "Stress agrees with the model's only with its components in another order (correlation "
            f"{two(order.before)}, then {two(order.after)}): six numbers are read as {' '.join(ASE_ORDER)}, as ASE "
            f"writes them, and these stand in the order {order.text}; write them in ASE's order, or all nine."
        )
        return [in_set("stress-order", "error", text, predictions.frames)]
    if abs(agreement.correlation) < least:
        return []
    return _check_sign(predictions, agreement) + _check_unit(predictions, agreement)


def find_order(label: FloatArray, model: FloatArray) -> Order | None:
    """The order of components in which labels (frames, 3, 3) follow the model's; None where it is the one they have.

    Pressure is the same in most orders and is left out of the comparison.
    """
    six = label[:, _ROWS, _COLUMNS]
    before = _anisotropic(six[:, _FULL], model)
    best: Order | None = None
    for order, text in ORDERS.items():
        read = six[:, [order.index(component) for component in ASE_ORDER]]
        after = _anisotropic(read[:, _FULL], model)
        if best is None or abs(after) > abs(best.after):
            best = Order(text, before, after)
    if best is None or abs(best.after) < RESTORED or abs(best.after) - abs(before) < LEAD:
        return None
    return best


def _anisotropic(label: FloatArray, model: FloatArray) -> float:
    """Correlation of what is left of tensors (frames, 3, 3) without a third of their trace."""
    rest = [values - np.trace(values, axis1=1, axis2=2)[:, None, None] * np.eye(3) / 3 for values in (label, model)]
    return _correlation(*rest)


def _correlation(label: FloatArray, model: FloatArray) -> float:
    return cosine(saturated(label.reshape(-1, 3)), saturated(model.reshape(-1, 3)))


def _check_sign(predictions: LabelledPredictions, agreement: Agreement) -> list[Finding]:
    if agreement.correlation > 0 or predictions.stress is None or predictions.stress_label is None:
        return []
    # two theories may differ in the sign of the pressure of all frames, but then not in how it changes
    changes = [values - values.mean(axis=0) for values in (predictions.stress_label, predictions.stress)]
    if _correlation(*changes) > -AGREES / 2:
        return []
    text = (
        f"Stress has the sign against the model's (correlation {two(agreement.correlation)}); positive is tension "
        "here, as in ASE: multiply it by −1."
    )
    return [in_set("stress-sign", "error", text, predictions.frames)]


def _check_unit(predictions: LabelledPredictions, agreement: Agreement) -> list[Finding]:
    if is_usual(agreement.ratio):
        return []
    volume = float(np.median([abs(np.linalg.det(frame.cell)) for frame in predictions.frames]))
    units: Sequence[Unit] = (*STRESS, Unit("eV (a virial; stress is −virial / volume)", volume))
    near = candidates(agreement.ratio, units, 1.6)
    text = f"Stress is {times(agreement.ratio)} the model's, as if it were " + (
        f"in {named(near)}; convert it to eV/Å³." if near else "in another unit; convert it to eV/Å³."
    )
    return [in_set("stress-unit", "error" if near else "warning", text, predictions.frames)]
