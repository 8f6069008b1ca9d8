"""mace-torch's files for LAMMPS: TorchScript for ``pair_style mace``, and its own object for ML-IAP."""

import json
import os
import runpy
import sys
from pathlib import Path

# merged models are pickles of mace's classes
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"

import numpy as np
import torch


def convert(task):
    model = torch.load(task["model"], map_location="cpu")
    heads = getattr(model, "heads", None)
    arguments = [task["model"], "--dtype", task["dtype"], "--format", task["format"]]
    if heads is not None and len(heads) > 1:
        arguments += ["--head", task["head"]]
    before, sys.argv = sys.argv, ["mace_create_lammps_model", *arguments]
    try:
        runpy.run_module("mace.cli.create_lammps_model", run_name="__main__")
    finally:
        sys.argv = before
    ending = "-mliap_lammps.pt" if task["format"] == "mliap" else "-lammps.pt"
    Path(task["model"] + ending).replace(task["output"])


def scripted(task, arrays):
    """Energies, forces and virials by the TorchScript file, all atoms local, neighbors by images of the cell."""
    model = torch.jit.load(task["output"])
    dtype = getattr(torch, task["dtype"])
    table = [int(z) for z in model.atomic_numbers]
    results = []
    for index in range(int(arrays["count"])):
        numbers, cell = arrays[f"numbers_{index}"], arrays[f"cell_{index}"]
        shifts = arrays[f"unit_shifts_{index}"]
        species = torch.tensor([table.index(int(z)) for z in numbers])
        volume = abs(np.linalg.det(cell))
        data = {
            "positions": torch.tensor(arrays[f"positions_{index}"], dtype=dtype).requires_grad_(),
            "node_attrs": torch.nn.functional.one_hot(species, len(table)).to(dtype),
            "edge_index": torch.tensor(np.stack([arrays[f"senders_{index}"], arrays[f"receivers_{index}"]])),
            "shifts": torch.tensor(shifts @ cell, dtype=dtype),
            "unit_shifts": torch.tensor(shifts, dtype=dtype),
            "cell": torch.tensor(cell, dtype=dtype),
            "batch": torch.zeros(len(numbers), dtype=torch.int64),
            "ptr": torch.tensor([0, len(numbers)]),
        }
        local = torch.ones(len(numbers), dtype=dtype)
        out = model(data, local, bool(volume > 0))
        virial = np.zeros((3, 3)) if out["virials"] is None else -out["virials"].detach().double().numpy().reshape(3, 3)
        energy = float(out["total_energy_local"].double())
        results.append((energy, out["forces"].detach().double().numpy(), virial))
    return results


def unified(task, arrays):
    """The same by mace's object for ML-IAP in forcetune's stand-in for LAMMPS."""
    sys.path.append(task["forcetune"])
    from forcetune.deployment.mliap.stand_in import run_lammps
    from forcetune.frames.frame import Frame, Origin

    def load():
        potential = torch.load(task["output"], weights_only=False)
        potential.interface = None
        return potential

    torch.set_default_dtype(getattr(torch, task["dtype"]))
    results = []
    for index in range(int(arrays["count"])):
        frame = Frame(
            numbers=arrays[f"numbers_{index}"],
            positions=arrays[f"positions_{index}"],
            cell=arrays[f"cell_{index}"],
            pbc=arrays[f"pbc_{index}"],
            energy=None,
            forces=None,
            stress=None,
            origin=Origin("<probe>", index),
        )
        result = run_lammps(load, frame)
        results.append((result.energy, result.forces, -(result.virial + result.virial.T) / 2))
    return results


def main(task):
    convert(task)
    with np.load(task["probes"]) as arrays:
        results = (unified if task["format"] == "mliap" else scripted)(task, arrays)
    energies, forces, virials = zip(*results, strict=True)
    np.savez(task["predictions"], energy=energies, forces=np.concatenate(forces), virial=np.stack(virials))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
