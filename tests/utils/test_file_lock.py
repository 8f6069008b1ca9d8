"""Folders that one command at a time writes to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import forcetune
from forcetune.config import load_config
from forcetune.errors import InputError
from forcetune.utils.file_lock import FolderLock
from systems import write_labelled

pytest.importorskip("fcntl", reason="folders are held by flock")

HOLD = """
import sys
from pathlib import Path
from forcetune.utils.file_lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_writer_until_it_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another forcetune command is writing to it"), FolderLock(tmp_path):
            pass
        other.kill()
        other.wait()
        with FolderLock(tmp_path):  # a killed one holds nothing
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_held_from_when_it_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with FolderLock(folder) as lock:
        with FolderLock(folder):  # it is not held yet
            pass
        lock.create()
        lock.create()
        assert folder.is_dir()
        with pytest.raises(InputError, match=r"run: another forcetune"), FolderLock(folder):
            pass


def test_runs_loops_and_comparisons_keep_out_of_a_held_folder(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "a.xyz")
    options = {"method": "readout", "valid": 4, "epochs": 1}
    run = forcetune.fit(data, model="mini", **options, out=tmp_path / "run").folder
    before = sorted(path.name for path in run.iterdir())
    empty = tmp_path / "empty"
    empty.mkdir()
    with FolderLock(run), FolderLock(empty):
        with pytest.raises(InputError, match="another forcetune"):
            forcetune.fit(data, model="mini", **options, out=run, settings={"output.overwrite": True})
        with pytest.raises(InputError, match="another forcetune"):
            forcetune.learn(data, start=data, labeller="ase.calculators.emt:EMT", model="mini", **options, out=empty)
        with pytest.raises(InputError, match="another forcetune"):
            forcetune.compare(load_config(run / "config.yaml", overrides={"output.run": str(empty)}), ["readout"])
        (run / "results.json").rename(tmp_path / "aside.json")
        with pytest.raises(InputError, match="another forcetune"):
            forcetune.resume(run)
        (tmp_path / "aside.json").rename(run / "results.json")
    assert sorted(path.name for path in run.iterdir()) == before
    assert list(empty.iterdir()) == []


def test_of_two_that_make_a_folder_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other has passed the checks of a folder that was not there, and touches nothing."""
    data = write_labelled(tmp_path / "a.xyz")
    held = FolderLock(tmp_path / "run")

    def create(lock: FolderLock) -> None:
        monkeypatch.undo()
        with held:
            held.create()
            (tmp_path / "run" / "config.yaml").write_text("of the first")
            lock.create()

    monkeypatch.setattr(FolderLock, "create", create)
    with pytest.raises(InputError, match="another forcetune"):
        forcetune.fit(
            data,
            model="mini",
            method="readout",
            valid=4,
            epochs=1,
            out=tmp_path / "run",
            settings={"output.overwrite": True},
        )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert (tmp_path / "run" / "config.yaml").read_text() == "of the first"
