"""Predictions for a set of frames, and their errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from ase.data import chemical_symbols

from forcetune.backbones.protocol import Backbone
from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray, Frame
from forcetune.graphs.graph import Batch, collate, graph_of

EVALUATION_ATOMS = 512


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors over a set of frames; None where the frames have no such label.

    Energies in meV and meV/atom, forces in meV/Å over all components, stress in meV/Å³ over all components.
    """

    n_frames: int
    energy_mae_mev: float | None = None
    energy_mae_mev_per_atom: float | None = None
    energy_rmse_mev: float | None = None
    energy_rmse_mev_per_atom: float | None = None
    forces_mae_mev_per_ang: float | None = None
    forces_rmse_mev_per_ang: float | None = None
    stress_mae_mev_per_ang3: float | None = None
    stress_rmse_mev_per_ang3: float | None = None

    def to_json(self) -> dict[str, float | int | None]:
        """As printed by ``forcetune evaluate --json``; stress keys only where there are labels."""
        return {k: v for k, v in asdict(self).items() if v is not None or not k.startswith("stress")}


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Predictions and labels of a set of frames, laid one after another; labels are NaN where there are none.

    Attributes:
        numbers: (atoms,) atomic numbers.
        atoms: (frames,) number of atoms.
        energy, energy_label: (frames,), eV.
        forces, forces_label: (atoms, 3), eV/Å.
        stress, stress_label: (frames, 3, 3), eV/Å³; None when not computed.
    """

    numbers: np.ndarray
    atoms: np.ndarray
    energy: FloatArray
    energy_label: FloatArray
    forces: FloatArray
    forces_label: FloatArray
    stress: FloatArray | None
    stress_label: FloatArray | None

    def errors(self) -> Errors:
        """Mean absolute and root mean square errors against the labels there are."""
        energy = self.energy - self.energy_label
        stress = np.full(1, np.nan) if self.stress is None else self.stress - self.stress_label
        mae_e, rmse_e = _mean_errors(energy)
        mae_atom, rmse_atom = _mean_errors(energy / self.atoms)
        mae_f, rmse_f = _mean_errors(self.forces - self.forces_label)
        mae_s, rmse_s = _mean_errors(stress)
        return Errors(len(self.atoms), mae_e, mae_atom, rmse_e, rmse_atom, mae_f, rmse_f, mae_s, rmse_s)


def _mean_errors(difference: FloatArray) -> tuple[float | None, float | None]:
    """MAE and RMSE in thousandths (meV) over the entries that are not NaN."""
    known = difference[~np.isnan(difference)]
    if not known.size:
        return None, None
    return 1e3 * float(np.abs(known).mean()), 1e3 * float(np.sqrt((known**2).mean()))


def check_elements(backbone: Backbone, frames: Sequence[Frame]) -> None:
    """
    Raises:
        InputError: a frame has an element that the model does not know; names file and frame.
    """
    known = set(backbone.elements)
    for frame in frames:
        unknown = sorted({int(z) for z in frame.numbers} - known)
        if unknown:
            names = ", ".join(chemical_symbols[z] for z in unknown)
            knows = ", ".join(chemical_symbols[z] for z in backbone.elements)
            raise InputError(
                f"{frame.origin}: element {names} is unknown to {backbone.base.name} (it knows {knows}); "
                "leave the frame out or choose a model that knows it."
            )


def graphs_of(backbone: Backbone, frames: Sequence[Frame], progress: Callable[[], None] | None = None) -> list[Batch]:
    """The graph of every frame, with the model's cutoff and dtype, on the CPU.

    Raises:
        InputError: an element the model does not know, or a periodic frame without a cell.
    """
    check_elements(backbone, frames)
    graphs = []
    for frame in frames:
        graphs.append(graph_of(frame, backbone.cutoff, backbone.dtype))
        if progress is not None:
            progress()
    return graphs


def predict(backbone: Backbone, graphs: Sequence[Batch], *, stress: bool | None = None) -> Predictions:
    """Predict for graphs, in batches of some hundred atoms.

    Args:
        backbone: the model.
        graphs: as from :func:`graphs_of`.
        stress: whether to compute stresses; by default where there are labels.
    """
    if stress is None:
        stress = any(not bool(torch.isnan(graph.stress).all()) for graph in graphs)
    batches: list[list[Batch]] = []
    atoms = 0
    for graph in graphs:
        if not batches or atoms + graph.n_atoms > EVALUATION_ATOMS:
            batches.append([])
            atoms = 0
        batches[-1].append(graph)
        atoms += graph.n_atoms
    energy, forces, stresses = [], [], []
    for members in batches:
        found = backbone.predict(collate(members).to(device=backbone.device), stress=stress)
        energy.append(found.energy.detach().double().cpu().numpy())
        forces.append(found.forces.detach().double().cpu().numpy())
        if found.stress is not None:
            stresses.append(found.stress.detach().double().cpu().numpy())

    def labels(name: str) -> FloatArray:
        return torch.cat([getattr(graph, name) for graph in graphs]).double().cpu().numpy()

    return Predictions(
        numbers=torch.cat([graph.numbers for graph in graphs]).cpu().numpy(),
        atoms=np.concatenate([graph.atoms_per_graph.cpu().numpy() for graph in graphs]),
        energy=np.concatenate(energy),
        energy_label=labels("energy"),
        forces=np.concatenate(forces),
        forces_label=labels("forces"),
        stress=np.concatenate(stresses) if stresses else None,
        stress_label=labels("stress") if stresses else None,
    )


def evaluate_frames(backbone: Backbone, frames: Sequence[Frame]) -> Predictions:
    """Predict for frames; see :func:`graphs_of` for errors raised."""
    return predict(backbone, graphs_of(backbone, frames))
