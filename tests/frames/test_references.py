"""Reference energies: exact where the data fix them, the smallest change where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.data import atomic_numbers
from ase.formula import Formula
from hypothesis import given
from hypothesis import strategies as st

from forcetune.errors import InputError
from forcetune.frames import references
from forcetune.frames.frame import Frame, Origin
from forcetune.frames.isolated import compare_isolated
from forcetune.frames.read import read_frames
from forcetune.frames.references import (
    average,
    composition_matrix,
    estimate,
    explicit,
    isolated,
    reference_energies,
)

MODEL = {1: -13.6, 6: -1029.3, 7: -1484.1, 8: -2042.0}  # eV, atomic number → E0
SHIFT = {1: 0.31, 6: -2.17, 7: 5.05, 8: 11.3}
FULL_RANK = ("H2O", "CH4", "NH3", "CO2", "C2H6O", "HCN")


def molecule(formula: str, energy: float | None, index: int = 0) -> Frame:
    """A frame of this composition; its positions do not matter here."""
    numbers = [atomic_numbers[symbol] for symbol in Formula(formula)]
    return Frame(
        numbers=np.array(numbers),
        positions=np.zeros((len(numbers), 3)),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, dtype=bool),
        energy=energy,
        forces=None,
        stress=None,
        origin=Origin("a.xyz", index),
    )


def total(formula: str, energies: Mapping[int, float]) -> float:
    return sum(energies[atomic_numbers[symbol]] for symbol in Formula(formula))


def planted(formulas: Sequence[str], noise: float = 0.0, seed: int = 0) -> tuple[list[Frame], np.ndarray]:
    """Frames whose labels are the model's energies moved by ``SHIFT``, and the model's energies."""
    random = np.random.default_rng(seed)
    predicted = np.array([total(formula, MODEL) + random.uniform(-30, -5) for formula in formulas])
    labels = [
        energy + total(formula, SHIFT) + noise * random.standard_normal()
        for formula, energy in zip(formulas, predicted, strict=True)
    ]
    frames = [molecule(formula, energy, i) for i, (formula, energy) in enumerate(zip(formulas, labels, strict=True))]
    return frames, predicted


def change(energies: Mapping[int, float]) -> dict[int, float]:
    return {z: energies[z] - MODEL[z] for z in MODEL}


# ---- composition ----------------------------------------------------------------------------------------------


def test_composition_counts_atoms_in_the_order_asked_for() -> None:
    matrix = composition_matrix([molecule("C2H6O", None), molecule("HCN", None)], (8, 1, 6, 7))
    np.testing.assert_array_equal(matrix, [[1, 6, 2, 0], [0, 1, 1, 1]])


def test_an_element_the_model_does_not_know_is_named() -> None:
    with pytest.raises(InputError, match=r"a\.xyz, frame 1: holds S, Cl, which the model does not know"):
        composition_matrix([molecule("H2O", None), molecule("SCl2H", None, 1)], tuple(MODEL))


# ---- estimate -------------------------------------------------------------------------------------------------


def test_planted_shifts_are_recovered_exactly() -> None:
    frames, predicted = planted(FULL_RANK)
    references = reference_energies("estimate", frames, (), predicted, MODEL)
    assert (references.rank, references.n_elements, references.mode) == (4, 4, "estimate")
    assert change(references.energies) == pytest.approx(SHIFT, abs=1e-9)
    assert references.offset_before_mev_per_atom > 1000
    assert references.offset_after_mev_per_atom == pytest.approx(0, abs=1e-6)


@given(seed=st.integers(0, 1000))
def test_the_estimate_is_the_best_in_error_per_atom(seed: int) -> None:
    """No other E0s give a smaller sum of squared errors per atom."""
    frames, predicted = planted(FULL_RANK, noise=0.5, seed=seed)
    shift = change(estimate(frames, predicted, MODEL))
    atoms = np.array([len(frame) for frame in frames])
    composition = composition_matrix(frames, tuple(MODEL)) / atoms[:, None]
    residual = (np.array([frame.energy for frame in frames], dtype=float) - predicted) / atoms
    gradient = composition.T @ (residual - composition @ np.array([shift[z] for z in MODEL]))
    np.testing.assert_allclose(gradient, 0, atol=1e-8)


@given(seed=st.integers(0, 1000), formula=st.sampled_from(["C9H8O4", "H2O", "CH4", "C5H8O2"]))
def test_one_molecule_gets_the_smallest_change_that_removes_the_mean(seed: int, formula: str) -> None:
    """Rank 1: ΔE0 is parallel to the composition n, ΔE0 = n · mean(residual) / |n|²."""
    random = np.random.default_rng(seed)
    predicted = total(formula, MODEL) + random.standard_normal(20)
    labels = predicted + 250.0 + random.standard_normal(20)
    frames = [molecule(formula, energy, i) for i, energy in enumerate(labels)]
    references = reference_energies("estimate", frames, (), predicted, MODEL)
    counts = composition_matrix(frames[:1], tuple(MODEL))[0]
    expected = counts * (labels - predicted).mean() / (counts @ counts)
    np.testing.assert_allclose([change(references.energies)[z] for z in MODEL], expected, rtol=1e-9, atol=1e-9)
    left = labels - predicted - counts @ expected
    assert left.mean() == pytest.approx(0, abs=1e-9)
    assert references.rank == 1
    assert references.n_elements == np.count_nonzero(counts)
    assert references.offset_after_mev_per_atom == pytest.approx(1e3 * np.abs(left).mean() / counts.sum())


def test_isomers_and_multiples_do_not_add_rank() -> None:
    """Compositions on a line leave a direction open; the change has no part along it."""
    frames, predicted = planted(("H2O", "H4O2", "H2O"))
    references = reference_energies("estimate", frames, (), predicted, MODEL)
    shift = change(references.energies)
    assert (references.rank, references.n_elements) == (1, 2)
    assert shift[1] / shift[8] == pytest.approx(2.0)
    assert references.offset_after_mev_per_atom == pytest.approx(0, abs=1e-6)


def test_elements_that_do_not_occur_keep_the_models_energy() -> None:
    frames, predicted = planted(("H2O", "H2O2", "H2"))
    energies = estimate(frames, predicted, MODEL)
    assert energies[6] == MODEL[6]
    assert energies[7] == MODEL[7]
    assert energies[8] == pytest.approx(MODEL[8] + SHIFT[8])


def test_large_frames_do_not_outweigh_small_ones() -> None:
    """Two frames of one element that disagree: errors per atom meet half-way, total errors would not."""
    frames = [molecule("H2", 2 * 1.0), molecule("H100", 100 * 2.0)]
    energies = estimate(frames, [0.0, 0.0], {1: 0.0})
    assert energies[1] == pytest.approx(1.5)


def test_frames_without_energy_are_passed_over() -> None:
    frames, predicted = planted(FULL_RANK)
    frames.insert(2, molecule("H2O", None, 9))
    references = reference_energies("estimate", frames, (), np.insert(predicted, 2, 1e6), MODEL)
    assert change(references.energies) == pytest.approx(SHIFT, abs=1e-9)


def test_no_energies_at_all() -> None:
    with pytest.raises(InputError, match="no frame has an energy"):
        estimate([molecule("H2O", None)], [0.0], MODEL)
    with pytest.raises(InputError, match="no frame has an energy"):
        reference_energies("estimate", [molecule("H2O", None)], (), [0.0], MODEL)


def test_frames_without_energies_keep_the_reference_energies_that_are_there() -> None:
    forces_only = [molecule("H2O", None)]
    references = reference_energies("model", forces_only, (), [0.0], MODEL)
    assert (references.energies, references.offset_before_mev_per_atom, references.offset_after_mev_per_atom) == (
        MODEL,
        None,
        None,
    )
    atoms = [molecule("H", -13.0), molecule("O", -2040.0)]
    references = reference_energies("isolated", forces_only, atoms, [0.0], MODEL)
    assert references.energies == MODEL | {1: -13.0, 8: -2040.0}


@pytest.mark.parametrize("block", [references.BLOCK, 3])
def test_a_frame_counts_by_the_weight_that_its_file_gives_it(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two energies of one composition meet at their weighted mean; mace's average weighs nothing."""
    monkeypatch.setattr(references, "BLOCK", block)
    frames = [replace(molecule("H2", 2.0 * k), energy_weight=weight) for k, weight in enumerate((1.0, 3.0, 1e-9, 1e-9))]
    energies = estimate(frames, np.zeros(4), {1: 0.0})
    assert energies[1] == pytest.approx(0.75, rel=1e-6)
    assert average(frames, {1: 0.0})[1] == pytest.approx(1.5)


