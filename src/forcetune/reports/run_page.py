"""The report of a run: one page that needs nothing but itself."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from forcetune.config import load_config
from forcetune.errors import InputError
from forcetune.reports.forgetting import forgetting_section
from forcetune.reports.page import page
from forcetune.reports.plots import change_map, energy_over_time, learning_curves, parity
from forcetune.reports.tables import (
    MISSING,
    Html,
    bytes_text,
    change_text,
    count_text,
    duration_text,
    finite,
    flat,
    html,
    html_errors,
    html_force_errors,
    html_pairs,
    html_table,
    in_order,
    layer_text,
    number_text,
    ratio,
    share_text,
)
from forcetune.runs.metrics import Metrics, read_metrics
from forcetune.runs.predictions import read_predictions
from forcetune.runs.results import Results, TrainingSummary, read_results
from forcetune.utils.files import write_text

REPORT_NAME = "report.html"


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
    config = load_config(run / "config.yaml")
    results = read_results(run, config)
    metrics = read_metrics(run / "metrics.csv")
    predictions = read_predictions(run / "predictions.npz")
    sections = [
        ("warnings", "Warnings", _warnings(results)),
        ("errors", "Errors before and after", _errors(results)),
        ("curves", "Learning curves", _curves(results, metrics)),
        ("parity", "Predictions against labels", _parity(results, predictions)),
        ("dynamics", "Energy conservation", _dynamics(results)),
        ("forgetting", "What was forgotten", forgetting_section(results.forgetting)),
        ("trained", "What was trained", _trained(results)),
        ("changes", "What changed", _changes(results)),
        ("references", "Reference energies", _references(results)),
        ("data", "Data", _data(results)),
        ("model", "Foundation model", _model(results)),
        ("use", "Use the adapter", _usage(run, results)),
        ("training", "Training", html_pairs(flat(asdict(results.training) if results.training else {}))),
        ("environment", "Environment", html_pairs(flat(results.environment))),
        ("config", "Configuration", _configuration(run)),
    ]
    title = f"{results.model.name} → {results.method.name} → {_data_name(results)}"
    footer = (
        f"Written by forcetune {results.forcetune}. Energies in meV, forces in meV/Å, stresses in meV/Å³; "
        "force and stress errors over all components."
    )
    write_text(target, page(title, _header(results), sections, footer=footer))
    return target


def _header(results: Results) -> Html:
    arrow = '<span class="arrow">→</span>'
    steps = [("model", results.model.name), ("method", results.method.name), ("data", _data_name(results))]
    chain = arrow.join(f'<span class="step"><small>{html(kind)}</small>{html(name)}</span>' for kind, name in steps)
    facts = [_date(results.created), f"forcetune {results.forcetune}", _epochs_text(results.training)]
    if results.parameters.trainable is not None:
        facts.append(f"{count_text(results.parameters.trainable)} trainable parameters")
    css = "good" if results.status == "finished" else "open"
    status = f'<span class="status {css}">{html(results.status)}</span>'
    line = "".join(f"<span>{html(fact)}</span>" for fact in facts if fact)
    brand = '<p class="brand">Fine-tuning report</p>'
    return Html(f'<header>\n{brand}\n<h1>{chain}</h1>\n<p class="facts">{status}{line}</p>\n</header>')


def _data_name(results: Results) -> str:
    train = results.data.get("train")
    names = [Path(name).name or name for name in train.files] if train else []
    return "data" if not names else names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _date(created: str | None) -> str:
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


def _note(text: object) -> Html:
    return Html(f'<p class="note">{html(text)}</p>')


def _warnings(results: Results) -> Html:
    return Html(
        f"<ul>{''.join(f'<li>{html(text)}</li>' for text in results.warnings)}</ul>" if results.warnings else ""
    )


def _errors(results: Results) -> Html:
    errors = {name: pair.tables() for name, pair in results.errors.items() if pair is not None}
    if not errors:
        return _note("No errors yet: they are computed when training ends.")
    first, *others = in_order(errors)
    tiles = "".join(
        _tile(name, unit, errors[first], key)
        for name, unit, key in (
            ("Energy MAE", "meV/atom", "energy_mae_mev_per_atom"),
            ("Forces MAE", "meV/Å", "forces_mae_mev_per_ang"),
            ("Stress MAE", "meV/Å³", "stress_mae_mev_per_ang3"),
            ("Moments MAE", "μB", "moment_mae_mub"),
        )
    )
    title = _split_title(results, first, errors[first])
    table = html_errors(errors[first])
    parts = [f'<div class="split first">{title}<div class="tiles">{tiles}</div>{table}</div>']
    if others:
        made = (
            f'<div class="split">{_split_title(results, s, errors[s])}{html_errors(errors[s])}</div>' for s in others
        )
        parts.append(f'<div class="grid">{"".join(made)}</div>')
    return Html("".join(parts))


def _split_title(results: Results, split: str, pair: Mapping[str, Mapping[str, Any]]) -> Html:
    data = results.data.get(split)
    counts = [pair["after"].get("n_frames"), pair["before"].get("n_frames"), data.n_frames if data else None]
    frames = next((count for count in counts if finite(count) is not None), None)
    meanings = {"test": "never trained on", "valid": "chose the best epoch", "train": "trained on"}
    meaning = next((text for start, text in meanings.items() if split.startswith(start)), "")
    facts = ", ".join(fact for fact in (f"{count_text(frames)} frames" if frames is not None else "", meaning) if fact)
    return Html(f"<h3>{html(_split_name(split))} <small>{html(facts)}</small></h3>")


def _split_name(split: str) -> str:
    """In words; of several test sets each with its own name."""
    kind, _, rest = split.partition(" ")
    return f"{ {'test': 'Test', 'valid': 'Validation', 'train': 'Training'}.get(kind, kind) } {rest}".rstrip()


def _tile(name: str, unit: str, pair: Mapping[str, Mapping[str, Any]], key: str) -> str:
    before, after = pair["before"].get(key), pair["after"].get(key)
    if finite(after) is None:
        return ""
    start = f"<s>{html(number_text(before))}</s> → " if finite(before) is not None else ""
    change = change_text(ratio(before, after))
    return (
        f'<div class="tile"><p>{html(name)}</p><p class="big">{start}<b>{html(number_text(after))}</b> '
        f"<small>{html(unit)}</small></p><p>{html(change)}</p></div>"
    )


def _curves(results: Results, metrics: Metrics | None) -> Html:
    if metrics is None:
        return _note("No epoch has been finished yet.")
    valid = results.errors.get("valid")
    figures = learning_curves(
        metrics, results.training.best_epoch if results.training else None, (valid and valid.before) or {}
    )
    made = "".join(f"<figure>{figure}</figure>" for figure in figures)
    note = (
        _note("No validation errors: the run had no validation frames, or none has been made yet.")
        if len(figures) == 1
        else ""
    )
    return Html(f'<div class="grid">{made}</div>{note}')


def _parity(results: Results, predictions: Mapping[str, NDArray] | None) -> Html:
    splits = in_order({name.partition("/")[0]: None for name in predictions or {}})
    if predictions is None or not splits:
        return _note("No predictions yet: they are made when training ends.")
    split = next((s for kind in ("test", "valid") for s in splits if s.startswith(kind)), splits[0])
    found = [parity(predictions, split, quantity) for quantity in ("energy_per_atom", "forces", "stress", "moments")]
    figures = "".join(
        f"<figure>{item[0]}{f'<figcaption>{html(item[1])}</figcaption>' if item[1] else ''}</figure>"
        for item in found
        if item
    )
    if not figures:
        return _note(f"The {split} frames have no labels to compare with.")
    legend = '<span class="key before"></span> before, <span class="key after"></span> after training'
    text = f'<p>{html(split.capitalize())} frames; {legend}.</p><div class="grid">{figures}</div>'
    numbers, reference = (
        predictions.get(f"{split}/forces_element"),
        predictions.get(f"{split}/reference/forces"),
    )
    before, after = (predictions.get(f"{split}/{name}/forces") for name in ("before", "after"))
    if numbers is not None and reference is not None:
        table = html_force_errors(numbers, reference, before, after)
        text += f"<h3>Force errors by element <small>meV/Å</small></h3>{table}"
    return Html(text)


def _dynamics(results: Results) -> Html:
    found = results.dynamics
    if found is None:
        return Html("")
    facts = html_pairs(
        (
            ("Ensemble", f"constant energy (NVE), {found.picoseconds:g} ps in steps of {found.timestep_fs:g} fs"),
            ("Drift of the total energy", f"{_signed(found.drift_mev_per_atom_per_ps)} meV/atom/ps"),
            ("Its fluctuation", f"{number_text(found.fluctuation_mev_per_atom)} meV/atom"),
            ("Mean temperature", f"{found.mean_temperature_k:.0f} K"),
        )
    )
    return Html(f"{facts}<figure>{energy_over_time(found)}</figure>")


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−")


def _trained(results: Results) -> Html:
    method, parameters = results.method, results.parameters
    merge = {None: None, True: "yes, exactly", False: "no: the adapter stays beside the model"}[method.mergeable]
    trainable, whole = parameters.trainable, parameters.total
    share = None if trainable is None else f"{count_text(trainable)} of {count_text(whole)}"
    if share and whole:
        share += f" ({share_text(trainable, whole)})"
    facts = html_pairs(
        (
            ("Method", f"{method.name}: {method.description}" if method.description else method.name),
            ("Rank", method.rank),
            ("Trainable parameters", share),
            ("Adapter size", None if results.adapter_bytes is None else bytes_text(results.adapter_bytes)),
            ("Merges into the model", merge),
            ("Error under rotation", _rotation_text(results)),
        )
    )
    if not parameters.coverage:
        return facts
    rows = [
        (
            row.kind.replace("_", " "),
            row.update,
            count_text(row.sites),
            f"{count_text(row.covered)} of {count_text(row.total)}",
            share_text(row.covered, row.total),
            count_text(row.trainable),
        )
        for row in parameters.coverage
    ]
    sums = [
        sum(getattr(row, name) or 0 for row in parameters.coverage)
        for name in ("sites", "covered", "total", "trainable")
    ]
    covered = f"{count_text(sums[1])} of {count_text(sums[2])}"
    rows.append(("all", "", count_text(sums[0]), covered, share_text(sums[1], sums[2]), count_text(sums[3])))
    head = ("Kind of site", "Update", "Sites", "Weights covered", "Share", "Trainable")
    return Html(facts + html_table(head, rows, text_columns=2, total=True))


def _rotation_text(results: Results) -> str | None:
    found = results.rotation_error
    if found is None:
        return None
    return f"{found.energy_mev_per_atom:.1e} meV/atom, {found.forces_mev_per_ang:.1e} meV/Å at most"


def _changes(results: Results) -> Html:
    if not results.changes:
        return Html("")
    text = "<p>Size of the change of every weight matrix relative to the matrix, in percent, by layer and path.</p>"
    changed = sum(change.changed * change.size for change in results.changes)
    share = share_text(round(changed), sum(change.size for change in results.changes))
    elements = dict.fromkeys(symbol for change in results.changes for symbol in change.elements)
    table = ""
    if elements:
        rows = [
            (layer_text(change.site), change.path, *(f"{100 * change.elements[symbol]:.2g}" for symbol in elements))
            for change in results.changes
            if change.elements
        ]
        table = f"<h3>By element <small>%</small></h3>{html_table(('Layer', 'Path', *elements), rows, text_columns=2)}"
    note = _note(f"{share} of the weights of these matrices are not what they were. Gates are not in this picture.")
    return Html(f"{text}<figure>{change_map(results.changes)}</figure>{note}{table}")


def _references(results: Results) -> Html:
    found = results.reference_energies
    if found is None:
        return Html("")
    facts = html_pairs(
        (
            ("Mode", found.mode),
            ("Offset with the model's own", _with_unit(found.offset_before_mev_per_atom, "meV/atom")),
            ("Offset with these", _with_unit(found.offset_after_mev_per_atom, "meV/atom")),
        )
    )
    rows = []
    for element in found.elements:
        before, after = element.before_ev, element.after_ev
        shift = None if before is None or after is None else after - before
        rows.append(
            (
                element.symbol,
                *(MISSING if e is None else f"{e:,.4f}".replace("-", "−") for e in (before, after, shift)),
            )
        )
    table = html_table(("Element", "Before (eV)", "After (eV)", "Change (eV)"), rows, css="narrow") if rows else ""
    note = ""
    if found.rank is not None and found.n_elements is not None and found.rank < found.n_elements:
        note = _note(
            f"The compositions of the frames fix only {found.rank} of {found.n_elements} reference energies. "
            "Of the values that fit equally well, those nearest to the model's own were taken (minimum norm); "
            "a single element's value means nothing outside these compositions."
        )
    return Html(f"{facts}{table}{note}")


def _with_unit(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{number_text(value)} {unit}"


def _data(results: Results) -> Html:
    parts = []
    first = [split for split in ("train", "valid") if split in results.data]
    for split in (*first, *(split for split in results.data if split not in first)):
        data = results.data[split]
        if data is None:
            continue
        atoms = f"{min(data.n_atoms)} to {max(data.n_atoms)}" if data.n_atoms else None
        if data.n_atoms and min(data.n_atoms) == max(data.n_atoms):
            atoms = count_text(data.n_atoms[0])
        pairs = (
            ("Files", ", ".join(data.files)),
            ("Frames", None if data.n_frames is None else count_text(data.n_frames)),
            ("Atoms a frame", atoms),
            ("Elements", " ".join(data.elements)),
            ("Keys", ", ".join(f"{name}: {key}" for name, key in data.keys.items() if key)),
            ("SHA-256", _digest(data.sha256)),
        )
        parts.append(f"<div><h3>{html(_split_name(split))}</h3>{html_pairs(pairs)}</div>")
    replay = results.replay
    if replay is not None:
        pairs = (
            ("Files", ", ".join(replay.files)),
            ("Frames", f"{count_text(replay.n_frames)}, and {count_text(replay.n_held)} held out"),
            ("Labels", "the foundation model's own" if replay.labels == "base" else "of the files"),
            ("For each training frame", f"{replay.ratio:g}"),
            ("Weight in the loss", f"{replay.weight:g}"),
            ("Head", "their own, not kept" if replay.head == "own" else "that of all frames"),
        )
        parts.append(f"<div><h3>Replay</h3>{html_pairs(pairs)}</div>")
    return Html(f'<div class="grid three">{"".join(parts)}</div>' if parts else "")


def _digest(sha256: str | None) -> Html | None:
    return Html(f'<code title="{html(sha256)}">{html(sha256[:12])}…</code>') if sha256 else None


def _model(results: Results) -> Html:
    model = results.model
    return html_pairs(
        (
            ("Name", model.name),
            ("Library", model.library),
            ("Licence", model.licence),
            ("Head", model.head),
            ("Elements", " ".join(model.elements)),
            ("Cutoff", None if model.cutoff_ang is None else f"{model.cutoff_ang:g} Å"),
            ("Precision", model.dtype),
            ("SHA-256", Html(f"<code>{html(model.sha256)}</code>") if model.sha256 else None),
            ("Fingerprint", Html(f"<code>{html(model.fingerprint)}</code>") if model.fingerprint else None),
        )
    )


def _usage(run: Path, results: Results) -> Html:
    # The folder's name only: the page may be read on another machine.
    folder = run.resolve().name
    python = f"""from ase.io import read
import forcetune

atoms = read("structure.xyz")
atoms.calc = forcetune.calculator({results.model.name!r}, adapter={f"{folder}/adapter"!r})
print(atoms.get_potential_energy(), atoms.get_forces())"""
    shell = [f"forcetune evaluate {shlex.quote(folder)} more.xyz"]
    if results.method.mergeable:
        shell.append(f"forcetune merge {shlex.quote(folder)} -o tuned.model")
    lines = "\n".join(shell)
    return Html(f"<pre>{html(python)}</pre><p>Or on the command line:</p><pre>{html(lines)}</pre>")


def _configuration(run: Path) -> Html:
    text = (run / "config.yaml").read_text(encoding="utf-8")
    return Html(f"<details><summary>Every option of the run (config.yaml)</summary><pre>{html(text)}</pre></details>")
