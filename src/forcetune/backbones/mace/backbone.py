"""MACE models behind the backbone protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.backbones.mace.content import MaceContent, build_network, content_from_network
from forcetune.backbones.mace.converted import check_not_converted
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.backbones.mace.original import write_into_original
from forcetune.backbones.mace.reading import read_content, read_module
from forcetune.backbones.mace.surgery import cut_elements, select_head
from forcetune.backbones.mace.trusted import LibraryMace, library_fingerprint, load_pickled
from forcetune.backbones.mace.writing import write_model
from forcetune.backbones.network import NetworkBackbone
from forcetune.backbones.opening import FileBackbone, build, choose_elements
from forcetune.backbones.protocol import Base
from forcetune.errors import ForcetuneError, InputError, warn
from forcetune.kernels.features import Features
from forcetune.kernels.tensors import TensorSource, UnfitError

_LOST_REFERENCE = 1e-4  # eV


class MaceBackbone(FileBackbone):
    """A MACE or ScaleShiftMACE model with one head, of a ``.model`` file or a ``.safetensors`` file of :meth:`save`.

    Attributes:
        model: the network; adapters are attached to it in place.
        base: identity of the file it was read from, before elements were cut.
        elements: atomic numbers it knows, ascending as in the model.
        cutoff: Å.
        head: name of the head in use.
        stored_dtype: precision of the file or module that it was made from.
    """

    library, files = "mace", "MACE"

    def __init__(
        self, model: MaceNetwork, base: Base, *, stored_dtype: torch.dtype | None = None, file: Path | None = None
    ) -> None:
        architecture = model.architecture
        self.stored_dtype = stored_dtype or model.atomic_energies_fn.atomic_energies.dtype
        self._file = file
        super().__init__(
            model,
            base,
            elements=architecture.atomic_numbers,
            cutoff=float(model.r_max),
            head=architecture.heads[0],
        )

    @classmethod
    def read_file(cls, file: Path) -> MaceContent:
        return read_content(file)

    @classmethod
    def explain_unfit(cls, file: Path, error: UnfitError) -> str:
        return (
            f"{file} cannot be rebuilt: {error}. If you trust where it comes from, --trust runs its code and lets mace "
            "compute it."
        )

    @classmethod
    def run_file(
        cls, file: Path, error: UnfitError, make_base: Callable[..., Base], options: dict[str, Any]
    ) -> NetworkBackbone:
        """The model of pickled code, computed by mace."""
        warn(f"{file} cannot be rebuilt ({error}); it is loaded as pickled code, as --trust allows.")
        model = load_pickled(file)
        return cls.from_module(model, base=make_base(library_fingerprint(model), trusted=True), **options)

    @classmethod
    def from_module(
        cls,
        model: nn.Module,
        *,
        base: Base | None = None,
        head: str | None = None,
        elements: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
    ) -> NetworkBackbone:
        """A backbone with the weights of a loaded module, mace's or ours, which is left as it is.

        A module of mace that forcetune does not compute is used itself, as it is.

        Raises:
            InputError: the model was converted to an accelerator; as :meth:`load`.
        """
        kind = type(model).__name__
        check_not_converted(model, kind if base is None else base.name)
        try:
            content = read_module(model)
        except UnfitError as error:
            base = base or Base(kind, "", library_fingerprint(model), "unknown")
            return LibraryMace(model, base, reason=str(error), head=head, elements=elements, dtype=dtype, device=device)
        base = base or Base(content.architecture.kind, "", content.fingerprint, "unknown")
        return cls.from_content(content, base, head=head, elements=elements, dtype=dtype, device=device)

    @classmethod
    def from_content(
        cls,
        content: MaceContent,
        base: Base,
        *,
        head: str | None = None,
        elements: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        file: Path | None = None,
        stored_dtype: torch.dtype | None = None,
    ) -> MaceBackbone:
        heads = content.architecture.heads
        if head is None and len(heads) > 1:
            raise InputError(f"{base.name} has the heads {', '.join(heads)}; choose one with --head (model.head).")
        stored = stored_dtype or content.dtype
        content = content.widened(dtype)
        if head is not None:
            content = select_head(content, head)
        known = content.architecture.atomic_numbers
        chosen = choose_elements(base, known, elements)
        if len(chosen) < len(known):
            content = cut_elements(content, chosen)
        network = build(base, lambda: build_network(content), dtype, device)
        return cls(network, base, stored_dtype=stored, file=file)

    @property
    def content(self) -> MaceContent:
        """Architecture and tensors as they are now, an adapter left out."""
        return content_from_network(self.model)

    def cut_to(self, elements: Sequence[int]) -> MaceBackbone:
        """The model as it is now, with these elements only.

        Raises:
            InputError: it does not know one of them.
        """
        return self.from_content(
            self.content,
            self.base,
            elements=elements,
            dtype=self.dtype,
            device=self.device,
            file=self._file,
            stored_dtype=self.stored_dtype,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.model.atomic_energies_fn.atomic_energies.dtype

    @property
    def device(self) -> torch.device:
        return self.model.atomic_energies_fn.atomic_energies.device

    def _stored_references(self) -> dict[int, float]:
        stored = torch.atleast_2d(self.model.atomic_energies_fn.atomic_energies)[0].double()
        return {z: float(energy) for z, energy in zip(self.elements, stored, strict=True)}

    def _store_references(self, energies: Tensor) -> None:
        buffer = self.model.atomic_energies_fn.atomic_energies
        buffer.copy_(energies.view_as(buffer))

    def _invariants(self, features: Sequence[Features]) -> Tensor:
        layers = zip(features, self.model.products, strict=True)
        return torch.cat([layer.blocks[k][:, 0] for layer, product in layers for k in product.scalar_blocks], dim=1)

    @property
    def n_scalars(self) -> int:
        return sum(product.n_scalars for product in self.model.products)

    def read_back(self, path: str | Path) -> MaceBackbone:
        """What was written by :meth:`save`, in the precision of this one, to be compared with it.

        Raises:
            ForcetuneError: it is not understood.
        """
        try:
            stored = read_content(path)
            content = replace(stored, rounded_charges=self.model.rounded_charges).widened(self.dtype)
            content = select_head(content, self.head) if len(content.architecture.heads) > 1 else content
            network = build_network(content)
        except UnfitError as error:
            raise ForcetuneError(f"{path} was written and cannot be read back: {error}.") from error
        base = Base(Path(path).stem, "", content.fingerprint, "unknown")
        written = MaceBackbone(network.to(dtype=self.dtype), base, stored_dtype=stored.dtype)
        energies = torch.atleast_2d(content.tensors["atomic_energies_fn.atomic_energies"])[0].double()
        written.set_reference_energies(dict(zip(written.elements, energies.tolist(), strict=True)))
        return written

    def _layers_behind(self, name: str) -> int:
        """Readouts count with the last layer; what comes before the layers counts as one more."""
        first, *rest = name.split(".")
        count = len(self.model.interactions)
        if first in ("interactions", "products"):
            return count - 1 - int(rest[0])
        return 0 if first in ("readouts", "scale_shift") else count

    def fresh_weights(self, seed: int | None) -> dict[str, Tensor]:
        """Random values for every parameter by dotted name, distributed as mace's constructor draws them."""
        content = self.content
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            drawn = MaceNetwork(content.architecture, TensorSource(content.tensors, content.constants, redraw=True))
        return {name: parameter.detach().to(self.device) for name, parameter in drawn.named_parameters()}

    def fingerprint(self) -> str:
        """SHA-256 over architecture, parameters and coupling tensors as they are now, without an adapter."""
        return self.content.fingerprint

    def save(self, path: str | Path) -> None:
        """Write a plain model, atomically: ``.safetensors`` without pickle, others as mace's calculator reads it.

        An adapter attached to the model is not written; merge it first.

        Raises:
            InputError: the folder cannot be written, or mace-torch is needed and not installed.
        """
        write_model(self.content, path)

    def save_into_source(self, path: str | Path) -> bool:
        """Write the file that it was read from with its weights in it, atomically, in the precision of that file.

        Returns:
            False where this cannot be done: the model was not read from a ``.model`` file, or the file's precision
            would lose more than 0.1 meV of a reference energy.
        """
        wanted = torch.tensor(list(self.reference_energies.values()), dtype=torch.float64)
        lost = (wanted - wanted.to(self.stored_dtype)).abs().max()
        if self._file is None or self._file.suffix == ".safetensors" or lost > _LOST_REFERENCE:
            return False
        tensors = self.content.tensors
        name = "atomic_energies_fn.atomic_energies"
        # with all digits, whatever the precision of the training was
        tensors = tensors | {name: wanted.view_as(tensors[name])}
        try:
            write_into_original(self._file, path, tensors, head=self.head, numbers=self.elements)
        except UnfitError:
            return False
        return True
