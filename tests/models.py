"""Small MACE models of mace's own with random weights, of any kind, and what mace computes with them: the oracle."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from forcetune.backbones.mace.library import import_mace
from forcetune.backbones.mace.trusted import LibraryMace
from forcetune.backbones.protocol import Base, Prediction
from forcetune.frames.neighbor_list import neighbours
from forcetune.graphs.graph import Batch

NONLINEAR = "RealAgnosticResidualNonLinearInteractionBlock"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "scale-shift": {},
    "plain": {"kind": "MACE"},
    "plain, up to 2e, order 3": {"kind": "MACE", "hidden_irreps": "6x0e+6x1o+6x2e", "correlation": 3, "max_ell": 3},
    "scalars only": {"hidden_irreps": "8x0e", "gate": "abs"},
    "order 1": {"correlation": 1, "gate": None},
    "order 4": {"correlation": 4, "hidden_irreps": "3x0e", "max_ell": 1},
    "mixed orders": {"correlation": [3, 2], "hidden_irreps": "4x0e"},
    "odd scalars": {"hidden_irreps": "6x0e+6x0o+6x1o+6x1e"},
    "odd scalars, order 3": {"hidden_irreps": "4x0e+4x0o+4x1o", "correlation": 3},
    "no parity": {"use_so3": True, "hidden_irreps": "4x0e+4x1e", "correlation": 3},
    "density, trainable basis": {
        "first": "RealAgnosticDensityInteractionBlock",
        "later": "RealAgnosticDensityResidualInteractionBlock",
        "trainable_bessel": True,
    },
    "density, cutoff on weights": {
        "first": "RealAgnosticDensityResidualInteractionBlock",
        "later": "RealAgnosticDensityResidualInteractionBlock",
        "apply_cutoff": False,
    },
    "residual from the first": {"first": "RealAgnosticResidualInteractionBlock"},
    "nonlinear residual": {"first": NONLINEAR, "later": NONLINEAR, "readout": "NonLinearBiasReadoutBlock"},
    "nonlinear, all options": {
        "first": NONLINEAR,
        "later": NONLINEAR,
        "readout": "NonLinearBiasReadoutBlock",
        "use_agnostic_product": True,
        "apply_cutoff": False,
        "edge_irreps": "4x0e+4x1o",
        "use_edge_irreps_first": True,
    },
    "agnostic product": {"use_agnostic_product": True},
    "pair repulsion, cutoff on weights": {
        "pair_repulsion": True,
        "apply_cutoff": False,
        "distance_transform": "Agnesi",
    },
    "soft, Gaussians": {"distance_transform": "Soft", "radial_type": "gaussian", "pair_repulsion": True},
    "Chebyshev": {"radial_type": "chebyshev", "gate": "tanh"},
    "Chebyshev, Agnesi": {"radial_type": "chebyshev", "distance_transform": "Agnesi"},
    "one layer": {"num_interactions": 1},
    "three layers": {"num_interactions": 3, "hidden_irreps": "4x0e+4x1o", "keep_last_layer_irreps": True},
    "last readout only": {"use_last_readout_only": True},
    "edge irreps": {"edge_irreps": "4x0e+4x1o"},
    "biased readout": {"readout": "NonLinearBiasReadoutBlock", "mlp_irreps": "3x0e"},
    "many elements": {"elements": tuple(range(1, 90)), "hidden_irreps": "4x0e"},
}
"""All that forcetune computes, option by option: arguments of :func:`make_mace`."""


def make_mace(kind: str = "ScaleShiftMACE", **options: Any) -> nn.Module:
    """A MACE model with random weights, scales, shifts and reference energies; equal seeds give equal models.

    Args:
        kind: ``MACE`` or ``ScaleShiftMACE``.
        options: of :func:`_make`, or further arguments of mace's constructor; irreps as text.
    """
    key = (kind, *sorted((name, repr(value)) for name, value in options.items()))
    if key not in _MADE:
        _MADE[key] = pickle.dumps(_make(kind, **options))
    return pickle.loads(_MADE[key])


_MADE: dict[tuple[Any, ...], bytes] = {}
"""Making a model takes a second, a copy a tenth of that."""


def _make(
    kind: str,
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
    """A new model.

    Args:
        kind: ``MACE`` or ``ScaleShiftMACE``.
        elements: atomic numbers.
        heads: names.
        first, later: classes of the interaction blocks.
        gate: name of the last readout's activation in torch.nn.functional or torch, or None.
        trainable_bessel: keep the frequencies of the radial basis as a parameter.
        dtype: of all floating-point tensors.
        overrides: further arguments of mace's constructor; irreps as text.
    """
    modules = import_mace()
    from e3nn import o3

    if "edge_irreps" in overrides:
        overrides["edge_irreps"] = o3.Irreps(overrides["edge_irreps"])

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
    with default_dtype(dtype), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(modules, kind)(**arguments | overrides)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim < 2:
                parameter.data += 0.1 * torch.randn_like(parameter)  # biases start as zeros
    if trainable_bessel:
        basis = model.radial_embedding.bessel_fn
        weights = basis.bessel_weights
        del basis.bessel_weights
        basis.bessel_weights = nn.Parameter(weights * 1.01)
    return model.eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """mace makes some tensors in PyTorch's default precision while it computes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Oracle(LibraryMace):
    """A module of mace that computes as it does where PyTorch's default is the model's precision."""

    def predict(self, batch: Batch, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        with default_dtype(self.dtype):
            return super().predict(batch, stress=stress, create_graph=create_graph)


def oracle(model: nn.Module, *, head: str | None = None, dtype: torch.dtype = torch.float64) -> Oracle:
    """mace itself behind the protocol, with a copy of this model."""
    base = Base("oracle", "", "", "unknown")
    own = pickle.loads(pickle.dumps(model))  # some parameters of mace cannot be copied
    return Oracle(own, base, reason="oracle", head=head, elements=None, dtype=dtype, device="cpu")


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
    with default_dtype(dtype):
        out = model(data, compute_force=True, compute_stress=True)
    return Evaluation(out["energy"].detach()[0], out["forces"].detach(), out["stress"].detach()[0])


def assert_same(left: Evaluation, right: Evaluation, tolerance: float = 1e-12) -> None:
    """Both models give the same energy, forces and stress, within an absolute ``tolerance``."""
    for name, one, other in zip(Evaluation._fields, left, right, strict=True):
        assert torch.isfinite(one).all()
        difference = (one.double() - other.double()).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"
