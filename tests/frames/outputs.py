"""Outputs of other programs, written as small as their readers allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

RULE = "-" * 83


def salt(seed: int = 0) -> Atoms:
    """A skewed cell with two kinds of atoms."""
    rng = np.random.default_rng(seed)
    cell = np.array([[4.0, 0.0, 0.0], [0.5, 4.2, 0.0], [0.2, -0.3, 4.4]])
    places = np.array([[0.0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]) + rng.uniform(-0.03, 0.03, (4, 3))
    return Atoms("Na2Cl2", scaled_positions=places % 1, cell=cell, pbc=True)


def labels(seed: int = 0, atoms: int = 4) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces that add up to nothing, and a symmetric (3, 3) stress, with few decimals."""
    rng = np.random.default_rng(100 + seed)
    forces = np.round(rng.normal(size=(atoms, 3)), 4)
    forces -= forces.mean(axis=0)
    stress = np.round(rng.normal(size=(3, 3)), 3)
    return round(float(-10 - rng.uniform()), 6), forces, stress + stress.T


def write_outcar(path: Path, converged: Sequence[bool], smearing: float = 0.25) -> Path:
    """An OUTCAR with one ionic step for each entry; TOTEN is the energy of :func:`labels`, stress in kbar of pressure.

    Args:
        path: the file.
        converged: whether the electronic loop of each step reached EDIFF.
        smearing: what the energy extrapolated to zero smearing lies above TOTEN, eV.
    """
    lines = [" vasp.6.3.2 27Jun22 (build Aug 12 2022 00:53:59) complex", " POTCAR:    PAW_PBE Na 08Apr2002"]
    # each POTCAR is named twice
    lines += [
        " POTCAR:    PAW_PBE Cl 06Sep2000",
        *lines[1:],
        " POTCAR:    PAW_PBE Cl 06Sep2000",
        "   ISPIN  =      1    spin polarized calculation?",
    ]
    lines += ["   ions per type =               2   2"]
    for step, reached in enumerate(converged):
        atoms = salt(step)
        energy, forces, stress = labels(step)
        for loop in (1, 2):
            lines.append(
                f"--------------------------------------- Iteration {step + 1:6d}({loop:4d})  ------------------"
            )
        said = "EDIFF is reached" if reached else "EDIFF was not reached (unconverged)"
        lines.append(f"------------------------ aborting loop {'because ' if reached else ''}{said} ---------")
        six = [stress[0, 0], stress[1, 1], stress[2, 2], stress[0, 1], stress[1, 2], stress[0, 2]]
        lines.append("  in kB     " + " ".join(f"{value:10.3f}" for value in six))
        lines.append("      direct lattice vectors                 reciprocal lattice vectors")
        lines += [f" {a:.9f} {b:.9f} {c:.9f} 0.0 0.0 0.0" for a, b, c in atoms.cell]
        lines += [" POSITION                                       TOTAL-FORCE (eV/Angst)", f" {RULE}"]
        lines += [
            " ".join(f"{value:.9f}" for value in (*place, *force))
            for place, force in zip(atoms.positions, forces, strict=True)
        ]
        lines += [f" {RULE}", "  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)", "  " + "-" * 51]
        lines += [f"  free  energy   TOTEN  =     {energy:.8f} eV", ""]
        extrapolated = energy + smearing
        lines += [f"  energy  without entropy=  {energy:.8f}  energy(sigma->0) =  {extrapolated:.8f}", ""]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _varray(name: str, rows: Any) -> str:
    inner = "".join(f"<v>{' '.join(f'{value:.10f}' for value in row)}</v>" for row in rows)
    return f'<varray name="{name}">{inner}</varray>'


