"""The table of foundation models: addresses, licences and checksums."""

from __future__ import annotations

from dataclasses import dataclass

_OFF = "https://raw.githubusercontent.com/ACEsuit/mace-off/main"
_MP = "https://github.com/ACEsuit/mace-mp/releases/download"
_FOUNDATIONS = "https://github.com/ACEsuit/mace-foundations/releases/download"

_ORGANIC = "H, C, N, O, F, P, S, Cl, Br, I"
_PERIODIC_TABLE = "89 elements"

_OFF23 = "organic molecules and liquids, ωB97M-D3(BJ)/def2-TZVPPD (SPICE)"
_OFF24 = "organic molecules and liquids, larger cutoff, ωB97M-D3(BJ)/def2-TZVPPD (SPICE 2)"
_MP0 = "materials, PBE+U (MPtrj)"
_MP0B = "materials, PBE+U (MPtrj), pair repulsion and isolated atoms corrected"
_MP0B2 = "materials, PBE+U (MPtrj), stable at high pressure"
_MP0B3 = "materials, PBE+U (MPtrj), phonons corrected"
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
PUBLISHED_MODELS: tuple[PublishedModel, ...] = (
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
