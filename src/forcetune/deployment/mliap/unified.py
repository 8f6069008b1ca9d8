"""The object that LAMMPS's ``pair_style mliap unified`` loads: our own network, with gates where an adapter has some.

LAMMPS gives lists of neighbors and asks for energies of its atoms and forces of pairs. Atoms near the border of what a
rank owns have neighbors that another rank owns, or that are periodic images: ghosts. Their features are exchanged
between the layers, and derivatives by them the other way round.

What is called here is the interface of LAMMPS's Python couple: the attributes ``element_types``, ``rcutfac``,
``ndescriptors`` and ``nparams``, three functions ``compute_*``, and for the exchange ``forward_exchange`` and
``reverse_exchange``, which its KOKKOS couple has. No class of LAMMPS is needed, so that files can be made without it.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor
from torch.autograd.function import once_differentiable

from forcetune._version import __version__
from forcetune.backbones.network import NetworkBackbone
from forcetune.errors import ForcetuneError, InputError
from forcetune.kernels.edge_plan import make_plan
from forcetune.kernels.step import Ghosts

FORMAT = 1
"""Of the pickled state; raised when it changes its meaning."""


class UnifiedPotential:
    """A network behind LAMMPS's ML-IAP unified interface, in LAMMPS's units ``metal``.

    Attributes:
        interface: set by LAMMPS.
        element_types: symbols, which ``pair_coeff`` maps atom types to.
        rcutfac: half the cutoff, Å: LAMMPS adds the radii of two atoms, which it takes to be 1.
        ndescriptors, nparams: that LAMMPS wants to be numbers; nothing depends on them.
    """

    def __init__(self, backbone: NetworkBackbone) -> None:
        """
        Args:
            backbone: with or without an adapter; on the CPU.

        Raises:
            InputError: its adapter has a magnetic layer.
        """
        if backbone.extension is not None:
            raise InputError("this adapter has a magnetic layer, and LAMMPS's ML-IAP interface knows no spins.")
        self.backbone = backbone
        self.interface: Any = None
        self.element_types = [chemical_symbols[z] for z in backbone.elements]
        self.rcutfac = 0.5 * float(backbone.cutoff)
        self.ndescriptors = 1
        self.nparams = 1

    # ---- the file ----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # the model as bytes, so that another version of forcetune can say what is wrong before it opens them
        return {"format": FORMAT, "forcetune": __version__, "model": pickle.dumps(self.backbone)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        written = f"this potential was written by forcetune {state.get('forcetune')}"
        if state.get("format") != FORMAT:
            raise ForcetuneError(
                f"{written} in another format than forcetune {__version__} reads; install that version, or export the "
                "run again."
            )
        try:
            backbone = pickle.loads(state["model"])
        except Exception as error:
            raise ForcetuneError(
                f"{written} and forcetune {__version__} cannot open it ({error}); export the run again."
            ) from error
        self.__init__(backbone)

    # ---- what LAMMPS calls -------------------------------------------------------------------------------------------

    def compute_descriptors(self, data: Any) -> None:
        """LAMMPS calls this before forces; everything is done there."""

    def compute_gradients(self, data: Any) -> None:
        """LAMMPS calls this before forces; everything is done there."""

    def compute_forces(self, data: Any) -> None:
        """Energies of LAMMPS's atoms, forces of its pairs, and with them its virial.

        Args:
            data: LAMMPS's atoms and neighbors; takes the results.

        Raises:
            ForcetuneError: this LAMMPS cannot exchange features, or gives neighbors of ghosts.
        """
        # what LAMMPS has no memory for, it refuses to show: neighbors, atoms and ghosts may all be missing
        n_senders, n_pairs = int(data.ntotal), int(data.npairs)
        if n_senders == 0:
            data.energy = 0.0
            return
        n_atoms = int(getattr(data, "nlocal", data.nlistatoms))
        species = torch.as_tensor(data.elems).to(torch.int64)
        self._move(species.device)
        species = species.to(self.backbone.device)
        # atoms of types that are mapped to no element, which another pair style has, are in no pair
        known = species.clamp(min=0)
        receivers, senders, vectors = self._pairs(data, n_pairs, n_atoms)
        # a rank without atoms of its own computes one that is not there, since the others wait for its exchanges
        own = known[:n_atoms] if n_atoms else known[:1]
        plan = make_plan(
            torch.stack([senders, receivers]),
            vectors.new_zeros(n_pairs, 3),
            own,
            paired=bool(self.backbone.paired),
            ghosts=n_senders - n_atoms,
        )

        def exchange(features: Tensor) -> Tensor:
            in_order = features[plan.place][:n_atoms]
            received: Tensor = _Exchange.apply(in_order, data, n_senders)  # pyright: ignore[reportAssignmentType]
            return torch.cat([received[:n_atoms][plan.order] if n_atoms else features, received[n_atoms:]])

        ghosts = Ghosts(known[n_atoms:], exchange)
        energies, gradients = self.backbone.pair_gradients(plan, vectors[plan.edge_of_pair], ghosts)
        # an edge and its reverse may share a pair: its first edge has the whole force then
        forces = torch.zeros(n_pairs, 3, dtype=torch.float64, device=vectors.device)
        forces[plan.edge_of_pair] = -gradients.double()
        self._give(data, energies[:n_atoms], forces)

    def _move(self, device: torch.device) -> None:
        """To where LAMMPS has its atoms."""
        if device != self.backbone.device:
            self.backbone.to(device)

    def _pairs(self, data: Any, n_pairs: int, n_atoms: int) -> tuple[Tensor, Tensor, Tensor]:
        """Receiver and sender of each pair, (pairs,), and the vectors from sender to receiver, (pairs, 3), Å."""
        device, dtype = self.backbone.device, self.backbone.dtype
        if n_pairs == 0:
            none = torch.zeros(0, dtype=torch.int64, device=device)
            return none, none, torch.zeros(0, 3, dtype=dtype, device=device)
        receivers, senders = (
            torch.as_tensor(indices).to(device=device, dtype=torch.int64) for indices in (data.pair_i, data.pair_j)
        )
        if int(receivers.max()) >= n_atoms:
            raise ForcetuneError(
                "LAMMPS gives neighbors of ghost atoms; write 0 behind the file: pair_style mliap unified FILE 0."
            )
        # LAMMPS's vectors point from the receiver to the sender
        return receivers, senders, -torch.as_tensor(data.rij).to(device=device, dtype=dtype)

    def _give(self, data: Any, energies: Tensor, forces: Tensor) -> None:
        """Hand (atoms,) energies and (pairs, 3) forces on receivers to LAMMPS."""
        on_gpu = energies.device.type != "cpu"
        count = int(data.nlistatoms)
        if count:
            listed = torch.as_tensor(data.iatoms)[:count].to(device=energies.device, dtype=torch.int64)
            energies = energies[listed]
            try:
                target = data.eatoms
            except (AttributeError, NotImplementedError):
                target = None  # without KOKKOS it can only be written
            if target is None:
                data.eatoms = energies.numpy()
            else:
                torch.as_tensor(target)[:count].copy_(energies)
        data.energy = float(energies.sum()) if count else 0.0
        if len(forces):
            if on_gpu:
                torch.cuda.synchronize(forces.device)
            data.update_pair_forces(forces if on_gpu else np.ascontiguousarray(forces.numpy()))


class _Exchange(torch.autograd.Function):
    """Features of a rank's atoms to those of its atoms and ghosts; derivatives by ghosts go to their owners."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, data: Any, n_senders: int) -> Tensor:
        if not hasattr(data, "forward_exchange"):
            raise ForcetuneError(
                "this LAMMPS cannot exchange features of ghost atoms, which a network of several layers needs: take "
                "one of 2025 or later with the packages KOKKOS, ML-IAP and PYTHON, and start it with -k on -sf kk."
            )
        ctx.data, ctx.n_atoms = data, len(features)
        rows = features.new_zeros(n_senders, features.shape[1])
        rows[: len(features)] = features
        received = torch.empty_like(rows)
        _synchronized(rows, data.forward_exchange, rows, received)
        return received

    @staticmethod
    def _reverse(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows = grads[0].contiguous()
        collected = torch.empty_like(rows)
        _synchronized(rows, ctx.data.reverse_exchange, rows, collected)
        return collected[: ctx.n_atoms], None, None

    backward: Any = staticmethod(once_differentiable(_reverse))


def _synchronized(like: Tensor, exchange: Any, source: Tensor, target: Tensor) -> None:
    """Exchange rows by LAMMPS, which on a GPU does not wait for what PyTorch has started, nor the other way round."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    exchange(source, target, source.shape[1])
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
