"""What is left of energies when the best sum over elements is taken out, undisturbed by a few wrong ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forcetune.frames.frame import FloatArray, Frame
from forcetune.frames.references import composition_matrix

ROUNDS = 6


def composition_residual(frames: Sequence[Frame], energies: FloatArray) -> tuple[FloatArray, int, int]:
    """Energies an atom minus the sum over elements that explains them best.

    Each round fits by least squares to those frames that the round before left within five robust standard deviations,
    so that a wrong energy does not move the fit. The residual has median zero.

    Args:
        frames: (frames,) any.
        energies: (frames,), eV, finite.

    Returns:
        residual (frames,), eV an atom; rank of the composition matrix; number of elements.
    """
    elements = tuple(sorted({int(z) for frame in frames for z in frame.numbers}))
    composition = composition_matrix(frames, elements)
    atoms = composition.sum(axis=1)
    shares, target = composition / atoms[:, None], energies / atoms
    rank = int(np.linalg.matrix_rank(composition))
    used = np.ones(len(frames), dtype=bool)
    residual = target - np.median(target)
    for _ in range(ROUNDS):
        solution, *_ = np.linalg.lstsq(shares[used], target[used], rcond=None)
        residual = target - shares @ solution
        residual = residual - np.median(residual)
        spread = 1.4826 * float(np.median(np.abs(residual)))
        used = np.abs(residual) <= 5 * spread + 1e-9
        if used.sum() < rank + 2:
            break
    return residual, rank, len(elements)
