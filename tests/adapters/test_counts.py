"""Trainable parameters of every method against the published counts, to the digit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forcetune.runs.methods import compare_methods
from systems import write_model
from terminal import Command

MEDIUM = {
    "elements": (1, 6, 7, 8, 9, 15, 16, 17, 35, 53),
    "hidden_irreps": "128x0e+128x1o",
    "mlp_irreps": "16x0e",
    "r_max": 5.0,
    "num_bessel": 8,
    "max_ell": 3,
    "correlation": 3,
    "radial_MLP": [64, 64, 64],
    "trainable_bessel": True,
}
PUBLISHED = {
    "mmea": 151_354,
    "mmea-pure": 51_842,
    "elora": 175_880,
    "full": 751_896,
    "scratch": 751_896,
    "readout": 2_192,
}


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the architecture of MACE-OFF23 medium with its ten elements."""
    return write_model(tmp_path_factory.mktemp("model") / "medium.model", **MEDIUM)


def test_command_line_gives_the_published_counts(medium: Path, command: Command) -> None:
    code, text, _ = command("methods", "--model", medium, "--elements", "H,C,O", "--json")
    assert code == 0
    rows = json.loads(text)
    assert {row["method"]: row["trainable"] for row in rows if row["method"] in PUBLISHED} == PUBLISHED
    assert {row["total"] for row in rows} == {751_896}
    for row in rows:
        assert sum(part["trainable"] for part in row["coverage"]) == row["trainable"]
        assert sum(part["total"] for part in row["coverage"]) == row["total"]


def test_rank_32_and_coverage_by_kind(medium: Path) -> None:
    rows = {row["method"]: row for row in compare_methods(medium, elements=["H", "C", "O"], rank=32)}
    assert rows["mmea"]["trainable"] == 201_258
    trained = {part["kind"]: part["trainable"] for part in rows["mmea"]["coverage"]}
    assert trained == {
        "linear": 4_352 + 8_352 + 21_024 + 12_576 + 25_120 + 12_576 + 8_352,
        "readout": 4_161 + 4_656 + 577,
        "tensor_product": 40_960,
        "radial_mlp": 41_216,
        "contraction": 10_800,
        "contraction_lower": 6_528,
        "radial_basis": 8,
    }


def test_rows_of_the_published_table(medium: Path) -> None:
    rows = {row["method"]: row for row in compare_methods(medium, elements=["H", "C", "O"])}
    elora = {part["kind"]: part["trainable"] for part in rows["elora"]["coverage"]}
    assert elora["linear"] == 2_096 + 4_096 + 16_384 + 8_192 + 28_672 + 8_192 + 4_096
    assert elora["readout"] == 2_064 + 2_304 + 272
    full = {part["kind"]: part["trainable"] for part in rows["full"]["coverage"]}
    assert full["tensor_product"] == 245_760
    assert full["contraction"] == 37_248
    gates = {part["kind"]: part["trainable"] for part in rows["mmea-pure"]["coverage"]}
    assert gates["linear"] == 2_240 + 4_240 + 10_768 + 6_416 + 12_816 + 6_416 + 4_240
    assert gates["readout"] == 2_081 + 2_336 + 289
