"""The frames of a run: for training, validation and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from forcetune.config import DataConfig, MagnetismConfig
from forcetune.errors import InputError, warn
from forcetune.frames.frame import Frame, FrameSet, LabelKeys
from forcetune.frames.labels import NONE, Label
from forcetune.frames.read import read_frames
from forcetune.frames.spins import resolved_inputs, with_spins
from forcetune.frames.splits import separate_isolated, split


class Split(NamedTuple):
    """Frames with one use, and where they came from."""

    frames: tuple[Frame, ...]
    files: tuple[str, ...]
    sha256: str
    keys: LabelKeys

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, ascending."""
        return tuple(sorted({int(z) for frame in self.frames for z in frame.numbers}))


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
    isolated: tuple[Frame, ...]

    @property
    def splits(self) -> dict[str, Split]:
        """All by name, in the order of tables."""
        return {"train": self.train, "valid": self.valid, **self.tests}

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur anywhere, ascending."""
        return tuple(sorted({z for part in self.splits.values() for z in part.elements}))


def read_dataset(config: DataConfig, magnetism: MagnetismConfig | None = None) -> Dataset:
    """Read, check and split the frames of a run.

    Every training and validation frame needs an energy and, unless ``forces_key`` is ``none``, forces; test frames
    need an energy. With a magnetic layer moments are read, too, and every frame needs the state that it is given.

    Raises:
        InputError: as :func:`forcetune.frames.read.read_frames`, or a split leaves nothing.
    """
    needed: tuple[Label, ...] = ("energy",) if config.forces_key == NONE else ("energy", "forces")
    magnetic = magnetism is not None and magnetism.layer != "off"
    found = _read(config, config.train, needed, "training data", magnetic)
    frames, isolated = separate_isolated(found.frames)
    if not frames:
        raise InputError(f"{found.files[0]}: holds isolated atoms only; give frames to train on.")
    if isinstance(config.valid, list):
        given = _read(config, config.valid, needed, "validation data", magnetic, found.keys)
        valid_frames, _ = separate_isolated(given.frames)
        if not valid_frames:
            raise InputError(f"{given.files[0]}: holds isolated atoms only; give frames to validate on.")
        valid = Split(valid_frames, given.files, given.sha256, given.keys)
        train_frames = frames
    else:
        train_frames, valid_frames = split(frames, config.valid, config.split_seed)
        valid = Split(valid_frames, found.files, found.sha256, found.keys)
    train = Split(train_frames, found.files, found.sha256, found.keys)
    tests = {}
    for source, name in zip(config.test, _test_names(config.test), strict=True):
        given = _read(config, [source], ("energy",), f"{name} data", magnetic, found.keys)
        tests[name] = Split(given.frames, given.files, given.sha256, given.keys)
    if magnetism is not None and magnetism.layer == "spin":
        inputs = resolved_inputs(magnetism.inputs, found.keys)
        train, valid = (part._replace(frames=with_spins(part.frames, inputs)) for part in (train, valid))
        tests = {name: part._replace(frames=with_spins(part.frames, inputs)) for name, part in tests.items()}
    return Dataset(train, valid, tests, isolated)


def _read(
    config: DataConfig,
    sources: Sequence[str],
    require: Sequence[Label],
    name: str,
    magnetic: bool,
    expected: LabelKeys | None = None,
) -> FrameSet:
    found = read_frames(
        list(sources),
        energy_key=config.energy_key,
        forces_key=config.forces_key,
        stress_key=config.stress_key,
        moments_key=config.moments_key if magnetic else NONE,
        spins_key=config.spins_key if magnetic else NONE,
        require=require,
        name=name,
    )
    for label, ours, theirs in zip(LabelKeys._fields, found.keys, expected or found.keys, strict=True):
        if ours != theirs and None not in (ours, theirs):
            warn(
                f"{name}: {label} from {ours!r}, but the training data have it under {theirs!r}; set data.{label}_key."
            )
    return found


def _test_names(sources: Sequence[str]) -> list[str]:
    """``test`` for one file; of several each has the file's own name in it."""
    if len(sources) == 1:
        return ["test"]
    stems = [Path(source).name.removesuffix(".gz").rsplit(".", 1)[0] for source in sources]
    names = [stem if stem.startswith("test") else f"test {stem}" for stem in stems]
    return [name if names.count(name) == 1 else f"{name} {number}" for number, name in enumerate(names, 1)]
