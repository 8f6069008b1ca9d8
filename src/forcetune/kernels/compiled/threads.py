"""Compiled functions on several threads; each gets a range of what there is to do."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

WORTH_A_THREAD = 400_000
"""Multiply-adds below which a further thread costs more than it takes over."""

_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
_POOL: ThreadPoolExecutor | None = None


def function(address: int) -> ctypes._FuncPointer:
    """What stands at an address; other threads go on while it runs."""
    return _PROTOTYPE(address)


def integers(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor of integers as an array; while a step is recorded PyTorch would not hand one out."""
    return np.ctypeslib.as_array((ctypes.c_int64 * tensor.numel()).from_address(tensor.data_ptr()))


def thread_count(work: float) -> int:
    """Threads worth having for so many multiply-adds, at most PyTorch's number for this thread."""
    return max(1, min(torch.get_num_threads(), int(work / WORTH_A_THREAD)))


def balanced(weights_before: np.ndarray, threads: int) -> list[int]:
    """Bounds of ranges of about equal weight.

    Args:
        weights_before: (n + 1,) weight of everything before each item, ascending.
        threads: ranges.
    """
    n = len(weights_before) - 1
    if threads == 1:
        return [0, n]
    wanted = weights_before[-1] * np.arange(1, threads) / threads
    inner = np.searchsorted(weights_before, wanted)
    return [0, *np.minimum(inner, n).tolist(), n]


def run(calls: Sequence[tuple[ctypes._FuncPointer, int | bytes, int, int]]) -> None:
    """Call functions with their table, or its address, and range, one for each thread; this thread calls the first."""
    global _POOL
    if len(calls) > 1:
        if _POOL is None:
            _POOL = ThreadPoolExecutor(max(1, (os.cpu_count() or 1)), thread_name_prefix="kernels")
        futures = [_POOL.submit(call, *arguments) for call, *arguments in calls[1:]]
    else:
        futures = []
    first, *arguments = calls[0]
    first(*arguments)
    for future in futures:
        future.result()


def _forget_pool() -> None:
    # a forked process has no threads but the one that forked
    global _POOL
    _POOL = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
