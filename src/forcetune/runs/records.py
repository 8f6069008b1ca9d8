"""What a run writes down: results, predictions and the environment it ran in."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols

from forcetune._version import __version__
from forcetune.adapters.attach import Adapter
from forcetune.adapters.methods import Method
from forcetune.backbones.protocol import Backbone
from forcetune.config import ReplayConfig
from forcetune.evaluation.metrics import Predictions
from forcetune.frames.dataset import Dataset, Split
from forcetune.frames.references import ReferenceEnergies
from forcetune.frames.store.stored_frames import StoredFrames, atoms_of
from forcetune.kernels.compiled.choice import kernels_in_use
from forcetune.training.replay import ReplayFrames, has_own_head
from forcetune.utils.files import atomic_path, write_text

RESULTS_NAME = "results.json"
PREDICTIONS_NAME = "predictions.npz"
ENVIRONMENT_NAME = "environment.json"
_PACKAGES = (
    "torch",
    "mace-torch",
    "e3nn",
    "numpy",
    "ase",
    "matscipy",
    "schedulefree",
    "safetensors",
)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that a result may depend on; nothing that names the user or the machine."""
    found: dict[str, Any] = {
        "forcetune": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    if sys.platform.startswith("linux"):
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def describe_model(backbone: Backbone) -> dict[str, Any]:
    base = backbone.base
    return {
        "name": base.name,
        "sha256": base.sha256,
        "fingerprint": base.fingerprint,
        "licence": base.licence,
        "library": backbone.library,
        "head": backbone.head,
        "elements": [chemical_symbols[z] for z in backbone.elements],
        "cutoff_ang": backbone.cutoff,
        "dtype": "float64" if backbone.dtype == torch.float64 else "float32",
        "kernels": kernels_in_use(backbone.model),
    }


def describe_method(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "description": method.description,
        "rank": method.rank,
        "mergeable": method.mergeable,
    }


def describe_replay(found: ReplayFrames, config: ReplayConfig) -> dict[str, Any]:
    return {
        "files": list(found.files),
        "n_frames": len(found.frames),
        "n_held": len(found.held),
        "sha256": found.sha256,
        "labels": config.labels,
        "ratio": config.ratio,
        "weight": config.weight,
        "head": "own" if has_own_head(config) else "shared",
    }


def describe_parameters(adapter: Adapter) -> dict[str, Any]:
    coverage = [asdict(row) for row in adapter.coverage()]
    total = sum(row["total"] for row in coverage)
    return {
        "trainable": adapter.trainable,
        "total": total,
        "share": adapter.trainable / total,
        "coverage": coverage,
    }


def describe_references(references: ReferenceEnergies, before: Mapping[int, float]) -> dict[str, Any]:
    return {
        "mode": references.mode,
        "offset_before_mev_per_atom": references.offset_before_mev_per_atom,
        "offset_after_mev_per_atom": references.offset_after_mev_per_atom,
        "rank": references.rank,
        "n_elements": references.n_elements,
        "elements": [
            {"symbol": chemical_symbols[z], "before_ev": before[z], "after_ev": energy}
            for z, energy in sorted(references.energies.items())
        ],
    }


def describe_data(dataset: Dataset) -> dict[str, Any]:
    return {name: _describe_split(part) for name, part in dataset.splits.items()}


def _describe_split(part: Split) -> dict[str, Any]:
    sizes = atoms_of(part.frames)
    return {
        "files": list(part.files),
        "n_frames": len(part.frames),
        "sha256": part.sha256,
        "keys": {name: key for name, key in part.keys._asdict().items() if key or name not in ("moments", "spins")},
        "elements": [chemical_symbols[z] for z in part.elements],
        "n_atoms": [int(sizes.min()), int(sizes.max())],
        "streamed": isinstance(part.frames, StoredFrames),
    }


def save_predictions(path: Path, before: Mapping[str, Predictions], after: Mapping[str, Predictions]) -> None:
    """Write predictions and labels of every split, compressed: ``{split}/{before|after|reference}/{quantity}``."""
    arrays: dict[str, np.ndarray] = {}
    for when, found in (("before", before), ("after", after)):
        for name, predictions in found.items():
            arrays[f"{name}/{when}/energy_per_atom"] = predictions.energy / predictions.atoms
            arrays[f"{name}/{when}/forces"] = predictions.forces
            arrays[f"{name}/reference/energy_per_atom"] = predictions.energy_label / predictions.atoms
            arrays[f"{name}/reference/forces"] = predictions.forces_label
            arrays[f"{name}/forces_element"] = predictions.numbers
            if predictions.stress is not None and predictions.stress_label is not None:
                arrays[f"{name}/{when}/stress"] = predictions.stress
                arrays[f"{name}/reference/stress"] = predictions.stress_label
            if predictions.moments is not None and predictions.moments_label is not None:
                arrays[f"{name}/{when}/moments"] = predictions.moments
                arrays[f"{name}/reference/moments"] = predictions.moments_label
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # pyright: ignore[reportArgumentType]
