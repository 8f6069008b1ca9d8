"""The architecture of a NequIP model as plain values, whichever form of file it was read from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ase.data import atomic_numbers
from torch import Tensor
from torch.nn import functional

from forcetune.backbones.nequip.interaction import ACTIVATIONS
from forcetune.irreps import Block, irreps_text, parse_irreps
from forcetune.kernels.tensors import UnfitError
from forcetune.utils.parsing import short

LARGEST = 16384
"""Of channels, widths and the like: more than any model has."""
_HIGHEST_ORDER = 8
VERSIONS = tuple((0, minor) for minor in range(13, 20))
"""Of nequip, whose files are known."""
CONVOLUTION_ACTIVATIONS = ("abs", "tanh", "ssp", "silu")


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


SCALAR_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "mish": functional.mish,
    "gelu": functional.gelu,
    "ssp": ACTIVATIONS["ssp"],
    "tanh": ACTIVATIONS["tanh"],
    "sigmoid": ACTIVATIONS["sigmoid"],
    "softplus": functional.softplus,
    "identity": identity,
}
"""Between the layers of networks of scalars."""


@dataclass(frozen=True, slots=True)
class NequIPArchitecture:
    """All that a NequIP model needs besides its tensors.

    Attributes:
        cutoff: Å.
        elements: atomic number of each type, in the order of the tensors.
        attributes: numbers that a type is embedded in.
        harmonics: irreps of the directions.
        features: irreps of the embedding and of the features behind each layer, in the order of the file.
        bessel: functions of the radial basis.
        cutoff_power: p of the envelope.
        radial_hidden: widths of the hidden layers of the radial network of each layer.
        self_connections: whether each layer has one.
        residual: whether each layer adds its inputs to its outputs.
        scalar_activation: of even scalars; odd ones go through tanh.
        gate_activation: of gates.
        readout_hidden: widths of the hidden layers of the readout, with
        readout_activation: between them; None where there is none.
        repulsion_power: p of the envelope of the ZBL potential; None for models without.
        dtype: of the weights, ``float32`` or ``float64``.
    """

    cutoff: float
    elements: tuple[int, ...]
    attributes: int
    harmonics: str
    features: tuple[str, ...]
    bessel: int
    cutoff_power: float
    radial_hidden: tuple[tuple[int, ...], ...]
    self_connections: tuple[bool, ...]
    residual: tuple[bool, ...]
    scalar_activation: str
    gate_activation: str
    readout_hidden: tuple[int, ...]
    readout_activation: str | None
    repulsion_power: float | None
    dtype: str

    @property
    def n_layers(self) -> int:
        return len(self.features) - 1

    def to_json(self) -> str:
        """One line with sorted keys; equal architectures give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


# ---- checked values ------------------------------------------------------------------------------------------------


def elements_from_names(names: Any) -> tuple[int, ...]:
    """Atomic numbers of types that are named after elements.

    Raises:
        UnfitError: they are not, or one occurs twice.
    """
    if not isinstance(names, (list, tuple)) or not names or len(names) > 118:
        raise UnfitError(f"its type_names are {short(names)}")
    unknown = [name for name in names if not isinstance(name, str) or not atomic_numbers.get(name)]
    if unknown:
        raise UnfitError(
            f"its atom type {short(unknown[0])} is not named after an element, and which element it is stands nowhere"
        )
    elements = tuple(atomic_numbers[name] for name in names)
    if len(set(elements)) != len(elements):
        raise UnfitError("it has several atom types of one element")
    return elements


def check_version(version: Any) -> tuple[int, int]:
    """Major and minor version of nequip.

    Raises:
        UnfitError: it is none whose files are known.
    """
    parts = str(version).split(".")
    if len(parts) < 2 or not parts[0].isdigit() or not parts[1].isdigit():
        raise UnfitError(f"it was written by nequip {short(version)}, which is not supported")
    release = int(parts[0]), int(parts[1])
    if release not in VERSIONS:
        raise UnfitError(f"it was written by nequip {short(str(version))}; forcetune knows the files of 0.13 to 0.19")
    return release


def whole(value: Any, what: str, largest: int = LARGEST, *, smallest: int = 0) -> int:
    """
    Raises:
        UnfitError: it is no integer, or outside these bounds.
    """
    if type(value) is not int or not smallest <= value <= largest:
        raise UnfitError(f"its {what} is {short(value)}")
    return value


