"""The page of an adapter on a hub: what it is, what it was trained on, what it gained and lost, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Iterator

from forcetune.adapters.config import AdapterConfig
from forcetune.evaluation.summaries import Forgetting
from forcetune.reports.forgetting import describe_forgetting
from forcetune.reports.texts import count_text, error_rows, files_text, number_text, sort_splits
from forcetune.runs.results import Results

_LICENCES = {"MIT": "mit", "CC-BY-4.0": "cc-by-4.0"}
"""Identifiers that hubs know; any other licence is named beside ``other``."""


def write_card(config: AdapterConfig, results: Results | None, repository: str, *, published: bool) -> str:
    """The model card in Markdown, with the metadata block that hubs read.

    Args:
        config: of the adapter.
        results: of its run; None where only the adapter folder is left.
        repository: ``owner/name``.
        published: whether the base has a name that forcetune knows.
    """
    parts = [_metadata(config), _introduction(config), _usage(config, repository, published), _data(config, results)]
    if results is not None:
        parts += [_errors(results), _forgetting(results.forgetting)]
    parts.append(f"Written by forcetune {config.forcetune}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(config: AdapterConfig) -> str:
    licence = config.base.licence
    known = _LICENCES.get(licence.upper())
    # not `base_model`: hubs take that for one of their own repositories
    lines = ["---", "library_name: forcetune", f"base_potential: {json.dumps(config.base.name)}"]
    lines += [f"license: {known}"] if known else ["license: other", f"license_name: {json.dumps(licence.lower())}"]
    return "\n".join([*lines, "tags: [interatomic-potential, adapter, forcetune, chemistry]", "---"])


def _introduction(config: AdapterConfig) -> str:
    base = config.base
    names = " + ".join(method.name for method in config.methods)
    identity = f"SHA-256 `{base.sha256 or 'not from a file'}`, fingerprint `{base.fingerprint}`"
    return (
        f"# {names} adapter for {base.name}\n\n"
        f"{count_text(config.trainable)} trained parameters beside {count_text(base.parameters)} frozen ones of "
        f"`{base.name}` ({base.library}, head `{base.head}`). Elements: {', '.join(base.elements)}. Energies in eV, "
        f"lengths in Å.\n\n"
        f"It belongs to this base and is refused on any other: {identity}. The licence of the base ({base.licence}) "
        "holds for both together."
    )


def _usage(config: AdapterConfig, repository: str, published: bool) -> str:
    base = "" if published else f"{'path/to/' + config.base.name!r}, "
    keyword = "" if published else "adapter="
    own = "" if published else "\n\nThe base is a file of its owner's, which you need beside the adapter."
    return (
        "## Use\n\n```python\n"
        "# pip install 'forcetune[hub]'\n"
        "import forcetune\n"
        "from ase.io import read\n\n"
        'atoms = read("structure.xyz")\n'
        f'atoms.calc = forcetune.calculator({base}{keyword}"hub:{repository}")\n'
        "print(atoms.get_potential_energy(), atoms.get_forces())\n"
        f"```{own}"
    )


def _data(config: AdapterConfig, results: Results | None) -> str:
    lines = ["## Data", ""]
    for name, data in (results.data if results is not None else {}).items():
        if data is not None and data.n_frames is not None:
            lines.append(f"- {name}: {files_text(data.files)}, {count_text(data.n_frames)} frames{_sum(data.sha256)}")
    if config.training_data_sha256 and len(lines) == 2:
        lines.append(f"- training frames{_sum(config.training_data_sha256)}")
    references = ", ".join(f"{symbol} {energy:.4f}" for symbol, energy in config.reference_energies_ev.items())
    lines.append(f"- reference energies (eV): {references}")
    return "\n".join(lines)


def _sum(sha256: str | None) -> str:
    return f" (SHA-256 `{sha256}`)" if sha256 else ""


def _errors(results: Results) -> str:
    rows = list(_error_lines(results))
    if not rows:
        return ""
    head = ["## Errors", "", "Before: the foundation model with the reference energies of the run.", ""]
    return "\n".join([*head, "| frames | error | before | after |", "|---|---|--:|--:|", *rows])


def _error_lines(results: Results) -> Iterator[str]:
    for split in sort_splits(results.errors):
        pair = results.errors[split]
        for name, unit, before, after in error_rows(pair.tables()) if pair is not None else ():
            yield f"| {split} | {name}, {unit} | {number_text(before)} | {number_text(after)} |"


def _forgetting(forgetting: Forgetting | None) -> str:
    described = describe_forgetting(forgetting)
    if forgetting is None or described is None:
        return ""
    lines = ["## Where it was not tuned", "", *(f"- {name}: {text}" for name, text in described["facts"])]
    holes = [dimer.pair for dimer in forgetting.dimers if dimer.tuned_hole_ang is not None]
    lines.append(f"- pairs that attract each other at very short distance: {', '.join(holes) or 'none'}")
    return "\n".join([*lines, *(f"- warning: {text}" for text in forgetting.warnings)])
