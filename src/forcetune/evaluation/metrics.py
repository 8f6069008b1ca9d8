"""Predictions for a set of frames, and their errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from ase.data import chemical_symbols

from forcetune.backbones.protocol import Backbone, Prediction
from forcetune.errors import InputError, warn
from forcetune.frames.frame import FloatArray, Frame
from forcetune.frames.store.stored_frames import StoredFrames, list_elements
from forcetune.graphs.graph import Batch, build_graph, collate, moment_labels
from forcetune.graphs.loader import BatchLoader
from forcetune.graphs.stored_graphs import any_label, measure_graphs, stored_graphs

EVALUATION_ATOMS = 512


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors over a set of frames; None where the frames have no such label.

    Energies in meV and meV/atom, forces in meV/Å over all components, stress in meV/Å³ over all components, moments in
    μB over all components (over magnitudes, where only these are predicted), Hessians in eV/Å² over all entries.
    Magnetic forces −∂E/∂s in meV over all components, for each unit of the state s that the layer is given: μB, or a
    radian where it is given directions; then only what turns them counts.

    Attributes:
        hessian_frames: frames whose Hessians were compared, by `evaluate` and after a fit.
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
    moment_mae_mub: float | None = None
    moment_rmse_mub: float | None = None
    magforce_mae_mev: float | None = None
    magforce_rmse_mev: float | None = None
    hessian_mae_ev_per_ang2: float | None = None
    hessian_rmse_ev_per_ang2: float | None = None
    hessian_frames: int | None = None

    def to_json(self) -> dict[str, float | int | None]:
        """As printed by ``forcetune evaluate --json``; keys of what few frames have only where it was compared."""
        optional = ("stress", "moment", "magforce", "hessian")
        return {k: v for k, v in asdict(self).items() if v is not None or not k.startswith(optional)}


COMPARED = (
    ("energies", "energy_mae_mev_per_atom", "meV/atom"),
    ("forces", "forces_mae_mev_per_ang", "meV/Å"),
    ("stress", "stress_mae_mev_per_ang3", "meV/Å³"),
    ("moments", "moment_mae_mub", "μB"),
    ("magnetic forces", "magforce_mae_mev", "meV/μB or meV/rad"),
)
GREW = 1.02
"""Errors that grew by less are noise of a few frames."""


def list_worse_errors(before: Errors, after: Errors) -> list[str]:
    """Mean absolute errors that are larger after than before, one text each ("forces 39.4 → 51.2 meV/Å").

    Errors that are not finite count as larger.
    """
    worse = []
    for label, key, unit in COMPARED:
        one, other = getattr(before, key), getattr(after, key)
        if one is not None and other is not None and not other <= GREW * one:
            worse.append(f"{label} {one:.4g} → {other:.4g} {unit}")
    return worse


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Predictions and labels of a set of frames, laid one after another; labels are NaN where there are none.

    Attributes:
        numbers: (atoms,) atomic numbers.
        atoms: (frames,) number of atoms.
        energy, energy_label: (frames,), eV.
        forces, forces_label: (atoms, 3), eV/Å.
        stress, stress_label: (frames, 3, 3), eV/Å³; None when not computed.
        moments, moments_label: (atoms, 3), or (atoms, 1) for magnitudes, μB; None when not computed.
        magforces, magforces_label: (atoms, 3), eV per unit of the state; None when not computed.
    """

    numbers: np.ndarray
    atoms: np.ndarray
    energy: FloatArray
    energy_label: FloatArray
    forces: FloatArray
    forces_label: FloatArray
    stress: FloatArray | None
    stress_label: FloatArray | None
    moments: FloatArray | None = None
    moments_label: FloatArray | None = None
    magforces: FloatArray | None = None
    magforces_label: FloatArray | None = None

    @staticmethod
    def of(batch: Batch, prediction: Prediction) -> Predictions:
        """Of one batch on the CPU."""
        stress, moments, fields = prediction.stress, prediction.moments, prediction.fields
        labels = None if moments is None else moment_labels(moments, batch.moments)
        return Predictions(
            numbers=batch.numbers.numpy(),
            atoms=batch.atoms_per_graph.numpy(),
            energy=prediction.energy.double().numpy(),
            energy_label=batch.energy.numpy(),
            forces=prediction.forces.double().numpy(),
            forces_label=batch.forces.double().numpy(),
            stress=None if stress is None else stress.double().numpy(),
            stress_label=None if stress is None else batch.stress.double().numpy(),
            moments=None if moments is None else moments.double().numpy(),
            moments_label=None if labels is None else labels.double().numpy(),
            magforces=None if fields is None else fields.double().numpy(),
            magforces_label=None if fields is None else batch.magforces.double().numpy(),
        )

    def shifted(self, shift: Mapping[int, float]) -> Predictions:
        """With energies moved by the shift of each element's reference energy, eV."""
        table = np.zeros(len(chemical_symbols))
        table[list(shift)] = list(shift.values())
        frame = np.repeat(np.arange(len(self.atoms)), self.atoms)
        return replace(self, energy=self.energy + np.bincount(frame, table[self.numbers], len(self.atoms)))

    def errors(self) -> Errors:
        """Mean absolute and root mean square errors against the labels there are."""
        mae_e, rmse_e = _mean_errors(self.energy, self.energy_label)
        mae_atom, rmse_atom = _mean_errors(self.energy / self.atoms, self.energy_label / self.atoms)
        mae_f, rmse_f = _mean_errors(self.forces, self.forces_label)
        mae_s = rmse_s = None
        if self.stress is not None and self.stress_label is not None:
            mae_s, rmse_s = _mean_errors(self.stress, self.stress_label)
        mae_m = rmse_m = None
        if self.moments is not None and self.moments_label is not None:
            mae_m, rmse_m = (
                None if value is None else value / 1000 for value in _mean_errors(self.moments, self.moments_label)
            )
        mae_b = rmse_b = None
        if self.magforces is not None and self.magforces_label is not None:
            mae_b, rmse_b = _mean_errors(self.magforces, self.magforces_label)
        means = (mae_e, mae_atom, rmse_e, rmse_atom, mae_f, rmse_f, mae_s, rmse_s, mae_m, rmse_m, mae_b, rmse_b)
        return Errors(len(self.atoms), *means)