def write_vasprun(path: Path, converged: Sequence[bool], smearing: float = 0.25) -> Path:
    """A vasprun.xml as :func:`write_outcar`'s OUTCAR, with NELM of 3."""

    def structure(atoms: Atoms, name: str = "") -> str:
        basis = f"<crystal>{_varray('basis', atoms.cell)}</crystal>"
        return f"<structure{name}>{basis}{_varray('positions', atoms.get_scaled_positions())}</structure>"

    kinds = "".join(f"<rc><c>{symbol}</c><c>1</c></rc>" for symbol in salt().symbols)
    parts = ["<?xml version='1.0' encoding='ISO-8859-1'?>\n<modeling>\n", '<kpoints><varray name="kpointlist">']
    parts += ['<v>0 0 0</v></varray><varray name="weights"><v>1</v></varray></kpoints>', "<parameters>"]
    parts += ['<i type="int" name="NELM">3</i><i name="EDIFF">0.0001</i></parameters>']
    parts += [f'<atominfo><array name="atoms"><set>{kinds}</set></array></atominfo>']
    parts += [structure(salt(), ' name="initialpos"')]
    for step, reached in enumerate(converged):
        energy, forces, stress = labels(step)
        parts.append("<calculation>")
        for loop in range(3):
            off = (2 - loop) * (1e-6 if reached else 0.5)
            inner = (
                f'<i name="e_fr_energy">{energy + off:.8f}</i><i name="e_0_energy">{energy + off + smearing:.8f}</i>'
            )
            parts.append(f"<scstep><energy>{inner}</energy></scstep>")
        parts += [structure(salt(step)), _varray("forces", forces), _varray("stress", stress)]
        parts += [f'<energy><i name="e_fr_energy">{energy:.8f}</i></energy></calculation>\n']
    path.write_text("".join(parts) + "</modeling>\n", encoding="latin-1")
    return path


def write_cp2k_output(path: Path, converged: bool = True, *, modern: bool = False) -> Path:
    """One geometry; labels of :func:`labels` stand for Hartree, Hartree/Bohr and GPa of pressure."""
    atoms = salt()
    energy, forces, stress = labels()
    lines = [" DBCSR| CPU Multiplication driver                                        XSMM"]
    lines += [" CP2K| version string:                          CP2K version 2023.1"]
    lines += [
        f" CELL| Vector {name} [angstrom]: {a:13.6f} {b:13.6f} {c:13.6f}    |{name}| = {np.linalg.norm((a, b, c)):.6f}"
        for name, (a, b, c) in zip("abc", atoms.cell, strict=True)
    ]
    lines += [" MODULE QUICKSTEP: ATOMIC COORDINATES IN ANGSTROM", ""]
    lines += ["   Atom Kind Element         X             Y             Z       Z(eff)     Mass", ""]
    lines += [
        f"      {k}    {1 + (symbol == 'Cl')} {symbol}  {z:3d} {x:13.8f} {y:13.8f} {w:13.8f}  7.0000  22.9898"
        for k, (symbol, z, (x, y, w)) in enumerate(zip(atoms.symbols, atoms.numbers, atoms.positions, strict=True), 1)
    ]
    lines += ["", "  *** SCF run converged in    12 steps ***" if converged else "  *** SCF run NOT converged ***", ""]
    unit = "hartree]" if modern else "a.u.]:"
    lines += [f" ENERGY| Total FORCE_EVAL ( QS ) energy [{unit}           {energy:.10f}", ""]
    if modern:
        lines += [" FORCES| Atomic forces [hartree/bohr]", " FORCES| Atom      x       y       z      |f|"]
        lines += [
            f" FORCES|  {k} " + " ".join(f"{v:.8E}" for v in (*row, np.linalg.norm(row)))
            for k, row in enumerate(forces, 1)
        ]
        lines += [" FORCES| Sum  0.0 0.0 0.0 0.0", "", " STRESS| Analytical stress tensor [GPa]"]
        lines += [" STRESS|                        x                   y                   z"]
        lines += [f" STRESS|      {n} {a:.10E} {b:.10E} {c:.10E}" for n, (a, b, c) in zip("xyz", stress, strict=True)]
        lines += [" STRESS| 1/3 Trace   0.0"]
    else:
        lines += [" ATOMIC FORCES in [a.u.]", "", " # Atom   Kind   Element          X              Y              Z"]
        lines += [
            f"      {k}      1      {symbol}     " + " ".join(f"{v:14.8f}" for v in row)
            for k, (symbol, row) in enumerate(zip(atoms.symbols, forces, strict=True), 1)
        ]
        lines += [" SUM OF ATOMIC FORCES          0.0  0.0  0.0    0.0", "", " STRESS TENSOR [GPa]", ""]
        lines += ["            X               Y               Z"]
        lines += [f"  {n} {a:15.8f} {b:15.8f} {c:15.8f}" for n, (a, b, c) in zip("XYZ", stress, strict=True)]
    path.write_text("\n".join([*lines, "", " The number of warnings for this run is : 0", ""]), encoding="utf-8")
    return path


