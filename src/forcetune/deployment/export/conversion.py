"""A library's own converter, called in a process of its own on the merged model, and what it wrote compared.

The process may belong to another environment: mace-torch and sevenn want different versions of e3nn. It gets a task
(JSON) and probes (arrays), and leaves the converted file and what that predicts. Arrays of probe k are ``numbers_k``,
``positions_k``, ``cell_k``, ``pbc_k``, and of its neighbors ``receivers_k``, ``senders_k``, ``unit_shifts_k`` and
``vectors_k`` (from receiver to sender, Å); ``count`` is the number of probes. Predictions are ``energy`` (probes,) eV,
``forces`` (atoms of all probes, 3) eV/Å and ``virial`` (probes, 3, 3), stress of ASE's sign times volume, eV.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

import forcetune.deployment.export.workers as workers
from forcetune.deployment.export.target import Job, Parity
from forcetune.deployment.merge import merge
from forcetune.deployment.parity import probe_frames, relative_differences
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import Predictions, build_graphs, predict
from forcetune.frames.frame import Frame
from forcetune.frames.neighbor_list import neighbours


@dataclass(frozen=True, slots=True)
class Converter:
    """How a library's converter is called.

    Attributes:
        worker: name of the script in :mod:`forcetune.deployment.export.workers`.
        modules: of Python that it needs.
        install: what ``pip install`` brings them by.
        allowed: largest relative difference of what was written.
        precision: that the library computes in.
        checked_by: what computes the probes, to be printed.
    """

    worker: str
    modules: tuple[str, ...]
    install: str
    allowed: float
    precision: str
    checked_by: str


def convert(converter: Converter, job: Job, path: Path, options: Mapping[str, Any]) -> Parity:
    """Merge, convert, compute probes with what was written, and compare.

    Args:
        converter: of the library.
        job: what to export.
        path: to write to.
        options: further entries of the worker's task.

    Raises:
        InputError: the library is not installed.
        ForcetuneError: the converter failed, or what it wrote differs from base + adapter.
    """
    _check_installed(converter, job.python)
    backbone = job.backbone
    probes = [frame for frame in probe_frames(backbone.elements, backbone.cutoff) if len(frame) > 1]
    before = predict(backbone, build_graphs(backbone, probes), stress=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        suffix = ".pth" if backbone.library == "sevennet" else ".model"
        converted = folder / f"converted{job.output.suffix}"
        _write_plain(job, folder / f"merged{suffix}")
        _write_probes(folder / "probes.npz", probes, backbone.cutoff)
        task = {
            "model": str(folder / f"merged{suffix}"),
            "output": str(converted),
            "probes": str(folder / "probes.npz"),
            "predictions": str(folder / "predictions.npz"),
            "symbols": [[chemical_symbols[z] for z in frame.numbers] for frame in probes],
            "elements": [chemical_symbols[z] for z in backbone.elements],
            "head": backbone.head,
            "forcetune": str(Path(__file__).parents[3]),
            **options,
        }
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        _run(converter, job, folder)
        with np.load(folder / "predictions.npz") as arrays:
            after = _predictions(before, probes, arrays)
        parity = _compared(converter, job, before, after, len(probes))
        _take_over(converted, path)
    return parity


def _write_plain(job: Job, path: Path) -> None:
    """The merged model, or the foundation model itself, as its library reads it."""
    if job.adapted:
        merge(job.run, path, model=job.base, dtype=job.dtype, trust=job.trust)
    elif not job.backbone.save_into_source(path):
        job.backbone.save(path)


def _write_probes(path: Path, probes: Sequence[Frame], cutoff: float) -> None:
    arrays: dict[str, np.ndarray] = {"count": np.array(len(probes))}
    for index, frame in enumerate(probes):
        (senders, receivers), shifts = neighbours(frame.positions, frame.cell, frame.pbc, cutoff)
        vectors = frame.positions[senders] - frame.positions[receivers] - shifts @ frame.cell
        values = {
            "numbers": frame.numbers,
            "positions": frame.positions,
            "cell": frame.cell,
            "pbc": frame.pbc,
            "senders": senders,
            "receivers": receivers,
            "unit_shifts": shifts,
            "vectors": vectors,
        }
        arrays |= {f"{name}_{index}": value for name, value in values.items()}
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]


def _check_installed(converter: Converter, python: str) -> None:
    """
    Raises:
        InputError: a module is missing, or there is no such interpreter.
    """
    probe = "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(n) is None for n in sys.argv[1:]))"
    try:
        missing = subprocess.run([python, "-c", probe, *converter.modules], capture_output=True).returncode
    except OSError as error:
        raise InputError(f"--python {python}: cannot be started ({error.strerror}).") from error
    if missing:
        raise InputError(
            f"{' and '.join(converter.modules)} is not installed in the Python {python}: pip install "
            f"{converter.install}, or name the interpreter of an environment that has it by --python."
        )


def _run(converter: Converter, job: Job, folder: Path) -> None:
    """
    Raises:
        ForcetuneError: the worker failed.
    """
    script = Path(workers.__file__).parent / f"{converter.worker}.py"
    command = [job.python, str(script), str(folder / "task.json")]
    run = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
    if run.returncode or not (folder / "predictions.npz").is_file():
        said = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        why = said[-1] if said else f"exit status {run.returncode}"
        raise ForcetuneError(
            f"{job.output}: the converter of {converter.modules[0]} failed ({why[:200]}); nothing was written."
        )


def _predictions(before: Predictions, probes: Sequence[Frame], arrays: Mapping[str, np.ndarray]) -> Predictions:
    volumes = np.array([abs(np.linalg.det(frame.cell)) if frame.has_volume else np.inf for frame in probes])
    virials = arrays["virial"]
    return replace(
        before,
        energy=arrays["energy"],
        forces=arrays["forces"],
        stress=(virials + virials.transpose(0, 2, 1)) / 2 / volumes[:, None, None],
    )


def _compared(converter: Converter, job: Job, before: Predictions, after: Predictions, count: int) -> Parity:
    """
    Raises:
        ForcetuneError: they differ by more than is allowed.
    """
    references = job.backbone.reference_energies
    energy, forces = relative_differences(before, after, references, references, precision=converter.precision)
    if not max(energy, forces) <= converter.allowed:
        raise ForcetuneError(
            f"{job.output}: the converted model differs from base + adapter by {max(energy, forces):.1e} (relative, "
            f"allowed {converter.allowed:.0e}); nothing was written."
        )
    return Parity(count, energy, forces, converter.checked_by)


def _take_over(converted: Path, path: Path) -> None:
    """Move a file, or the files of a folder, to where they belong."""
    if converted.is_dir():
        for file in converted.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    else:
        path.write_bytes(converted.read_bytes())
