"""Where the numbers of a gate on blocks lie, and calls of its compiled functions, on a CPU."""

from __future__ import annotations

import ctypes
import functools
import itertools
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forcetune.kernels.compiled import assembly, gate_code, gate_loops, gate_tables, routine, threads
from forcetune.kernels.compiled.gate_tables import PANEL, Form, Slot, padded, scratch_size
from forcetune.kernels.compiled.machine import compiled, source_hash, target
from forcetune.kernels.gain import LARGEST_EXPONENT

_GAINS = ("exp", "linear")


@dataclass(frozen=True, slots=True)
class GateShape:
    """What a gate does to blocks.

    Attributes:
        activation: whether a SiLU follows W↓.
        gain: φ, ``exp`` or ``linear``.
        rank: of the bottleneck.
        n_in: even scalars that drive it.
        blocks: for each block that is changed whether by a gain, its components and its channels. Blocks with a shift
            have one component. Shifts and gains of the weights lie in the order of their blocks.
    """

    activation: bool
    gain: str
    rank: int
    n_in: int
    blocks: tuple[tuple[bool, int, int], ...]

    @property
    def flat(self) -> tuple[int, ...]:
        """As the operations take it."""
        head = (int(self.activation), _GAINS.index(self.gain), self.rank, self.n_in)
        return head + tuple(int(number) for block in self.blocks for number in block)


