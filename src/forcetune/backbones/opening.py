"""From a file to a backbone: the steps that every library's files have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from ase.data import chemical_symbols
from torch import nn

from forcetune.backbones.network import NetworkBackbone
from forcetune.backbones.protocol import Base
from forcetune.errors import InputError
from forcetune.kernels.tensors import UnfitError

Network = TypeVar("Network", bound=nn.Module)


class FileBackbone(NetworkBackbone):
    """A backbone that is read from a file of its library, without running code from it.

    Attributes:
        files: what its library's files are called in messages.
    """

    files = "such"

    # ---- what a library fills in -----------------------------------------------------------------------------------

    @classmethod
    def read_file(cls, file: Path) -> Any:
        """What a file holds, with a ``fingerprint``.

        Raises:
            UnfitError: forcetune does not compute what it holds.
            InputError: it cannot be read.
        """
        raise NotImplementedError

    @classmethod
    def from_content(
        cls,
        content: Any,
        base: Base,
        *,
        head: str | None = None,
        elements: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        file: Path | None = None,
    ) -> Self:
        """As :meth:`load`, from what was read; ``file`` says where from."""
        raise NotImplementedError

    @classmethod
    def run_file(cls, file: Path, error: UnfitError, make_base: Callable[..., Base], options: dict[str, Any]) -> Any:
        """The model of a file that may run its own code, as it cannot be computed without.

        Args:
            file: to load.
            error: why forcetune does not compute it.
            make_base: from a fingerprint to the identity.
            options: head, elements, dtype and device, as of :meth:`load`.

        Raises:
            InputError: the library's files are not run.
        """
        raise InputError(
            f"{file} cannot be rebuilt: {error}; code in {cls.files} files is never run, so --trust does not help."
        ) from error

    @classmethod
    def explain_unfit(cls, file: Path, error: UnfitError) -> str:
        """Why a file is refused, in one or two sentences."""
        return f"{file} cannot be rebuilt: {error}."

    # ----------------------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        licence: str = "unknown",
        sha256: str = "",
        source: str | None = None,
        head: str | None = None,
        elements: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        trust: bool = False,
    ) -> Self:
        """Read a model without running code from its file.

        Args:
            path: a file of the library; the class says which.
            name, licence, sha256: identity, recorded in adapters.
            source: the name it is known by; its path where there is none.
            head: the head or modality of a model that has several.
            elements: cut the element table to these atomic numbers; None keeps it.
            dtype: precision to compute in.
            device: where to.
            trust: where forcetune does not compute all of the model, run the file's code, if the library allows that.

        Raises:
            InputError: the file cannot be read or understood, the head is unknown or missing, an element is unknown.
        """
        file = Path(path)
        options = {"head": head, "elements": elements, "dtype": dtype, "device": device}

        def make_base(fingerprint: str, *, trusted: bool = False) -> Base:
            place = str(path) if source is None else source
            return Base(name or file.stem, sha256, fingerprint, licence, place, trusted=trusted)

        try:
            content = cls.read_file(file)
        except UnfitError as error:
            if not trust:
                raise InputError(cls.explain_unfit(file, error)) from error
            return cls.run_file(file, error, make_base, options)
        return cls.from_content(content, make_base(content.fingerprint), file=file, **options)  # pyright: ignore[reportArgumentType]


def choose_elements(base: Base, known: Sequence[int], elements: Sequence[int] | None) -> list[int]:
    """Atomic numbers to cut a model to, ascending: all that it knows, or those that are asked for.

    Raises:
        InputError: it does not know one of them.
    """
    chosen = sorted(set(known if elements is None else elements))
    if unknown := sorted(set(chosen) - set(known)):
        names = ", ".join(chemical_symbols[z] for z in unknown)
        raise InputError(f"{base.name} does not know the element {names}; choose a model that does.")
    return chosen


def build(base: Base, make: Callable[[], Network], dtype: torch.dtype, device: str | torch.device) -> Network:
    """The network that ``make`` makes, in this precision and there.

    Raises:
        InputError: its tensors do not fit what it is said to be.
    """
    try:
        network = make()
    except UnfitError as error:
        raise InputError(f"{base.name} cannot be rebuilt: {error}.") from error
    return network.to(dtype=dtype, device=torch.device(device))
