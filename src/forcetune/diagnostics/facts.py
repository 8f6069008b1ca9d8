"""What every report of the doctor says about the data: counts, agreement of labels and model, memory of a step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ase.data import chemical_symbols

from forcetune.backbones.protocol import Backbone
from forcetune.diagnostics.examine import TRAIN, Examined
from forcetune.diagnostics.finding import Finding
from forcetune.diagnostics.label_statistics import (
    LabelledPredictions,
    element_agreement,
    energy_agreement,
    force_agreement,
    stress_agreement,
)
from forcetune.diagnostics.memory import step_memory
from forcetune.frames.frame import LabelKeys
from forcetune.graphs.graph import Batch


def describe_sets(examined: Examined, keys: Mapping[str, LabelKeys]) -> dict[str, Any]:
    """``sets`` of the report: of each set its files, keys of labels, elements, and sizes of frames in atoms."""
    facts: dict[str, Any] = {"sets": {}}
    for name, frames in examined.frames.items():
        sizes = [len(frame) for frame in frames]
        facts["sets"][name] = {
            "files": list(dict.fromkeys(frame.origin.file for frame in frames)),
            "n_frames": len(frames),
            "keys": keys[name]._asdict(),
            "elements": [chemical_symbols[z] for z in sorted({int(z) for frame in frames for z in frame.numbers})],
            "n_atoms": [min(sizes), max(sizes)] if sizes else None,
            "largest_frame": str(max(frames, key=len).origin) if frames else None,
            "periodic": sum(bool(frame.pbc.any()) for frame in frames),
            "hessians": sum(frame.hessian is not None for frame in frames),
        }
    return facts


def describe_agreement(predictions: LabelledPredictions) -> dict[str, Any]:
    """How far labels and predictions of the foundation model agree: energies, forces, stresses; by element, meV/Å."""
    measures = {"energy": energy_agreement, "forces": force_agreement, "stress": stress_agreement}
    measured = {name: measure(predictions) for name, measure in measures.items()}
    return {
        **{name: None if agreement is None else agreement.to_json() for name, agreement in measured.items()},
        "elements": [
            {
                "symbol": row.symbol,
                "n_atoms": row.n_atoms,
                "label_rms_mev_per_ang": row.label_rms,
                "error_rms_mev_per_ang": row.error_rms,
            }
            for row in element_agreement(predictions)
        ],
    }


def estimate_memory(
    backbone: Backbone, graphs: Mapping[str, Sequence[Batch]], batch_size: int, findings: list[Finding]
) -> dict[str, Any] | None:
    """Memory of a training step with the largest frames, bytes; None where there is nothing to estimate it from.

    Args:
        backbone: the model.
        graphs: of each set; those of the training set count.
        batch_size: frames of a step.
        findings: gets a warning where the device has less.
    """
    estimate = step_memory(backbone, graphs.get(TRAIN, []), batch_size)
    if estimate is None:
        return None
    available = _available_memory(backbone.device)
    if available is not None and estimate.estimate_bytes > available:
        text = (
            f"A step with the {batch_size} largest frames is estimated at {estimate.estimate_bytes / 1e9:.1f} GB, more "
            f"than the {available / 1e9:.1f} GB of this machine; set training.batch_size or training.batch_edges lower."
        )
        findings.append(Finding("memory", "warning", text))
    return {
        **estimate.to_json(),
        "batch_size": batch_size,
        "available_bytes": available,
        "device": str(backbone.device),
    }


def _available_memory(device: torch.device) -> int | None:
    """Memory of the device, bytes; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return None
