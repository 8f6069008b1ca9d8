"""cuequivariance's segmented polynomials, built when they are first evaluated; the only file that imports the library.

On a CUDA device the library's kernels compute (``cuequivariance-ops-torch``), elsewhere its own fallback of PyTorch's
operations, which is slow and serves comparisons.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forcetune.errors import InputError

SMALLEST_VERSION = (0, 6)
"""Since then methods are chosen by name."""


@functools.cache
def cuequivariance_missing_reason(device_type: str) -> str | None:
    """Why cuequivariance cannot compute on a kind of device, or None."""
    try:
        library = importlib.import_module("cuequivariance_torch")
        importlib.import_module("cuequivariance")
    except ImportError:
        return "cuequivariance is not installed (pip install 'forcetune[cueq]')"
    version = str(getattr(library, "__version__", "0"))
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < SMALLEST_VERSION:
        return f"cuequivariance-torch {version} is too old (pip install -U cuequivariance-torch)"
    if device_type == "cuda" and importlib.util.find_spec("cuequivariance_ops_torch") is None:
        return "its kernels for GPUs are not installed (pip install cuequivariance-ops-torch-cu12, or -cu13)"
    return None


class SegmentedPolynomial:
    """A polynomial of several tensors, each (rows, segments), whose paths subclasses list.

    Copies and pickles hold the structure only; the library's modules are built again from it.
    """

    method = "uniform_1d"
    """The library's name of the GPU kernel."""

    def __init__(self) -> None:
        self._modules: dict[torch.device, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_modules": {}}

    def build(self, cue: Any) -> Any:
        """The polynomial; ``cue`` is the module cuequivariance."""
        raise NotImplementedError

    def build_uniform(self, cue: Any) -> Any:
        """The same polynomial of the same tensors, as GPU kernels take it."""
        return self.build(cue)

    def evaluate(
        self,
        inputs: Sequence[Tensor],
        indices: Mapping[int, Tensor] | None = None,
        sum_at: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """The polynomial for all rows.

        Args:
            inputs: (rows, size) each, or other numbers of rows where an index chooses among them.
            indices: for inputs by number, (rows,) which of their rows.
            sum_at: (rows,) to which row of the result each is added, and the number of these; by default each row has
                its own.

        Returns:
            (rows of the result, size). Differentiable any number of times.

        Raises:
            InputError: the library cannot compute on this device.
        """
        module = self._module(inputs[0].device)
        options: dict[str, Any] = {}
        if sum_at is not None:
            # the library reads the shape of this tensor and nothing of what is in it
            shape = inputs[0].new_empty(1, 1).expand(sum_at[1], 1)
            options = {"output_indices": {0: sum_at[0]}, "output_shapes": {0: shape}}
        (result,) = module(list(inputs), input_indices=dict(indices or {}), **options)
        return result

    def _module(self, device: torch.device) -> Any:
        module = self._modules.get(device)
        if module is None:
            if (reason := cuequivariance_missing_reason(device.type)) is not None:
                raise InputError(f"model.kernels=cuequivariance: {reason}; or use model.kernels=auto.")
            cue, library = (importlib.import_module(name) for name in ("cuequivariance", "cuequivariance_torch"))
            on_gpu = device.type == "cuda"
            polynomial = self.build_uniform(cue) if on_gpu else self.build(cue)
            method = self.method if on_gpu else "naive"
            module = library.SegmentedPolynomial(polynomial, method=method).to(device)
            self._modules[device] = module
        return module


def uniform(polynomial: Any, channels: Sequence[int]) -> Any:
    """A polynomial with one coefficient a path, and channels in pieces of one length, which GPU kernels want.

    Args:
        polynomial: of cuequivariance, whose mode ``u`` are channels.
        channels: all numbers of them that occur.
    """
    flat = polynomial.flatten_coefficient_modes()
    extent = math.gcd(*channels)
    return flat if set(channels) == {extent} else flat.split_mode("u", extent)
