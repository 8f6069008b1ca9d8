"""symmetrix's JSON files, for its pair style and its calculator in ASE."""

import json
import os
import sys
from pathlib import Path

# merged models are pickles of mace's classes
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"

import numpy as np
import torch


def convert(task):
    from symmetrix.cli.extract_mace import main as extract  # pyright: ignore[reportMissingImports]

    arguments = ["--model", task["model"], "--output", task["output"], "--chemical-symbols", *task["elements"]]
    heads = getattr(torch.load(task["model"], map_location="cpu"), "heads", None)
    if heads is not None and len(heads) > 1:
        arguments += ["--head", task["head"]]
    if extract(arguments):
        raise SystemExit("symmetrix_extract_mace failed")


def main(task):
    from ase import Atoms
    from symmetrix import Symmetrix  # pyright: ignore[reportMissingImports]

    convert(task)
    energies, forces, virials = [], [], []
    # without the code that it compiles for each model, which takes minutes and gives the same
    calculator = Symmetrix(task["output"], dtype="float64", streamed_edges="non-compiled")
    with np.load(task["probes"]) as arrays:
        for index in range(int(arrays["count"])):
            cell, pbc = arrays[f"cell_{index}"], arrays[f"pbc_{index}"]
            atoms = Atoms(arrays[f"numbers_{index}"], arrays[f"positions_{index}"], cell=cell, pbc=pbc)
            if not pbc.any():
                atoms.center(vacuum=10.0)  # its neighbor search wants a cell of molecules, too
            atoms.calc = calculator
            energies.append(atoms.get_potential_energy())
            forces.append(atoms.get_forces())
            volume = abs(np.linalg.det(cell))
            virials.append(atoms.get_stress(voigt=False) * volume if volume > 0 else np.zeros((3, 3)))
    np.savez(task["predictions"], energy=energies, forces=np.concatenate(forces), virial=np.stack(virials))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
