"""What a penalty holds a tuned model to: the foundation model's Fisher information, and inputs of its gates.

Everything here is computed once, before the training, with the foundation model on some frames, and depends on the
run's options and data alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forcetune.adapters.adapter import Adapter, parameter_at
from forcetune.adapters.attach import disable_adapter, require_adapter
from forcetune.adapters.updates import ActivationUpdate
from forcetune.adapters.updates.gate import GateActivation
from forcetune.adapters.updates.shift import ShiftActivation
from forcetune.backbones.protocol import Backbone
from forcetune.config import LossConfig, PenaltyConfig, TrainingConfig
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, evaluation_batches
from forcetune.frames.frame import Frame
from forcetune.frames.labels import MAGNETIC, NONE
from forcetune.frames.read import read_frames
from forcetune.frames.store.stored_frames import list_elements
from forcetune.graphs.graph import Batch
from forcetune.utils.files import atomic_path

MOST_ATOMS = 1000
"""Atoms on which gates are compared with the identity in every step."""


@dataclass(frozen=True, slots=True)
class AnchorFrames:
    """Structures on which the foundation model is looked at.

    Attributes:
        frames: structures; labels do not count.
        source: ``penalty frames``, ``replay frames`` or ``training frames``.
        sha256: of the files, where they are those of ``training.penalty.data``.
    """

    frames: Sequence[Frame]
    source: str
    sha256: str = ""

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur in files of their own; those of other frames are known already."""
        return list_elements(self.frames) if self.sha256 else ()


@dataclass(frozen=True, slots=True, eq=False)
class Anchor:
    """What the terms of a penalty need beside the weights, by name of the site.

    Attributes:
        source, n_frames: which frames were looked at, and how many; empty and 0 where none were needed.
        fisher: diagonal of the Fisher information, with the shape of the weight.
        scalars: (atoms, scalars) even scalars that enter a gated layer in the foundation model.
        species: (atoms, elements) one-hot, of gates that read it.
        scales: (shifts,) root mean square of the even scalars that the layer puts out.
    """

    source: str = ""
    n_frames: int = 0
    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    species: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)


_TABLES = ("fisher", "scalars", "species", "scales")


def read_anchor_frames(config: PenaltyConfig, type_map: Sequence[str] = ()) -> AnchorFrames | None:
    """The structures that the penalty names; None where it names none.

    Raises:
        InputError: as :func:`forcetune.frames.read.read_frames`.
    """
    if not config.data:
        return None
    frames = read_frames(
        config.data,
        energy_key=NONE,
        forces_key=NONE,
        stress_key=NONE,
        hessian_key=NONE,
        ignored=MAGNETIC,
        require=(),
        name="frames of the penalty",
        type_map=type_map,
    )
    return AnchorFrames(frames.frames, "penalty frames", frames.sha256)


def make_anchor(backbone: Backbone, training: TrainingConfig, frames: AnchorFrames) -> Anchor:
    """Look at the foundation model on the frames of a penalty, as far as its terms need it.

    Args:
        backbone: carries the adapter, whose values do not count.
        training: the penalty, the loss (of the first stage) that weighs energies and forces, and the seed.
        frames: to choose from.

    Raises:
        InputError: an element that the model does not know, or a loss without energies, forces and stresses.
    """
    config = training.penalty
    if not config.needs_frames:
        return Anchor()
    order = np.random.default_rng(training.seed).permutation(len(frames.frames))
    chosen = [frames.frames[int(number)] for number in np.sort(order[: config.frames])]
    graphs = build_graphs(backbone, chosen)
    with disable_adapter(backbone):
        fisher = estimate_fisher(backbone, graphs, training.loss, config.probes, training.seed) if config.ewc else {}
        seen = _GateInputs(require_adapter(backbone), backbone.model) if config.gates else None
        if seen is not None:
            with seen.watched():
                for batch in evaluation_batches(graphs, backbone.device):
                    backbone.predict(batch)
    tables = {} if seen is None else seen.tables(training.seed)
    return Anchor(frames.source, len(chosen), fisher, **tables)


# ---- Fisher information ----------------------------------------------------------------------------------------------


