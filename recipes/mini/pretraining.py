"""The models ``mini`` and ``organic``: MACE trained from random weights on the pretraining data.

    python -m recipes.mini.pretraining --data FOLDER/pretraining --out FOLDER/model [--epochs N] [--name organic]

``organic`` is the same model four times as wide, of the size of published ones: for comparisons of methods.

1. A MACE with random weights; the mean number of neighbours and the scale of the energies come from the data, E0 are
   the free atoms. The shift is zero, so that free atoms have exactly their energies.
2. ``scratch`` trains it (``FOLDER/model/run``; an interrupted run goes on, a finished one is not repeated).
3. It is tested on molecules, dimers and compressed structures that it has not seen, and every pair of elements is
   pushed together.
4. ``mini.safetensors`` and its card are written to ``FOLDER/model``, and into the package by ``--install``
   (``organic``: into ``benchmarks/models``).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import forcetune
from forcetune.backbones.mace.architecture import MaceArchitecture
from forcetune.backbones.mace.backbone import MaceBackbone
from forcetune.backbones.mace.content import content_from_network, draw_network
from forcetune.backbones.mace.writing import write_plain
from forcetune.errors import ForcetuneError
from forcetune.evaluation.metrics import build_graphs
from forcetune.frames.read import read_frames
from forcetune.runs.folder import has_checkpoint
from forcetune.utils.files import write_text
from recipes.mini.molecules import ELEMENTS
from recipes.mini.pretraining_card import card
from recipes.mini.repulsion import pair_scans

TESTED = ("valid", "test_molecules", "test_dimers", "test_compressed")
CHANNELS = {"mini": 32, "organic": 128}
"""Of every order, by the name of the model."""
CUTOFF = 5.0
"""Å."""
EPOCHS = 12
SETTINGS: dict[str, Any] = {
    "references.mode": "isolated",
    "model.elements": "keep",
    "model.dtype": "float32",
    "training.batch_size": 16,
    "training.learning_rate": 1e-2,
    "training.schedule.name": "cosine",
    "training.schedule.warmup_epochs": 1,
    "training.ema": 0.999,
    "training.clip": 10.0,
    # the forces of the training frames span five orders of magnitude: squares would see the largest only
    "training.loss.form": "huber",
    "training.loss.energy": 10.0,
    "training.loss.forces": 1.0,
    "training.loss.energy_per_atom": True,
}


def architecture(neighbours: float, channels: int, elements: tuple[int, ...] = ELEMENTS) -> MaceArchitecture:
    """MACE with two interactions of correlation 3 and features of order 0 and 1."""
    return MaceArchitecture(
        kind="ScaleShiftMACE",
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interactions=("RealAgnosticInteractionBlock", "RealAgnosticResidualInteractionBlock"),
        atomic_numbers=elements,
        hidden_irreps=f"{channels}x0e+{channels}x1o",
        MLP_irreps="16x0e",
        avg_num_neighbors=(neighbours, neighbours),
        correlation=(3, 3),
        gate="silu",
        pair_repulsion=True,
    )


def random_model(data: Path, path: Path, *, channels: int) -> None:
    """Write the untrained model: what it takes from the training frames are three kinds of numbers.

    Args:
        data: folder of the pretraining data.
        path: ``.safetensors`` file to write.
        channels: of every order.
    """
    found = read_frames(data / "train.xyz", name="training data")
    # the median over frames: a few are squeezed until their forces are a hundred times those of a molecule at rest
    spread = [float(np.sqrt((frame.forces**2).mean())) for frame in found.frames if frame.forces is not None]
    draft = MaceBackbone.from_module(draw_network(architecture(1.0, channels, found.elements)))
    graphs = build_graphs(draft, found.frames)
    neighbours = sum(graph.n_edges for graph in graphs) / sum(graph.n_atoms for graph in graphs)
    model = draw_network(architecture(round(neighbours, 3), channels, found.elements))
    assert model.scale_shift is not None
    model.scale_shift.scale.fill_(round(float(np.median(spread)), 3))
    write_plain(content_from_network(model), path)


def train(data: Path, out: Path, *, channels: int, epochs: int = EPOCHS, threads: int | None = None) -> Path:
    """Train in ``out/run``, go on with it or, if it is finished, leave it; returns the run folder."""
    run = out / "run"
    if (run / "results.json").exists():
        return run
    if has_checkpoint(run):
        forcetune.resume(run)
        return run
    out.mkdir(parents=True, exist_ok=True)
    start = out / "random.safetensors"
    random_model(data, start, channels=channels)
    forcetune.fit(
        data / "train.xyz",
        model=start,
        method="scratch",
        valid=data / "valid.xyz",
        epochs=epochs,
        out=run,
        settings=SETTINGS | {"training.threads": threads, "output.overwrite": True},
    )
    return run


def finish(data: Path, out: Path, name: str = "mini") -> Path:
    """Write ``out/NAME.safetensors`` in float32 and its card, and return the model's path."""
    run = out / "run"
    forcetune.merge(run, out / f"{name}.model")
    tuned = MaceBackbone.load(out / f"{name}.model", dtype=torch.float64)
    scans = pair_scans(tuned)
    path = out / f"{name}.safetensors"
    irreps = tuned.model.architecture.hidden_irreps
    write_plain(content_from_network(tuned.model.float()), path)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    statistics = json.loads((data / "statistics.json").read_text(encoding="utf-8"))
    # of the file as it is shipped
    errors = {name: forcetune.evaluate(path, data / f"{name}.xyz").to_json() for name in TESTED}
    write_text(out / "README.md", card(results, errors, statistics, scans, path, irreps))
    return path


INSTALLED = {
    "mini": Path(forcetune.__file__).parent / "backbones" / "mini",
    "organic": Path(__file__).parents[2] / "benchmarks" / "models",
}


def install(path: Path, target: Path) -> None:
    """Copy the model and its card.

    Raises:
        ForcetuneError: a pair of elements attracts where it must repel.
    """
    scans = pair_scans(MaceBackbone.load(path))
    holes = [f"{'–'.join(scan.symbols)} at {scan.hole:.2f} Å" for scan in scans if scan.hole is not None]
    if holes:
        raise ForcetuneError(f"{path}: atoms attract each other at short distances: {', '.join(holes)}.")
    target.mkdir(parents=True, exist_ok=True)
    for file in (path, path.with_name("README.md")):
        shutil.copyfile(file, target / file.name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of recipes.mini.pretraining_data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; a finished training is kept")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--name", choices=list(CHANNELS), default="mini", help="of the model, which gives its width")
    parser.add_argument("--threads", type=int, help="CPU threads; steps are so small that one is nearly as fast as two")
    parser.add_argument("--install", action="store_true", help="copy model and card to their place in the repository")
    given = parser.parse_args()
    channels = CHANNELS[given.name]
    train(given.data, given.out, channels=channels, epochs=given.epochs, threads=given.threads)
    path = finish(given.data, given.out, given.name)
    if given.install:
        install(path, INSTALLED[given.name])
    Console().print((path.parent / "README.md").read_text(encoding="utf-8"), highlight=False)


if __name__ == "__main__":
    main()
