"""Frames on disk are the frames in memory: every format, every label, every complaint."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from forcetune.config import DataConfig
from forcetune.errors import ForcetuneError, ForcetuneWarning, InputError
from forcetune.evaluation.metrics import build_graphs
from forcetune.frames.dataset import Dataset, is_streamed, read_dataset
from forcetune.frames.frame import FrameSet, LabelKeys
from forcetune.frames.read import read_frames
from forcetune.frames.sources import file_format
from forcetune.frames.splits import separate_isolated
from forcetune.frames.store import chunks, new_store, streaming
from forcetune.frames.store.rows import RowReader
from forcetune.frames.store.stored_frames import StoredFrames
from forcetune.frames.store.streaming import stream_frames
from forcetune.utils.distributed import made_once
from forcetune.utils.files import compute_sha256
from frames.formats import FORMATS, assert_same, write_database, write_xyz
from systems import backbone, crystal, labelled

NEEDED = ("energy", "forces")
SOURCES = str(Path(streaming.__file__).parents[3])


def stream(*files: Path, workers: int = 0, require: Any = NEEDED, **keys: str) -> FrameSet:
    asked = LabelKeys(*(keys.get(f"{label}_key", "auto") for label in LabelKeys._fields))
    folder = files[0].parent / "store"
    return stream_frames([str(file) for file in files], asked, require, "training data", folder=folder, workers=workers)


def mixed(count: int = 300) -> list[Atoms]:
    """Molecules, crystals with stress, and isolated atoms."""
    structures = labelled(count)
    for index in range(0, count, 7):
        atoms = crystal(seed=index)
        atoms.info["REF_energy"] = float(index)
        atoms.arrays["REF_forces"] = np.random.default_rng(index).standard_normal((len(atoms), 3))
        structures[index] = atoms
    for index, symbol in ((5, "H"), (200, "O")):
        structures[index] = Atoms(symbol, info={"REF_energy": -float(index)})
    return structures


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_frames_that_are_read_into_memory(tmp_path: Path, name: str) -> None:
    path = FORMATS[name](tmp_path / name, mixed())
    expected, result = read_frames(path, require=NEEDED), stream(path, workers=2 * (name == "a.xyz"))
    assert isinstance(result.frames, StoredFrames)
    assert (result.keys, result.files, result.sha256) == (expected.keys, expected.files, expected.sha256)
    assert result.frames.elements == expected.elements
    assert len(result.frames) == len(expected.frames) == 300
    for one, other in zip(expected.frames, result.frames, strict=True):
        assert_same(one, other)
        assert one.origin == other.origin
    assert result.frames.atoms.tolist() == [len(frame) for frame in expected.frames]
    molecules, alone = separate_isolated(result.frames)
    assert [frame.origin.index for frame in alone] == [5, 200]
    assert len(molecules) == 298
    assert result.frames[-1].origin.index == 299
    assert [frame.origin.index for frame in result.frames[10:20:5]] == [10, 15]


def test_stresses_and_several_files(tmp_path: Path) -> None:
    frames = [crystal(seed=index) for index in range(4)]
    for atoms in frames:
        atoms.info |= {"REF_energy": 1.0, "REF_stress": np.arange(9.0).reshape(3, 3)}
        atoms.arrays["REF_forces"] = np.ones((len(atoms), 3))
    files = [write_xyz(tmp_path / f"{name}.xyz", frames[start : start + 2]) for start, name in enumerate("ab")]
    result, expected = stream(*files), read_frames(files, require=NEEDED)
    for one, other in zip(expected.frames, result.frames, strict=True):
        assert_same(one, other)
        assert str(one.origin) == str(other.origin)
    assert isinstance(result.frames, StoredFrames)
    assert result.frames.any_label("stress") and not result.frames[:0].any_label("stress")


def plain(frames: list[Atoms]) -> None:
    """Nothing is wrong."""


def lacking(frames: list[Atoms]) -> None:
    for index in (130, 140):
        del frames[index].arrays["REF_forces"]


def not_finite(frames: list[Atoms]) -> None:
    frames[129].arrays["REF_forces"][2, 1] = np.nan


def wrong_shape(frames: list[Atoms]) -> None:
    frames[128].info["REF_energy"] = np.ones(3)


def no_element(frames: list[Atoms]) -> None:
    frames[250].numbers[1] = 0


def other_key(frames: list[Atoms]) -> None:
    for atoms in frames:
        atoms.info["dft_energy"] = atoms.info.pop("REF_energy")
    frames[0].info["Energy"] = 3.0


def better_key_later(frames: list[Atoms]) -> None:
    for atoms in frames:
        atoms.info["total_energy"] = atoms.info["REF_energy"] + 1
    for atoms in frames[:200]:
        del atoms.info["REF_energy"]


def no_labels(frames: list[Atoms]) -> None:
    for atoms in frames:
        del atoms.info["REF_energy"]


FAULTS = [plain, lacking, not_finite, wrong_shape, no_element, other_key, better_key_later, no_labels]


def outcome(read: Callable[[], FrameSet]) -> tuple[object, list[str]]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            result: object = read().keys
        except InputError as error:
            result = str(error)
    return result, [str(warning.message) for warning in warned if issubclass(warning.category, ForcetuneWarning)]


@pytest.mark.parametrize("spoil", FAULTS, ids=[fault.__name__ for fault in FAULTS])
@pytest.mark.parametrize("require", [NEEDED, ()], ids=["required", "free"])
def test_the_same_keys_are_chosen_and_the_same_is_complained_about(
    tmp_path: Path, spoil: Callable[[list[Atoms]], None], require: tuple[Any, ...]
) -> None:
    frames = labelled(300)
    spoil(frames)
    path = write_xyz(tmp_path / "a.xyz", frames)
    expected = outcome(lambda: read_frames(path, require=require))
    assert outcome(lambda: stream(path, require=require)) == expected
    # warnings are repeated when the store is used again
    assert outcome(lambda: stream(path, require=require)) == expected
    assert not [file for file in tmp_path.glob("store/*") if isinstance(expected[0], str)]
    asked = {"energy_key": "nonsense"}
    assert outcome(lambda: stream(path, **asked)) == outcome(lambda: read_frames(path, require=NEEDED, **asked))


def test_keys_that_the_first_frames_lack(tmp_path: Path) -> None:
    """The first chunk suggests other keys than all frames: the second pass has the labels of the right ones."""
    frames = labelled(300)
    for index, atoms in enumerate(frames):
        atoms.info["energy"] = 5.0
        if index < 200:
            atoms.info["dft_energy"] = atoms.info.pop("REF_energy")
    path = write_xyz(tmp_path / "a.xyz", frames)
    with (
        pytest.warns(ForcetuneWarning, match="energy taken from 'REF_energy'; 'energy' with other"),
        pytest.warns(ForcetuneWarning, match="200 of 300 frames have no energy"),
    ):
        result = stream(path, require=())
    assert result.keys.energy == "REF_energy"
    assert [frame.energy is None for frame in result.frames] == [index < 200 for index in range(300)]


def test_any_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of different files are not of different kinds; a message still counts the files."""
    monkeypatch.setattr("forcetune.frames.label_keys._MOST_WITNESSES", 3)
    files = [write_xyz(tmp_path / f"{index}.xyz", labelled(2, seed=index)) for index in range(6)]
    result = stream(*files)
    assert [(frame.origin.file, frame.origin.index) for frame in result.frames[9:11]] == [
        (str(files[4]), 1),
        (str(files[5]), 0),
    ]
    asked = {"energy_key": "nonsense"}
    assert outcome(lambda: stream(*files, **asked)) == outcome(lambda: read_frames(files, require=NEEDED, **asked))
    with pytest.raises(InputError, match=r"0\.xyz and 5 more"):
        stream(*files, **asked)


