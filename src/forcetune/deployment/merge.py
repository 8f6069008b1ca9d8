"""From base and adapter to one plain model of the backbone's own library, proven equal before it is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from forcetune.adapters.attach import attached, check_mergeable, merge_weights
from forcetune.adapters.updates import WeightUpdate
from forcetune.backbones.protocol import Backbone, Base, Multimodal
from forcetune.backbones.registry import resolve
from forcetune.deployment.loading import BASE_NAME, deploy_copy
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import Predictions, graphs_of, predict
from forcetune.frames.frame import FloatArray, Frame, Origin
from forcetune.utils.files import atomic_path, path_of, sha256_of

PARITY = {"float64": 1e-10, "float32": 1e-4}
MODEL_SUFFIXES = (".model", ".pt", ".pth", ".ckpt", ".zip")
"""Of files that a merged model may replace."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written, and how far it is from base + adapter.

    Attributes:
        path: the plain model.
        n_probes: structures compared.
        energy_difference: largest of the interaction energies, relative to the largest one of the probes.
        forces_difference: largest, relative to the largest force component of the probes.
        references_difference: largest of the reference energies (E0), eV, which a float32 model rounds.
        modality: that was replaced or added; None of a model without modalities.
        added: it was added, and the others are what they were.
    """

    path: Path
    n_probes: int
    energy_difference: float
    forces_difference: float
    references_difference: float = 0.0
    modality: str | None = None
    added: bool = False


def merge(
    run: str | Path,
    output: str | Path,
    *,
    model: str | Path | Backbone | None = None,
    dtype: str | None = None,
    trust: bool = False,
    modality: str | None = None,
) -> Merged:
    """Write the fine-tuned model as a plain file that needs no forcetune.

    It is the base's own file with other weights, so that it opens wherever that does, with all its elements and heads;
    where that cannot be done, or another precision is asked for, a new file of the library installed here.

    The file is read back and compared with base + adapter on random structures of all its elements, molecules and
    crystals; it takes its place only when energies, forces and stresses agree.

    Of a multi-modal model the modality that was tuned is replaced. Where nothing but its rows and reference energies
    was trained (method ``modality``), a new modality is added instead, and the others are proven to be what they were.

    Args:
        run: run folder or adapter folder.
        output: file to write, such as ``tuned.model``.
        model: the base, when it is no longer where the run found it: name, path or loaded backbone, which stays as it
            is.
        dtype: precision of the written model; by default that of the base's file, or else that of the training.
        trust: allow the base's file to run its own code where it cannot be rebuilt without.
        modality: name of the new modality, by default that of the run's folder; the name of the modality that was
            tuned replaces it.

    Raises:
        InputError: the method does not merge, nothing usable at a path, ``output`` is a file of something else, or
            no modality of this name can be added.
        ForcetuneError: the written model disagrees; nothing is left at ``output``.
    """
    deployed = deploy_copy(model, run, dtype=dtype, trust=trust)
    backbone, config = deployed.backbone, deployed.adapter
    if config is None:
        raise InputError(f"{run}: holds no adapter to merge.")
    check_mergeable(backbone)
    _check_output(Path(output), backbone.base)
    probes = probe_frames(backbone.elements, backbone.cutoff)
    before = predict(backbone, graphs_of(backbone, probes), stress=True)
    added = _new_modality(backbone, Path(run), modality)
    merge_weights(backbone)
    with atomic_path(output) as temporary:
        again = _written(backbone, temporary, dtype, added)
        after = predict(again, graphs_of(again, probes), stress=True)
        energy, forces = _differences(before, after, backbone.reference_energies, again.reference_energies)
        references, rounding = _reference_differences(backbone, again)
        allowed = PARITY["float64" if {again.stored_dtype, backbone.dtype} == {torch.float64} else "float32"]
        if not max(energy, forces) <= allowed or not references <= rounding:
            raise ForcetuneError(
                f"{output}: the merged model differs from base + adapter by {max(energy, forces):.1e} (relative, "
                f"allowed {allowed:.0e}), its reference energies by {references:.1e} eV (allowed {rounding:.1e}); "
                "nothing was written. Please report this with the adapter's configuration."
            )
        if added is not None:
            _check_others(backbone, again, probes, output)
    tuned = backbone.head if isinstance(backbone, Multimodal) and backbone.modalities else None
    return Merged(Path(output), len(probes), energy, forces, references, added or tuned, added is not None)


def _written(backbone: Backbone, path: Path, dtype: str | None, added: str | None) -> Backbone:
    """What was written and read back.

    Raises:
        InputError: the file cannot be written in this precision.
    """
    if added is not None:
        assert isinstance(backbone, Multimodal)
        backbone.save_modality(path, added, None if dtype is None else backbone.dtype)
    elif (dtype is not None and backbone.dtype != backbone.stored_dtype) or not backbone.save_into_source(path):
        backbone.save(path)
    again = backbone.read_back(path)
    if dtype is not None and again.stored_dtype != backbone.dtype:
        written = str(again.stored_dtype).removeprefix("torch.")
        raise InputError(f"--dtype {dtype}: this model is written in {written}; leave it out.")
    if added is not None:
        assert isinstance(again, Multimodal)
        return again.with_modality(added)
    return again


def _new_modality(backbone: Backbone, run: Path, wanted: str | None) -> str | None:
    """The name of the modality to add; None where the one that was tuned is replaced, or there is none.

    Raises:
        InputError: a modality is asked for where none can be added, or there is one of this name already.
    """
    known = backbone.modalities if isinstance(backbone, Multimodal) else ()
    if wanted is not None and not known:
        raise InputError(f"--modality {wanted}: {backbone.base.name} has no modalities; leave it out.")
    if not known or wanted == backbone.head:
        return None
    adapter = attached(backbone)
    kinds = {site.kind for site in adapter.sites if adapter.part(site, WeightUpdate) is not None}
    if kinds != {"modality"}:
        if wanted is None:
            return None
        raise InputError(
            f"--modality {wanted}: method {adapter.method.name} has changed layers that all modalities share, so that "
            f"{backbone.head} is replaced and none can be added beside it; leave it out, or train with --method "
            "modality."
        )
    if wanted is None:
        folder = run.resolve()
        named = folder.parent.name if folder.name == "adapter" else folder.name
        wanted = next((name for name in (named, "forcetune") if name and name not in known), None)
    if not wanted or wanted in known:
        raise InputError(f"{backbone.base.name} has the modality {wanted} already; name the new one with --modality.")
    return wanted


def _check_others(backbone: Backbone, written: Backbone, probes: Sequence[Frame], output: str | Path) -> None:
    """
    Raises:
        ForcetuneError: a modality that was there before is no longer what it was.
    """
    assert isinstance(backbone, Multimodal) and isinstance(written, Multimodal)
    for name in backbone.modalities:
        one, other = backbone.with_modality(name), written.with_modality(name)
        before, after = (predict(model, graphs_of(model, probes), stress=True) for model in (one, other))
        worst = max(_differences(before, after, one.reference_energies, other.reference_energies))
        if not worst <= PARITY["float32"]:
            raise ForcetuneError(
                f"{output}: modality {name} would no longer be what it was ({worst:.1e}, relative); nothing was "
                "written. Please report this with the adapter's configuration."
            )


def _check_output(output: Path, base: Base) -> None:
    """
    Raises:
        InputError: writing there would replace the base or a copy of it, or a file that is no merged model.
    """
    target = path_of(output)
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file, such as {target / 'tuned.model'}.")
    if not target.exists():
        return
    source = _file_of(base.source)
    if (source is not None and target.samefile(source)) or sha256_of(target) == base.sha256:
        raise InputError(f"{target}: is the base of this adapter and stays as it is; choose another name.")
    if target.suffix not in MODEL_SUFFIXES or target.name == BASE_NAME:
        raise InputError(f"{target}: exists and is no merged model; choose another name, such as tuned.model.")


def _file_of(source: str) -> Path | None:
    """The file that a name or path stands for; None where it is no longer there."""
    try:
        return resolve(source).path if source else None
    except ForcetuneError:
        return None


def _reference_differences(backbone: Backbone, written: Backbone) -> tuple[float, float]:
    """The largest difference of reference energies, eV, and the largest that rounding explains."""
    wanted, found = backbone.reference_energies, written.reference_energies
    largest = max((abs(energy) for energy in wanted.values()), default=0.0)
    return max(abs(found[z] - wanted[z]) for z in wanted), torch.finfo(written.stored_dtype).eps * largest


def _differences(
    before: Predictions, after: Predictions, references: Mapping[int, float], written: Mapping[int, float]
) -> tuple[float, float]:
    """The largest relative differences of interaction energies, and of forces and stress.

    Energies are compared without reference energies: those of all electrons of a heavy atom are 10⁵ eV, of which the
    parameters of a float32 model keep no more than some meV, which says nothing about the merged weights.
    """
    one, other = (_interaction(found, energies) for found, energies in ((before, references), (after, written)))
    # total energies are float64 numbers, too
    rounding = 4 * np.finfo(np.float64).eps * np.abs(before.energy).max()
    energy = max(np.abs(other - one).max() - rounding, 0.0) / max(np.abs(one).max(), 1e-12)
    pairs = [(before.forces, after.forces)]
    if before.stress is not None and after.stress is not None:
        pairs.append((before.stress, after.stress))
    forces = max(np.abs(new - old).max() / max(np.abs(old).max(), 1e-12) for old, new in pairs)
    return float(energy), float(forces)


def _interaction(found: Predictions, references: Mapping[int, float]) -> FloatArray:
    """(frames,) energies, eV, without those of the isolated atoms."""
    ends = np.cumsum(found.atoms)
    offsets = [math.fsum(references[int(z)] for z in part) for part in np.split(found.numbers, ends[:-1])]
    return found.energy - np.array(offsets)


def probe_frames(elements: tuple[int, ...], cutoff: float, seed: int = 0) -> list[Frame]:
    """Random structures that together hold every element: clusters, crystals, and an isolated atom."""
    rng = np.random.default_rng(seed)
    frames = []
    chosen = rng.permutation(np.repeat(elements, 3))
    for index, numbers in enumerate(np.array_split(chosen, max(2, len(chosen) // 12))):
        box = max(cutoff, 2.2 * len(numbers) ** (1 / 3))
        positions = _apart(rng, len(numbers), box)
        periodic = index % 2 == 1
        cell = box * (np.eye(3) + 0.1 * rng.standard_normal((3, 3))) if periodic else np.zeros((3, 3))
        frames.append(_frame(numbers, positions @ (cell / box) if periodic else positions, cell, periodic))
    frames.append(_frame(chosen[:1], np.zeros((1, 3)), np.zeros((3, 3)), periodic=False))
    return frames


def _apart(rng: np.random.Generator, count: int, box: float, nearest: float = 1.0) -> np.ndarray:
    """(count, 3) positions in a cube, no two nearer than ``nearest`` Å, images in a periodic cube included."""
    positions: list[np.ndarray] = []
    while len(positions) < count:
        trial = rng.uniform(0, box, 3)
        vectors = np.array(positions).reshape(-1, 3) - trial
        vectors -= box * np.round(vectors / box)
        if not positions or np.linalg.norm(vectors, axis=1).min() > nearest:
            positions.append(trial)
    return np.array(positions)


def _frame(numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, periodic: bool) -> Frame:
    return Frame(
        numbers=np.asarray(numbers, dtype=np.int64),
        positions=positions,
        cell=cell,
        pbc=np.full(3, periodic),
        energy=None,
        forces=None,
        stress=None,
        origin=Origin("<probe>", 0),
    )
