"""Make, evaluate and deploy checkpoints with whichever sevenn is on the path; run by sevennet_oracle.py in a process of
its own.

Nothing of forcetune is imported here. The one argument is a JSON file with lists of work::

    {"make": [{"config": {…}, "species": […], "modalities": […], "seed": 0, "model": FILE}],
     "evaluate": [{"model": FILE, "modal": NAME or null, "structures": FILE, "results": FILE, "gradients": true}],
     "calculate": [{"model": FILE, "modal": NAME or null, "structures": FILE, "results": FILE}],
     "deploy": [{"model": FILE, "modal": NAME or null, "structures": FILE, "results": FILE, "folder": FOLDER}]}
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers

warnings.simplefilter("ignore")

import sevenn  # noqa: E402
import sevenn._const as constants  # noqa: E402
import sevenn._keys as KEY  # noqa: E402
from sevenn.atom_graph_data import AtomGraphData  # noqa: E402
from sevenn.model_build import build_E3_equivariant_model  # noqa: E402
from sevenn.nn.node_embedding import OnehotEmbedding, get_type_mapper_from_specie  # noqa: E402


def _before(minor: int) -> bool:
    return int(sevenn.__version__.split(".")[1]) < minor


def read_structures(path: str) -> list[Atoms]:
    with np.load(path) as table:
        count = 1 + max(int(name.split("/")[0]) for name in table.files)
        parts = [{name: table[f"{k}/{name}"] for name in ("numbers", "positions", "cell", "pbc")} for k in range(count)]
    return [Atoms(**part) for part in parts]


# ---- making --------------------------------------------------------------------------------------------------------


def make(work: dict[str, Any]) -> None:
    """A model by this version's own constructor with random weights, saved as its trainer does."""
    species = work["species"]
    type_map = {z: z for z in range(119)} if species == "univ" else get_type_mapper_from_specie(sorted(species))
    config: dict[str, Any] = dict(constants.DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG)
    config |= {
        KEY.CHEMICAL_SPECIES: sorted(species) if species != "univ" else species,
        "_number_of_species": len(type_map),
        "_type_map": type_map,
        "shift": 0.0,
        "scale": 1.0,
        "conv_denominator": 3.3,
        "version": sevenn.__version__,
        "_model_type": "E3_equivariant_model",
        "device": torch.device("cpu"),
        "batch_size": 4,
        "is_ddp": False,
    }
    if modalities := work.get("modalities"):
        config |= {
            "use_modality": True,
            "_number_of_modalities": len(modalities),
            "_modal_map": {name: index for index, name in enumerate(modalities)},
            "use_modal_wise_shift": False,
            "use_modal_wise_scale": False,
        }
    config |= work["config"]
    if _before(10):
        given = config["shift"], config["scale"]
        config["use_species_wise_shift_scale"] = by_species = any(isinstance(value, list) for value in given)
        if by_species:
            lists = [value if isinstance(value, list) else [value] * len(type_map) for value in given]
            config["shift"], config["scale"] = lists
    torch.manual_seed(work["seed"])
    model = build_E3_equivariant_model(dict(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("rescale"):
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.numel() > 1 else 0.0))
            elif name.endswith("denominator"):
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            else:
                # biases start as zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    content = {
        "config": config,
        "epoch": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "time": "2026-01-01 00:00",
        "hash": "0" * 32,
    }
    torch.save(content, work["model"])


# ---- evaluating ----------------------------------------------------------------------------------------------------


def _one_hot_in_double(self: Any, data: Any) -> Any:
    """As sevenn's, which casts to float32."""
    indices = data[self.key_x]
    embedding = torch.nn.functional.one_hot(indices, self.num_classes).to(torch.float64)
    data[self.key_output] = embedding
    if self.key_additional_output is not None:
        data[self.key_additional_output] = embedding
    if self.key_save is not None:
        data[self.key_save] = indices
    return data


