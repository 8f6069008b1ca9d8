"""What a MACE model is made of: plain values and tensors, whichever form it came in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from forcetune.backbones.mace.architecture import MaceArchitecture, check_sane, read_architecture
from forcetune.backbones.mace.module_spec import Node, node_from_module
from forcetune.backbones.mace.network import MaceNetwork
from forcetune.kernels.tensors import TensorSource, UnfitError

# what follows from the other tensors, and that files of older versions may lack
_DERIVED = ("output_mask", "_zeroed")


@dataclass(frozen=True, slots=True)
class MaceContent:
    """All that tells one model from another.

    Attributes:
        architecture: as plain values.
        tensors: parameters (as ``nn.Parameter``) and buffers by dotted name, in the file's precision.
        constants: 3j symbols that the file carries, by the name of their layer and their own.
        rounded_charges: short-range repulsion is computed as by the version of forcetune that wrote the file, which
            took mace's own with products of charges in float32.
    """

    architecture: MaceArchitecture
    tensors: dict[str, Tensor]
    constants: dict[str, Tensor] = field(default_factory=dict)
    rounded_charges: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the model: that of its embedding.

        Raises:
            UnfitError: it has none, or neither float32 nor float64.
        """
        weight = self.tensors.get("node_embedding.linear.weight")
        if weight is None or weight.dtype not in (torch.float32, torch.float64):
            raise UnfitError("it is neither in float32 nor in float64")
        return weight.dtype

    def widened(self, dtype: torch.dtype) -> MaceContent:
        """In this precision where it is a higher one than the model's, so that what is computed is not rounded."""
        if torch.finfo(dtype).bits <= torch.finfo(self.dtype).bits:
            return self
        tensors = {
            name: _like(tensor, tensor.detach().to(dtype) if tensor.dtype.is_floating_point else tensor)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over architecture, parameters, buffers and coupling tensors, as 64 hexadecimal digits.

        Numbers enter as float64 (integers and flags as int64), so that a float32 model has the same fingerprint before
        and after conversion to float64; conversion to float32 changes it where it rounds. Buffers that follow from
        others are left out, so are 3j symbols, the device and whether a tensor is trainable.
        """
        return fingerprint_tensors(self.architecture.to_json(), self.tensors)


def _like(old: Tensor, new: Tensor) -> Tensor:
    """A parameter where the old one is one."""
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def fingerprint_tensors(description: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a description and tensors by name."""
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        if name.endswith(_DERIVED) or not tensor.numel():
            continue
        wide = torch.float64 if tensor.dtype.is_floating_point else torch.int64
        values = tensor.detach().cpu().to(wide).contiguous().numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {wide}".encode())
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def content_from_node(node: Node) -> MaceContent:
    """The content of a model in a file or in memory.

    Raises:
        UnfitError: it has parts that forcetune does not compute.
    """
    content = content_from_tensors(read_architecture(node), node.all_tensors(), node.all_constants())
    _ = content.dtype  # refused where it is another
    return content


def content_from_tensors(
    architecture: MaceArchitecture, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> MaceContent:
    """The content of a model from all tensors of a file, and what its compiled code holds."""
    couplings = {}
    for name, tensor in constants.items():
        parts = [part for part in name.split(".") if not part.startswith("_compiled")]
        if parts[-1].startswith("_w3j_"):
            couplings[".".join(parts)] = tensor
    return MaceContent(architecture, _kept(tensors), couplings)


def _kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without empty tensors, and masks of irreps that are absent."""
    return {name: t for name, t in tensors.items() if t.numel() and not name.endswith("output_mask")}


def content_from_network(network: MaceNetwork) -> MaceContent:
    """The content of a network; an adapter on it is left out."""
    tensors = _kept(node_from_module(network).all_tensors())
    return MaceContent(network.architecture, tensors, network.constants(), network.rounded_charges)


def draw_network(architecture: MaceArchitecture, *, seed: int = 0) -> MaceNetwork:
    """A network with random weights, distributed as mace's constructor draws them, in float64.

    Its contractions have the full basis of couplings. PyTorch's random state stays as it was.

    Raises:
        UnfitError: sizes or names make no sense.
    """
    check_sane(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaceNetwork(architecture, TensorSource(None)).double()


def build_network(content: MaceContent) -> MaceNetwork:
    """The network of a model, on the CPU, in the precision of its tensors.

    Raises:
        UnfitError: tensors and architecture do not belong together.
    """
    source = TensorSource(content.tensors, content.constants)
    try:
        return MaceNetwork(content.architecture, source, rounded_charges=content.rounded_charges)
    except (ValueError, IndexError, KeyError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UnfitError(f"its sizes do not belong together ({error})") from error
