"""The potential in ASE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from forcetune.adapters.attach import get_adapter
from forcetune.adapters.config import AdapterConfig
from forcetune.backbones.protocol import Backbone
from forcetune.config import as_word
from forcetune.deployment.compiled_prediction import CompiledPrediction
from forcetune.deployment.ensemble import Ensemble, load_ensemble, spread
from forcetune.deployment.loading import adapter_folder, check_head, deploy
from forcetune.deployment.moving_batch import MovingBatch
from forcetune.errors import InputError, warn
from forcetune.evaluation.metrics import check_elements
from forcetune.frames.frame import FloatArray, Frame, Origin
from forcetune.frames.spins import directions
from forcetune.graphs.graph import Batch, graph_with
from forcetune.graphs.skin_list import SKIN, SkinList
from forcetune.magnetism.options import Magnetism
from forcetune.uncertainty.file import Uncertainty, load_uncertainty
from forcetune.uncertainty.last_layer import compute_deviations, require_network

SMALLEST_VOLUME = 1e-6
"""Å³; a cell below it has no volume, and its structure no stress."""


class ForcetuneCalculator(Calculator):
    """ASE calculator of a backbone with or without an adapter.

    Energy in eV (``energies`` of the atoms, which add up to it, too), forces in eV/Å, stress in eV/Å³ (ASE's sign and
    Voigt order, per volume of the whole cell; systems that are periodic in some direction and have a cell with volume).

    With a spin layer the magnetic state is that of ``atoms.get_initial_magnetic_moments()``, μB, (atoms, 3) or (atoms,)
    along z; of an adapter that was trained on directions or unit vectors their length does not matter. ``magmoms`` are
    the predicted moments, (atoms, 3) or (atoms,) magnitudes, μB, and ``results["effective_field"]`` is −∂E/∂s,
    (atoms, 3), eV per unit of the state that the layer is given (see ``magnetism.inputs``).
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012 (as ASE declares it)

    def __init__(
        self,
        backbone: Backbone,
        magnetism: Magnetism | None = None,
        *,
        compile: Literal["auto", "off"] = "auto",
        uncertainty: Uncertainty | None = None,
        forces_std: bool = True,
        neighbors: Literal["auto", "cpu", "device"] = "auto",
    ) -> None:
        """
        Args:
            backbone: with or without an adapter.
            magnetism: of an adapter that is not attached all the time.
            compile: ``auto`` records the operations where the same atoms come again and again, as in dynamics.
            uncertainty: calibration of the run, for ``energy_std`` and ``forces_std`` among the results.
            forces_std: whether the latter is computed, too; it takes a backward pass for each feature.
            neighbors: where neighbors are searched: on the ``cpu``, on the model's ``device``, or ``auto``, the device
                where that is not the CPU.

        Raises:
            InputError: ``compile`` or ``neighbors`` is something else.
        """
        super().__init__()
        compile = as_word(compile)
        if compile not in ("auto", "off"):
            raise InputError(f"compile={compile!r}: a calculator's is 'auto' or 'off'.")
        self.backbone = backbone
        self.compile = compile
        self._charge_ignored = False
        self.neighbors = _place_of_search(neighbors)
        self._neighbors = SkinList(backbone.cutoff)
        self._moving: MovingBatch | None = None
        self.compiled = CompiledPrediction(backbone, wanted=compile == "auto")
        self.uncertainty, self.forces_std = uncertainty, forces_std
        if uncertainty is not None and uncertainty.posterior is not None:
            require_network(backbone)
            self._whitening = torch.from_numpy(uncertainty.posterior.whitening)
        adapter = get_adapter(backbone)
        self.magnetism = magnetism if adapter is None else adapter.method.magnetism
        if self.magnetism is not None:
            self.implemented_properties = [*self.implemented_properties, "magmoms"]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """
        Raises:
            InputError: no atoms, atoms at one place or at none, an element the model does not know, or periodic
                without a cell.
        """
        super().calculate(atoms, list(properties), list(system_changes))
        current = self.atoms
        assert current is not None
        self.results = {}
        _check_places(current)
        self._check_charge(current)
        frame = build_frame(current)
        if self.magnetism is not None:
            frame = replace(frame, spins=read_spins(current, self.magnetism))
        check_elements(self.backbone, [frame])
        # as in the labels of slabs and wires: per volume of the whole cell, vacuum included
        stress = bool(current.pbc.any()) and abs(float(np.linalg.det(current.cell.array))) > SMALLEST_VOLUME
        self.results = self._results(self._batch(frame), stress)

    @property
    def _on_device(self) -> bool:
        """Whether neighbors are searched where the model is."""
        return self.neighbors == "device" or (self.neighbors == "auto" and self.backbone.device.type != "cpu")

    def _batch(self, frame: Frame) -> Batch:
        """The frame with its neighbors, where the model is.

        Raises:
            InputError: atoms at one place, or periodic without a cell.
        """
        if self._on_device:
            return self._moving_batch().frame_batch(frame)
        if self._neighbors.cutoff != self.backbone.cutoff:
            self._neighbors = SkinList(self.backbone.cutoff)
        edges = self._neighbors.edges(frame)
        return graph_with(frame, *edges, self.backbone.dtype).to(device=self.backbone.device)

    def _moving_batch(self) -> MovingBatch:
        if self._moving is None or not self._moving.serves(self.backbone):
            self._moving = MovingBatch(self.backbone, skin=SKIN, compile=False)
        return self._moving

    def _check_charge(self, atoms: Atoms) -> None:
        """Warn once that a charge makes no difference."""
        charge = atoms.info.get("charge", float(atoms.get_initial_charges().sum()))
        charged = isinstance(charge, int | float | np.number) and abs(float(charge)) > 1e-6
        if charged and not self._charge_ignored:
            self._charge_ignored = True
            warn(f"The atoms have a charge of {float(charge):+g}, which the model ignores.")

    def _results(self, batch: Batch, stress: bool) -> dict[str, Any]:
        spins = self.magnetism is not None and self.magnetism.layer == "spin"
        if self._on_device:
            (prediction,) = self._moving_batch().predict(batch, stress=stress)
        elif spins:
            prediction = self.backbone.predict(batch, stress=stress).detached()
        else:
            if self.compiled.backbone is not self.backbone:
                self.compiled = CompiledPrediction(self.backbone, wanted=self.compile == "auto")
            prediction = self.compiled.predict(batch, stress=stress)
        energy = float(prediction.energy)
        results: dict[str, Any] = {"energy": energy, "free_energy": energy}
        results["forces"] = prediction.forces.double().cpu().numpy()
        if prediction.stress is not None:
            tensor = prediction.stress[0].double().cpu().numpy()
            results["stress"] = tensor[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        if prediction.energies is not None:
            results["energies"] = prediction.energies.double().cpu().numpy()
        if prediction.moments is not None:
            moments = prediction.moments.double().cpu().numpy()
            results["magmoms"] = moments[:, 0] if moments.shape[1] == 1 else moments
        if prediction.fields is not None:
            results["effective_field"] = prediction.fields.double().cpu().numpy()
        if self.uncertainty is not None and self.uncertainty.posterior is not None:
            results |= self._deviations(batch, self.uncertainty)
        return results

    def _deviations(self, batch: Batch, uncertainty: Uncertainty) -> dict[str, Any]:
        """Calibrated standard deviations of what has been calibrated."""
        scales = {name: uncertainty.scale(name) for name in ("energy_per_atom", "forces")}
        wants_forces = self.forces_std and scales["forces"] is not None
        energy, forces = compute_deviations(self.backbone, batch, self._whitening, forces=wants_forces)
        results: dict[str, Any] = {}
        if scales["energy_per_atom"] is not None:
            results["energy_std"] = float(energy[0]) * scales["energy_per_atom"]
        if forces is not None and scales["forces"] is not None:
            results["forces_std"] = forces * scales["forces"]
        return results


class EnsembleCalculator(ForcetuneCalculator):
    """ASE calculator of several adapters on one base: means, and standard deviations beside them.

    ``results`` also has ``energy_std`` (eV) and ``forces_std`` (atoms, 3), eV/Å; see :func:`spread`. With a calibration
    of the ensemble they are multiplied by its scales.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        uncertainty: Uncertainty | None = None,
        *,
        neighbors: Literal["auto", "cpu", "device"] = "auto",
    ) -> None:
        # members take turns with their weights
        super().__init__(
            ensemble.backbone, ensemble.magnetism, compile="off", uncertainty=uncertainty, neighbors=neighbors
        )
        self.ensemble = ensemble

    def _results(self, batch: Batch, stress: bool) -> dict[str, Any]:
        members = []
        for index in range(len(self.ensemble.members)):
            with self.ensemble.member(index):
                members.append(super()._results(batch, stress))
        results: dict[str, Any] = {name: np.mean([one[name] for one in members], axis=0) for name in members[0]}
        results |= {name: float(results[name]) for name in ("energy", "free_energy")}
        results["energy_std"] = float(spread([np.asarray(one["energy"]) for one in members]))
        results["forces_std"] = spread([one["forces"] for one in members])
        if self.uncertainty is not None:
            for name, quantity in (("energy_std", "energy_per_atom"), ("forces_std", "forces")):
                results[name] = results[name] * (self.uncertainty.scale(quantity) or 1.0)
        return results


def _check_places(atoms: Atoms) -> None:
    """
    Raises:
        InputError: there are no atoms, or a position or the cell is not finite.
    """
    if len(atoms) == 0:
        raise InputError("The structure has no atoms; give it at least one.")
    if not np.isfinite(atoms.positions).all():
        atom = int(np.argmax(~np.isfinite(atoms.positions).all(axis=1)))
        raise InputError(
            f"The position of atom {atom} ({atoms.symbols[atom]}) is not finite; in dynamics the steps before were too "
            "large, take smaller ones."
        )
    if not np.isfinite(atoms.cell.array).all():
        raise InputError("The cell of the structure is not finite; set it again.")


def read_spins(atoms: Atoms, magnetism: Magnetism) -> FloatArray:
    """(atoms, 3) the state that a magnetic layer is given for the initial magnetic moments of ``atoms``."""
    moments = np.asarray(atoms.get_initial_magnetic_moments(), dtype=np.float64)
    if moments.ndim == 1:
        moments = moments[:, None] * np.array([0.0, 0.0, 1.0])
    return directions(moments) if magnetism.takes_directions else moments


def build_frame(atoms: Atoms) -> Frame:
    """The structure of ``atoms`` without labels."""
    return Frame(
        numbers=np.asarray(atoms.numbers, dtype=np.int64),
        positions=np.asarray(atoms.positions, dtype=np.float64),
        cell=np.asarray(atoms.cell.array, dtype=np.float64),
        pbc=np.asarray(atoms.pbc, dtype=np.bool_),
        energy=None,
        forces=None,
        stress=None,
        origin=Origin("<atoms>", 0),
    )


def calculator(
    model: str | Path | Backbone | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    *,
    head: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    trust: bool = False,
    compile: Literal["auto", "off"] = "auto",
    uncertainty: bool | Literal["energy"] = False,
    neighbors: Literal["auto", "cpu", "device"] = "auto",
) -> ForcetuneCalculator:
    """An ASE calculator.

    ``calculator("mace-off23-medium")`` is the foundation model, ``calculator("mace-off23-medium",
    adapter="run/adapter")`` the fine-tuned one; ``calculator("run")`` finds both in a run folder.

    Args:
        model: name, path, run folder, ``hub:owner/name`` or loaded backbone.
        adapter: adapter folder, run folder or ``hub:owner/name``; several make an ensemble
            (:class:`EnsembleCalculator`), to which a run folder given as ``model`` belongs, too.
        head: head of a multi-head model without an adapter.
        device: ``cpu``, ``cuda`` … or ``auto``.
        dtype: ``float64`` or ``float32``; by default that of the training, or float64.
        trust: allow a model file to run its own code where it cannot be rebuilt without.
        compile: ``auto`` records the operations of a prediction when the same atoms come again and again, as in
            dynamics, which makes small systems faster; ``off`` never does. It has no effect on ensembles.
        uncertainty: of a calibrated run (``forcetune calibrate``): ``True`` adds calibrated standard deviations to the
            results, ``energy_std`` (eV) and ``forces_std`` (atoms, 3), eV/Å; ``"energy"`` only the first, which costs
            a forward pass, where the second takes a backward pass for each feature of the last layer. An
            ensemble with a calibration (``forcetune calibrate RUN --ensemble …``) has its spread multiplied by it.
        neighbors: where neighbors are searched: on the ``cpu``, on the model's ``device`` (by tensor operations, so
            that positions need not be copied back from a GPU), or ``auto``, the device where that is not the CPU.

    Raises:
        InputError: nothing usable at a path, the adapter belongs to another base, its method is not equivariant,
            ``compile`` or ``neighbors`` is something else, or the run is not calibrated.
    """
    if uncertainty not in (True, False, "energy"):
        raise InputError(f"uncertainty={uncertainty!r}: a calculator's is True, False or 'energy'.")
    neighbors = _place_of_search(neighbors)
    if adapter is not None and not isinstance(adapter, (str, Path)):
        return _ensemble(
            model,
            adapter,
            head=head,
            device=device,
            dtype=dtype,
            trust=trust,
            calibrated=bool(uncertainty),
            neighbors=neighbors,
        )
    deployed = deploy(model, adapter, head=head, device=device, dtype=dtype, trust=trust)
    if deployed.adapter is not None:
        _check_equivariant(deployed.adapter, adapter or model)
    for parameter in deployed.backbone.model.parameters():
        if isinstance(model, (str, Path)) or model is None:
            parameter.requires_grad_(False)
    calibration = _read_calibration(adapter or model) if uncertainty else None
    return ForcetuneCalculator(
        deployed.backbone,
        compile=compile,
        uncertainty=calibration,
        forces_std=uncertainty is True,
        neighbors=neighbors,
    )


def _place_of_search(neighbors: str) -> Literal["auto", "cpu", "device"]:
    """
    Raises:
        InputError: it is no place.
    """
    if neighbors not in ("auto", "cpu", "device"):
        raise InputError(f"neighbors={neighbors!r}: are searched on the 'cpu', on the 'device', or 'auto'.")
    return neighbors


def _read_calibration(place: str | Path | Backbone | None) -> Uncertainty:
    """The calibration of a run.

    Raises:
        InputError: there is none.
    """
    folder = None if place is None or isinstance(place, Backbone) else adapter_folder(place)
    if folder is None:
        raise InputError("uncertainty: only a run has a calibration; name the folder of a run that was calibrated.")
    return load_uncertainty(folder.parent, [folder])


def _ensemble(
    model: str | Path | Backbone | None,
    adapters: Sequence[str | Path],
    *,
    head: str | None,
    device: str,
    dtype: str | None,
    trust: bool,
    calibrated: bool,
    neighbors: Literal["auto", "cpu", "device"],
) -> EnsembleCalculator:
    paths, base = list(adapters), model
    if isinstance(model, (str, Path)) and adapter_folder(model) is not None:
        paths, base = [model, *adapters], None
    ensemble = load_ensemble(paths, base, device=device, dtype=dtype, trust=trust)
    for folder, config, _, _ in ensemble.members:
        check_head(head, folder, config)
        _check_equivariant(config, folder)
    calibration = None
    if calibrated:
        folders = [folder for folder, *_ in ensemble.members]
        calibration = load_uncertainty(folders[0].parent, folders)
    return EnsembleCalculator(ensemble, calibration, neighbors=neighbors)


def _check_equivariant(config: AdapterConfig, place: object) -> None:
    """
    Raises:
        InputError: its method breaks rotational symmetry.
    """
    broken = [method.name for method in config.methods if not method.equivariant]
    if broken:
        raise InputError(
            f"{place}: method {broken[0]} breaks rotational symmetry: turning a molecule changes its "
            "energy. It is a baseline for comparisons and not for use; train with mmea or elora."
        )
