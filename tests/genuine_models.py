"""The models that genuine mace-torch versions are asked to make: architectures, forms of saving, structures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

VERSIONS = tuple(f"0.3.{k}" for k in range(3, 17))
QUICK_VERSIONS = ("0.3.3", "0.3.6", "0.3.10")

_FIRST = "RealAgnosticInteractionBlock"
_RESIDUAL = "RealAgnosticResidualInteractionBlock"
_ORGANIC = (1, 6, 7, 8, 16)
_OXIDES = (1, 3, 8, 11, 13, 14, 22, 26, 38, 57)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model to be made.

    Attributes:
        name: unique; also of its files.
        kind: class of the model.
        arguments: of its constructor, in JSON's types; classes, irreps and activations by name.
        form: how it is saved: ``saved`` (by torch.save), ``tuned`` (saved, loaded, trained and saved again),
            ``frozen``, ``cuda``, ``to_float32``, ``to_float64``, ``prepared``, ``compiled``, ``scripted``, ``lammps``,
            ``checkpoint``, ``state_dict``, ``legacy``.
        dtype: in which it is made.
        since, until: first and last version 0.3.x that can make it.
        quick: made for the tests that always run.
        refusal: words of the message, where it must be refused; empty where it must open.
    """

    name: str
    kind: str
    arguments: dict[str, Any]
    form: str = "saved"
    dtype: str = "float64"
    since: int = 3
    until: int = 16
    quick: bool = False
    refusal: str = ""

    @property
    def elements(self) -> tuple[int, ...]:
        return tuple(self.arguments["atomic_numbers"])

    def fits(self, version: str) -> bool:
        return self.since <= int(version.split(".")[2]) <= self.until


