"""The potential in torch-sim: many systems at once, with adapters and gates as they were trained.

>>> from forcetune.torchsim import ForcetuneModel
>>> model = ForcetuneModel("run")
>>> final = torch_sim.integrate(structures, model, integrator=torch_sim.nvt_langevin, n_steps=1000, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from forcetune.backbones.protocol import Backbone
from forcetune.deployment.calculator import SMALLEST_VOLUME, EnsembleCalculator, calculator
from forcetune.deployment.moving_batch import MovingBatch, mean_prediction
from forcetune.deployment.watch import Watch
from forcetune.errors import InputError, warn
from forcetune.graphs.graph import Batch
from forcetune.utils.optional import missing_package

try:
    from torch_sim.models.interface import ModelInterface
    from torch_sim.state import SimState
except ImportError as error:
    raise missing_package("torch-sim", "torchsim", error) from error

MemoryScaling = Literal["n_atoms", "n_atoms_x_density"]
_CHARGES = ("charge", "total_charge")


class ForcetuneModel(ModelInterface):
    """torch-sim's model of a backbone with or without an adapter, or of several adapters.

    ``energy`` (systems,) in eV, float64 whatever the model's dtype; ``forces`` (atoms, 3) in eV/Å; ``stress``
    (systems, 3, 3) in eV/Å³ with ASE's sign, zero for systems that are open everywhere or have no volume. Further keys
    where there are such: ``energies`` (atoms,) shares of the energy, ``magmoms`` of a model of magnitudes, and
    ``energy_std`` and ``forces_std`` of an ensemble, standard deviations over its members.

    Attributes:
        batches: builds the batches; ``batches.neighbors.searches`` counts neighbor searches.
    """

    def __init__(
        self,
        model: str | Path | Backbone | None = None,
        adapter: str | Path | Sequence[str | Path] | None = None,
        *,
        head: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype | None = None,
        trust: bool = False,
        periodic: Literal["state", "cell"] = "state",
        skin: float | None = None,
        compile: Literal["auto", "off"] = "auto",
        compute_stress: bool = True,
        memory_scales_with: MemoryScaling | None = None,
        watch: Watch | None = None,
    ) -> None:
        """
        Args:
            model, adapter, head, trust: as :func:`forcetune.calculator`; several adapters make an ensemble.
            device: ``cpu``, ``cuda`` … or ``auto``.
            dtype: ``float64`` or ``float32``, as a word or PyTorch's; by default that of the training, or float64.
            periodic: ``state`` takes the periodic directions of the state, which torch-sim has once for all systems;
                ``cell`` takes those of each system in which its cell has a vector, so that molecules, slabs and
                crystals can share a batch (:func:`mixed_state`).
            skin: Å beyond the cutoff for neighbor lists that serve several steps; by default none on a CPU.
            compile: as :func:`forcetune.calculator`, for single systems.
            compute_stress: whether to; can be set later.
            memory_scales_with: what torch-sim's autobatching estimates memory by; by default ``n_atoms_x_density``,
                or ``n_atoms`` with ``periodic="cell"``, as molecules have no density.
            watch: what to look for in every system (:class:`forcetune.Watch`); its ``every`` counts calls. What is
                looked at is copied to the CPU.

        Raises:
            InputError: as :func:`forcetune.calculator`, an option is something else, the model has a spin layer, whose
                magnetic state torch-sim does not know, or a spread of forces is to be watched without an ensemble.
        """
        super().__init__()
        if periodic not in ("state", "cell"):
            raise InputError(f"periodic={periodic!r}: is 'state' or 'cell'.")
        scaling = memory_scales_with or ("n_atoms" if periodic == "cell" else "n_atoms_x_density")
        if scaling not in ("n_atoms", "n_atoms_x_density"):
            raise InputError(f"memory_scales_with={scaling!r}: is 'n_atoms' or 'n_atoms_x_density'.")
        loaded = calculator(
            model, adapter, head=head, device=str(device), dtype=_dtype_text(dtype), trust=trust, compile=compile
        )
        if loaded.magnetism is not None and loaded.magnetism.layer == "spin":
            raise InputError(
                "this model has a spin layer, and torch-sim's states carry no magnetic moments; run it in ASE "
                "(forcetune.calculator)."
            )
        backbone = loaded.backbone
        self._device, self._dtype = backbone.device, backbone.dtype
        self._compute_stress, self._compute_forces = compute_stress, True
        self._memory_scales_with = scaling
        self._periodic = periodic
        self._ensemble = loaded.ensemble if isinstance(loaded, EnsembleCalculator) else None
        if watch is not None and watch.forces_std is not None and self._ensemble is None:
            raise InputError("forces_std needs an ensemble, whose members can disagree: adapter=['run1', 'run2'].")
        self._watch = watch
        self._charge_ignored = False
        self.batches = MovingBatch(backbone, skin=skin, compile=loaded.compile == "auto" and self._ensemble is None)

    @property
    def compute_stress(self) -> bool:
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, compute_stress: bool) -> None:
        self._compute_stress = compute_stress

    @property
    def compute_forces(self) -> bool:
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, compute_forces: bool) -> None:
        self._compute_forces = compute_forces

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """
        Raises:
            InputError: always; nothing would move.
        """
        raise InputError("A loaded model stays as it is; choose device and dtype where it is loaded.")

    def forward(self, state: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Energies, forces and stresses of a state, on the model's device and without gradients.

        Args:
            state: torch-sim's ``SimState``, or a dictionary of its fields, of which masses can be missing.

        Raises:
            InputError: an element that the model does not know, atoms at one place or at none, lattice vectors that
                are missing, or an unknown argument.
        """
        if kwargs:
            raise InputError(f"forward() has no argument {next(iter(kwargs))}; the state is its only one.")
        if isinstance(state, dict):
            fields: dict[str, Any] = {"masses": torch.ones_like(state["positions"][:, 0])} | state
            state = SimState(**fields)
        self._check_charge(state)
        positions = state.positions.to(self._device)
        cell = state.row_vector_cell.to(positions)
        system = state.system_idx.to(self._device)
        pbc = self._periodic_directions(state, cell)
        batch = self.batches.batch(state.atomic_numbers.to(self._device).long(), positions, cell, pbc, system)
        members = self.batches.predict(batch, stress=self._compute_stress, ensemble=self._ensemble)
        prediction, further = mean_prediction(members)
        results = {"energy": prediction.energy, "forces": prediction.forces}
        if prediction.stress is not None:
            volume = torch.linalg.det(batch.cell).abs()
            results["stress"] = torch.where(
                (pbc.any(1) & (volume > SMALLEST_VOLUME)).view(-1, 1, 1), prediction.stress, 0.0
            )
        if prediction.energies is not None:
            results["energies"] = prediction.energies
        if prediction.moments is not None:
            results["magmoms"] = prediction.moments
        if self._watch is not None:
            self._look(self._watch, batch, pbc, results | further)
        return results | further

    def _look(self, watch: Watch, batch: Batch, pbc: Tensor, results: dict[str, Tensor]) -> None:
        """Watch every system.

        Raises:
            ExtrapolationError: one of them is beyond a limit.
        """
        step, watch.step = watch.step, watch.step + 1
        if step % watch.every and bool(torch.isfinite(results["forces"]).all()):
            return
        numbers, positions, cells, periodic = (
            tensor.cpu().numpy() for tensor in (batch.numbers, batch.positions, batch.cell, pbc)
        )
        values = {
            name: results[name].double().cpu().numpy() for name in ("energy", "forces", "forces_std") if name in results
        }
        ends = batch.ptr.tolist()
        for index in range(batch.n_graphs):
            part = slice(ends[index], ends[index + 1])
            atoms = Atoms(numbers[part], positions[part], cell=cells[index], pbc=periodic[index])
            mine = {name: value[index if name == "energy" else part] for name, value in values.items()}
            watch.check(step, atoms, mine, f"system {index}: ")

    def _periodic_directions(self, state: SimState, cell: Tensor) -> Tensor:
        """(systems, 3), the periodic directions of each system."""
        if self._periodic == "cell":
            return cell.ne(0).any(2)
        return torch.as_tensor(state.pbc, dtype=torch.bool, device=self._device).expand(len(cell), 3)

    def _check_charge(self, state: SimState) -> None:
        """Warn once that a charge makes no difference; states of torch-sim 0.3 have none."""
        if self._charge_ignored:
            return
        for name in _CHARGES:
            charge = getattr(state, name, None)
            if isinstance(charge, Tensor) and bool((charge.abs() > 1e-6).any()):
                self._charge_ignored = True
                warn(f"Systems have a charge ({name}), which the model ignores.")


