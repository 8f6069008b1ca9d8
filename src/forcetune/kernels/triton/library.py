"""Triton: whether it is there, and functions that it makes of generated text; the kernels alone import it otherwise.

With ``TRITON_INTERPRET=1`` in the environment before Triton is imported, its interpreter computes on a CPU, slowly,
which is how the kernels are tested.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import linecache
from typing import Any

SMALLEST_VERSION = (3, 3)
"""That of PyTorch 2.7."""


@functools.cache
def triton_missing_reason(device_type: str) -> str | None:
    """Why Triton's kernels cannot compute on a kind of device, or None."""
    if device_type not in ("cuda", "meta") and not interprets():
        return f"Triton's kernels are for CUDA devices, not for {device_type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'forcetune[triton]')"
    version = str(getattr(importlib.import_module("triton"), "__version__", "0"))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < SMALLEST_VERSION:
        return f"Triton {version} is too old (pip install -U triton)"
    return None


@functools.cache
def interprets() -> bool:
    """Whether Triton's interpreter takes the place of a GPU."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        return bool(importlib.import_module("triton").knobs.runtime.interpret)
    except (ImportError, AttributeError):  # a version without this setting
        return False


def kernel_from(name: str, text: str) -> Any:
    """The kernel of this name that a text defines with ``triton`` and ``tl`` at hand.

    Triton reads the source of a function again, so that it stays in Python's cache of source lines.
    """
    triton, language = importlib.import_module("triton"), importlib.import_module("triton.language")
    file = f"<forcetune {name} {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"triton": triton, "tl": language, "__name__": __name__}
    exec(compile(text, file, "exec"), namespace)
    return namespace[name]
