"""Short ways through the layers, shared by the command line and Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers

from forcetune.adapters.attach import adapter_of, attach, attached, detach
from forcetune.adapters.changes import Changes, GateChange, Likeness, likeness, recorded_gates, weight_changes
from forcetune.adapters.file import read_adapter_config
from forcetune.adapters.methods import METHODS, Method, method, options_of
from forcetune.adapters.updates import ActivationUpdate
from forcetune.backbones.loading import load
from forcetune.backbones.protocol import Backbone
from forcetune.config import load_config
from forcetune.deployment.ensemble import describe_ensemble, load_ensemble
from forcetune.deployment.loading import adapter_folder, deploy, deploy_copy
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Errors, check_finite, evaluate_frames, graphs_of, predict
from forcetune.frames.frame import Frame, LabelKeys
from forcetune.frames.labels import AUTO, NONE
from forcetune.frames.read import read_frames
from forcetune.frames.spins import with_spins
from forcetune.magnetism.options import Magnetism


def evaluate(
    model: str | Path | Backbone,
    data: str | Path | Sequence[str | Path],
    *,
    adapter: str | Path | None = None,
    base: str | Path | Backbone | None = None,
    energy_key: str = AUTO,
    forces_key: str = AUTO,
    stress_key: str = AUTO,
    moments_key: str = AUTO,
    spins_key: str = AUTO,
    type_map: Sequence[str] = (),
    head: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    trust: bool = False,
) -> Errors:
    """Errors of a model on labelled frames.

    Args:
        model: run folder, adapter folder, model name, model file or loaded backbone.
        data: files or patterns.
        adapter: adapter folder or run folder, when ``model`` is a base.
        base: the base, when ``model`` is a run or adapter whose base has moved.
        energy_key, forces_key, stress_key: as :func:`forcetune.frames.read.read_frames`.
        moments_key, spins_key: the same, looked for only where there is a magnetic layer.
        type_map: the same.
        head, device, dtype, trust: as :func:`forcetune.deployment.calculator.calculator`.

    Raises:
        InputError: bad data, or nothing usable at a path.
    """
    if base is not None and adapter is None and isinstance(model, (str, Path)):
        model, adapter = base, model
    magnetism = _magnetism_of(model if adapter is None else adapter)
    keys = LabelKeys(energy_key, forces_key, stress_key, moments_key, spins_key)
    frames = _labelled_frames(data, keys, magnetism, type_map)
    deployed = deploy(model, adapter, head=head, device=device, dtype=dtype, trust=trust)
    return evaluate_frames(deployed.backbone, frames).errors()


def _labelled_frames(
    data: str | Path | Sequence[str | Path], keys: LabelKeys, magnetism: Magnetism | None, type_map: Sequence[str]
) -> tuple[Frame, ...]:
    """Frames to evaluate on, with the state that a spin layer is given.

    Raises:
        InputError: bad data, or a magnetic label was asked for that nothing predicts.
    """
    magnetic: dict[str, Any] = {"moments_key": keys.moments or AUTO, "spins_key": keys.spins or AUTO}
    if magnetism is None:
        for name, key in magnetic.items():
            if key not in (AUTO, NONE):
                raise InputError(f"{name} is {key!r}, but there is no magnetic layer that moments or spins belong to.")
        magnetic = dict.fromkeys(magnetic, NONE)
    usual: dict[str, Any] = {
        "energy_key": keys.energy or AUTO,
        "forces_key": keys.forces or AUTO,
        "stress_key": keys.stress or AUTO,
    }
    frames = read_frames(
        data, **usual, **magnetic, require=(), expect=("energy",), name="evaluation data", type_map=type_map
    ).frames
    if magnetism is not None and magnetism.layer == "spin":
        return with_spins(frames, magnetism.inputs)
    return tuple(frames)


def _magnetism_of(place: str | Path | Backbone) -> Magnetism | None:
    """The magnetic layer of what is to be evaluated, before anything heavy is loaded."""
    if isinstance(place, Backbone):
        carried = adapter_of(place)
        return None if carried is None else carried.method.magnetism
    folder = adapter_folder(place)
    return None if folder is None else Method.from_json(read_adapter_config(folder).method).magnetism


def evaluate_ensemble(
    members: Sequence[str | Path],
    data: str | Path | Sequence[str | Path],
    *,
    base: str | Path | Backbone | None = None,
    energy_key: str = AUTO,
    forces_key: str = AUTO,
    stress_key: str = AUTO,
    moments_key: str = AUTO,
    spins_key: str = AUTO,
    type_map: Sequence[str] = (),
    device: str = "auto",
    dtype: str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Errors of the mean of several adapters on one base, and how well their spread foretells these errors.

    Args:
        members: run folders, adapter folders or folders of comparisons.
        data: files or patterns.
        base: the base, where it has moved.
        energy_key, forces_key, stress_key, moments_key, spins_key, type_map, device, dtype, trust: as :func:`evaluate`.

    Returns:
        As ``forcetune evaluate --ensemble --json`` prints it.

    Raises:
        InputError: bad data, nothing usable at a path, or members of different bases.
    """
    ensemble = load_ensemble(members, base, device=device, dtype=dtype, trust=trust)
    keys = LabelKeys(energy_key, forces_key, stress_key, moments_key, spins_key)
    frames = _labelled_frames(data, keys, ensemble.magnetism, type_map)
    found = ensemble.predict(graphs_of(ensemble.backbone, frames))
    for one in found:
        check_finite(one, frames)
    return describe_ensemble(ensemble, found)


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
        model: the base, when it is no longer where the run found it: name, path or loaded backbone, which stays as it
            is.
        trust: as :func:`forcetune.load`.

    Raises:
        InputError: no adapter there, bad data, or ``against`` belongs to another base.
    """
    backbone = deploy_copy(model, run, trust=trust).backbone
    adapter = attached(backbone)
    gates: tuple[GateChange, ...] = ()
    if any(isinstance(part, ActivationUpdate) for part in adapter.parts.values()):
        frames = read_frames(
            data if data is not None else _training_files(run), require=(), name="data to watch gates on"
        ).frames
        with recorded_gates(backbone) as seen:
            predict(backbone, graphs_of(backbone, frames))
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


def compare_methods(
    model: str | Path | Backbone,
    *,
    elements: Sequence[str] | None = None,
    rank: int | None = None,
    head: str | None = None,
    trust: bool = False,
) -> list[dict[str, Any]]:
    """What each method would train: ``method, trainable, total, coverage``, one object per method.

    Methods that have nothing to train in this model are left out (``modality`` in one without modalities).

    Args:
        model: name, path or loaded backbone; left as it was.
        elements: cut the element table to these symbols.
        rank: for the methods that have one.
        head, trust: as :func:`forcetune.load`.

    Raises:
        InputError: unknown model or element.
    """
    unknown = [symbol for symbol in elements or () if symbol not in atomic_numbers]
    if unknown:
        raise InputError(f"--elements: {unknown[0]!r} is no element; write symbols such as H,C,O.")
    numbers = [atomic_numbers[symbol] for symbol in elements] if elements else None
    backbone = load(model, head=head, elements=numbers, device="cpu", trust=trust)
    rows = []
    for name, make in METHODS.items():
        options: dict[str, Any] = {"rank": rank} if rank is not None and "rank" in options_of(make) else {}
        chosen = method(name, **options)
        if not chosen.reaches(backbone.sites()):
            continue
        adapter = attach(backbone, chosen)
        coverage = [asdict(row) for row in adapter.coverage()]
        total = sum(row["total"] for row in coverage)
        rows.append({"method": name, "trainable": adapter.trainable, "total": total, "coverage": coverage})
        detach(backbone)
    return rows
