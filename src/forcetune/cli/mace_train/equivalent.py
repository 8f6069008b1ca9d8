"""The ``forcetune fit`` line and the YAML file that do the same."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from forcetune.utils.option_defaults import get_value, leaf_names

_FLAGS = {
    "data.valid": "--valid",
    "data.test": "--test",
    "data.energy_key": "--energy-key",
    "data.forces_key": "--forces-key",
    "data.stress_key": "--stress-key",
    "model.model": "--model",
    "model.head": "--head",
    "model.device": "--device",
    "model.dtype": "--dtype",
    "method.name": "--method",
    "method.rank": "--rank",
    "references.mode": "--references",
    "training.epochs": "--epochs",
    "training.batch_size": "--batch-size",
    "training.learning_rate": "--learning-rate",
    "training.seed": "--seed",
    "output.run": "--out",
}
"""Options with a flag of their own; the others are written with ``--set``."""
_SWITCHES = {"output.overwrite": "--overwrite", "model.trust": "--trust"}


def fit_line(options: Mapping[str, Any]) -> str:
    """A command line of ``forcetune fit`` for nested options, quoted for a shell."""
    words = ["forcetune", "fit", *options["data"]["train"]]
    for name in leaf_names(options):
        value = get_value(options, name)
        if name == "data.train":
            continue
        if name in _SWITCHES and value is True:
            words.append(_SWITCHES[name])
        elif name in _FLAGS and value is not None:
            for part in value if isinstance(value, list) else [value]:
                words += [_FLAGS[name], str(part)]
        else:
            words += ["--set", f"{name}={_flow(value)}"]
    return shlex.join(words)


def fit_yaml(options: Mapping[str, Any]) -> str:
    """The options as a configuration for ``forcetune fit --config``."""
    return yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.removesuffix("\n").removesuffix("\n...")
