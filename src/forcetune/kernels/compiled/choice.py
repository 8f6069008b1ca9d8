"""Which kernels compute a model: compiled loops, Triton's, cuequivariance's, or PyTorch's operations."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from forcetune.errors import InputError
from forcetune.kernels.compiled import convolution_code
from forcetune.kernels.compiled.machine import compiled, llvm
from forcetune.kernels.cueq import library as cueq
from forcetune.kernels.triton import library as triton

Kernels = Literal["auto", "compiled", "torch", "triton", "cuequivariance"]
"""``auto`` takes compiled kernels where they can be had; Triton's and cuequivariance's are there to be asked for."""

_DTYPES = (torch.float64, torch.float32)


@functools.cache
def missing_reason() -> str | None:
    """Why there are no compiled kernels on this computer, or None."""
    if llvm() is None:
        return "llvmlite is not installed, or older than 0.45 (pip install llvmlite)"
    try:
        compiled("probe", convolution_code.driver)
    except Exception as error:  # whatever LLVM has against this processor or platform
        return f"LLVM does not compile for this processor ({str(error)[:100]})"
    return None


def takes_compiled(kernels: Kernels, like: Tensor) -> bool:
    """Whether a layer with this setting computes values such as ``like`` by compiled kernels."""
    return (
        kernels in ("auto", "compiled")
        and like.device.type == "cpu"
        and like.dtype in _DTYPES
        and missing_reason() is None
    )


def takes_triton(kernels: Kernels, like: Tensor) -> bool:
    """Whether a layer with this setting computes values such as ``like`` by Triton's kernels."""
    return kernels == "triton" and like.dtype in _DTYPES and triton.triton_missing_reason(like.device.type) is None


def choose_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Set which kernels compute the layers of a model.

    Raises:
        InputError: ``compiled`` kernels, Triton's or cuequivariance's are asked for where there are none.
    """
    if kernels not in get_args(Kernels):
        raise InputError(
            f"model.kernels={kernels!r}: there are 'auto', 'compiled', 'torch', 'triton' and 'cuequivariance'."
        )
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    libraries = {"cuequivariance": cueq.cuequivariance_missing_reason, "triton": triton.triton_missing_reason}
    if kernels in libraries and (reason := libraries[kernels](device)) is not None:
        raise InputError(f"model.kernels={kernels}: {reason}; or use model.kernels=auto.")
    if kernels == "compiled":
        if device != "cpu":
            raise InputError(f"model.kernels=compiled: compiled kernels are for the CPU, not for {device}; use auto.")
        if (reason := missing_reason()) is not None:
            raise InputError(f"model.kernels=compiled: {reason}; or use model.kernels=auto.")
    for module in model.modules():
        if hasattr(module, "kernels"):
            setattr(module, "kernels", kernels)  # noqa: B010 (torch types attributes of modules as tensors)


def chosen_kernels(model: nn.Module) -> Kernels:
    """The setting of a model's layers; ``auto`` for a model without such layers."""
    return next((getattr(module, "kernels") for module in model.modules() if hasattr(module, "kernels")), "auto")  # noqa: B009


def kernels_in_use(model: nn.Module) -> Literal["compiled", "torch", "triton", "cuequivariance"]:
    """Which kernels compute a model now."""
    parameter = next(iter(model.parameters()), None)
    settings = {getattr(module, "kernels") for module in model.modules() if hasattr(module, "kernels")}  # noqa: B009
    if parameter is None or not settings:
        return "torch"
    if settings == {"cuequivariance"}:
        return "cuequivariance"
    if all(takes_triton(setting, parameter) for setting in settings):
        return "triton"
    return "compiled" if all(takes_compiled(setting, parameter) for setting in settings) else "torch"
