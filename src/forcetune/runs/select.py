"""Choosing what to label next from a pool of structures that is read twice and never in memory as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from rich.console import Console

from forcetune.backbones.protocol import Backbone
from forcetune.config import RunConfig, load_config
from forcetune.deployment.calculator import frame_of
from forcetune.deployment.loading import adapter_folder, deploy
from forcetune.errors import InputError
from forcetune.evaluation.metrics import build_graphs, evaluation_batches
from forcetune.frames.dataset import read_dataset
from forcetune.frames.frame import FloatArray, Frame, Origin
from forcetune.frames.labels import raw_frame
from forcetune.frames.read import check_structure
from forcetune.frames.sources import expand, file_format
from forcetune.frames.store.chunks import iterate_structures
from forcetune.runs.folder import CONFIG_NAME, input_files
from forcetune.runs.preparation import counting
from forcetune.runs.selection_output import check_selection_output
from forcetune.uncertainty.file import Uncertainty, has_calibration, load_uncertainty
from forcetune.uncertainty.last_layer import network_of
from forcetune.uncertainty.selection import (
    STRATEGIES,
    Choice,
    Pool,
    Strategy,
    choose,
    labelled_already,
    parse_quota,
    share_out,
    standardize,
)
from forcetune.utils.files import atomic_path

AT_ONCE = 128
"""Structures in memory at a time."""
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


@dataclass(frozen=True, slots=True, eq=False)
class _Described:
    """Descriptors of structures, and where these stand.

    Attributes:
        descriptors: (structures, n).
        compositions: Hill formulas.
        energy_std, forces_std: (structures,) eV/atom and eV/Å, of calibrated runs; empty otherwise.
    """

    descriptors: FloatArray
    compositions: list[str]
    origins: list[Origin]
    energy_std: FloatArray
    forces_std: FloatArray


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
    left out whatever their orientation, and so are copies of what was chosen.

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
    console = console or Console(stderr=True, soft_wrap=True)
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy {strategy}: is none of {', '.join(get_args(Strategy))}.")
    if n < 1:
        raise InputError(f"--n {n}: choose at least one structure.")
    if not apart >= 0:
        raise InputError(f"--apart {apart:g}: is a distance, 0 or more.")
    parse_quota(n, quota)
    pool_files, exclude_files = expand(pool), expand(exclude) if exclude else ()
    config = _config_of(model)
    if output is not None:
        run_files = () if config is None else input_files(config)
        output = check_selection_output(output, [*pool_files, *exclude_files, *run_files])
    calibration = _calibration(model, uncertainty)
    backbone = deploy(model, head=head, device=device, trust=trust).backbone
    network_of(backbone)
    wants_forces = uncertainty == "forces"
    known = _describe(backbone, _labelled(config, exclude_files, type_map, console), None, False, "labelled", console)
    files = [(path, file_format(path)) for path in pool_files]
    described = _describe(backbone, _structures(files, type_map), calibration, wants_forces, "pool", console)
    descriptors, labelled = standardize(described.descriptors, known.descriptors)
    weights = described.forces_std if wants_forces else described.energy_std
    candidates = Pool(descriptors, described.compositions, weights if calibration is not None else None)
    excluded = labelled_already(candidates, labelled, known.compositions)
    sizes = Counter(formula for formula, out in zip(described.compositions, excluded, strict=True) if not out)
    if not sizes:
        raise NothingToChoose(f"{files[0][0]}: every structure of the pool is labelled already; add others.")
    choices = choose(
        candidates,
        labelled,
        n,
        strategy=cast("Strategy", strategy),
        allowed=~excluded,
        quota=share_out(n, sizes, quota),
        seed=seed,
        apart=apart,
    )
    if len(choices) < n:
        console.print(f"only {len(choices)} structures are left that differ from all others", highlight=False)
    chosen = [_explain(rank, choice, described, strategy) for rank, choice in enumerate(choices, 1)]
    structures = _collect(files, type_map, chosen)
    if output is not None:
        with atomic_path(output) as temporary:
            ase.io.write(temporary, structures, format="extxyz")
    n_labelled = len(known.compositions)
    return Selection(tuple(chosen), tuple(structures), len(excluded), n_labelled, int(excluded.sum()), strategy)


def _calibration(model: str | Path | Backbone, uncertainty: str) -> Uncertainty | None:
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


def _config_of(model: str | Path | Backbone) -> RunConfig | None:
    """The configuration of a run; None where the model is none."""
    folder = None if isinstance(model, Backbone) else adapter_folder(model)
    if folder is None or not (folder.parent / CONFIG_NAME).is_file():
        return None
    return load_config(folder.parent / CONFIG_NAME)


def _labelled(
    config: RunConfig | None, exclude: Sequence[Path], type_map: Sequence[str], console: Console
) -> Iterator[Frame]:
    """Frames of the run, training and validation, and of further files."""
    if config is not None:
        with counting(console, "labelled frames read") as advance:
            dataset = read_dataset(config.data.model_copy(update={"test": []}), config.magnetism, advance)
        yield from dataset.train.frames
        yield from dataset.valid.frames
    yield from _structures([(path, file_format(path)) for path in exclude], type_map)


def _structures(files: Sequence[tuple[Path, str]], type_map: Sequence[str]) -> Iterator[Frame]:
    """The frames of files without labels, one at a time."""
    for path, kind in files:
        for index, atoms in enumerate(iterate_structures(path, kind, type_map)):
            origin = Origin(str(path), index)
            check_structure(raw_frame(atoms, origin))
            yield replace(frame_of(atoms), origin=origin)


def _describe(
    backbone: Backbone,
    frames: Iterator[Frame],
    calibration: Uncertainty | None,
    forces: bool,
    label: str,
    console: Console,
) -> _Described:
    """Descriptors of all frames; of the frames themselves no more than :data:`AT_ONCE` are in memory."""
    parts: list[tuple[FloatArray, FloatArray, FloatArray]] = []
    compositions: list[str] = []
    origins: list[Origin] = []
    with counting(console, label) as advance:
        while some := list(islice(frames, AT_ONCE)):
            parts.extend(_describe_frames(backbone, some, calibration, forces))
            compositions.extend(_formula(frame) for frame in some)
            origins.extend(frame.origin for frame in some)
            advance(len(some))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    if not columns:
        width = _width(backbone)
        return _Described(np.zeros((0, width)), [], [], np.zeros(0), np.zeros(0))
    return _Described(columns[0], compositions, origins, columns[1], columns[2])


def _describe_frames(
    backbone: Backbone, frames: Sequence[Frame], calibration: Uncertainty | None, forces: bool
) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
    """Of each batch: descriptors (structures, n), standard deviations of energies per atom and of forces."""
    network, posterior = network_of(backbone), None if calibration is None else calibration.posterior
    whitening = None if posterior is None else posterior.whitening
    graphs = build_graphs(backbone, frames)
    for batch in evaluation_batches(graphs):
        directions = None
        if whitening is not None and forces:
            directions = torch.from_numpy(whitening)
        features = network.readout_features(network.place(batch), directions)
        atoms, of_atom = features.atoms.cpu().numpy(), batch.graph_index.numpy()
        counts = batch.atoms_per_graph.numpy()
        mean = _sums(atoms, of_atom, len(counts)) / counts[:, None]
        spread = np.sqrt(_sums((atoms - mean[of_atom]) ** 2, of_atom, len(counts)) / counts[:, None])
        kinds = (batch.numbers.numpy()[:, None] == np.array(backbone.elements)).astype(np.float64)
        composition = _sums(kinds, of_atom, len(counts)) / counts[:, None]
        energy_std = forces_std = np.zeros(len(counts))
        if calibration is not None and whitening is not None:
            graph_features = features.graphs.cpu().numpy()
            scale = calibration.scale("energy_per_atom") or 1.0
            energy_std = scale * np.linalg.norm(graph_features @ whitening.T, axis=1) / counts
            if features.gradients is not None:
                deviations = np.linalg.norm(features.gradients.cpu().numpy(), axis=0).max(axis=1)
                forces_std = np.zeros(len(counts))
                np.maximum.at(forces_std, of_atom, deviations * (calibration.scale("forces") or 1.0))
        yield np.concatenate([mean, spread, composition], axis=1), energy_std, forces_std


def _sums(values: FloatArray, groups: np.ndarray, count: int) -> FloatArray:
    """(count, n) sums of rows by their group."""
    found = np.zeros((count, values.shape[1]))
    np.add.at(found, groups, values)
    return found


def _width(backbone: Backbone) -> int:
    """Numbers that describe a structure."""
    atom = Atoms([chemical_symbols[backbone.elements[0]]], positions=[(0.0, 0.0, 0.0)])
    return next(_describe_frames(backbone, [frame_of(atom)], None, False))[0].shape[1]


def _formula(frame: Frame) -> str:
    return Atoms(frame.numbers).get_chemical_formula("hill")


def _explain(rank: int, choice: Choice, found: _Described, strategy: str) -> Chosen:
    """A choice with the reason in words."""
    deviations = [float(column[choice.index]) or None for column in (found.energy_std, found.forces_std)]
    parts = []
    if choice.nearest_labelled is not None:
        parts.append(f"{choice.nearest_labelled:.3g} from the nearest labelled frame")
    if choice.nearest_chosen is not None:
        parts.append(f"{choice.nearest_chosen:.3g} from the nearest chosen")
    if deviations[0] is not None:
        parts.append(f"energy uncertain by {1e3 * deviations[0]:.3g} meV/atom")
    if deviations[1] is not None:
        parts.append(f"a force uncertain by {1e3 * deviations[1]:.3g} meV/A")
    first = "drawn at random" if strategy == "random" or not parts else f"{strategy} of the pool"
    origin = found.origins[choice.index]
    return Chosen(
        rank,
        origin.file,
        origin.index,
        found.compositions[choice.index],
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
    by_place = {(one.file, one.frame): one for one in chosen}
    found: dict[int, Atoms] = {}
    for path, kind in files:
        last = max((one.frame for one in chosen if one.file == str(path)), default=-1)
        for index, atoms in enumerate(islice(iterate_structures(path, kind, type_map), last + 1)):
            one = by_place.get((str(path), index))
            if one is None:
                continue
            if atoms.get_chemical_formula("hill") != one.composition:
                raise InputError(f"{path}: changed while it was read; select again when nothing writes to it.")
            found[one.rank] = _with_reason(atoms, one)
    if len(found) < len(chosen):
        raise InputError(f"{files[0][0]}: changed while it was read; select again when nothing writes to it.")
    return [found[one.rank] for one in chosen]


def _with_reason(atoms: Atoms, one: Chosen) -> Atoms:
    """The structure without results of a calculator, with what :class:`Chosen` says in ``info``."""
    plain = atoms.copy()
    facts = {
        "select_rank": one.rank,
        "select_score": one.score,
        "select_reason": one.reason,
        "select_file": one.file,
        "select_frame": one.frame,
        "select_nearest_labelled": one.nearest_labelled,
        "select_energy_std": one.energy_std,
        "select_forces_std": one.forces_std,
    }
    plain.info.update({name: value for name, value in facts.items() if value is not None})
    return plain
