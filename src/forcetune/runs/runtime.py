"""What a run changes around itself while it lasts: threads, and who hears its warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import torch

from forcetune.errors import ForcetuneWarning


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Within this context our warnings are shown as ever and also gathered for the report."""
    messages: list[str] = []
    show: Callable[..., None] = warnings.showwarning

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, ForcetuneWarning):
            messages.append(str(message))
        show(message, category, filename, lineno, file, line)

    warnings.showwarning = note
    try:
        yield messages
    finally:
        warnings.showwarning = show


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Within this context PyTorch uses this many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
