"""Foundation models by name: the one in this package, and published ones with addresses, licences and checksums.

Downloaded models are kept in :func:`model_folder`. An institution without access to the publishers' servers
sets ``FORCETUNE_MODELS_URL`` to a folder of its own web server that holds the files under their published
names; checksums stay those of this table. A model without a checksum in the table is trusted on first use:
the SHA-256 of what arrived is written beside it (``FILE.sha256``, in the format of ``sha256sum``) and checked
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

from forcetune.errors import InputError
from forcetune.utils.download import ProgressCallback, download, progress_bar
from forcetune.utils.files import as_path, cache_folder, compute_sha256, write_text

MIRROR_VARIABLE = "FORCETUNE_MODELS_URL"

_OFF = "https://raw.githubusercontent.com/ACEsuit/mace-off/main"
_MP = "https://github.com/ACEsuit/mace-mp/releases/download"
_FOUNDATIONS = "https://github.com/ACEsuit/mace-foundations/releases/download"

_ORGANIC = "H, C, N, O, F, P, S, Cl, Br, I"
_PERIODIC_TABLE = "89 elements"

_OFF23 = "organic molecules and liquids, ωB97M-D3(BJ)/def2-TZVPPD (SPICE)"
_OFF24 = "organic molecules and liquids, larger cutoff, ωB97M-D3(BJ)/def2-TZVPPD (SPICE 2)"
_MP0 = "materials, PBE+U (MPtrj)"
_MP0B = "materials, PBE+U (MPtrj), pair repulsion and isolated atoms mended"
_MP0B2 = "materials, PBE+U (MPtrj), stable at high pressure"
_MP0B3 = "materials, PBE+U (MPtrj), phonons mended"
_MPA0 = "materials, PBE+U (MPtrj and sAlex)"
_OMAT0 = "materials, PBE+U with VASP 54 potentials (OMat24)"
_MATPES_PBE = "materials, PBE without U (MatPES)"
_MATPES_R2SCAN = "materials, r2SCAN (MatPES)"

LICENCE_NOTES = {
    "ASL": "the Academic Software License (ASL, github.com/gabor1/ASL), which forbids commercial use",
    "MIT": "the MIT licence",
    "CC-BY-4.0": "the Creative Commons licence CC BY 4.0, which asks for attribution",
}


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A foundation model that can be asked for by name.

    Attributes:
        name: what to ask for.
        library: the backbone that loads it.
        url: where its publisher offers it; of a packaged model its place below this folder.
        licence: of the weights: ``MIT``, ``ASL`` or ``CC-BY-4.0``.
        sha256: of the file, 64 hexadecimal digits; None where it is trusted on first use.
        description: what it is for, and the level of theory (data set) it was trained on.
        elements: what it knows.
        size: ``small``, ``medium`` or ``large``.
        aliases: other names for it.
        packaged: comes with this package and needs no download.
        installed: a package that brings the file, and its place in there; it is taken from there where it is installed.
        kept_as: name of the file among downloaded ones, where the published name is not its own.
    """

    name: str
    library: str
    url: str
    licence: str
    sha256: str | None
    description: str
    elements: str
    size: str
    aliases: tuple[str, ...] = ()
    packaged: bool = False
    installed: tuple[str, str] | None = None
    kept_as: str | None = None

    @property
    def file(self) -> str:
        """Name of the file among downloaded ones, and on a mirror."""
        return self.kept_as or self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model file on this machine, checked."""

    path: Path
    name: str
    library: str
    licence: str
    sha256: str


def _mace(
    name: str,
    url: str,
    licence: str,
    description: str,
    elements: str,
    size: str,
    aliases: tuple[str, ...] = (),
    *,
    sha256: str | None = None,
) -> PublishedModel:
    return PublishedModel(name, "mace", url, licence, sha256, description, elements, size, aliases)


_SEVENNET = "https://raw.githubusercontent.com/MDIL-SNU/SevenNet/main/sevenn"
_MPTRJ = "materials, PBE+U (MPtrj)"


def _sevennet(
    name: str, folder: str, file: str, description: str, sha256: str, size: str, *aliases: str
) -> PublishedModel:
    place = f"pretrained_potentials/{folder}/{file}"
    return PublishedModel(
        name,
        "sevennet",
        f"{_SEVENNET}/{place}",
        "MIT",
        sha256,
        description,
        _PERIODIC_TABLE,
        size,
        aliases,
        installed=("sevenn", place),
        kept_as=f"{name}.pth",
    )


_SEVENNETS = (
    _sevennet(
        "sevennet-0",
        "SevenNet_0__11Jul2024",
        "checkpoint_sevennet_0.pth",
        _MPTRJ,
        "7052cb42b7b3be42b40b97fa0d21077a48c54b5548948fc4dcf346629f813c36",
        "medium",
        *("7net-0", "7net-0-11jul2024", "sevennet-0-jul2024"),
    ),
    _sevennet(
        "sevennet-0-may2024",
        "SevenNet_0__22May2024",
        "checkpoint_sevennet_0.pth",
        "materials, PBE+U (M3GNet's MPF.2021.2.8)",
        "5d389fafd512e6ae2830d74d0b66ffc49a55d3832653ff8e7bf7f1343013c1d1",
        "medium",
        "7net-0-22may2024",
    ),
    _sevennet(
        "sevennet-mf-0",
        "SevenNet_MF_0",
        "checkpoint_sevennet_mf_0.pth",
        "materials, two modalities: PBE(+U) and r2SCAN (Materials Project)",
        "81791329b37d445f46b531578c182c41792d98c7814222c9e5dde276402225fd",
        "medium",
        "7net-mf-0",
    ),
    _sevennet(
        "sevennet-l3i5",
        "SevenNet_l3i5",
        "checkpoint_l3i5.pth",
        "materials, PBE+U (MPtrj), harmonics up to l = 3",
        "a7ff190d41efe5b8317a03d20a468e4036a1a3e64e0b14fdbab64ac3f4bfc09d",
        "large",
        *("sevennet-0-l3i5", "7net-l3i5"),
    ),
)

_ZENODO = "https://zenodo.org/records/18775904/files"
_OAM = "materials, PBE+U (OMat24, then sAlex and MPtrj)"
_NEQUIPS = (
    PublishedModel(
        "nequip-oam-l",
        "nequip",
        f"{_ZENODO}/NequIP-OAM-L-0.1.nequip.zip",
        "CC-BY-4.0",
        "5d01a4fab228abb3cdb6ace0033f93993729956bca6a42234a2a8816825b9a0f",
        _OAM,
        _PERIODIC_TABLE,
        "large",
        ("nequip-oam-l-0.1",),
    ),
    PublishedModel(
        "nequip-oam-xl",
        "nequip",
        f"{_ZENODO}/NequIP-OAM-XL-0.1.nequip.zip",
        "CC-BY-4.0",
        "99c3799b28026f1ecf66c413292038a27a0749d4d4d7cd0b3a642f2e68df9e9c",
        _OAM,
        _PERIODIC_TABLE,
        "large",
        ("nequip-oam-xl-0.1",),
    ),
)

_MINI = PublishedModel(
    name="mini",
    library="mace",
    url="mini/mini.safetensors",
    licence="MIT",
    sha256=None,
    description="organic molecules, GFN2-xTB; small and fast, to learn and to test with (in the package)",
    elements="H, C, N, O, F, S, Cl",
    size="small",
    packaged=True,
)

# The publishers give no checksums. Each one here is what unrelated public projects recorded for the file.
_MODELS: tuple[PublishedModel, ...] = (
    _MINI,
    *_SEVENNETS,
    *_NEQUIPS,
    _mace(
        *("mace-off23-small", f"{_OFF}/mace_off23/MACE-OFF23_small.model", "ASL"),
        *(_OFF23, _ORGANIC, "small", ("off23-small",)),
        sha256="165cce4cfec5a34b9c64d4ebf95de15d71106bb584b7291c8470f0749977c46f",
    ),
    _mace(
        *("mace-off23-medium", f"{_OFF}/mace_off23/MACE-OFF23_medium.model", "ASL"),
        *(_OFF23, _ORGANIC, "medium", ("off23-medium", "mace-off23")),
        sha256="4842c52ad210d6e1f84d6cf1ffa70fae25a7e0d755ed55cf223f43913f587db7",
    ),
    _mace(
        *("mace-off23-large", f"{_OFF}/mace_off23/MACE-OFF23_large.model", "ASL"),
        *(_OFF23, _ORGANIC, "large", ("off23-large",)),
        sha256="a29e397dbf3e7a24ac50a9b0dfc919bd5a62efa346f5895a6237b0950c1d76f4",
    ),
    _mace(
        *("mace-off24-medium", f"{_OFF}/mace_off24/MACE-OFF24_medium.model", "ASL"),
        *(_OFF24, _ORGANIC, "medium", ("off24-medium", "mace-off24")),
        sha256="e5ccf5837f685899811a68754e7c994393bfd1a81720393b03c643b46c70bc69",
    ),
    _mace(
        *("mace-mp-0-small", f"{_MP}/mace_mp_0/2023-12-10-mace-128-L0_energy_epoch-249.model", "MIT"),
        *(_MP0, _PERIODIC_TABLE, "small", ("mace-mp-0a-small",)),
        sha256="2ddb079cee0e131eaaf6912ba581b394551ead283e95c99cfe78c605d10b5736",
    ),
    _mace(
        *("mace-mp-0-medium", f"{_MP}/mace_mp_0/2023-12-03-mace-128-L1_epoch-199.model", "MIT"),
        *(_MP0, _PERIODIC_TABLE, "medium", ("mace-mp-0a-medium", "mace-mp-0", "mace-mp-0a")),
        sha256="01bfe22100139f424713cf921144e5509cbe353d67aa9fa1be9c6e1e0ed35845",
    ),
    _mace(
        *("mace-mp-0-large", f"{_MP}/mace_mp_0/MACE_MPtrj_2022.9.model", "MIT"),
        *(_MP0, _PERIODIC_TABLE, "large", ("mace-mp-0a-large",)),
    ),
    _mace(
        *("mace-mp-0b-small", f"{_MP}/mace_mp_0b/mace_agnesi_small.model", "MIT"),
        *(_MP0B, _PERIODIC_TABLE, "small", ("small-0b",)),
        sha256="7e3a0abcaf41e03a80e69f778e1b11b29de1cca704783dc25917a736392f8cf0",
    ),
    _mace(
        *("mace-mp-0b-medium", f"{_MP}/mace_mp_0b/mace_agnesi_medium.model", "MIT"),
        *(_MP0B, _PERIODIC_TABLE, "medium", ("medium-0b", "mace-mp-0b")),
        sha256="ab8baff639a8f295f3eccad3d3ccf574efb6fb63220bd52cd88664211569e521",
    ),
    _mace(
        *("mace-mp-0b2-small", f"{_MP}/mace_mp_0b2/mace-small-density-agnesi-stress.model", "MIT"),
        *(_MP0B2, _PERIODIC_TABLE, "small", ("small-0b2",)),
        sha256="d5773bf9440e96d6eb8c598f84bd0e6369fcfa432f626a87f890e07da3c651c9",
    ),
    _mace(
        *("mace-mp-0b2-medium", f"{_MP}/mace_mp_0b2/mace-medium-density-agnesi-stress.model", "MIT"),
        *(_MP0B2, _PERIODIC_TABLE, "medium", ("medium-0b2", "mace-mp-0b2")),
        sha256="a90be07c8aa6623c390fcc4653d3e319c4a356f8b4a53d323f96b2012d375caf",
    ),
    _mace(
        *("mace-mp-0b2-large", f"{_MP}/mace_mp_0b2/mace-large-density-agnesi-stress.model", "MIT"),
        *(_MP0B2, _PERIODIC_TABLE, "large", ("large-0b2",)),
        sha256="348390e758e1c90011c7675e864850f8e9c5b3e7c217f79a2b4bad1baaa657ad",
    ),
    _mace(
        *("mace-mp-0b3", f"{_MP}/mace_mp_0b3/mace-mp-0b3-medium.model", "MIT"),
        *(_MP0B3, _PERIODIC_TABLE, "medium", ("mace-mp-0b3-medium", "medium-0b3")),
        sha256="2f2be696351ac9e94fbe01cdfb6f017679acdbd2db7645209ef55fec9826b012",
    ),
    _mace(
        *("mace-mpa-0", f"{_MP}/mace_mpa_0/mace-mpa-0-medium.model", "MIT"),
        *(_MPA0, _PERIODIC_TABLE, "medium", ("mace-mpa-0-medium", "medium-mpa-0")),
        sha256="75428afe3a1d7d8062e19bcaabd5c433623cabf308242ec9fb493e38604fb638",
    ),
    _mace(
        *("mace-omat-0-small", f"{_MP}/mace_omat_0/mace-omat-0-small.model", "ASL"),
        *(_OMAT0, _PERIODIC_TABLE, "small", ("small-omat-0",)),
        sha256="0abfde07862cf1e93b8b4d03cb702f29ce9c344ff2fc4de2ec0d7166d6c113a5",
    ),
    _mace(
        *("mace-omat-0-medium", f"{_MP}/mace_omat_0/mace-omat-0-medium.model", "ASL"),
        *(_OMAT0, _PERIODIC_TABLE, "medium", ("medium-omat-0", "mace-omat-0")),
        sha256="d4b14be9afa294eebdbe31a0280b26a0fa29715771e978cbfd3ca24e0d90307a",
    ),
    _mace(
        *("mace-matpes-pbe-0", f"{_FOUNDATIONS}/mace_matpes_0/MACE-matpes-pbe-omat-ft.model", "ASL"),
        *(_MATPES_PBE, _PERIODIC_TABLE, "medium", ("mace-matpes-pbe-0-medium",)),
        sha256="e618ad582b84239905b9c3b77ce6e9ce111b0ecd1533223a1a6aac7a696b8aa0",
    ),
    _mace(
        *("mace-matpes-r2scan-0", f"{_FOUNDATIONS}/mace_matpes_0/MACE-matpes-r2scan-omat-ft.model", "ASL"),
        *(_MATPES_R2SCAN, _PERIODIC_TABLE, "medium", ("mace-matpes-r2scan-0-medium",)),
        sha256="8f147ecffa1d06a696e5648b13b81abda9c96fda9d0fb3faba3cd3fb27d9bba9",
    ),
)


def list_models() -> list[PublishedModel]:
    """The models that can be asked for by name, the packaged one first."""
    return list(_MODELS)


def find(name: str) -> PublishedModel | None:
    """The published model of this name or alias, whatever its case; None if there is none."""
    wanted = _normal(name)
    return next((model for model in _MODELS if wanted in (model.name, *model.aliases)), None)


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
        twin = next((model for model in _MODELS if model.sha256 == digest), None)
        library = twin.library if twin else library_of_file(path)
        return ResolvedModel(path, path.stem, library, twin.licence if twin else "unknown", digest)
    if model := find(name_or_path):
        found, digest = _present(model, model_folder(), None)
        return ResolvedModel(found, model.name, model.library, model.licence, digest)
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
    names = [known for model in _MODELS for known in (model.name, *model.aliases)]
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
        found = Path(__file__).parent / model.url
        return found, compute_sha256(found)
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
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
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
