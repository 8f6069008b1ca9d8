"""Node features as one tensor for each irrep, components before channels, that still pass for the flat vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Layout = tuple[tuple[int, int], ...]


class Features:
    """Features of shape (atoms, dim, channels) for each irrep.

    Equivariant libraries keep them as one vector per atom, channels before components. Anything that treats this
    object as that vector, such as a hook on a layer, sees it; slices of whole irreps cost no more than they hold.

    Attributes:
        blocks: one tensor (atoms, dim, channels) for each irrep.
        geometric: they depend on the positions.
        trains: they depend on trainable weights.
    """

    __slots__ = ("_flat", "blocks", "geometric", "trains")

    def __init__(self, blocks: Sequence[Tensor], *, geometric: bool, trains: bool) -> None:
        self.blocks = tuple(blocks)
        self.geometric = geometric
        self.trains = trains
        self._flat: Tensor | None = None

    @property
    def layout(self) -> Layout:
        """(dim, channels) of each irrep."""
        return tuple((block.shape[1], block.shape[2]) for block in self.blocks)

    @property
    def flat(self) -> Tensor:
        """(atoms, Σ channels · dim), channels before components."""
        if self._flat is None:
            parts = [_flattened(block) for block in self.blocks]
            self._flat = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self._flat

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.blocks[0]), sum(dim * channels for dim, channels in self.layout)))

    @property
    def ndim(self) -> int:
        """Of the flat vector; asking for it does not make one."""
        return 2

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, tuple) and len(key) == 2 and key[0] in (Ellipsis, slice(None)):
            part = self._slice(key[1])
            if part is not None:
                return part
        return self.flat[key]

    def _slice(self, wanted: Any) -> Tensor | None:
        if not isinstance(wanted, slice) or wanted.step not in (None, 1):
            return None
        begin, end, _ = wanted.indices(self.shape[1])
        start = 0
        for block in self.blocks:
            width = block.shape[1] * block.shape[2]
            first, last = begin - start, end - start
            if 0 <= first <= last <= width:
                if block.shape[1] == 1:
                    return block[:, 0, first:last]
                if (first, last) == (0, width):
                    return _flattened(block)
            start += width
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.flat, name)

    def __len__(self) -> int:
        return len(self.blocks[0])

    def __add__(self, other: Any) -> Tensor:
        return self.flat + other

    __radd__ = __add__

    def __mul__(self, other: Any) -> Tensor:
        return self.flat * other

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, Features):
                return value.flat
            return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value

        return func(*map(plain, args), **{key: plain(value) for key, value in (kwargs or {}).items()})

    def scaled(self, factor: float | Tensor) -> Features:
        """Every block times a number, or times (atoms, 1, 1)."""
        return Features([block * factor for block in self.blocks], geometric=self.geometric, trains=self.trains)

    def plus(self, other: Features) -> Features:
        """The sum of features with one layout."""
        blocks = [one + two for one, two in zip(self.blocks, other.blocks, strict=True)]
        return Features(blocks, geometric=self.geometric or other.geometric, trains=self.trains or other.trains)


def _flattened(block: Tensor) -> Tensor:
    if block.shape[1] == 1:
        return block[:, 0]
    return block.transpose(1, 2).reshape(len(block), -1)


def make_features(value: Tensor | Features, layout: Layout, *, geometric: bool = True, trains: bool = True) -> Features:
    """Features from either form; the flags are those of what is not known yet."""
    if isinstance(value, Features):
        return value
    blocks, start = [], 0
    for dim, channels in layout:
        part = value[:, start : start + dim * channels]
        start += dim * channels
        if dim == 1:
            blocks.append(part.unsqueeze(1))
        else:
            blocks.append(part.reshape(len(value), channels, dim).transpose(1, 2).contiguous())
    return Features(blocks, geometric=geometric, trains=trains)
