"""sevenn itself, of any version, in a process of its own.

A version is installed beside the environment (``pip install --no-deps --target``); what it needs besides and is missing
here goes into another folder. A process with both on its path does the work (``sevennet_worker.py``). Everything is
kept in the folder that ``FORCETUNE_SEVENNET`` names, or in pytest's cache; results are stored until the recipes, the
worker or the checkpoint change.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from filelock import FileLock

from oracle_install import UnavailableError, install_beside, missing_packages, run_worker
from sevennet_models import RECIPES, Recipe

FOLDER_VARIABLE = "FORCETUNE_SEVENNET"
REQUIRED_VARIABLE = "FORCETUNE_REQUIRE_VERSIONS"
NEWEST = "0.13.0"
_WORKER = Path(__file__).with_name("sevennet_worker.py")
_CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints" / "sevennet.txt"
# modules that sevenn needs, by the name of their package; PyTorch, NumPy, SciPy and ASE are forcetune's own
_NEEDED = {
    "torch-geometric": "torch_geometric",
    "opt-einsum": "opt_einsum",
    "opt-einsum-fx": "opt_einsum_fx",
    "sympy": "sympy",
    "mpmath": "mpmath",
    "pandas": "pandas",
    "python-dateutil": "dateutil",
    "scikit-learn": "sklearn",
    "narwhals": "narwhals",
    "joblib": "joblib",
    "cloudpickle": "cloudpickle",
    "threadpoolctl": "threadpoolctl",
    "requests": "requests",
    "urllib3": "urllib3",
    "certifi": "certifi",
    "idna": "idna",
    "charset-normalizer": "charset_normalizer",
    "braceexpand": "braceexpand",
    "tqdm": "tqdm",
    "packaging": "packaging",
    "jinja2": "jinja2",
    "markupsafe": "markupsafe",
    "fsspec": "fsspec",
    "psutil": "psutil",
    "pyparsing": "pyparsing",
    "xxhash": "xxhash",
    "aiohttp": "aiohttp",
    "attrs": "attr",
    "aiohappyeyeballs": "aiohappyeyeballs",
    "aiosignal": "aiosignal",
    "frozenlist": "frozenlist",
    "multidict": "multidict",
    "propcache": "propcache",
    "yarl": "yarl",
}

Results = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Request:
    """A checkpoint, a modality of it, and structures to compute."""

    model: Path
    modal: str | None
    structures: Sequence[Atoms]


@dataclass(frozen=True, slots=True)
class SevenNets:
    """Versions of sevenn and what they make and compute, kept in a folder that several processes may share."""

    folder: Path

    def install(self, version: str = NEWEST) -> Path:
        """The folder with this version of sevenn.

        Raises:
            UnavailableError: pip cannot get it.
        """
        # e3nn goes first on the path, whatever mace-torch has brought
        needed = ["e3nn", *missing_packages(_NEEDED)]
        install_beside(self.folder, "needed", needed, "e3nn", title="sevenn needed", constraints=_CONSTRAINTS)
        return install_beside(self.folder, version, [f"sevenn=={version}"], "sevenn", title=f"sevenn {version}")

    def published(self, name: str) -> Path:
        """The published checkpoint in this folder of the wheel."""
        (checkpoint,) = (self.install() / "sevenn" / "pretrained_potentials" / name).glob("*.pth")
        return checkpoint

    def run(self, work: dict[str, Any], version: str = NEWEST) -> str:
        """Run some work in a process with this version; returns what it printed.

        Raises:
            UnavailableError: pip cannot get the version.
            RuntimeError: the process failed; says how.
        """
        installed = self.install(version)
        folders = [installed, installed.parent / "needed"]
        output = run_worker(_WORKER, work, folders, f"sevenn {version}")
        assert output.strip().endswith("False"), "forcetune was imported beside sevenn"
        return output

    # ---- making ----------------------------------------------------------------------------------------------------

    def make(self, names: Sequence[str], version: str = NEWEST) -> list[Path]:
        """Checkpoints of recipes, made where they are not there yet."""
        files = {name: self.folder / version / f"{name}-{_digest(RECIPES[name])}.pth" for name in names}
        (self.folder / version).mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"make-{version}.lock"):
            missing = [name for name, path in files.items() if not path.is_file()]
            if missing:
                with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                    jobs = [
                        _making(RECIPES[name], Path(scratch) / f"{index}.pth") for index, name in enumerate(missing)
                    ]
                    self.run({"make": jobs}, version)
                    for name, job in zip(missing, jobs, strict=True):
                        Path(job["model"]).replace(files[name])
        return list(files.values())

    # ---- computing -------------------------------------------------------------------------------------------------

    def compute(
        self,
        kind: str,
        requests: Sequence[Request],
        *,
        version: str = NEWEST,
        **options: Any,
    ) -> list[Results]:
        """What sevenn computes from checkpoints, in one process; results are stored.

        Args:
            kind: ``evaluate``, ``calculate`` or ``deploy``, see the worker.
            requests: what to compute.
            options: of the work.
        """
        results_folder = self.folder / "results"
        results_folder.mkdir(parents=True, exist_ok=True)
        tag = f"{kind} {version} {sorted(options.items())} {_WORKER.read_text(encoding='utf-8')}"
        places = [results_folder / f"{_fingerprint(tag, request)}.npz" for request in requests]
        todo = [k for k, place in enumerate(places) if not place.is_file()]
        if todo:
            with tempfile.TemporaryDirectory(dir=self.folder) as name:
                scratch = Path(name)
                jobs = []
                for k in todo:
                    one, folder = requests[k], scratch / str(k)
                    folder.mkdir()
                    np.savez(folder / "structures.npz", **arrays_of(one.structures))  # pyright: ignore[reportArgumentType]
                    job = {"model": str(one.model.resolve()), "modal": one.modal, "folder": str(folder)}
                    files = {"structures": str(folder / "structures.npz"), "results": str(scratch / f"{k}.npz")}
                    jobs.append(job | files | options)
                self.run({kind: jobs}, version)
                for k in todo:
                    (scratch / f"{k}.npz").replace(places[k])
        results = []
        for place in places:
            with np.load(place) as table:
                results.append({key: table[key] for key in table.files})
        return results


def arrays_of(structures: Sequence[Atoms]) -> dict[str, np.ndarray]:
    arrays = {}
    for k, atoms in enumerate(structures):
        arrays |= {f"{k}/numbers": atoms.numbers, f"{k}/positions": atoms.positions}
        arrays |= {f"{k}/cell": atoms.cell.array, f"{k}/pbc": atoms.pbc}
    return arrays


def open_folder(config: pytest.Config, fallback: Path) -> SevenNets:
    """Where versions and results are kept: the folder that is named, pytest's cache, or ``fallback``."""
    named = os.environ.get(FOLDER_VARIABLE)
    cache = getattr(config, "cache", None)
    return SevenNets(Path(named) if named else fallback if cache is None else Path(cache.mkdir("sevennet")))


def skip_or_raise(error: UnavailableError) -> None:
    """Without sevenn there is nothing to compare with; ``FORCETUNE_REQUIRE_VERSIONS`` makes that a failure."""
    if os.environ.get(REQUIRED_VARIABLE):
        raise error
    pytest.skip(str(error))


def _making(recipe: Recipe, path: Path) -> dict[str, Any]:
    species = recipe.species if recipe.species == "univ" else list(recipe.species)
    made = {"config": dict(recipe.config), "species": species, "modalities": list(recipe.modalities)}
    return made | {"seed": 0, "model": str(path)}


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(f"{recipe} {_WORKER.read_text(encoding='utf-8')}".encode()).hexdigest()[:16]


def _fingerprint(tag: str, request: Request) -> str:
    digest = hashlib.sha256(f"{tag} {request.modal}".encode())
    digest.update(request.model.read_bytes())
    for value in arrays_of(request.structures).values():
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:32]