class GateLayout:
    """Where the numbers of a gate lie, for one precision, and the functions for it."""

    def __init__(self, flat: tuple[int, ...], dtype: torch.dtype) -> None:
        activation, gain, self.rank, self.n_in, *rest = flat
        own = target(str(dtype).removeprefix("torch."))
        wide = PANEL * own.lanes
        column, first = 0, [0, 0]
        entries: list[int] = []
        self.gains: list[bool] = []
        for is_gain, dim, channels in zip(*(rest[start::3] for start in range(3)), strict=True):
            entries += (is_gain, dim, channels, column, first[is_gain])
            self.gains.append(bool(is_gain))
            column += padded(channels, own.lanes)
            first[is_gain] += channels
        self._entries = (ctypes.c_int64 * len(entries))(*entries)
        self.n_blocks, self.has_shifts = len(self.gains), not all(self.gains)
        self.rank_padded, self.columns_padded = padded(self.rank, wide), padded(column, wide)
        self.lanes, self.n_in_padded = own.lanes, padded(self.n_in, wide)
        self.kept_width = self.rank_padded + self.columns_padded
        self.head = (
            *(self.n_blocks, self.n_in, self.rank, column, self.n_in_padded),
            *(self.rank_padded, self.columns_padded, ctypes.addressof(self._entries)),
        )
        self.size = dtype.itemsize
        self.scratch = scratch_size(self.n_in, self.rank, column, own.lanes) * self.size
        self.work = self.n_in * self.rank + self.rank * column
        form = Form(bool(activation), _GAINS[gain], LARGEST_EXPONENT)
        self.by_result = form.by_result
        sources = source_hash(
            *(str(module.__file__) for module in (assembly, routine, gate_tables, gate_loops, gate_code))
        )
        machine = compiled(repr((sources, own, form.name)), lambda: gate_code.module_text(form, own))
        names = ("value", "pull", "moved", "layer_value", "layer_pull")
        functions = (threads.function(machine.address(name)) for name in names)
        self.value, self.pull, self.moved, self.layer_value, self.layer_pull = functions
        self.weight_sizes = [self.rank * self.n_in, self.rank]
        for count in first:
            self.weight_sizes += [count * self.rank, count] if count else []
        self.weight_total = sum(self.weight_sizes)
        self._weight_bytes = [size * self.size for size in self.weight_sizes]
        self._weight_places = list(itertools.accumulate([0, *self._weight_bytes[:-1]]))
        self._packs = [struct.Struct(f"{Slot.BLOCKS + kinds * self.n_blocks}q").pack for kinds in range(6)]

    def constant_matrices(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """D, U, Dᵀ, Uᵀ and both biases, padded with zeros."""
        like = weights[0]
        down = like.new_zeros(self.n_in, self.rank_padded)
        down[:, : self.rank] = weights[0].t()
        down_back = like.new_zeros(self.rank, self.n_in_padded)
        down_back[:, : self.n_in] = weights[0]
        down_bias = like.new_zeros(self.rank_padded)
        down_bias[: self.rank] = weights[1]
        up_back = like.new_zeros(self.columns_padded, self.rank_padded)
        up_bias = like.new_zeros(self.columns_padded)
        rows = list(self._entries)
        for is_gain, _, channels, place, first in zip(*(rows[start::5] for start in range(5)), strict=True):
            index = 4 if is_gain and self.has_shifts else 2
            up_back[place : place + channels, : self.rank] = weights[index][first : first + channels]
            up_bias[place : place + channels] = weights[index + 1][first : first + channels]
        up = up_back[:, : self.rank].t().contiguous()
        return [down, up, down_back, up_back, down_bias, up_bias]

    def six(self, addresses: list[int]) -> list[int]:
        """Addresses of weights, with 0 for shifts or gains that there are not."""
        if len(addresses) == 6:
            return addresses
        return [*addresses, 0, 0] if self.has_shifts else [*addresses[:2], 0, 0, *addresses[2:]]

    def run(
        self,
        function: Any,
        h: Tensor,
        weights: Sequence[Tensor],
        kept: Tensor,
        blocks: list[int],
        *,
        passes: int,
        by_weights: bool = False,
        to_h: Tensor | None = None,
        moved_h: Tensor | None = None,
    ) -> list[Tensor]:
        """Call a function.

        Args:
            function: of this layout.
            h, weights: contiguous.
            kept: p and q.
            blocks: addresses of the blocks, in the order of :class:`~gate_tables.Blocks`.
            passes: how many times the work of a plain value it is.
            by_weights: whether gradients by weights are wanted.
            to_h, moved_h: gradient by h and direction of h, for functions that take them.

        Returns:
            Gradients by the weights where they are wanted.
        """
        n_atoms = h.shape[0]
        count = threads.thread_count(n_atoms * self.work * passes)
        scratch = scratch_memory(self.scratch * count)
        gradients = [torch.empty_like(weight) for weight in weights] if by_weights else []
        # other threads than the first have sums of their own
        others = h.new_zeros(count - 1, self.weight_total) if by_weights and count > 1 else None
        p = kept.data_ptr()
        numbers = (h.data_ptr(), p, p + n_atoms * self.rank_padded * self.size)
        addresses = self.six([tensor.data_ptr() for tensor in weights])
        driver = (0 if to_h is None else to_h.data_ptr(), 0 if moved_h is None else moved_h.data_ptr())
        pack = self._packs[len(blocks) // self.n_blocks]
        calls = []
        for number in range(count):
            to_weights: Sequence[int] = _NONE
            if by_weights:
                own = self._zeroed(gradients) if number == 0 else self._row(others, number - 1)
                to_weights = self.six(own)
            place = scratch + number * self.scratch
            table = pack(*self.head, place, *numbers, *addresses, *to_weights, *driver, 0, 0, *blocks)
            calls.append((function, table, n_atoms * number // count, n_atoms * (number + 1) // count))
        threads.run(calls)
        if others is not None:
            for gradient, piece in zip(gradients, others.sum(0).split(self.weight_sizes), strict=True):
                gradient += piece.view(gradient.shape)
        return gradients

    def _zeroed(self, gradients: Sequence[Tensor]) -> list[int]:
        """Their addresses."""
        addresses = [gradient.data_ptr() for gradient in gradients]
        for address, size in zip(addresses, self._weight_bytes, strict=True):
            ctypes.memset(address, 0, size)
        return addresses

    def _row(self, sums: Tensor | None, number: int) -> list[int]:
        assert sums is not None
        start = sums.data_ptr() + number * self.weight_total * self.size
        return [start + place for place in self._weight_places]


_NONE = (0,) * 6


class _Memory(threading.local):
    """Scratch memory of a thread that calls functions."""

    def __init__(self) -> None:
        self.buffer = (ctypes.c_byte * 0)()
        self.address = 0


_MEMORY = _Memory()


def scratch_memory(size: int) -> int:
    """Address of so many bytes, until the next call of this thread."""
    if len(_MEMORY.buffer) < size:
        _MEMORY.buffer = (ctypes.c_byte * size)()
        _MEMORY.address = ctypes.addressof(_MEMORY.buffer)
    return _MEMORY.address


@functools.lru_cache(maxsize=256)
def layout_for(flat: tuple[int, ...], dtype: torch.dtype) -> GateLayout:
    return GateLayout(flat, dtype)


def list_addresses(*kinds: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for kind in kinds for tensor in kind]
