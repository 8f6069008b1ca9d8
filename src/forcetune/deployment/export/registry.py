"""All targets by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

import forcetune.deployment.export as package
from forcetune.deployment.export.target import Target
from forcetune.errors import InputError


def _collect() -> dict[str, Target]:
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [
        importlib.import_module(f"{package.__name__}.{name}") for name in names if name not in ("registry", "exporting")
    ]
    targets = [module.TARGET for module in modules if hasattr(module, "TARGET")]
    return {target.name: target for target in targets}


TARGETS: Mapping[str, Target] = _collect()
"""By name."""


def find_target(name: str) -> Target:
    """
    Raises:
        InputError: there is none of this name.
    """
    if name not in TARGETS:
        raise InputError(f"--to {name}: is no export target; choose one of {', '.join(TARGETS)}.")
    return TARGETS[name]
