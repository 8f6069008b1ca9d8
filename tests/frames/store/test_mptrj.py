"""The JSON that CHGNet published, on a small file of the same form, and the list of data sets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forcetune.errors import InputError
from forcetune.frames import published
from forcetune.frames.published import download_dataset, list_datasets
from forcetune.frames.read import read_frames
from forcetune.frames.store.mptrj import is_mptrj, iterate_mptrj
from loopback import Content, Loopback
from terminal import Command


def frame(count: int = 2, shift: float = 0.0, *, magnetic: bool = True) -> dict[str, Any]:
    """One frame of iron as the file has it."""
    sites = [
        {"species": [{"element": "Fe", "occu": 1}], "abc": [0.0] * 3, "xyz": [0.0, 0.0, 1.2 * i + shift], "label": "Fe"}
        for i in range(count)
    ]
    lattice = {"matrix": [[2.9, 0, 0], [0, 2.9, 0], [0, 0, 2.4]], "pbc": [True] * 3}
    return {
        "structure": {"@module": "pymatgen.core.structure", "@class": "Structure", "lattice": lattice, "sites": sites},
        "uncorrected_total_energy": -16.5,
        "corrected_total_energy": -17.0,
        "energy_per_atom": -8.5,
        "force": [[0.0, 0.1 * i, 0.0] for i in range(count)],
        "stress": [[10.0, 1.0, 2.0], [1.0, 20.0, 3.0], [2.0, 3.0, 30.0]],
        "magmom": [2.2, -2.1][:count] if magnetic else None,
        "bandgap": 0.0,
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_frames_of_all_materials(tmp_path: Path) -> None:
    materials = {
        "mp-1": {"mp-1-0-0": frame(), "mp-1-0-1": frame(shift=0.1)},
        "mp-2": {"mp-2-0-0": frame(1)},
    }
    path = write(tmp_path / "some.json", materials)
    assert is_mptrj(path)
    result = read_frames(path, moments_key="auto", require=("energy", "forces"))
    assert [len(one) for one in result.frames] == [2, 2, 1]
    first = result.frames[0]
    assert first.energy == -16.5
    assert first.stress is not None
    np.testing.assert_allclose(first.stress, -np.array(frame()["stress"]) / 1602.1766208)
    assert first.moments is not None
    np.testing.assert_allclose(first.moments, [[0, 0, 2.2], [0, 0, -2.1]])
    corrected = read_frames(path, energy_key="corrected_total_energy").frames[0]
    assert corrected.energy == -17.0


@pytest.mark.filterwarnings("ignore::forcetune.errors.ForcetuneWarning")
def test_moments_may_be_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", {"mp-1": {"a": frame(), "b": frame(magnetic=False)}})
    result = read_frames(path, moments_key="auto")
    assert [one.moments is None for one in result.frames] == [False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"structure": {"@module": "x", "sites": [], "lattice": {"matrix": [[1, 2], [3, 4]]}}},
        {"structure": {"@module": "x", "sites": [{"species": [{"element": "Zz"}], "xyz": [0, 0, 0]}]}},
        {"structure": {"@module": "x", "sites": [{"species": [], "xyz": [0, 0, 0]}]}},
        {"force": [[1, 2, 3]]},
        {"force": "many"},
        {"uncorrected_total_energy": None},
        {"stress": [1, 2]},
        {"magmom": [1.0]},
    ],
)
def test_frames_of_another_form_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path / "some.json", {"mp-1": {"a": frame(), "b": frame() | change}})
    with pytest.raises(InputError, match=r"some\.json, frame 1"):
        list(iterate_mptrj(path))


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "some.json", {"mp-1": {"a": frame()}, "mp-2": {"a": frame()}})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 200])
    with pytest.raises(InputError, match=r"some\.json, frame 1.*damaged"):
        read_frames(path)


def test_other_json_is_not_taken_for_it(tmp_path: Path) -> None:
    assert not is_mptrj(write(tmp_path / "other.json", {"mp-1": 3}))
    assert not is_mptrj(write(tmp_path / "other.xyz", {"mp-1": {"a": frame()}}))


def test_data_sets_are_listed_and_fetched(
    tmp_path: Path, command: Command, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = command("datasets", "--json")
    assert code == 0
    assert {one["name"] for one in json.loads(out)} == {"mptrj", "mptrj-json"}
    content = b"not the real one" * 1000
    server.contents["/mp-trj.extxyz.zip"] = Content(content)
    monkeypatch.setenv(published.MIRROR_VARIABLE, server.url)
    code, _, err = command("datasets", "download", "mptrj", "--folder", tmp_path)
    assert code == 2
    assert "MD5" in err
    assert not (tmp_path / "mp-trj.extxyz.zip").exists()
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(published, "_DATASETS", (replace(list_datasets()[0], md5=digest),))
    path = download_dataset("mptrj", tmp_path, progress=lambda *_: None)
    assert path.read_bytes() == content
    assert download_dataset("mptrj", tmp_path) == path  # it is there
    path.write_bytes(b"changed")
    with pytest.raises(InputError, match="published file"):
        download_dataset("mptrj", tmp_path)
    assert command("datasets", "download", "mptrji")[0] == 2
