"""Functions of any parameters, with masked columns, exponentials and sigmoids."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

from forcetune.kernels.compiled.assembly import Target, Writer


class Routine(Writer):
    """A function with any parameters, and with what gates want of numbers."""

    def __init__(self, name: str, target: Target, parameters: str) -> None:
        super().__init__(name, target)
        self.parameters = parameters
        bits = 64 if target.real == "double" else 32
        self.bits, self.whole = bits, f"<{target.lanes} x i{bits}>"

    def text(self) -> str:
        head = f"define void @{self.name}({self.parameters}) nounwind {{\nentry:\n"
        return head + "\n".join(self._lines) + "\n  ret void\n}\n"

    def call(self, name: str, *arguments: str | int) -> None:
        """Call a function; names of integers and pointers tell them apart by ``ptr `` before pointers."""
        given = ", ".join(a if isinstance(a, str) and a.startswith("ptr ") else f"i64 {a}" for a in arguments)
        self._lines.append(f"  call void @{name}({given})")

    def minus(self, one: str | int, other: str | int) -> str:
        return self.value(f"sub i64 {one}, {other}")

    def smaller(self, one: str | int, other: str | int) -> str:
        less = self.value(f"icmp slt i64 {one}, {other}")
        return self.value(f"select i1 {less}, i64 {one}, i64 {other}")

    def if_not_zero(self, number: str, body: Callable[[], object]) -> None:
        """Write what is done where an integer is not 0."""
        differs = self.value(f"icmp ne i64 {number}, 0")

        def once(_: str, __: list[str]) -> list[str]:
            body()
            return []

        self.loop(0, self.value(f"zext i1 {differs} to i64"), 1, [], once)

    def columns(self, count: str, step: int, body: Callable[[str, Sequence[str | None]], object]) -> None:
        """A loop over columns, ``step`` vectors at once, with masks where not all lanes of the last ones are columns.

        Args:
            count: of columns.
            step: vectors.
            body: writes a turn, from the first column and a mask for each vector (None: all lanes).
        """
        lanes, size = self.target.lanes, self.target.lanes * step
        full = self.minus(count, self.value(f"srem i64 {count}, {size}"))

        def whole(c: str, _: list[str]) -> list[str]:
            body(c, [None] * step)
            return []

        def part(c: str, _: list[str]) -> list[str]:
            left = self.value(f"trunc i64 {self.minus(count, c)} to i32")
            v32 = f"<{lanes} x i32>"
            one = self.value(f"insertelement {v32} poison, i32 {left}, i64 0")
            limit = self.value(f"shufflevector {v32} {one}, {v32} poison, <{lanes} x i32> zeroinitializer")
            masks: list[str | None] = []
            for number in range(step):
                places = ", ".join(f"i32 {number * lanes + lane}" for lane in range(lanes))
                masks.append(self.value(f"icmp slt {v32} <{places}>, {limit}"))
            body(c, masks)
            return []

        self.loop(0, full, size, [], whole)
        self.loop(full, count, size, [], part)

    def read(self, pointer: str, index: str | int, mask: str | None) -> str:
        """A vector, 0 in the lanes that a mask leaves out."""
        if mask is None:
            return self.load(pointer, index)
        lanes, size = self.target.lanes, self.bits // 8
        place = self.offset(pointer, index)
        arguments = f"ptr {place}, i32 {size}, <{lanes} x i1> {mask}, {self.vector} zeroinitializer"
        return self.value(f"call {self.vector} @llvm.masked.load.{self.kind}.p0({arguments})")

    def write(self, value: str, pointer: str, index: str | int, mask: str | None) -> None:
        if mask is None:
            self.store(value, pointer, index)
            return
        lanes, size = self.target.lanes, self.bits // 8
        place = self.offset(pointer, index)
        arguments = f"{self.vector} {value}, ptr {place}, i32 {size}, <{lanes} x i1> {mask}"
        self._lines.append(f"  call void @llvm.masked.store.{self.kind}.p0({arguments})")

    @property
    def kind(self) -> str:
        return f"v{self.target.lanes}f{self.bits}"

    def constant(self, number: float) -> str:
        """A number in all lanes."""
        exact = number if self.bits == 64 else struct.unpack("f", struct.pack("f", number))[0]
        digits = f"0x{struct.unpack('>Q', struct.pack('>d', exact))[0]:016X}"
        return "<" + ", ".join([f"{self.target.real} {digits}"] * self.target.lanes) + ">"

    def subtract(self, one: str, other: str) -> str:
        return self.value(f"fsub {self.vector} {one}, {other}")

    def least(self, one: str, bound: float) -> str:
        """The smaller of a vector and a number; what is not a number stays."""
        above = self.value(f"fcmp ogt {self.vector} {one}, {self.constant(bound)}")
        return self.choose(above, self.constant(bound), one)

    def most(self, one: str, bound: float) -> str:
        """The larger of a vector and a number; what is not a number stays."""
        below = self.value(f"fcmp olt {self.vector} {one}, {self.constant(bound)}")
        return self.choose(below, self.constant(bound), one)

    def choose(self, condition: str, one: str, other: str) -> str:
        lanes, v = self.target.lanes, self.vector
        return self.value(f"select <{lanes} x i1> {condition}, {v} {one}, {v} {other}")

    def exponential(self, x: str) -> str:
        """eˣ: 2ⁿ times a polynomial of the rest, which is at most ln 2 / 2. The ends of the range are cut off."""
        double = self.bits == 64
        limit, shift, degree = (708.0, 52, 13) if double else (87.0, 23, 7)
        high = 0.693147180369123816490 if double else 0.693359375
        low = 1.90821492927058770002e-10 if double else -2.12194440e-4
        x = self.most(self.least(x, limit), -limit)
        # adding 1.5 · 2⁵² (2²³) leaves the nearest integer in the last bits
        rounding = self.constant(1.5 * 2.0**shift)
        shifted = self.multiply_add(x, self.constant(1 / math.log(2)), rounding)
        n = self.subtract(shifted, rounding)
        rest = self.multiply_add(n, self.constant(-low), self.multiply_add(n, self.constant(-high), x))
        result = self.constant(1 / math.factorial(degree))
        for power in range(degree - 1, -1, -1):
            result = self.multiply_add(result, rest, self.constant(1 / math.factorial(power)))
        place = self.value(f"bitcast {self.vector} {shifted} to {self.whole}")
        width = ", ".join([f"i{self.bits} {shift}"] * self.target.lanes)
        exponent = self.value(f"shl {self.whole} {place}, <{width}>")
        one = ", ".join([f"i{self.bits} {(1023 << 52) if double else (127 << 23)}"] * self.target.lanes)
        power_of_two = self.value(f"add {self.whole} {exponent}, <{one}>")
        return self.multiply(result, self.value(f"bitcast {self.whole} {power_of_two} to {self.vector}"))

    def sigmoid(self, x: str) -> str:
        falling = self.exponential(self.value(f"fneg {self.vector} {x}"))
        one = self.constant(1)
        return self.value(f"fdiv {self.vector} {one}, {self.add(one, falling)}")
