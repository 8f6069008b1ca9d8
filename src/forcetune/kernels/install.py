"""Kernels for whichever library a backbone is of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from forcetune.backbones.protocol import PLAN, Backbone

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


def is_accelerated(backbone: Backbone) -> bool:
    """Whether the whole of the model is computed by the kernels."""
    return backbone.library in _HOMES and import_module(_HOMES[backbone.library]).is_installed(backbone)


def pairs_edges(backbone: Backbone) -> bool:
    """Whether its plans have an edge and its reverse share a pair."""
    return import_module(_HOMES[backbone.library]).is_paired(backbone.model)


@contextmanager
def with_plan(backbone: Backbone, plan: Any) -> Iterator[None]:
    """Within this context the kernels lay out batches by this plan and do not look at their integers.

    Other threads that use the same backbone go on as before.
    """
    before = PLAN.set((backbone, plan))
    try:
        yield
    finally:
        PLAN.reset(before)
