"""The report of a run: one page that needs nothing but itself."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from forcetune.config import load_config
from forcetune.errors import InputError
from forcetune.evaluation.summaries import Softening
from forcetune.reports.errors_by_element import force_errors_by_element
from forcetune.reports.forgetting import describe_forgetting
from forcetune.reports.page import render_page
from forcetune.reports.phonons import describe_phonons
from forcetune.reports.plots import change_map, energy_over_time, learning_curves, parity
from forcetune.reports.texts import (
    MISSING,
    bytes_text,
    change_text,
    count_text,
    duration_text,
    error_rows,
    files_text,
    finite,
    flat,
    layer_text,
    number_text,
    ratio,
    share_text,
    signed_text,
    sort_splits,
)
from forcetune.runs.metrics import Metrics, read_metrics
from forcetune.runs.predictions import read_predictions
from forcetune.runs.results import (
    DataSummary,
    DynamicsSummary,
    ModelSummary,
    ReferenceSummary,
    ReplaySummary,
    Results,
    TrainingSummary,
    read_results,
)
from forcetune.training.outcome import PenaltyTerms
from forcetune.utils.files import write_text

REPORT_NAME = "report.html"
Facts = list[tuple[str, Any]]
"""Names and values; those without a value are not shown."""
_TILES = (
    ("Energy MAE", "meV/atom", "energy_mae_mev_per_atom"),
    ("Forces MAE", "meV/Å", "forces_mae_mev_per_ang"),
    ("Stress MAE", "meV/Å³", "stress_mae_mev_per_ang3"),
    ("Moments MAE", "μB", "moment_mae_mub"),
    ("Magnetic forces MAE", "meV/μB or meV/rad", "magforce_mae_mev"),
)
_SPLIT_MEANINGS = {"test": "never trained on", "valid": "chose the best epoch", "train": "trained on"}
_SPLIT_NAMES = {"test": "Test", "valid": "Validation", "train": "Training"}


def write_report(run: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder, finished or not, and return its path.

    Raises:
        InputError: not a run folder, or a file in it that is damaged.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise InputError(
            f"{run}: is not a run folder (it has no config.yaml); name the folder that `forcetune fit` wrote."
        )
    target = run / REPORT_NAME
    if target.exists() and not any((run / name).is_file() for name in ("results.json", "environment.json")):
        raise InputError(f"{target}: is no report of a run, as {run} holds none; move it away first.")
    results = read_results(run, load_config(run / "config.yaml"))
    metrics = read_metrics(run / "metrics.csv")
    predictions = read_predictions(run / "predictions.npz")
    write_text(target, render_page("run.html", **_page_content(run, results, metrics, predictions)))
    return target


def _page_content(
    run: Path, results: Results, metrics: Metrics | None, predictions: Mapping[str, NDArray] | None
) -> dict[str, Any]:
    """Everything that ``run.html`` shows."""
    data_name = files_text(train.files if (train := results.data.get("train")) else ())
    return {
        "title": f"{results.model.name} → {results.method.name} → {data_name}",
        "brand": "Fine-tuning report",
        "chain": [("model", results.model.name), ("method", results.method.name), ("data", data_name)],
        "status": results.status,
        "status_class": "good" if results.status == "finished" else "open",
        "facts": _header_facts(results),
        "warnings": results.warnings,
        "splits": _errors_by_split(results),
        "curves": _learning_curves(results, metrics),
        "parity": _parity(predictions or {}),
        "softening": _softening_rows(results.softening),
        "phonons": describe_phonons(results.phonons),
        "dynamics": _dynamics(results.dynamics),
        "forgetting": describe_forgetting(results.forgetting),
        "method_facts": _method_facts(results),
        "coverage": _coverage_rows(results),
        "changes": _changes(results),
        "references": _references(results.reference_energies),
        "sets": _data_sets(results),
        "model": results.model,
        "model_facts": _model_facts(results.model),
        "use": _usage(run, results),
        "training": flat(asdict(results.training)) if results.training else [],
        "environment": flat(results.environment),
        "config": (run / "config.yaml").read_text(encoding="utf-8"),
        "footer": f"Written by forcetune {results.forcetune}. Energies in meV, forces in meV/Å, stresses in meV/Å³; "
        "force and stress errors over all components.",
    }


def _header_facts(results: Results) -> list[str]:
    trainable = results.parameters.trainable
    return [
        _date_text(results.created),
        f"forcetune {results.forcetune}",
        _epochs_text(results.training),
        "" if trainable is None else f"{count_text(trainable)} trainable parameters",
    ]


def _date_text(created: str | None) -> str:
    if not created:
        return ""
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{moment.day} {moment:%B %Y, %H:%M}"  # without the day of strftime, which pads it or is not on Windows


def _epochs_text(training: TrainingSummary | None) -> str:
    if training is None:
        return ""
    done, planned = training.epochs_done, training.epochs
    text = f"{done:,} epochs" if planned == done else f"{done:,} of {planned:,} epochs"
    return f"{text} in {duration_text(training.seconds)}"


def _errors_by_split(results: Results) -> list[dict[str, Any]]:
    """Errors of every split, what was never trained on first."""
    errors = {name: pair.tables() for name, pair in results.errors.items() if pair is not None}
    return [
        {
            "name": _split_name(split),
            "facts": _split_facts(results.data.get(split), split, errors[split]),
            "tiles": [tile for name, unit, key in _TILES if (tile := _tile(name, unit, errors[split], key))],
            "rows": [
                {"name": name, "unit": unit, "before": before, "after": after, "ratio": ratio(before, after)}
                for name, unit, before, after in error_rows(errors[split])
            ],
        }
        for split in sort_splits(errors)
    ]


def _split_facts(data: DataSummary | None, split: str, pair: Mapping[str, Mapping[str, Any]]) -> str:
    counts = [pair["after"].get("n_frames"), pair["before"].get("n_frames"), data.n_frames if data else None]
    n_frames = next((count for count in counts if finite(count) is not None), None)
    meaning = next((text for start, text in _SPLIT_MEANINGS.items() if split.startswith(start)), "")
    facts = ("" if n_frames is None else f"{count_text(n_frames)} frames", meaning)
    return ", ".join(fact for fact in facts if fact)


def _split_name(split: str) -> str:
    """In words; of several test sets each with its own name."""
    kind, _, rest = split.partition(" ")
    return f"{_SPLIT_NAMES.get(kind, kind)} {rest}".rstrip()


def _tile(name: str, unit: str, pair: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, str] | None:
    before, after = pair["before"].get(key), pair["after"].get(key)
    if finite(after) is None:
        return None
    return {
        "name": name,
        "unit": unit,
        "before": "" if finite(before) is None else number_text(before),
        "after": number_text(after),
        "change": change_text(ratio(before, after)),
    }


def _learning_curves(results: Results, metrics: Metrics | None) -> list[Any]:
    if metrics is None:
        return []
    valid = results.errors.get("valid")
    best_epoch = results.training.best_epoch if results.training else None
    return learning_curves(metrics, best_epoch, (valid and valid.before) or {})


def _parity(predictions: Mapping[str, NDArray]) -> dict[str, Any]:
    """Plots of one split: of test frames if there are any."""
    splits = sort_splits({name.partition("/")[0]: None for name in predictions})
    if not splits:
        return {"split": "", "images": [], "force_errors": None}
    split = next((name for kind in ("test", "valid") for name in splits if name.startswith(kind)), splits[0])
    quantities = ("energy_per_atom", "forces", "stress", "moments", "magforces")
    plots = [parity(predictions, split, quantity) for quantity in quantities]
    return {
        "split": split,
        "images": [plot for plot in plots if plot],
        "force_errors": force_errors_by_element(predictions, split),
    }


def _softening_rows(softening: Mapping[str, Softening]) -> list[tuple[str, ...]]:
    """Slopes of predicted over reference forces, one row for each set of frames."""
    return [
        (
            _split_name(split),
            count_text(softening[split].n_frames),
            *(f"{getattr(softening[split], name):.3f}" for name in ("base", "tuned", "base_large", "tuned_large")),
        )
        for split in sort_splits(softening)
    ]


def _dynamics(dynamics: DynamicsSummary | None) -> dict[str, Any] | None:
    if dynamics is None:
        return None
    facts: Facts = [
        ("Ensemble", f"constant energy (NVE), {dynamics.picoseconds:g} ps in steps of {dynamics.timestep_fs:g} fs"),
        ("Drift of the total energy", f"{signed_text(dynamics.drift_mev_per_atom_per_ps)} meV/atom/ps"),
        ("Its fluctuation", f"{number_text(dynamics.fluctuation_mev_per_atom)} meV/atom"),
        ("Mean temperature", f"{dynamics.mean_temperature_k:.0f} K"),
    ]
    return {"facts": facts, "image": energy_over_time(dynamics)}


def _penalty_text(penalty: PenaltyTerms | None) -> str | None:
    """What the change of the foundation model cost in the end, beside the loss; None where it cost nothing."""
    if penalty is None:
        return None
    terms = (("L2-SP", penalty.l2sp), ("EWC", penalty.ewc), ("gates", penalty.gates))
    text = ", ".join(f"{name} {number_text(value)}" for name, value in terms if value is not None)
    compared = f", compared on {count_text(penalty.n_frames)} {penalty.source}" if penalty.n_frames else ""
    return f"{text} (in units of the loss{compared})"


def _method_facts(results: Results) -> Facts:
    method, trainable, whole = results.method, results.parameters.trainable, results.parameters.total
    merges = {None: None, True: "yes, exactly", False: "no: the adapter stays beside the model"}[method.mergeable]
    share = None if trainable is None else f"{count_text(trainable)} of {count_text(whole)}"
    if share and whole:
        share += f" ({share_text(trainable, whole)})"
    rotation = results.rotation_error
    return [
        ("Method", f"{method.name}: {method.description}" if method.description else method.name),
        ("Rank", method.rank),
        ("Trainable parameters", share),
        ("Adapter size", None if results.adapter_bytes is None else bytes_text(results.adapter_bytes)),
        ("Penalty on changes", _penalty_text(results.penalty)),
        ("Merges into the model", merges),
        (
            "Error under rotation",
            None
            if rotation is None
            else f"{rotation.energy_mev_per_atom:.1e} meV/atom, {rotation.forces_mev_per_ang:.1e} meV/Å at most",
        ),
    ]


def _coverage_rows(results: Results) -> list[tuple[str, ...]]:
    """What is trained at the sites of each kind, and at all."""
    coverage = results.parameters.coverage
    if not coverage:
        return []
    rows = [
        (row.kind.replace("_", " "), row.update, row.sites, row.covered, row.total, row.trainable) for row in coverage
    ]
    sums = [sum(getattr(row, name) for row in coverage) for name in ("sites", "covered", "total", "trainable")]
    return [
        (
            kind,
            update,
            count_text(sites),
            f"{count_text(covered)} of {count_text(total)}",
            share_text(covered, total),
            count_text(trainable),
        )
        for kind, update, sites, covered, total, trainable in [*rows, ("all", "", *sums)]
    ]


def _changes(results: Results) -> dict[str, Any] | None:
    changes = results.changes
    if not changes:
        return None
    changed = sum(change.changed * change.size for change in changes)
    elements = list(dict.fromkeys(symbol for change in changes for symbol in change.elements))
    return {
        "image": change_map(changes),
        "share": share_text(round(changed), sum(change.size for change in changes)),
        "elements": elements,
        "rows": [
            (layer_text(change.site), change.path, *(f"{100 * change.elements[symbol]:.2g}" for symbol in elements))
            for change in changes
            if change.elements
        ],
    }


def _references(references: ReferenceSummary | None) -> dict[str, Any] | None:
    if references is None:
        return None
    facts: Facts = [
        ("Mode", references.mode),
        ("Offset with the model's own", _offset_text(references.offset_before_mev_per_atom)),
        ("Offset with these", _offset_text(references.offset_after_mev_per_atom)),
    ]
    rows = []
    for element in references.elements:
        before, after = element.before_ev, element.after_ev
        shift = None if before is None or after is None else after - before
        rows.append((element.symbol, *map(_energy_text, (before, after, shift))))
    return {"facts": facts, "rows": rows, "rank": references.rank, "n_elements": references.n_elements}


def _offset_text(value: float | None) -> str | None:
    return None if value is None else f"{number_text(value)} meV/atom"


def _energy_text(energy: float | None) -> str:
    """An energy of one atom in eV, which can be some ten thousand."""
    return MISSING if energy is None else f"{energy:,.4f}".replace("-", "−")


def _data_sets(results: Results) -> list[dict[str, Any]]:
    """Every set of frames with its facts, replay last."""
    first = [split for split in ("train", "valid") if split in results.data]
    order: Iterable[str] = (*first, *(split for split in results.data if split not in first))
    sets: list[dict[str, Any]] = [
        {"name": _split_name(split), "facts": _data_facts(data), "sha256": data.sha256}
        for split in order
        if (data := results.data[split]) is not None
    ]
    if results.replay is not None:
        sets.append({"name": "Replay", "facts": _replay_facts(results.replay), "sha256": None})
    return sets


def _data_facts(data: DataSummary) -> Facts:
    atoms = f"{min(data.n_atoms)} to {max(data.n_atoms)}" if data.n_atoms else None
    if data.n_atoms and min(data.n_atoms) == max(data.n_atoms):
        atoms = count_text(data.n_atoms[0])
    return [
        ("Files", ", ".join(data.files)),
        ("Frames", None if data.n_frames is None else count_text(data.n_frames)),
        ("Atoms a frame", atoms),
        ("Elements", " ".join(data.elements)),
        ("Keys", ", ".join(f"{name}: {key}" for name, key in data.keys.items() if key)),
    ]


def _replay_facts(replay: ReplaySummary) -> Facts:
    return [
        ("Files", ", ".join(replay.files)),
        ("Frames", f"{count_text(replay.n_frames)}, and {count_text(replay.n_held)} held out"),
        ("Labels", "the foundation model's own" if replay.labels == "base" else "of the files"),
        ("For each training frame", f"{replay.ratio:g}"),
        ("Weight in the loss", f"{replay.weight:g}"),
        ("Head", "their own, not kept" if replay.head == "own" else "that of all frames"),
    ]


def _model_facts(model: ModelSummary) -> Facts:
    return [
        ("Name", model.name),
        ("Library", model.library),
        ("Licence", model.licence),
        ("Head", model.head),
        ("Elements", " ".join(model.elements)),
        ("Cutoff", None if model.cutoff_ang is None else f"{model.cutoff_ang:g} Å"),
        ("Precision", model.dtype),
    ]


def _usage(run: Path, results: Results) -> dict[str, str]:
    # the folder's name only: the page may be read on another machine
    folder = run.resolve().name
    python = f"""from ase.io import read
import forcetune

atoms = read("structure.xyz")
atoms.calc = forcetune.calculator({results.model.name!r}, adapter={f"{folder}/adapter"!r})
print(atoms.get_potential_energy(), atoms.get_forces())"""
    shell = [f"forcetune evaluate {shlex.quote(folder)} more.xyz"]
    if results.method.mergeable:
        shell.append(f"forcetune merge {shlex.quote(folder)} -o tuned.model")
    return {"python": python, "shell": "\n".join(shell)}
