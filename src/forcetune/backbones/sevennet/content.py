"""What a SevenNet checkpoint holds, and its tensors cut to some elements and one modality, and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.backbones.sevennet.architecture import SevenNetArchitecture
from forcetune.backbones.sevennet.network import SevenNetNetwork
from forcetune.irreps import parse_irreps
from forcetune.kernels.layers import GatedActivation
from forcetune.kernels.tensors import TensorSource, UnfitError
from forcetune.utils.parsing import short

# names in checkpoints from before April 2024
_OLD_NAMES = {
    "EdgeEmbedding": "edge_embedding",
    "reducing nn input to hidden": "reduce_input_to_hidden",
    "reducing nn hidden to energy": "reduce_hidden_to_energy",
    "rescale atomic energy": "rescale_atomic_energy",
}
_OLD_LAYERS = ("self connection intro", "convolution", "self interaction 2", "self interaction 1", "equivariant gate")
RESCALING = "rescale_atomic_energy."
_NOT_READ = ("output_mask", "equivariant_gate.gate.mul.weight")


@dataclass(frozen=True, slots=True)
class SevenNetContent:
    """A checkpoint.

    Attributes:
        architecture: as plain values.
        tensors: all tensors of the model by their present names, as the file has them.
        names: for each of them the name in the file.
        constants: 3j symbols of the convolutions, by the name of their layer and their own.
        config: the configuration as it was read, to be written again, with
        state: all tensors as they were read.
    """

    architecture: SevenNetArchitecture
    tensors: dict[str, Tensor]
    names: dict[str, str]
    constants: dict[str, Tensor]
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over architecture and tensors, 64 hexadecimal digits; numbers enter as float64."""
        digest = hashlib.sha256(self.architecture.to_json().encode())
        for name, tensor in sorted((self.tensors | self.constants).items()):
            values = tensor.detach().cpu().to(torch.float64).contiguous().numpy()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    def replaced(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> SevenNetContent:
        """With other tensors under the same names, and these entries of the configuration changed.

        Shift and scale stand in the configuration as well, where newer versions of sevenn look at them first.
        """
        changed = dict(self.config) | dict(config)
        for key in ("shift", "scale"):
            if (tensor := tensors.get(f"{RESCALING}{key}")) is not None and key in changed:
                values = tensor.tolist()
                changed[key] = values[0] if tensor.ndim == 1 and len(values) == 1 else values
        state = dict(self.state) | {self.names[name]: tensor for name, tensor in tensors.items()}
        return replace(self, tensors=dict(tensors), config=changed, state=state)


def content_from_state(
    architecture: SevenNetArchitecture, state: Mapping[str, Any], config: Mapping[str, Any]
) -> SevenNetContent:
    """Sort the tensors of a state dictionary.

    Raises:
        UnfitError: something in it is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UnfitError(f"its entry {short(str(key))} is no tensor")
        name = present_name(str(key))
        if not value.numel() or name.endswith(_NOT_READ):
            continue
        if not value.is_floating_point() or value.layout != torch.strided:
            raise UnfitError(f"its tensor {key} holds no real numbers but {value.dtype}")
        if not bool(value.isfinite().all()):
            raise UnfitError(f"its tensor {key} has values that are not finite")
        if "._w3j_" in name:
            constants[name.replace("._compiled_main_left_right", "")] = value
            continue
        tensors[name] = value
        names[name] = str(key)
    return SevenNetContent(architecture, tensors, names, constants, config, dict(state))


def present_name(name: str) -> str:
    """The name that a tensor of an early checkpoint has today."""
    first, _, rest = name.partition(".")
    for old, new in _OLD_NAMES.items():
        if first == old:
            first = new
    number, _, words = first.partition(" ")
    if number.isdigit() and words in _OLD_LAYERS:
        first = f"{number}_{words.replace(' ', '_')}"
    return f"{first}.{rest.replace('denumerator', 'denominator')}"


class Cut:
    """Places of the tensors of a network in those of a checkpoint.

    Args:
        content: of the checkpoint.
        elements: atomic numbers that the network knows, ascending.
        modality: that it computes; None for models without.
    """

    def __init__(self, content: SevenNetContent, elements: Sequence[int], modality: str | None) -> None:
        self.content, self.elements = content, tuple(elements)
        architecture = content.architecture
        table = list(architecture.type_map)
        self.rows = torch.tensor([table.index(z) for z in self.elements])
        self.n_species = len(table)
        self.modality = None if modality is None else architecture.modalities.index(modality)
        self.n_modalities = len(architecture.modalities)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the network: parameters where they are trained, buffers else."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.content.tensors.items():
            if name.startswith(RESCALING):
                tensors[name] = self.per_element(tensor)
            elif name.endswith(".denominator"):
                tensors[name] = tensor
            else:
                weights = self._weights(name, tensor)
                tensors.update({key: nn.Parameter(value.detach()) for key, value in weights.items()})
        return tensors

    def per_element(self, tensor: Tensor) -> Tensor:
        """Shift or scale of the chosen elements and modality.

        Raises:
            UnfitError: its shape is none that belongs to the table of elements.
        """
        chosen = tensor[self.modality] if tensor.ndim == 2 and self.modality is not None else tensor
        if chosen.ndim != 1 or len(chosen) not in (1, self.n_species):
            raise UnfitError(f"its shift or scale has shape {tuple(tensor.shape)}")
        return (chosen if len(chosen) > 1 else chosen.expand(self.n_species))[self.rows]

    def _weights(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        place = self.modal_place(name)
        if place is not None:
            rows = _viewed(name, tensor[place[0] :], self.n_modalities, place[1])
            weights[f"{name.removesuffix('.weight')}.modality"] = rows[self.modality]
            tensor = tensor[: place[0]]
        if name == "onehot_to_feature_x.linear.weight":
            width = sum(block.multiplicity for block in parse_irreps(self.content.architecture.features[0]))
            return weights | {name: _viewed(name, tensor, self.n_species, width)[self.rows].reshape(-1)}
        if name.endswith("fc_tensor_product.weight"):
            blocks = [block[:, self.rows].reshape(-1) for block in self._species_blocks(name, tensor)]
            return {name: torch.cat(blocks)}
        return weights | {name: tensor}

    def modal_place(self, name: str) -> tuple[int, int] | None:
        """Where the rows of the modalities begin in a weight, and how wide they are."""
        architecture = self.content.architecture
        layer = name.split(".")[0]
        kind = layer.partition("_")[2] if layer[0].isdigit() else layer.replace("onehot_to_feature_x", "node_embedding")
        if not name.endswith(".linear.weight") or kind not in architecture.modal_layers or self.modality is None:
            return None
        tensor = self.content.tensors[name]
        width = self._scalars_out(layer, kind)
        if tensor.ndim != 1 or len(tensor) <= width * self.n_modalities:
            raise UnfitError(f"the shape of {name} differs from what its architecture needs: {tuple(tensor.shape)}")
        return len(tensor) - width * self.n_modalities, width

    def _scalars_out(self, layer: str, kind: str) -> int:
        features = self.content.architecture.features
        if kind == "reduce_input_to_hidden":
            return sum(block.multiplicity for block in parse_irreps(features[-1])) // 2
        if kind == "node_embedding":
            blocks = parse_irreps(features[0])
        elif kind == "self_interaction_1":
            blocks = parse_irreps(features[int(layer.split("_")[0])])
        else:
            # gates are even scalars as well
            after = parse_irreps(features[int(layer.split("_")[0]) + 1])
            return sum(block.multiplicity for block in after if block.order or block.is_even_scalar)
        return sum(block.multiplicity for block in blocks if block.is_even_scalar)

    def _species_blocks(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Views (multiplicity in, species, multiplicity out) of the paths of a self-connection."""
        index = int(name.split("_")[0])
        features = self.content.architecture.features
        inputs = parse_irreps(features[index])
        outputs = _gate_inputs(features[index + 1])
        blocks, start = [], 0
        for block in inputs:
            for irrep, width in outputs:
                if irrep == block.irrep:
                    size = block.multiplicity * self.n_species * width
                    piece = tensor[start : start + size] if tensor.ndim == 1 else tensor
                    blocks.append(_viewed(name, piece, block.multiplicity, self.n_species, width))
                    start += size
        if start != tensor.numel():
            raise UnfitError(f"the shape of {name} differs from what its architecture needs")
        return blocks

    def build(self) -> SevenNetNetwork:
        """The network.

        Raises:
            UnfitError: tensors and architecture do not belong together.
        """
        source = TensorSource(self.tensors(), self.content.constants)
        return SevenNetNetwork(self.content.architecture, self.elements, source)

    def written_back(self, network: SevenNetNetwork, dtype: torch.dtype | None = None) -> SevenNetContent:
        """The checkpoint with what the network has in its places; everything else stays as it was.

        Args:
            network: that :meth:`build` made.
            dtype: of the written tensors; None keeps that of each.
        """
        own = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.content.tensors.items():
            value = tensor.detach().to(dtype or tensor.dtype, copy=True)
            if not name.startswith(RESCALING):
                self._write(name, value, own)
            tensors[name] = value
        rescaling, config = with_references(self, own[f"{RESCALING}shift"], dtype)
        return self.content.replaced(tensors | rescaling, config)

    def _write(self, name: str, value: Tensor, own: Mapping[str, Tensor]) -> None:
        """Put the network's weights into their places."""
        place = self.modal_place(name)
        if place is not None:
            rows = value[place[0] :].view(self.n_modalities, place[1])
            rows[self.modality] = own[f"{name.removesuffix('.weight')}.modality"].to(value.dtype)
            value = value[: place[0]]
        if name == "onehot_to_feature_x.linear.weight":
            value.view(self.n_species, -1)[self.rows] = own[name].view(len(self.rows), -1).to(value.dtype)
        elif name.endswith("fc_tensor_product.weight"):
            start = 0
            for block in self._species_blocks(name, value):
                size = block.shape[0] * len(self.rows) * block.shape[2]
                part = own[name][start : start + size].view(block.shape[0], len(self.rows), block.shape[2])
                block[:, self.rows] = part.to(value.dtype)
                start += size
        else:
            value.copy_(own[name].view(value.shape))


def with_references(
    cut: Cut, energies: Tensor, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Shift and scale with other reference energies, and what changes in the configuration for them.

    One number for all elements becomes one for each, and one shift for all modalities one for each, where that is
    needed: other elements and modalities keep theirs.

    Args:
        cut: elements and modality.
        energies: (elements,) eV.
        dtype: of what is returned; None keeps that of the checkpoint.
    """
    shift, scale = (
        tensor.detach().to(dtype or tensor.dtype, copy=True)
        for tensor in (cut.content.tensors[f"{RESCALING}{key}"] for key in ("shift", "scale"))
    )
    config: dict[str, Any] = {}
    own = energies.to(shift.dtype)
    if torch.equal(cut.per_element(shift), own):
        return {}, {}
    if shift.ndim == 1 and len(shift) != cut.n_species:
        shift, scale = (values.expand(cut.n_species).clone() for values in (shift, scale))
        if "use_species_wise_shift_scale" in cut.content.config:
            config["use_species_wise_shift_scale"] = True
    if shift.ndim == 1 and cut.modality is not None:
        shift = shift.expand(cut.n_modalities, cut.n_species).clone()
        config["use_modal_wise_shift"] = True
    chosen = shift if cut.modality is None or shift.ndim == 1 else shift[cut.modality]
    chosen[cut.rows] = own
    return {f"{RESCALING}shift": shift, f"{RESCALING}scale": scale}, config


def _viewed(name: str, tensor: Tensor, *shape: int) -> Tensor:
    """
    Raises:
        UnfitError: the tensor has another size.
    """
    if tensor.ndim != 1 or tensor.numel() != math.prod(shape):
        raise UnfitError(f"the shape of {name} differs from what its architecture needs: {tuple(tensor.shape)}")
    return tensor.view(shape)


def _gate_inputs(irreps_out: str) -> list[tuple[str, int]]:
    """Irreps and widths of what goes into a gate."""
    odd = any(block.irrep == "0o" for block in parse_irreps(irreps_out))
    gate = GatedActivation(irreps_out, odd_scalar=torch.tanh if odd else None)
    return [(block.irrep, block.multiplicity) for block in parse_irreps(gate.irreps_in)]
