"""What an adapter knows of a learnable weight: where it is, and its equivariant meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightPath:
    """One path of a site: a contiguous block of the flat weight that couples one irrep in to one irrep out.

    Attributes:
        name: unique within the site and independent of the library's layout, such as ``1o->1o``.
        start: first element of the block in the flattened weight.
        shape: (fan in, fan out); for contractions (elements, couplings, channels).
        transposed: the shape is (fan out, fan in), as in PyTorch's linear layers.
        by_element: the block seen as (outer, elements, inner) has a slice for each element in the order of the model's
            table; None where elements share the weights.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    transposed: bool = False
    by_element: tuple[int, int, int] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def output_axis(self) -> int:
        """The axis of the shape that output channels run along."""
        return 0 if self.transposed else len(self.shape) - 1


@dataclass(frozen=True, slots=True)
class Site:
    """One learnable weight of the backbone with its equivariant meaning.

    Attributes:
        name: dotted name of the weight in the backbone's module.
        module: dotted name of the module that owns it.
        parameter: the weight's name in that module.
        reader: dotted name of the module whose call reads the weight; mostly the owner itself.
        kind: ``linear``, ``tensor_product``, ``radial_mlp``, ``contraction``, ``contraction_lower``,
            ``radial_basis``, ``readout`` or ``other``.
        irreps_in, irreps_out: of the module's features, where it has some.
        layers_behind: interaction layers between this weight and the output that come after its own: 0 for those of
            the last layer and the readouts.
        paths: blocks of the weight that updates act on.
    """

    name: str
    module: str
    parameter: str
    reader: str
    kind: str
    paths: tuple[WeightPath, ...]
    irreps_in: str | None = None
    irreps_out: str | None = None
    layers_behind: int = 0

    @property
    def numel(self) -> int:
        return sum(path.size for path in self.paths)


def numbered(names: Sequence[str]) -> list[str]:
    """The names, numbered where one occurs more than once."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if names.count(name) == 1 else f"{name}#{seen[name]}")
    return result