# ---- isolated atoms against the frames ------------------------------------------------------------------------------


def test_isolated_atoms_of_the_same_calculations_explain_the_frames() -> None:
    frames, predicted = planted(FULL_RANK)
    atoms = [molecule(symbol, MODEL[z] + SHIFT[z]) for symbol, z in (("H", 1), ("C", 6), ("N", 7), ("O", 8))]
    comparison = compare_isolated(atoms, frames, predicted, MODEL)
    assert comparison is not None and not comparison.disagree
    assert comparison.offset_mev_per_atom == pytest.approx(0.0, abs=1e-6)
    assert comparison.energies[1] == pytest.approx(-13.29)
    assert "H −13.29 (model −13.60)" in comparison.sentence("estimate", 4.0)
    assert "instead of 4.0 (--references estimate); --references isolated takes them" in comparison.sentence(
        "estimate", 4.0
    )


def test_isolated_atoms_of_other_calculations_are_told_with_how_far_they_are_off() -> None:
    frames, predicted = planted(("H2O", "H4O2"))
    atoms = [molecule("H", MODEL[1] + SHIFT[1] + 5.0), molecule("O", MODEL[8] + SHIFT[8] - 16.0)]
    comparison = compare_isolated(atoms, frames, predicted, MODEL)
    assert comparison is not None and comparison.offset_mev_per_atom == pytest.approx(2000.0)
    assert compare_isolated([atoms[0]], frames, predicted, MODEL) is not None  # some elements only: nothing to compare
    assert comparison.disagree == (comparison.offset_mev_per_atom > 2000.0)
    worse = compare_isolated([molecule("H", 0.0), atoms[1]], frames, predicted, MODEL)
    assert worse is not None and worse.disagree
    assert "other settings, spin or level of theory" in worse.sentence("estimate")
    assert "--references estimate fits the frames" in worse.sentence("isolated")


