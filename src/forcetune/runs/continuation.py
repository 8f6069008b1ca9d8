"""Runs of a comparison that are there already, and the defaults that they were made with.

Some defaults are settled only when a run starts: by the foundation model, the labels, the number of frames. A version
with other defaults would continue a comparison with other settings, so the stored ones come first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forcetune.config import RunConfig, load_config
from forcetune.errors import InputError
from forcetune.runs.folder import CONFIG_NAME, FINISHED, read_status
from forcetune.runs.method_defaults import with_run_defaults
from forcetune.utils.option_defaults import (
    LOSS,
    SECOND_LOSS,
    get_value,
    is_given,
    remove_value,
    set_value,
    with_unset,
)

OPTIMIZER, RATE, EPOCHS = "training.optimizer", "training.learning_rate", "training.epochs"
SETTLED = (RATE, EPOCHS, f"{LOSS}.stress", f"{SECOND_LOSS}.stress", OPTIMIZER)
"""Options whose default is settled when a run starts, or is another one in another version."""
OF_METHOD = (OPTIMIZER, RATE)
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredDefaults:
    """Settled defaults of runs that are there.

    Attributes:
        values: by option and what it is the same for: the method for an optimizer and a learning rate, the frames for
            epochs.
    """

    values: Mapping[Key, Any]

    def select(self, config: RunConfig) -> dict[str, Any]:
        """Those that a run of this configuration takes, by dotted name."""
        values = {name: self.values.get(_key(name, config)) for name in SETTLED if not is_given(config, name)}
        return {name: value for name, value in values.items() if value is not None}

    def describe(self, config: RunConfig) -> list[str]:
        """The same, as one writes them."""
        method = f" ({config.method.name})"
        selected = self.select(config).items()
        return [f"{name}={_text(value)}{method if name in OF_METHOD else ''}" for name, value in selected]


def read_stored_defaults(configs: Iterable[RunConfig]) -> StoredDefaults:
    """The defaults that runs were made with which are there already.

    Args:
        configs: of all runs of a comparison.

    Raises:
        InputError: they differ between runs that have to be alike; names both and the option.
    """
    values: dict[Key, Any] = {}
    origins: dict[Key, Path] = {}
    for config in configs:
        if not is_begun(config):
            continue
        run = Path(config.output.run)
        content = load_config(run / CONFIG_NAME).model_dump()
        for name in SETTLED:
            value = get_value(content, name)
            if is_given(config, name) or (name in OF_METHOD and value is None):
                continue
            key = _key(name, config)
            if key in values and values[key] != value:
                raise InputError(
                    f"{run} has {name} {_text(value)} and {origins[key].name} {_text(values[key])}, defaults of "
                    f"different versions of forcetune; write --set {name}=… to make these runs again alike, or choose "
                    "another folder with --out."
                )
            values[key], origins[key] = value, run
    return StoredDefaults(values)


def with_stored_defaults(config: RunConfig, stored: StoredDefaults) -> RunConfig:
    """The configuration with the stored defaults, which do not count as set; the same object if there are none."""
    values = stored.select(config)
    if not values:
        return config
    content = config.model_dump(exclude_unset=True)
    for name, value in values.items():
        set_value(content, name, value)
    return with_unset(RunConfig.model_validate(content), values)


def describe_earlier_optimizers(configs: Iterable[RunConfig]) -> list[str]:
    """Methods whose runs that are there were trained with another optimizer than today's default.

    Args:
        configs: of all runs of a comparison.
    """
    texts: dict[str, None] = {}
    for config in configs:
        if is_given(config, OPTIMIZER) or not is_begun(config):
            continue
        stored = load_config(Path(config.output.run) / CONFIG_NAME).training.optimizer
        today = with_run_defaults(config).training.optimizer
        if stored is not None and stored != today:
            texts[f"{config.method.name} with {stored} (now {today})"] = None
    return list(texts)


def is_finished(config: RunConfig) -> bool:
    """Whether the run folder holds a finished run of this very configuration."""
    return is_begun(config) and read_status(Path(config.output.run)) in FINISHED


def is_begun(config: RunConfig) -> bool:
    """Whether the run folder is of this very configuration."""
    run = Path(config.output.run)
    if not (run / CONFIG_NAME).is_file():
        return False
    return _resolve(load_config(run / CONFIG_NAME)) == _resolve(config)


def _resolve(config: RunConfig) -> dict[str, Any]:
    """All that decides the result of a run of this configuration, but for defaults that are settled when it starts."""
    full = with_run_defaults(config)
    content = full.model_dump(mode="json")
    content["training"].pop("threads", None)
    content["output"].pop("overwrite")
    for name in (*SETTLED, "training.ema"):  # an average follows from the optimizer
        if not is_given(full, name):
            remove_value(content, name)
    return content


def _key(name: str, config: RunConfig) -> Key:
    if name in OF_METHOD:
        return name, config.method.name
    return (name, str(config.data.train_frames)) if name == EPOCHS else (name,)


def _text(value: Any) -> str:
    if value is None:
        return "chosen by the labels"
    return value if isinstance(value, str) else f"{value:g}"
