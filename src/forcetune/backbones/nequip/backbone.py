"""NequIP models behind the backbone protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from forcetune.backbones.nequip.content import Cut, NequIPContent, couplings_for
from forcetune.backbones.nequip.network import NequIPNetwork
from forcetune.backbones.nequip.reading import is_package, read_content
from forcetune.backbones.nequip.writing import Original, write_content
from forcetune.backbones.opening import FileBackbone, build, choose_elements
from forcetune.backbones.protocol import Base
from forcetune.errors import InputError
from forcetune.kernels.features import Features
from forcetune.kernels.tensors import TensorSource, UnfitError

NO_HEAD = "Default"


class NequIPBackbone(FileBackbone):
    """A NequIP model of a ``.ckpt`` of nequip-train or a ``.nequip.zip`` of nequip-package; it has no heads.

    Attributes:
        content: what its file holds.
        stored_dtype: precision of the file.
    """

    library, files = "nequip", "NequIP"

    def __init__(
        self,
        content: NequIPContent,
        cut: Cut,
        model: NequIPNetwork,
        base: Base,
        original: Original | None,
    ) -> None:
        self.content, self._cut, self._original = content, cut, original
        super().__init__(model, base, elements=model.elements, cutoff=content.architecture.cutoff, head=NO_HEAD)

    @classmethod
    def read_file(cls, file: Path) -> NequIPContent:
        return read_content(file)

    @classmethod
    def from_content(
        cls,
        content: NequIPContent,
        base: Base,
        *,
        head: str | None = None,
        elements: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        file: Path | None = None,
        original: Original | None = None,
    ) -> NequIPBackbone:
        if head not in (None, NO_HEAD):
            raise InputError(f"{base.name} is a NequIP model and has no heads, so none is {head!r}; leave --head out.")
        cut = Cut(content, choose_elements(base, list(content.architecture.elements), elements))
        network = build(base, cut.build, dtype, device)
        if file is not None:
            original = Original(file.resolve(), base.fingerprint)
        return cls(content, cut, network, base, original)

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.content.dtype

    def _stored_references(self) -> dict[int, float]:
        shifts = self._cut.per_element("per_type_energy_scale_shift.shifts").double()
        return {z: float(energy) for z, energy in zip(self.elements, shifts, strict=True)}

    def _store_references(self, energies: Tensor) -> None:
        self.model.per_type_energy_scale_shift.shifts.copy_(energies)

    def _invariants(self, features: Sequence[Features]) -> Tensor:
        places = self.model.scalar_blocks
        return torch.cat([layer.blocks[index][:, 0] for layer, (index, _) in zip(features, places, strict=True)], dim=1)

    @property
    def n_scalars(self) -> int:
        return sum(count for _, count in self.model.scalar_blocks)

    def _layers_behind(self, name: str) -> int:
        """Readouts count with the last layer; what comes before the layers counts as one more."""
        first, count = name.split(".")[0], self.content.architecture.n_layers
        if first.startswith("layer"):
            return count - 1 - int(first.removeprefix("layer").removesuffix("_convnet"))
        return 0 if first.startswith("per_") else count

    def fresh_weights(self, seed: int | None) -> dict[str, Tensor]:
        """Random values for every parameter by dotted name, distributed as nequip draws them."""
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            source = TensorSource(self._cut.tensors(), couplings_for(self.content.architecture), redraw=True)
            drawn = NequIPNetwork(self.content.architecture, tuple(self.elements), source)
        return {name: parameter.detach().to(self.device) for name, parameter in drawn.named_parameters()}

    def fingerprint(self) -> str:
        """SHA-256 over architecture and tensors of the file as they are now, without an adapter."""
        return self._content_now().fingerprint

    def _content_now(self, dtype: torch.dtype | None = None) -> NequIPContent:
        """What the file holds with the weights and reference energies as they are now."""
        wanted = dtype or torch.promote_types(self.stored_dtype, self.dtype)
        return self._cut.written_back(self.model, self._references, wanted)

    def cut_to(self, elements: Sequence[int]) -> NequIPBackbone:
        """The model as it is now, with these elements only.

        Raises:
            InputError: it does not know one of them.
        """
        return NequIPBackbone.from_content(
            self._content_now(),
            self.base,
            elements=elements,
            dtype=self.dtype,
            device=self.device,
            original=self._original,
        )

    def save(self, path: str | Path) -> None:
        """Write a copy of the file that it was read from with its weights in it, atomically.

        A checkpoint is written in this backbone's precision, a package in its own.

        Raises:
            InputError: the file is gone or another one, has no place for the reference energies, or the target cannot
                be written.
        """
        original = self._original
        if original is None:
            raise InputError(f"{self.base.name}: was not read from a file, and so there is none to write it into.")
        dtype = self.stored_dtype if is_package(original.path) else self.dtype
        self._write(path, original, dtype)

    def save_into_source(self, path: str | Path) -> bool:
        """As :meth:`save`, in the precision of the file."""
        if self._original is None:
            return False
        self._write(path, self._original, self.stored_dtype)
        return True

    def _write(self, path: str | Path, original: Original, dtype: torch.dtype) -> None:
        content = self._content_now(dtype)
        architecture = replace(content.architecture, dtype=str(dtype).removeprefix("torch."))
        try:
            write_content(replace(content, architecture=architecture), original, path)
        except UnfitError as error:
            raise InputError(f"{self.base.name} cannot be written: {error}.") from error

    def read_back(self, path: str | Path) -> NequIPBackbone:
        """What was written by :meth:`save`, to be compared with this one."""
        return NequIPBackbone.load(path, elements=self.elements, dtype=self.dtype)
