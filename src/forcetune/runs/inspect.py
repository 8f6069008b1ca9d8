"""What the adapter of a run changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forcetune.adapters.attach import require_adapter
from forcetune.adapters.changes import Changes, GateChange, Likeness, likeness, recorded_gates, weight_changes
from forcetune.adapters.updates import ActivationUpdate
from forcetune.backbones.protocol import Backbone
from forcetune.config import load_config
from forcetune.deployment.loading import deploy_copy
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.frames.read import read_frames


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an adapter changed, and how alike another one is."""

    changes: Changes
    likeness: Likeness | None

    def to_json(self) -> dict[str, Any]:
        return self.changes.to_json() | {"likeness": None if self.likeness is None else asdict(self.likeness)}


def inspect(
    run: str | Path,
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    against: str | Path | None = None,
    model: str | Path | Backbone | None = None,
    trust: bool = False,
) -> Inspection:
    """What a run's adapter changed.

    Args:
        run: run folder or adapter folder.
        data: frames over which gates are watched; by default the run's training frames, if they are still there.
        against: another run or adapter on the same base, to compare the changes with.
        model: the base, when it is no longer where it was in the run: name, path or loaded backbone, which stays as it
            is.
        trust: as :func:`forcetune.load`.

    Raises:
        InputError: no adapter there, bad data, or ``against`` belongs to another base.
    """
    backbone = deploy_copy(model, run, trust=trust).backbone
    adapter = require_adapter(backbone)
    gates: tuple[GateChange, ...] = ()
    if any(isinstance(part, ActivationUpdate) for part in adapter.parts.values()):
        frames = read_frames(
            data if data is not None else _training_files(run), require=(), name="data to watch gates on"
        ).frames
        with recorded_gates(backbone) as seen:
            predict(backbone, build_graphs(backbone, frames))
        gates = tuple(seen)
    alike = None
    if against is not None:
        alike = likeness(backbone, deploy_copy(model, against, trust=trust).backbone)
    return Inspection(Changes(adapter.method.name, weight_changes(backbone), gates), alike)


def _training_files(run: str | Path) -> list[str]:
    for folder in (Path(run), Path(run).parent):
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml").data.train
    raise InputError(f"{run}: gates depend on their input, and the adapter alone has no frames; name some with --data.")
