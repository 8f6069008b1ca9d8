"""Splits: the published one to the frame, and none that hides data or leaves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forcetune.errors import InputError
from forcetune.frames.frame import Frame, Origin
from forcetune.frames.read import read_frames
from forcetune.frames.splits import separate_isolated, split

# first training frames of the published few-shot runs: default_rng(123) shuffling the list 0 … 99
PUBLISHED_START = [21, 71, 92, 23, 79]


def atom(
    *, cell: object = 0.0, pbc: Sequence[bool] | bool = False, energy: float | None = -1.0, number: int = 29
) -> Frame:
    """One atom, in a cell of this edge or these vectors."""
    vectors = np.eye(3) * cell if isinstance(cell, float) else np.asarray(cell, dtype=float)
    return Frame(
        numbers=np.array([number]),
        positions=np.zeros((1, 3)),
        cell=vectors,
        pbc=np.broadcast_to(np.asarray(pbc, dtype=bool), (3,)),
        energy=energy,
        forces=None,
        stress=None,
        origin=Origin("a.xyz", 0),
    )


def numbered(count: int) -> list[Frame]:
    """Frames that differ in their energy."""
    return [atom(energy=float(i)) for i in range(count)]


def indices(frames: Sequence[Frame]) -> list[int]:
    return [int(frame.energy) for frame in frames if frame.energy is not None]


def test_the_published_few_shot_split(reference_data: Path) -> None:
    frames = read_frames(reference_data / "rmd17" / "aspirin" / "train.xyz").frames
    expected = list(range(100))
    np.random.default_rng(123).shuffle(expected)
    train, valid = split(frames, 0.5)
    assert [frame.origin.index for frame in train] == expected[:50]
    assert [frame.origin.index for frame in valid] == expected[50:]
    assert split(frames, 50) == (train, valid)


def test_the_published_split_by_its_numbers() -> None:
    """Guards against a change of NumPy's generator."""
    train, valid = split(numbered(100), 0.5, seed=123)
    assert indices(train)[:5] == PUBLISHED_START
    assert sorted(indices(train) + indices(valid)) == list(range(100))


@pytest.mark.parametrize(("count", "fraction"), [(100, 0.5), (37, 0.1), (20, 0.05), (11, 0.33)])
def test_the_split_of_mace(count: int, fraction: float, tmp_path: Path) -> None:
    utils = pytest.importorskip("mace.data.utils")
    theirs = utils.random_train_valid_split(list(range(count)), fraction, 7, str(tmp_path))
    train, valid = split(numbered(count), fraction, seed=7)
    assert (indices(train), indices(valid)) == theirs


@given(total=st.integers(2, 60), data=st.data(), seed=st.integers(0, 5))
def test_every_frame_is_used_once(total: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, total - 1))
    train, valid = split(numbered(total), count, seed)
    assert len(valid) == count
    assert sorted(indices(train) + indices(valid)) == list(range(total))
    assert split(numbered(total), count, seed)[0][0].energy == train[0].energy


def test_other_seeds_split_otherwise() -> None:
    assert indices(split(numbered(50), 10, seed=1)[1]) != indices(split(numbered(50), 10, seed=2)[1])


def test_a_numpy_number_counts() -> None:
    assert len(split(numbered(10), np.int64(3))[1]) == 3


@pytest.mark.parametrize("valid", [0, -3, 0.0, 1.0, 1.5, -0.1, float("nan"), True])
def test_what_is_no_size(valid: float, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(InputError, match="Validation by"):
        split(numbered(10), valid)


@pytest.mark.parametrize("valid", [10, 11])
def test_nothing_left_for_training(valid: int) -> None:
    with pytest.raises(InputError, match=f"{valid} of 10 frames leaves none for training"):
        split(numbered(10), valid)


@pytest.mark.parametrize("total", [2, 3, 8, 10])
def test_one_frame_at_least_validates(total: int) -> None:
    train, valid = split(numbered(total), 0.05)
    assert len(train) == total - 1 and len(valid) == 1
    assert len(split(numbered(100), 0.05)[1]) == 5


@pytest.mark.parametrize("valid", [0.1, 1])
def test_a_single_frame_cannot_be_split(valid: float) -> None:
    with pytest.raises(InputError, match=r"holds one frame to train on and none to validate on; .*--valid"):
        split(numbered(1), valid)


# ---- isolated atoms -------------------------------------------------------------------------------------------

PRIMITIVE_COPPER = 3.61 * (np.ones((3, 3)) - np.eye(3)) / 2


@pytest.mark.parametrize(
    ("frame", "isolated"),
    [
        (atom(), True),
        (atom(cell=4.0), True),  # a cell that is not periodic is only a box
        (atom(cell=20.0, pbc=True), True),
        (atom(cell=8.0, pbc=True), True),
        (atom(cell=7.9, pbc=True), False),
        (atom(cell=PRIMITIVE_COPPER, pbc=True), False),
        (atom(cell=np.diag([20.0, 20.0, 3.0]), pbc=True), False),
        (atom(cell=np.diag([20.0, 20.0, 3.0]), pbc=[True, True, False]), True),
        (atom(energy=None), False),
    ],
)
def test_which_atom_is_isolated(frame: Frame, isolated: bool) -> None:
    others, alone = separate_isolated([frame])
    assert (len(others), len(alone)) == ((0, 1) if isolated else (1, 0))


def test_a_skewed_cell_hides_near_images() -> None:
    """Vectors of 20 Å whose difference is short: the nearest image is not along a vector."""
    skewed = np.array([[20.0, 0.0, 0.0], [20.0, 3.0, 0.0], [0.0, 0.0, 20.0]])
    assert len(separate_isolated([atom(cell=skewed, pbc=True)])[1]) == 0


def test_molecules_and_isolated_atoms_are_told_apart(reference_data: Path) -> None:
    acac = reference_data / "acac"
    frames = read_frames([acac / "test_dihedral.xyz", acac / "isolated_atoms.xyz"]).frames
    others, alone = separate_isolated(frames)
    assert others == frames[:45]
    assert alone == frames[45:]
