"""Make, save and evaluate models with whichever mace-torch is on the path; run by genuine.py in a process of its own.

Nothing of forcetune is imported here. The one argument is a JSON file::

    {"make": [{"name": …, "form": …, "dtype": …, "arguments": {…}, "model": FILE, "results": FILE, "structures": FILE}],
     "evaluate": [{"model": FILE, "structures": FILE, "results": FILE}]}
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

torch.serialization.add_safe_globals([slice])

from e3nn import o3  # noqa: E402
from mace import modules  # noqa: E402
from mace.data.neighborhood import get_neighborhood  # noqa: E402

_CLASSES = ("interaction_cls", "interaction_cls_first")
_IRREPS = ("hidden_irreps", "MLP_irreps", "edge_irreps")
_ARRAYS = ("atomic_energies",)


def build_model(kind: str, arguments: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> Any:
    """A model by this version's own constructor, with random weights; biases are not left at zero."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(seed)
    given = dict(arguments)
    trainable_bessel = given.pop("trainable_bessel", False)
    for name in _CLASSES:
        given[name] = modules.interaction_classes[given[name]]
    for name in _IRREPS:
        if given.get(name) is not None:
            given[name] = o3.Irreps(given[name])
    for name in _ARRAYS:
        given[name] = np.array(given[name])
    if isinstance(given["avg_num_neighbors"], str):  # what a mean of NumPy's is
        given["avg_num_neighbors"] = np.float64(given["avg_num_neighbors"])
    gates = {None: None, "tanh": torch.tanh, "abs": torch.abs, "silu": torch.nn.functional.silu}
    given["gate"] = gates[given["gate"]]
    if "readout_cls" in given:
        given["readout_cls"] = getattr(modules.blocks, given["readout_cls"])
    model = getattr(modules, kind)(**given)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 1 and not parameter.any():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    if trainable_bessel:  # as in the versions before 0.3.0 that OFF23 began with
        basis = model.radial_embedding.bessel_fn
        again = type(basis)(r_max=given["r_max"], num_basis=given["num_bessel"], trainable=True)
        again.bessel_weights.data.mul_(1.01)
        model.radial_embedding.bessel_fn = again
    return model


def read_structures(path: str) -> list[dict[str, np.ndarray]]:
    with np.load(path) as table:
        count = 1 + max(int(name.split("/")[0]) for name in table.files)
        return [{key: table[f"{k}/{key}"] for key in ("numbers", "positions", "cell", "pbc")} for k in range(count)]


def model_inputs(model: Any, structure: dict[str, np.ndarray], head: int, dtype: torch.dtype) -> dict[str, Any]:
    """What this version's own data class would pass to the model."""
    pbc = tuple(bool(direction) for direction in structure["pbc"])
    edge_index, shifts, unit_shifts = get_neighborhood(
        positions=structure["positions"], cutoff=float(model.r_max), pbc=pbc, cell=structure["cell"].copy()
    )[:3]
    table = [int(z) for z in model.atomic_numbers]
    species = torch.tensor([table.index(int(z)) for z in structure["numbers"]])
    atoms = len(species)
    return {
        "positions": torch.tensor(structure["positions"], dtype=dtype),
        "node_attrs": nn.functional.one_hot(species, len(table)).to(dtype),
        "edge_index": torch.tensor(edge_index, dtype=torch.long),
        "shifts": torch.tensor(shifts, dtype=dtype),
        "unit_shifts": torch.tensor(unit_shifts, dtype=dtype),
        "cell": torch.tensor(structure["cell"], dtype=dtype),
        "batch": torch.zeros(atoms, dtype=torch.long),
        "ptr": torch.tensor([0, atoms]),
        "head": torch.tensor([head]),
        "total_charge": torch.zeros(1, dtype=dtype),
    }


def evaluate_model(model: Any, structures: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Energies, forces, stress of periodic structures and node features, of every head."""
    dtype = model.node_embedding.linear.weight.dtype
    torch.set_default_dtype(dtype)  # this version's code makes some of its tensors in the default
    found: dict[str, np.ndarray] = {}
    for head in range(len(getattr(model, "heads", ["Default"]))):
        for index, structure in enumerate(structures):
            crystal = bool(structure["pbc"].all())
            out = model(
                model_inputs(model, structure, head, dtype), compute_force=True, compute_stress=crystal, training=False
            )
            place = f"{index}/{head}"
            found[f"{place}/energy"] = out["energy"].detach().double().numpy()[0]
            found[f"{place}/forces"] = out["forces"].detach().double().numpy()
            if crystal:
                found[f"{place}/stress"] = out["stress"].detach().double().numpy()[0]
            if out.get("node_feats") is not None:
                found[f"{place}/node_feats"] = out["node_feats"].detach().double().numpy()
    return found


def parameter_gradients(model: Any, structures: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Gradients of E + Σ F² of the first two structures (head 0) with respect to every parameter."""
    dtype = model.node_embedding.linear.weight.dtype
    torch.set_default_dtype(dtype)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss: Any = 0.0
    for structure in structures[:2]:
        out = model(model_inputs(model, structure, 0, dtype), compute_force=True, training=True)
        loss = loss + out["energy"].sum() + (out["forces"] ** 2).sum()
    slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        f"grad/{name}": slope.detach().double().numpy()
        for name, slope in zip(named, slopes, strict=True)
        if slope is not None
    }


