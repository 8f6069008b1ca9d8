"""Versions of a library installed beside the environment, and processes with them that tests compare with."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def run_worker(worker: Path, work: Mapping[str, Any], folders: Sequence[Path], title: str) -> str:
    """Run a script on some work, with these folders first on its path; returns what it printed.

    Args:
        worker: the script, whose argument is a JSON file.
        work: content of that file.
        folders: with packages; none for the environment's own.
        title: of library and version, for the error.

    Raises:
        RuntimeError: the process failed; says how.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "work.json"
        listing.write_text(json.dumps(work), encoding="utf-8")
        command = [sys.executable, "-P", "-W", "ignore", str(worker), str(listing)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{title} failed: {done.stdout[-500:]}\n{done.stderr[-3000:]}")
    return done.stdout
