"""Foundation models by name: the one in this package, and published ones with addresses, licences and checksums.

Downloaded models are kept in :func:`model_folder`. An institution without access to the publishers' servers
sets ``FORCETUNE_MODELS_URL`` to a folder of its own web server that holds the files under their published
names; checksums stay those of the table (:mod:`.published`). A model without a checksum there is trusted on first
use: the SHA-256 of what arrived is written beside it (``FILE.sha256``, in the format of ``sha256sum``) and checked
whenever the model is used.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from forcetune.backbones.published import LICENCE_NOTES, PUBLISHED_MODELS, PublishedModel
from forcetune.errors import InputError
from forcetune.utils.download import ProgressCallback, download, progress_bar
from forcetune.utils.files import as_path, cache_folder, compute_sha256, write_text

MIRROR_VARIABLE = "FORCETUNE_MODELS_URL"


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model file on this machine, checked."""

    path: Path
    name: str
    library: str
    licence: str
    sha256: str


def list_models() -> list[PublishedModel]:
    """The models that can be asked for by name, the packaged one first."""
    return list(PUBLISHED_MODELS)


def find(name: str) -> PublishedModel | None:
    """The published model of this name or alias, whatever its case; None if there is none."""
    wanted = _normal(name)
    return next((model for model in PUBLISHED_MODELS if wanted in (model.name, *model.aliases)), None)


def model_folder() -> Path:
    """Where downloaded models are kept.

    ``$FORCETUNE_HOME/models``; without that variable the user's cache, ``$XDG_CACHE_HOME/forcetune/models``
    or ``~/.cache/forcetune/models``.
    """
    return cache_folder("models")


def download_model(
    name: str, *, folder: str | os.PathLike[str] | None = None, progress: ProgressCallback | None = None
) -> Path:
    """The file of a published model, downloaded if it is not there yet, and checked.

    Args:
        name: of a published model.
        folder: where models are kept; :func:`model_folder` by default.
        progress: called with (bytes so far, bytes in all or None); by default a bar is shown on standard
            error.

    Raises:
        InputError: unknown name; the download is refused or out of reach; the file is not the expected one.
        ForcetuneError: the connection kept breaking; what arrived is kept and the next call resumes.
    """
    model = find(name)
    if model is None:
        raise _unknown(name)
    return _present(model, Path(folder) if folder is not None else model_folder(), progress)[0]


def resolve(name_or_path: str) -> ResolvedModel:
    """The model file that a name or a path stands for; a published model is downloaded at its first use.

    Files win over names. Whose a file is follows from what it holds; its licence is known where it is byte for byte
    a published model.

    Raises:
        InputError: no such file, a folder, an unknown name (close ones are listed), or a file that is not the
            published one.
        ForcetuneError: as :func:`download_model`.
    """
    path = as_path(name_or_path)
    if path.is_file():
        digest = compute_sha256(path)
        twin = next((model for model in PUBLISHED_MODELS if model.sha256 == digest), None)
        library = twin.library if twin else library_of_file(path)
        return ResolvedModel(path, path.stem, library, twin.licence if twin else "unknown", digest)
    if model := find(name_or_path):
        file, digest = _present(model, model_folder(), None)
        return ResolvedModel(file, model.name, model.library, model.licence, digest)
    raise _unknown(name_or_path)


def library_of_file(path: Path) -> str:
    """The library whose backbone reads a file: by the names in its pickle, which is not run."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if any(name.endswith("/.data/extern_modules") for name in names):  # a package of torch
                return "nequip"
            pickles = [name for name in names if name.endswith("data.pkl")]
            program = archive.read(pickles[0]) if pickles else b""
    except (OSError, zipfile.BadZipFile, NotImplementedError, zlib.error, RuntimeError):
        return "mace"
    if b"hyper_parameters" in program and b"info_dict" in program and b"nequip" in program:
        return "nequip"
    # sevenn has written this key since its first version
    return "sevennet" if b"model_state_dict" in program and b"weight_nn" in program else "mace"


def _normal(name: str) -> str:
    return re.sub(r"[\s_]+", "-", name.strip()).lower()


def _unknown(name: str) -> InputError:
    """What to say to a name or path that stands for nothing."""
    path = Path(name).expanduser()
    if not name.strip():
        return InputError("No model was named; `forcetune models` lists the published ones, or give a path.")
    if path.is_dir():
        return InputError(f"{name}: a folder, not a model; name the model file in it.")
    names = [known for model in PUBLISHED_MODELS for known in (model.name, *model.aliases)]
    close = difflib.get_close_matches(_normal(path.stem if path.suffix else name), names, n=3)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    more = "`forcetune models` lists the published models."
    if "://" in name:
        return InputError(f"{name}: models are not loaded from addresses; download the file and pass its path. {more}")
    if path.suffix or "/" in name or os.sep in name:
        return InputError(f"{name}: no such file; check its name and folder.{hint} {more}")
    return InputError(f"{name}: neither a published model nor a file.{hint} {more}")


def _present(model: PublishedModel, folder: Path, progress: ProgressCallback | None) -> tuple[Path, str]:
    """The checked file of a model in ``folder``, and its SHA-256."""
    if model.packaged:
        path = Path(__file__).parent / model.url
        return path, compute_sha256(path)
    if (installed := _installed(model)) is not None:
        digest = compute_sha256(installed)
        if digest == model.sha256:
            return installed, digest
    target = folder / model.file
    record = target.with_name(f"{target.name}.sha256")
    expected = model.sha256 or _recorded(record)
    if target.is_file():
        digest = compute_sha256(target)
        if expected is not None and digest != expected:
            raise _changed(model, target, record, digest, expected)
    else:
        digest = _fetch(model, target, expected, progress)
    if expected is None:
        write_text(record, f"{digest}  {target.name}\n")
        _tell(f"{model.name}: trusted on first use; its SHA-256 {digest} is kept in {record} and checked from now on.")
    return target, digest


def _installed(model: PublishedModel) -> Path | None:
    """The file in the package that brings it, where that is installed; the package is not imported."""
    if model.installed is None:
        return None
    package, place = model.installed
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / place
        if file.is_file():
            return file
    return None


def _fetch(model: PublishedModel, target: Path, expected: str | None, progress: ProgressCallback | None) -> str:
    url = _address(model)
    _tell(f"{model.name}: downloaded from {url} under {LICENCE_NOTES.get(model.licence, model.licence)}.")
    if progress is not None:
        return download(url, target, sha256=expected, progress=progress)
    with progress_bar(model.name) as bar:
        return download(url, target, sha256=expected, progress=bar)


def _address(model: PublishedModel) -> str:
    mirror = os.environ.get(MIRROR_VARIABLE)
    return f"{mirror.rstrip('/')}/{model.file}" if mirror else model.url


def _recorded(record: Path) -> str | None:
    """The checksum written at the first use of a model, None if it was not used yet.

    Raises:
        InputError: the record is there but holds no checksum.
    """
    try:
        words = record.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{record}: cannot be read; fix or remove it.") from error
    if not words or not re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
        raise InputError(f"{record}: should hold the SHA-256 of the model beside it; fix or remove it.")
    return words[0].lower()


def _changed(model: PublishedModel, target: Path, record: Path, digest: str, expected: str) -> InputError:
    known = "the published one" if model.sha256 else f"the one first used ({record})"
    return InputError(
        f"{target}: is not {known}: its SHA-256 is {digest}, expected {expected}. "
        f"Remove it to download {model.name} again, or pass its path if it is a model of your own."
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
