"""Work for other processes: results in order, errors as they were raised, a death that is reported."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from forcetune.errors import ForcetuneError, InputError
from forcetune.utils import processes
from forcetune.utils.files import as_path, compute_sha256
from forcetune.utils.processes import WorkerDiedError, as_they_end, map_in_order, worker_count


def files(folder: Path, number: int) -> list[Path]:
    paths = [folder / str(index) for index in range(number)]
    for file in paths:
        file.write_text(file.name * 1000, encoding="utf-8")
    return paths


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(tmp_path: Path, workers: int) -> None:
    tasks = files(tmp_path, 7)
    assert list(map_in_order(compute_sha256, tasks, workers)) == [compute_sha256(file) for file in tasks]
    assert list(map_in_order(compute_sha256, [], workers)) == []


def test_tasks_are_taken_as_fast_as_they_are_worked_on(tmp_path: Path) -> None:
    (file,) = files(tmp_path, 1)
    taken = 0

    def tasks() -> object:
        nonlocal taken
        for taken in count(1):  # noqa: B007
            yield file

    results = map_in_order(compute_sha256, tasks(), 2)  # pyright: ignore[reportArgumentType]
    for _ in range(5):
        next(results)
    assert taken <= 5 + 3
    results.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_errors_of_ours_come_as_they_are_and_others_as_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no name that a file can have"):
        list(map_in_order(as_path, ["a\0b"], 1))
    with pytest.raises(ForcetuneError, match="a worker process failed \\(FileNotFoundError"):
        list(map_in_order(compute_sha256, [tmp_path / "missing"], 1))


def test_a_death_is_told() -> None:
    with pytest.raises(WorkerDiedError, match=r"ended without an answer \(exit status 7\)") as died:
        list(map_in_order(os._exit, [7], 1))
    assert died.value.task == 7
    assert "memory" not in str(died.value)
    with pytest.raises(
        WorkerDiedError, match=r"killed \(exit status -9\), perhaps for want of memory; set data.workers"
    ):
        list(map_in_order(signal.raise_signal, [signal.SIGKILL], 1))


def test_a_worker_that_cannot_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(ForcetuneError, match="could not be started"):
        list(map_in_order(compute_sha256, files(tmp_path, 1), 1))


def test_modules_beside_an_installed_package_do_not_hide_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backports of it lie in site-packages, where this package does, too."""
    place = tmp_path / "site-packages"
    shutil.copytree(
        Path(processes.__file__).parents[1], place / "forcetune", ignore=shutil.ignore_patterns("data", "*.model")
    )
    for name in ("hashlib", "dataclasses"):
        (place / f"{name}.py").write_text("open('was-run', 'w')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(processes, "__file__", str(place / "forcetune" / "utils" / "processes.py"))
    list(map_in_order(compute_sha256, files(tmp_path, 1), 1))
    assert not (tmp_path / "was-run").exists()


def test_a_module_beside_the_data_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "ase", "torch", "h5py"):
        (tmp_path / f"{name}.py").write_text("open('was-run', 'w')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    list(map_in_order(compute_sha256, files(tmp_path, 1), 1))
    assert not (tmp_path / "was-run").exists()


def test_numbers_of_workers() -> None:
    assert worker_count(3) == 3
    assert worker_count(0) == 0
    assert 1 <= worker_count(None) <= 8


def test_results_as_they_end_and_a_death_that_leaves_the_others_alone() -> None:
    results = dict(as_they_end(abs, [-1, -2, 3], 2, option="processes"))
    assert results == {-1: 1, -2: 2, 3: 3}
    died = dict(as_they_end(os._exit, [7, 8], 2, option="processes"))
    assert all(
        isinstance(error, WorkerDiedError) and f"exit status {task}" in str(error) for task, error in died.items()
    )
    killed = dict(as_they_end(signal.raise_signal, [signal.SIGKILL, 0], 2, option="processes"))
    assert "set processes lower" in str(killed[signal.SIGKILL])
    assert killed[0] is None
    with pytest.raises(ForcetuneError, match="a worker process failed"):
        dict(as_they_end(compute_sha256, [Path("missing")], 1, option="processes"))


def test_other_processes_end_with_whoever_waits_for_them() -> None:
    results = as_they_end(time.sleep, [0, 600], 2, option="processes")
    began = time.monotonic()
    assert next(results) == (0, None)
    results.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert time.monotonic() - began < 300
