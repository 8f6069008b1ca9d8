"""SevenNet in LAMMPS on several GPUs by sevenn's ``pair_style e3gnn/parallel``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from forcetune.deployment.export import sevennet_serial
from forcetune.deployment.export.conversion import convert
from forcetune.deployment.export.target import Job, Parity, Target

CONVERTER = replace(
    sevennet_serial.CONVERTER, checked_by="the TorchScript files in turn, two ranks that exchange features, in float32"
)


def write(job: Job, path: Path) -> Parity:
    """By sevenn's own converter on the merged checkpoint: a folder with a file for each layer."""
    return convert(CONVERTER, job, path, {"parallel": True, "modality": sevennet_serial.chosen_modality(job.backbone)})


TARGET = Target(
    name="sevennet-parallel",
    about="pair_style e3gnn/parallel, of a LAMMPS patched by sevenn_patch_lammps: several GPUs, a folder of files",
    libraries=("sevennet",),
    write=write,
    suffixes=None,
)
