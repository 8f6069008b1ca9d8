"""What `forcetune learn` looks at before it begins; nothing is written here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from forcetune.backbones.loading import load
from forcetune.config import LearnConfig, RunConfig, load_config
from forcetune.errors import InputError
from forcetune.frames.dataset import Dataset
from forcetune.frames.frame import Origin
from forcetune.frames.labels import NONE, raw_frame
from forcetune.frames.read import check_structure
from forcetune.frames.sources import expand, file_format
from forcetune.frames.store.chunks import iterate_structures
from forcetune.uncertainty.last_layer import require_network
from forcetune.utils import distributed
from forcetune.utils.option_defaults import RECORD, get_value, leaf_names

CONFIG_NAME = "learn.yaml"
FREE = ("learn.rounds", "learn.labels", "learn.target_forces", "learn.failures", "training.threads", "output", RECORD)
"""Options, and sections, that may be others when a loop goes on."""


def check_options(config: RunConfig) -> None:
    """
    Raises:
        InputError: something is missing, or asked for that has no uncertainty.
    """
    options = config.learn
    if not options.start:
        raise InputError("learn.start: name files of the structures that dynamics start from (--start).")
    if options.labeller is None:
        raise InputError("learn.labeller: name what makes the calculator that labels (--labeller file.py:name).")
    if config.magnetism.layer != "off" or config.model.trust:
        what = "magnetism.layer" if config.magnetism.layer != "off" else "model.trust"
        raise InputError(f"{what}: such models have no calibrated uncertainty, which `forcetune learn` goes by.")
    if distributed.place().count > 1:
        raise InputError("`forcetune learn` runs in one process; start it without torchrun.")
    if config.output.overwrite:
        raise InputError("output.overwrite: `forcetune learn` goes on in its folder; remove it to begin again.")
    if config.data.forces_key == NONE:
        raise InputError("data.forces_key: is none, but the uncertainty that counts is that of forces; train on them.")


def check_folder(folder: Path, config: RunConfig) -> None:
    """
    Raises:
        InputError: it holds something else, or a loop with other options.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; choose another folder with --out.")
    if not (folder / CONFIG_NAME).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder}: is not empty and not of `forcetune learn`; choose another folder with --out.")
        return
    stored, asked = (one.model_dump(mode="json") for one in (load_config(folder / CONFIG_NAME), config))
    names = dict.fromkeys([*leaf_names(stored), *leaf_names(asked)])
    changed = [name for name in names if get_value(stored, name) != get_value(asked, name) and not _is_free(name)]
    if changed:
        raise InputError(
            f"{folder}: was begun with other options ({', '.join(changed[:3])}), which are in {CONFIG_NAME}; repeat "
            "these, or choose another folder with --out."
        )


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE)


def read_starts(options: LearnConfig) -> list[tuple[Origin, Atoms]]:
    """The structures that dynamics start from, and where each stands.

    Raises:
        InputError: a structure cannot be read or is none, or the files have none.
    """
    starts: list[tuple[Origin, Atoms]] = []
    for path in expand(options.start):
        for index, atoms in enumerate(iterate_structures(path, file_format(path), ())):
            origin = Origin(str(path), index)
            check_structure(raw_frame(atoms, origin))
            starts.append((origin, atoms))
    if not starts:
        raise InputError(f"learn.start: {', '.join(options.start)} hold no structures; name others.")
    return starts


def check_model(config: RunConfig, dataset: Dataset) -> None:
    """
    Raises:
        InputError: the model cannot be loaded, lacks an element, or has a last layer that is not known.
    """
    model = config.model
    elements = None if model.elements == "keep" else list(dataset.elements)
    require_network(load(model.model, head=model.head, elements=elements, device=model.device, kernels=model.kernels))


def check_starts(starts: Sequence[tuple[Origin, Atoms]], elements: Sequence[int]) -> None:
    """
    Raises:
        InputError: a structure has an element that no training frame has.
    """
    for origin, atoms in starts:
        strange = sorted({*atoms.symbols[~np.isin(atoms.numbers, list(elements))]})
        if strange:
            raise InputError(
                f"{origin}: has {', '.join(strange)}, which no training frame has; dynamics cannot start from it "
                "(learn.start) before labelled frames with it are added to data.train."
            )