def _mean_errors(predicted: FloatArray, label: FloatArray) -> tuple[float | None, float | None]:
    """MAE and RMSE in thousandths (meV) over the entries that have a label."""
    known = ~np.isnan(label)
    if not known.any():
        return None, None
    difference = predicted[known] - label[known]
    return 1e3 * float(np.abs(difference).mean()), 1e3 * float(np.sqrt((difference**2).mean()))


class Tally:
    """Errors of frames that come batch after batch and are not kept.

    Attributes:
        n_frames: counted so far.
        sums: of energies, energies per atom, forces, stresses, moments, magnetic forces (rows): entries, |error|,
            error².
    """

    def __init__(self) -> None:
        self.n_frames = 0
        self.sums = np.zeros((6, 3))

    def add(self, predictions: Predictions) -> None:
        """Count frames with what was predicted for them."""
        pairs = (
            (predictions.energy, predictions.energy_label),
            (predictions.energy / predictions.atoms, predictions.energy_label / predictions.atoms),
            (predictions.forces, predictions.forces_label),
            (predictions.stress, predictions.stress_label),
            (predictions.moments, predictions.moments_label),
            (predictions.magforces, predictions.magforces_label),
        )
        for row, (predicted, label) in zip(self.sums, pairs, strict=True):
            if predicted is None or label is None:
                continue
            known = ~np.isnan(label)
            difference = predicted[known] - label[known]
            row += known.sum(), np.abs(difference).sum(), (difference**2).sum()
        self.n_frames += len(predictions.atoms)

    def merge(self, other: Tally) -> None:
        """Count what another has counted."""
        self.n_frames += other.n_frames
        self.sums += other.sums

    def errors(self) -> Errors:
        """As :meth:`Predictions.errors` of all frames together."""
        means = [
            (1e3 * float(absolute / count), 1e3 * float(np.sqrt(square / count))) if count else (None, None)
            for count, absolute, square in self.sums
        ]
        (mae_e, rmse_e), (mae_atom, rmse_atom), (mae_f, rmse_f), (mae_s, rmse_s), moments, (mae_b, rmse_b) = means
        mae_m, rmse_m = (None if value is None else value / 1000 for value in moments)
        by_field = (mae_e, mae_atom, rmse_e, rmse_atom, mae_f, rmse_f, mae_s, rmse_s, mae_m, rmse_m, mae_b, rmse_b)
        return Errors(self.n_frames, *by_field)


def check_elements(backbone: Backbone, frames: Sequence[Frame]) -> None:
    """
    Raises:
        InputError: a frame has an element that the model does not know; names file and frame.
    """
    known = set(backbone.elements)
    if known.issuperset(list_elements(frames)):
        return
    for frame in frames:
        unknown = sorted({int(z) for z in frame.numbers} - known)
        if unknown:
            names = ", ".join(chemical_symbols[z] for z in unknown)
            knows = ", ".join(chemical_symbols[z] for z in backbone.elements)
            raise InputError(
                f"{frame.origin}: element {names} is unknown to {backbone.base.name} (it knows {knows}); "
                "leave the frame out or choose a model that knows it."
            )


