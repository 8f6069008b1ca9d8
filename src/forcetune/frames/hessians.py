"""Hessian labels at the door: their shape, their symmetry, and whether they know that space is uniform."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray, Frame
from forcetune.frames.labels import RawFrame

LARGEST_ASYMMETRY = 0.01
"""Of the largest entry; finite differences of converged forces are below it, matrices in another order above."""
LARGEST_DRIFT = 0.01
"""Of the largest entry: force that a shift of all atoms by 1 Å would cause on one of them."""


def hessian_matrix(raw: RawFrame, key: str, values: FloatArray) -> FloatArray:
    """(3 atoms, 3 atoms), eV/Å², made exactly symmetric, from a matrix or a row of 9 · atoms numbers for each atom.

    The order is x, y, z of atom 0, x, y, z of atom 1, …; the row of an atom holds its three rows of the matrix.

    Raises:
        InputError: it has another shape, or is not symmetric; names file and frame.
    """
    atoms = len(raw.atoms)
    if values.shape not in {(3 * atoms, 3 * atoms), (atoms, 9 * atoms), (atoms, 3, atoms, 3)}:
        raise InputError(
            f"{raw.origin}: the Hessian under '{key}' should have shape ({3 * atoms}, {3 * atoms}) but has "
            f"{values.shape}; fix it, or set hessian_key to 'none'."
        )
    matrix = values.reshape(3 * atoms, 3 * atoms)
    asymmetry, largest = np.abs(matrix - matrix.T).max(), np.abs(matrix).max()
    if asymmetry > LARGEST_ASYMMETRY * largest:
        raise InputError(
            f"{raw.origin}: the Hessian under '{key}' is not symmetric: entries differ by {asymmetry:.3g} eV/Å² from "
            f"their mirror images, the largest is {largest:.3g}; fix it, or set hessian_key to 'none'."
        )
    return 0.5 * (matrix + matrix.T)


def describe_drift(frames: Sequence[Frame]) -> str | None:
    """A sentence about Hessians by which a shift of the whole structure causes forces; None where there are none."""
    violations = [
        (frame, drift)
        for frame in frames
        if frame.hessian is not None
        and (drift := np.abs(frame.hessian.reshape(-1, len(frame), 3).sum(axis=1)).max())
        > LARGEST_DRIFT * np.abs(frame.hessian).max()
    ]
    if not violations:
        return None
    (first, drift), count = violations[0], sum(frame.hessian is not None for frame in frames)
    return (
        f"the rows of {len(violations)} of {count} Hessians do not add up to zero (first {first.origin}: "
        f"{drift:.3g} eV/Å²), so that a shift of all atoms would cause forces; no model follows them there: look for "
        "another unit, mass weights, constrained atoms or missing columns."
    )
