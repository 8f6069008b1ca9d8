"""nequip itself, of any version, in a process of its own.

A version is installed beside the environment (``pip install --no-deps --target``); what it needs besides and is missing
here goes into other folders, as versions want different e3nn. A process with all of them on its path does the work
(``nequip_worker.py``). Everything is kept in the folder that ``FORCETUNE_NEQUIP`` names, or in pytest's cache; results
are computed again when the recipes, the worker or the model change.
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
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from filelock import FileLock

from nequip_models import NEWEST, RECIPES, Recipe
from oracle_install import install_beside, missing_packages, run_worker
from sevennet_models import structures
from sevennet_oracle import Results, arrays_of

FOLDER_VARIABLE = "FORCETUNE_NEQUIP"
_WORKER = Path(__file__).with_name("nequip_worker.py")
_CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints" / "nequip.txt"
# modules that nequip needs, by the name of their package; PyTorch, NumPy, SciPy, ASE and matscipy are forcetune's own
_NEEDED = {
    "hydra-core": "hydra",
    "omegaconf": "omegaconf",
    "antlr4-python3-runtime": "antlr4",
    "lightning": "lightning",
    "pytorch-lightning": "pytorch_lightning",
    "lightning-utilities": "lightning_utilities",
    "torchmetrics": "torchmetrics",
    "requests": "requests",
    "urllib3": "urllib3",
    "certifi": "certifi",
    "idna": "idna",
    "charset-normalizer": "charset_normalizer",
    "opt-einsum": "opt_einsum",
    "opt-einsum-fx": "opt_einsum_fx",
    "sympy": "sympy",
    "mpmath": "mpmath",
    "lmdb": "lmdb",
    "tqdm": "tqdm",
    "packaging": "packaging",
    "fsspec": "fsspec",
}


@dataclass(frozen=True, slots=True)
class Request:
    """A model file and structures to compute."""

    model: Path
    structures: Sequence[Atoms]


@dataclass(frozen=True, slots=True)
class Made:
    """A recipe in both forms of files."""

    checkpoint: Path
    package: Path


@dataclass(frozen=True, slots=True)
class NequIPs:
    """Versions of nequip and what they make and compute, kept in a folder that several processes may share."""

    folder: Path

    def install(self, version: str = NEWEST) -> list[Path]:
        """The folders with this version of nequip and what it needs.

        Raises:
            UnavailableError: pip cannot get it.
        """
        e3nn = "0.5.9" if int(version.split(".")[1]) < 17 else "0.6.0"
        title = f"nequip {version}"
        folders = [
            install_beside(self.folder, version, [f"nequip=={version}"], "nequip", title=title),
            # goes before whatever mace-torch has brought
            install_beside(self.folder, f"e3nn-{e3nn}", [f"e3nn=={e3nn}"], "e3nn", title=title),
        ]
        if needed := missing_packages(_NEEDED):
            module = _NEEDED[needed[0]]
            folders.append(install_beside(self.folder, "needed", needed, module, title=title, constraints=_CONSTRAINTS))
        return folders

    def run(self, work: dict[str, Any], version: str = NEWEST) -> str:
        """Run some work in a process with this version; returns what it printed.

        Raises:
            UnavailableError: pip cannot get the version.
            RuntimeError: the process failed; says how.
        """
        output = run_worker(_WORKER, work, self.install(version), f"nequip {version}")
        assert output.strip().endswith("False"), "forcetune was imported beside nequip"
        return output

    def make(self, names: Sequence[str], version: str = NEWEST) -> list[Made]:
        """Checkpoints and packages of recipes, made where they are not there yet."""
        place = self.folder / "made" / version
        files = {name: _places(place, name) for name in names}
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"make-{version}.lock"):
            missing = [name for name, made in files.items() if not made.package.is_file()]
            if missing:
                jobs = [self._making(RECIPES[name], files[name]) for name in missing]
                self.run({"make": jobs}, version)
                for name in missing:
                    scratch = _scratch(files[name].package)
                    scratch.replace(files[name].package)
        return list(files.values())

    def _making(self, recipe: Recipe, made: Made) -> dict[str, Any]:
        data = self.folder / f"cells-{'-'.join(recipe.symbols)}.xyz"
        if not data.is_file():
            # nequip-compile compares the stress of a training frame, so all of them need a cell with a volume
            with_cells = [atoms for atoms in structures(recipe.symbols) if atoms.cell.volume > 0]
            write(data, [_labelled(atoms) for atoms in with_cells], format="extxyz")
        work = {"config": dict(recipe.config), "trainer": recipe.trainer, "seed": 0, "data": str(data)}
        # a package says in itself what it was called, and its name has to end as it does
        return work | {"checkpoint": str(made.checkpoint), "package": str(_scratch(made.package))}

    def compute(
        self, kind: str, requests: Sequence[Request], *, version: str = NEWEST, **options: Any
    ) -> list[Results]:
        """What nequip computes from files, in one process; kept.

        Args:
            kind: ``evaluate``, ``calculate`` or ``compile``, see the worker.
            requests: what to compute.
            version: of nequip.
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
                    job = {"model": str(one.model.resolve()), "folder": str(folder)}
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


def _labelled(atoms: Atoms) -> Atoms:
    rng = np.random.default_rng(len(atoms))
    atoms = atoms.copy()
    atoms.calc = SinglePointCalculator(atoms, energy=float(rng.normal()), forces=rng.normal(size=(len(atoms), 3)))
    return atoms


def _scratch(path: Path) -> Path:
    return path.with_name(f"new-{path.name}")


def _places(folder: Path, name: str) -> Made:
    digest = hashlib.sha256(f"{RECIPES[name]} {_WORKER.read_text(encoding='utf-8')}".encode()).hexdigest()[:16]
    # commas and blanks in names are nothing that hydra or shells like
    stem = f"{name.replace(' ', '-').replace(',', '')}-{digest}"
    return Made(folder / f"{stem}.ckpt", folder / f"{stem}.nequip.zip")


def _fingerprint(tag: str, request: Request) -> str:
    digest = hashlib.sha256(tag.encode())
    digest.update(request.model.read_bytes())
    for value in arrays_of(request.structures).values():
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:32]


def open_folder(config: pytest.Config, fallback: Path) -> NequIPs:
    """Where versions and results are kept: the folder that is named, pytest's cache, or ``fallback``."""
    named = os.environ.get(FOLDER_VARIABLE)
    cache = getattr(config, "cache", None)
    return NequIPs(Path(named) if named else fallback if cache is None else Path(cache.mkdir("nequip")))
