"""A whole equivariant linear layer and its gate with constant weights, by one call of compiled loops for each pass."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from forcetune.kernels.compiled import threads
from forcetune.kernels.compiled.gate_layout import GateShape, layout_for, list_addresses, scratch_memory
from forcetune.kernels.compiled.gate_tables import PANEL, TILE, Slot, padded

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
        places = (TILE * sum(self.plain_sizes[:index]) for index in range(len(self.gains)))
        # of the gradients by what gains multiply, for a tile, behind the memory of the gate's own loops
        self.plain_places = [
            (target, layout.scratch + place * layout.size) for target, place in zip(self.gains, places, strict=True)
        ]
        # gradients by the results serve where φ is an exponential
        self.saved_sizes = [] if layout.by_result else self.plain_sizes
        self.scratch = layout.scratch + TILE * sum(self.plain_sizes) * layout.size
        self.work = layout.work + sum(
            dim * matrix.numel() for (_, _, dim), matrix in zip(blocks, matrices, strict=True)
        )
        constants = [*layout.constant_matrices(weights)]
        adds = {driver}
        rows: list[int] = []
        for (source, target, dim), matrix in zip(blocks, matrices, strict=True):
            pair = [_in_panels(matrix, wide), _in_panels(matrix.t(), wide)]
            constants += pair
            rows += (dim, *matrix.shape, *(one.data_ptr() for one in pair))
            rows += (int(source in adds), int(target in self.gains))
            adds.add(source)
        widest = max(max(matrix.shape) for matrix in matrices)
        zeros = like.new_zeros(padded(max(widest, self.layout.kept_width, shape.n_in), wide))
        self._held = [*constants, zeros]
        numbers = [len(blocks), *(tensor.data_ptr() for tensor in constants[:6]), *rows]
        self._table = (ctypes.c_int64 * len(numbers))(*numbers)
        self._tail = (ctypes.addressof(self._table), zeros.data_ptr())
        n, m, o = layout.n_blocks, len(blocks), len(self.widths)
        changed = [target for target, _ in self.changed]
        sources, products = [source for source, _, _ in blocks], [target for _, target, _ in blocks]
        # of the outputs, what they were before gains, and the inputs
        self._value_order = itemgetter(
            *(o + target for target in changed), *changed, *(2 * o + x for x in sources), *(o + y for y in products)
        )
        # of the gradients by outputs, outputs before gains, gradients by these, and by inputs
        self._pull_order = itemgetter(
            *(o + target for target in changed),
            *(*changed, *(2 * o + target for target in changed)),
            *(*(2 * o + y for y in products), *(3 * o + x for x in sources)),
        )
        self._shapes = list(zip(self.dims, self.widths, strict=True))
        self._packs = [struct.Struct(f"{Slot.BLOCKS + kinds * n + 2 * m}q").pack for kinds in (2, 3)]

    def value(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Outputs, and what :meth:`pull` wants.

        Args:
            inputs: (atoms, dim, channels) of each, contiguous.
        """
        layout, like = self.layout, inputs[0]
        n_atoms = like.shape[0]
        outputs = [like.new_empty((n_atoms, dim, channels)) for dim, channels in self._shapes]
        kept = like.new_empty(n_atoms * (layout.kept_width + sum(self.saved_sizes)))
        out = [output.data_ptr() for output in outputs]
        blocks = self._value_order([*out, *self._plain(out, kept, n_atoms), *(x.data_ptr() for x in inputs)])
        self._run(layout.layer_value, self._packs[0], inputs, kept, 0, lambda _: blocks)
        return tuple(outputs), kept

    def pull(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grads: Sequence[Tensor], kept: Tensor
    ) -> list[Tensor | None]:
        """Gradients by the inputs; None by those that nothing depends on.

        Args:
            inputs: of :meth:`value`.
            outputs: from there.
            grads: by the outputs, contiguous.
            kept: from :meth:`value`.
        """
        by_inputs = [torch.empty_like(x) if index in self.read else None for index, x in enumerate(inputs)]
        by_out = [grad.data_ptr() for grad in grads]
        plain = self._plain([output.data_ptr() for output in outputs], kept, inputs[0].shape[0])
        by_in = list_addresses(by_inputs)

        def blocks(scratch: int) -> tuple[int, ...]:
            by_plain = list(by_out)
            for target, place in self.plain_places:
                by_plain[target] = scratch + place
            return self._pull_order([*by_out, *plain, *by_plain, *by_in])

        self._run(self.layout.layer_pull, self._packs[1], inputs, kept, by_in[self.driver], blocks)
        return by_inputs

    def _plain(self, addresses: list[int], kept: Tensor, n_atoms: int) -> list[int]:
        """Addresses of outputs, but where a gain changes them, and it is saved, of what was there before."""
        if not self.saved_sizes:
            return addresses
        plain = list(addresses)
        size = self.layout.size
        place = kept.data_ptr() + n_atoms * self.layout.kept_width * size
        for output, width in zip(self.gains, self.saved_sizes, strict=True):
            plain[output] = place
            place += n_atoms * width * size
        return plain

    def _run(
        self,
        function: Any,
        pack: Any,
        inputs: Sequence[Tensor],
        kept: Tensor,
        to_driver: int,
        blocks: Callable[[int], tuple[int, ...]],
    ) -> None:
        """Call a function.

        Args:
            function, pack: of the layout, and its table.
            inputs, kept: of :meth:`value`.
            to_driver: address of the gradient by the driver, or 0.
            blocks: addresses, from that of a thread's scratch memory.
        """
        layout = self.layout
        n_atoms = inputs[0].shape[0]
        p = kept.data_ptr()
        numbers = (inputs[self.driver].data_ptr(), p, p + n_atoms * layout.rank_padded * layout.size)
        count = threads.thread_count(n_atoms * self.work)
        scratch = scratch_memory(self.scratch * count)
        calls = []
        for number in range(count):
            place = scratch + number * self.scratch
            table = pack(*layout.head, place, *numbers, *NO_WEIGHTS, to_driver, 0, *self._tail, *blocks(place))
            calls.append((function, table, n_atoms * number // count, n_atoms * (number + 1) // count))
        threads.run(calls)


def _in_panels(matrix: Tensor, width: int) -> Tensor:
    """Columns in panels of this width, one after another, the last filled up with zeros."""
    rows, columns = matrix.shape
    whole = torch.nn.functional.pad(matrix, (0, padded(columns, width) - columns))
    return whole.view(rows, -1, width).transpose(0, 1).contiguous()
