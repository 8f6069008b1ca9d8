"""Methods on SevenNet models: counts derived by hand, gates where there is no species, modalities, files."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.data import chemical_symbols

from forcetune.adapters.attach import attach, detach, require_adapter
from forcetune.adapters.file import load_adapter, save_adapter
from forcetune.adapters.methods import METHODS, method
from forcetune.adapters.updates import Gate
from forcetune.backbones.sevennet.backbone import SevenNetBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.runs.methods import compare_methods
from sevennet_models import BATTERY, RECIPES, Recipe, backbone_of, perturb, write_checkpoint
from systems import cluster, crystal, frames_of

# without polonium, astatine, radon, francium and radium
_SYMBOLS = [symbol for z, symbol in enumerate(chemical_symbols) if 0 < z < 95 and z not in (84, 85, 86, 87, 88)]
SEVENNET_0 = Recipe(
    {
        "irreps_manual": ["128x0e", *["128x0e+64x1e+32x2e"] * 4, "128x0e"],
        "num_convolution_layer": 5,
        "lmax": 2,
        "is_parity": False,
        "self_connection_type": "linear",
        "weight_nn_hidden_neurons": [64, 64],
        "radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 8},
        "cutoff": 5.0,
        "cutoff_function": {"cutoff_function_name": "XPLOR", "cutoff_on": 4.5},
    },
    _SYMBOLS,
)
"""The architecture of SevenNet-0."""
MF_0 = replace(
    SEVENNET_0,
    config={
        **SEVENNET_0.config,
        "use_modal_self_inter_intro": True,
        "use_modal_self_inter_outro": True,
        "use_modal_output_block": True,
        "use_modal_wise_shift": True,
    },
    modalities=("R2SCAN", "PBE"),
)

# by hand: features {order: channels}, and inputs of the gates, whose scalars are those of the features and of the gates
_FEATURES = [{0: 128}, *[{0: 128, 1: 64, 2: 32}] * 4, {0: 128}]
_GATES = [*[{0: 128 + 64 + 32, 1: 64, 2: 32}] * 4, {0: 128}]


def _messages(inputs: dict[int, int], outputs: dict[int, int]) -> dict[int, int]:
    """Channels of the paths to each order: l₁ and l₂ ≤ 2 couple to l where |l₁ − l₂| ≤ l ≤ l₁ + l₂."""
    return {
        order: sum(width for one, width in inputs.items() for two in range(3) if abs(one - two) <= order <= one + two)
        for order in outputs
    }


_Matrices = list[dict[int, tuple[int, int]]]  # of each layer, by order: (inputs, outputs)
_MESSAGES = [_messages(before, after) for before, after in pairwise(_FEATURES)]
_EMBEDDING: _Matrices = [{0: (89, 128)}]
_FIRST: _Matrices = [{order: (n, n) for order, n in before.items()} for before in _FEATURES[:-1]]
_SECOND: _Matrices = [
    {order: (n, gates[order]) for order, n in messages.items()}
    for messages, gates in zip(_MESSAGES, _GATES, strict=True)
]
_CONNECTION: _Matrices = [
    {order: (n, gates[order]) for order, n in before.items() if order in gates}
    for before, gates in zip(_FEATURES[:-1], _GATES, strict=True)
]
_READOUT: _Matrices = [{0: (128, 64)}, {0: (64, 1)}]
_RADIAL = [shape for messages in _MESSAGES for shape in ((8, 64), (64, 64), (64, sum(messages.values())))]
_BESSEL = 8


def _weights(layers: _Matrices) -> int:
    return sum(rows * columns for layer in layers for rows, columns in layer.values())


def _low_rank(shapes: list[tuple[int, int]]) -> int:
    return sum(16 * (rows + columns) for rows, columns in shapes)


def _shapes(layers: _Matrices) -> list[tuple[int, int]]:
    return [shape for layer in layers for shape in layer.values()]


def _gates(layers: _Matrices) -> int:
    """n_in r + r + r S + S + r n₀ + n₀."""
    total = 0
    for layer in layers:
        driven, shifted = layer[0]
        gained = sum(columns for order, (_, columns) in layer.items() if order)
        total += driven * 16 + 16 + 16 * gained + gained + 16 * shifted + shifted
    return total


LINEARS = _EMBEDDING + _FIRST + _SECOND
EXPECTED = {
    "full": _weights(LINEARS + _CONNECTION + _READOUT) + sum(a * b for a, b in _RADIAL) + _BESSEL,
    "elora": _low_rank(_shapes(LINEARS + _CONNECTION + _READOUT) + _RADIAL) + _BESSEL,
    "mmea": _gates(LINEARS + _READOUT) + _low_rank(_shapes(_CONNECTION) + _RADIAL) + _BESSEL,
    "sparse": _weights(LINEARS + _CONNECTION + _READOUT),
}


def test_derived_counts_are_the_published_ones() -> None:
    assert EXPECTED == {"full": 842_440, "elora": 231_464, "mmea": 188_729, "sparse": 596_160}


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, object]]:
    return {row["method"]: row for row in compare_methods(backbone_of(SEVENNET_0))}


@pytest.mark.parametrize("name", ["full", "elora", "mmea"])
def test_methods_train_what_was_derived(counts: dict[str, dict[str, object]], name: str) -> None:
    assert counts[name]["trainable"] == EXPECTED[name]
    assert counts[name]["total"] == EXPECTED["full"]


def test_sparse_wraps_what_was_derived(counts: dict[str, dict[str, object]]) -> None:
    coverage: list[dict[str, int]] = counts["sparse"]["coverage"]  # pyright: ignore[reportAssignmentType]
    assert sum(row["covered"] for row in coverage) == EXPECTED["sparse"]
    assert "modality" not in counts


def test_a_modality_is_a_row_of_every_layer_that_knows_it() -> None:
    rows = {row["method"]: row for row in compare_methods(backbone_of(MF_0))}
    # scalars that come out of the first and second linear layers, and of the first of the readout
    row = 5 * 128 + (4 * 224 + 128) + 64
    assert row == 1_728
    assert rows["modality"]["trainable"] == row
    assert rows["full"]["trainable"] == EXPECTED["full"] + row
    assert rows["elora"]["trainable"] == EXPECTED["elora"] + row
    # sevenn counts the rows of both
    assert EXPECTED["full"] + 2 * row == 845_896


def test_a_model_without_modalities_says_what_it_lacks() -> None:
    model = backbone_of(BATTERY["SevenNet, no parity, linear"])
    with pytest.raises(InputError, match=r"this model has no modalities: only multi-modal SevenNet models .*mf-0"):
        attach(model, method("modality"))


def test_gates_with_the_species_leave_linear_self_connections_alone() -> None:
    linear, coupled = (backbone_of(BATTERY[f"SevenNet, {name}"]) for name in ("no parity, linear", "fully connected"))
    gate = Gate(4, species=True)
    for model, reason in ((linear, "it does not know the species"), (coupled, None)):
        sites = [site for site in model.sites() if site.kind == "tensor_product"]
        assert len(sites) == model.content.architecture.n_layers
        assert {gate.unsupported_reason(site) for site in sites} == {reason}
    for name in ("mmea", "mmea-pure"):
        with_skip = attach(linear, method(name, skip=True)).trainable
        detach(linear)
        assert with_skip == attach(linear, method(name)).trainable
        detach(linear)
        with_skip = attach(coupled, method(name, skip=True)).trainable
        detach(coupled)
        assert with_skip > attach(coupled, method(name)).trainable
        detach(coupled)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recipe", BATTERY)
def test_adapters_are_saved_and_loaded(tmp_path: Path, recipe: str, name: str) -> None:
    if name == "modality" and not BATTERY[recipe].modalities:
        pytest.skip("has no modalities")
    file = write_checkpoint(tmp_path / "base.pth", BATTERY[recipe])
    head = next(iter(BATTERY[recipe].modalities), None)
    model = SevenNetBackbone.load(file, head=head, elements=[1, 6, 8])
    perturb(attach(model, method(name)))
    model.set_reference_energies({1: -13.5, 8: -2041.0})
    batches = build_graphs(model, frames_of(cluster((1, 6, 8)), crystal((1, 6, 8))))
    expected = predict(model, batches, stress=True)
    save_adapter(model, tmp_path / "adapter")
    detach(model)
    again = SevenNetBackbone.load(file, head=head, elements=[1, 6, 8])
    load_adapter(again, tmp_path / "adapter")
    prediction = predict(again, batches, stress=True)
    assert np.array_equal(prediction.energy, expected.energy)
    assert np.array_equal(prediction.forces, expected.forces)
    assert require_adapter(again).method.name == name


def test_an_adapter_of_one_modality_is_refused_by_another(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "base.pth", RECIPES["modalities, one shift"])
    model = SevenNetBackbone.load(file, head="a")
    perturb(attach(model, method("elora")))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(InputError, match="head"):
        load_adapter(SevenNetBackbone.load(file, head="b"), tmp_path / "adapter")


def test_cut_and_folded_models_keep_what_they_compute() -> None:
    model = backbone_of(BATTERY["SevenNet, modalities"])
    before = predict(model, build_graphs(model, frames_of(cluster((1, 6, 8)))))
    assert model.fingerprint() == model.base.fingerprint
    model.set_reference_energies({1: -13.587123456789})
    cut = model.cut_to([1, 6, 8])
    assert cut.elements == (1, 6, 8)
    prediction = predict(cut, build_graphs(cut, frames_of(cluster((1, 6, 8)))))
    assert np.array_equal(prediction.forces, before.forces)
    assert cut.reference_energies[1] == -13.587123456789
    assert cut.stored_dtype == torch.float32
    assert model.fingerprint() != model.base.fingerprint