def write_cp2k_trajectory(folder: Path, frames: int = 3, *, cells: bool = True, every: int = 1) -> Path:
    """``melt-pos-1.xyz`` with forces of each ``every``-th step and, if wanted, cells and stress beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    positions, forces, cell, stresses = (
        [],
        [],
        ["# Step Time [fs] Ax [Angstrom] Ay ... Volume"],
        ["# Step Time xx [bar]"],
    )
    for step in range(frames):
        atoms = salt(step)
        energy, force, stress = labels(step)
        comment = f" i = {step:8d}, time = {0.5 * step:12.3f}, E = {energy:20.10f}"
        for lines_of_part, rows in ((positions, atoms.positions), (forces, force)):
            if lines_of_part is positions or step % every == 0:
                lines_of_part += [str(len(atoms)), comment]
                lines_of_part += [
                    f"{symbol:>3} " + " ".join(f"{v:.10f}" for v in row)
                    for symbol, row in zip(atoms.symbols, rows, strict=True)
                ]
        cell.append(f"{step} {0.5 * step} " + " ".join(f"{v:.10f}" for v in atoms.cell.array.ravel()) + " 70.0")
        stresses.append(f"{step} {0.5 * step} " + " ".join(f"{v:.10f}" for v in stress.ravel()))
    named = {"melt-pos-1.xyz": positions, "melt-frc-1.xyz": forces}
    if cells:
        named |= {"melt-1.cell": cell, "melt-1.stress": stresses}
    for name, lines in named.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "melt-pos-1.xyz"


ORCA_WATER = np.array([[0.0, 0.0, 0.119], [0.0, 0.763, -0.477], [0.0, -0.763, -0.477]])


def write_orca(path: Path, *, steps: int = 1, last_gradient: bool = True) -> Path:
    """An output with geometries; energies and gradients of :func:`labels` stand for Hartree and Hartree/Bohr."""
    lines = [
        "",
        "                                 *****************",
        "                                 * O   R   C   A *",
    ]
    lines += ["                                 *****************", ""]
    for step in range(steps):
        energy, gradient, _ = labels(step, 3)
        lines += ["Number of atoms                             ...      3"]
        lines += ["---------------------------------", "CARTESIAN COORDINATES (ANGSTROEM)"]
        lines += ["---------------------------------"]
        lines += [
            f"  {symbol}   " + " ".join(f"{v:12.6f}" for v in row)
            for symbol, row in zip("OHH", ORCA_WATER + 0.01 * step, strict=True)
        ]
        lines += ["", "----------------------------", f"FINAL SINGLE POINT ENERGY     {energy:.12f}", ""]
        if last_gradient or step < steps - 1:
            lines += [
                "ORCA SCF GRADIENT CALCULATION",
                "------------------",
                "CARTESIAN GRADIENT",
                "------------------",
                "",
            ]
            lines += [
                f"   {k}   {symbol}   :  " + " ".join(f"{v:14.9f}" for v in row)
                for k, (symbol, row) in enumerate(zip("OHH", gradient, strict=True), 1)
            ]
        if step < steps - 1:
            lines += ["", "ORCA GEOMETRY RELAXATION STEP"]
    lines += ["", "THE OPTIMIZATION HAS CONVERGED", "                             ****ORCA TERMINATED NORMALLY****", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
