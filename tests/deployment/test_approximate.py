"""The nearest plain model to one with gates: fitted, measured on frames it has not seen, refused beyond the bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.io import read

import forcetune
from forcetune.adapters.attach import attach, require_adapter
from forcetune.adapters.file import save_adapter
from forcetune.adapters.methods import method
from forcetune.adapters.updates.gate import GateActivation
from forcetune.deployment.approximate import merge_approximately, note_path
from forcetune.deployment.gate_regression import GateRegression
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.graphs.graph import build_graph
from systems import backbone, cluster, crystal, frames_of, perturb, write_labelled, write_model
from terminal import Command


def run_with(tmp_path: Path, name: str, scale: float = 0.05) -> tuple[Path, Path]:
    """A base, and an adapter on it."""
    base = write_model(tmp_path / "base.model", hidden_irreps="4x0e+4x1o", elements=(1, 6, 8))
    model = forcetune.load(base)
    perturb(attach(model, method(name)), scale)
    model.set_reference_energies({1: -13.6, 6: -1035.2, 8: -2043.9})
    save_adapter(model, tmp_path / "run")
    return base, tmp_path / "run"


def test_what_it_adds_is_measured_and_stored(tmp_path: Path, command: Command) -> None:
    base, run = run_with(tmp_path, "mmea-pure")
    train, test = write_labelled(tmp_path / "train.xyz", 6), write_labelled(tmp_path / "test.xyz", 4, seed=9)
    output = tmp_path / "tuned.model"
    options = ("--approximate", "--data", train, "--test", test, "--bound", 50)
    code, out, err = command("merge", run, "-o", output, "--model", base, *options)
    assert code == 0, err
    stored = json.loads(note_path(output).read_text(encoding="utf-8"))
    assert stored["n_test"] == 4 and stored["bound"] == 50
    forces = {name: stored[name]["forces_mev_per_ang"] for name in ("dropped", "regressed", "distilled")}
    assert forces["distilled"] < forces["regressed"] <= forces["dropped"]
    assert f"{forces['distilled']:.3g} meV/Å" in out
    # the figure is what calculators of the run and of the plain model give
    differences = []
    frames: Any = read(test, ":")
    for atoms in frames:
        both = []
        for calculator in (forcetune.calculator(base, adapter=run), forcetune.calculator(output)):
            atoms.calc = calculator
            both.append(atoms.get_forces())
        differences.append(np.abs(both[0] - both[1]).mean())
    assert 1e3 * np.mean(differences) == pytest.approx(forces["distilled"], rel=1e-6)
    # reference energies take up the mean of what gates add, and no more
    assert forcetune.load(output).reference_energies[6] == pytest.approx(-1035.2, abs=1)


def test_beyond_the_bound_nothing_is_written(tmp_path: Path) -> None:
    base, run = run_with(tmp_path, "mmea-pure", 0.3)
    frames = write_labelled(tmp_path / "train.xyz", 5)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=r"differs from the run by .* at most 0\.00 is allowed; nothing was written"):
        merge_approximately(run, tmp_path / "tuned.model", model=base, train=frames, bound=1e-9, iterations=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_merges_exactly_is_not_approximated(tmp_path: Path, command: Command) -> None:
    base, run = run_with(tmp_path, "elora")
    with pytest.raises(InputError, match="method elora merges exactly; leave --approximate out"):
        merge_approximately(run, tmp_path / "tuned.model", model=base, train=write_labelled(tmp_path / "train.xyz"))
    code, _, err = command("merge", run, "-o", tmp_path / "tuned.model", "--model", base, "--bound", 5)
    assert code == 2 and "belong to --approximate" in err


def test_an_adapter_alone_wants_frames(tmp_path: Path) -> None:
    base, run = run_with(tmp_path, "mmea")
    with pytest.raises(InputError, match="name some with --data"):
        merge_approximately(run, tmp_path / "tuned.model", model=base)


def test_gates_that_are_constant_are_found_exactly() -> None:
    """A gain that does not depend on the input is a factor of weights."""
    gated, plain = backbone(), backbone()
    adapter = attach(gated, method("mmea-pure"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in adapter.parts.values():
            assert isinstance(part, GateActivation)
            if part.gain is not None:
                bias = part.gain.bias
                bias.copy_(0.3 * torch.randn(bias.shape, generator=generator, dtype=bias.dtype))
    frames = frames_of(*(cluster(seed=seed) for seed in range(6)), *(crystal(seed=seed) for seed in range(6)))
    GateRegression(gated, build_graphs(gated, frames)).apply(plain, 1e-8)
    (unseen,) = frames_of(crystal(seed=99))
    results = [model.predict(build_graph(unseen, model.cutoff)).detached() for model in (gated, plain, backbone())]
    wanted, fitted, before = (prediction.forces for prediction in results)
    change = (before - wanted).abs().max()
    assert change > 1e-3
    assert (fitted - wanted).abs().max() < 0.01 * change
    assert require_adapter(gated) is adapter
