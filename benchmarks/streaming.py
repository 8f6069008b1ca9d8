"""How much memory and time a fit takes on frames that stay on disk, against frames in memory.

Small molecules of H, C, N and O (3 to 12 atoms), shaken, with energies and forces of springs between all atoms; every
measurement in a process of its own. The table goes to standard output, everything to ``--json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import h5py
import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.collections import g2

REFERENCES = {1: -13.6, 6: -1029.0, 7: -1484.0, 8: -2041.0}
STIFFNESS = 5.0
"""eV/Å²."""


def molecules(count: int, seed: int = 0) -> Iterator[Atoms]:
    """Shaken molecules with their labels as results of a calculator."""
    rng = np.random.default_rng(seed)
    kinds = [
        atoms for name in g2.names if 3 <= len(atoms := molecule(name)) <= 12 and set(atoms.numbers) <= {*REFERENCES}
    ]
    rest = [atoms.get_all_distances() + np.eye(len(atoms)) for atoms in kinds]
    for _ in range(count):
        kind = int(rng.integers(len(kinds)))
        atoms = kinds[kind].copy()
        atoms.set_initial_magnetic_moments(None)
        atoms.positions += 0.06 * rng.standard_normal(atoms.positions.shape)
        apart = atoms.positions[None] - atoms.positions[:, None]
        distance = np.linalg.norm(apart, axis=-1) + np.eye(len(atoms))
        stretch = distance - rest[kind]
        energy = sum(REFERENCES[int(z)] for z in atoms.numbers) + 0.25 * STIFFNESS * float((stretch**2).sum())
        forces = ((STIFFNESS * stretch / distance)[..., None] * apart).sum(axis=1)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        yield atoms


def write(path: Path, count: int) -> None:
    """A file of so many frames; the format by its ending."""
    if path.suffix == ".xyz":
        with path.open("w", encoding="utf-8") as stream:
            for atoms in molecules(count):
                ase.io.write(stream, atoms, format="extxyz")
    elif path.suffix in (".h5", ".hdf5"):
        with h5py.File(path, "w") as file:
            for index, atoms in enumerate(molecules(count)):
                group = file.require_group(f"config_batch_{index // 1000}").create_group(f"config_{index % 1000}")
                group["atomic_numbers"], group["positions"] = atoms.numbers, atoms.positions
                group["properties/energy"] = atoms.get_potential_energy()
                group["properties/forces"] = atoms.get_forces()
    else:
        path.unlink(missing_ok=True)
        with ase.db.connect(path) as database:
            for atoms in molecules(count):
                database.write(atoms)


class Watch:
    """Largest resident memory, MB: of this process so far, and of its largest child while the watch runs."""

    def __init__(self) -> None:
        self.worker = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
        while not self._done.wait(0.2):
            for child in children.read_text(encoding="utf-8").split():
                self.worker = max(self.worker, _peak(child))

    def peaks(self) -> dict[str, float]:
        self._done.set()
        self._thread.join()
        return {"process_mb": _peak("self"), "worker_mb": self.worker}


def _peak(process: str) -> float:
    """Of a process that runs our package; a child that is not yet one still shows the memory of its parent."""
    try:
        place = Path("/proc") / process
        if process != "self" and b"forcetune.utils.processes" not in (place / "cmdline").read_bytes():
            return 0.0
        status = (place / "status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1e3 if found else 0.0


def build(path: Path, store: Path, workers: int) -> dict[str, Any]:
    """Seconds to read the frames into a store, and to find their neighbours."""
    import torch

    from forcetune.frames.frame import LabelKeys
    from forcetune.frames.store.stored_frames import StoredFrames
    from forcetune.frames.store.streaming import stream_frames
    from forcetune.graphs.stored_graphs import stored_graphs

    watch, began = Watch(), time.monotonic()
    keys = LabelKeys(*["auto"] * len(LabelKeys._fields))
    found = stream_frames([str(path)], keys, ("energy", "forces"), "data", folder=store, workers=workers)
    read = time.monotonic()
    assert isinstance(found.frames, StoredFrames)
    stored_graphs(found.frames, 5.0, torch.float64, workers=workers)
    done = time.monotonic()
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    return {"read_s": read - began, "neighbours_s": done - read, "store_mb": size / 1e6, **watch.peaks()}


def fit(path: Path, store: Path, mode: str, method: str, edges: int, out: Path) -> dict[str, Any]:
    """One epoch from ``mini``."""
    import forcetune

    watch, began = Watch(), time.monotonic()
    settings = {
        "training.batch_edges": edges,
        "training.threads": 1,
        "training.optimizer": "adam",
        "training.learning_rate": 1e-3,
        "data.stream": mode,
        "data.store": str(store),
        "data.workers": 2,
        "output.forgetting": False,
        "output.overwrite": True,
    }
    run = forcetune.fit(path, model="mini", method=method, valid=0.05, epochs=1, out=out, settings=settings)
    training = run.results["training"]
    return {
        "seconds": time.monotonic() - began,
        "steps": training["steps"],
        "step_s": training["seconds_per_step"],
        "valid_forces_mae": run.after["valid"].forces_mae_mev_per_ang,
        **watch.peaks(),
    }


def alone(*arguments: object) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(kind: str, *arguments: str) -> dict[str, Any]:
    if kind == "build":
        path, store, workers = arguments
        return build(Path(path), Path(store), int(workers))
    path, store, mode, method, edges, out = arguments
    return fit(Path(path), Path(store), mode, method, int(edges), Path(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--formats", nargs="*", default=["db"], help="of the files: db, xyz, h5, aselmdb")
    parser.add_argument("--in-memory", type=int, default=10_000, help="up to so many frames also in memory")
    parser.add_argument("--builds", type=int, default=10_000, help="up to so many frames stores are also built alone")
    parser.add_argument("--method", default="gain")
    parser.add_argument("--edges", type=int, default=2000, help="of a batch")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="for files and stores; a temporary one by default")
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*given.one)))
        return
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        print(" ".join(f"{key}={value}" for key, value in shown.items()), flush=True)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for count in given.frames:
            for ending in given.formats:
                path = folder / f"{count}.{ending}"
                write(path, count)
                about = {"frames": count, "format": ending, "file_mb": path.stat().st_size / 1e6}
                for workers in (0, 1, 2) if count <= given.builds else ():
                    store = folder / f"{count}-{ending}-{workers}"
                    note(about | {"what": "build", "workers": workers} | alone("build", path, store, workers))
                if ending != given.formats[0]:
                    continue
                for mode in ("on", "off") if count <= given.in_memory else ("on",):
                    store, out = folder / f"{count}-fit", folder / f"{count}-{mode}-run"
                    found = alone("fit", path, store, mode, given.method, given.edges, out)
                    note(about | {"what": "fit", "stream": mode} | found)


if __name__ == "__main__":
    main()
