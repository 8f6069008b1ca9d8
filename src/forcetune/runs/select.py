"""Choosing what to label next from a pool of structures that is read twice and never in memory as a whole."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

import ase.io
import numpy as np
from ase import Atoms
from ase.formula import Formula
from rich.console import Console

from forcetune.backbones.protocol import Backbone
from forcetune.config import RunConfig, load_config
from forcetune.deployment.loading import adapter_folder, deploy
from forcetune.errors import InputError
from forcetune.frames.frame import FloatArray
from forcetune.frames.sources import expand, file_format
from forcetune.frames.store.chunks import iterate_structures
from forcetune.runs.descriptors import DescribedStructures, describe_structures, labelled_frames, read_structures
from forcetune.runs.folder import CONFIG_NAME, input_files
from forcetune.runs.selection_output import check_selection_output
from forcetune.uncertainty.file import Uncertainty, has_calibration, load_uncertainty
from forcetune.uncertainty.last_layer import require_network
from forcetune.uncertainty.selection import (
    STRATEGIES,
    Choice,
    Pool,
    Strategy,
    choose,
    find_labelled,
    parse_quota,
    share_out,
    standardize,
)
from forcetune.utils.files import atomic_path

UNCERTAINTIES = ("auto", "energy", "forces", "off")


class NothingToChoose(InputError):
    """Every structure of a pool is labelled already."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One structure of a selection.

    Attributes:
        rank: from 1, in the order of choice.
        file, frame: where it stands in the pool.
        composition: Hill formula.
        score: what the strategy measures.
        reason: in words.
        nearest_labelled, nearest_chosen: distances of standardised descriptors; None where there is nothing.
        energy_std: calibrated standard deviation of its energy, eV/atom; None without one.
        forces_std: the largest of its force components, eV/Å; None where not asked for.
    """

    rank: int
    file: str
    frame: int
    composition: str
    score: float
    reason: str
    nearest_labelled: float | None
    nearest_chosen: float | None
    energy_std: float | None
    forces_std: float | None


@dataclass(frozen=True, slots=True)
class Selection:
    """What :func:`select` chose.

    Attributes:
        chosen: in the order of choice.
        structures: the same as ASE has them, with the reasons in ``info``.
        n_pool, n_labelled, n_excluded: structures of the pool, labelled ones, and those that were both.
        strategy: name.
    """

    chosen: tuple[Chosen, ...]
    structures: tuple[Atoms, ...]
    n_pool: int
    n_labelled: int
    n_excluded: int
    strategy: str

    def to_json(self) -> dict[str, Any]:
        """As ``forcetune select --json`` prints it."""
        names = ("n_pool", "n_labelled", "n_excluded", "strategy")
        return {name: getattr(self, name) for name in names} | {"chosen": [asdict(one) for one in self.chosen]}


def select(
    pool: str | Path | Sequence[str | Path],
    *,
    n: int,
    model: str | Path | Backbone = "mini",
    output: str | Path | None = None,
    exclude: str | Path | Sequence[str | Path] = (),
    strategy: str = "farthest",
    uncertainty: str = "auto",
    quota: str | None = None,
    apart: float = 0.0,
    seed: int = 0,
    type_map: Sequence[str] = (),
    head: str | None = None,
    device: str = "auto",
    trust: bool = False,
    console: Console | None = None,
) -> Selection:
    """Choose structures to compute next.

    A structure is described by mean and spread over its atoms of the inputs of the model's last layer, and by its
    composition. Structures that are labelled already (training and validation frames of a run, and ``exclude``) are
    left out whatever their orientation, and so are copies of what was chosen. Elements that no labelled frame has come
    first.

    Args:
        pool: files or patterns; labels in them are not read.
        n: structures to choose.
        model: run folder, model name, model file or loaded backbone.
        output: extended XYZ to write; none of the files that are read.
        exclude: files of labelled frames, besides those of a run.
        strategy: ``farthest``, ``determinant`` or ``random`` (:func:`forcetune.uncertainty.selection.choose`).
        uncertainty: that counts: ``energy`` per atom, ``forces`` (the largest component), ``off``, or ``auto``: energy
            of a run with a calibration.
        quota: shares of compositions (:func:`forcetune.uncertainty.selection.share_out`).
        apart: least distance of standardised descriptors to all that is labelled or chosen, two random structures
            being about 1.4 apart; fewer are chosen where no more are left.
        seed: of what is left to chance.
        type_map: elements of numbered types, for formats that have them.
        head, device, trust: as :func:`forcetune.deployment.calculator.calculator`.
        console: for progress; standard error by default.

    Raises:
        InputError: bad structures, an unknown option, a model whose last layer is not known, nothing left to choose, or
            an output that cannot be written or would replace what is read.
    """
    console = console or Console(stderr=True, soft_wrap=True, emoji=False)
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy {strategy}: is none of {', '.join(get_args(Strategy))}.")
    if n < 1:
        raise InputError(f"--n {n}: choose at least one structure.")
    if not apart >= 0:
        raise InputError(f"--apart {apart:g}: is a distance, 0 or more.")
    parse_quota(n, quota)
    pool_files, exclude_files = expand(pool), expand(exclude) if exclude else ()
    config = _load_run_config(model)
    if output is not None:
        run_files = () if config is None else input_files(config)
        output = check_selection_output(output, [*pool_files, *exclude_files, *run_files])
    calibration = _load_calibration(model, uncertainty)
    backbone = deploy(model, head=head, device=device, trust=trust).backbone
    require_network(backbone)
    labelled = describe_structures(
        backbone, labelled_frames(config, exclude_files, type_map, console), None, False, "labelled", console
    )
    files = [(path, file_format(path)) for path in pool_files]
    wants_forces = uncertainty == "forces"
    described = describe_structures(
        backbone, read_structures(files, type_map), calibration, wants_forces, "pool", console
    )
    weights = None
    if calibration is not None:
        weights = described.forces_std if wants_forces else described.energy_std
    new_elements = find_new_elements(described.compositions, labelled.compositions)
    choices, excluded = _choose_unlabelled(
        described,
        labelled,
        weights,
        new_elements,
        n,
        strategy=cast("Strategy", strategy),
        quota=quota,
        seed=seed,
        apart=apart,
    )
    if len(choices) < n:
        console.print(f"only {len(choices)} structures are left that differ from all others", highlight=False)
    chosen = [_explain(rank, choice, described, strategy, new_elements) for rank, choice in enumerate(choices, 1)]
    structures = _collect(files, type_map, chosen)
    if output is not None:
        with atomic_path(output) as temporary:
            ase.io.write(temporary, structures, format="extxyz")
    n_pool, n_labelled = len(described.compositions), len(labelled.compositions)
    return Selection(tuple(chosen), tuple(structures), n_pool, n_labelled, excluded, strategy)


def _choose_unlabelled(
    described: DescribedStructures,
    labelled: DescribedStructures,
    weights: FloatArray | None,
    new_elements: Sequence[str],
    n: int,
    *,
    strategy: Strategy,
    quota: str | None,
    seed: int,
    apart: float,
) -> tuple[list[Choice], int]:
    """Choices among structures of the pool that are not labelled, and the number of those that are.

    Raises:
        NothingToChoose: every structure of the pool is labelled.
        InputError: the pool does not have what the quota wants.
    """
    descriptors, labelled_descriptors = standardize(described.descriptors, labelled.descriptors)
    has_new = np.array(
        [[element in elements_in(formula) for element in new_elements] for formula in described.compositions],
        dtype=bool,
    )
    candidates = Pool(descriptors, described.compositions, weights, has_new)
    excluded = find_labelled(candidates, labelled_descriptors, labelled.compositions)
    sizes = Counter(formula for formula, out in zip(described.compositions, excluded, strict=True) if not out)
    if not sizes:
        raise NothingToChoose(
            f"{described.origins[0].file}: every structure of the pool is labelled already; add others."
        )
    choices = choose(
        candidates,
        labelled_descriptors,
        n,
        strategy=strategy,
        allowed=~excluded,
        quota=share_out(n, sizes, quota),
        seed=seed,
        apart=apart,
    )
    return choices, int(excluded.sum())


def find_new_elements(compositions: Sequence[str], labelled: Sequence[str]) -> list[str]:
    """Symbols that occur in some composition and in none of the labelled ones, sorted."""
    known = set().union(*(elements_in(formula) for formula in set(labelled)))
    return sorted(set().union(*(elements_in(formula) for formula in set(compositions))) - known)


@functools.lru_cache(maxsize=4096)
def elements_in(formula: str) -> frozenset[str]:
    """Symbols of a chemical formula."""
    return frozenset(Formula(formula).count())


def _load_calibration(model: str | Path | Backbone, uncertainty: str) -> Uncertainty | None:
    """The calibration that counts; None where none does.

    Raises:
        InputError: an unknown word, or an uncertainty was asked for and there is no calibration.
    """
    if uncertainty not in UNCERTAINTIES:
        raise InputError(f"--uncertainty {uncertainty}: is none of {', '.join(UNCERTAINTIES)}.")
    folder = None if isinstance(model, Backbone) else adapter_folder(model)
    if uncertainty == "off":
        return None
    if folder is None:
        if uncertainty == "auto":
            return None
        raise InputError(f"--uncertainty {uncertainty}: only a calibrated run has one; name a run folder by --model.")
    if uncertainty == "auto" and not has_calibration(folder.parent):
        return None
    calibration = load_uncertainty(folder.parent, [folder])
    quantity = "forces" if uncertainty == "forces" else "energy_per_atom"
    if calibration.scale(quantity) is None:
        if uncertainty == "auto":
            return None
        raise InputError(f"{folder.parent}: its calibration has no {quantity}; choose another --uncertainty.")
    return calibration


def _load_run_config(model: str | Path | Backbone) -> RunConfig | None:
    """The configuration of a run; None where the model is none."""
    folder = None if isinstance(model, Backbone) else adapter_folder(model)
    if folder is None or not (folder.parent / CONFIG_NAME).is_file():
        return None
    return load_config(folder.parent / CONFIG_NAME)


def _explain(
    rank: int, choice: Choice, described: DescribedStructures, strategy: str, new_elements: Sequence[str]
) -> Chosen:
    """A choice with the reason in words."""
    deviations = [float(column[choice.index]) or None for column in (described.energy_std, described.forces_std)]
    parts = []
    if choice.brings:
        parts.append(f"the first with {', '.join(new_elements[element] for element in choice.brings)}")
    if choice.nearest_labelled is not None:
        parts.append(f"{choice.nearest_labelled:.3g} from the nearest labelled frame")
    if choice.nearest_chosen is not None:
        parts.append(f"{choice.nearest_chosen:.3g} from the nearest chosen")
    if deviations[0] is not None:
        parts.append(f"energy uncertain by {1e3 * deviations[0]:.3g} meV/atom")
    if deviations[1] is not None:
        parts.append(f"a force uncertain by {1e3 * deviations[1]:.3g} meV/A")
    first = "drawn at random" if strategy == "random" or not parts else f"{strategy} of the pool"
    origin = described.origins[choice.index]
    return Chosen(
        rank,
        origin.file,
        origin.index,
        described.compositions[choice.index],
        choice.score,
        "; ".join([first, *parts]),
        choice.nearest_labelled,
        choice.nearest_chosen,
        *deviations,
    )


def _collect(files: Sequence[tuple[Path, str]], type_map: Sequence[str], chosen: Sequence[Chosen]) -> list[Atoms]:
    """Read the pool again for the chosen structures, which get their reasons as ``info``.

    Raises:
        InputError: a file changed meanwhile.
    """
    by_place = {(choice.file, choice.frame): choice for choice in chosen}
    structures: dict[int, Atoms] = {}
    for path, kind in files:
        last = max((choice.frame for choice in chosen if choice.file == str(path)), default=-1)
        for index, atoms in enumerate(islice(iterate_structures(path, kind, type_map), last + 1)):
            choice = by_place.get((str(path), index))
            if choice is None:
                continue
            if atoms.get_chemical_formula("hill") != choice.composition:
                raise InputError(f"{path}: changed while it was read; select again when nothing writes to it.")
            structures[choice.rank] = _with_reason(atoms, choice)
    if len(structures) < len(chosen):
        raise InputError(f"{files[0][0]}: changed while it was read; select again when nothing writes to it.")
    return [structures[choice.rank] for choice in chosen]


def _with_reason(atoms: Atoms, chosen: Chosen) -> Atoms:
    """The structure without results of a calculator, with what :class:`Chosen` says in ``info``."""
    plain = atoms.copy()
    facts = {
        "select_rank": chosen.rank,
        "select_score": chosen.score,
        "select_reason": chosen.reason,
        "select_file": chosen.file,
        "select_frame": chosen.frame,
        "select_nearest_labelled": chosen.nearest_labelled,
        "select_energy_std": chosen.energy_std,
        "select_forces_std": chosen.forces_std,
    }
    plain.info.update({name: value for name, value in facts.items() if value is not None})
    return plain
