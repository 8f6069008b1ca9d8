"""Which options were given, and which are defaults that follow from other options.

A run's ``config.yaml`` holds every option. Beside them, under ``defaults``, stands which of those that depend on
others were chosen by forcetune, and for what: with another method its own learning rate and optimizer come in their
place, while the same configuration repeats the run to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)
RECORD = "defaults"
"""Name of the record in ``config.yaml``."""
LOSS_FIELDS = ("energy", "forces", "stress", "moments", "form", "energy_per_atom")
LOSS, SECOND_LOSS = "training.loss", "training.second_stage.loss"
METHOD = ("method.name", "method.table")
OPTIMIZER, SCHEDULE = "training.optimizer", "training.schedule.name"
DATA = ("data.train", "data.stress_key")
PARENTS: dict[str, tuple[str, ...]] = {
    "method.name": ("method.table",),
    "training.learning_rate": (*METHOD, "training.optimizer", "model.model"),
    # what decides the number of frames and of steps, and what no default is chosen beside
    "training.epochs": (
        *("data.train", "data.valid", "data.train_only", "data.train_frames"),
        *("training.valid_every", "training.second_stage.start"),
        *("training.batch_size", "training.batch_atoms", "training.batch_edges", "training.schedule.warmup_epochs"),
    ),
    # a schedule or an average that is given, a second stage and a magnetic layer decide against some
    OPTIMIZER: (
        *(*METHOD, "magnetism.layer", "training.second_stage.start"),
        *("training.ema", SCHEDULE, "training.schedule.factor", "training.schedule.patience"),
        "training.schedule.minimum",
    ),
    "training.ema": (*METHOD, "training.optimizer"),
    **{f"{LOSS}.{name}": ("magnetism.layer",) for name in LOSS_FIELDS},
    **{f"{SECOND_LOSS}.{name}": ("magnetism.layer", "training.second_stage.start") for name in LOSS_FIELDS},
    # whether it counts depends on the labels, too
    f"{LOSS}.stress": ("magnetism.layer", *DATA),
    f"{SECOND_LOSS}.stress": ("magnetism.layer", "training.second_stage.start", *DATA),
}
"""Options whose default depends on others, with these."""
NULL_IS_UNSET = frozenset({"training.learning_rate", "training.optimizer"})
"""Options that have no value of their own at null."""

# what versions without the record wrote for a method; not to be changed with the methods
_EARLIER_RATES = {"full": 1e-3, "freeze": 1e-3, "scratch": 1e-2, "sparse": 1e-2, "sparse-h": 1e-2}
_EARLIER_RATE = 5e-3
_EARLIER_SCHEDULEFREE = ("sparse", "sparse-h")
_EARLIER_LOSS = {"energy": 1.0, "forces": 1000.0, "stress": 0.0, "moments": 0.0, "form": "mse"}
_EARLIER_PLAIN = _EARLIER_LOSS | {"energy_per_atom": False}
_EARLIER_SECOND = _EARLIER_PLAIN | {"energy": 1000.0, "forces": 100.0, "energy_per_atom": True}
_EARLIER_MAGNETIC = {"energy": 1.0, "forces": 1.0, "moments": 1.0, "form": "huber", "energy_per_atom": True}
_OF_EVERY_RUN = {
    "data": {"train", "valid", "test"},
    "model": {"model", "head", "elements", "dtype", "device"},
    "references": {"mode", "table"},
    "method": {"name", "rank", "alpha"},
    "training": {
        *("epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "schedule", "loss", "second_stage"),
        *("ema", "clip", "valid_every", "early_stopping", "seed", "threads"),
    },
    "output": {"run", "overwrite", "adapter_dtype"},
}
"""Options that every ``config.yaml`` of a run has, and hardly any that a user writes."""


@dataclass(frozen=True, slots=True)
class DefaultsRecord:
    """Defaults in a stored configuration.

    Attributes:
        names: options that were not given.
        parents: options they depend on, with the values that they were chosen for.
    """

    names: frozenset[str]
    parents: dict[str, Any]

    def outdated(self, merged: Mapping[str, Any], now: set[str]) -> set[str]:
        """Options that were chosen for other values than those in a merged configuration, unless given now."""
        changed = {name for name, value in self.parents.items() if _word(get_value(merged, name)) != _word(value)}
        outdated: set[str] = set()
        while more := {name for name in self.names - now - outdated if changed.intersection(self._parents(name))}:
            outdated |= more
            changed |= more  # what follows from a default that is chosen again is chosen again, too
        return outdated

    def _parents(self, name: str) -> tuple[str, ...]:
        """What a default was chosen for. The method alone decided for an optimizer in versions that stored less."""
        return METHOD if name == OPTIMIZER and SCHEDULE not in self.parents else PARENTS[name]


def make_record(config: BaseModel) -> dict[str, Any]:
    """What ``config.yaml`` says about defaults: their values, and those of the options they depend on."""
    content = config.model_dump(mode="json")
    names = [name for name in PARENTS if not is_given(config, name)]
    parents = dict.fromkeys(parent for name in names for parent in PARENTS[name])
    return {
        "values": {name: get_value(content, name) for name in names},
        "for": {name: get_value(content, name) for name in parents},
    }


def take_record(content: dict[str, Any]) -> DefaultsRecord | None:
    """Take the record out of a stored configuration; None where a user wrote it.

    A default that was edited in the file counts as given. In runs of earlier versions, which have no record, an
    option with the default of its method counts as not given.

    Raises:
        ValueError: the record is damaged.
    """
    if RECORD not in content and not _is_of_a_run(content):
        return None
    data = content.get("data")
    if (
        _word(get_value(content, "magnetism.layer")) not in (None, "off")
        and isinstance(data, dict)
        and "magforces_key" not in data
    ):
        data["magforces_key"] = "none"  # of a version that knew no such labels: the run stays what it was
    if RECORD not in content:
        return _earlier_record(content)
    stored = content.pop(RECORD)
    values = stored.get("values") if isinstance(stored, dict) else None
    parents = stored.get("for") if isinstance(stored, dict) else None
    if not isinstance(values, dict) or not isinstance(parents, dict) or set(values) - set(PARENTS):
        raise ValueError(f"{RECORD} is written by forcetune; remove this part and give the options you want")
    names = frozenset(name for name, value in values.items() if get_value(content, name) == value)
    return DefaultsRecord(names, {str(name): value for name, value in parents.items()})


def _is_of_a_run(content: Mapping[str, Any]) -> bool:
    return all(
        isinstance(section := content.get(name), dict) and keys <= set(section) for name, keys in _OF_EVERY_RUN.items()
    )


def _earlier_record(content: Mapping[str, Any]) -> DefaultsRecord:
    """By the defaults of the versions that kept no record."""
    name, table = get_value(content, "method.name"), get_value(content, "method.table")
    sparse = name in _EARLIER_SCHEDULEFREE if table is None else "SoftThreshold" in str(table)
    magnetic = _word(get_value(content, "magnetism.layer")) not in (None, "off")
    second = magnetic and get_value(content, "training.second_stage.start") is not None
    defaults: dict[str, Any] = {
        "training.learning_rate": _EARLIER_RATE if table is not None else _EARLIER_RATES.get(str(name), _EARLIER_RATE),
        "training.optimizer": "schedulefree" if sparse else "adam",
        "training.ema": None if get_value(content, "training.optimizer") == "schedulefree" else 0.995,
        **{f"{LOSS}.{key}": value for key, value in (_EARLIER_MAGNETIC if magnetic else _EARLIER_PLAIN).items()},
        **{
            f"{SECOND_LOSS}.{key}": value
            for key, value in (_EARLIER_MAGNETIC | {"energy": 10.0} if second else _EARLIER_SECOND).items()
        },
    }
    if table is not None:
        defaults["method.name"] = "mmea"
    names = {
        key
        for key, value in defaults.items()
        if get_value(content, key) == value or (key in NULL_IS_UNSET and get_value(content, key) is None)
    }
    parents = dict.fromkeys(parent for key in names for parent in (METHOD if key == OPTIMIZER else PARENTS[key]))
    return DefaultsRecord(frozenset(names), {parent: get_value(content, parent) for parent in parents})


def _word(value: Any) -> Any:
    """YAML 1.1 reads ``on`` and ``off`` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def get_value(content: Mapping[str, Any], name: str) -> Any:
    """The option of a dotted name in nested mappings; None where there is none."""
    value: Any = content
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def set_value(content: dict[str, Any], name: str, value: Any) -> None:
    """Put an option of a dotted name into nested mappings."""
    *sections, last = name.split(".")
    for key in sections:
        content = content.setdefault(key, {})
    content[last] = value


