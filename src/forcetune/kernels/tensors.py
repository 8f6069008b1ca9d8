"""Where the layers of a network get their tensors from: a file's, each taken once, or new random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Draw = Callable[[tuple[int, ...]], Tensor]


class UnfitError(Exception):
    """A model cannot be rebuilt; says why, in words that complete "cannot be rebuilt: …"."""


class TensorSource:
    """Tensors by dotted name, below a prefix.

    Args:
        stored: parameters (as ``nn.Parameter``) and buffers; None draws new ones.
        constants: coupling coefficients that a file carries, by the name of their layer and their own.
        redraw: draw new values for parameters, and take the stored buffers.
    """

    def __init__(
        self,
        stored: Mapping[str, Tensor] | None,
        constants: Mapping[str, Tensor] | None = None,
        *,
        redraw: bool = False,
    ) -> None:
        self._stored = stored
        self._redraw = redraw
        self._constants = constants or {}
        self._taken: set[str] = set()
        self._prefix = ""

    @property
    def fresh(self) -> bool:
        """Whether all tensors are drawn."""
        return self._stored is None

    @property
    def draws(self) -> bool:
        """Whether weights are drawn."""
        return self.fresh or self._redraw

    def within(self, name: str | int) -> TensorSource:
        """The same tensors below one more name."""
        inner = TensorSource.__new__(TensorSource)
        inner._stored, inner._constants, inner._taken = self._stored, self._constants, self._taken
        inner._redraw = self._redraw
        inner._prefix = f"{self._prefix}{name}."
        return inner

    def take(
        self, name: str, shape: Sequence[int] | None, draw: Draw | Tensor | None = None, *, parameter: bool = True
    ) -> Tensor:
        """The tensor of a name.

        Args:
            name: below the prefix.
            shape: that it must have; None takes any.
            draw: makes a new one, or is one that is not random.
            parameter: whether a new one is a parameter; a stored one is what it was.

        Raises:
            UnfitError: there is none, or it has another shape.
        """
        full = f"{self._prefix}{name}"
        if self._stored is None:
            if draw is None:
                raise UnfitError(f"it has no {full}")
            value = draw if isinstance(draw, Tensor) else draw(tuple(shape or ()))
            value = value.double() if value.is_floating_point() else value
            return nn.Parameter(value) if parameter else value
        tensor = self._stored.get(full)
        if tensor is None:
            raise UnfitError(f"it has no {full}")
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise UnfitError(
                f"the shape of {full} differs from what its architecture needs: {tuple(tensor.shape)} and "
                f"{tuple(shape)}"
            )
        self._taken.add(full)
        if self._redraw and isinstance(tensor, nn.Parameter) and callable(draw):
            return nn.Parameter(draw(tuple(tensor.shape)).to(tensor.dtype))
        return tensor

    def optional(self, name: str) -> Tensor | None:
        """The stored tensor of a name, if there is one; its shape is the caller's concern."""
        tensor = None if self._stored is None else self._stored.get(f"{self._prefix}{name}")
        if tensor is not None:
            self._taken.add(f"{self._prefix}{name}")
        return tensor

    def constant(self, name: str) -> Tensor | None:
        """A coupling coefficient that the file carries, in float64."""
        tensor = self._constants.get(f"{self._prefix}{name}")
        return None if tensor is None else tensor.detach().to(device="cpu", dtype=torch.float64)

    def left_over(self) -> list[str]:
        """Names of stored tensors that have not been taken."""
        return [] if self._stored is None else sorted(set(self._stored) - self._taken)


def register(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module its own copy of a tensor, on the CPU, as parameter or buffer, whichever the tensor is."""
    value = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        module.register_buffer(name, value)
