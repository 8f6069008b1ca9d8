"""From base and adapter to a file for another program, compared before it takes its place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from forcetune.adapters.attach import check_mergeable, get_adapter
from forcetune.backbones.protocol import Backbone, Base
from forcetune.backbones.registry import resolve
from forcetune.deployment.export.registry import TARGETS, find_target
from forcetune.deployment.export.target import Job, Parity, Target
from forcetune.deployment.loading import Deployed, adapter_folder, deploy, deploy_copy
from forcetune.errors import ForcetuneError, InputError
from forcetune.utils.files import as_path, atomic_folder, atomic_path, compute_sha256


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: file, or folder of some targets.
        target: its target.
        parity: how far it is from base + adapter.
    """

    path: Path
    target: Target
    parity: Parity


def export(
    run: str | Path,
    to: str,
    output: str | Path,
    *,
    model: str | Path | Backbone | None = None,
    head: str | None = None,
    dtype: str | None = None,
    trust: bool = False,
    python: str | None = None,
) -> Exported:
    """Write a fine-tuned model, or a foundation model, for another program.

    What was written is read back and compared with base + adapter on random structures of all its elements before it
    takes its place.

    Args:
        run: run folder, adapter folder, or a model by name or path.
        to: name of the target; ``forcetune.deployment.export.registry.TARGETS`` has all.
        output: file to write, or folder where the target needs several files.
        model: the base of an adapter, when it is no longer where it was in the run.
        head: of a model with several heads or modalities and without an adapter; adapters know theirs.
        dtype: ``float64`` or ``float32``; by default that of the training, or float64.
        trust: allow the base's file to run its own code where it cannot be rebuilt without.
        python: interpreter of the environment that has the library whose converter is called; by default this one.

    Raises:
        InputError: no such target, the model or its adapter does not fit the target, a library is not installed, or
            ``output`` is something else.
        ForcetuneError: what was written disagrees, or the converter failed; nothing is left at ``output``.
    """
    target = find_target(to)
    destination = as_path(output)
    deployed = _deployed(run, model, head, dtype, trust)
    backbone = deployed.backbone
    _check_fits(target, backbone, run)
    _check_output(target, destination, backbone.base)
    job = Job(
        backbone=backbone,
        run=run,
        base=model,
        output=destination,
        adapted=deployed.adapter is not None,
        dtype=dtype,
        trust=trust,
        python=python or sys.executable,
    )
    with _temporary(target, destination) as temporary:
        parity = target.write(job, temporary)
    return Exported(destination, target, parity)


def _deployed(
    run: str | Path, model: str | Path | Backbone | None, head: str | None, dtype: str | None, trust: bool
) -> Deployed:
    """
    Raises:
        InputError: a head or a base is named where it has no meaning, or nothing usable is at a path.
    """
    if adapter_folder(run) is not None:
        if head is not None:
            raise InputError("--head: adapters know their head; leave it out.")
        return deploy_copy(model, run, dtype=dtype, trust=trust)
    if model is not None:
        raise InputError(f"--model: {run} holds no adapter, which alone has a base; leave it out.")
    return deploy(run, head=head, device="cpu", dtype=dtype, trust=trust)


@contextmanager
def _temporary(target: Target, destination: Path) -> Iterator[Path]:
    with (atomic_folder if target.suffixes is None else atomic_path)(destination) as temporary:
        yield temporary


def _check_fits(target: Target, backbone: Backbone, run: str | Path) -> None:
    """
    Raises:
        InputError: the target is for other models, or carries no gates.
    """
    if backbone.library not in target.libraries:
        others = [name for name, one in TARGETS.items() if backbone.library in one.libraries]
        if not others:
            raise InputError(
                f"{run}: models of {backbone.library} are not exported. `forcetune merge` writes a file for the "
                "library's own converters, and docs/simulate.md shows how to run it in LAMMPS, torch-sim and OpenMM."
            )
        raise InputError(
            f"{run}: --to {target.name} takes models of {' and '.join(target.libraries)}, and this one is of "
            f"{backbone.library}; choose {' or '.join(others)}."
        )
    if target.gates or get_adapter(backbone) is None:
        return
    try:
        check_mergeable(backbone)
    except InputError as error:
        raise InputError(
            f"{run}: --to {target.name} needs a plain model. {str(error)[0].upper()}{str(error)[1:]} "
            f"--to {' or '.join(target.alternatives)} carries gates."
        ) from error


def _check_output(target: Target, destination: Path, base: Base) -> None:
    """
    Raises:
        InputError: the output has another suffix than the target's, or would replace something else.
    """
    if target.suffixes is None:
        others = [] if not destination.is_dir() else [p for p in destination.iterdir() if p.suffix != ".pt"]
        if others:
            raise InputError(f"{destination}: holds other files ({others[0].name}); name a folder of its own.")
        return
    if destination.is_dir():
        raise InputError(
            f"{destination}: is a folder; name a file, such as {destination / 'tuned'}{target.suffixes[0]}."
        )
    if destination.suffix not in target.suffixes:
        wanted = " or ".join(target.suffixes)
        raise InputError(f"{destination}: a file for {target.name} ends with {wanted}; name it so.")
    if not destination.exists():
        return
    source = None
    with suppress(ForcetuneError):  # where it is no longer there, it cannot be replaced
        source = resolve(base.source).path if base.source else None
    if (source is not None and destination.samefile(source)) or compute_sha256(destination) == base.sha256:
        raise InputError(f"{destination}: is the base of this model and stays as it is; choose another name.")