def flag(value: Any, what: str) -> bool:
    """
    Raises:
        UnfitError: it is neither True nor False.
    """
    if type(value) is not bool:
        raise UnfitError(f"its {what} is {short(value)}")
    return value


def positive(value: Any, what: str, largest: float = 100.0) -> float:
    """
    Raises:
        UnfitError: it is no positive number, or too large.
    """
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not math.isfinite(value) or not 0 < value <= largest:
        raise UnfitError(f"its {what} is {short(value)}")
    return float(value)


def checked_irreps(value: Any, what: str) -> str:
    """Irreps of one copy of each irrep at most, written as text; equal neighbours are one.

    Raises:
        UnfitError: they are none, too many or too high.
    """
    if not isinstance(value, str) or len(value) > 1000:
        raise UnfitError(f"its {what} are {short(value)}")
    blocks = parse_irreps(value.replace(" ", ""))
    unique = len({block.irrep for block in blocks}) == len(blocks)
    if not blocks or not unique or any(b.order > _HIGHEST_ORDER or b.multiplicity > LARGEST for b in blocks):
        raise UnfitError(f"its {what} are {short(value)}")
    return irreps_text(blocks)


def checked_harmonics(value: Any) -> str:
    """Irreps of spherical harmonics of all orders up to one, of natural parity or all even.

    Raises:
        UnfitError: they are others.
    """
    text = checked_irreps(value, "spherical harmonics")
    blocks = parse_irreps(text)
    natural = all(block.parity == "eo"[block.order % 2] for block in blocks)
    even = all(block.parity == "e" for block in blocks)
    complete = [block.order for block in blocks] == list(range(len(blocks)))
    if not complete or not (natural or even) or any(block.multiplicity != 1 for block in blocks):
        raise UnfitError(f"its spherical harmonics are {short(value)}")
    return text


def scalar_activation(value: Any, what: str) -> str | None:
    """Name of an activation between layers of scalars; None where there is none.

    Raises:
        UnfitError: it is unknown.
    """
    if value is None:
        return None
    if value in ("None", "null"):  # a text, which nequip takes for an activation that does nothing
        return "identity"
    if not isinstance(value, str) or value not in SCALAR_ACTIVATIONS or value == "identity":
        raise UnfitError(f"its {what} is {short(value)}, which is none of {', '.join(SCALAR_ACTIVATIONS)}")
    return value


def convolution_activations(scalars: Any, gates: Any) -> tuple[str, str]:
    """Activations of even scalars and of gates.

    Raises:
        UnfitError: they are unknown, or odd scalars go through a function that is not odd.
    """
    for what, table in (("scalars", scalars), ("gates", gates)):
        if not isinstance(table, dict) or set(table) != {"e", "o"}:
            raise UnfitError(f"its activations of {what} are {short(table)}")
        unknown = [name for name in table.values() if name not in CONVOLUTION_ACTIVATIONS]
        if unknown:
            raise UnfitError(f"its activation of {what} is {short(unknown[0])}")
    if scalars["o"] != "tanh":
        raise UnfitError(f"its odd scalars go through {scalars['o']}, which is not computed")
    return scalars["e"], gates["e"]


def reachable(before: str, harmonics: str, wanted: str) -> str:
    """Irreps behind a layer: those of ``wanted`` to which a path leads, scalars first.

    Raises:
        UnfitError: none is left, or no even scalar.
    """
    angular = parse_irreps(harmonics)
    there: set[str] = set()
    for block in parse_irreps(before):
        for harmonic in angular:
            parity = "e" if block.parity == harmonic.parity else "o"
            low, high = abs(block.order - harmonic.order), block.order + harmonic.order
            there |= {f"{order}{parity}" for order in range(low, high + 1)}
    blocks = [block for block in parse_irreps(wanted) if block.irrep in there]
    if not any(block.is_even_scalar for block in blocks):
        raise UnfitError(f"its features {short(wanted)} have no even scalars")
    scalars: Sequence[Block] = [block for block in blocks if block.order == 0]
    return irreps_text([*scalars, *(block for block in blocks if block.order)])
