"""Hessians of a model by central differences of its forces, and their errors against labels.

(F(x + h z) − F(x − h z)) / 2h = −H z − h²/6 ∂⁴E z³ − …: even orders cancel. Every coordinate moves by h (root mean
square), so that the truncation error is that of one bond whatever the number of atoms.

Errors of H z with ``mini`` and frames of the demo's molecule, where entries reach 138 eV/Å²
(``benchmarks/hessian_step.py``): in float64 they grow as h² and are at most 7e-7 eV/Å² at 1e-5 Å; in float32 they are
least at 1e-3 Å, at most 0.008 (0.015 at 3e-4 Å, where the rounding of forces counts, and 0.06 at 3e-3 Å). Where a
potential is not smooth within the step they are larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from forcetune.backbones.protocol import Backbone
from forcetune.evaluation.metrics import EVALUATION_ATOMS, Errors
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


def with_hessians(errors: Errors, hessians: HessianErrors) -> Errors:
    """The same with those of Hessians, where some were compared."""
    if not hessians.n_frames:
        return errors
    return replace(
        errors,
        hessian_mae_ev_per_ang2=hessians.mae,
        hessian_rmse_ev_per_ang2=hessians.rmse,
        hessian_frames=hessians.n_frames,
    )
