"""Stress and virials in every form that people write, weights of a file, labels that some frames lack, and what is not
read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from forcetune.errors import ForcetuneWarning, InputError
from forcetune.frames.frame import Frame, FrameSet, LabelKeys
from forcetune.frames.labels import CANDIDATES
from forcetune.frames.read import frames_from_atoms, read_frames
from forcetune.frames.store.streaming import stream_frames
from frames.formats import assert_same as assert_same_frame
from frames.formats import write_hdf5
from structures import labelled, text_frame, water, write

CELL = 'Lattice="5 0 0 0 6 0 0 0 7" pbc="T T T"'
SIX = "1 2 3 4 5 6"
NINE = "1 6 5 6 2 4 5 4 3"
NESTED = "[[1, 6, 5], [6, 2, 4], [5, 4, 3]]"
MATRIX = np.array([[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]])


def stress_in(path: Path, comment: str) -> np.ndarray:
    path.write_text(text_frame(f"energy=-1 {CELL} {comment}"))
    frame = read_frames(path).frames[0]
    assert frame.stress is not None
    return frame.stress


def assert_same(ours: Sequence[Frame], theirs: Sequence[Frame]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert_same_frame(one, other)


def streamed(path: Path, require: Sequence[Any] = (), expect: Sequence[Any] = (), **keys: str) -> FrameSet:
    asked = LabelKeys(*(keys.get(f"{label}_key", "auto") for label in LabelKeys._fields[:3]))
    return stream_frames(
        [str(path)], asked, require, "training data", folder=path.parent / "store", workers=0, expect=expect
    )


# ---- stress and virials -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in CANDIDATES["stress"] if key != "calculator"])
@pytest.mark.parametrize(
    "value", [f'"{SIX}"', f'"{NINE}"', f'"{NESTED}"', NESTED, "{" + NINE + "}", f'"_JSON {NESTED}"']
)
def test_every_name_in_every_form(key: str, value: str, tmp_path: Path) -> None:
    if value == NESTED and key not in ("stress", "virial"):
        pytest.skip("brackets without quotes are ASE's to read")
    expected = -MATRIX / (5 * 6 * 7) if "virial" in key.lower() else MATRIX
    np.testing.assert_allclose(stress_in(tmp_path / "a.xyz", f"{key}={value}"), expected, rtol=1e-12)


@pytest.mark.parametrize("key", ["DFT_virials", "ref_virial", "Virial", "virials", "stress"])
def test_streamed_frames_have_the_same(key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame(f'energy=-1 {CELL} {key}="{SIX}"') * 3)
    result = streamed(path)
    assert result.keys.stress == key
    assert_same(result.frames, read_frames(path).frames)


def test_a_stress_that_is_not_there_may_be_written_as_none(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text(text_frame(f'energy=-1 {CELL} stress="{SIX}"') + text_frame(f"energy=-2 {CELL} stress=None"))
    with pytest.warns(ForcetuneWarning, match="1 of 2 frames have no stress under 'stress'"):
        result = read_frames(path)
    assert [frame.stress is None for frame in result.frames] == [False, True]


def test_another_number_of_components_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.xyz, frame 0"):
        stress_in(tmp_path / "a.xyz", 'stress="1 2 3"')


def with_both(virial: np.ndarray) -> Atoms:
    atoms = water(cell=5.0)
    atoms.info |= {"REF_energy": -1.0, "stress": MATRIX, "virial": virial}
    return atoms


def test_stress_and_virial_that_agree_are_one_label() -> None:
    volume = 5 * 6 * 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = frames_from_atoms([with_both(np.round(-MATRIX * volume, 2))])
    assert result.keys.stress == "stress"


@pytest.mark.parametrize(
    ("factor", "sentence"), [(1.0, "virial has the opposite sign"), (-2.0, "ignored. Set stress_key")]
)
def test_stress_and_virial_that_disagree_are_told(factor: float, sentence: str) -> None:
    with pytest.warns(ForcetuneWarning, match="stress taken from 'stress'; 'virial' with other values") as heard:
        frames_from_atoms([with_both(factor * MATRIX * 5 * 6 * 7)])
    assert sentence in str(heard[0].message)


# ---- weights ------------------------------------------------------------------------------------------------------


def weighted(*weights: dict[str, Any]) -> list[Atoms]:
    structures = []
    for seed, own in enumerate(weights):
        atoms = water(seed, cell=5.0)
        atoms.info |= {"REF_energy": -14.0 - seed, "REF_virials": MATRIX.ravel(), **own}
        atoms.arrays["REF_forces"] = np.full((3, 3), float(seed))
        structures.append(atoms)
    return structures


WEIGHTED = weighted(
    {"config_weight": 2.0, "config_forces_weight": 3.0},
    {"config_weight": 0.0, "config_energy_weight": 7.0},
    {"config_energy_weight": 0.0, "config_virials_weight": 0.25},
    {"config_stress_weight": 0.5, "config_forces_weight": 0},
)


def test_weights_are_read_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", *WEIGHTED)
    with pytest.warns(ForcetuneWarning) as heard:
        result = read_frames(path, require=())
    (text,) = [str(item.message) for item in heard if "weights" in str(item.message)]
    assert "1 of 4 frames have config_weight 0 and are left out" in text
    assert "config_forces_weight 0 to 3" in text and "labels with weight 0 are left out" in text
    assert "config_energy_weight 0)" in text or "config_energy_weight 0," in text  # that of a frame left out is no news
    assert [frame.origin.index for frame in result.frames] == [0, 2, 3]
    weights = [(f.energy_weight, f.forces_weight, f.stress_weight, f.moments_weight) for f in result.frames]
    assert weights == [(2.0, 6.0, 2.0, 2.0), (0.0, 1.0, 0.25, 1.0), (1.0, 0.0, 0.5, 1.0)]
    labels = [(f.energy is None, f.forces is None, f.stress is None) for f in result.frames]
    assert labels == [(False, False, False), (True, False, False), (False, True, False)]
    with pytest.warns(ForcetuneWarning) as again:
        assert_same(streamed(path).frames, result.frames)
    assert text in [str(item.message) for item in again]


def test_weights_of_one_are_no_news() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames_from_atoms(weighted({"config_weight": 1.0}, {"config_energy_weight": 1}))


@pytest.mark.parametrize("weight", [-1.0, np.nan, "much", [1.0, 2.0]])
def test_a_weight_that_is_none_is_refused(weight: Any) -> None:
    with pytest.raises(InputError, match="<atoms>, frame 1: the weight under 'config_weight' is"):
        frames_from_atoms(weighted({}, {"config_weight": weight}))


def test_weight_0_everywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xyz", *weighted({"config_weight": 0.0}, {"config_weight": 0.0}))
    for read in (read_frames, streamed):
        with pytest.raises(InputError, match=r"a\.xyz\): every frame has config_weight 0"):
            read(path)


def test_a_label_with_weight_0_may_be_anything() -> None:
    """mace itself writes zeros for labels that are not there, with weight 0."""
    broken = weighted({}, {"config_forces_weight": 0.0})
    broken[1].arrays["REF_forces"][:] = np.nan
    with pytest.warns(ForcetuneWarning, match="labels with weight 0 are left out"):
        assert frames_from_atoms(broken).frames[1].forces is None


def test_the_hash_of_structures_follows_weights() -> None:
    plain, other = frames_from_atoms(weighted({})), frames_from_atoms(weighted({"config_weight": 1.0}))
    with pytest.warns(ForcetuneWarning, match="config_weight 2"):
        heavy = frames_from_atoms(weighted({"config_weight": 2.0}))
    assert plain.sha256 == other.sha256 != heavy.sha256


def test_weights_of_hdf5(tmp_path: Path) -> None:
    import h5py

    path = write_hdf5(tmp_path / "a.h5", [labelled(seed) for seed in range(3)])
    with h5py.File(path, "a") as file:
        batch: Any = file["config_batch_0"]
        batch["config_0/weight"][()] = 0.0
        batch["config_1/weight"][()] = 3.0
        batch["config_2/property_weights/forces"][()] = 5.0
    with pytest.warns(ForcetuneWarning, match="1 of 3 frames have config_weight 0"):
        result = read_frames(path)
    weights = [(frame.energy_weight, frame.forces_weight) for frame in result.frames]
    assert weights == [(3.0, 3.0), (1.0, 5.0)]


# ---- labels that some frames lack ---------------------------------------------------------------------------------


def test_frames_that_lack_a_label_are_told_and_kept(tmp_path: Path) -> None:
    frames = [labelled(seed) for seed in range(6)]
    for atoms in frames[:2]:
        del atoms.arrays["REF_forces"]
    del frames[4].info["REF_energy"]
    path = write(tmp_path / "a.xyz", *frames)
    needed = ("energy", "forces")
    with pytest.warns(ForcetuneWarning) as heard:
        result = read_frames(path, require=(), expect=needed)
    messages = " ".join(str(item.message) for item in heard)
    assert "2 of 6 frames have no forces under 'REF_forces'" in messages
    assert "1 of 6 frames have no energy under 'REF_energy'" in messages and "frame 4" in messages
    assert [frame.forces is None for frame in result.frames] == [True, True, False, False, False, False]
    with pytest.warns(ForcetuneWarning):
        assert_same(streamed(path, expect=needed).frames, result.frames)


@pytest.mark.parametrize("label", ["energy", "forces"])
def test_none_does_without_a_label_that_is_expected(label: str, tmp_path: Path) -> None:
    frames = [labelled(seed) for seed in range(3)]
    keys: Any = {f"{label}_key": "none"}
    result = frames_from_atoms(frames, require=(), expect=("energy", "forces"), **keys)
    assert getattr(result.keys, label) is None
    assert all(getattr(frame, label) is None for frame in result.frames)
    for atoms in frames:
        atoms.info.pop("REF_energy") if label == "energy" else atoms.arrays.pop("REF_forces")
    path = write(tmp_path / "a.xyz", *frames)
    for read in (read_frames, streamed):
        with pytest.raises(InputError, match=f"no {label} found .* or to 'none' to do without"):
            read(path, require=(), expect=("energy", "forces"))


# ---- what is not read ---------------------------------------------------------------------------------------------


def told_of(**names: Any) -> list[str]:
    atoms = labelled()
    for name, value in names.items():
        (atoms.arrays if np.ndim(value) else atoms.info)[name] = value
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        frames_from_atoms([atoms])
    return [str(item.message) for item in heard]


@pytest.mark.parametrize("name", ["my_virial", "E_ccsd_energy", "xtb_forces", "strain_stress", "energy_sigma"])
def test_a_name_like_a_label_is_told(name: str) -> None:
    (text,) = told_of(**{name: 1.0})
    assert f"'{name}' looks like a label and is not read" in text and "energy_key" in text


def test_charge_and_spin_are_told_in_one_line() -> None:
    (text,) = told_of(charge=1, spin=2, dipole=np.zeros(3), magmoms=np.zeros(3))
    assert "'charge', 'dipole' and 'spin' are not read: the model does not know them" in text
    assert "'magmoms' is read only with a magnetic layer (--magnetic)" in text


def test_other_names_are_no_news() -> None:
    assert told_of(config_type="md", source_set="a", temperature=300.0, initial_charges=np.zeros(3)) == []


def test_what_is_read_or_refused_is_no_news() -> None:
    atoms = water(cell=5.0)
    atoms.info |= {"REF_energy": -1.0, "total_energy": -1.0, "REF_stress": MATRIX.ravel()}
    atoms.arrays["F"] = np.zeros((3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames_from_atoms([atoms], forces_key="F", stress_key="none")


def test_charge_and_multiplicity_are_kept(tmp_path: Path) -> None:
    atoms = labelled()
    atoms.info |= {"charge": -1, "spin": 2}
    path = write(tmp_path / "a.xyz", atoms, labelled(1))
    with pytest.warns(ForcetuneWarning, match="'charge' and 'spin'"):
        result = read_frames(path)
    assert [(frame.charge, frame.multiplicity) for frame in result.frames] == [(-1.0, 2.0), (None, None)]
    with pytest.warns(ForcetuneWarning):
        assert_same(streamed(path).frames, result.frames)
