"""The recipe of the model ``mini``, from nothing to a (much shortened) model."""

# The imports stand below the check that the optional packages are there.
# ruff: noqa: E402

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

for _module in ("rdkit", "tblite"):
    pytest.importorskip(_module, reason=f"{_module} is not installed (extra 'recipes')")

import forcetune
from forcetune.errors import ForcetuneError
from recipes.mini import generation, pretraining, pretraining_data
from recipes.mini.repulsion import PairScan


@pytest.mark.slow
def test_from_nothing_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SCAN_POINTS", 5)
    for module in (generation, pretraining_data):
        monkeypatch.setattr(module, "ELEMENTS", (1, 7, 8, 9))
    data, out = tmp_path / "data", tmp_path / "model"
    pretraining_data.make(data, limit=2, console=Console(quiet=True))
    run = pretraining.train(data, out, epochs=2, channels=4, threads=1)
    changed = (run / "results.json").stat().st_mtime_ns
    assert pretraining.train(data, out, epochs=2, channels=4) == run
    assert (run / "results.json").stat().st_mtime_ns == changed

    organic = pretraining.finish(data, out, "organic")
    assert "--name organic" in (out / "README.md").read_text(encoding="utf-8")
    model = pretraining.finish(data, out)
    assert model.read_bytes() == organic.read_bytes()
    card = (out / "README.md").read_text(encoding="utf-8")
    for words in ("GFN2-xTB", "4x0e+4x1o", "test_molecules", "test_dimers", "test_compressed", "Limits", "MIT"):
        assert words in card
    errors = forcetune.evaluate(model, data / "test_molecules.xyz")
    assert f"| {errors.forces_mae_mev_per_ang:.0f} |" in card
    assert forcetune.load(model).reference_energies[1] == pytest.approx(-10.7, abs=0.3)

    # two atoms attract where they are too near, as in a model that has not seen such distances
    hole = PairScan(("H", "O"), (0.4, 0.5), (5.0, 6.0), (-3.0, 0.1), 0.7)
    assert hole.hole == 0.5
    monkeypatch.setattr(pretraining, "pair_scans", lambda _: [hole])
    with pytest.raises(ForcetuneError, match=r"attract each other at short distances: H–O at 0\.50"):
        pretraining.install(model, tmp_path / "package")
    assert not (tmp_path / "package").exists()
    monkeypatch.setattr(pretraining, "pair_scans", lambda _: [])
    pretraining.install(model, tmp_path / "package")
    assert (tmp_path / "package" / "mini.safetensors").read_bytes() == model.read_bytes()
    assert (tmp_path / "package" / "README.md").read_text(encoding="utf-8") == card
