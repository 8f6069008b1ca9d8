"""Matrix products of float32 in float32: NVIDIA's TF32 keeps ten bits of each factor, too few for forces.

PyTorch has TF32 off by default, but programs and other libraries switch it on for the whole process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Within this context products of float32 matrices are not rounded to TF32; the setting before is restored."""
    matmul: Any = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", "ieee")  # since PyTorch 2.9
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer of PyTorch's two settings was used, and forbids to ask for the older
        legacy = None
    if legacy == "highest" and precision in ("ieee", "none"):
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if legacy is None:
            matmul.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(legacy)
