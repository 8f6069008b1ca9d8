"""From base and adapter to one plain model of the backbone's own library, proven equal before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from forcetune.adapters.attach import check_mergeable, merge_weights, require_adapter
from forcetune.adapters.hub import is_hub_reference, read_reference
from forcetune.adapters.updates import WeightUpdate
from forcetune.backbones.protocol import Backbone, Base, Multimodal
from forcetune.backbones.registry import resolve
from forcetune.deployment.loading import BASE_NAME, deploy_copy
from forcetune.deployment.parity import PARITY, probe_frames, relative_differences
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from forcetune.frames.frame import Frame
from forcetune.utils.files import as_path, atomic_path, compute_sha256

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
        run: run folder, adapter folder or ``hub:owner/name``.
        output: file to write, such as ``tuned.model``.
        model: the base, when it is no longer where it was in the run: name, path or loaded backbone, which stays as it
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
    check_merged_output(Path(output), backbone.base)
    probes = probe_frames(backbone.elements, backbone.cutoff)
    before = predict(backbone, build_graphs(backbone, probes), stress=True)
    place = read_reference(str(run)).name if is_hub_reference(run) else run
    added = _new_modality(backbone, Path(place), modality)
    merge_weights(backbone)
    return write_plain(backbone, output, before, probes, dtype=dtype, added=added)


def write_plain(
    backbone: Backbone,
    output: str | Path,
    before: Predictions,
    probes: Sequence[Frame],
    *,
    dtype: str | None = None,
    added: str | None = None,
) -> Merged:
    """Write a backbone without adapter, read it back, and compare, before the file takes its place.

    Args:
        backbone: with its weights as they are to be.
        output: file to write.
        before: what the written model has to predict for
        probes: these structures.
        dtype: precision of the written model, where one was asked for.
        added: name of a modality to add.

    Raises:
        InputError: the file cannot be written, or not in this precision.
        ForcetuneError: the written model disagrees; nothing is left at ``output``.
    """
    with atomic_path(output) as temporary:
        again = _written(backbone, temporary, dtype, added)
        after = predict(again, build_graphs(again, probes), stress=True)
        energy, forces = relative_differences(before, after, backbone.reference_energies, again.reference_energies)
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
    adapter = require_adapter(backbone)
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
        before, after = (predict(model, build_graphs(model, probes), stress=True) for model in (one, other))
        worst = max(relative_differences(before, after, one.reference_energies, other.reference_energies))
        if not worst <= PARITY["float32"]:
            raise ForcetuneError(
                f"{output}: modality {name} would no longer be what it was ({worst:.1e}, relative); nothing was "
                "written. Please report this with the adapter's configuration."
            )


def check_merged_output(output: Path, base: Base) -> None:
    """
    Raises:
        InputError: writing there would replace the base or a copy of it, or a file that is no merged model.
    """
    target = as_path(output)
    if target.is_dir():
        raise InputError(f"{target}: is a folder; name a file, such as {target / 'tuned.model'}.")
    if not target.exists():
        return
    source = _find_file(base.source)
    if (source is not None and target.samefile(source)) or compute_sha256(target) == base.sha256:
        raise InputError(f"{target}: is the base of this adapter and stays as it is; choose another name.")
    if target.suffix not in MODEL_SUFFIXES or target.name == BASE_NAME:
        raise InputError(f"{target}: exists and is no merged model; choose another name, such as tuned.model.")


def _find_file(source: str) -> Path | None:
    """The file that a name or path stands for; None where it is no longer there."""
    try:
        return resolve(source).path if source else None
    except ForcetuneError:
        return None


def _reference_differences(backbone: Backbone, written: Backbone) -> tuple[float, float]:
    """The largest difference of reference energies, eV, and the largest that rounding explains."""
    wanted, energies = backbone.reference_energies, written.reference_energies
    largest = max((abs(energy) for energy in wanted.values()), default=0.0)
    return max(abs(energies[z] - wanted[z]) for z in wanted), torch.finfo(written.stored_dtype).eps * largest