def test_a_damaged_file_is_told_by_its_frame(tmp_path: Path) -> None:
    path = write_xyz(tmp_path / "a.xyz", labelled(200))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-3]), encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.xyz, frame 199: the file ends after"):
        stream(path)
    path.write_text("".join([*lines[: 8 * 150 + 2], "C 0 0 zero\n", *lines[8 * 150 + 3 :]]), encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.xyz, frame 150: cannot be read"):
        stream(path)
    assert not list(tmp_path.glob("store/*"))


def test_a_store_is_found_again_by_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_xyz(tmp_path / "a.xyz", labelled(10))
    stream(path)

    def fail(*_: object) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_read", fail)
        assert len(stream(path).frames) == 10
        for other in ({"require": ("energy",)}, {"stress_key": "none"}):
            with pytest.raises(AssertionError, match="read again"):
                stream(path, **other)  # pyright: ignore[reportArgumentType]
        for changed in ("ase.__version__", "forcetune.frames.store.streaming.CANDIDATES"):
            with monkeypatch.context() as inner, pytest.raises(AssertionError, match="read again"):
                inner.setattr(changed, "another")
                stream(path)
    write_xyz(path, labelled(11))
    assert len(stream(path).frames) == 11


@pytest.mark.parametrize("cut", [0, 3], ids=["whole", "damaged"])
def test_a_file_that_changes_while_it_is_read_makes_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    path = write_xyz(tmp_path / "a.xyz", labelled(10))
    longer = write_xyz(tmp_path / "b.xyz", labelled(12)).read_text(encoding="utf-8").splitlines(keepends=True)

    def hashed(file: Path) -> str:
        digest = compute_sha256(file)
        file.write_text("".join(longer[: len(longer) - cut]), encoding="utf-8")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "compute_sha256", hashed)
        with pytest.raises(InputError, match=r"a\.xyz: changed while it was read; run again"):
            stream(path)
    assert not list((tmp_path / "store").iterdir())


