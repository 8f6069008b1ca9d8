"""SevenNet models behind the backbone protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from ase.data import chemical_symbols
from torch import Tensor

from forcetune.backbones.network import NetworkBackbone
from forcetune.backbones.protocol import Base
from forcetune.backbones.sevennet.content import Cut, SevenNetContent
from forcetune.backbones.sevennet.network import SevenNetNetwork
from forcetune.backbones.sevennet.reading import read_content
from forcetune.backbones.sevennet.writing import write_checkpoint
from forcetune.errors import InputError
from forcetune.kernels.features import Features
from forcetune.kernels.tensors import TensorSource, UnfitError

NO_MODALITY = "Default"


class SevenNetBackbone(NetworkBackbone):
    """A SevenNet model; of a multi-modal one the modality that was chosen as head."""

    library = "sevennet"
    stored_dtype = torch.float32  # of every checkpoint that sevenn writes

    def __init__(self, content: SevenNetContent, cut: Cut, model: SevenNetNetwork, base: Base, head: str) -> None:
        self.content, self._cut = content, cut
        super().__init__(model, base, elements=model.elements, cutoff=content.architecture.cutoff, head=head)

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
    ) -> SevenNetBackbone:
        """Read a checkpoint without running code from it.

        Args:
            path: ``checkpoint_*.pth`` of sevenn.
            name, licence, sha256: identity, recorded in adapters.
            source: the name it is known by; its path where there is none.
            head: the modality of a multi-modal model.
            elements: cut the element table to these atomic numbers; None keeps it.
            dtype: precision to compute in.
            device: where to.
            trust: of no use: what forcetune does not compute cannot be computed by sevenn here.

        Raises:
            InputError: the file cannot be read or understood, the head is unknown or missing, an element is unknown.
        """
        del trust
        file = Path(path)
        try:
            content = read_content(file)
        except UnfitError as error:
            raise InputError(f"{file} cannot be rebuilt: {error}.") from error
        place = str(path) if source is None else source
        base = Base(name or file.stem, sha256, content.fingerprint, licence, place)
        return cls.from_content(content, base, head=head, elements=elements, dtype=dtype, device=device)

    @classmethod
    def from_content(
        cls,
        content: SevenNetContent,
        base: Base,
        *,
        head: str | None = None,
        elements: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
    ) -> SevenNetBackbone:
        """As :meth:`load`, from what was read."""
        modalities = content.architecture.modalities
        if modalities and head is None:
            raise InputError(
                f"{base.name} has the modalities {', '.join(modalities)}; choose one with --head (model.head)."
            )
        if head is not None and head not in (modalities or (NO_MODALITY,)):
            raise InputError(f"the model has no head {head!r}; it has {', '.join(modalities or (NO_MODALITY,))}.")
        known = sorted(z for z in content.architecture.type_map if z)
        wanted = known if elements is None else sorted(set(elements))
        if unknown := sorted(set(wanted) - set(known)):
            names = ", ".join(chemical_symbols[z] for z in unknown)
            raise InputError(f"{base.name} does not know the element {names}; choose a model that does.")
        try:
            cut = Cut(content, wanted, head if modalities else None)
            network = cut.build()
        except UnfitError as error:
            raise InputError(f"{base.name} cannot be rebuilt: {error}.") from error
        return cls(content, cut, network.to(dtype=dtype, device=torch.device(device)), base, head or NO_MODALITY)

    def _stored_references(self) -> dict[int, float]:
        shift = self.model.rescale_atomic_energy.shift.double()
        return {z: float(energy) for z, energy in zip(self.elements, shift, strict=True)}

    def _store_references(self, energies: Tensor) -> None:
        self.model.rescale_atomic_energy.shift.copy_(energies)

    def _invariants(self, features: Sequence[Features]) -> Tensor:
        return torch.cat([layer.blocks[0][:, 0] for layer in features], dim=1)

    @property
    def n_scalars(self) -> int:
        return self.model.n_scalars

    def _layers_behind(self, name: str) -> int:
        """Readouts count with the last layer; what comes before the layers counts as one more."""
        first, count = name.split(".")[0], self.content.architecture.n_layers
        if first[0].isdigit():
            return count - 1 - int(first.split("_")[0])
        return 0 if first.startswith(("reduce_", "readout_", "rescale_")) else count

    def fresh_weights(self, seed: int | None) -> dict[str, Tensor]:
        """Random values for every parameter by dotted name, distributed as sevenn draws them."""
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            source = TensorSource(self._cut.tensors(), self.content.constants, redraw=True)
            drawn = SevenNetNetwork(self.content.architecture, tuple(self.elements), source)
        return {name: parameter.detach().to(self.device) for name, parameter in drawn.named_parameters()}

    def _content_now(self) -> SevenNetContent:
        """The checkpoint with the weights as they are now."""
        written = self._cut.written_back(self.model)
        tensors = {name: written[self.content.names[name]] for name in self.content.tensors}
        return replace(self.content, tensors=tensors)

    def fingerprint(self) -> str:
        """SHA-256 over architecture and tensors of the checkpoint as they are now, without an adapter."""
        return self._content_now().fingerprint

    def cut_to(self, elements: Sequence[int]) -> SevenNetBackbone:
        """The model as it is now, with these elements only.

        Raises:
            InputError: it does not know one of them.
        """
        head = None if self.head == NO_MODALITY else self.head
        options = {"head": head, "elements": elements, "dtype": self.dtype, "device": self.device}
        return SevenNetBackbone.from_content(self._content_now(), self.base, **options)  # pyright: ignore[reportArgumentType]

    def save(self, path: str | Path) -> None:
        """Write a checkpoint that sevenn reads, atomically; an adapter attached to the model is not written.

        The full table of elements, and other modalities, are kept; what belongs to the elements and the modality of
        this backbone is replaced.

        Raises:
            InputError: the folder cannot be written.
        """
        write_checkpoint(self.content, self._cut.written_back(self.model), path)

    def save_into_source(self, path: str | Path) -> bool:
        """As :meth:`save`, which writes the checkpoint that it was read from with its weights in it."""
        self.save(path)
        return True

    def read_back(self, path: str | Path) -> SevenNetBackbone:
        """What was written by :meth:`save`, to be compared with this one."""
        head = None if self.head == NO_MODALITY else self.head
        return SevenNetBackbone.load(path, head=head, elements=self.elements, dtype=self.dtype)
