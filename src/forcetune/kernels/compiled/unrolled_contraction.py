"""The symmetric contraction for polynomials that are known: no tables and no loops over terms.

The same sums as those of :mod:`forcetune.kernels.compiled.contraction_code`, by the same code, which here knows every
entry of its tables. Monomials and partial sums are values that the compiler keeps in registers or spills, one atom at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forcetune.kernels.compiled.assembly import Target, Writer
from forcetune.kernels.compiled.contraction_code import Form, Function, Index, Slot


@dataclass(frozen=True, slots=True, eq=False)
class Lists:
    """The tables of a model's polynomials, as the slots of the same names; there is one object for each."""

    components: int
    outputs: int
    factors: tuple[int, ...]
    first_row: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    first_use: tuple[int, ...]
    uses: tuple[int, ...]

    def entries(self, slot: Slot) -> tuple[int, ...]:
        """The table of a slot."""
        return getattr(self, slot.name.lower())


def write(form: Form, target: Target, lists: Lists) -> Writer:
    """The function of certain polynomials; its range is over tiles of species, species first."""
    writer = Writer(form.name, target)
    _Unrolled(writer, form, lists).write()
    return writer


class _Unrolled(Function):
    atoms = 1

    def __init__(self, writer: Writer, form: Form, lists: Lists) -> None:
        super().__init__(writer, form)
        self.lists = lists
        self.values: dict[tuple[Slot, int], list[str]] = {}

    def sizes(self) -> tuple[Index, Index, Index]:
        return self.lists.components, len(self.lists.factors) // 2, self.lists.outputs

    def entry(self, slot: Slot, index: Index) -> int:
        return self.lists.entries(slot)[_known(index)]

    def times(self, one: Index, other: int) -> int:
        return _known(one) * other

    def plus(self, one: Index, other: int) -> int:
        return _known(one) + other

    def loop(
        self, first: Index, last: Index, carried: list[str], body: Callable[[Index, list[str]], list[str]]
    ) -> list[str]:
        for index in range(_known(first), _known(last)):
            carried = body(index, carried)
        return carried

    def read(self, slot: Slot, item: Index) -> list[str]:
        return self.values[slot, _known(item)]

    def write_to(self, slot: Slot, item: Index, values: Sequence[str]) -> None:
        self.values[slot, _known(item)] = [*values]


def _known(index: Index) -> int:
    assert isinstance(index, int)
    return index
