"""Descriptors and deviations of structures that are read one after the other and never all in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from rich.console import Console

from forcetune.backbones.protocol import Backbone
from forcetune.config import RunConfig
from forcetune.deployment.calculator import build_frame
from forcetune.evaluation.metrics import build_graphs, evaluation_batches
from forcetune.frames.dataset import read_dataset
from forcetune.frames.frame import FloatArray, Frame, Origin
from forcetune.frames.labels import raw_frame
from forcetune.frames.read import check_structure
from forcetune.frames.sources import file_format
from forcetune.frames.store.chunks import iterate_structures
from forcetune.runs.preparation import counting
from forcetune.uncertainty.file import Uncertainty
from forcetune.uncertainty.last_layer import require_network

AT_ONCE = 128
"""Structures in memory at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class DescribedStructures:
    """Descriptors of structures, and where these stand.

    Attributes:
        descriptors: (structures, n).
        compositions: Hill formulas.
        origins: file and number of each.
        energy_std, forces_std: (structures,) eV/atom and eV/Å, of calibrated runs; 0 otherwise.
    """

    descriptors: FloatArray
    compositions: list[str]
    origins: list[Origin]
    energy_std: FloatArray
    forces_std: FloatArray


def labelled_frames(
    config: RunConfig | None, exclude: Sequence[Path], type_map: Sequence[str], console: Console
) -> Iterator[Frame]:
    """Frames of the run, training and validation, and of further files."""
    if config is not None:
        with counting(console, "labelled frames read") as advance:
            dataset = read_dataset(config.data.model_copy(update={"test": []}), config.magnetism, advance)
        yield from dataset.train.frames
        yield from dataset.valid.frames
    yield from read_structures([(path, file_format(path)) for path in exclude], type_map)


def read_structures(files: Sequence[tuple[Path, str]], type_map: Sequence[str]) -> Iterator[Frame]:
    """The frames of files without labels, one at a time."""
    for path, kind in files:
        for index, atoms in enumerate(iterate_structures(path, kind, type_map)):
            origin = Origin(str(path), index)
            check_structure(raw_frame(atoms, origin))
            yield replace(build_frame(atoms), origin=origin)


def describe_structures(
    backbone: Backbone,
    frames: Iterator[Frame],
    calibration: Uncertainty | None,
    forces: bool,
    label: str,
    console: Console,
) -> DescribedStructures:
    """Descriptors of all frames; of the frames themselves no more than :data:`AT_ONCE` are in memory.

    Args:
        backbone: the model.
        frames: read one after the other.
        calibration: for standard deviations; None for none.
        forces: whether those of forces are wanted, too.
        label: of the progress bar.
        console: for progress.
    """
    parts: list[tuple[FloatArray, FloatArray, FloatArray]] = []
    compositions: list[str] = []
    origins: list[Origin] = []
    with counting(console, label) as advance:
        while block := list(islice(frames, AT_ONCE)):
            parts.extend(_describe_frames(backbone, block, calibration, forces))
            compositions.extend(_formula(frame) for frame in block)
            origins.extend(frame.origin for frame in block)
            advance(len(block))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    if not columns:
        size = _descriptor_size(backbone)
        return DescribedStructures(np.zeros((0, size)), [], [], np.zeros(0), np.zeros(0))
    return DescribedStructures(columns[0], compositions, origins, columns[1], columns[2])


def _describe_frames(
    backbone: Backbone, frames: Sequence[Frame], calibration: Uncertainty | None, forces: bool
) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
    """Of each batch: descriptors (structures, n), standard deviations of energies per atom and of forces."""
    network, posterior = require_network(backbone), None if calibration is None else calibration.posterior
    whitening = None if posterior is None else posterior.whitening
    directions = torch.from_numpy(whitening) if whitening is not None and forces else None
    for batch in evaluation_batches(build_graphs(backbone, frames)):
        features = network.readout_features(network.place(batch), directions)
        atom_features, frame_index = features.atoms.cpu().numpy(), batch.graph_index.numpy()
        counts = batch.atoms_per_graph.numpy()
        mean = _sum_groups(atom_features, frame_index, len(counts)) / counts[:, None]
        squares = (atom_features - mean[frame_index]) ** 2
        spread = np.sqrt(_sum_groups(squares, frame_index, len(counts)) / counts[:, None])
        one_hot = (batch.numbers.numpy()[:, None] == np.array(backbone.elements)).astype(np.float64)
        composition = _sum_groups(one_hot, frame_index, len(counts)) / counts[:, None]
        energy_std = forces_std = np.zeros(len(counts))
        if calibration is not None and whitening is not None:
            graph_features = features.graphs.cpu().numpy()
            scale = calibration.scale("energy_per_atom") or 1.0
            energy_std = scale * np.linalg.norm(graph_features @ whitening.T, axis=1) / counts
            if features.gradients is not None:
                deviations = np.linalg.norm(features.gradients.cpu().numpy(), axis=0).max(axis=1)
                forces_std = np.zeros(len(counts))
                np.maximum.at(forces_std, frame_index, deviations * (calibration.scale("forces") or 1.0))
        yield np.concatenate([mean, spread, composition], axis=1), energy_std, forces_std


def _sum_groups(values: FloatArray, groups: np.ndarray, count: int) -> FloatArray:
    """(count, n) sums of rows by their group."""
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, groups, values)
    return sums


def _descriptor_size(backbone: Backbone) -> int:
    """How many numbers describe a structure."""
    atom = Atoms([chemical_symbols[backbone.elements[0]]], positions=[(0.0, 0.0, 0.0)])
    return next(_describe_frames(backbone, [build_frame(atom)], None, False))[0].shape[1]


def _formula(frame: Frame) -> str:
    return Atoms(frame.numbers).get_chemical_formula("hill")
