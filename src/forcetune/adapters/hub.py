"""Adapters on a hub, named ``hub:owner/name`` or ``hub:owner/name@revision``: downloaded once, and checked.

Through ``huggingface_hub``, an optional package, which also knows the server (``HF_ENDPOINT``) and who asks
(``HF_TOKEN``). A branch or tag stands for the commit that it points to when a process first asks; the files of a commit
are kept in the cache (``hub/OWNER--NAME/COMMIT``) and read from there without a network.

Three things are compared before a file is used: the SHA-256 that the hub lists for large files, the list
``SHA256SUMS`` that :func:`forcetune.push` wrote beside them, and, of files that are in the cache already, the SHA-256
that they had when they arrived.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from forcetune.errors import InputError, note
from forcetune.utils.files import atomic_folder, cache_folder, compute_sha256
from forcetune.utils.optional import missing_package

PREFIX = "hub:"
CHECKSUMS_NAME = "SHA256SUMS"
"""List of the files of an adapter and their SHA-256, in the format of ``sha256sum``."""

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
FILE_NAMES = (CONFIG_NAME, TENSORS_NAME, CARD_NAME)
"""All that an adapter folder has, under the names of the peft library."""

LARGEST_FILES = {CONFIG_NAME: 16 * 2**20, TENSORS_NAME: 16 * 2**30, CARD_NAME: 2**20, CHECKSUMS_NAME: 2**16}
"""Bytes; what is larger is not downloaded."""

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_REFERENCE = re.compile(rf"hub:(?P<repository>{_WORD}/{_WORD})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{{0,199}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SUM = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>[A-Za-z0-9_.-]+)")


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository of a hub at some revision.

    Attributes:
        repository: ``owner/name``.
        revision: branch, tag or commit; None is the main branch.
    """

    repository: str
    revision: str | None

    @property
    def name(self) -> str:
        """The second half of the repository's name."""
        return self.repository.split("/")[1]

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def is_hub_reference(place: object) -> bool:
    """Whether ``place`` names an adapter on a hub."""
    return isinstance(place, str) and place.startswith(PREFIX)


def read_reference(text: str) -> HubReference:
    """
    Raises:
        InputError: it is not ``hub:owner/name`` or ``hub:owner/name@revision``.
    """
    match = _REFERENCE.fullmatch(text)
    # no hub has names with two dashes or dots in a row
    if match is None or re.search(r"--|\.\.", match["repository"]):
        raise InputError(f"{text[:120]!r}: write hub:owner/name or hub:owner/name@revision.")
    return HubReference(match["repository"], match["revision"])


def locate_adapter(place: str | Path) -> Path:
    """The path that ``place`` stands for: itself, or the folder of a hub's adapter, downloaded if need be.

    Raises:
        InputError: as :func:`fetch_adapter`.
    """
    return fetch_adapter(str(place)) if is_hub_reference(place) else Path(place)


def fetch_adapter(reference: str) -> Path:
    """The folder of an adapter on a hub, downloaded if it is not here yet, and checked.

    Args:
        reference: ``hub:owner/name``, or ``hub:owner/name@revision``.

    Raises:
        InputError: there is no such repository or revision, it is no adapter, the hub is out of reach or refuses, or a
            file is not the one that was pushed.
    """
    parsed = read_reference(reference)
    commit = parsed.revision
    if commit is None or not _COMMIT.fullmatch(commit):
        commit = _resolve_commit(endpoint(), parsed)
        note(f"{parsed}: commit {commit}; write {PREFIX}{parsed.repository}@{commit} to stay with it.")
    folder = repository_folder(parsed.repository) / commit
    if not (folder / CHECKSUMS_NAME).is_file():
        _download(parsed.repository, commit, folder)
    for name, digest in read_checksums(folder / CHECKSUMS_NAME).items():
        if not (folder / name).is_file() or compute_sha256(folder / name) != digest:
            raise InputError(f"{folder / name}: is not what was downloaded; remove {folder} to download it again.")
    return folder


def repository_folder(repository: str) -> Path:
    """Where the adapters of a repository are kept, a folder for each commit."""
    owner, name = repository.split("/")
    # Windows has devices such as CON and AUX, and no folder can be called that
    return cache_folder("hub") / f"{owner}--{name}"


def endpoint() -> str | None:
    """The hub's address where it is not the usual one."""
    return os.environ.get("HF_ENDPOINT") or None


