"""A head of its own for replay frames, so that two levels of theory share features and not an energy surface.

The model's energy of a replay frame is E + Σᵢ Δ(hᵢ), with hᵢ the invariant node features of all interaction layers and
Δ a small perceptron that starts at zero. It is trained with the adapter and left behind when the training ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forcetune.backbones.protocol import Backbone, Extension, Extra
from forcetune.config import LossConfig
from forcetune.graphs.graph import Batch
from forcetune.training.losses import compute_loss

CHANNELS = 32
SMALLEST_VARIANCE = 1e-5
LEARNING_RATE = 0.005
"""Of its weights, whatever the method's is: it starts from nothing."""


class ReplayHead(nn.Module):
    """Δ, an energy of each atom from its invariant features (atoms, n_scalars), eV."""

    def __init__(self, n_scalars: int, *, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            first = nn.Linear(n_scalars, CHANNELS)
            last = nn.Linear(CHANNELS, 1, bias=False)
        self.linear = nn.Linear(n_scalars, 1, bias=False)
        self.perceptron = nn.Sequential(first, nn.SiLU(), last)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(last.weight)
        self.to(dtype=dtype, device=device)

    def forward(self, scalars: Tensor, batch: Batch) -> Tensor:
        """Its energy for the replay frames of a batch, (graphs,), eV, and 0 for the others."""
        normal = _normalised(scalars)
        atoms = (self.linear(normal) + self.perceptron(normal)).squeeze(-1)
        graphs = atoms.new_zeros(batch.n_graphs).index_add(0, batch.graph_index, atoms)
        return torch.where(batch.replayed, graphs, 0.0)

    @property
    def trainable(self) -> int:
        """Number of its parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


def _normalised(scalars: Tensor) -> Tensor:
    """With mean 0 and variance 1 of each atom; written out, as TorchScript cannot trace a layer norm's derivative."""
    centred = scalars - scalars.mean(dim=1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + SMALLEST_VARIANCE)


@dataclass(frozen=True, slots=True)
class _WithHead:
    """What a backbone has as its extension meanwhile."""

    head: ReplayHead
    other: Extension | None

    def __call__(self, scalars: Tensor, vectors: Tensor, batch: Batch) -> Extra:
        head_energies = self.head(scalars, batch)
        if self.other is None:
            return Extra(head_energies, None)
        extra = self.other(scalars, vectors, batch)
        return extra._replace(energy=head_energies if extra.energy is None else head_energies + extra.energy)


@contextmanager
def replay_head(backbone: Backbone, head: ReplayHead | None) -> Iterator[None]:
    """Within this context replay frames are predicted with their own head, where they have one."""
    if head is None:
        yield
        return
    before = backbone.extension
    backbone.extension = _WithHead(head, before)
    try:
        yield
    finally:
        backbone.extension = before


def objective(
    backbone: Backbone,
    head: ReplayHead | None,
    config: LossConfig,
    batch: Batch,
    *,
    total: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """The loss of a batch that can be differentiated, its replay frames predicted with their own head.

    Args:
        backbone: carries the adapter.
        head: of replay frames, or None where they have none.
        config: the loss.
        batch: with labels.
        total: as :func:`forcetune.training.losses.compute_loss`.
    """
    with replay_head(backbone, head):
        prediction = backbone.predict(batch, stress=config.stress_weight > 0, create_graph=True)
    return compute_loss(config, prediction, batch, total=total)
