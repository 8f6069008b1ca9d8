"""Make, evaluate and compile NequIP models with whichever nequip is on the path, in a process of its own.

Nothing of forcetune is imported here. The one argument is a JSON file with lists of work::

    {"make": [{"config": {…}, "trainer": NAME, "seed": 0, "data": FILE, "checkpoint": FILE, "package": FILE or null}],
     "evaluate": [{"model": FILE, "structures": FILE, "results": FILE, "gradients": true}],
     "calculate": [{"model": FILE, "structures": FILE, "results": FILE}],
     "compile": [{"model": FILE, "structures": FILE, "results": FILE, "folder": FOLDER, "mode": MODE}]}
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

warnings.simplefilter("ignore")

import hydra  # noqa: E402
import lightning  # noqa: E402
import nequip  # noqa: E402
from nequip.ase import NequIPCalculator  # noqa: E402
from nequip.data import from_ase  # noqa: E402
from nequip.utils import get_current_code_versions  # noqa: E402
from nequip.utils.global_state import get_latest_global_state, set_global_state  # noqa: E402

logging.disable(logging.INFO)
LOSS = {
    "_target_": "nequip.train.EnergyForceLoss",
    "per_atom_energy": True,
    "coeffs": {"total_energy": 1.0, "forces": 1.0},
}
METRICS = {"_target_": "nequip.train.EnergyForceMetrics", "coeffs": {"total_energy_rmse": 1.0, "forces_rmse": 1.0}}


def _early() -> bool:
    return int(nequip.__version__.split(".")[1]) < 16


def read_structures(path: str) -> list[Atoms]:
    with np.load(path) as table:
        count = 1 + max(int(name.split("/")[0]) for name in table.files)
        parts = [{name: table[f"{k}/{name}"] for name in ("numbers", "positions", "cell", "pbc")} for k in range(count)]
    return [Atoms(**part) for part in parts]


# ---- making --------------------------------------------------------------------------------------------------------


def make(work: dict[str, Any]) -> None:
    """A checkpoint as nequip-train writes it, with random weights, and a package made from it by nequip-package."""
    set_global_state()
    model = work["config"]
    types = _type_names(model)
    types_of = {"chemical_symbols": types} if _early() else {"model_type_names": types}
    data = {
        "_target_": "nequip.data.datamodule.ASEDataModule",
        "seed": 1,
        "split_dataset": {"file_path": work["data"], "train": 0.5, "val": 0.5},
        "transforms": [
            {"_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper", **types_of},
            {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": 4.0},
        ],
        "train_dataloader": {"_target_": "torch.utils.data.DataLoader", "batch_size": 1},
        "val_dataloader": {"_target_": "torch.utils.data.DataLoader", "batch_size": 1},
    }
    training = {
        "_target_": f"nequip.train.{work['trainer']}",
        "loss": LOSS,
        "val_metrics": METRICS,
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01},
        "model": model,
    }
    info = {
        "versions": get_current_code_versions(),
        "data": data,
        "trainer": {"_target_": "lightning.Trainer"},
        "global_options": get_latest_global_state(),
        "runs": ["train"],
        "training_module": training,
    }
    kind = hydra.utils.get_class(training["_target_"])
    options = {key: value for key, value in training.items() if key != "_target_"}
    datasets = {"train": 1, "val": 1, "test": 0, "predict": 0}
    module = kind(**options, num_datasets=datasets, info_dict=info)
    torch.manual_seed(work["seed"])
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(module, "ema"):
            for average in module.ema.ema_weights:
                average.add_(0.2 * torch.randn_like(average))
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(work["checkpoint"])
    if work["package"]:
        from nequip.scripts.package import main as package

        package(["build", work["checkpoint"], work["package"]])


def _type_names(config: dict[str, Any]) -> list[str]:
    return config["type_names"] if "type_names" in config else _type_names(config["model"])


# ---- evaluating ----------------------------------------------------------------------------------------------------


def _named_types(function: Any) -> dict[str, Any]:
    """What says that types are named after elements, which early versions take for granted."""
    name = "chemical_species_to_atom_type_map"
    return {name: True} if name in inspect.signature(function).parameters else {}


def _calculator(path: str) -> Any:
    """The ASE calculator of a saved model; it knows the elements by their names."""
    return NequIPCalculator._from_saved_model(path, device="cpu", **_named_types(NequIPCalculator._from_saved_model))


def evaluate(work: dict[str, Any]) -> None:
    """Energies, forces, stress (ASE's order and sign) and gradients of a loss, in the precision of the model."""
    calculator = _calculator(work["model"])
    model = calculator.model.train()
    results: dict[str, np.ndarray] = {}
    loss = torch.zeros((), dtype=torch.float64)
    for index, atoms in enumerate(read_structures(work["structures"])):
        data = from_ase(atoms)
        for transform in calculator.transforms:
            data = transform(data)
        found = model(data)
        energy, forces = found["total_energy"], found["forces"]
        loss = loss + 1e-3 * energy.square().sum() + forces.square().sum()
        results |= {f"{index}/energy": energy.detach().numpy().reshape(()), f"{index}/forces": forces.detach().numpy()}
        if atoms.pbc.all():
            stress = found["stress"].view(3, 3)[(0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)]
            loss = loss + stress.square().sum()
            results[f"{index}/stress"] = stress.detach().numpy()
    if work.get("gradients"):
        named = list(model.named_parameters())
        values = torch.autograd.grad(loss, [value for _, value in named], allow_unused=True, materialize_grads=True)
        for (name, _), value in zip(named, values, strict=True):
            results[f"grad/{name.removeprefix('model.').removeprefix('func.')}"] = value.numpy()
    np.savez(work["results"], **results)  # pyright: ignore[reportArgumentType]


def calculate(work: dict[str, Any]) -> None:
    """What the ASE calculator gives for a saved model."""
    _calculated(_calculator(work["model"]), work)


def _calculated(calculator: Any, work: dict[str, Any]) -> None:
    results = {}
    for index, atoms in enumerate(read_structures(work["structures"])):
        atoms.calc = calculator
        results[f"{index}/energy"] = np.array(atoms.get_potential_energy(), dtype=np.float64)
        results[f"{index}/forces"] = np.array(atoms.get_forces(), dtype=np.float64)
        if atoms.pbc.all():
            results[f"{index}/stress"] = np.array(atoms.get_stress(), dtype=np.float64)
    np.savez(work["results"], **results)  # pyright: ignore[reportArgumentType]


def compile_(work: dict[str, Any]) -> None:
    """``nequip-compile`` for ASE, and what the ASE calculator gives for that."""
    from nequip.scripts.compile import main as compile_model

    mode = work["mode"]
    target = str(Path(work["folder"]) / f"compiled.nequip.{'pth' if mode == 'torchscript' else 'pt2'}")
    application = [] if mode == "torchscript" else ["--target", "ase"]
    compile_model([work["model"], target, "--mode", mode, "--device", "cpu", *application])
    options = _named_types(NequIPCalculator.from_compiled_model)
    _calculated(NequIPCalculator.from_compiled_model(target, device="cpu", **options), work)


def main() -> None:
    torch.set_num_threads(1)
    work = {"make": make, "evaluate": evaluate, "calculate": calculate, "compile": compile_}
    for kind, jobs in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        for job in jobs:
            with contextlib.redirect_stdout(io.StringIO()):
                work[kind](job)
    print(nequip.__version__, "forcetune" in sys.modules)


main()