def write_checksums(digests: Mapping[str, str]) -> str:
    """Content of ``SHA256SUMS`` for files and their SHA-256."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def read_checksums(path: Path) -> dict[str, str]:
    """Files and their SHA-256 from a list in the format of ``sha256sum``.

    Raises:
        InputError: it is no such list, or lacks a file of the adapter.
    """
    matches = [_SUM.fullmatch(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    digests = {match["name"]: match["digest"] for match in matches if match is not None}
    if None in matches or not {CONFIG_NAME, TENSORS_NAME} <= set(digests) <= set(FILE_NAMES):
        raise InputError(f"{path}: is no list of the adapter's files and their SHA-256; push the adapter again.")
    return digests


@lru_cache(maxsize=256)
def _resolve_commit(address: str | None, reference: HubReference) -> str:
    """The commit that a branch or tag points to; the same as long as the process lives."""
    with hub_errors(str(reference), reference.repository) as hub:
        commit = hub.HfApi(endpoint=address).model_info(reference.repository, revision=reference.revision).sha
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise InputError(f"{reference}: the hub names no commit for it; name one as hub:owner/name@commit.")
    return commit


def _download(repository: str, commit: str, folder: Path) -> None:
    """Bring the files of a commit to ``folder``, which appears once all are there and right."""
    reference = f"{PREFIX}{repository}@{commit}"
    with hub_errors(reference, repository) as hub:
        api = hub.HfApi(endpoint=endpoint())
        listed = {
            file.rfilename: file for file in api.model_info(repository, revision=commit, files_metadata=True).siblings
        }
        for name in (CONFIG_NAME, TENSORS_NAME):
            if name not in listed:
                raise InputError(f"{reference}: has no {name}, so it is no adapter of forcetune.")
        names = [name for name in (*FILE_NAMES, CHECKSUMS_NAME) if name in listed]
        for name in names:
            if (listed[name].size or 0) > LARGEST_FILES[name]:
                raise InputError(f"{reference}: its {name} is larger than any of an adapter; it is not downloaded.")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, atomic_folder(folder) as complete:
            for name in names:
                path = api.hf_hub_download(repository, name, revision=commit, local_dir=temporary)
                shutil.copyfile(path, complete / name)
            _check_files(complete, listed, reference)


def _check_files(folder: Path, listed: Mapping[str, Any], reference: str) -> None:
    """Compare what arrived with both lists of SHA-256; leaves one in the folder.

    Raises:
        InputError: a file is another one.
    """
    digests = {name: compute_sha256(folder / name) for name in FILE_NAMES if (folder / name).is_file()}
    pushed = read_checksums(folder / CHECKSUMS_NAME) if (folder / CHECKSUMS_NAME).is_file() else {}
    for name, digest in digests.items():
        large_file = getattr(listed[name], "lfs", None)
        for expected, where in ((pushed.get(name), CHECKSUMS_NAME), (getattr(large_file, "sha256", None), "the hub")):
            if expected is not None and expected != digest:
                raise InputError(
                    f"{reference}: {name} has SHA-256 {digest[:12]}…, but {where} says {expected[:12]}…; it was "
                    "changed after it was pushed, or damaged on the way. Nothing of it is used."
                )
    if not pushed:
        note(f"{reference}: has no {CHECKSUMS_NAME}; the SHA-256 of what arrived are stored and hold from now on.")
    missing = set(pushed) - set(digests)
    if missing:
        raise InputError(f"{reference}: has no {sorted(missing)[0]}, which its {CHECKSUMS_NAME} names.")
    (folder / CHECKSUMS_NAME).write_text(write_checksums(digests), encoding="utf-8")


@contextmanager
def hub_errors(what: str, repository: str) -> Iterator[Any]:
    """Yields the package ``huggingface_hub``; what it raises becomes one sentence.

    Args:
        what: is wanted, for messages.
        repository: ``owner/name``.

    Raises:
        InputError: the package is missing, the hub is out of reach or refuses, or there is nothing of that name.
    """
    try:
        hub, errors, utils = (import_module(f"huggingface_hub{part}") for part in ("", ".errors", ".utils"))
    except ImportError as error:
        raise missing_package("huggingface_hub", "hub", error) from error
    utils.disable_progress_bars()
    try:
        yield hub
    except InputError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(f"{what}: ask for access on the page of {repository}, then set HF_TOKEN.") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{what}: {repository} has no such revision; name a branch, a tag or a commit.") from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(what, repository, error) from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"{what}: a file of the adapter is missing there ({_first_line(error)}).") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{what}: there is no such repository, or it is private; check its name, or set HF_TOKEN."
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{what}: is no name that a hub knows ({_first_line(error)}).") from error
    except errors.HfHubHTTPError as error:
        raise _refusal(what, error) from error
    except Exception as error:
        if not _is_transport_error(error):
            raise
        raise _unreachable(what, repository, error) from error


def _unreachable(what: str, repository: str, error: BaseException) -> InputError:
    return InputError(
        f"{what}: the hub cannot be reached ({_first_line(error)}){_list_cached(repository)}. Go online, or give the "
        "path of an adapter folder."
    )


def _is_transport_error(error: BaseException) -> bool:
    """Whether a connection failed; which package makes them depends on the version of ``huggingface_hub``."""
    packages = {base.__module__.split(".")[0] for base in type(error).__mro__}
    return isinstance(error, OSError) or bool(packages & {"httpx", "httpx2", "requests", "urllib3"})


def _refusal(what: str, error: Any) -> InputError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return InputError(f"{what}: the hub refused access ({status}); set HF_TOKEN to a token that may do this.")
    return InputError(f"{what}: the hub answered {status}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _list_cached(repository: str) -> str:
    """The end of a sentence with commits that are in the cache."""
    folder = repository_folder(repository)
    commits = sorted(
        path.parent.name for path in folder.glob(f"*/{CHECKSUMS_NAME}") if _COMMIT.fullmatch(path.parent.name)
    )
    if not commits:
        return ""
    return f"; in the cache is {', '.join(f'{PREFIX}{repository}@{commit}' for commit in commits[:3])}"
