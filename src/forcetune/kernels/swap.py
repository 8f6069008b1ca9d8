"""Another forward for one module in place, without a trace in its attributes, names, hooks or files."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

from torch import nn

_ORIGINAL = "_forcetune_original_class"
_MAKE: Any = vars(copyreg)["_reconstructor"]


class UnknownLayerError(ValueError):
    """The kernels leave a module to the library; says why."""


def swap_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give ``module`` a forward of its own.

    The module gets a class made for it alone, with the name of its class; copies and pickles of it are of the
    original class, and so without the new forward.

    Args:
        module: not swapped yet.
        forward: called with the module and its arguments.
    """
    original = type(module)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # made by copyreg's own constructor: a file must not ask for anything of ours
        _, _, *state = object.__reduce_ex__(self, protocol)
        return (_MAKE, (original, object, None), *state)

    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce,
        "forward": forward,
        _ORIGINAL: original,
    }
    module.__class__ = type(original.__name__, (original,), members)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before :func:`swap_forward`."""
    return getattr(type(module), _ORIGINAL, type(module))


def is_swapped(module: nn.Module) -> bool:
    return _ORIGINAL in vars(type(module))


def restore_forward(module: nn.Module) -> None:
    """Undo :func:`swap_forward`."""
    module.__class__ = original_class(module)
