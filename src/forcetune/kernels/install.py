"""Kernels for whichever library a backbone is of."""

from __future__ import annotations

from importlib import import_module

from forcetune.backbones.protocol import Backbone

_HOMES = {"mace": "forcetune.kernels.mace"}


def accelerate(backbone: Backbone) -> None:
    """Compute by the kernels from now on, where there are some for the backbone's library.

    Weights, names, adapters and hooks stay as they are; see :func:`decelerate` for the way back.
    """
    if backbone.library in _HOMES:
        import_module(_HOMES[backbone.library]).install(backbone)


def decelerate(backbone: Backbone) -> None:
    """Compute by the library's own layers again."""
    if backbone.library in _HOMES:
        import_module(_HOMES[backbone.library]).remove(backbone)
