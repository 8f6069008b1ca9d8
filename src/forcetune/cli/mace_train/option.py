"""One option of ``mace_run_train``: how it is written, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

Kind = Literal["text", "int", "float", "float or None", "bool", "set", "unset", "file", "texts"]
"""How its value is read; ``set`` and ``unset`` are switches without a value, ``texts`` several values."""


class Handling(Enum):
    """What becomes of an option."""

    MAPPED = "mapped"
    NETWORK = "of the foundation model"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class MaceOption:
    """An option of mace's parser, or of the MMEA repository's.

    Attributes:
        flags: as written on the command line, the first one gives the name.
        kind: how its value is read.
        default: mace's value where the option is not given.
        handling: what becomes of it.
        explanation: of a mapped option what it is here; of one that is ignored or refused why, and what to do instead.
        choices: the values that mace takes; all, where there are none here.
        origin: ``mace`` or ``MMEA``, whose parser has it.
    """

    flags: tuple[str, ...]
    kind: Kind
    default: Any
    handling: Handling
    explanation: str
    choices: tuple[str, ...] = ()
    origin: Literal["mace", "MMEA"] = "mace"

    @property
    def name(self) -> str:
        """Of the first flag, without dashes; also its key in a YAML file."""
        return self.flags[0].removeprefix("--")


def mapped(flags: str, kind: Kind, default: Any, explanation: str, **more: Any) -> MaceOption:
    """An option that has a counterpart."""
    return MaceOption(tuple(flags.split()), kind, default, Handling.MAPPED, explanation, **more)


def network(flags: str, kind: Kind, default: Any, choices: tuple[str, ...] = ()) -> MaceOption:
    """A part of the architecture, which is that of the foundation model in mace, too."""
    return MaceOption(tuple(flags.split()), kind, default, Handling.NETWORK, "", choices)


def ignored(flags: str, kind: Kind, default: Any, explanation: str, **more: Any) -> MaceOption:
    """An option without a counterpart that changes nothing in the result."""
    return MaceOption(tuple(flags.split()), kind, default, Handling.IGNORED, explanation, **more)


def refused(flags: str, kind: Kind, default: Any, explanation: str, **more: Any) -> MaceOption:
    """An option without a counterpart that would change the result; its default is accepted."""
    return MaceOption(tuple(flags.split()), kind, default, Handling.REFUSED, explanation, **more)