def test_a_reading_that_dies_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_xyz(tmp_path / "a.xyz", labelled(300))
    with monkeypatch.context() as patch:
        patch.setattr("forcetune.frames.store.rows.os.fsync", failing(OSError(28, "No space left")))
        with pytest.raises(InputError, match=r"cannot be written \(No space left\); set data.store"):
            stream(path)
    with monkeypatch.context() as patch:
        patch.setattr(chunks.FileChunk, "_structures", failing(OSError(5, "Input/output error")))
        with pytest.raises(InputError, match=r"a\.xyz.*Input/output error"):
            stream(path)
    assert not list((tmp_path / "store").iterdir())
    assert len(stream(path).frames) == 300


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Half a store of the same data goes away, unless a process is still at work on it."""
    path = write_xyz(tmp_path / "a.xyz", labelled(10))
    stream(path)
    (place,) = (tmp_path / "store").iterdir()
    shutil.rmtree(place)
    with new_store._scratch(place) as busy:
        code = (
            "import os, sys; from pathlib import Path; from forcetune.frames.store import new_store\n"
            "with new_store.new_store(Path(sys.argv[1])) as store:\n"
            "    (store / 'rows.bin').write_bytes(bytes(1000)); os.kill(os.getpid(), 9)"
        )
        subprocess.run([sys.executable, "-c", code, str(place)], check=False, env=os.environ | {"PYTHONPATH": SOURCES})
        left = {one for one in (tmp_path / "store").iterdir() if one != busy}
        assert len(left) == 1 and (left.copy().pop() / "store" / "rows.bin").exists()
        stream(path)
        assert set((tmp_path / "store").iterdir()) == {place, busy}
    assert list((tmp_path / "store").iterdir()) == [place]


def failing(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def _emptied(name: str) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"{name} is empty": _emptied(name) for name in ("atoms.npy", "rows.bin", "ends.bin", "index.json")},
    "an index that was changed": lambda place: (place / "index.json").write_text(
        (place / "index.json").read_text(encoding="utf-8").replace('"warnings"', '"warning"'), encoding="utf-8"
    ),
    "ends of nonsense": lambda place: (place / "ends.bin").write_bytes(
        b"\xff" * 72 + (place / "ends.bin").read_bytes()[72:]
    ),
    "rows of nonsense": lambda place: (place / "rows.bin").write_bytes(b"\xff" * (place / "rows.bin").stat().st_size),
    "a missing file": lambda place: (place / "atoms.npy").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_a_store_is_told(tmp_path: Path, damage: str) -> None:
    path = write_xyz(tmp_path / "a.xyz", labelled(10))
    stream(path)
    (place,) = (tmp_path / "store").iterdir()
    DAMAGES[damage](place)
    with pytest.raises(ForcetuneError, match="remove this folder"):
        frames = stream(path).frames
        assert isinstance(frames, StoredFrames)
        assert frames.atoms.sum() and list(frames)


def test_a_store_that_becomes_shorter_while_it_is_open_is_told(tmp_path: Path) -> None:
    path = write_xyz(tmp_path / "a.xyz", labelled(10))
    frames = stream(path).frames
    (place,) = (tmp_path / "store").iterdir()
    os.truncate(place / "rows.bin", 100)
    with pytest.raises(ForcetuneError, match="remove this folder"):
        print(frames[9])


def test_a_folder_that_is_closed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_xyz(tmp_path / "a.xyz", labelled(10))
    stream(path)
    with monkeypatch.context() as patch:
        patch.setattr("forcetune.frames.store.rows._read_index", failing(PermissionError(13, "Permission denied")))
        with pytest.raises(InputError, match=r"cannot be opened \(Permission denied\); set data.store"):
            stream(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", failing(PermissionError(13, "Permission denied")))
        with pytest.raises(InputError, match=r"cannot be looked into \(Permission denied\)"):
            made_once(tmp_path / "place", lambda: None)


def test_a_damaged_store_is_told(tmp_path: Path) -> None:
    path = write_xyz(tmp_path / "a.xyz", labelled(10))
    stream(path)
    (place,) = (tmp_path / "store").iterdir()
    content = (place / "rows.bin").read_bytes()
    (place / "rows.bin").write_bytes(content[:-8])
    with pytest.raises(ForcetuneError, match="remove this folder"):
        stream(path)
    (place / "rows.bin").write_bytes(b"\xff" * len(content))
    with pytest.raises(ForcetuneError, match="remove this folder"):
        RowReader(place).row(3)


def dataset(path: Path, stream: str, **options: Any) -> Dataset:
    store = {"stream": stream, "store": str(path.parent / "store"), "workers": 0}
    return read_dataset(DataConfig.model_validate({"train": [str(path)], **options, **store}))


@pytest.mark.parametrize("valid", [0.3, 7, "file"])
def test_the_split_is_the_same(tmp_path: Path, valid: Any) -> None:
    path = write_xyz(tmp_path / "a.xyz", mixed(210))
    other = write_xyz(tmp_path / "b.xyz", labelled(5, seed=4))
    options = {"valid": [str(other)] if valid == "file" else valid, "test": [str(other)]}
    expected, actual = (dataset(path, mode, **options) for mode in ("off", "on"))
    assert actual.streamed and not expected.streamed
    assert actual.elements == expected.elements
    assert [str(frame.origin) for frame in actual.isolated] == [str(frame.origin) for frame in expected.isolated]
    for name, part in expected.splits.items():
        other_part = actual.splits[name]
        assert (part.sha256, part.keys, part.elements) == (other_part.sha256, other_part.keys, other_part.elements)
        for one, two in zip(part.frames, other_part.frames, strict=True):
            assert_same(one, two)
            assert one.origin == two.origin


def test_large_files_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_xyz(tmp_path / "a.xyz", labelled(5))
    config = DataConfig(train=[str(path)])
    assert not is_streamed(config)
    monkeypatch.setattr("forcetune.frames.dataset.STREAM_FROM", path.stat().st_size)
    assert is_streamed(config)
    assert not is_streamed(config.model_copy(update={"stream": "off"}))
    monkeypatch.setattr("forcetune.frames.dataset.STREAM_FROM", path.stat().st_size + 1)
    assert not is_streamed(config)


def test_rows_of_a_database_written_at_any_time_keep_their_order(tmp_path: Path) -> None:
    """SQLite would list ids by their time of creation, which has an index."""
    path = write_database(tmp_path / "a.db", labelled(300))
    times = np.random.default_rng(0).permutation(300).tolist()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany("UPDATE systems SET ctime = ? WHERE id = ?", zip(times, range(1, 301), strict=True))
        connection.execute("DELETE FROM systems WHERE id % 7 = 3")
    expected = read_frames(path, require=NEEDED).frames
    for one, other in zip(expected, stream(path).frames, strict=True):
        assert_same(one, other)
        assert one.origin == other.origin


@pytest.mark.parametrize("announced", [9, 11])
def test_another_number_of_frames_than_was_counted_is_told(tmp_path: Path, announced: int) -> None:
    path = write_xyz(tmp_path / "a.xyz", labelled(10))
    (chunk,) = chunks.iterate_chunks(path, "extxyz")
    with pytest.raises(
        InputError, match=rf"a\.xyz, frame 0: here are \w+ frames than the {announced} that were counted"
    ):
        list(replace(chunk, count=announced).structures())


def test_chunks_are_small_whatever_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = labelled(300)
    for name, write in FORMATS.items():
        kind = file_format(path := write(tmp_path / name, frames))
        assert [chunk.start for chunk in chunks.iterate_chunks(path, kind)][-1] >= 300 - chunks.CHUNK, name
    monkeypatch.setattr(chunks, "_CHUNK_TEXT", 1000)
    assert len(list(chunks.iterate_chunks(tmp_path / "a.xyz", "extxyz"))) > 100


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCETUNE_HOME", str(tmp_path / "home"))
    path = write_xyz(tmp_path / "a.xyz", labelled(5))
    read_dataset(DataConfig.model_validate({"train": [str(path)], "valid": 2, "stream": "on", "workers": 0}))
    assert [place.name[:7] for place in (tmp_path / "home" / "streams").iterdir()] == ["frames-"]


def test_a_stress_without_a_cell_is_named_as_in_memory(tmp_path: Path) -> None:
    structures = labelled(6)
    for index in (2, 4):
        structures[index].info["REF_stress"] = np.zeros(6)
    file = write_xyz(tmp_path / "frames.xyz", structures)
    streamed, in_memory = stream(file).frames, read_frames(file).frames
    assert isinstance(streamed, StoredFrames)
    assert streamed.stress_without_cell.tolist() == [False, False, True, False, True, False]
    model = backbone(elements=(1, 6, 8))
    messages = []
    for frames in (in_memory, streamed):
        with pytest.warns(ForcetuneWarning, match=r"frame 2: has a stress but no cell .* \(2 of 6 frames\)") as caught:
            build_graphs(model, frames)
        messages.append([str(one.message) for one in caught if one.category is ForcetuneWarning])
    assert messages[0] == messages[1]