def _dtype_text(dtype: str | torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def mixed_state(structures: Atoms | Sequence[Atoms], model: ForcetuneModel) -> SimState:
    """A state of structures that are periodic in different directions, for a model with ``periodic="cell"``.

    torch-sim has one ``pbc`` for all systems of a state; its own conversion of ASE's atoms takes slabs for molecules
    in version 0.3. Here lattice vectors of open directions are zero, and the state itself is not periodic, so that
    torch-sim does not wrap positions: use it for NVE, NVT and relaxations of positions at fixed cells.

    Raises:
        InputError: the model takes periodic directions from the state, or a structure is periodic without a vector.
    """
    if model._periodic != "cell":
        raise InputError("a mixed state needs a model that was loaded with periodic='cell'.")
    atoms = [structures] if isinstance(structures, Atoms) else list(structures)
    for index, one in enumerate(atoms):
        if not one.cell.array[one.pbc].any(axis=1).all():
            raise InputError(f"structure {index} is periodic in a direction without a lattice vector; set its cell.")
    real: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
    cells = np.stack([one.cell.array * one.pbc[:, None] for one in atoms])
    return SimState(
        positions=torch.tensor(np.concatenate([one.positions for one in atoms]), **real),
        masses=torch.tensor(np.concatenate([one.get_masses() for one in atoms]), **real),
        cell=torch.tensor(cells, **real).mT.contiguous(),
        pbc=False,
        atomic_numbers=torch.tensor(np.concatenate([one.numbers for one in atoms]), device=model.device),
        system_idx=torch.tensor(np.repeat(np.arange(len(atoms)), [len(one) for one in atoms]), device=model.device),
    )
