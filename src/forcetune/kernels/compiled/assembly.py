"""Writes functions in LLVM's intermediate language, with vectors over the channels.

Values are names in that language. What is unrolled is unrolled by the Python that writes it; loops carry their values
in registers, so that no pass of the compiler has to find that out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

REALS = {"float64": "double", "float32": "float"}
LINE = 64
"""Bytes that a cache reads at once."""

_INTRINSIC_SUFFIX = {"double": "f64", "float": "f32"}


@dataclass(frozen=True, slots=True)
class Target:
    """What a kernel is written for.

    Attributes:
        real: ``double`` or ``float``.
        lanes: numbers in a vector register; a power of 2.
        registers: vector registers that there are.
    """

    real: str
    lanes: int
    registers: int

    def dividing(self, channels: int) -> Target:
        """With the widest vectors that channels are a multiple of."""
        lanes = self.lanes
        while channels % lanes:
            lanes //= 2
        return Target(self.real, lanes, self.registers)


class Writer:
    """Writes one function ``void name(ptr table, i64 first, i64 last)``."""

    def __init__(self, name: str, target: Target) -> None:
        self.name, self.target = name, target
        self.vector = f"<{target.lanes} x {target.real}>"
        self._lines: list[str] = []
        self._names = 0
        self._block = "entry"

    # ---- plain values ----------------------------------------------------------------------------------------------

    def value(self, text: str) -> str:
        """The name of a new value."""
        self._names += 1
        name = f"%v{self._names}"
        self._lines.append(f"  {name} = {text}")
        return name

    def plus(self, one: str | int, other: str | int) -> str:
        """Sum of integers."""
        return self.value(f"add i64 {one}, {other}")

    def times(self, one: str | int, other: str | int) -> str:
        """Product of integers."""
        return self.value(f"mul i64 {one}, {other}")

    def argument(self, index: int) -> str:
        """An integer of the table."""
        return self.integer("%table", index)

    def address(self, index: int) -> str:
        """A pointer of the table."""
        return self.value(f"inttoptr i64 {self.argument(index)} to ptr")

    def integer(self, pointer: str, index: str | int) -> str:
        """pointer[index] of integers."""
        place = self.value(f"getelementptr i64, ptr {pointer}, i64 {index}")
        return self.value(f"load i64, ptr {place}, align 8")

    def offset(self, pointer: str, index: str | int) -> str:
        """Address of an element of numbers."""
        if index == 0:
            return pointer
        return self.value(f"getelementptr {self.target.real}, ptr {pointer}, i64 {index}")

    def scratch(self, numbers: int) -> str:
        """Address of memory of this call for so many numbers; to be asked for before any loop."""
        return self.value(f"alloca [{numbers} x {self.target.real}], align 64")

    def prefetch(self, pointer: str, index: str | int, numbers: int, *, write: bool = False) -> None:
        """Bring so many numbers into the cache, to read or to write; what is no memory of this program does no harm."""
        size = 8 if self.target.real == "double" else 4
        for start in range(0, numbers + LINE // size - 1, LINE // size):
            place = self.offset(self.offset(pointer, index), min(start, numbers - 1))
            self._lines.append(f"  call void @llvm.prefetch.p0(ptr {place}, i32 {int(write)}, i32 3, i32 1)")

    def least(self, one: str, other: str) -> str:
        """The smaller of two integers."""
        return self.value(f"call i64 @llvm.smin.i64(i64 {one}, i64 {other})")

    # ---- vectors ---------------------------------------------------------------------------------------------------

    def load(self, pointer: str, index: str | int = 0) -> str:
        size = 8 if self.target.real == "double" else 4
        return self.value(f"load {self.vector}, ptr {self.offset(pointer, index)}, align {size}")

    def store(self, value: str, pointer: str, index: str | int = 0) -> None:
        size = 8 if self.target.real == "double" else 4
        self._lines.append(f"  store {self.vector} {value}, ptr {self.offset(pointer, index)}, align {size}")

    def store_number(self, value: str, pointer: str, index: str | int = 0) -> None:
        size = 8 if self.target.real == "double" else 4
        self._lines.append(f"  store {self.target.real} {value}, ptr {self.offset(pointer, index)}, align {size}")

    def spread(self, number: str) -> str:
        """A number in every lane."""
        one = self.value(f"insertelement {self.vector} poison, {self.target.real} {number}, i64 0")
        lanes = self.target.lanes
        return self.value(f"shufflevector {self.vector} {one}, {self.vector} poison, <{lanes} x i32> zeroinitializer")

    def load_spread(self, pointer: str, index: str | int = 0) -> str:
        """One number of memory in every lane."""
        size = 8 if self.target.real == "double" else 4
        number = self.value(f"load {self.target.real}, ptr {self.offset(pointer, index)}, align {size}")
        return self.spread(number)

    def number_from(self, integer: str) -> str:
        """An integer as a number."""
        return self.value(f"sitofp i64 {integer} to {self.target.real}")

    def multiply(self, one: str, other: str) -> str:
        return self.value(f"fmul contract {self.vector} {one}, {other}")

    def add(self, one: str, other: str) -> str:
        return self.value(f"fadd contract {self.vector} {one}, {other}")

    def multiply_add(self, one: str, other: str, third: str | None) -> str:
        """one · other + third; without a third the product."""
        if third is None:
            return self.multiply(one, other)
        kind = f"v{self.target.lanes}{_INTRINSIC_SUFFIX[self.target.real]}"
        v = self.vector
        return self.value(f"call contract {v} @llvm.fmuladd.{kind}({v} {one}, {v} {other}, {v} {third})")

    @property
    def zero(self) -> str:
        return "zeroinitializer"

    def store_sums(self, vectors: Sequence[str], pointer: str) -> None:
        """Store the sum over the lanes of each vector, one after another."""
        lanes = self.target.lanes
        for start in range(0, len(vectors), lanes):
            group = [*vectors[start : start + lanes]]
            count = len(group)
            group += [self.zero] * (lanes - count)
            while len(group) > 1:
                # neighbours are added, sums of the first vector before those of the second: the order stays
                group = [self._halved(group[index], group[index + 1]) for index in range(0, len(group), 2)]
            if count == lanes:
                self.store(group[0], pointer, start)
                continue
            for index in range(count):
                number = self.value(f"extractelement {self.vector} {group[0]}, i64 {index}")
                self.store_number(number, pointer, start + index)

    def _halved(self, one: str, other: str) -> str:
        if one == other == self.zero:
            return self.zero
        lanes, v = self.target.lanes, self.vector

        def part(first: int) -> str:
            mask = ", ".join(f"i32 {index}" for index in range(first, 2 * lanes, 2))
            return self.value(f"shufflevector {v} {one}, {v} {other}, <{lanes} x i32> <{mask}>")

        return self.add(part(0), part(1))

    # ---- control ---------------------------------------------------------------------------------------------------

    def loop(
        self,
        start: str | int,
        stop: str | int,
        step: int,
        carried: Sequence[str],
        body: Callable[[str, list[str]], Sequence[str]],
    ) -> list[str]:
        """A loop over integers.

        Args:
            start, stop, step: of its index.
            carried: vectors before the first turn.
            body: writes a turn, from the index and the vectors to the vectors of the next turn.

        Returns:
            The vectors behind the last turn.
        """
        self._names += 1
        label = f"b{self._names}"
        before = self._block
        self._begin(f"{label}.head", jump=True)
        place = len(self._lines)
        index = f"%{label}.i"
        values = [f"%{label}.c{number}" for number in range(len(carried))]
        self._lines += [""] * (1 + len(carried))
        inside = self.value(f"icmp slt i64 {index}, {stop}")
        self._lines.append(f"  br i1 {inside}, label %{label}.body, label %{label}.end")
        self._begin(f"{label}.body")
        results = body(index, list(values))
        following = self.plus(index, step)
        last = self._block
        self._lines.append(f"  br label %{label}.head")
        self._lines[place] = f"  {index} = phi i64 [ {start}, %{before} ], [ {following}, %{last} ]"
        for number, (value, first, result) in enumerate(zip(values, carried, results, strict=True)):
            self._lines[place + 1 + number] = (
                f"  {value} = phi {self.vector} [ {first}, %{before} ], [ {result}, %{last} ]"
            )
        self._begin(f"{label}.end")
        return values

    def _begin(self, label: str, *, jump: bool = False) -> None:
        if jump:
            self._lines.append(f"  br label %{label}")
        self._lines.append(f"{label}:")
        self._block = label

    def text(self) -> str:
        """The function."""
        head = f"define void @{self.name}(ptr noalias %table, i64 %first, i64 %last) nounwind {{\nentry:\n"
        return head + "\n".join(self._lines) + "\n  ret void\n}\n"


def module_text(functions: Sequence[Writer]) -> str:
    """A module of functions, with what they call declared."""
    targets = {(w.target.real, w.target.lanes) for w in functions}
    declared = ["declare void @llvm.prefetch.p0(ptr, i32, i32, i32)\ndeclare i64 @llvm.smin.i64(i64, i64)\n"]
    for real, lanes in sorted(targets):
        v = f"<{lanes} x {real}>"
        declared.append(f"declare {v} @llvm.fmuladd.v{lanes}{_INTRINSIC_SUFFIX[real]}({v}, {v}, {v})\n")
    return "".join([*declared, *(writer.text() for writer in functions)])
