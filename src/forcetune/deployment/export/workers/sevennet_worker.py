"""sevenn's TorchScript files for its pair styles ``e3gnn`` and ``e3gnn/parallel``."""

import json
import sys
from pathlib import Path

import numpy as np
import torch


def convert(task):
    from sevenn.scripts.deploy import deploy, deploy_parallel  # pyright: ignore[reportMissingImports]

    write = deploy_parallel if task["parallel"] else deploy
    write(task["model"], task["output"], task["modality"])


def index_elements(names, path):
    """Index of each element in the file's own order."""
    extra = {"chemical_symbols_to_index": ""}
    torch.jit.load(path, _extra_files=extra)
    symbols = extra["chemical_symbols_to_index"]
    symbols = symbols.decode() if isinstance(symbols, bytes) else symbols
    order = symbols.split()
    return torch.tensor([order.index(name) for name in names])


def summed(frame, gradients):
    """Forces and virial from derivatives by the vectors from receivers to senders, as sevenn's pair styles do."""
    receivers, senders, vectors = (torch.from_numpy(frame[name]) for name in ("receivers", "senders", "vectors"))
    gradients = gradients.double()
    forces = torch.zeros(len(frame["symbols"]), 3, dtype=torch.float64)
    forces.index_add_(0, receivers, gradients).index_add_(0, senders, -gradients)
    return forces.numpy(), (vectors.T @ gradients).numpy()


def serial(task, frame):
    path = task["output"]
    vectors = torch.from_numpy(frame["vectors"]).float().requires_grad_()
    count = torch.tensor([len(frame["symbols"])])
    output = torch.jit.load(path)(
        {
            "x": index_elements(frame["symbols"], path),
            "edge_index": torch.from_numpy(np.stack([frame["receivers"], frame["senders"]])),
            "edge_vec": vectors,
            "num_atoms": count,
            "nlocal": count,
        }
    )
    energy = output["inferred_total_energy"].squeeze()
    (gradients,) = torch.autograd.grad([energy], [vectors])
    return float(energy), *summed(frame, gradients)


def parallel(task, frame):
    """Two ranks in step: the features of ghosts are those that their owners have computed."""
    paths = sorted(Path(task["output"]).glob("*.pt"), key=lambda path: int(path.stem.split("_")[-1]))
    species = index_elements(frame["symbols"], str(paths[0]))
    half = max(1, len(species) // 2)
    owned = [torch.arange(half), torch.arange(half, len(species))]
    receivers, senders, vectors = (torch.from_numpy(frame[name]) for name in ("receivers", "senders", "vectors"))
    states, ghosts, edges = [], [], []
    for atoms in owned:
        mine = torch.isin(receivers, atoms)
        near = torch.unique(senders[mine])
        outside = near[~torch.isin(near, atoms)]
        place = torch.full((len(species),), -1)
        place[atoms] = torch.arange(len(atoms))
        place[outside] = len(atoms) + torch.arange(len(outside))
        own = vectors[mine].float().requires_grad_()
        count = torch.tensor([len(atoms)])
        states.append(
            {
                "x": species[atoms],
                "x_ghost": species[outside],
                "edge_index": torch.stack([place[receivers[mine]], place[senders[mine]]]),
                "edge_vec": own,
                "num_atoms": count,
                "nlocal": count,
            }
        )
        ghosts.append(outside)
        edges.append((mine, own))
    for index, path in enumerate(paths):
        segment = torch.jit.load(str(path))
        if index:
            features = torch.cat([state["x"] for state in states])
            for state, outside in zip(states, ghosts, strict=True):
                state["x_ghost"] = features[outside]
        states = [segment(state) for state in states]
    energy = torch.stack([state["inferred_total_energy"].squeeze() for state in states]).sum()
    gradients = torch.zeros_like(vectors)
    parts = torch.autograd.grad([energy], [own for _, own in edges])
    for (mine, _), part in zip(edges, parts, strict=True):
        gradients[mine] = part.double()
    return float(energy), *summed(frame, gradients)


def main(task):
    convert(task)
    with np.load(task["probes"]) as arrays:
        energies, forces, virials = [], [], []
        for index in range(int(arrays["count"])):
            names = ("receivers", "senders", "vectors")
            frame = {name: arrays[f"{name}_{index}"] for name in names} | {"symbols": task["symbols"][index]}
            energy, force, virial = (parallel if task["parallel"] else serial)(task, frame)
            energies.append(energy)
            forces.append(force)
            virials.append(virial)
    np.savez(task["predictions"], energy=energies, forces=np.concatenate(forces), virial=np.stack(virials))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
