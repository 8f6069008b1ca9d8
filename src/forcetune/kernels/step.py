"""What the layers of one forward pass share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forcetune.kernels.compiled.splined_convolution import SplinedWeights
from forcetune.kernels.edge_plan import Plan
from forcetune.kernels.features import Features
from forcetune.kernels.phase import Phase


@dataclass(frozen=True, slots=True)
class Ghosts:
    """Atoms that send messages and receive none: copies of atoms whose features are computed elsewhere.

    They are numbered behind the atoms of the plan.

    Attributes:
        species: (ghosts,) index of the species.
        exchange: from the features of the plan's atoms, (atoms, width), to those of all senders,
            (atoms + ghosts, width); differentiable once.
    """

    species: Tensor
    exchange: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """Atoms and pairs are those of the plan, in its order.

    Attributes:
        plan: of the batch.
        phase: which derivatives are wanted.
        harmonics: (pairs, Σ 2 l + 1) spherical harmonics.
        radial: (pairs, basis) radial features.
        cutoff: (pairs, 1) envelope to be applied to radial weights, or None.
        attributes: (atoms, species) one-hot.
        ghosts: senders behind the atoms of the plan, if there are any.
        sender_attributes: (senders, species) one-hot; None where senders are the atoms.
        splined: radial weights from splines, by the network that they stand for.
    """

    plan: Plan
    phase: Phase
    harmonics: Tensor
    radial: Tensor
    cutoff: Tensor | None
    attributes: Tensor
    ghosts: Ghosts | None = None
    sender_attributes: Tensor | None = None
    splined: Mapping[nn.Module, SplinedWeights] | None = None

    def of_atoms(self, features: Features) -> Features:
        """Features of the plan's atoms, without those of ghosts behind them."""
        if self.ghosts is None or len(features) == self.plan.n_atoms:
            return features
        blocks = [block[: self.plan.n_atoms] for block in features.blocks]
        return Features(blocks, geometric=features.geometric, trains=features.trains)

    def of_senders(self, features: Features) -> Features:
        """Features of all senders.

        Where features depend on the species only, those of ghosts have been computed along with the others.
        """
        if self.ghosts is None or not features.geometric:
            return features
        layout = features.layout
        flat = torch.cat([block[: self.plan.n_atoms].flatten(1) for block in features.blocks], dim=1)
        exchanged = self.ghosts.exchange(flat).split([dim * channels for dim, channels in layout], dim=1)
        blocks = [part.unflatten(1, shape) for part, shape in zip(exchanged, layout, strict=True)]
        return Features(blocks, geometric=True, trains=features.trains)


def one_hot_species(plan: Plan, ghosts: Ghosts | None, known: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Species of all senders, (senders,), and the same one-hot, (senders, species).

    Args:
        plan: of the batch.
        ghosts: senders behind the atoms, if there are any.
        known: (species,) their indices, where the plan is.
        dtype: of the one-hot numbers.
    """
    species = plan.species if ghosts is None else torch.cat([plan.species, ghosts.species])
    # without a look at the values, which a recorded step must not have
    return species, (species.unsqueeze(1) == known).to(dtype)


def can_train(module: nn.Module) -> bool:
    """Whether a weight of the module requires a gradient, or a gate or hook may bring one in."""
    return any(parameter.requires_grad for parameter in module.parameters()) or any(
        part._forward_hooks or part._forward_pre_hooks or part.__dict__.get("gated_by") is not None
        for part in module.modules()
    )
