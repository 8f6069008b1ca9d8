"""MACE as TorchScript, for ``pair_style mace``, by mace-torch's own converter."""

from __future__ import annotations

from pathlib import Path

from forcetune.deployment.export.conversion import Converter, convert
from forcetune.deployment.export.target import Job, Parity, Target

CONVERTER = Converter(
    worker="mace_worker",
    modules=("mace",),
    install="mace-torch",
    allowed=1e-6,
    precision="float64",
    checked_by="the TorchScript file",
)


def write(job: Job, path: Path) -> Parity:
    """By ``mace_create_lammps_model`` on the merged model."""
    return convert(CONVERTER, job, path, {"format": "libtorch", "dtype": "float64"})


TARGET = Target(
    name="torchscript",
    about="pair_style mace no_domain_decomposition, of a LAMMPS with the package ML-MACE: TorchScript in float64",
    libraries=("mace",),
    write=write,
)
