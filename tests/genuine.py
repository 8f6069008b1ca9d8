"""Files of mace-torch itself, of any version, with what that version computes from them.

A version is installed beside the environment (``pip install --no-deps --target``), and a process with that folder on
its path makes, saves and evaluates models (``genuine_worker.py``). Both are kept in the folder that
``FORCETUNE_GENUINE`` names, or in pytest's cache, and are made again when the recipes change.

``python tests/genuine.py FOLDER [VERSION…]`` makes every model of these versions (all by default).
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parent))

from genuine_models import BY_NAME, RECIPES, VERSIONS, Recipe, structures
from oracle_install import install_beside, run_worker

FOLDER_VARIABLE = "FORCETUNE_GENUINE"
_WORKER = Path(__file__).with_name("genuine_worker.py")


@dataclass(frozen=True, slots=True)
class Structure:
    """Numbers (atoms,), positions (atoms, 3) and cell (3, 3) in Å, pbc (3,), exactly as the oracle had them."""

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray


@dataclass(frozen=True, slots=True)
class Results:
    """What a version computes from one of its files.

    The arrays' names are ``STRUCTURE/HEAD/QUANTITY`` (energy, forces, node_feats; stress of crystals), with ``double/``
    in front for a float32 model turned into float64; ``grad/PARAMETER`` are the gradients of E + Σ F² summed over the
    structures 0 and 1, head 0.
    """

    arrays: dict[str, np.ndarray]

    @property
    def heads(self) -> list[str]:
        return [str(head) for head in self.arrays["heads"]]

    @property
    def is_float32(self) -> bool:
        """Whether the file is in float32, so that there are results of the model turned into float64, too."""
        return "double/0/0/energy" in self.arrays

    @property
    def structures(self) -> list[Structure]:
        count = 1 + max(int(name.split("/")[1]) for name in self.arrays if name.startswith("structures/"))
        names = ("numbers", "positions", "cell", "pbc")
        return [Structure(*(self.arrays[f"structures/{k}/{name}"] for name in names)) for k in range(count)]

    def get(self, structure: int, quantity: str, *, head: int = 0, double: bool = False) -> np.ndarray | None:
        """A quantity, computed in float64 if ``double``; None where there is none."""
        place = f"{structure}/{head}/{quantity}"
        return self.arrays.get(f"double/{place}", self.arrays.get(place)) if double else self.arrays.get(place)

    def gradients(self) -> dict[str, np.ndarray]:
        return {name.removeprefix("grad/"): value for name, value in self.arrays.items() if name.startswith("grad/")}


@dataclass(frozen=True, slots=True)
class Genuine:
    """A file, and what the version that wrote it computes from it."""

    version: str
    recipe: Recipe
    path: Path
    results: Results


class Versions:
    """Versions of mace-torch and their models, kept in a folder that several processes may share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def install(self, version: str) -> Path:
        """The folder with this version, installed if it is not there.

        Raises:
            UnavailableError: pip cannot get it.
        """
        requirements, title = [f"mace-torch=={version}"], f"mace-torch {version}"
        return install_beside(self.folder, version, requirements, "mace", title=title, timeout=300)

    def run(self, version: str | None, work: dict[str, Any]) -> str:
        """Run some work in a process with this version, None for the environment's own; returns what it printed.

        Raises:
            UnavailableError: pip cannot get the version.
            RuntimeError: the process failed; says how.
        """
        folders = [] if version is None else [self.install(version)]
        return run_worker(_WORKER, work, folders, f"mace-torch {version}")

    def make(self, version: str, names: Sequence[str]) -> None:
        """Make those of these models that are not there yet.

        Raises:
            UnavailableError: pip cannot get the version.
            RuntimeError: some cannot be made; those that can are kept.
        """
        place = self.folder / version
        place.mkdir(exist_ok=True)
        with FileLock(self.folder / f"make-{version}.lock"):
            recipes = [BY_NAME[name] for name in names if not self._is_made(version, BY_NAME[name])]
            if not recipes:
                return
            with tempfile.TemporaryDirectory(dir=place) as scratch:
                printed = self.run(version, {"make": [_job(recipe, Path(scratch)) for recipe in recipes]})
                for recipe in recipes:
                    if not (Path(scratch) / f"{recipe.name}.npz").is_file():
                        continue
                    for ending in (".npz", ".model"):
                        (Path(scratch) / f"{recipe.name}{ending}").replace(place / f"{recipe.name}{ending}")
                    (place / f"{recipe.name}.sha256").write_text(_fingerprint(recipe), encoding="utf-8")
            failures = [line for line in printed.splitlines() if line.startswith("FAILED")]
            if failures:
                raise RuntimeError(f"mace-torch {version}: " + "; ".join(failures))

    def _is_made(self, version: str, recipe: Recipe) -> bool:
        mark = self.folder / version / f"{recipe.name}.sha256"
        return mark.is_file() and mark.read_text(encoding="utf-8") == _fingerprint(recipe)

    def get(self, version: str, name: str, *, together: Sequence[str] = ()) -> Genuine:
        """A model of a version; those named ``together`` are made in the same process where they are missing."""
        self.make(version, sorted({name, *together}))
        place = self.folder / version
        with np.load(place / f"{name}.npz") as table:
            results = Results({key: table[key] for key in table.files})
        return Genuine(version, BY_NAME[name], place / f"{name}.model", results)

    def evaluate(self, version: str | None, model: Path, iterate_structures: Genuine) -> Results:
        """What a version computes from a file, which another may have written, for the structures of a model."""
        with tempfile.TemporaryDirectory() as folder:
            inputs, outputs = Path(folder) / "structures.npz", Path(folder) / "results.npz"
            mine = {k: v for k, v in iterate_structures.results.arrays.items() if k.startswith("structures/")}
            np.savez(inputs, **{name.removeprefix("structures/"): value for name, value in mine.items()})
            job = {"model": str(model.resolve()), "structures": str(inputs), "results": str(outputs)}
            self.run(version, {"evaluate": [job]})
            with np.load(outputs) as table:
                return Results({key: table[key] for key in table.files} | mine)


def _job(recipe: Recipe, folder: Path) -> dict[str, Any]:
    inputs = folder / f"{recipe.name}.structures.npz"
    np.savez(inputs, **structures(recipe.elements))  # pyright: ignore[reportArgumentType]
    return {
        **{name: getattr(recipe, name) for name in ("name", "kind", "form", "dtype", "arguments")},
        "structures": str(inputs),
        "model": str(folder / f"{recipe.name}.model"),
        "results": str(folder / f"{recipe.name}.npz"),
    }


def _fingerprint(recipe: Recipe) -> str:
    made_from = {name: getattr(recipe, name) for name in ("kind", "form", "dtype", "arguments")}
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode())
    digest.update(_WORKER.read_bytes())
    for value in structures(recipe.elements).values():
        digest.update(value.tobytes())
    return digest.hexdigest()


def main() -> None:
    versions = Versions(Path(sys.argv[1]))
    for version in sys.argv[2:] or VERSIONS:
        names = [recipe.name for recipe in RECIPES if recipe.fits(version)]
        try:
            versions.make(version, names)
            print(f"{version}: {len(names)} models", flush=True)
        except RuntimeError as error:
            print(error, flush=True)


if __name__ == "__main__":
    main()
