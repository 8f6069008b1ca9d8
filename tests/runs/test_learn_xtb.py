"""The whole loop: methanol heated until it would break, with labels by GFN2-xTB."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from benchmarks.learn import KINDS, make_frames, measure, summarize, table

from forcetune.runs.labelling import load_labeller

OPTIONS = '{"method": "GFN2-xTB", "verbosity": 0}'


@pytest.mark.slow
def test_labels_where_the_model_is_not_sure_lower_the_error_on_hot_frames(tmp_path: Path) -> None:
    pytest.importorskip("tblite", reason="pip install 'forcetune[recipes]'")
    arguments = argparse.Namespace(
        molecule="CH3OH",
        labeller="tblite.ase:TBLite",
        labeller_options=OPTIONS,
        rounds=2,
        batch=8,
        walkers=3,
        picoseconds=0.4,
        epochs=30,
    )
    make_frames(tmp_path, arguments, load_labeller(arguments.labeller, {"method": "GFN2-xTB", "verbosity": 0}), 1)
    records = {kind: measure(tmp_path, kind, arguments, 1) for kind in KINDS}
    results = {kind: summarize(rounds) for kind, rounds in records.items()}
    print(table({"1": results}))
    sure, random = (results[kind] for kind in KINDS)
    first, last = sure[0], sure[-1]
    assert first["forces_mae_mev_per_ang"] == pytest.approx(random[0]["forces_mae_mev_per_ang"], rel=1e-6)
    assert last["labels"] <= 16
    assert last["forces_mae_mev_per_ang"] < 0.8 * first["forces_mae_mev_per_ang"]
    # the first dynamics do not get as far as those that nothing ends
    ended = [part.ended for part in records["by uncertainty"][1].dynamics]
    assert set(ended) <= {"uncertainty", "watch"}
    reached = [np.mean([part.final_temperature_k for part in rounds[1].dynamics]) for rounds in records.values()]
    assert reached[0] < reached[1]
