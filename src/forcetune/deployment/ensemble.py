"""Several adapters on one base: their mean as prediction, their spread as uncertainty.

The base is loaded once. Members take turns on it, each exactly as it is alone; nothing is folded into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from forcetune.adapters.attach import Adapter, detach, reattach
from forcetune.adapters.config import AdapterConfig, read_adapter_config
from forcetune.adapters.file import load_adapter
from forcetune.adapters.hub import locate_adapter
from forcetune.backbones.protocol import Backbone
from forcetune.deployment.loading import adapter_folder, load_base
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Predictions, predict
from forcetune.frames.frame import FloatArray
from forcetune.graphs.graph import Batch
from forcetune.magnetism.options import Magnetism
from forcetune.uncertainty.calibration import rank_correlation


@dataclass(frozen=True, slots=True)
class Ensemble:
    """A base and the adapters that take turns on it.

    Attributes:
        backbone: the base, without an adapter between predictions.
        members: folder, configuration, adapter and reference energies of each.
    """

    backbone: Backbone
    members: tuple[tuple[Path, AdapterConfig, Adapter, dict[int, float]], ...]

    @property
    def magnetism(self) -> Magnetism | None:
        """The magnetic layer of the members, which take one state."""
        return self.members[0][2].method.magnetism

    @contextmanager
    def member(self, index: int) -> Iterator[Backbone]:
        """Within this context the backbone carries one of the adapters."""
        _, _, adapter, references = self.members[index]
        reattach(self.backbone, adapter)
        self.backbone.set_reference_energies(references)
        try:
            yield self.backbone
        finally:
            detach(self.backbone)

    def predict(
        self, graphs: Sequence[Batch], *, stress: bool | None = None, progress: Callable[[int], None] | None = None
    ) -> tuple[Predictions, ...]:
        """Predictions of every member, as :func:`forcetune.evaluation.metrics.predict`."""
        predictions = []
        for index in range(len(self.members)):
            with self.member(index) as backbone:
                predictions.append(predict(backbone, graphs, stress=stress, progress=progress))
        return tuple(predictions)


def member_folders(paths: Sequence[str | Path]) -> tuple[Path, ...]:
    """The adapter folders of runs, adapters and comparisons; a comparison stands for all of its runs.

    Raises:
        InputError: something else stands at a path, or they are fewer than two.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        place = locate_adapter(path)
        inside = sorted(place.iterdir()) if (place / "comparison.json").is_file() else [place]
        adapters = [folder for folder in map(adapter_folder, inside) if folder is not None]
        if not adapters:
            raise InputError(f"{path}: holds no adapter; name run folders, adapter folders or a comparison.")
        folders.update({folder.resolve(): folder for folder in adapters})
    if len(folders) < 2:
        raise InputError("an ensemble needs at least two different adapters; name further runs.")
    return tuple(folders.values())


def load_ensemble(
    paths: Sequence[str | Path],
    model: str | Path | Backbone | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust: bool = False,
) -> Ensemble:
    """Load a base once, and all adapters.

    Args:
        paths: run folders, adapter folders, folders of comparisons or ``hub:owner/name``.
        model: the base; by default that of the first run.
        device, dtype, trust: as :func:`forcetune.deployment.loading.deploy`.

    Raises:
        InputError: nothing usable at a path, the adapters belong to different bases, or they take different magnetic
            states; says what differs.
    """
    folders = member_folders(paths)
    configs = [read_adapter_config(folder) for folder in folders]
    first = configs[0]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        _check_same_base(folders[0], first, folder, config)
    backbone, _ = load_base(model, folders[0], first, device=device, dtype=dtype, trust=trust)
    members = []
    for folder, config in zip(folders, configs, strict=True):
        adapter = load_adapter(backbone, folder)
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
        members.append((folder, config, adapter, backbone.reference_energies))
        detach(backbone)
    _check_same_state(members)
    for parameter in backbone.model.parameters():
        parameter.requires_grad_(False)
    return Ensemble(backbone, tuple(members))


