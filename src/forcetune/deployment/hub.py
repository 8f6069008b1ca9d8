"""Writing an adapter to a hub, from where ``hub:owner/name`` reads it (:mod:`forcetune.adapters.hub`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, deserialize

from forcetune.adapters.config import AdapterConfig, read_adapter_config
from forcetune.adapters.file import CONFIG_NAME
from forcetune.adapters.hub import (
    CARD_NAME,
    CHECKSUMS_NAME,
    PREFIX,
    TENSORS_NAME,
    endpoint,
    hub_errors,
    is_hub_reference,
    read_reference,
    write_checksums,
)
from forcetune.backbones.registry import find
from forcetune.deployment.loading import adapter_folder
from forcetune.errors import InputError, warn
from forcetune.reports.model_card import write_card
from forcetune.runs.results import RESULTS_NAME, Results, damaged


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was written to a hub.

    Attributes:
        repository: ``owner/name``.
        commit: 40 hexadecimal digits, which stand for exactly these files.
        url: of the commit's page.
    """

    repository: str
    commit: str
    url: str

    @property
    def reference(self) -> str:
        """How to name exactly this adapter wherever one is asked for."""
        return f"{PREFIX}{self.repository}@{self.commit}"


def push(
    run: str | Path, repository: str, *, private: bool = False, message: str | None = None, branch: str | None = None
) -> Pushed:
    """Write the adapter of a run to a repository of a hub, with a model card.

    Four files: configuration, tensors, card and the list of their SHA-256. The foundation model stays where it is. The
    hub is that of ``huggingface_hub``: ``HF_ENDPOINT`` names another, ``HF_TOKEN`` (or ``hf auth login``) says who
    pushes.

    Args:
        run: run folder or adapter folder; of a run folder the card has data, errors and what was forgotten.
        repository: ``owner/name``, created where there is none.
        private: of a repository that is created.
        message: of the commit.
        branch: to write to; the main one by default.

    Raises:
        InputError: no adapter there, a file of it is a link or damaged, no such name, ``huggingface_hub`` is missing,
            or the hub is out of reach or refuses.
    """
    name = read_reference(f"{PREFIX}{repository.removeprefix(PREFIX)}")
    if name.revision is not None:
        raise InputError(f"{repository}: name the repository alone, and a branch by --branch.")
    folder = None if is_hub_reference(run) else adapter_folder(run)
    if folder is None:
        raise InputError(f"{run}: holds no {CONFIG_NAME}; give a run folder or an adapter folder on this machine.")
    config = read_adapter_config(folder)
    files = _files(folder, config, name.repository)
    with hub_errors(f"push to {name}", name.repository) as hub:
        api = hub.HfApi(endpoint=endpoint())
        api.create_repo(name.repository, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(name.repository, branch=branch, exist_ok=True)
        commit = api.create_commit(
            name.repository,
            [hub.CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message=message or f"{config.method['name']} adapter for {config.base.name}",
            revision=branch,
        )
    return Pushed(name.repository, commit.oid, commit.commit_url)


def _files(folder: Path, config: AdapterConfig, repository: str) -> dict[str, bytes]:
    """Names and content of what is pushed."""
    published = find(config.base.name) is not None
    if not published:
        warn(
            f"{config.base.name}: is no published model that `forcetune models` lists; whoever uses the adapter needs "
            f"this file (SHA-256 {config.base.sha256[:12] or 'unknown'}…) beside it."
        )
    card = write_card(config, _read_results(folder), repository, published=published)
    files = {name: _read_own(folder, name) for name in (CONFIG_NAME, TENSORS_NAME)}
    try:
        deserialize(files[TENSORS_NAME])
    except SafetensorError as error:
        raise InputError(f"{folder / TENSORS_NAME}: is no safetensors file; copy the adapter folder again.") from error
    files[CARD_NAME] = card.encode()
    sums = write_checksums({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})
    return files | {CHECKSUMS_NAME: sums.encode()}


def _read_own(folder: Path, name: str) -> bytes:
    """A file of the adapter; through a link anything on this machine could be published.

    Raises:
        InputError: it is a link, or cannot be read.
    """
    path = folder / name
    if path.is_symlink() or path.resolve().parent != folder.resolve():
        raise InputError(f"{path}: is a link, which is not followed; put a copy of the file in its place.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); copy the adapter folder again.") from error


def _read_results(folder: Path) -> Results | None:
    """``results.json`` of the run around an adapter folder; None where there is none."""
    path = folder.parent / RESULTS_NAME
    if not path.is_file():
        return None
    try:
        return Results.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise damaged(path, str(error.errors()[0]["msg"])) from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, "it is not valid JSON") from error
