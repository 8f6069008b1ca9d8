"""The frames of a run: for training, validation and tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from forcetune.config import DataConfig, MagnetismConfig, SpinInputs
from forcetune.errors import InputError, warn
from forcetune.frames.frame import Frame, FrameSet, LabelKeys
from forcetune.frames.labels import MAGNETIC, NONE, Label
from forcetune.frames.read import read_frames
from forcetune.frames.sources import content_size, expand
from forcetune.frames.spins import OF_FILE, resolved_inputs, with_spins
from forcetune.frames.splits import separate_isolated, split, take_some
from forcetune.frames.store.stored_frames import StoredFrames, list_elements
from forcetune.frames.store.streaming import stream_frames
from forcetune.utils.files import as_path, cache_folder
from forcetune.utils.processes import worker_count

STREAM_FROM = 256 * 2**20
"""Bytes of all files together from which on ``data.stream: auto`` leaves frames on disk: in memory they and their
graphs take some ten times as much."""


class Split(NamedTuple):
    """Frames with one use, and where they came from."""

    frames: Sequence[Frame]
    files: tuple[str, ...]
    sha256: str
    keys: LabelKeys

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return list_elements(self.frames)


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a run is made of.

    Attributes:
        train, valid: frames, isolated atoms taken out.
        tests: name of the split to its frames: ``test``, or ``test NAME`` for each of several files.
        isolated: isolated atoms found among the training frames.
    """

    train: Split
    valid: Split
    tests: dict[str, Split]
    isolated: Sequence[Frame]

    @property
    def streamed(self) -> bool:
        """Whether the frames are on disk."""
        return isinstance(self.train.frames, StoredFrames)

    @property
    def splits(self) -> dict[str, Split]:
        """All by name, in the order of tables."""
        return {"train": self.train, "valid": self.valid, **self.tests}

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur anywhere, ascending."""
        return tuple(sorted({z for part in self.splits.values() for z in part.elements}))


def is_streamed(config: DataConfig) -> bool:
    """Whether frames stay on disk.

    Raises:
        InputError: a file is missing.
    """
    if config.stream != "auto":
        return config.stream == "on"
    valid = config.valid if isinstance(config.valid, list) else []
    named = (config.train, config.train_only, valid, config.test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reader says what is named twice
        return sum(content_size(file) for part in named if part for file in expand(list(part))) >= STREAM_FROM


def read_dataset(
    config: DataConfig, magnetism: MagnetismConfig | None = None, progress: Callable[[int], None] | None = None
) -> Dataset:
    """Read, check and split the frames of a run.

    Some training and validation frame needs an energy and some needs forces, unless ``energy_key`` or ``forces_key``
    is ``none``; some test frame needs an energy. Labels that a frame lacks do not count. With a magnetic layer moments
    are read, too, with a spin layer magnetic forces, and every frame needs the state that it is given.

    Args:
        config: which, and whether they stay on disk.
        magnetism: the magnetic layer of the run, if there is one.
        progress: called with the number of frames that were read into a store.

    Raises:
        InputError: as :func:`forcetune.frames.read.read_frames`, or a split leaves nothing.
    """
    needed: tuple[Label, ...] = ("energy", "forces")
    magnetic = magnetism is not None and magnetism.layer != "off"
    streamed = is_streamed(config)
    read = partial(
        _read,
        config,
        _streamed(config, progress) if streamed else partial(_in_memory, type_map=config.type_map),
        magnetic,
    )
    trained_only = _check_train_only(config)
    training = read([*config.train, *config.train_only], needed, "training data")
    frames, isolated = separate_isolated(training.frames)
    frames, added = _set_apart(frames, trained_only)
    if not frames:
        raise InputError(f"{training.files[0]}: holds isolated atoms only; give frames to train on.")
    if isinstance(config.valid, list):
        validation = read(config.valid, needed, "validation data", training.keys)
        valid_frames, _ = separate_isolated(validation.frames)
        if not valid_frames:
            raise InputError(f"{validation.files[0]}: holds isolated atoms only; give frames to validate on.")
        valid = Split(valid_frames, validation.files, validation.sha256, validation.keys)
        train_frames = frames
    else:
        train_frames, valid_frames = split(frames, config.valid, config.split_seed)
        valid = Split(valid_frames, training.files, training.sha256, training.keys)
    train_frames = take_some(train_frames, config.train_frames, config.train_frames_seed)
    train = Split(_join(train_frames, added), training.files, training.sha256, training.keys)
    tests = {}
    for source, name in zip(config.test, _test_names(config.test), strict=True):
        test = read([source], ("energy",), f"{name} data", training.keys)
        tests[name] = Split(test.frames, test.files, test.sha256, test.keys)
    if magnetism is not None and magnetism.layer == "spin":
        inputs = resolved_inputs(magnetism.inputs, training.keys, training.frames)
        train, valid = (part._replace(frames=_with_state(part.frames, inputs)) for part in (train, valid))
        tests = {name: part._replace(frames=_with_state(part.frames, inputs)) for name, part in tests.items()}
    return Dataset(train, valid, tests, isolated)


def _check_train_only(config: DataConfig) -> set[str]:
    """Files that are trained on only.

    Raises:
        InputError: one of them is among the other training files, too.
    """
    if not config.train_only:
        return set()
    train = {path.resolve() for path in expand(config.train)}
    files = expand(config.train_only)
    for path in files:
        if path.resolve() in train:
            raise InputError(f"{path}: is named by data.train and by data.train_only; leave it out of one of them.")
    return {str(path) for path in files}


def _set_apart(frames: Sequence[Frame], files: set[str]) -> tuple[Sequence[Frame], Sequence[Frame]]:
    """The frames of other files, and those of these.

    Raises:
        InputError: there are no others.
    """
    if not files:
        return frames, ()
    apart = np.array([frame.origin.file in files for frame in frames])
    if apart.all():
        raise InputError("data.train: holds isolated atoms only; give frames to train on beside data.train_only.")
    if isinstance(frames, StoredFrames):
        return frames.take(frames.indices[~apart]), frames.take(frames.indices[apart])
    by_place = list(zip(frames, apart, strict=True))
    return tuple(frame for frame, out in by_place if not out), tuple(frame for frame, out in by_place if out)


def _join(frames: Sequence[Frame], others: Sequence[Frame]) -> Sequence[Frame]:
    """Both, of one store where they are on disk."""
    if isinstance(frames, StoredFrames) and isinstance(others, StoredFrames):
        return frames.take(np.concatenate([frames.indices, others.indices]))
    return (*frames, *others) if others else frames


def _with_state(frames: Sequence[Frame], inputs: SpinInputs) -> Sequence[Frame]:
    """The frames with the magnetic state that the layer is given, whether they are in memory or on disk.

    Raises:
        InputError: as :func:`with_spins`.
    """
    if not isinstance(frames, StoredFrames):
        return with_spins(frames, inputs)
    with_state = frames.with_spins(inputs)
    if not frames.all_have("spins" if inputs in OF_FILE else "moments"):
        for _ in with_state:
            pass  # names the frame that has none
    return with_state


_Reader = Callable[[Sequence[str], LabelKeys, Sequence[Label], str], FrameSet]


def _in_memory(
    sources: Sequence[str], asked: LabelKeys, expect: Sequence[Label], name: str, *, type_map: Sequence[str] = ()
) -> FrameSet:
    keys: dict[str, Any] = {f"{label}_key": key for label, key in asked._asdict().items()}
    return read_frames(list(sources), **keys, require=(), expect=expect, name=name, type_map=type_map)


def _streamed(config: DataConfig, progress: Callable[[int], None] | None) -> _Reader:
    folder = as_path(config.store) if config.store is not None else cache_folder("streams")
    workers = worker_count(config.workers)

    def read(sources: Sequence[str], asked: LabelKeys, expect: Sequence[Label], name: str) -> FrameSet:
        options: dict[str, Any] = {"folder": folder, "workers": workers, "progress": progress}
        return stream_frames(sources, asked, (), name, **options, expect=expect, type_map=config.type_map)

    return read


def _read(
    config: DataConfig,
    reader: _Reader,
    magnetic: bool,
    sources: Sequence[str],
    expect: Sequence[Label],
    name: str,
    expected: LabelKeys | None = None,
) -> FrameSet:
    unasked = () if magnetic else MAGNETIC
    asked = LabelKeys(*(NONE if name in unasked else getattr(config, f"{name}_key") for name in LabelKeys._fields))
    frame_set = reader(sources, asked, expect, name)
    for label, ours, theirs in zip(LabelKeys._fields, frame_set.keys, expected or frame_set.keys, strict=True):
        if ours != theirs and None not in (ours, theirs):
            warn(
                f"{name}: {label} from {ours!r}, but the training data have it under {theirs!r}; set data.{label}_key."
            )
    return frame_set


def _test_names(sources: Sequence[str]) -> list[str]:
    """``test`` for one file; of several each has the file's own name in it."""
    if len(sources) == 1:
        return ["test"]
    stems = [Path(source).name.removesuffix(".gz").rsplit(".", 1)[0] for source in sources]
    names = [stem if stem.startswith("test") else f"test {stem}" for stem in stems]
    return [name if names.count(name) == 1 else f"{name} {number}" for number, name in enumerate(names, 1)]
