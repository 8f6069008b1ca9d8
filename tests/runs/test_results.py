"""``results.json`` is written and read by one schema, and files of earlier versions are read by it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forcetune.config import RunConfig
from forcetune.runs.results import Results, read_results, write_results

STORED = Path(__file__).parent / "data" / "results.json"
"""Written by the version that built the file from dictionaries: a sparse fit with replay, refinement and dynamics."""


@pytest.fixture
def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text(encoding="utf-8"))


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate({"data": {"train": ["train.xyz"]}})


def test_a_stored_file_is_read_and_written_again_as_it_was(
    stored: dict[str, Any], config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(stored), encoding="utf-8")
    results = read_results(tmp_path, config)
    assert results.training is not None and results.training.refinement is not None
    assert results.training.refinement.valid_loss_after == stored["training"]["refinement"]["valid_loss_after"]
    assert results.sparsity is not None and results.sparsity.zeros_of_all == stored["sparsity"]["zeros_of_all"]
    assert (
        results.forgetting is not None
        and results.forgetting.dimers[1].pair == stored["forgetting"]["dimers"][1]["pair"]
    )
    write_results(tmp_path, results)
    again = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert json.loads(again) == stored
    # the order of the keys, too
    assert again == json.dumps(stored, indent=2, ensure_ascii=False) + "\n"


def test_every_key_of_a_stored_file_is_known(stored: dict[str, Any]) -> None:
    unknown = Results.model_validate(stored | {"of_a_later_version": 1}).to_json()
    assert unknown.keys() == stored.keys()


def test_what_a_run_does_not_have_is_not_written(stored: dict[str, Any]) -> None:
    for name in ("sparsity", "replay", "forgetting", "dynamics"):
        del stored[name]
    del stored["training"]["refinement"]
    content = Results.model_validate(stored).to_json()
    assert content.keys() == stored.keys()
    assert content["training"] == stored["training"] | {"refinement": None}


def test_numbers_keep_their_type(stored: dict[str, Any]) -> None:
    content = Results.model_validate(stored).to_json()
    assert type(content["errors"]["test"]["after"]["n_frames"]) is int
    assert type(content["environment"]["threads"]) is int


def test_a_report_needs_no_torch() -> None:
    program = "import sys, forcetune.reports.run_page; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
