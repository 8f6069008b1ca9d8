"""Hessians of a model by central differences of its forces, and their errors against labels.

(F(x + h z) − F(x − h z)) / 2h = −H z − h²/6 ∂⁴E z³ − …: even orders cancel. Every coordinate moves by h (root mean
square), so that the truncation error is that of one bond whatever the number of atoms.

With ``mini`` and four geometries of 2-aminoethanol in three directions each, where entries of H z reach 138 eV/Å², the
largest error is 6e-7 eV/Å² in float64 (median 2e-7) and 0.08 eV/Å² in float32 (median 0.003); relative to the largest
entry it stays below 1e-8 and 1e-3. In float64 errors grow as h² from 1e-5 to 1e-4 Å; at 1e-3 Å, the step of float32,
eleven of the twelve still do, and one is 30 times larger. Something that is not smooth within the step would do that,
such as the end of a short-range repulsion, but the cause was not examined. In float32 the
median is 0.007 at 3e-4 Å and 0.02 at 1e-4 Å: smaller steps lose more to the rounding of forces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from forcetune.backbones.protocol import Backbone
from forcetune.evaluation.metrics import EVALUATION_ATOMS
from forcetune.frames.frame import FloatArray, Frame
from forcetune.graphs.graph import build_graph, collate

STEPS = {torch.float64: 1e-5, torch.float32: 1e-3}
"""h by precision of the model, Å."""

LARGEST = 100
"""Atoms of a frame up to which its whole Hessian is predicted, by 6 predictions for each atom."""


def hessian_products(
    backbone: Backbone, displaced: Sequence[tuple[Frame, FloatArray]], *, create_graph: bool = False
) -> list[tuple[FloatArray, Tensor]]:
    """H z for directions z, all in one batch.

    Args:
        backbone: the model; neighbors of every displaced copy are searched with its cutoff.
        displaced: frames and directions (atoms, 3), whose components should be about 1.
        create_graph: whether the products will be differentiated.

    Returns:
        of each the direction that the positions really moved in, with the rounding of the model's precision, and H z,
        both (3 atoms,), float64, the latter in eV/Å².
    """
    step = STEPS[backbone.dtype]
    pairs = [
        [
            build_graph(
                replace(frame, positions=frame.positions + sign * step * direction), backbone.cutoff, backbone.dtype
            )
            for sign in (1, -1)
        ]
        for frame, direction in displaced
    ]
    batch = collate([graph for pair in pairs for graph in pair])
    forces = backbone.predict(backbone.place(batch), create_graph=create_graph).forces.double()
    by_graph = forces.split(batch.atoms_per_graph.tolist())
    products = []
    for (ahead, behind), forces_ahead, forces_behind in zip(pairs, by_graph[::2], by_graph[1::2], strict=True):
        moved = (ahead.positions.double() - behind.positions.double()).numpy() / (2 * step)
        products.append((moved.reshape(-1), (forces_behind - forces_ahead).reshape(-1) / (2 * step)))
    return products


def predict_hessian(backbone: Backbone, frame: Frame) -> FloatArray:
    """(3 atoms, 3 atoms), ∂²E/∂x∂x′, eV/Å², symmetric; takes 6 predictions for each atom."""
    size = 3 * len(frame)
    units = np.eye(size).reshape(size, len(frame), 3)
    # a copy ahead and one behind for each
    chunk = max(1, EVALUATION_ATOMS // (2 * len(frame)))
    columns: list[FloatArray] = []
    for start in range(0, size, chunk):
        products = hessian_products(backbone, [(frame, unit) for unit in units[start : start + chunk]])
        # in float32 a coordinate moves by what its rounding makes of h
        columns += [
            product.detach().cpu().numpy() / moved[start + place] for place, (moved, product) in enumerate(products)
        ]
    hessian = np.stack(columns)
    return 0.5 * (hessian + hessian.T)


@dataclass(frozen=True, slots=True)
class HessianErrors:
    """Errors over all entries of some frames' Hessians, eV/Å².

    Attributes:
        n_frames: of which Hessians were compared.
        n_left_out: that have a label but more than :data:`LARGEST` atoms.
        mae, rmse: None where none was compared.
    """

    n_frames: int
    n_left_out: int
    mae: float | None
    rmse: float | None


def hessian_errors(backbone: Backbone, frames: Sequence[Frame]) -> HessianErrors:
    """Errors of the whole Hessian of every frame that has a label and at most :data:`LARGEST` atoms."""
    labelled = [(frame, frame.hessian) for frame in frames if frame.hessian is not None]
    compared = [(frame, hessian) for frame, hessian in labelled if len(frame) <= LARGEST]
    if not compared:
        return HessianErrors(0, len(labelled), None, None)
    errors = np.concatenate([(predict_hessian(backbone, frame) - hessian).ravel() for frame, hessian in compared])
    return HessianErrors(
        len(compared),
        len(labelled) - len(compared),
        float(np.abs(errors).mean()),
        float(np.sqrt((errors**2).mean())),
    )
