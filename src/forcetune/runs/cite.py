"""The papers to cite for a method, a foundation model, or a run with both: entries of ``citations.bib``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from forcetune._version import __version__
from forcetune.adapters.config import read_adapter_config
from forcetune.adapters.methods import METHODS
from forcetune.backbones.registry import PublishedModel, find, list_models, resolve
from forcetune.config import load_config
from forcetune.deployment.loading import adapter_folder
from forcetune.errors import InputError
from forcetune.runs.folder import CONFIG_NAME

BIBLIOGRAPHY = Path(__file__).with_name("citations.bib")
METHOD_PAPERS: dict[str, tuple[str, ...]] = {
    "mmea": ("jin2026mmea", "wang2025elora"),
    "mmea-pure": ("jin2026mmea",),
    "elora": ("wang2025elora",),
    "full": (),
    "sparse": ("cho2026sparsity",),
    "sparse-h": ("cho2026sparsity",),
    "gain": (),
    "lora": ("hu2022lora",),
    "adapter": ("houlsby2019adapter",),
    "freeze": (),
    "bias": ("benzaken2022bitfit",),
    "modality": ("kim2024multifidelity",),
    "readout": (),
    "scratch": (),
}
"""Papers of each method of :data:`forcetune.adapters.methods.METHODS`; none for a method that has no paper."""
UPDATE_PAPERS = {
    "Gate": "jin2026mmea",
    "LowRank": "wang2025elora",
    "SoftThreshold": "cho2026sparsity",
    "Bottleneck": "houlsby2019adapter",
}
"""Papers of updates, for a table that the user writes."""
OPTIMIZER_PAPERS = {"schedulefree": ("defazio2024road",), "soap": ("vyas2025soap", "defazio2024road")}
"""Papers of optimizers of runs; those that everybody knows have none here."""
LIBRARY_PAPERS = {
    "mace": ("batatia2022mace",),
    "sevennet": ("park2024sevennet", "batzner2022nequip"),
    "nequip": ("batzner2022nequip", "tan2025nequip"),
}
_MODEL_PAPERS = (
    ("mini", ("bannwarth2019gfn2",)),
    ("mace-off", ("kovacs2023maceoff",)),
    ("mace-mp-0", ("batatia2023foundation", "deng2023chgnet")),
    ("mace-mpa-0", ("batatia2023foundation", "deng2023chgnet", "barrosoluque2024omat")),
    ("mace-omat-0", ("batatia2023foundation", "barrosoluque2024omat")),
    ("mace-matpes", ("batatia2023foundation", "barrosoluque2024omat", "kaplan2025matpes")),
    ("sevennet-mf-0", ("kim2024multifidelity",)),
    ("sevennet-0-may2024", ("chen2022m3gnet",)),
    ("sevennet", ("deng2023chgnet",)),
    ("nequip-oam", ("barrosoluque2024omat", "deng2023chgnet")),
)
"""Beginnings of names of published models with the papers of model and data; the first that fits counts."""
SOFTWARE = f"""@software{{forcetune,
  title = {{forcetune: fine-tuning of equivariant interatomic potentials by adapters}},
  author = {{{{The forcetune developers}}}},
  version = {{{__version__}}}
}}"""


def cite(name: str) -> str:
    """BibTeX entries for a run or adapter folder, a model by name or path, or a method, with that of forcetune first.

    Raises:
        InputError: it is none of them, or a damaged adapter folder.
    """
    folder = adapter_folder(name)
    if folder is not None:
        config = read_adapter_config(folder)
        keys = [key for method in config.methods for key in _list_method_keys(method.to_json())]
        keys += OPTIMIZER_PAPERS.get(_optimizer_of(folder), ())
        keys += list_model_keys(config.base.name, config.base.library, config.base.sha256)
    elif name in METHODS:
        keys = list(METHOD_PAPERS[name])
    elif Path(name).is_file():
        resolved = resolve(name)
        keys = list_model_keys("", resolved.library, resolved.sha256)
    elif (model := find(name)) is not None:
        keys = list_model_keys(model.name, model.library, "")
    else:
        raise InputError(
            f"{name}: is no run folder, model or method; methods are {', '.join(METHODS)}, and `forcetune models` "
            "lists models."
        )
    return "\n\n".join([SOFTWARE, *select_entries(keys)]) + "\n"


def list_model_keys(name: str, library: str, sha256: str) -> list[str]:
    """Keys for a foundation model.

    Args:
        name: of a published model, or anything else.
        library: that computes it.
        sha256: of its file, by which published models are known, too; may be empty.
    """
    published = _published_file(sha256)
    if published is None and (namesake := find(name)) is not None and not (sha256 and namesake.sha256):
        published = namesake
    published_name = published.name if published is not None else ""
    papers = next((papers for beginning, papers in _MODEL_PAPERS if published_name.startswith(beginning)), ())
    return [*LIBRARY_PAPERS.get(library, ()), *papers]


def select_entries(keys: Iterable[str]) -> list[str]:
    """The entries of the bibliography, each once, in the order of the keys."""
    bibliography = read_bibliography()
    return [bibliography[key] for key in dict.fromkeys(keys)]


def read_bibliography() -> dict[str, str]:
    """Key to entry of ``citations.bib``."""
    text = BIBLIOGRAPHY.read_text(encoding="utf-8")
    parts = [part.strip() for part in re.split(r"^(?=@)", text, flags=re.MULTILINE) if part.strip()]
    return {part[part.index("{") + 1 : part.index(",")]: part for part in parts}


def _published_file(sha256: str) -> PublishedModel | None:
    return next((model for model in list_models() if sha256 and model.sha256 == sha256), None)


def _optimizer_of(adapter: Path) -> str:
    """Of the run that an adapter folder lies in; empty where it lies in none."""
    try:
        return load_config(adapter.parent / CONFIG_NAME).training.optimizer or ""
    except InputError:  # an adapter that was moved away from its run
        return ""


def _list_method_keys(method: Mapping[str, Any]) -> list[str]:
    """Keys for a method as it stands in an adapter: by its name, or by the updates of its table."""
    updates = [update for kind in method["table"].values() for update in kind]
    keys = list(METHOD_PAPERS.get(method["name"], ()))
    if method["name"] not in METHOD_PAPERS:
        keys = [UPDATE_PAPERS[update["update"]] for update in updates if update["update"] in UPDATE_PAPERS]
    if any(update.get("norms") for update in updates):
        keys.append("liu2024dora")
    return keys