def _arguments(
    elements: tuple[int, ...], heads: tuple[str, ...] = (), *, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    count = max(1, len(heads))
    energies = random.normal(size=(count, len(elements))).tolist()
    arguments: dict[str, Any] = {
        "r_max": 4.5,
        "num_bessel": 8,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": _RESIDUAL,
        "interaction_cls_first": _FIRST,
        "num_interactions": 2,
        "num_elements": len(elements),
        "hidden_irreps": "8x0e+8x1o",
        "MLP_irreps": "8x0e",
        "atomic_energies": energies if heads else energies[0],
        "avg_num_neighbors": 9.25,
        "atomic_numbers": list(elements),
        "correlation": 2,
        "gate": "silu",
        "radial_MLP": [16, 16],
    }
    if heads:
        arguments["heads"] = list(heads)
    return arguments | changes


def _scaled(arguments: dict[str, Any]) -> dict[str, Any]:
    heads = len(arguments.get("heads", ()))
    scale, shift = [0.804154, 1.3, 0.71], [0.164097, -0.2, 0.05]
    if not heads:
        return arguments | {"atomic_inter_scale": scale[0], "atomic_inter_shift": shift[0]}
    return arguments | {"atomic_inter_scale": scale[:heads], "atomic_inter_shift": shift[:heads]}


def _scale_shift(name: str, *, elements: tuple[int, ...] = _ORGANIC, **options: Any) -> Recipe:
    own = {f: options.pop(f) for f in Recipe.__dataclass_fields__ if f in options}
    return Recipe(name, "ScaleShiftMACE", _scaled(_arguments(elements, **options)), **own)


def _plain(name: str, *, elements: tuple[int, ...] = _ORGANIC, **options: Any) -> Recipe:
    own = {f: options.pop(f) for f in Recipe.__dataclass_fields__ if f in options}
    return Recipe(name, "MACE", _arguments(elements, **options), **own)


_OFF = {
    "interaction_cls_first": _RESIDUAL,
    "r_max": 5.0,
    "max_ell": 3,
    "correlation": 3,
    "hidden_irreps": "16x0e+16x1o",
    "MLP_irreps": "16x0e",
    "radial_MLP": [64, 64, 64],
}
_MP = {
    **_OFF,
    "r_max": 6.0,
    "num_bessel": 10,
    "hidden_irreps": "8x0e+8x1o",
    "avg_num_neighbors": "61.964672446250916",
}
_DENSITY = {
    "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
    "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
}
_CLOSE = {"pair_repulsion": True, "distance_transform": "Agnesi"}
_NONLINEAR = {
    "interaction_cls": "RealAgnosticResidualNonLinearInteractionBlock",
    "interaction_cls_first": "RealAgnosticResidualNonLinearInteractionBlock",
    "readout_cls": "NonLinearBiasReadoutBlock",
    "use_agnostic_product": True,
    "apply_cutoff": False,
}


_OFF23 = _scale_shift("off23", trainable_bessel=True, quick=True, **_OFF)
_MP0 = _scale_shift("mp0", elements=_OXIDES, quick=True, **_MP)
_MP0B = _scale_shift("mp0b", elements=_OXIDES, since=7, quick=True, **(_MP | _DENSITY | _CLOSE))
_SMALL = _scale_shift("small")

RECIPES: tuple[Recipe, ...] = (
    # like the published ones
    _OFF23,
    replace(_OFF23, name="off23_float32", dtype="float32"),
    replace(_OFF23, name="off23_tuned", form="tuned", quick=False),
    _MP0,
    replace(_MP0, name="mp0_cuda", dtype="float32", form="cuda", quick=True),
    _MP0B,
    replace(_MP0B, name="mp0b_float32", dtype="float32", quick=False),
    _scale_shift("mp0_scalars", elements=_OXIDES, **(_MP | {"hidden_irreps": "8x0e"})),
    # each option by itself
    _SMALL,
    _plain("plain", quick=True),
    _plain("plain_residual", interaction_cls_first=_RESIDUAL, correlation=3, gate="tanh"),
    _scale_shift("repulsion", since=5, quick=True, **_CLOSE),
    _plain("plain_repulsion", since=5, pair_repulsion=True),
    _scale_shift("density", since=7, **_DENSITY),
    _scale_shift("heads", since=7, quick=True, heads=("pt_head", "Default", "mp")),
    _plain("plain_heads", since=7, heads=("a", "b")),
    _scale_shift("head_named", since=7, heads=("only",)),
    _plain("one_layer", num_interactions=1, quick=True),
    _scale_shift("one_layer_residual", num_interactions=1, interaction_cls_first=_RESIDUAL, correlation=3),
    _scale_shift("one_layer_scalars", num_interactions=1, hidden_irreps="8x0e"),
    _scale_shift("one_layer_heads", since=7, num_interactions=1, heads=("a", "b")),
    _scale_shift("three_layers", num_interactions=3, hidden_irreps="4x0e+4x1o", MLP_irreps="4x0e"),
    _scale_shift("scalars", hidden_irreps="8x0e", gate="abs"),
    _scale_shift("no_gate", gate=None, MLP_irreps="5x0e"),
    _scale_shift("order_two", hidden_irreps="4x0e+4x1o+4x2e", max_ell=3),
    _scale_shift("no_vectors", hidden_irreps="4x0e+4x2e"),
    _scale_shift("mixed_order", correlation=[3, 2]),
    _scale_shift("first_order", correlation=1, max_ell=1),
    _scale_shift("gaussian", radial_type="gaussian"),
    _scale_shift("chebyshev", since=5, radial_type="chebyshev", distance_transform="Agnesi"),
    _scale_shift("soft", since=5, distance_transform="Soft"),  # another function before 0.3.10
    _scale_shift("attention", interaction_cls="RealAgnosticAttResidualInteractionBlock", refusal="--trust"),
    _scale_shift("many_elements", elements=tuple(range(1, 90)), hidden_irreps="4x0e", MLP_irreps="4x0e"),
    _scale_shift("one_element", elements=(14,)),
    _scale_shift("unsorted_elements", elements=(8, 1, 7, 6)),
    _scale_shift("agnostic_product", since=14, use_agnostic_product=True),
    _scale_shift("nonlinear", since=14, **_NONLINEAR),
    # 0.3.14 computes other energies of them: it masks features of other heads behind the middle layer only
    _scale_shift("nonlinear_heads", since=14, heads=("a", "b"), **_NONLINEAR),
    _scale_shift("edge_irreps_later", since=14, edge_irreps="4x0e+4x1o", **_NONLINEAR),
    _scale_shift("edge_irreps", since=15, edge_irreps="4x0e+4x1o", use_edge_irreps_first=True, **_NONLINEAR),
    _scale_shift("pseudoscalars", since=14, hidden_irreps="4x0e+4x0o+4x1o+4x1e", MLP_irreps="4x0e"),
    _scale_shift("so3", since=14, use_so3=True, hidden_irreps="4x0e+4x1e", MLP_irreps="4x0e"),
    _scale_shift("last_readout", since=14, use_last_readout_only=True),
    _scale_shift("kept_irreps", since=16, keep_last_layer_irreps=True),
    _scale_shift(
        "charged",
        since=14,
        embedding_specs={"total_charge": {"type": "continuous", "in_dim": 1, "emb_dim": 4, "per": "graph"}},
        refusal="embeds further inputs",
    ),
    # each form by itself
    replace(_SMALL, name="small_float32", dtype="float32"),
    replace(_SMALL, name="small_tuned", form="tuned", quick=True),
    replace(_SMALL, name="small_frozen", form="frozen"),
    replace(_SMALL, name="small_cuda", form="cuda"),
    replace(_SMALL, name="small_to_float32", form="to_float32"),
    replace(_SMALL, name="small_to_float64", form="to_float64", dtype="float32"),
    replace(_SMALL, name="small_prepared", form="prepared", since=5),
    replace(_OFF23, name="off23_prepared", form="prepared", since=5, quick=False),
    replace(_SMALL, name="small_compiled", form="compiled"),
    replace(_SMALL, name="small_scripted", form="scripted", refusal="TorchScript"),
    replace(_SMALL, name="small_lammps", form="lammps", refusal="TorchScript"),
    replace(_SMALL, name="small_checkpoint", form="checkpoint", refusal="checkpoint"),
    replace(_SMALL, name="small_state_dict", form="state_dict", refusal="state dict"),
    replace(_SMALL, name="small_legacy", form="legacy", refusal="before 1.6"),
)
BY_NAME = {recipe.name: recipe for recipe in RECIPES}


def cases(versions: tuple[str, ...] = VERSIONS, *, quick: bool = False) -> list[tuple[str, str]]:
    """Pairs of version and recipe name."""
    return [(v, recipe.name) for v in versions for recipe in RECIPES if recipe.fits(v) and (recipe.quick or not quick)]


def structures(elements: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """A molecule, a triclinic crystal, two atoms close together, and a slab, as ``0/numbers`` … ``3/pbc``."""
    random = np.random.default_rng(seed)
    order = random.permutation(np.array(elements * 12)[: max(12, min(len(elements), 24))])
    grid = np.stack(np.meshgrid(*3 * [np.arange(3)]), axis=-1).reshape(-1, 3)

    def spread(count: int, distance: float) -> np.ndarray:
        return grid[:count] * distance + random.uniform(-0.25, 0.25, (count, 3))

    box = np.diag([5.4, 3.9, 5.6]) + random.uniform(-0.3, 0.3, (3, 3))
    few = order[:8]
    made = [
        (order, spread(len(order), 1.9), np.zeros((3, 3)), [False] * 3),
        (few, spread(8, 1.8), box, [True] * 3),
        (
            np.array([elements[0], elements[-1]]),
            np.array([[0.1, 0.2, 0.3], [0.1, 0.3, 1.05]]),
            np.zeros((3, 3)),
            [False] * 3,
        ),
        (few[::-1], spread(8, 1.8), np.diag([5.4, 3.9, 30.0]), [True, True, False]),
    ]
    table = {}
    for index, (numbers, positions, cell, pbc) in enumerate(made):
        table |= {
            f"{index}/numbers": np.asarray(numbers),
            f"{index}/positions": positions,
            f"{index}/cell": cell,
            f"{index}/pbc": np.array(pbc),
        }
    return table
