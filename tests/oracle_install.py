"""Versions of a library installed beside the environment, for the processes that tests compare with."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock


class UnavailableError(Exception):
    """A library cannot be installed here; says why."""


def missing_packages(modules: Mapping[str, str]) -> list[str]:
    """Packages of which the environment does not have the module."""
    return [package for package, module in modules.items() if importlib.util.find_spec(module) is None]


def install_beside(
    folder: Path,
    name: str,
    requirements: Sequence[str],
    module: str,
    *,
    title: str,
    constraints: Path | None = None,
    timeout: float = 600,
) -> Path:
    """Install packages without what they need into ``folder/installed/name``, unless they are there.

    Args:
        folder: that several processes may share.
        name: of this set of packages.
        requirements: for pip.
        module: that is there once they are installed.
        title: what to call them in messages.
        constraints: of their versions.
        timeout: s.

    Returns:
        the folder to put on the path.

    Raises:
        UnavailableError: pip cannot get them.
    """
    target = folder / "installed" / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"install-{name}.lock"):
        if (target / module).is_dir():
            return target
        scratch = target.with_name(f".{name}")
        shutil.rmtree(scratch, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        limits: Iterable[str] = () if constraints is None else ("-c", str(constraints))
        command = [*pip, *limits, "--target", str(scratch), *requirements]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        if done.returncode or not (scratch / module).is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
            last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UnavailableError(f"{title} cannot be installed here: {last_line}")
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    return target
