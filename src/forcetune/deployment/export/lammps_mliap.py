"""LAMMPS by its ML-IAP package, with our own network: MACE, SevenNet and NequIP, gates included."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from forcetune.adapters.attach import fold_weights
from forcetune.backbones.network import NetworkBackbone
from forcetune.deployment.export.target import Job, Parity, Target
from forcetune.deployment.mliap.stand_in import LammpsResult, Unified, run_lammps
from forcetune.deployment.mliap.unified import UnifiedPotential
from forcetune.deployment.parity import PARITY, probe_frames, relative_differences
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from forcetune.frames.frame import Frame

TORCH_SUFFIXES = (".pt", ".pth")
"""Of files that LAMMPS opens by torch.load; it opens all others by pickle.load."""

HALVES = (0.5,)
"""Where two ranks meet: probes are computed by one rank and by two."""


def write(job: Job, path: Path) -> Parity:
    """Write the potential, read it back, and let the stand-in for LAMMPS compute the probes with it.

    Raises:
        InputError: the backbone is not computed by a network of ours, or has a magnetic layer.
        ForcetuneError: what LAMMPS would get differs from base + adapter.
    """
    backbone = job.backbone
    if not isinstance(backbone, NetworkBackbone):
        raise InputError(
            f"{job.run}: its base is computed by the library itself (--trust), whose layers LAMMPS cannot exchange "
            "features between; use forcetune.calculator, or a base that forcetune computes."
        )
    probes = probe_frames(backbone.elements, backbone.cutoff)
    before = predict(backbone, build_graphs(backbone, probes), stress=True)
    if job.adapted:
        # what merges costs nothing afterwards; gates stay
        fold_weights(backbone)
    with path.open("wb") as stream:
        potential = UnifiedPotential(backbone)
        if job.output.suffix in TORCH_SUFFIXES:
            torch.save(potential, stream)
        else:
            pickle.dump(potential, stream)
    parity = Parity(len(probes), 0.0, 0.0, "a stand-in for LAMMPS, one rank and two, not by LAMMPS itself")
    allowed = PARITY[str(backbone.dtype).removeprefix("torch.")]
    for bounds in ((), HALVES):
        after = predictions_in_lammps(before, probes, lambda: read_back(path, job.output.suffix), bounds)
        energy, forces = relative_differences(before, after, backbone.reference_energies, backbone.reference_energies)
        parity = replace(parity, energy=max(parity.energy, energy), forces=max(parity.forces, forces))
    if not max(parity.energy, parity.forces) <= allowed:
        raise ForcetuneError(
            f"{job.output}: in LAMMPS the potential would differ from base + adapter by "
            f"{max(parity.energy, parity.forces):.1e} (relative, allowed {allowed:.0e}); nothing was written. Please "
            "report this with the adapter's configuration."
        )
    return parity


def read_back(path: Path, suffix: str) -> UnifiedPotential:
    """The potential in a file, opened as LAMMPS opens files of this suffix."""
    if suffix in TORCH_SUFFIXES:
        return torch.load(path, weights_only=False)
    with path.open("rb") as stream:
        return pickle.load(stream)


def predictions_in_lammps(
    before: Predictions, probes: Sequence[Frame], load: Callable[[], Unified], bounds: Sequence[float] = ()
) -> Predictions:
    """The predictions of the same probes by LAMMPS's stand-in; stresses of those with a volume.

    Args:
        before: of a calculator; what is not computed here is taken from it.
        probes: structures.
        load: gives the unified object.
        bounds: between ranks (:func:`forcetune.deployment.mliap.stand_in.run_lammps`).
    """
    results = [run_lammps(load, frame, bounds=bounds) for frame in probes]
    assert before.stress is not None
    return replace(
        before,
        energy=np.array([result.energy for result in results]),
        forces=np.concatenate([result.forces for result in results]),
        stress=np.stack([_stress(frame, result) for frame, result in zip(probes, results, strict=True)]),
    )


def _stress(frame: Frame, result: LammpsResult) -> np.ndarray:
    """(3, 3) eV/Å³, ASE's sign, symmetric as that of a calculator; 0 of frames without a volume."""
    if not frame.has_volume:
        return np.zeros((3, 3))
    return -(result.virial + result.virial.T) / 2 / abs(np.linalg.det(frame.cell))


TARGET = Target(
    name="lammps-mliap",
    about=(
        "pair_style mliap unified FILE 0: MACE, SevenNet and NequIP, gates included; LAMMPS of 2025 or later with "
        "KOKKOS, ML-IAP and PYTHON, and forcetune in the Python that it uses"
    ),
    libraries=("mace", "sevennet", "nequip"),
    write=write,
    gates=True,
    suffixes=(".pt", ".pth", ".pkl"),
    alternatives=(),
)
