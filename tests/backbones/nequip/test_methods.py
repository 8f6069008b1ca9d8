"""Methods on NequIP models: counts derived by hand, files of adapters, cuts, and a fit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.data import chemical_symbols

import forcetune
from forcetune.adapters.attach import attach, detach, require_adapter
from forcetune.adapters.file import load_adapter, save_adapter
from forcetune.adapters.methods import METHODS, method
from forcetune.adapters.updates import Gate
from forcetune.backbones.nequip.backbone import NequIPBackbone
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, predict
from forcetune.runs.methods import compare_methods
from nequip_models import BATTERY, RECIPES, Recipe, backbone_of, write_checkpoint
from sevennet_models import perturb
from systems import cluster, crystal, frames_of, write_labelled

# without polonium, astatine, radon, francium and radium
_SYMBOLS = [symbol for z, symbol in enumerate(chemical_symbols) if 0 < z < 95 and z not in (84, 85, 86, 87, 88)]
OAM_L = Recipe(
    {
        "_target_": "nequip.model.NequIPGNNModel",
        "seed": 1,
        "model_dtype": "float32",
        "type_names": _SYMBOLS,
        "r_max": 6.0,
        "num_layers": 6,
        "l_max": 3,
        "parity": False,
        "num_features": [128, 64, 32, 32],
        "type_embed_num_features": 48,
        "radial_mlp_depth": 1,
        "radial_mlp_width": 128,
        "polynomial_cutoff_p": 5,
        "avg_num_neighbors": 50.0,
        "per_type_energy_shifts": -1.0,
        "per_type_energy_scales": 1.0,
        "pair_potential": {
            "_target_": "nequip.nn.pair_potential.ZBL",
            "units": "metal",
            "chemical_species": _SYMBOLS,
        },
    }
)
"""The architecture of NequIP-OAM-L as its publishers describe it, with 9.6 million parameters."""

# by hand: features {order: channels}, and inputs of the gates, whose scalars are those of the features and of the gates
_FEATURES = [{0: 48}, *[{0: 128, 1: 64, 2: 32, 3: 32}] * 5, {0: 128}]
_GATES = [*[{0: 128 + 64 + 32 + 32, 1: 64, 2: 32, 3: 32}] * 5, {0: 128}]


def _messages(inputs: dict[int, int], outputs: dict[int, int]) -> dict[int, int]:
    """Channels of the paths to each order; of natural parity only those of even sums of orders."""
    return {
        order: sum(
            width
            for one, width in inputs.items()
            for two in range(4)
            if abs(one - two) <= order <= one + two and (one + two + order) % 2 == 0
        )
        for order in outputs
    }


_MESSAGES = [_messages(before, after) for before, after in pairwise(_FEATURES)]
_EMBEDDING = [(89, 48)]
_FIRST = [(n, n) for before in _FEATURES[:-1] for n in before.values()]
_SECOND = [
    (n, gates[order]) for messages, gates in zip(_MESSAGES, _GATES, strict=True) for order, n in messages.items()
]
_CONNECTION = [
    (48 * n, gates[order])
    for before, gates in zip(_FEATURES[1:-1], _GATES[1:], strict=True)
    for order, n in before.items()
    if order in gates
]
_RADIAL = [shape for messages in _MESSAGES for shape in ((8, 128), (128, sum(messages.values())))]
_READOUT = [(128, 1)]


def _weights(shapes: list[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in shapes)


def _low_rank(shapes: list[tuple[int, int]]) -> int:
    return sum(16 * (rows + columns) for rows, columns in shapes)


ALL = _EMBEDDING + _FIRST + _SECOND + _CONNECTION + _RADIAL + _READOUT
EXPECTED = {
    "full": _weights(ALL),
    "sparse": _weights(_EMBEDDING + _FIRST + _SECOND + _CONNECTION + _READOUT),
}


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, object]]:
    return {row["method"]: row for row in compare_methods(backbone_of(OAM_L))}


def test_parameters_are_those_of_the_publishers(counts: dict[str, dict[str, object]]) -> None:
    assert round(EXPECTED["full"] / 1e6, 1) == 9.6
    assert counts["full"]["trainable"] == counts["full"]["total"] == EXPECTED["full"]


def test_sparse_wraps_what_was_derived(counts: dict[str, dict[str, object]]) -> None:
    coverage: list[dict[str, int]] = counts["sparse"]["coverage"]  # pyright: ignore[reportAssignmentType]
    assert sum(row["covered"] for row in coverage) == EXPECTED["sparse"]
    assert "modality" not in counts


def test_low_rank_is_what_was_derived(counts: dict[str, dict[str, object]]) -> None:
    """Rank 16 in every path; paths whose matrices are no larger than their factors are trained as they are."""
    count = counts["elora"]["trainable"]
    assert count == _low_rank(ALL)


def test_gates_with_the_species_leave_self_connections_alone() -> None:
    """They know the type by its embedding, which is no one-hot that a gate could read."""
    model = backbone_of(BATTERY["NequIP, parity"])
    sites = [site for site in model.sites() if site.kind == "tensor_product"]
    assert len(sites) == model.content.architecture.n_layers - 1
    assert {Gate(4, species=True).unsupported_reason(site) for site in sites} == {"it does not know the species"}
    with_skip = attach(model, method("mmea", skip=True)).trainable
    detach(model)
    assert with_skip == attach(model, method("mmea")).trainable


def test_a_model_without_modalities_says_what_it_lacks() -> None:
    with pytest.raises(InputError, match=r"this model has no modalities"):
        attach(backbone_of(BATTERY["NequIP, parity"]), method("modality"))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "modality"])
def test_adapters_are_saved_and_loaded(tmp_path: Path, name: str) -> None:
    file = write_checkpoint(tmp_path / "base.ckpt", RECIPES["repulsion"])
    model = NequIPBackbone.load(file, elements=[1, 6, 8])
    perturb(attach(model, method(name)))
    model.set_reference_energies({1: -13.5, 8: -2041.0})
    batches = build_graphs(model, frames_of(cluster((1, 6, 8)), crystal((1, 6, 8))))
    expected = predict(model, batches, stress=True)
    save_adapter(model, tmp_path / "adapter")
    detach(model)
    again = NequIPBackbone.load(file, elements=[1, 6, 8])
    load_adapter(again, tmp_path / "adapter")
    prediction = predict(again, batches, stress=True)
    assert np.array_equal(prediction.energy, expected.energy)
    assert np.array_equal(prediction.forces, expected.forces)
    assert require_adapter(again).method.name == name


def test_cut_models_keep_what_they_compute() -> None:
    model = backbone_of(RECIPES["cutoffs by pair and direction"])
    frames = frames_of(cluster((1, 6, 8)))
    before = predict(model, build_graphs(model, frames))
    assert model.fingerprint() == model.base.fingerprint
    model.set_reference_energies({1: -13.587123456789})
    cut = model.cut_to([1, 6, 8])
    assert cut.elements == (1, 6, 8)
    prediction = predict(cut, build_graphs(cut, frames))
    assert np.abs(prediction.forces - before.forces).max() < 1e-12
    assert cut.reference_energies[1] == -13.587123456789
    assert model.fingerprint() != model.base.fingerprint


def test_fresh_weights_have_the_spread_of_nequip() -> None:
    drawn = backbone_of(OAM_L, elements=[1, 6, 8]).fresh_weights(1)
    radial = drawn["layer1_convnet.conv.edge_mlp.mlp.2.weight"]
    assert float(radial.abs().max()) <= 3**0.5
    assert float(radial.std()) == pytest.approx(1.0, abs=0.02)
    assert float(drawn["layer1_convnet.conv.linear_2.weight"].std()) == pytest.approx(1.0, abs=0.02)


def test_a_fit_lowers_the_errors_and_merges(tmp_path: Path) -> None:
    """From files to a merged checkpoint, by recorded steps and by steps one at a time."""
    base = write_checkpoint(tmp_path / "base.ckpt", RECIPES["averaged"])
    train = write_labelled(tmp_path / "train.xyz", 12)
    errors = {}
    for mode in ("off", "on"):
        settings = {"training.batch_size": 4, "training.compile": mode, "data.doctor": "off"}
        out = tmp_path / f"run-{mode}"
        run = forcetune.fit(train, model=base, method="full", valid=4, epochs=4, out=out, settings=settings)
        errors[mode] = run.after["valid"].forces_mae_mev_per_ang
        assert errors[mode] < run.before["valid"].forces_mae_mev_per_ang
    assert errors["on"] == pytest.approx(errors["off"], rel=1e-6)
    merged = forcetune.merge(tmp_path / "run-off", tmp_path / "tuned.ckpt")
    assert max(merged.energy_difference, merged.forces_difference) < 1e-10
    assert torch.load(tmp_path / "tuned.ckpt", weights_only=True)["hyper_parameters"]["model"]["l_max"] == 2
