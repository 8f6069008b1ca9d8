"""Errors of a model, a run or an ensemble on labelled frames."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forcetune.adapters.attach import get_adapter
from forcetune.adapters.config import read_adapter_config
from forcetune.adapters.methods import Method
from forcetune.backbones.protocol import Backbone
from forcetune.deployment.ensemble import describe_ensemble, load_ensemble
from forcetune.deployment.loading import adapter_folder, deploy
from forcetune.errors import InputError, warn
from forcetune.evaluation.hessian import LARGEST, hessian_errors, with_hessians
from forcetune.evaluation.metrics import Errors, build_graphs, check_finite, evaluate_frames, predict
from forcetune.frames.frame import Frame, LabelKeys
from forcetune.frames.labels import AUTO, MAGNETIC, NONE
from forcetune.frames.read import read_frames
from forcetune.frames.spins import with_spins
from forcetune.magnetism.options import Magnetism
from forcetune.runs.folder import ADAPTER_NAME
from forcetune.runs.uncertainty import describe_reliability, ensemble_deviations, run_folder
from forcetune.uncertainty.file import load_uncertainty
from forcetune.uncertainty.last_layer import predict_deviations


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
    hessian_key: str = AUTO,
    magforces_key: str = AUTO,
    type_map: Sequence[str] = (),
    head: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    trust: bool = False,
) -> Errors:
    """Errors of a model on labelled frames.

    Args:
        model: run folder, adapter folder, ``hub:owner/name``, model name, model file or loaded backbone.
        data: files or patterns.
        adapter: adapter folder, run folder or ``hub:owner/name``, when ``model`` is a base.
        base: the base, when ``model`` is a run or adapter whose base has moved.
        energy_key, forces_key, stress_key: as :func:`forcetune.frames.read.read_frames`.
        moments_key, spins_key, magforces_key: the same, looked for only where there is a magnetic layer.
        hessian_key: the same; whole Hessians are predicted for frames that have one and at most
            :data:`forcetune.evaluation.hessian.LARGEST` atoms, which takes 6 predictions for each atom.
        type_map: the same.
        head, device, dtype, trust: as :func:`forcetune.deployment.calculator.calculator`.

    Raises:
        InputError: bad data, or nothing usable at a path.
    """
    if base is not None and adapter is None and isinstance(model, (str, Path)):
        model, adapter = base, model
    magnetism = _find_magnetism(model if adapter is None else adapter)
    keys = LabelKeys(energy_key, forces_key, stress_key, moments_key, spins_key, hessian_key, magforces_key)
    frames = _labelled_frames(data, keys, magnetism, type_map)
    deployed = deploy(model, adapter, head=head, device=device, dtype=dtype, trust=trust)
    errors = evaluate_frames(deployed.backbone, frames).errors()
    hessians = hessian_errors(deployed.backbone, frames)
    if hessians.n_left_out:
        warn(f"evaluation data: Hessians of {hessians.n_left_out} frames with more than {LARGEST} atoms are left out.")
    return with_hessians(errors, hessians)


def _labelled_frames(
    data: str | Path | Sequence[str | Path], keys: LabelKeys, magnetism: Magnetism | None, type_map: Sequence[str]
) -> tuple[Frame, ...]:
    """Frames to evaluate on, with the state that a spin layer is given.

    Raises:
        InputError: bad data, or a magnetic label was asked for that nothing predicts.
    """
    magnetic: dict[str, Any] = {f"{label}_key": getattr(keys, label) or AUTO for label in MAGNETIC}
    if magnetism is None:
        for name, key in magnetic.items():
            if key not in (AUTO, NONE):
                raise InputError(f"{name} is {key!r}, but there is no magnetic layer that it could belong to.")
        magnetic = dict.fromkeys(magnetic, NONE)
    elif magnetism.layer != "spin" and magnetic["magforces_key"] not in (AUTO, NONE):
        raise InputError(
            f"magforces_key is {magnetic['magforces_key']!r}, but a layer of magnitudes predicts no magnetic forces."
        )
    usual: dict[str, Any] = {
        "energy_key": keys.energy or AUTO,
        "forces_key": keys.forces or AUTO,
        "stress_key": keys.stress or AUTO,
        "hessian_key": keys.hessian or NONE,
    }
    frames = read_frames(
        data, **usual, **magnetic, require=(), expect=("energy",), name="evaluation data", type_map=type_map
    ).frames
    if magnetism is not None and magnetism.layer == "spin":
        return with_spins(frames, magnetism.inputs)
    return tuple(frames)


def _find_magnetism(place: str | Path | Backbone) -> Magnetism | None:
    """The magnetic layer of what is to be evaluated, before anything heavy is loaded."""
    if isinstance(place, Backbone):
        carried = get_adapter(place)
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
    magforces_key: str = AUTO,
    type_map: Sequence[str] = (),
    device: str = "auto",
    dtype: str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Errors of the mean of several adapters on one base, and how well their spread predicts these errors.

    Args:
        members: run folders, adapter folders or folders of comparisons.
        data: files or patterns.
        base: the base, where it has moved.
        energy_key, forces_key, stress_key, moments_key, spins_key, magforces_key, type_map, device, dtype, trust: as
            :func:`evaluate`.

    Returns:
        As ``forcetune evaluate --ensemble --json`` prints it.

    Raises:
        InputError: bad data, nothing usable at a path, or members of different bases.
    """
    ensemble = load_ensemble(members, base, device=device, dtype=dtype, trust=trust)
    keys = LabelKeys(energy_key, forces_key, stress_key, moments_key, spins_key, magforces=magforces_key)
    frames = _labelled_frames(data, keys, ensemble.magnetism, type_map)
    predictions = ensemble.predict(build_graphs(ensemble.backbone, frames))
    for one in predictions:
        check_finite(one, frames)
    return describe_ensemble(ensemble, predictions)


