"""Sections of ``results.json``, made from what a run works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from ase.data import chemical_symbols

from forcetune.adapters.attach import Adapter
from forcetune.adapters.methods import Method
from forcetune.backbones.protocol import Backbone
from forcetune.config import ReplayConfig
from forcetune.frames.dataset import Dataset, Split
from forcetune.frames.labels import MAGNETIC
from forcetune.frames.references import ReferenceEnergies
from forcetune.frames.store.stored_frames import StoredFrames, count_atoms
from forcetune.kernels.compiled.choice import kernels_in_use
from forcetune.runs.results import (
    DataSummary,
    ElementReference,
    MethodSummary,
    ModelSummary,
    ParameterSummary,
    ReferenceSummary,
    ReplaySummary,
)
from forcetune.training.replay import ReplayFrames, has_own_head


def summarize_model(backbone: Backbone) -> ModelSummary:
    """The foundation model as this run uses it."""
    base = backbone.base
    return ModelSummary(
        name=base.name,
        sha256=base.sha256,
        fingerprint=base.fingerprint,
        licence=base.licence,
        library=backbone.library,
        head=backbone.head,
        elements=_symbols(backbone.elements),
        cutoff_ang=backbone.cutoff,
        dtype="float64" if backbone.dtype == torch.float64 else "float32",
        kernels=kernels_in_use(backbone.model),
    )


def summarize_method(method: Method) -> MethodSummary:
    """What is trained, in words."""
    return MethodSummary(name=method.name, description=method.description, rank=method.rank, mergeable=method.mergeable)


def summarize_parameters(adapter: Adapter) -> ParameterSummary:
    """What is trained, in numbers."""
    coverage = adapter.coverage()
    total = sum(row.total for row in coverage)
    return ParameterSummary(
        trainable=adapter.trainable, total=total, share=adapter.trainable / total, coverage=coverage
    )


def summarize_references(references: ReferenceEnergies, before: Mapping[int, float]) -> ReferenceSummary:
    """Reference energies of the run beside those of the foundation model.

    Args:
        references: of the run.
        before: atomic number to eV, of the foundation model.
    """
    return ReferenceSummary(
        mode=references.mode,
        offset_before_mev_per_atom=references.offset_before_mev_per_atom,
        offset_after_mev_per_atom=references.offset_after_mev_per_atom,
        rank=references.rank,
        n_elements=references.n_elements,
        elements=[
            ElementReference(symbol=chemical_symbols[z], before_ev=before[z], after_ev=energy)
            for z, energy in sorted(references.energies.items())
        ],
    )


def summarize_data(dataset: Dataset) -> dict[str, DataSummary | None]:
    """Every set of frames, by split."""
    return {name: _summarize_split(split) for name, split in dataset.splits.items()}


def _summarize_split(split: Split) -> DataSummary:
    sizes = count_atoms(split.frames)
    keys = split.keys._asdict()
    return DataSummary(
        files=list(split.files),
        n_frames=len(split.frames),
        sha256=split.sha256,
        keys={name: key for name, key in keys.items() if key or name not in (*MAGNETIC, "hessian")},
        elements=_symbols(split.elements),
        n_atoms=[int(sizes.min()), int(sizes.max())],
        streamed=isinstance(split.frames, StoredFrames),
    )


def summarize_replay(replay: ReplayFrames, config: ReplayConfig) -> ReplaySummary:
    """Frames mixed into the training."""
    return ReplaySummary(
        files=list(replay.files),
        n_frames=len(replay.frames),
        n_held=len(replay.held),
        sha256=replay.sha256,
        labels=config.labels,
        ratio=config.ratio,
        weight=config.weight,
        head="own" if has_own_head(config) else "shared",
    )


def _symbols(numbers: Sequence[int]) -> list[str]:
    return [chemical_symbols[z] for z in numbers]