def build_graphs(
    backbone: Backbone, frames: Sequence[Frame], progress: Callable[[int], None] | None = None, workers: int = 0
) -> Sequence[Batch]:
    """The graph of every frame, with the model's cutoff and dtype, on the CPU; on disk where the frames are.

    Args:
        backbone: the model.
        frames: structures.
        progress: called with the number of frames done.
        workers: processes that search neighbours in frames on disk.

    Raises:
        InputError: an element the model does not know, or a periodic frame without a cell.
    """
    check_elements(backbone, frames)
    _warn_of_stress_without_cell(frames)
    if isinstance(frames, StoredFrames):
        return stored_graphs(frames, backbone.cutoff, backbone.dtype, workers=workers, progress=progress)
    graphs = []
    for frame in frames:
        graphs.append(build_graph(frame, backbone.cutoff, backbone.dtype))
        if progress is not None:
            progress(1)
    return graphs


def _warn_of_stress_without_cell(frames: Sequence[Frame]) -> None:
    if isinstance(frames, StoredFrames):
        unused = np.flatnonzero(frames.stress_without_cell)
    else:
        unused = [k for k, frame in enumerate(frames) if frame.stress is not None and not frame.has_volume]
    if len(unused):
        warn(
            f"{frames[int(unused[0])].origin}: has a stress but no cell that it could belong to ({len(unused)} of "
            f"{len(frames)} frames); the stress does not count there."
        )


def predict(
    backbone: Backbone,
    graphs: Sequence[Batch],
    *,
    stress: bool | None = None,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Predict for graphs, in batches of some hundred atoms.

    Args:
        backbone: the model.
        graphs: as from :func:`build_graphs`.
        stress: whether to compute stresses; by default where there are labels.
        progress: called with the number of frames done after each batch.
    """
    if stress is None:
        stress = any_label(graphs, "stress")
    pairs: list[tuple[Batch, Prediction]] = []
    for batch in evaluation_batches(graphs):
        prediction = backbone.predict(backbone.place(batch), stress=stress)
        pairs.append((batch, prediction.detached()))
        if progress is not None:
            progress(batch.n_graphs)
    return Predictions.of(*gather(pairs))


def evaluation_batches(
    graphs: Sequence[Batch], device: torch.device | str = "cpu", atoms: int = EVALUATION_ATOMS
) -> BatchLoader:
    """Graphs in order, in batches of some hundred atoms."""
    budget = max(atoms, int(measure_graphs(graphs)[:, 0].max(initial=0)))
    return BatchLoader(graphs, len(graphs), batch_atoms=budget, device=device)


def gather(pairs: Sequence[tuple[Batch, Prediction]]) -> tuple[Batch, Prediction]:
    """Batches and their predictions, laid one after another on the CPU."""
    stresses = [prediction.stress.cpu() for _, prediction in pairs if prediction.stress is not None]
    moments = [prediction.moments.cpu() for _, prediction in pairs if prediction.moments is not None]
    fields = [prediction.fields.cpu() for _, prediction in pairs if prediction.fields is not None]
    prediction = Prediction(
        torch.cat([prediction.energy.cpu() for _, prediction in pairs]),
        torch.cat([prediction.forces.cpu() for _, prediction in pairs]),
        torch.cat(stresses) if stresses else None,
        torch.cat(moments) if moments else None,
        torch.cat(fields) if fields else None,
    )
    return collate([batch.to(device="cpu") for batch, _ in pairs]), prediction


def check_finite(predictions: Predictions, frames: Sequence[Frame]) -> None:
    """
    Raises:
        InputError: the model gives no number for a frame, as for atoms on top of each other; names file and frame.
    """
    index = np.repeat(np.arange(len(frames)), predictions.atoms)
    bad = ~np.isfinite(predictions.energy)
    bad[index[~np.isfinite(predictions.forces).all(axis=1)]] = True
    if bad.any():
        frame = frames[int(np.argmax(bad))]
        raise InputError(
            f"{frame.origin}: the model's energy or forces are not finite; look for atoms on top of each other."
        )


def evaluate_frames(backbone: Backbone, frames: Sequence[Frame]) -> Predictions:
    """Predict for frames.

    Raises:
        InputError: as :func:`build_graphs` and :func:`check_finite`.
    """
    predictions = predict(backbone, build_graphs(backbone, frames))
    check_finite(predictions, frames)
    return predictions