def test_no_isolated_atoms_say_nothing() -> None:
    frames, predicted = planted(FULL_RANK)
    assert compare_isolated([], frames, predicted, MODEL) is None


def test_a_model_that_gives_no_number_is_told_with_the_frame() -> None:
    frames, predicted = planted(FULL_RANK)
    predicted[3] = np.nan
    with pytest.raises(InputError, match=r"a\.xyz, frame 3: the model's energy is not finite"):
        estimate(frames, predicted, MODEL)


def test_one_energy_of_the_model_for_each_frame() -> None:
    frames, predicted = planted(FULL_RANK)
    with pytest.raises(ValueError, match="shape"):
        estimate(frames, predicted[:-1], MODEL)


def test_real_data_of_another_level_of_theory(reference_data: Path) -> None:
    """AcAc labels against a model whose E0s are 3BPA's: hundreds of eV fall to the thermal spread."""
    frames = read_frames(reference_data / "acac" / "train_300K.xyz").frames
    atoms = read_frames(reference_data / "3bpa" / "iso_atoms.xyz").frames
    model = {int(frame.numbers[0]): float(frame.energy or 0.0) for frame in atoms}
    predicted = composition_matrix(frames, tuple(model)) @ np.array(list(model.values()))
    references = reference_energies("estimate", frames, (), predicted, model)
    assert (references.rank, references.n_elements) == (1, 3)
    assert references.offset_before_mev_per_atom > 1000
    assert references.offset_after_mev_per_atom < 20
    assert references.energies[7] == model[7]


# ---- the other modes ------------------------------------------------------------------------------------------


def test_model_keeps_everything() -> None:
    frames, predicted = planted(FULL_RANK)
    references = reference_energies("model", frames, (), predicted, MODEL)
    assert references.energies == MODEL
    assert references.offset_after_mev_per_atom == references.offset_before_mev_per_atom
    expected = np.mean([abs(total(formula, SHIFT)) / len(Formula(formula)) for formula in FULL_RANK])
    assert references.offset_before_mev_per_atom == pytest.approx(1e3 * expected)


def test_average_is_the_least_squares_of_total_energies() -> None:
    truth = {1: -14.0, 6: -1030.0, 7: -1490.0, 8: -2050.0}
    frames = [molecule(formula, total(formula, truth), i) for i, formula in enumerate(FULL_RANK)]
    assert average(frames, MODEL) == pytest.approx(truth)
    references = reference_energies("average", frames, (), np.zeros(len(frames)), MODEL)
    assert references.energies == pytest.approx(truth)


def test_average_keeps_the_models_energy_of_elements_that_do_not_occur() -> None:
    energies = average([molecule("H2O", -30.0)], MODEL)
    assert energies[6] == MODEL[6]
    assert 2 * energies[1] + energies[8] == pytest.approx(-30.0)
    assert energies[1] / energies[8] == pytest.approx(2.0)


def test_isolated_atoms_are_taken(reference_data: Path) -> None:
    atoms = read_frames(reference_data / "acac" / "isolated_atoms.xyz").frames
    frames = read_frames(reference_data / "acac" / "test_dihedral.xyz").frames
    references = reference_energies("isolated", frames, atoms, np.zeros(len(frames)), MODEL)
    assert references.energies[1] == -13.568422178253735
    assert references.energies[6] == -1026.8538996116154
    assert references.energies[8] == -2037.796869412825
    assert references.energies[7] == MODEL[7]


