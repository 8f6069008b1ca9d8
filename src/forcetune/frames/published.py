"""Published data sets: where they are, under which licence, and how they are known to be whole."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from forcetune.errors import InputError
from forcetune.utils.download import ProgressCallback, download, progress_bar
from forcetune.utils.files import compute_checksum

MIRROR_VARIABLE = "FORCETUNE_DATASETS_MIRROR"


@dataclass(frozen=True, slots=True)
class PublishedDataset:
    """A data set that can be downloaded.

    Attributes:
        name: as on the command line.
        file: its name here.
        url: the address of the file.
        page: where it is described.
        licence: SPDX identifier, as its publisher or a public catalogue gives it.
        md5: as published; None where none is.
        size: roughly, bytes.
        description: one line for tables.
    """

    name: str
    file: str
    url: str
    page: str
    licence: str
    md5: str | None
    size: float
    description: str


_DATASETS = (
    PublishedDataset(
        name="mptrj",
        file="mp-trj.extxyz.zip",
        url="https://figshare.com/ndownloader/files/49034296",
        page="https://figshare.com/articles/dataset/23713842",
        licence="MIT",
        md5="7f433171e4e5f2ef9304dccd42d5488f",
        size=1.6e9,
        description="Materials Project relaxations as extended XYZ in a ZIP: energies, forces, stress, moments",
    ),
    PublishedDataset(
        name="mptrj-json",
        file="MPtrj_2022.9_full.json",
        url="https://figshare.com/ndownloader/files/41619375",
        page="https://figshare.com/articles/dataset/23713842",
        licence="MIT",
        md5=None,
        size=11.3e9,
        description="the same as CHGNet published it: 1,580,395 structures in one JSON file",
    ),
)


def list_datasets() -> tuple[PublishedDataset, ...]:
    """All data sets that are known by name."""
    return _DATASETS


def download_dataset(
    name: str, folder: str | os.PathLike[str] = ".", *, progress: ProgressCallback | None = None
) -> Path:
    """The file of a published data set in ``folder``, downloaded if it is not there yet, and checked.

    Args:
        name: of a published data set.
        folder: where to.
        progress: called with (bytes so far, bytes in all or None); by default a bar on standard error.

    Raises:
        InputError: unknown name; the download is refused or out of reach; the file is not the expected one.
        ForcetuneError: the connection kept breaking; what arrived is kept and the next call resumes.
    """
    dataset = next((one for one in _DATASETS if one.name == name.strip().lower()), None)
    if dataset is None:
        known = [one.name for one in _DATASETS]
        close = difflib.get_close_matches(name.lower(), known, n=2) or known
        raise InputError(f"{name}: no published data set; there are {', '.join(close)}.")
    target = Path(folder) / dataset.file
    if target.is_file():
        if dataset.md5 is not None and (digest := compute_checksum(target, "md5")) != dataset.md5:
            raise InputError(
                f"{target}: is not the published file (MD5 expected {dataset.md5}, got {digest}); move it away to "
                "download it again."
            )
        return target
    mirror = os.environ.get(MIRROR_VARIABLE)
    url = f"{mirror.rstrip('/')}/{dataset.file}" if mirror else dataset.url
    if progress is not None:
        download(url, target, md5=dataset.md5, progress=progress)
        return target
    with progress_bar(dataset.name) as bar:
        download(url, target, md5=dataset.md5, progress=bar)
    return target
