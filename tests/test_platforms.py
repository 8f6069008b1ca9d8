"""What works on one system only: kept out of the package, or acted out."""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import forcetune
from forcetune.adapters.hub import repository_folder
from forcetune.backbones.loading import choose_device
from forcetune.errors import InputError
from forcetune.utils.files import atomic_folder, write_text

SOURCES = sorted(Path(forcetune.__file__).parent.rglob("*.py"))
OF_ONE_SYSTEM = {"fcntl", "resource", "pwd", "grp", "termios", "msvcrt", "winreg"}
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{name}{number}" for name in ("COM", "LPT") for number in range(1, 10))}


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fsync of what is open for reading, and no folder that replaces another."""
    fcntl = pytest.importorskip("fcntl")
    fsync, replace = os.fsync, Path.replace

    def fsync_written(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    def replace_file(path: Path, target: Path) -> Path:
        if Path(target).is_dir():
            raise PermissionError(errno.EACCES, "Access is denied")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync_written)
    monkeypatch.setattr(Path, "replace", replace_file)


@pytest.mark.usefixtures("windows")
def test_files_and_folders_are_replaced(tmp_path: Path) -> None:
    for text in ("one", "two, Å"):
        write_text(tmp_path / "file.txt", text)
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "inside.txt").write_text(text, encoding="utf-8")
        assert (tmp_path / "file.txt").read_text(encoding="utf-8") == text
        assert (tmp_path / "folder" / "inside.txt").read_text(encoding="utf-8") == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_a_file_that_another_program_has_open_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Windows does not replace."""
    (tmp_path / "file.txt").write_text("old", encoding="utf-8")

    def replace_open_file(path: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    monkeypatch.setattr(Path, "replace", replace_open_file)
    with pytest.raises(InputError, match=r"file\.txt: cannot be replaced \(The process .*close the programs"):
        write_text(tmp_path / "file.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert (tmp_path / "file.txt").read_text(encoding="utf-8") == "old"


def calls(name: str) -> list[tuple[str, set[str | None]]]:
    """Every call of a function of this name in the package: its place, and the names of its keywords."""
    places = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
                places.append((f"{path}, line {node.lineno}", {keyword.arg for keyword in node.keywords}))
    return places


def test_temporary_folders_may_hold_a_file_that_is_still_open() -> None:
    """Which Windows does not remove."""
    places = calls("TemporaryDirectory")
    assert places
    for place, keywords in places:
        assert "ignore_cleanup_errors" in keywords, place


def test_output_of_programs_is_read_as_utf8() -> None:
    for place, keywords in calls("run") + calls("Popen"):
        assert not keywords & {"text", "universal_newlines"} or "encoding" in keywords, place


def test_no_symbolic_link_is_made() -> None:
    """Windows lets administrators make them only, and Optuna locks a journal by one unless it is told otherwise."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"symlink_to\(|os\.symlink\(|JournalFileSymlinkLock", text), path
    for place, keywords in calls("JournalFileBackend"):
        assert "lock_obj" in keywords, place


def test_dates_need_no_extension_of_one_system() -> None:
    for path in SOURCES:
        assert not re.search(r"%[-#][a-zA-Z]", path.read_text(encoding="utf-8")), path


def test_modules_of_one_system_may_be_missing() -> None:
    """They are imported inside ``try``."""
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        guarded = {id(node) for tried in ast.walk(tree) if isinstance(tried, ast.Try) for node in ast.walk(tried)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and OF_ONE_SYSTEM & {alias.name for alias in node.names}:
                assert id(node) in guarded, f"{path}, line {node.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in ("fork", "getuid", "uname", "mkfifo", "killpg"), f"{path}, line {node.lineno}"


def test_text_is_read_and_written_as_utf8_everywhere() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            keywords = {keyword.arg for keyword in node.keywords}
            if name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
                assert "encoding" in keywords or len(node.args) > (name == "write_text"), f"{path}, line {node.lineno}"


def test_outputs_in_the_encoding_of_a_region_do_not_fail() -> None:
    """As on Windows, where what goes to a pipe or file is in code page 1252."""
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    run = subprocess.run(
        [sys.executable, "-m", "forcetune", "models"], capture_output=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "?B97M-D3(BJ)" in run.stdout.decode("cp1252")
    run = subprocess.run(
        [sys.executable, "-m", "forcetune", "evaluate", "mini", "→.xyz"],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert b"error: ?.xyz" in run.stderr


def test_names_of_files_can_stand_on_every_system() -> None:
    """Windows knows no ``:`` or ``?`` in names, no difference of case, and keeps the names of devices for itself."""
    files = [path.relative_to(SOURCES[0].parent).as_posix() for path in SOURCES[0].parent.rglob("*") if path.is_file()]
    assert len({name.lower() for name in files}) == len(files)
    for name in files:
        assert not re.search(r'[<>:"\\|?*\x00-\x1f]|[ .](/|$)', name), name
        assert not {part.split(".")[0].upper() for part in name.split("/")} & DEVICES, name
        assert len(name) < 120, name


def test_adapters_of_a_hub_are_kept_under_names_that_every_system_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCETUNE_HOME", "home")
    for repository in ("con/aux", "lab/NUL", "lab/name"):
        assert repository_folder(repository).name.upper() not in DEVICES


def test_an_apple_computes_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPU has no float64, in which energies are summed."""
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(InputError, match="no float64"):
        choose_device("mps")


def test_nothing_is_forked() -> None:
    """Windows has no forks, and those of macOS hang: work for other processes goes to fresh interpreters."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bimport multiprocessing|from multiprocessing|ProcessPoolExecutor|preexec_fn", text), (
            path
        )
