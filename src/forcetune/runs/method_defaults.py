"""Defaults that a method brings to a run: its optimizer, and the learning rate that goes with it."""

from __future__ import annotations

from collections.abc import Mapping

from forcetune.adapters.method import Method
from forcetune.adapters.methods import build_method
from forcetune.config import RunConfig


def with_run_defaults(config: RunConfig) -> RunConfig:
    """With what the method and a magnetic layer bring where nothing was given.

    Raises:
        InputError: an option that was given does not go with the method, or with its optimizer.
    """
    method = build_method(config.method)
    return config.with_method_defaults(choose_rate(config, method), config.choose_optimizer(method.optimizer))


def choose_rate(config: RunConfig, method: Method, of_base: Mapping[str, float] | None = None) -> float:
    """The learning rate of a run that names none.

    Args:
        config: of the run.
        method: that it asks for.
        of_base: rates by name of method that a foundation model wants.
    """
    return method.default_rate(config.choose_optimizer(method.optimizer), of_base)