def test_isolated_atoms_that_are_missing_are_named() -> None:
    frames, predicted = planted(FULL_RANK)
    with pytest.raises(InputError, match="No isolated atom of C, N among the data"):
        reference_energies("isolated", frames, [molecule("H", -13.0), molecule("O", -2000.0)], predicted, MODEL)


def test_isolated_atoms_that_disagree_are_named() -> None:
    atoms = [molecule("H", -13.0, 0), molecule("H", -13.0005, 1)]
    assert isolated(atoms, MODEL, [1])[1] == -13.0
    with pytest.raises(InputError, match=r"a\.xyz, frame 2: isolated H has -13\.1 eV here but -13\.0 eV in a\.xyz"):
        isolated([*atoms, molecule("H", -13.1, 2)], MODEL, [1])


@pytest.mark.parametrize("frame", [molecule("H2", -30.0), molecule("H", None)])
def test_what_is_no_isolated_atom(frame: Frame) -> None:
    with pytest.raises(InputError, match="one atom with an energy; this frame is not"):
        isolated([frame], MODEL, [])


def test_isolated_atoms_unknown_to_the_model_are_passed_over() -> None:
    assert isolated([molecule("Cl", -1.0), molecule("H", -13.0)], MODEL, [1]) == {**MODEL, 1: -13.0}


@pytest.mark.parametrize("key", ["H", "h", " H ", 1, "1", np.int64(1)])
def test_a_table_by_symbol_or_number(key: str | int) -> None:
    assert explicit({key: -13}, MODEL, [1]) == {**MODEL, 1: -13.0}


def test_a_table_may_hold_more_than_the_model_knows() -> None:
    assert explicit({"H": -13.0, "Au": -1.0}, MODEL, [1]) == {**MODEL, 1: -13.0}


def test_a_table_in_a_run() -> None:
    frames, predicted = planted(FULL_RANK)
    table = {z: MODEL[z] + SHIFT[z] for z in MODEL}
    references = reference_energies("table", frames, (), predicted, MODEL, table=table)
    assert references.energies == table
    assert references.offset_after_mev_per_atom == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (None, "no table was given"),
        ({}, "no table was given"),
        ({"H": -13.0, "C": -1000.0}, "the table has none for N, O; add them in eV"),
        ({"Xx": -1.0}, "'Xx' is not an element symbol"),
        ({0: -1.0}, "'0' is not an element symbol"),
        ({500: -1.0}, "'500' is not an element symbol"),
        ({True: -1.0}, "'True' is not an element symbol"),
        ({"H": "low"}, "the value of H is 'low'"),
        ({"H": float("nan")}, "the value of H is nan"),
        ({"H": True}, "the value of H is True"),
        ({"H": -13.0, 1: -14.0}, "H is given twice with different values"),
    ],
)
def test_tables_that_cannot_be_used(table: dict[str | int, float] | None, said: str) -> None:
    frames, predicted = planted(FULL_RANK)
    with pytest.raises(InputError, match=said):
        reference_energies("table", frames, (), predicted, MODEL, table=table)


def test_an_unknown_mode_lists_the_known_ones() -> None:
    frames, predicted = planted(FULL_RANK)
    with pytest.raises(InputError, match="choose one of estimate, model, isolated, average, table"):
        reference_energies("guess", frames, (), predicted, MODEL)


@pytest.mark.parametrize("mode", ["estimate", "average", "model"])
@pytest.mark.parametrize("formulas", [FULL_RANK, ("H2O", "H4O2", "CO2", "C2O4")], ids=["full rank", "rank deficient"])
def test_many_frames_are_solved_block_by_block_to_the_same(
    monkeypatch: pytest.MonkeyPatch, mode: str, formulas: Sequence[str]
) -> None:
    rng = np.random.default_rng(4)
    frames = [molecule(formulas[index % len(formulas)], float(-rng.uniform(100, 5000)), index) for index in range(103)]
    predicted = rng.uniform(-5000, -100, 103)
    whole = reference_energies(mode, frames, (), predicted, MODEL)
    monkeypatch.setattr(references, "BLOCK", 10)
    blocks = reference_energies(mode, frames, (), predicted, MODEL)
    assert (blocks.rank, blocks.n_elements) == (whole.rank, whole.n_elements)
    for z, energy in whole.energies.items():
        assert blocks.energies[z] == pytest.approx(energy, rel=1e-11)
    assert blocks.offset_before_mev_per_atom == whole.offset_before_mev_per_atom
    assert blocks.offset_after_mev_per_atom == pytest.approx(whole.offset_after_mev_per_atom, rel=1e-10)