def evaluate_uncertainty(
    run: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    ensemble: Sequence[str | Path] = (),
    base: str | Path | Backbone | None = None,
    energy_key: str = AUTO,
    forces_key: str = AUTO,
    type_map: Sequence[str] = (),
    device: str = "auto",
    dtype: str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Errors of a calibrated run or ensemble, and how well its standard deviations and intervals predict them.

    Args:
        run: run folder with a calibration.
        data: files or patterns.
        ensemble: further runs, where it is the spread of all that was calibrated.
        base: the base, where it has moved.
        energy_key, forces_key, type_map, device, dtype, trust: as :func:`evaluate`.

    Returns:
        As ``forcetune evaluate --uncertainty --json`` prints it: ``uncertainty`` has, for ``energy_per_atom``,
        ``forces`` (components) and ``forces_of_atoms`` (lengths), coverage and rank correlation, and ``cost_ratio``,
        the time for predictions with standard deviations over that without.

    Raises:
        InputError: bad data, nothing usable at a path, or a run that is not calibrated.
    """
    keys = LabelKeys(energy_key, forces_key, NONE)
    if ensemble:
        members = load_ensemble([run, *ensemble], base, device=device, dtype=dtype, trust=trust)
        calibration = load_uncertainty(run_folder(run), [folder for folder, *_ in members.members])
        frames = _labelled_frames(data, keys, members.magnetism, type_map)
        mean, energy, forces = ensemble_deviations(members, frames)
        reliability = describe_reliability(mean, energy, forces, calibration)
        return mean.errors().to_json() | {"uncertainty": reliability | {"cost_ratio": float(len(members.members))}}
    folder = run_folder(run)
    calibration = load_uncertainty(folder, [folder / ADAPTER_NAME])
    assert calibration.posterior is not None
    frames = _labelled_frames(data, keys, None, type_map)
    backbone = deploy(base, folder, device=device, dtype=dtype, trust=trust).backbone
    graphs = build_graphs(backbone, frames)
    predict(backbone, graphs[:1])  # compiles kernels, which shall not count
    # processor time, as other programs on the machine would count in the other
    clock = time.process_time if backbone.device.type == "cpu" else time.perf_counter
    started = clock()
    check_finite(predict(backbone, graphs), frames)
    plain = clock() - started
    predictions, energy, forces = predict_deviations(backbone, graphs, calibration.posterior)
    cost = (clock() - started - plain) / max(plain, 1e-9)
    reliability = describe_reliability(predictions, energy, forces, calibration)
    return predictions.errors().to_json() | {"uncertainty": reliability | {"cost_ratio": cost}}
