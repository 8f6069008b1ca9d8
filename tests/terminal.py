"""The type of the fixture that runs the command line."""

from __future__ import annotations

from collections.abc import Callable

Command = Callable[..., tuple[int, str, str]]
"""Arguments → exit code, standard output, standard error."""
