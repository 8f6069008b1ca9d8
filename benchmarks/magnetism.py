"""The magnetic task on the spin–lattice model of iron: five ways of training, and what was recovered.

    python benchmarks/magnetism.py --out OUT [--epochs 50] [--processes 2]

A small MACE learns the lattice without spins (recipes/spin_lattice/foundation.py). Then every method adapts it to
frames with spins together with a spin layer that starts from nothing: energies, forces, stress and moments weigh alike
in a Huber loss, reference energies stay the foundation model's. Errors are on 100 frames never trained on.

Recovery: the exchange of pairs of atoms against the known one, by small rotations out of ferromagnets of 54 displaced
atoms, the energy between ferromagnet and antiferromagnet at five volumes, and the dispersion of spin spirals, all of
states never seen. Finished runs in OUT are
not repeated. ``magnetism.json``, ``magnetism.md`` and ``recovery.png`` there hold the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for recipes

METHODS = ("scratch", "full", "elora", "sparse", "sparse-h")
FOUNDATION_EPOCHS = 60


def settings_of(method: str) -> dict[str, Any]:
    """The same for all but the schedule, which schedule-free methods have not."""
    settings: dict[str, Any] = {
        "magnetism.layer": "spin",
        "references.mode": "model",
        "training.batch_size": 8,
        "training.clip": 10.0,
        "training.loss.stress": 1.0,
        "training.threads": 1,
        "output.overwrite": True,
        "output.forgetting": False,
    }
    if not method.startswith("sparse"):
        settings |= {"training.schedule.name": "cosine", "training.ema": 0.99}
    return settings


def run(out: Path, method: str, epochs: int) -> None:
    """One fit; kept if it is there."""
    import forcetune

    folder = out / method
    if (folder / "results.json").is_file():
        return
    data = out / "data"
    forcetune.fit(
        data / "train.xyz",
        model=out / "iron.model",
        method=method,
        valid=data / "valid.xyz",
        test=data / "test.xyz",
        epochs=epochs,
        out=folder,
        settings=settings_of(method),
    )


def row_of(out: Path, method: str) -> dict[str, Any]:
    """What the table says of one method."""
    results = json.loads((out / method / "results.json").read_text(encoding="utf-8"))
    after, coverage = results["errors"]["test"]["after"], results["parameters"]["coverage"]
    layer = coverage[-1]["trainable"]
    return {
        "method": method,
        "energy_rmse_mev_per_atom": after["energy_rmse_mev_per_atom"],
        "forces_rmse_mev_per_ang": after["forces_rmse_mev_per_ang"],
        "stress_rmse_mev_per_ang3": after["stress_rmse_mev_per_ang3"],
        "moment_rmse_mub": after["moment_rmse_mub"],
        "trained_in_model": results["parameters"]["trainable"] - layer,
        "layer": layer,
        "model": sum(row["total"] for row in coverage),
        "zeros_of_wrapped": results.get("sparsity", {}).get("zeros_of_wrapped"),
        "seconds_per_step": results["training"]["seconds_per_step"],
    }


def predicted(out: Path, method: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Energies per atom of a set, eV: known, predicted, and by the foundation model alone."""
    import forcetune
    from forcetune.adapters.attach import disable_adapter
    from forcetune.evaluation.metrics import evaluate_frames
    from forcetune.frames.read import read_frames

    frames = read_frames(out / "data" / f"{name}.xyz", moments_key="auto", spins_key="auto").frames
    backbone = forcetune.calculator(out / method).backbone
    found = evaluate_frames(backbone, frames)
    with disable_adapter(backbone):
        plain = evaluate_frames(backbone, frames)
    return found.energy_label / found.atoms, found.energy / found.atoms, plain.energy / plain.atoms


