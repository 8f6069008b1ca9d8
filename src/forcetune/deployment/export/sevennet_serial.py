"""SevenNet in LAMMPS by sevenn's ``pair_style e3gnn``."""

from __future__ import annotations

from pathlib import Path

from forcetune.backbones.protocol import Backbone, Multimodal
from forcetune.deployment.export.conversion import Converter, convert
from forcetune.deployment.export.target import Job, Parity, Target
from forcetune.deployment.parity import PARITY

CONVERTER = Converter(
    worker="sevennet_worker",
    modules=("sevenn",),
    install="sevenn",
    allowed=PARITY["float32"],
    precision="float32",
    checked_by="the TorchScript file, which computes in float32",
)


def write(job: Job, path: Path) -> Parity:
    """By sevenn's own converter on the merged checkpoint."""
    return convert(CONVERTER, job, path, {"parallel": False, "modality": chosen_modality(job.backbone)})


def chosen_modality(backbone: Backbone) -> str | None:
    """The modality to name to sevenn; None of a model without."""
    return backbone.head if isinstance(backbone, Multimodal) and backbone.modalities else None


TARGET = Target(
    name="sevennet-serial",
    about="pair_style e3gnn, of a LAMMPS patched by sevenn_patch_lammps: one GPU or CPU, TorchScript",
    libraries=("sevennet",),
    write=write,
)