def _batch(atoms: Atoms, cutoff: float, modal: str | None) -> Any:
    """A batch of one graph, in float64 from the positions on."""
    from sevenn.train.dataload import unlabeled_atoms_to_graph
    from torch_geometric.loader.dataloader import Collater

    data = AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, cutoff, with_shift=True))
    if modal is not None:
        data[KEY.DATA_MODALITY] = modal
    for key, value in list(data.items()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            data[key] = value.double()
    positions, cell = torch.tensor(atoms.positions), torch.tensor(atoms.cell.array)
    sender, receiver = data[KEY.EDGE_IDX]
    data[KEY.POS], data[KEY.CELL] = positions, cell
    data[KEY.EDGE_VEC] = positions[receiver] - positions[sender] + data[KEY.CELL_SHIFT].double() @ cell
    if atoms.cell.volume > 0:
        data[KEY.CELL_VOLUME] = torch.tensor(atoms.cell.volume)
    return Collater([data])([data])


def evaluate(work: dict[str, Any]) -> None:
    """Energies, forces, stress (ASE's order and sign) and gradients of a loss, in float64."""
    from sevenn.checkpoint import SevenNetCheckpoint

    OnehotEmbedding.forward = _one_hot_in_double  # pyright: ignore[reportAttributeAccessIssue]
    checkpoint = SevenNetCheckpoint(work["model"])
    model = checkpoint.build_model().double().train()  # forces can be differentiated when it trains
    model.set_is_batch_data(True)
    torch.set_default_dtype(torch.float64)
    results: dict[str, np.ndarray] = {}
    loss = torch.zeros(())
    for index, atoms in enumerate(read_structures(work["structures"])):
        found = model(_batch(atoms, checkpoint.config["cutoff"], work["modal"]))
        energy, forces = found[KEY.PRED_TOTAL_ENERGY], found[KEY.PRED_FORCE]
        loss = loss + 1e-3 * energy.square().sum() + forces.square().sum()
        results |= {f"{index}/energy": energy[0].detach().numpy(), f"{index}/forces": forces.detach().numpy()}
        if atoms.pbc.all():
            stress = -found[KEY.PRED_STRESS][0][[0, 1, 2, 4, 5, 3]]
            loss = loss + stress.square().sum()
            results[f"{index}/stress"] = stress.detach().numpy()
    if work.get("gradients"):
        results |= gradients(model, loss, checkpoint)
    np.savez(work["results"], **results)  # pyright: ignore[reportArgumentType]
    torch.set_default_dtype(torch.float32)


def gradients(model: Any, loss: torch.Tensor, checkpoint: Any) -> dict[str, np.ndarray]:
    """∂loss/∂parameter in the layout of the file, by the names of the model."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    grads = torch.autograd.grad(loss, [value for _, value in named], allow_unused=True, materialize_grads=True)
    places = radial_places(model, checkpoint)
    results = {}
    for (name, _), grad in zip(named, grads, strict=True):
        if name in places:
            signed = places[name].flatten()
            moved = torch.zeros(grad.numel())
            moved[signed.abs().round().long() - 1] = grad.flatten() * signed.sign()
            grad = moved.view(grad.shape)
        results[f"grad/{name}"] = grad.numpy()
    return results


def radial_places(model: Any, checkpoint: Any) -> dict[str, torch.Tensor]:
    """Where the radial weights of an old file have gone: numbers of their places, from 1, negative where turned."""
    from sevenn.scripts.backward_compatibility import patch_state_dict_if_old

    state = checkpoint.model_state_dict
    last = {}
    for name, layer in model.named_modules():
        if name.endswith("_convolution"):
            full = f"{name}.weight_nn.layer{len(layer.weight_nn.hs) - 2}.weight"
            last[full] = dict(model.named_parameters())[full]
    # early files have spaces in these names
    own = {key.replace(" convolution", "_convolution"): key for key in state}
    for full, weight in last.items():
        state[own[full]] = torch.arange(1, weight.numel() + 1, dtype=torch.float64).view(weight.shape)
    torch.set_default_dtype(torch.float32)
    fresh = build_E3_equivariant_model(checkpoint.config)
    found = patch_state_dict_if_old(state, checkpoint.config, fresh)
    torch.set_default_dtype(torch.float64)
    return {full: found[full].double() for full in last}


# ---- calculator and deployment -------------------------------------------------------------------------------------


def _calculator(model: str, modal: str | None) -> Any:
    if _before(11):
        from sevenn.sevennet_calculator import SevenNetCalculator
    else:
        from sevenn.calculator import SevenNetCalculator
    return SevenNetCalculator(model, device="cpu", **({} if modal is None else {"modal": modal}))


def calculate(work: dict[str, Any]) -> None:
    """What this version's ASE calculator gives, in float32."""
    calculator = _calculator(work["model"], work["modal"])
    results = {}
    for index, atoms in enumerate(read_structures(work["structures"])):
        atoms.calc = calculator
        results[f"{index}/energy"] = np.array(atoms.get_potential_energy(), dtype=np.float64)
        results[f"{index}/forces"] = np.array(atoms.get_forces(), dtype=np.float64)
        if atoms.pbc.all():
            results[f"{index}/stress"] = np.array(atoms.get_stress(), dtype=np.float64)
    np.savez(work["results"], **results)  # pyright: ignore[reportArgumentType]


def deploy(work: dict[str, Any]) -> None:
    """``sevenn get_model``, serial and parallel, and the energies of the serial TorchScript model."""
    folder = Path(work["folder"])
    modal = [] if work["modal"] is None else ["-m", work["modal"]]
    for further, name in (([], "serial"), (["-p"], "parallel")):
        command = [sys.executable, "-P", "-W", "ignore", "-m", "sevenn.main.sevenn", "get_model", work["model"]]
        done = subprocess.run(
            [*command, "-o", str(folder / name), *modal, *further], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"get_model {further} failed: {done.stderr[-2000:]}")
    extra = {"chemical_symbols_to_index": b"", "cutoff": b""}
    model = torch.jit.load(str(folder / "serial.pt"), _extra_files=extra)
    symbols = extra["chemical_symbols_to_index"].decode().split()
    table = {atomic_numbers[symbol]: index for index, symbol in enumerate(symbols)}
    results = {"parallel": np.array(len(list((folder / "parallel").glob("*.pt"))))}
    for index, atoms in enumerate(read_structures(work["structures"])):
        batch = _batch(atoms, float(extra["cutoff"].decode()), None)
        data = {
            KEY.NODE_FEATURE: torch.tensor([table[int(z)] for z in atoms.numbers]),
            KEY.EDGE_IDX: batch[KEY.EDGE_IDX],
            KEY.EDGE_VEC: batch[KEY.EDGE_VEC].float(),
            KEY.NUM_ATOMS: torch.tensor(len(atoms)),
        }
        data[KEY.EDGE_VEC].requires_grad_()
        found = model(data)
        results[f"{index}/energy"] = found[KEY.PRED_TOTAL_ENERGY].detach().double().numpy().reshape(())
    np.savez(work["results"], **results)  # pyright: ignore[reportArgumentType]


def main() -> None:
    torch.set_num_threads(1)
    for kind, jobs in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        for job in jobs:
            {"make": make, "evaluate": evaluate, "calculate": calculate, "deploy": deploy}[kind](job)
    print(sevenn.__version__, "forcetune" in sys.modules)


main()
