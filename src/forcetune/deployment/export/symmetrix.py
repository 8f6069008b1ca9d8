"""MACE by symmetrix: LAMMPS without Python, and ASE."""

from __future__ import annotations

from pathlib import Path

from forcetune.deployment.export.conversion import Converter, convert
from forcetune.deployment.export.target import Job, Parity, Target

CONVERTER = Converter(
    worker="symmetrix_worker",
    modules=("symmetrix", "mace"),
    install="symmetrix-xl mace-torch",
    allowed=1e-4,
    precision="float64",
    checked_by="symmetrix's calculator in float64",
)
"""Radial functions become splines: forces agree to about 10⁻⁶, which short distances of random structures stretch."""


def write(job: Job, path: Path) -> Parity:
    """By ``symmetrix_extract_mace`` on the merged model."""
    return convert(CONVERTER, job, path, {})


TARGET = Target(
    name="symmetrix",
    about="pair_style symmetrix/mace, and symmetrix's calculator in ASE: JSON, radial functions as splines",
    libraries=("mace",),
    write=write,
    suffixes=(".json",),
)