def remove_value(content: dict[str, Any], name: str) -> None:
    """Take the option of a dotted name out of nested mappings, if it is there."""
    *sections, last = name.split(".")
    for key in sections:
        content = content.get(key, {})
    content.pop(last, None)


def leaf_names(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all options in nested mappings."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from leaf_names(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def is_given(config: BaseModel, name: str) -> bool:
    """Whether an option of a dotted name was given and is no default."""
    section: Any = config
    *sections, last = name.split(".")
    for key in sections:
        if key not in section.model_fields_set:
            return False
        section = getattr(section, key)
    return last in section.model_fields_set and not (name in NULL_IS_UNSET and getattr(section, last) is None)


def with_unset(config: Model, names: Iterable[str]) -> Model:
    """The same values, these options of dotted names no longer counted as given."""
    below: dict[str, list[str]] = {}
    for name in names:
        section, _, rest = name.partition(".")
        below.setdefault(section, []).append(rest)
    values = {field: getattr(config, field) for field in type(config).model_fields}
    for field, rests in below.items():
        if inner := [rest for rest in rests if rest]:
            values[field] = with_unset(values[field], inner)
    values |= config.model_extra or {}
    ends = {field for field, rests in below.items() if "" in rests}
    return config.model_construct(_fields_set=set(config.model_fields_set) - ends, **values)


def with_given_as_in(config: Model, other: Model) -> Model:
    """The same values, those options counted as given that are so in another configuration."""
    values: dict[str, Any] = {}
    for field in type(config).model_fields:
        value = getattr(config, field)
        values[field] = with_given_as_in(value, getattr(other, field)) if isinstance(value, BaseModel) else value
    values |= config.model_extra or {}
    return config.model_construct(_fields_set=set(other.model_fields_set), **values)
