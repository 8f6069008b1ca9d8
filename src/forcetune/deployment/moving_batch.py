"""Predictions for many structures that move together, with neighbors found where the positions are."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from forcetune.backbones.protocol import Backbone, Prediction
from forcetune.deployment.compiled_prediction import CompiledPrediction
from forcetune.deployment.ensemble import Ensemble
from forcetune.errors import InputError
from forcetune.frames.frame import Frame
from forcetune.graphs.graph import Batch, unlabelled_batch
from forcetune.graphs.verlet_list import VerletList
from forcetune.kernels.edge_plan import Plan, make_plan, with_plan

SKIN = {"cpu": 0.0, "cuda": 0.4}
"""Å beyond the cutoff for neighbor lists that serve several steps: on a GPU searching costs more than longer lists."""


class MovingBatch:
    """A batch of structures whose energies are asked for again and again while their atoms move.

    Attributes:
        backbone: with or without an adapter.
        neighbors: the neighbor list, which says how often was searched.
    """

    def __init__(self, backbone: Backbone, *, skin: float | None = None, compile: bool = True) -> None:
        """
        Args:
            backbone: with or without an adapter.
            skin: Å beyond the cutoff that neighbors are searched in, so that the list serves several steps; by default
                that of the device (:data:`SKIN`).
            compile: record the operations of a single structure that comes again and again, on a CPU.

        Raises:
            InputError: the skin is negative or not finite.
        """
        skin = SKIN.get(backbone.device.type, 0.0) if skin is None else float(skin)
        if not 0 <= skin < torch.inf:
            raise InputError(f"skin={skin:g}: a distance beyond the cutoff is 0 or more, in Å.")
        self.backbone = backbone
        self.neighbors = VerletList(backbone.cutoff, skin)
        self.compiled = CompiledPrediction(backbone, wanted=compile)
        self._for = (backbone.elements, backbone.device)
        self._table = torch.full((256,), -1, dtype=torch.int64)
        self._table[torch.tensor(backbone.elements)] = torch.arange(len(backbone.elements))
        self._table = self._table.to(backbone.device)
        self._plan: tuple[Tensor, Plan] | None = None

    def batch(self, numbers: Tensor, positions: Tensor, cell: Tensor, pbc: Tensor, system: Tensor) -> Batch:
        """The structures as a batch on the device and in the dtype of the model.

        Args:
            numbers: (atoms,) atomic numbers.
            positions: (atoms, 3), Å.
            cell: (systems, 3, 3), rows are lattice vectors, Å.
            pbc: (systems, 3) periodic directions.
            system: (atoms,) the system of each atom, ascending.

        Raises:
            InputError: as :func:`forcetune.graphs.neighbor_search.search_neighbors`.
        """
        edges = self.neighbors.update(numbers, positions, cell, pbc, system)
        real = {"device": self.backbone.device, "dtype": self.backbone.dtype}
        return unlabelled_batch(
            numbers,
            positions.detach().to(**real),
            cell.detach().to(**real),
            system,
            edges.edge_index,
            edges.unit_shifts.to(**real),
        )

    def frame_batch(self, frame: Frame) -> Batch:
        """A single structure as a batch; positions, cell and spins move to the device, and nothing comes back.

        Raises:
            InputError: as :meth:`batch`.
        """
        device = self.backbone.device
        numbers, positions, cell, pbc = (
            torch.as_tensor(values, device=device) for values in (frame.numbers, frame.positions, frame.cell, frame.pbc)
        )
        system = torch.zeros(len(frame), dtype=torch.int64, device=device)
        batch = self.batch(numbers, positions, cell.unsqueeze(0), pbc.unsqueeze(0), system)
        if frame.spins is None:
            return batch
        return replace(batch, spins=torch.as_tensor(frame.spins, device=device, dtype=self.backbone.dtype))

    def serves(self, backbone: Backbone) -> bool:
        """Whether this is the moving batch of a backbone as it is now."""
        same = self.backbone is backbone and self.neighbors.cutoff == backbone.cutoff
        return same and self._for == (backbone.elements, backbone.device)

    def predict(self, batch: Batch, *, stress: bool, ensemble: Ensemble | None = None) -> tuple[Prediction, ...]:
        """Predictions of the model, or of every member of an ensemble on it, without gradients.

        Raises:
            InputError: the model does not know an element.
        """
        if ensemble is None:
            return (self._predict(batch, stress),)
        predictions = []
        for index in range(len(ensemble.members)):
            with ensemble.member(index):
                predictions.append(self._predict(batch, stress))
        return tuple(predictions)

    def _predict(self, batch: Batch, stress: bool) -> Prediction:
        if self.neighbors.skin == 0 and batch.n_graphs == 1 and self.compiled.eager_reason is None:
            return self.compiled.predict(batch, stress=stress)
        plan = self._keep_plan(batch)
        with nullcontext() if plan is None else with_plan(self.backbone, plan):
            return self.backbone.predict(batch, stress=stress).detached()

    def _keep_plan(self, batch: Batch) -> Plan | None:
        """The plan of a batch, made again with a new neighbor list only."""
        if self.backbone.paired is None:
            return None
        if self._plan is None or self._plan[0] is not batch.edge_index:
            species = self._table[batch.numbers.clamp(0, len(self._table) - 1)]
            if bool((species < 0).any()):
                return None  # the model itself says which
            plan = make_plan(batch.edge_index, batch.unit_shifts, species, paired=self.backbone.paired)
            self._plan = (batch.edge_index, plan)
        return self._plan[1]


def mean_prediction(members: tuple[Prediction, ...]) -> tuple[Prediction, dict[str, Tensor]]:
    """The mean over members, and their standard deviations ``energy_std`` (graphs,), eV, and ``forces_std``
    (atoms, 3), eV/Å; none of a single one.
    """
    if len(members) == 1:
        return members[0], {}
    energies, forces = (torch.stack([getattr(one, name) for one in members]) for name in ("energy", "forces"))
    stresses = [one.stress for one in members if one.stress is not None]
    moments = [one.moments for one in members if one.moments is not None]
    mean = Prediction(
        energies.mean(0),
        forces.mean(0),
        torch.stack(stresses).mean(0) if stresses else None,
        torch.stack(moments).mean(0) if moments else None,
    )
    return mean, {"energy_std": energies.std(0), "forces_std": forces.std(0)}
