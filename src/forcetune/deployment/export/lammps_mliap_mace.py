"""MACE in LAMMPS by mace-torch's own object for ML-IAP, with cuEquivariance."""

from __future__ import annotations

from pathlib import Path

from forcetune.deployment.export.conversion import Converter, convert
from forcetune.deployment.export.target import Job, Parity, Target

CONVERTER = Converter(
    worker="mace_worker",
    modules=("mace", "cuequivariance_torch"),
    install="mace-torch cuequivariance-torch",
    allowed=1e-6,
    precision="float64",
    checked_by="a stand-in for LAMMPS, not by LAMMPS itself",
)


def write(job: Job, path: Path) -> Parity:
    """By ``mace_create_lammps_model --format=mliap`` on the merged model."""
    return convert(CONVERTER, job, path, {"format": "mliap", "dtype": "float64"})


TARGET = Target(
    name="lammps-mliap-mace",
    about=(
        "pair_style mliap unified FILE 0 without forcetune: mace-torch and cuequivariance-torch in the Python of a "
        "LAMMPS of 2025 or later with KOKKOS, ML-IAP and PYTHON"
    ),
    libraries=("mace",),
    write=write,
)
