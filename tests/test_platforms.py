"""What works on one system only: kept out of the package, or acted out."""

from __future__ import annotations

import ast
import errno
import os
import re
from pathlib import Path

import pytest

import forcetune
from forcetune.utils.files import atomic_folder, write_text

SOURCES = sorted(Path(forcetune.__file__).parent.rglob("*.py"))
OF_ONE_SYSTEM = {"fcntl", "resource", "pwd", "grp", "termios", "msvcrt", "winreg"}


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
