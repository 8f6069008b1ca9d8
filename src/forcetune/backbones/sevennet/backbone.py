"""SevenNet models behind the backbone protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from forcetune.backbones.opening import FileBackbone, build, choose_elements
from forcetune.backbones.protocol import Base
from forcetune.backbones.sevennet.content import Cut, SevenNetContent
from forcetune.backbones.sevennet.modalities import with_new_modality
from forcetune.backbones.sevennet.network import SevenNetNetwork
from forcetune.backbones.sevennet.reading import read_content
from forcetune.backbones.sevennet.writing import write_checkpoint
from forcetune.errors import InputError
from forcetune.kernels.features import Features
from forcetune.kernels.tensors import TensorSource, UnfitError

NO_MODALITY = "Default"


class SevenNetBackbone(FileBackbone):
    """A SevenNet model of a ``checkpoint_*.pth``; of a multi-modal one the modality that was chosen as head.

    Attributes:
        content: the checkpoint that it was made from.
        stored_dtype: precision of the checkpoint: float32 of all that sevenn writes.
    """

    library, files = "sevennet", "SevenNet"
    # benchmarks/transfer.py: lowest validation loss on molecules, an alloy and silicon at a third of the published rate
    learning_rates = MappingProxyType({"elora": 2e-3, "mmea": 2e-3})

    def __init__(
        self,
        content: SevenNetContent,
        cut: Cut,
        model: SevenNetNetwork,
        base: Base,
        head: str,
        *,
        stored_dtype: torch.dtype | None = None,
    ) -> None:
        self.content, self._cut = content, cut
        self.stored_dtype = stored_dtype or next(iter(content.tensors.values())).dtype
        super().__init__(model, base, elements=model.elements, cutoff=content.architecture.cutoff, head=head)

    @classmethod
    def read_file(cls, file: Path) -> SevenNetContent:
        return read_content(file)

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
        file: Path | None = None,
        stored_dtype: torch.dtype | None = None,
    ) -> SevenNetBackbone:
        modalities = content.architecture.modalities
        if modalities and head is None:
            raise InputError(
                f"{base.name} has the modalities {', '.join(modalities)} (levels of theory); choose one with --head, "
                f"such as --head {modalities[-1]}."
            )
        if head is not None and head not in (modalities or (NO_MODALITY,)):
            raise InputError(
                f"{base.name} has no modality {head!r}; it has {', '.join(modalities)}: choose one with --head."
                if modalities
                else f"{base.name} has no modalities, and so no head {head!r}; leave --head out."
            )
        chosen = choose_elements(base, [z for z in content.architecture.type_map if z], elements)
        cut = Cut(content, chosen, head if modalities else None)
        network = build(base, cut.build, dtype, device)
        return cls(content, cut, network, base, head or NO_MODALITY, stored_dtype=stored_dtype)

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

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities of the checkpoint; none of one without."""
        return self.content.architecture.modalities

    @property
    def _modality(self) -> str | None:
        return self.head if self.modalities else None

    def fingerprint(self) -> str:
        """SHA-256 over architecture and tensors of the checkpoint as they are now, without an adapter."""
        return self._content_now().fingerprint

    def _content_now(self) -> SevenNetContent:
        """The checkpoint with the weights as they are now."""
        return self._cut.written_back(self.model, torch.promote_types(self.stored_dtype, self.dtype))

    def cut_to(self, elements: Sequence[int]) -> SevenNetBackbone:
        """The model as it is now, with these elements only.

        Raises:
            InputError: it does not know one of them.
        """
        return SevenNetBackbone.from_content(
            self._content_now(),
            self.base,
            head=self._modality,
            elements=elements,
            dtype=self.dtype,
            device=self.device,
            stored_dtype=self.stored_dtype,
        )

    def with_modality(self, name: str) -> SevenNetBackbone:
        """Another modality of the checkpoint that this one was made from, with the same elements.

        Raises:
            InputError: it has no such modality.
        """
        return SevenNetBackbone.from_content(
            self.content, self.base, head=name, elements=self.elements, dtype=self.dtype, device=self.device
        )

    def save(self, path: str | Path) -> None:
        """Write a checkpoint that sevenn reads, atomically; an adapter attached to the model is not written.

        The full table of elements, and other modalities, are kept; what belongs to the elements and the modality of
        this backbone is replaced. Tensors are written in this backbone's precision; sevenn itself computes in float32.

        Raises:
            InputError: the folder cannot be written.
        """
        write_checkpoint(self._cut.written_back(self.model, self.dtype), path)

    def save_into_source(self, path: str | Path) -> bool:
        """As :meth:`save`, in the precision of the checkpoint that it was read from."""
        write_checkpoint(self._cut.written_back(self.model, self.stored_dtype), path)
        return True

    def save_modality(self, path: str | Path, name: str, dtype: torch.dtype | None = None) -> None:
        """Write the checkpoint that this one was read from with one more modality: the rows and E0 of this backbone.

        Args:
            path: to write.
            name: of the new modality.
            dtype: of the written tensors; None keeps that of the checkpoint.

        Raises:
            InputError: it has this modality already or knows none, weights that modalities share have changed, or the
                folder cannot be written.
        """
        if not self.modalities or name in self.modalities:
            raise InputError(f"{self.base.name} has the modalities {', '.join(self.modalities) or 'none'}.")
        try:
            content = with_new_modality(self._cut, self.model, name, dtype or self.stored_dtype)
        except UnfitError as error:
            raise InputError(f"no modality can be added to {self.base.name}: {error}.") from error
        write_checkpoint(content, path)

    def read_back(self, path: str | Path) -> SevenNetBackbone:
        """What was written by :meth:`save`, to be compared with this one."""
        return SevenNetBackbone.load(path, head=self._modality, elements=self.elements, dtype=self.dtype)
