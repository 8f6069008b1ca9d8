"""Small MACE models with random weights, of any kind, and structures to evaluate them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from forcetune.backbones.mace.library import import_mace
from forcetune.frames.neighbours import neighbours


def make_mace(
    kind: str = "ScaleShiftMACE",
    *,
    elements: Sequence[int] = (1, 6, 7, 8),
    heads: Sequence[str] = ("Default",),
    first: str = "RealAgnosticInteractionBlock",
    later: str = "RealAgnosticResidualInteractionBlock",
    hidden_irreps: str = "8x0e+8x1o",
    mlp_irreps: str = "4x0e",
    readout: str = "NonLinearReadoutBlock",
    gate: str | None = "silu",
    trainable_bessel: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **overrides: Any,
) -> nn.Module:
    """A MACE model with random weights, scales, shifts and reference energies; equal seeds give equal models.

    Args:
        kind: ``MACE`` or ``ScaleShiftMACE``.
        elements: atomic numbers.
        heads: names.
        first, later: classes of the interaction blocks.
        gate: name of the last readout's activation in torch.nn.functional or torch, or None.
        trainable_bessel: keep the frequencies of the radial basis as a parameter.
        dtype: of all floating-point tensors.
        overrides: further arguments of mace's constructor.
    """
    modules = import_mace()
    from e3nn import o3

    random = np.random.default_rng(seed)
    functions = {None: None, "tanh": torch.tanh, "abs": torch.abs}
    arguments: dict[str, Any] = {
        "r_max": 4.0,
        "num_bessel": 6,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": modules.interaction_classes[later],
        "interaction_cls_first": modules.interaction_classes[first],
        "num_interactions": 2,
        "num_elements": len(elements),
        "hidden_irreps": o3.Irreps(hidden_irreps),
        "MLP_irreps": o3.Irreps(mlp_irreps),
        "atomic_energies": random.normal(size=(len(heads), len(elements))),
        "avg_num_neighbors": 7.5,
        "atomic_numbers": list(elements),
        "correlation": 2,
        "gate": functions[gate] if gate in functions else getattr(nn.functional, str(gate)),
        "heads": list(heads),
        "radial_MLP": [16, 16],
        "readout_cls": getattr(modules.blocks, readout),
    }
    if kind == "ScaleShiftMACE":
        arguments["atomic_inter_scale"] = random.uniform(0.5, 1.5, len(heads)).tolist()
        arguments["atomic_inter_shift"] = random.normal(size=len(heads)).tolist()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(modules, kind)(**arguments | overrides)
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)  # biases start as zeros
    finally:
        torch.set_default_dtype(before)
    if trainable_bessel:
        basis = model.radial_embedding.bessel_fn
        weights = basis.bessel_weights
        del basis.bessel_weights
        basis.bessel_weights = nn.Parameter(weights * 1.01)
    return model.eval()


class Evaluation(NamedTuple):
    """Energy, eV; forces (atoms, 3), eV/Å; stress (3, 3), eV/Å³."""

    energy: Tensor
    forces: Tensor
    stress: Tensor


def structure(elements: Sequence[int] = (1, 6, 7, 8), *, atoms: int = 10, seed: int = 1) -> Atoms:
    """A periodic structure of atoms at random places, none of them too near to another."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*3 * [np.arange(3)]), axis=-1).reshape(-1, 3)[:atoms] * 1.8
    positions = grid + random.uniform(-0.3, 0.3, (atoms, 3))
    numbers = [elements[i % len(elements)] for i in range(atoms)]
    return Atoms(numbers, positions, cell=np.diag([5.6, 5.8, 6.0]) + 0.2, pbc=True)


def evaluate(model: Any, atoms: Atoms, *, head: int = 0) -> Evaluation:
    """What a model of the library gives, by its own forward pass, in its own precision."""
    dtype = model.node_embedding.linear.weight.dtype
    edge_index, unit_shifts = neighbours(atoms.positions, atoms.cell.array, atoms.pbc, float(model.r_max))
    table = [int(z) for z in model.atomic_numbers]
    species = torch.tensor([table.index(int(z)) for z in atoms.numbers])
    data = {
        "positions": torch.tensor(atoms.positions, dtype=dtype),
        "node_attrs": nn.functional.one_hot(species, len(table)).to(dtype),
        "edge_index": torch.tensor(edge_index),
        "shifts": torch.tensor(unit_shifts @ atoms.cell.array, dtype=dtype),
        "unit_shifts": torch.tensor(unit_shifts, dtype=dtype),
        "cell": torch.tensor(atoms.cell.array, dtype=dtype),
        "batch": torch.zeros(len(atoms), dtype=torch.int64),
        "ptr": torch.tensor([0, len(atoms)]),
        "head": torch.tensor([head]),
    }
    out = model(data, compute_force=True, compute_stress=True)
    return Evaluation(out["energy"].detach()[0], out["forces"].detach(), out["stress"].detach()[0])


def assert_same(left: Evaluation, right: Evaluation, tolerance: float = 1e-12) -> None:
    """Both models give the same energy, forces and stress, within an absolute ``tolerance``."""
    for name, one, other in zip(Evaluation._fields, left, right, strict=True):
        assert torch.isfinite(one).all()
        difference = (one.double() - other.double()).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"
