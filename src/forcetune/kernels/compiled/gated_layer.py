"""A whole equivariant linear layer and its gate with constant weights, by one call of compiled loops for each pass."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from forcetune.kernels.compiled import threads
from forcetune.kernels.compiled.gate import GateShape, addresses_of, layout_for, scratch_memory
from forcetune.kernels.compiled.gate_tables import PANEL, Slot, padded

NO_WEIGHTS = (0,) * 12
"""In the place of the weights of a gate and the gradients by them."""


class FixedLayer:
    """An equivariant linear layer and its gate with constant weights, for energies and forces.

    Args:
        shape: of the gate.
        weights: of the gate, as for :func:`value`.
        matrices: (fan in, fan out) of each product, normalised.
        blocks: for each product the input it reads, the output it writes, and its components; each output has one.
        targets: outputs that the gate changes, in its order.
        driver: input whose scalars drive the gate.
    """

    def __init__(
        self,
        shape: GateShape,
        weights: Sequence[Tensor],
        matrices: Sequence[Tensor],
        blocks: Sequence[tuple[int, int, int]],
        targets: Sequence[int],
        driver: int,
    ) -> None:
        like = weights[0]
        self.layout = layout = layout_for(shape.flat, like.dtype)
        self.blocks, self.driver = blocks, driver
        wide = PANEL * layout.lanes
        self.widths = [0] * len(blocks)
        self.dims = [0] * len(blocks)
        for (_, target_index, dim), matrix in zip(blocks, matrices, strict=True):
            self.widths[target_index], self.dims[target_index] = matrix.shape[1], dim
        self.read = {driver, *(source for source, _, _ in blocks)}
        self.changed = [(target, is_gain) for target, is_gain in zip(targets, layout.gains, strict=True)]
        self.gains = [target for target, is_gain in self.changed if is_gain]
        self.plain_sizes = [self.dims[target] * self.widths[target] for target in self.gains]
        self.work = layout.work + sum(
            dim * matrix.numel() for (_, _, dim), matrix in zip(blocks, matrices, strict=True)
        )
        constants = [*layout.constant_matrices(weights)]
        adds = {driver}
        rows: list[int] = []
        for (source, _, dim), matrix in zip(blocks, matrices, strict=True):
            pair = [_in_panels(matrix, wide), _in_panels(matrix.t(), wide)]
            constants += pair
            rows += (dim, *matrix.shape, *(one.data_ptr() for one in pair), int(source in adds))
            adds.add(source)
        widest = max(max(matrix.shape) for matrix in matrices)
        zeros = like.new_zeros(padded(max(widest, self.layout.kept_width, shape.n_in), wide))
        self._held = [*constants, zeros]
        numbers = [len(blocks), *(tensor.data_ptr() for tensor in constants[:6]), *rows]
        self._table = (ctypes.c_int64 * len(numbers))(*numbers)
        self._tail = (ctypes.addressof(self._table), zeros.data_ptr())
        n, m = layout.n_blocks, len(blocks)
        self._packs = [struct.Struct(f"{Slot.BLOCKS + kinds * n + 2 * m}q").pack for kinds in (2, 3)]

    def value(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Outputs, and what :meth:`pull` wants.

        Args:
            inputs: (atoms, dim, channels) of each, contiguous.
        """
        layout, like = self.layout, inputs[0]
        n_atoms, size = like.shape[0], layout.size
        outputs = [like.new_empty(n_atoms, *shape) for shape in zip(self.dims, self.widths, strict=True)]
        kept = like.new_empty(n_atoms * (layout.kept_width + sum(self.plain_sizes)))
        out = [output.data_ptr() for output in outputs]
        before = self._plain(out, kept, n_atoms)
        blocks = [
            *(before[target] for target, _ in self.changed),
            *(out[target] for target, _ in self.changed),
            *(inputs[source].data_ptr() for source, _, _ in self.blocks),
            *(before[target] for _, target, _ in self.blocks),
        ]
        p = kept.data_ptr()
        numbers = (inputs[self.driver].data_ptr(), p, p + n_atoms * layout.rank_padded * size)
        self._run(layout.layer_value, self._packs[0], (*numbers, *NO_WEIGHTS, 0, 0), blocks, n_atoms, 0)
        return tuple(outputs), kept

    def pull(self, inputs: Sequence[Tensor], grads: Sequence[Tensor], kept: Tensor) -> list[Tensor | None]:
        """Gradients by the inputs; None by those that nothing depends on.

        Args:
            inputs: of :meth:`value`.
            grads: by the outputs, contiguous.
            kept: from there.
        """
        layout = self.layout
        n_atoms, size = inputs[0].shape[0], layout.size
        by_inputs = [torch.empty_like(x) if index in self.read else None for index, x in enumerate(inputs)]
        by_out = [grad.data_ptr() for grad in grads]
        plain = self._plain(by_out, kept, n_atoms)
        by_plain = list(by_out)
        extra = n_atoms * sum(self.plain_sizes) * size
        place = scratch_memory(layout.scratch * threads.thread_count(n_atoms * self.work) + extra)
        for output, width in zip(self.gains, self.plain_sizes, strict=True):
            by_plain[output] = place
            place += n_atoms * width * size
        by_in = addresses_of(by_inputs)
        blocks = [
            *(plain[target] for target, _ in self.changed),
            *(by_out[target] for target, _ in self.changed),
            *(by_plain[target] for target, _ in self.changed),
            *(by_plain[target] for _, target, _ in self.blocks),
            *(by_in[source] for source, _, _ in self.blocks),
        ]
        p = kept.data_ptr()
        numbers = (inputs[self.driver].data_ptr(), p, p + n_atoms * layout.rank_padded * size)
        rest = (*numbers, *NO_WEIGHTS, by_in[self.driver], 0)
        self._run(layout.layer_pull, self._packs[1], rest, blocks, n_atoms, extra)
        return by_inputs

    def _plain(self, addresses: list[int], kept: Tensor, n_atoms: int) -> list[int]:
        """Addresses of outputs, but where a gain changes them of what was there before."""
        found = list(addresses)
        size = self.layout.size
        place = kept.data_ptr() + n_atoms * self.layout.kept_width * size
        for output, width in zip(self.gains, self.plain_sizes, strict=True):
            found[output] = place
            place += n_atoms * width * size
        return found

    def _run(
        self, function: Any, pack: Any, numbers: tuple[int, ...], blocks: list[int], n_atoms: int, used: int
    ) -> None:
        """Call a function; ``used`` bytes of scratch memory are taken already."""
        layout = self.layout
        count = threads.thread_count(n_atoms * self.work)
        scratch = scratch_memory(used + layout.scratch * count) + used
        calls = []
        for number in range(count):
            table = pack(*layout.head, scratch + number * layout.scratch, *numbers, *self._tail, *blocks)
            calls.append((function, table, n_atoms * number // count, n_atoms * (number + 1) // count))
        threads.run(calls)


def _in_panels(matrix: Tensor, width: int) -> Tensor:
    """Columns in panels of this width, one after another, the last filled up with zeros."""
    rows, columns = matrix.shape
    whole = torch.nn.functional.pad(matrix, (0, padded(columns, width) - columns))
    return whole.view(rows, -1, width).transpose(0, 1).contiguous()