def fine_tune(model: Any, structures: list[dict[str, np.ndarray]]) -> None:
    """A few steps of Adam, as a user's own training would take."""
    dtype = model.node_embedding.linear.weight.dtype
    torch.set_default_dtype(dtype)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2, amsgrad=True)
    for _ in range(3):
        for structure in structures[:2]:
            optimizer.zero_grad(set_to_none=True)
            out = model(model_inputs(model, structure, 0, dtype), compute_force=True, training=True)
            (1e-3 * out["energy"].square().sum() + out["forces"].square().mean()).backward()
            optimizer.step()


def save_model(model: Any, form: str, job: dict[str, Any]) -> Any:
    """Save in the given form and return the model whose results are the file's."""
    path = job["model"]
    if form == "cuda":  # storages tagged as a GPU tags them; there is none here
        original = torch.serialization.location_tag
        torch.serialization.location_tag = lambda _: "cuda:0"
        try:
            torch.save(model, path)
        finally:
            torch.serialization.location_tag = original
    elif form == "scripted":  # what run_train writes as *_compiled.model
        from e3nn.util import jit

        torch.jit.save(jit.compile(copy.deepcopy(model)), path)
    elif form == "lammps":  # what create_lammps_model writes
        from e3nn.util import jit
        from mace.calculators import LAMMPS_MACE

        torch.jit.save(jit.compile(LAMMPS_MACE(copy.deepcopy(model))), path)
    elif form == "compiled":  # torch.compile before saving
        torch.save(torch.compile(model), path)
    elif form == "checkpoint":
        torch.save({"model": model.state_dict(), "optimizer": {}, "lr_scheduler": {}, "epoch": 3}, path)
    elif form == "state_dict":
        torch.save(model.state_dict(), path)
    elif form == "legacy":  # the format of torch before 1.6
        torch.save(model, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(model, path)
    return model


def make(job: dict[str, Any]) -> None:
    dtype = getattr(torch, job["dtype"])
    structures = read_structures(job["structures"])
    form = job["form"]

    def built() -> Any:
        return build_model(job["kind"], job["arguments"], dtype)

    if form == "prepared":
        built = importlib.import_module("mace.tools.compile").prepare(built)
    model = built()
    if form == "tuned":
        again = Path(job["model"] + ".before")
        torch.save(model, again)
        model = torch.load(again, map_location="cpu", weights_only=False)
        again.unlink()
        fine_tune(model, structures)
    if form == "to_float32":
        model = model.float()
    if form == "to_float64":
        model = model.double()
    if form == "frozen":
        for parameter in model.parameters():
            parameter.requires_grad = False
        model.eval()
    save_model(model, form, job)
    found = evaluate_model(model, structures)
    if dtype is torch.float64 and form in ("saved", "tuned"):
        found |= parameter_gradients(model, structures)
    if model.node_embedding.linear.weight.dtype is torch.float32:
        double = copy.deepcopy(model).double()
        found |= {f"double/{name}": value for name, value in evaluate_model(double, structures).items()}
    heads = [str(head) for head in getattr(model, "heads", ["Default"])]
    found["heads"] = np.array(heads)
    with np.load(job["structures"]) as table:
        found |= {f"structures/{name}": table[name] for name in table.files}
    np.savez_compressed(job["results"], **found)


def main() -> None:
    torch.set_num_threads(1)
    work = json.loads(Path(sys.argv[1]).read_text())
    for job in work.get("make", ()):
        try:
            make(job)
        except Exception as error:  # the others are made all the same
            print("FAILED", job["name"], f"{type(error).__name__}: {error}"[:500].replace("\n", " "), flush=True)
            traceback.print_exc()
    for job in work.get("evaluate", ()):
        model = torch.load(job["model"], map_location="cpu", weights_only=False)
        np.savez_compressed(job["results"], **evaluate_model(model, read_structures(job["structures"])))
        print("evaluated", job["model"], flush=True)


if __name__ == "__main__":
    main()