def exchange_of(out: Path, method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distances, Å, learned J and known J, meV, of pairs in shaken ferromagnets of 54 atoms, by small rotations."""
    import torch

    import forcetune
    from recipes.spin_lattice.data import cell
    from recipes.spin_lattice.hamiltonian import exchange, solve

    distance, learned, known = [], [], []
    calc = forcetune.calculator(out / method)
    for seed in range(3):
        atoms = cell((3, 3, 3))
        atoms.positions += 0.07 * np.random.default_rng((11, seed)).standard_normal(atoms.positions.shape)
        up = np.tile([0.0, 0.0, 1.0], (len(atoms), 1))
        size = np.linalg.norm(solve(atoms, up).moments, axis=1)
        atoms.set_initial_magnetic_moments(up)
        atoms.calc = calc
        found = forcetune.exchange_parameters(atoms, sites=range(0, 54, 6))
        distance.append(found.distance)
        learned.append(1e3 * found.coupling)
        product = size[found.first] * size[found.second]
        known.append(1e3 * exchange(torch.as_tensor(found.distance)).numpy() * product)
    return np.concatenate(distance), np.concatenate(learned), np.concatenate(known)


def recovery(out: Path, method: str) -> dict[str, Any]:
    """J(r), the energy between the two orders, and spirals: learned and known."""
    distance, learned, known = exchange_of(out, method)
    near = distance < 3.9
    order_label, order, _ = predicted(out, method, "order")
    spiral_label, spiral, _ = predicted(out, method, "spirals")
    gap_label, gap = (1e3 * (values[1::2] - values[::2]) for values in (order_label, order))
    wave_label, wave = (1e3 * (values - values[0]) for values in (spiral_label, spiral))
    return {
        "exchange_rmse_mev": float(np.sqrt(((learned - known)[near] ** 2).mean())),
        "exchange_mean_mev": float(known[near].mean()),
        "exchange_beyond_rmse_mev": float(np.sqrt((learned[~near] ** 2).mean())),
        "gap_mev_per_atom": {"known": gap_label.tolist(), "learned": gap.tolist()},
        "gap_mae_mev_per_atom": float(np.abs(gap - gap_label).mean()),
        "spiral_mev_per_atom": {"known": wave_label.tolist(), "learned": wave.tolist()},
        "spiral_mae_mev_per_atom": float(np.abs(wave - wave_label).mean()),
        "exchange": {"distance": distance.tolist(), "learned": learned.tolist(), "known": known.tolist()},
    }


def draw(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """J(r), energies of the two orders by volume, and spirals."""
    from matplotlib.figure import Figure

    from forcetune.reports.plots import AFTER, INK, style

    with style():
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        one, two, three = figure.subplots(1, 3)
        method, best = next(iter(found.items()))
        seen = {name: np.array(values) for name, values in best["exchange"].items()}
        options: dict[str, Any] = {"linewidths": 0, "rasterized": True}
        one.scatter(seen["distance"], seen["known"], s=9, color=INK, label="known", **options)
        one.scatter(seen["distance"], seen["learned"], s=4, color=AFTER, label=f"learned ({method})", **options)
        one.set(xlabel="distance (Å)", ylabel="J (meV)", xlim=(2.1, 7.0))
        scales = np.array([0.98, 0.99, 1.0, 1.01, 1.02])
        two.plot(scales, best["gap_mev_per_atom"]["known"], color=INK, label="known")
        three.plot(np.arange(9) / 8, best["spiral_mev_per_atom"]["known"], color=INK, label="known")
        for (name, values), marker in zip(found.items(), "os^vD", strict=False):
            colour = AFTER if name == method else "#999999"
            options = {"marker": marker, "linestyle": "none", "label": name, "color": colour}
            two.plot(scales, values["gap_mev_per_atom"]["learned"], **options)
            three.plot(np.arange(9) / 8, values["spiral_mev_per_atom"]["learned"], **options)
        two.set(xlabel="lattice constant / 2.8665 Å", ylabel="E(antiferro) − E(ferro) (meV/atom)")
        three.set(xlabel="q along [001] (2π/a)", ylabel="E(q) − E(0) (meV/atom)")
        for axes in (one, two, three):
            axes.legend(fontsize=7)
        figure.savefig(path, dpi=150)


def costs(out: Path, rounds: int = 15) -> dict[str, float]:
    """Medians of a training step of eight frames with and without the layer, and of a prediction, taken in turn, s."""
    import torch

    import forcetune
    from forcetune.adapters.attach import attach, detach, require_adapter
    from forcetune.adapters.methods import method as made
    from forcetune.config import LossConfig
    from forcetune.evaluation.metrics import build_graphs
    from forcetune.frames.read import read_frames
    from forcetune.graphs.graph import collate
    from forcetune.magnetism.options import Magnetism
    from forcetune.training.losses import compute_loss

    frames = read_frames(out / "data" / "train.xyz", moments_key="auto", spins_key="auto").frames[:8]
    taken: dict[str, list[float]] = {}
    cases = {}
    for name, layer in (("without", None), ("with", Magnetism(inputs="initial"))):
        backbone = forcetune.load(out / "iron.model", device="cpu")
        attach(backbone, replace(made("full"), magnetism=layer))
        cases[name] = backbone, collate(build_graphs(backbone, frames))
    for _ in range(rounds):
        for name, (backbone, batch) in cases.items():
            config = LossConfig(stress=1.0, moments=float(name == "with"))
            began = time.perf_counter()
            compute_loss(config, backbone.predict(batch, stress=True, create_graph=True), batch).backward()
            taken.setdefault(f"step_{name}", []).append(time.perf_counter() - began)
            for parameter in require_adapter(backbone).parameters():
                parameter.grad = None
    for backbone, _ in cases.values():
        for parameter in require_adapter(backbone).parameters():
            parameter.requires_grad_(False)
    for _ in range(rounds):
        for name, (backbone, batch) in cases.items():
            began = time.perf_counter()
            backbone.predict(batch, stress=True)
            taken.setdefault(f"prediction_{name}", []).append(time.perf_counter() - began)
    for backbone, _ in cases.values():
        detach(backbone)
    assert torch.get_num_threads()
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def markdown(rows: Sequence[dict[str, Any]], found: dict[str, dict[str, Any]]) -> str:
    head = (
        "| method | E meV/atom | F meV/Å | stress meV/Å³ | μ μB | zeros, % | trained | ferro–antiferro meV/atom "
        "| spirals meV/atom | J meV |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    lines = []
    for row in rows:
        zeros = "" if row["zeros_of_wrapped"] is None else f"{100 * row['zeros_of_wrapped']:.1f}"
        one = found[row["method"]]
        lines.append(
            f"| {row['method']} | {row['energy_rmse_mev_per_atom']:.2f} | {row['forces_rmse_mev_per_ang']:.1f} "
            f"| {row['stress_rmse_mev_per_ang3']:.3f} | {row['moment_rmse_mub']:.4f} | {zeros} "
            f"| {row['trained_in_model']:,} + {row['layer']:,} | {one['gap_mae_mev_per_atom']:.2f} "
            f"| {one['spiral_mae_mev_per_atom']:.2f} | {one['exchange_rmse_mev']:.3f} |\n"
        )
    return head + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    given = parser.parse_args()
    from forcetune.utils.files import write_text
    from recipes.spin_lattice.data import make
    from recipes.spin_lattice.foundation import train

    out: Path = given.out
    if not (out / "data" / "spirals.xyz").is_file():
        make(out / "data")
    if not (out / "iron.model").is_file():
        train(out / "data", out / "iron.model", epochs=FOUNDATION_EPOCHS)
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(run, out, method, given.epochs) for method in given.methods]:
            done.result()
    rows = [row_of(out, method) for method in given.methods]
    found = {method: recovery(out, method) for method in given.methods}
    best = min(rows, key=lambda row: row["energy_rmse_mev_per_atom"])["method"]
    draw(out / "recovery.png", {best: found[best]} | {m: f for m, f in found.items() if m not in (best, "scratch")})
    taken = costs(out)
    text = markdown(rows, found)
    for one in found.values():
        del one["exchange"]
    content = {"epochs": given.epochs, "rows": rows, "recovery": found, "seconds": taken}
    write_text(out / "magnetism.json", json.dumps(content, indent=2) + "\n")
    write_text(out / "magnetism.md", text)
    print(text)
    share = rows[0]["layer"] / rows[0]["model"]
    print(f"the layer: {rows[0]['layer']:,} parameters, {100 * share:.1f} % of the model's {rows[0]['model']:,}")
    for what in ("step", "prediction"):
        print(f"{what}: {taken[f'{what}_with'] / taken[f'{what}_without']:.2f} × that without the layer")


if __name__ == "__main__":
    main()
