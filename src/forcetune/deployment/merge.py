"""From base and adapter to one plain model of the backbone's own library, proven equal before it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from forcetune.adapters.attach import check_mergeable, merge_weights
from forcetune.backbones.loading import backbone_class
from forcetune.backbones.protocol import Backbone
from forcetune.deployment.loading import deploy
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import Predictions, graphs_of, predict
from forcetune.files import atomic_path
from forcetune.frames.frame import Frame, Origin

PARITY = {"float64": 1e-10, "float32": 1e-4}


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written, and how far it is from base + adapter.

    Attributes:
        path: the plain model.
        n_probes: structures compared.
        energy_difference: largest, relative to the largest interaction energy of the probes.
        forces_difference: largest, relative to the largest force component of the probes.
    """

    path: Path
    n_probes: int
    energy_difference: float
    forces_difference: float


def merge(
    run: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    dtype: str | None = None,
    trust: bool = False,
) -> Merged:
    """Write the fine-tuned model as a plain file that needs no forcetune.

    It is the base's own file with other weights, so that it opens wherever that does, with all its elements and heads;
    where that cannot be done, or another precision is asked for, a new file of the library installed here.

    The file is read back and compared with base + adapter on random structures of all its elements, molecules and
    crystals; it takes its place only when energies, forces and stresses agree.

    Args:
        run: run folder or adapter folder.
        output: file to write, such as ``tuned.model``.
        model: the base, when it is no longer where the run found it.
        dtype: precision of the written model; by default that of the base's file, or else that of the training.
        trust: allow the base's file to run its own code where it cannot be rebuilt without.

    Raises:
        InputError: the method does not merge, or nothing usable at a path.
        ForcetuneError: the written model disagrees; nothing is left at ``output``.
    """
    deployed = deploy(model, run, device="cpu", dtype=dtype, trust=trust, fold=False)
    backbone, config = deployed.backbone, deployed.adapter
    if config is None:
        raise InputError(f"{run}: holds no adapter to merge.")
    check_mergeable(backbone)
    probes = probe_frames(backbone.elements, backbone.cutoff)
    before = predict(backbone, graphs_of(backbone, probes), stress=True)
    merge_weights(backbone)
    with atomic_path(output) as temporary:
        precision = backbone.stored_dtype
        if (dtype is not None and backbone.dtype != precision) or not backbone.save_into_source(temporary):
            backbone.save(temporary)
            precision = backbone.dtype
        again = backbone_class(backbone.library).load(
            temporary, head=backbone.head, elements=backbone.elements, dtype=backbone.dtype
        )
        after = predict(again, graphs_of(again, probes), stress=True)
        energy, forces = _differences(backbone, before, after)
        allowed = PARITY["float64" if {precision, backbone.dtype} == {torch.float64} else "float32"]
        if not max(energy, forces) <= allowed:
            raise ForcetuneError(
                f"{output}: the merged model differs from base + adapter by {max(energy, forces):.1e} (relative, "
                f"allowed {allowed:.0e}); nothing was written. Please report this with the adapter's configuration."
            )
    return Merged(Path(output), len(probes), energy, forces)


def _differences(backbone: Backbone, before: Predictions, after: Predictions) -> tuple[float, float]:
    references = backbone.reference_energies
    ends = np.cumsum(before.atoms)
    offsets = np.array([sum(references[int(z)] for z in part) for part in np.split(before.numbers, ends[:-1])])
    scale = np.abs(before.energy - offsets).max()
    energy = np.abs(after.energy - before.energy).max() / max(scale, 1e-12)
    pairs = [(before.forces, after.forces)]
    if before.stress is not None and after.stress is not None:
        pairs.append((before.stress, after.stress))
    forces = max(np.abs(new - old).max() / max(np.abs(old).max(), 1e-12) for old, new in pairs)
    return float(energy), float(forces)


def probe_frames(elements: tuple[int, ...], cutoff: float, seed: int = 0) -> list[Frame]:
    """Random structures that together hold every element: clusters, crystals, and an isolated atom."""
    rng = np.random.default_rng(seed)
    frames = []
    chosen = rng.permutation(np.repeat(elements, 3))
    for index, numbers in enumerate(np.array_split(chosen, max(2, len(chosen) // 12))):
        box = max(cutoff, 2.2 * len(numbers) ** (1 / 3))
        positions = _apart(rng, len(numbers), box)
        periodic = index % 2 == 1
        cell = box * (np.eye(3) + 0.1 * rng.standard_normal((3, 3))) if periodic else np.zeros((3, 3))
        frames.append(_frame(numbers, positions @ (cell / box) if periodic else positions, cell, periodic))
    frames.append(_frame(chosen[:1], np.zeros((1, 3)), np.zeros((3, 3)), periodic=False))
    return frames


def _apart(rng: np.random.Generator, count: int, box: float, nearest: float = 1.0) -> np.ndarray:
    """(count, 3) positions in a cube, no two nearer than ``nearest`` Å, images in a periodic cube included."""
    positions: list[np.ndarray] = []
    while len(positions) < count:
        trial = rng.uniform(0, box, 3)
        vectors = np.array(positions).reshape(-1, 3) - trial
        vectors -= box * np.round(vectors / box)
        if not positions or np.linalg.norm(vectors, axis=1).min() > nearest:
            positions.append(trial)
    return np.array(positions)


def _frame(numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, periodic: bool) -> Frame:
    return Frame(
        numbers=np.asarray(numbers, dtype=np.int64),
        positions=positions,
        cell=cell,
        pbc=np.full(3, periodic),
        energy=None,
        forces=None,
        stress=None,
        origin=Origin("<probe>", 0),
    )
