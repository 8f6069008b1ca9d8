"""From files to frames on disk, by several processes and in memory that does not grow with their number.

Stores are kept between runs. The name of one comes from the content of the files and all that decides what is read: the
keys asked for, where labels are looked for, the version of ASE. It comes also from the files as they were named and
from what the data are for, since both stand in the warnings that are repeated. So a store is used again by whoever
reads the same files in the same way, and never by another.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import ase
import numpy as np

from forcetune.errors import ForcetuneError, ForcetuneWarning, InputError, warn
from forcetune.frames.defects import refusing
from forcetune.frames.formats import list_files, say_conversions
from forcetune.frames.frame import Frame, FrameSet, LabelKeys, Origin
from forcetune.frames.label_keys import Survey, survey_labels
from forcetune.frames.labels import CANDIDATES, Label, RawFrame, choose_keys, raw_frame
from forcetune.frames.read import check_structure, labelled_frame
from forcetune.frames.sources import content_hash, expand, file_format
from forcetune.frames.splits import is_isolated
from forcetune.frames.store.chunks import DANGEROUS, FileChunk, crashed, iterate_chunks
from forcetune.frames.store.new_store import new_store
from forcetune.frames.store.rows import RowReader, RowWriter, add_facts
from forcetune.frames.store.stored_frames import FRAME_COLUMNS, LABEL_FIELDS, StoredFrames, packed_frame
from forcetune.frames.unread import describe_unread
from forcetune.frames.weights import WeightTally, is_left_out
from forcetune.frames.xyz import XYZ_FORMATS
from forcetune.utils import distributed
from forcetune.utils.files import compute_sha256
from forcetune.utils.processes import WorkerDiedError, map_in_order

VERSION = 5
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Task:
    """A chunk to read, with the keys of the labels; None to look for labels only."""

    chunk: FileChunk
    file: int
    asked: LabelKeys
    keys: LabelKeys | None


@dataclass(slots=True)
class _Part:
    """What was read of a chunk: frames as rows, or why a label cannot be used; those with weight 0 are only counted."""

    count: int
    witnesses: list[RawFrame]
    weights: WeightTally = field(default_factory=WeightTally)
    rows: list[bytes] = field(default_factory=list)
    atoms: list[int] = field(default_factory=list)
    alone: list[bool] = field(default_factory=list)
    stress_without_cell: list[bool] = field(default_factory=list)
    elements: list[tuple[int, ...]] = field(default_factory=list)
    labelled: dict[str, int] = field(default_factory=dict)
    error: InputError | None = None


def stream_frames(
    sources: Sequence[str],
    asked: LabelKeys,
    require: Sequence[Label],
    name: str,
    *,
    folder: Path,
    workers: int,
    progress: Progress | None = None,
    expect: Sequence[Label] = (),
    type_map: Sequence[str] = (),
) -> FrameSet:
    """As :func:`forcetune.frames.read.read_frames`, but with frames that stay on disk.

    Args:
        sources: files and patterns.
        asked, require, expect, name: as there.
        folder: of all stores.
        workers: processes that read.
        progress: called with the number of frames done.
        type_map: as there.

    Raises:
        InputError: as there, a file changed while it was read, or the folder cannot be written.
    """
    files = expand(list(sources))
    before = [_signature(file) for file in files]
    digest = hashlib.sha256("".join(map(_hash_file, files)).encode()).hexdigest()
    columns = [asdict(column) for column in FRAME_COLUMNS]
    # other versions of ASE may read other numbers, and other candidates may choose other labels
    read_by = [VERSION, ase.__version__, hashlib.sha256(json.dumps(CANDIDATES).encode()).hexdigest()]
    needed = [list(require), list(expect)]
    identity = [*read_by, digest, [str(file) for file in files], asked, needed, name, columns, *type_map]
    place = folder / f"frames-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}"

    def make() -> None:
        with new_store(place) as temporary:
            report = progress or (lambda _: None)
            building = _Building(files, asked, require, expect, name, workers, report, type_map)
            try:
                building.build(temporary)
            except ForcetuneError:
                _check_unchanged(files, before)  # whatever error was reported then is not the reason
                raise
            _check_unchanged(files, before)

    distributed.made_once(place, make)
    rows = RowReader(place)
    for text in rows.facts["warnings"]:
        warn(text)
    say_conversions((file, file_format(file)) for file in files)
    keys = LabelKeys(**rows.facts["keys"])
    return FrameSet(StoredFrames(rows), keys, tuple(str(file) for file in files), digest)


def _hash_file(file: Path) -> str:
    with refusing(file):
        return compute_sha256(file) if list_files(file) == [file] else content_hash(file)


def _signature(file: Path) -> list[tuple[int, int, int]] | None:
    """What changes when a file, or one that is read with it, is written or replaced."""
    try:
        stats = [part.stat() for part in list_files(file)]
    except OSError:
        return None
    return [(status.st_size, status.st_mtime_ns, status.st_ino) for status in stats]


def _check_unchanged(files: Sequence[Path], before: Sequence[object]) -> None:
    """
    Raises:
        InputError: a file is not what it was when its hash, which names the store, was taken.
    """
    for file, signature in zip(files, before, strict=True):
        if _signature(file) != signature:
            raise InputError(f"{file}: changed while it was read; run again when nothing writes to it any more.")


class _Building:
    """One pass over the files, with keys of labels that the first frames suggest; a second where they were wrong."""

    def __init__(
        self,
        files: Sequence[Path],
        asked: LabelKeys,
        require: Sequence[Label],
        expect: Sequence[Label],
        name: str,
        workers: int,
        progress: Progress,
        type_map: Sequence[str] = (),
    ) -> None:
        self.files = [(file, file_format(file)) for file in files]
        self.asked = asked
        self.require = require
        self.expect = expect
        self.name = name
        self.least = int(bool(DANGEROUS & {kind for _, kind in self.files}))
        self.workers = max(workers, self.least)
        self.progress = progress
        self.type_map = type_map

    def build(self, folder: Path) -> None:
        """
        Raises:
            InputError: as :func:`stream_frames`.
        """
        recorded: list[warnings.WarningMessage] = []
        try:
            # files are read twice or thrice, and what their readers warn of is repeated whenever the store is opened
            with warnings.catch_warnings(record=True) as recorded:
                warnings.simplefilter("always", ForcetuneWarning)
                keys, messages = self._read_and_write(folder)
        except ForcetuneError:
            for text in _texts(recorded):
                warn(text)
            raise
        add_facts(folder, {"keys": keys._asdict(), "warnings": [*_texts(recorded), *messages]})

    def _read_and_write(self, folder: Path) -> tuple[LabelKeys, list[str]]:
        """The keys of the labels, and warnings about them."""
        guess = self._guess()
        survey, weights, error = self._write(folder, guess)
        weights.check(self.name, self.files[0][0])
        keys, messages = self._choose_and_warn(survey, weights)
        if keys != guess:
            *_, error = self._write(folder, keys)
        if error is not None:
            raise error
        return keys, messages

    def _choose_and_warn(self, survey: Survey, weights: WeightTally) -> tuple[LabelKeys, list[str]]:
        """The keys of the labels, and warnings for whenever the store is opened."""
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            refusal, keys = None, LabelKeys(*[None] * len(LabelKeys._fields))
            try:
                keys = self._choose(survey)
                for text in (weights.sentence(), describe_unread(survey.witnesses, keys, self.asked)):
                    if text is not None:
                        warn(f"{self.name}: {text}")
            except InputError as error:
                refusal = error
        texts = _texts(messages)
        if refusal is not None:
            for text in texts:
                warn(text)
            raise refusal
        return keys, texts

    def _choose(self, survey: Survey) -> LabelKeys:
        return choose_keys(survey.witnesses, self.asked, self.require, self.name, survey.files, self.expect)

    def _guess(self) -> LabelKeys | None:
        """The keys by the first frames; None where they do not decide."""
        survey = Survey(self.asked)
        for part in islice(self._parts(None, min(self.workers, self.least)), 1):
            survey.add(part.witnesses)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return self._choose(survey)
            except InputError:
                return None

    def _write(self, folder: Path, keys: LabelKeys | None) -> tuple[Survey, WeightTally, InputError | None]:
        """Read everything; write the frames unless there is an error.

        Returns:
            what labels there are, what weights, and the first error in a label.
        """
        survey, weights, writer = Survey(self.asked), WeightTally(), RowWriter(folder, FRAME_COLUMNS)
        error: InputError | None = None
        atoms, alone, kinds, without_cell = array("i"), array("b"), array("i"), array("b")
        sets: dict[tuple[int, ...], int] = {}
        labelled = dict.fromkeys(LABEL_FIELDS, 0)
        try:
            for part in self._parts(keys, self.workers):
                survey.add(part.witnesses)
                weights.merge(part.weights)
                error = error or part.error
                if error is None:
                    writer.write(part.rows)
                    atoms.extend(part.atoms)
                    alone.extend(part.alone)
                    without_cell.extend(part.stress_without_cell)
                    kinds.extend(sets.setdefault(elements, len(sets)) for elements in part.elements)
                    labelled = {name: count + part.labelled.get(name, 0) for name, count in labelled.items()}
                self.progress(part.count)
            facts = {
                "files": [str(file) for file, _ in self.files],
                "element_sets": [list(kind) for kind in sets],
                "labelled": labelled,
            }
            numbers = {
                "atoms": np.array(atoms),
                "alone": np.array(alone, dtype=bool),
                "kind": np.array(kinds),
                "stress_without_cell": np.array(without_cell, dtype=bool),
            }
            writer.close(facts, numbers)
        finally:
            writer.abandon()
        return survey, weights, error

    def _parts(self, keys: LabelKeys | None, workers: int) -> Iterator[_Part]:
        tasks = (
            _Task(chunk, number, self.asked, keys)
            for number, (file, kind) in enumerate(self.files)
            for chunk in iterate_chunks(file, kind, self.type_map)
        )
        try:
            yield from map_in_order(_read, tasks, workers)
        except WorkerDiedError as error:
            if error.killed and isinstance(error.task, _Task) and error.task.chunk.format_name in DANGEROUS:
                raise crashed(error.task.chunk.path) from error
            raise


def _texts(recorded: Sequence[warnings.WarningMessage]) -> list[str]:
    """What our warnings say, each once."""
    ours = (str(one.message) for one in recorded if issubclass(one.category, ForcetuneWarning))
    return list(dict.fromkeys(ours))


def _read(task: _Task) -> _Part:
    """Read a chunk; runs in a worker."""
    chunk = task.chunk
    raws, weights = [], WeightTally()
    for index, atoms in enumerate(chunk.structures(), chunk.start):
        raw = raw_frame(atoms, Origin(str(chunk.path), index), moved=chunk.format_name in XYZ_FORMATS)
        check_structure(raw)
        weights.add(raw)
        if not is_left_out(raw):
            raws.append(raw)
    part = _Part(weights.frames, survey_labels(raws, task.asked), weights)
    if task.keys is None:
        return part
    try:
        for raw in raws:
            _add(part, labelled_frame(raw, task.keys), task.file)
    except InputError as error:
        part.error = error
    return part


def _add(part: _Part, frame: Frame, file: int) -> None:
    part.rows.append(packed_frame(frame, file))
    part.atoms.append(len(frame))
    part.alone.append(is_isolated(frame))
    part.stress_without_cell.append(frame.stress is not None and not frame.has_volume)
    part.elements.append(tuple(np.unique(frame.numbers).tolist()))
    for name in LABEL_FIELDS:
        part.labelled[name] = part.labelled.get(name, 0) + (getattr(frame, name) is not None)
