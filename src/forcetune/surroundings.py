"""What a run changes around itself while it lasts: threads, TorchScript, and who hears its warnings."""

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
    told: list[str] = []
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
            told.append(str(message))
        show(message, category, filename, lineno, file, line)

    warnings.showwarning = note
    try:
        yield told
    finally:
        warnings.showwarning = show


def never_fuse_scripts() -> None:
    """From now on TorchScript fuses nothing in this process.

    It fuses after the first calls, and a fused kernel rounds differently: a resumed run would not be equal to one that
    was left in peace. There is no way back that TorchScript takes well.
    """
    torch.jit.set_fusion_strategy([("STATIC", 0), ("DYNAMIC", 0)])


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Within this context PyTorch uses this many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