def _check_same_base(one: Path, first: AdapterConfig, other: Path, config: AdapterConfig) -> None:
    names = ("fingerprint", "library", "head", "elements", "cutoff_ang", "parameters")
    differences = [
        f"{name} {getattr(first.base, name)} and {getattr(config.base, name)}"
        for name in names
        if getattr(first.base, name) != getattr(config.base, name)
    ]
    if differences:
        raise InputError(
            f"{one} and {other}: an ensemble needs one base, but they have {first.base.name} and {config.base.name}, "
            f"which differ: {'; '.join(differences)}. Train all members from the same model on the same elements."
        )


def _check_same_state(members: Sequence[tuple[Path, AdapterConfig, Adapter, dict[int, float]]]) -> None:
    """
    Raises:
        InputError: their magnetic layers are not given the same state.
    """
    (one, _, adapter, _), *others = members
    for other, _, another, _ in others:
        first, second = adapter.method.magnetism, another.method.magnetism
        kinds = [None if m is None else (m.layer, m.inputs, m.takes_directions) for m in (first, second)]
        if kinds[0] != kinds[1]:
            has = ["no magnetic layer" if m is None else f"{m.layer} layer on {m.inputs}" for m in (first, second)]
            raise InputError(
                f"{one} and {other}: an ensemble needs members that take one magnetic state, but they have {has[0]} "
                f"and {has[1]}. Train all members with the same magnetism.layer and magnetism.inputs."
            )


def average_predictions(members: Sequence[Predictions]) -> Predictions:
    """The mean over members, with their labels."""

    def mean_of_all(values: Sequence[FloatArray | None]) -> FloatArray | None:
        known = [value for value in values if value is not None]
        return np.mean(known, axis=0) if len(known) == len(values) else None

    return replace(
        members[0],
        energy=np.mean([member.energy for member in members], axis=0),
        forces=np.mean([member.forces for member in members], axis=0),
        stress=mean_of_all([member.stress for member in members]),
        moments=mean_of_all([member.moments for member in members]),
        magforces=mean_of_all([member.magforces for member in members]),
    )


def spread(values: Sequence[FloatArray]) -> FloatArray:
    """Standard deviation over members, with one less than their number in the denominator; the shape of one."""
    return np.std(np.stack(values), axis=0, ddof=1)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well a standard deviation predicts an error.

    Attributes:
        mean_std, rms_error: of the spread and of the errors, meV/atom or meV/Å.
        correlation: Spearman's rank correlation of spread and absolute error; None where one of them is constant.
        ratio: root mean square error over root mean square spread: 1 is calibrated, above is too sure of itself.
        within_1, within_2: share of errors below one and two standard deviations; 0.68 and 0.95 if they were normal.
    """

    mean_std: float
    rms_error: float
    correlation: float | None
    ratio: float | None
    within_1: float
    within_2: float


def calibration(std: FloatArray, error: FloatArray) -> Calibration | None:
    """Compare spreads with errors, in eV or eV/Å; None where nothing has a label.

    Args:
        std, error: of the same shape; NaN where there is no label.
    """
    known = ~np.isnan(error)
    if not known.any():
        return None
    std, error = std[known], np.abs(error[known])
    rms_std, rms_error = (float(np.sqrt(np.mean(values**2))) for values in (std, error))
    return Calibration(
        mean_std=1e3 * float(std.mean()),
        rms_error=1e3 * rms_error,
        correlation=rank_correlation(std, error),
        ratio=rms_error / rms_std if rms_std > 0 else None,
        within_1=float((error <= std).mean()),
        within_2=float((error <= 2 * std).mean()),
    )


def describe_ensemble(ensemble: Ensemble, predictions: Sequence[Predictions]) -> dict[str, Any]:
    """Errors of the mean, and how well the spread predicts them, as ``forcetune evaluate --json`` prints them."""
    mean = average_predictions(predictions)
    figures = {
        "energy_per_atom": calibration(
            spread([one.energy / one.atoms for one in predictions]), (mean.energy - mean.energy_label) / mean.atoms
        ),
        "forces": calibration(spread([one.forces for one in predictions]), mean.forces - mean.forces_label),
    }
    return mean.errors().to_json() | {
        "ensemble": {
            "members": [str(folder) for folder, *_ in ensemble.members],
            "forces_mae_of_members_mev_per_ang": [one.errors().forces_mae_mev_per_ang for one in predictions],
            **{name: None if one is None else asdict(one) for name, one in figures.items()},
        }
    }
