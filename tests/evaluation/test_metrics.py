"""Errors by hand, missing labels, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from forcetune.errors import InputError
from forcetune.evaluation.metrics import (
    EVALUATION_ATOMS,
    Errors,
    Predictions,
    build_graphs,
    evaluate_frames,
    list_worse_errors,
    predict,
)
from forcetune.evaluation.streamed import predict_streamed
from forcetune.frames.frame import LabelKeys
from forcetune.frames.read import frames_from_atoms
from forcetune.frames.store.streaming import stream_frames
from forcetune.graphs.stored_graphs import StoredGraphs
from frames.formats import write_xyz
from systems import backbone, cluster, crystal, frames_of, labelled


def example() -> Predictions:
    return Predictions(
        numbers=np.array([1, 1, 8, 8, 8]),
        atoms=np.array([2, 3]),
        energy=np.array([1.0, 2.0]),
        energy_label=np.array([1.5, np.nan]),
        forces=np.ones((5, 3)),
        forces_label=np.array([[1.0, 1.0, 0.9]] * 4 + [[np.nan] * 3]),
        stress=None,
        stress_label=None,
    )


def test_errors_by_hand() -> None:
    errors = example().errors()
    assert errors.n_frames == 2
    assert errors.energy_mae_mev == pytest.approx(500)
    assert errors.energy_mae_mev_per_atom == pytest.approx(250)
    assert errors.energy_rmse_mev == pytest.approx(500)
    assert errors.forces_mae_mev_per_ang == pytest.approx(100 / 3)
    assert errors.forces_rmse_mev_per_ang == pytest.approx(100 / np.sqrt(3))
    assert "stress_mae_mev_per_ang3" not in errors.to_json()


def test_a_prediction_that_is_no_number_is_no_missing_label() -> None:
    broken = example()
    broken.energy[0] = np.nan
    assert np.isnan(broken.errors().energy_mae_mev or 0.0)


def test_many_batches_give_what_one_frame_gives() -> None:
    model = backbone()
    structures = [cluster(seed=i) if i % 2 else crystal(seed=i) for i in range(2 * EVALUATION_ATOMS // 9)]
    done: list[int] = []
    together = predict(model, build_graphs(model, frames_of(*structures)), progress=done.append)
    assert len(done) > 1
    assert sum(done) == len(structures)
    last = predict(model, build_graphs(model, frames_of(structures[-1])))
    assert together.energy[-1] == pytest.approx(last.energy[0], rel=1e-12)
    np.testing.assert_allclose(together.forces[-len(structures[-1]) :], last.forces, rtol=0, atol=1e-12)


def test_unknown_element_and_atoms_on_top_of_each_other_name_the_frame() -> None:
    model = backbone()
    with pytest.raises(InputError, match=r"<atoms>, frame 1: element Si is unknown"):
        build_graphs(model, frames_from_atoms([*labelled(1), silicon()]).frames)
    collapsed = labelled(2)
    collapsed[1].positions[1] = collapsed[1].positions[0]
    with pytest.raises(InputError, match="frame 1: atoms 0 and 1 are at the same place"):
        evaluate_frames(model, frames_from_atoms(collapsed).frames)


def test_streamed_frames_may_have_no_number_after_a_training(tmp_path: Path) -> None:
    """They are errors that are NaN, as in memory: a long run must not end without results."""
    model, structures = backbone(), labelled(3)
    structures[1].symbols[structures[1].numbers == 1] = "N"
    assert not any(7 in structures[index].numbers for index in (0, 2))
    model.set_reference_energies({7: float("nan")})
    path, keys = write_xyz(tmp_path / "a.xyz", structures), LabelKeys(*["auto"] * len(LabelKeys._fields))
    frames = stream_frames([str(path)], keys, (), "data", folder=tmp_path / "store", workers=0).frames
    graphs = build_graphs(model, frames)
    assert isinstance(graphs, StoredGraphs)
    with pytest.raises(InputError, match=r"a\.xyz, frame 1: the model's energy or forces are not finite"):
        predict_streamed(model, graphs)
    result, expected = predict_streamed(model, graphs, finite=False), predict(model, build_graphs(model, list(frames)))
    assert np.array_equal(np.isnan(result.energy), [False, True, False])
    assert result.errors().to_json() == pytest.approx(expected.errors().to_json(), rel=1e-10, nan_ok=True)


def silicon() -> Atoms:
    atoms = Atoms("Si")
    atoms.info["REF_energy"] = 0.0
    return atoms


def test_errors_that_grew_are_listed() -> None:
    before = Errors(3, energy_mae_mev_per_atom=10.0, forces_mae_mev_per_ang=39.4, stress_mae_mev_per_ang3=2.0)
    after = Errors(3, energy_mae_mev_per_atom=10.1, forces_mae_mev_per_ang=51.2, stress_mae_mev_per_ang3=math.nan)
    assert list_worse_errors(before, after) == ["forces 39.4 → 51.2 meV/Å", "stress 2 → nan meV/Å³"]
    assert not list_worse_errors(before, before)
    assert not list_worse_errors(Errors(3), after)  # nothing to compare with