def estimate_fisher(
    backbone: Backbone, graphs: Sequence[Batch], loss: LossConfig, probes: int, seed: int
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of the foundation model (Kirkpatrick et al., PNAS 114, 3521, 2017, eq. 3).

    Outputs y (energies, force components, stress components) are taken to be normal around the prediction f(W), with
    the variances 1 / (2 w) that make −log p the loss, w its weight over the number of such outputs. Then
    F = Σ_k 2 w_k (∂f_k/∂W)², whatever the labels are, and ½ F δ² is what a change δ of a single weight adds, to second
    order, to the mean squared loss of frames that the foundation model labelled itself.

    The sum over outputs is estimated frame by frame by (∂/∂W Σ_k v_k √(2 w_k) f_k)², averaged over random signs v:
    cross terms vanish in the mean, so that the estimate is unbiased, and exact for an energy alone.

    Args:
        backbone: its adapter, if there is one, disabled.
        graphs: one for each frame.
        loss: weights of the terms; its form does not count.
        probes: draws of v for each frame.
        seed: of v.

    Returns:
        By site name, with the shape of the weight.

    Raises:
        InputError: the loss has neither energies nor forces nor stresses.
    """
    if loss.energy == loss.forces == loss.stress_weight == 0:
        raise InputError(
            "training.penalty.ewc needs a loss of energies, forces or stresses: moments and magnetic forces say "
            "nothing about what the foundation model predicts."
        )
    generator = torch.Generator().manual_seed(seed)
    counts = _Counts(sum(graph.n_atoms for graph in graphs), len(graphs), sum(map(_has_volume, graphs)))
    sites = backbone.sites()
    weights = [parameter_at(backbone.model, site) for site in sites]
    totals = [torch.zeros_like(weight) for weight in weights]
    with _differentiable(weights):
        for graph in graphs:
            placed = backbone.place(graph)
            stress = loss.stress_weight > 0 and _has_volume(graph)
            outputs = _scaled_outputs(backbone, placed, loss, counts, stress)
            for probe in range(probes):
                signs = torch.randint(0, 2, outputs.shape, generator=generator) * 2 - 1
                gradients = frame_gradients(outputs, weights, signs, keep=probe + 1 < probes)
                for total, gradient in zip(totals, gradients, strict=True):
                    if gradient is not None:
                        total += gradient.square() / probes
    return {site.name: total for site, total in zip(sites, totals, strict=True)}


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of all frames: what the means of the loss divide by."""

    atoms: int
    frames: int
    periodic: int


def _scaled_outputs(backbone: Backbone, batch: Batch, loss: LossConfig, counts: _Counts, stress: bool) -> Tensor:
    """(outputs,) √(2 w_k) f_k of one frame, float64."""
    prediction = backbone.predict(batch, stress=stress, create_graph=True)
    atoms = batch.n_atoms if loss.energy_per_atom else 1
    parts = [math.sqrt(2 * loss.energy / counts.frames) / atoms * prediction.energy]
    if loss.forces:
        parts.append(math.sqrt(2 * loss.forces / (3 * counts.atoms)) * prediction.forces.reshape(-1).double())
    if stress:
        assert prediction.stress is not None
        scale = math.sqrt(2 * loss.stress_weight / (9 * counts.periodic))
        if loss.stress_per_atom:
            scale *= float(torch.linalg.det(batch.cell.double()).abs()) / batch.n_atoms
        parts.append(scale * prediction.stress.reshape(-1).double())
    return torch.cat(parts)


def frame_gradients(
    outputs: Tensor, weights: Sequence[Tensor], signs: Tensor, *, keep: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradient of Σ signs · outputs by each weight, None where the outputs do not depend on it."""
    total = (outputs * signs.to(outputs)).sum()
    return torch.autograd.grad(total, list(weights), retain_graph=keep, allow_unused=True)


def _has_volume(graph: Batch) -> bool:
    return bool(torch.linalg.det(graph.cell).abs().max() > 0)


@contextmanager
def _differentiable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within this context the weights take gradients; afterwards only those that did before."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_()
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)


# ---- inputs of gates -------------------------------------------------------------------------------------------------


class _GateInputs:
    """What the layers under gates and shifts take in and put out in the foundation model."""

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        self.parts = {
            site.name: (model.get_submodule(site.reader), part)
            for site in adapter.sites
            if isinstance(part := adapter.part(site, ActivationUpdate), GateActivation | ShiftActivation)
        }
        self.scalars: dict[str, list[Tensor]] = {name: [] for name in self.parts}
        self.species: dict[str, list[Tensor]] = {name: [] for name in self.parts}
        self.squares: dict[str, list[Tensor]] = {name: [] for name in self.parts}
        self.atoms: dict[str, int] = dict.fromkeys(self.parts, 0)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this context every prediction adds to what was seen."""
        handles = [layer.register_forward_hook(self._keep(name, part)) for name, (layer, part) in self.parts.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str, part: GateActivation | ShiftActivation) -> Any:
        def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            even = [output[..., block.start : block.stop] for block in part.blocks_out if block.is_even_scalar]
            if even:
                # one number for each block, as the report of what gates did has it
                blocks = [values.detach().double().square().mean().expand(values.shape[-1]) for values in even]
                self.squares[name].append(len(even[0]) * torch.cat(blocks))
                self.atoms[name] += len(even[0])
            if isinstance(part, GateActivation):
                self.scalars[name].append(part.even_scalars(arguments[0]).detach().clone())
                if part.reads_species:
                    second = arguments[1]
                    self.species[name].append((second if isinstance(second, Tensor) else second.attributes).clone())

        return keep

    def tables(self, seed: int) -> dict[str, dict[str, Tensor]]:
        """The fields of :class:`Anchor`, of at most :data:`MOST_ATOMS` atoms drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        tables: dict[str, dict[str, Tensor]] = {"scalars": {}, "species": {}, "scales": {}}
        for name, (layer, _) in self.parts.items():
            dtype = next(layer.parameters()).dtype
            if self.scalars[name]:
                scalars = torch.cat(self.scalars[name])
                chosen = torch.randperm(len(scalars), generator=generator)[:MOST_ATOMS].to(scalars.device)
                tables["scalars"][name] = scalars[chosen]
                if self.species[name]:
                    tables["species"][name] = torch.cat(self.species[name])[chosen].to(dtype)
            if self.squares[name]:
                sizes = (torch.stack(self.squares[name]).sum(0) / self.atoms[name]).sqrt()
                tables["scales"][name] = torch.where(sizes > 0, sizes, 1.0).to(dtype)
        return tables


# ---- on disk ---------------------------------------------------------------------------------------------------------


def anchor_key(training: TrainingConfig, fingerprint: str, data: str, method: Mapping[str, Any]) -> str:
    """Hash of everything that an anchor depends on.

    Args:
        training: of the run.
        fingerprint: of the foundation model.
        data: hash of the frames.
        method: its table.
    """
    parts = [training.penalty.model_dump(), training.loss.model_dump(), training.seed, fingerprint, data, dict(method)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def save_anchor(path: Path, anchor: Anchor, key: str) -> None:
    """Write an anchor, atomically, for a run that is resumed."""
    tensors = {
        f"{table}|{name}": tensor.cpu().contiguous()
        for table in _TABLES
        for name, tensor in getattr(anchor, table).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"key": key, "source": anchor.source, "frames": str(anchor.n_frames)})


def read_anchor(path: Path, key: str, device: torch.device) -> Anchor | None:
    """The anchor of a run folder; None where there is none, or it is of other options or data, or damaged.

    It is then made again, with the same result.
    """
    tables: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as stream:
            metadata = stream.metadata() or {}
            if metadata.get("key") != key:
                return None
            for entry in stream.keys():  # noqa: SIM118 - it is no mapping
                table, _, name = entry.partition("|")
                tables.setdefault(table, {})[name] = stream.get_tensor(entry).to(device)
    except (OSError, SafetensorError):
        return None
    if not set(tables) <= set(_TABLES):
        return None
    return Anchor(metadata["source"], int(metadata["frames"]), **tables)
