"""What a target of ``forcetune export`` is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from forcetune.backbones.protocol import Backbone


@dataclass(frozen=True, slots=True)
class Parity:
    """How far an exported file is from base + adapter.

    Attributes:
        n_probes: structures compared.
        energy: largest difference of interaction energies, relative to the largest one of the probes.
        forces: largest difference of forces, and of stresses where they are compared, relative to the largest.
        checked_by: what computed them, to be printed.
    """

    n_probes: int
    energy: float
    forces: float
    checked_by: str


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be exported.

    Attributes:
        backbone: base and adapter, nothing folded, on the CPU.
        run: run folder, adapter folder or model, as it was named.
        base: the base where it was named, or a copy of it.
        output: what the file or folder will be called.
        adapted: whether there is an adapter.
        dtype: precision that was asked for.
        trust: whether the base's file may run its own code.
        python: interpreter with the library of a converter.
    """

    backbone: Backbone
    run: str | Path
    base: str | Path | Backbone | None
    output: Path
    adapted: bool
    dtype: str | None
    trust: bool
    python: str


@dataclass(frozen=True, slots=True)
class Target:
    """Something that runs potentials, and how a file for it is written.

    Attributes:
        name: as ``--to`` takes it.
        about: one line for users: what runs it, and what that needs.
        libraries: of backbones that can be exported: ``mace``, ``sevennet``, ``nequip``.
        write: writes to a temporary path and compares; raises where it does not agree.
        gates: whether it carries what does not merge.
        suffixes: that an output file may have; the first is shown in messages. None: the output is a folder.
        alternatives: targets to name where the run does not fit.
    """

    name: str
    about: str
    libraries: tuple[str, ...]
    write: Callable[[Job, Path], Parity]
    gates: bool = False
    suffixes: tuple[str, ...] | None = (".pt",)
    alternatives: tuple[str, ...] = field(default=("lammps-mliap",))
