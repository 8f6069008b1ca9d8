"""What a NequIP file holds, and its tensors cut to some elements and back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from forcetune.backbones.nequip.architecture import NequIPArchitecture
from forcetune.backbones.nequip.network import NequIPNetwork
from forcetune.irreps import parse_irreps
from forcetune.kernels.harmonics import HIGHEST_ORDER, clebsch_gordan_3j
from forcetune.kernels.tensors import TensorSource, UnfitError
from forcetune.utils.parsing import short

EMBEDDING = "type_embed.embed_module.weight"
SHIFTS, SCALES = (f"per_type_energy_scale_shift.{name}" for name in ("shifts", "scales"))
_CUTOFFS = "edge_norm._rmax_recip"
_NORM = ".avg_num_neighbors_norm.norm_const"
_CHARGES = "pair_potential.atomic_numbers"
# nothing depends on them, or they follow from the architecture
_NOT_READ = ("_empty", "output_mask", ".alpha", ".equivariant_nonlin.mul.weight", ".tp_scatter.tp.weight")
_BUFFERS = re.compile(r"(edge_norm\._rmax_recip|\.norm_const|pair_potential\.\w+)$")
_COUPLING = re.compile(r"\._w3j_(\d{1,2})_(\d{1,2})_(\d{1,2})$")
_DEEP = re.compile(r"\.mlp\.weights\.(\d+)$")


@dataclass(frozen=True, slots=True)
class NequIPContent:
    """A model as a file has it.

    Attributes:
        architecture: as plain values.
        tensors: of the model by the names of the network: parameters and buffers, as the file has them. Shifts and
            scales are empty where it has none.
        names: for each of them that the file has the name there.
    """

    architecture: NequIPArchitecture
    tensors: dict[str, Tensor]
    names: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over architecture and tensors, 64 hexadecimal digits; numbers enter as float64."""
        digest = hashlib.sha256(self.architecture.to_json().encode())
        for name, tensor in sorted(self.tensors.items()):
            values = tensor.detach().cpu().to(torch.float64).contiguous().numpy()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return torch.float64 if self.architecture.dtype == "float64" else torch.float32


def network_name(name: str) -> str:
    """The name in the network of a tensor of a file."""
    return _DEEP.sub(lambda match: f".mlp.{2 * int(match[1])}.weight", name)


def sorted_content(
    architecture: NequIPArchitecture,
    state: Mapping[str, object],
    *,
    norms: Tensor | None = None,
    trained: frozenset[str] | None = None,
) -> NequIPContent:
    """Sort the tensors of a file.

    Args:
        architecture: of the model.
        state: tensors by the names of the file.
        norms: 1/√(neighbors), where the file does not have them as tensors.
        trained: tensors that are parameters although most files have them as buffers; None where the tensors
            themselves say what they are.

    Raises:
        UnfitError: something in it is no tensor of real numbers, or contradicts the architecture.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UnfitError(f"its entry {short(str(key))} is no tensor")
        name = network_name(str(key))
        if name.endswith(_NOT_READ) or (not value.numel() and name.endswith((".weight", ".bias"))):
            continue
        if not value.is_floating_point() or value.layout != torch.strided:
            raise UnfitError(f"its tensor {key} holds no real numbers but {value.dtype}")
        if not bool(value.isfinite().all()):
            raise UnfitError(f"its tensor {key} has values that are not finite")
        if "._w3j_" in name:
            _check_coupling(name, value)
        elif name == _CHARGES:
            if value.flatten().tolist() != [float(z) for z in architecture.elements]:
                raise UnfitError("its ZBL potential knows other elements than its types")
        else:
            tensors[name] = value if trained is None else _as_it_is(name, value, trained)
            names[name] = str(key)
    for layer in range(architecture.n_layers):
        name = f"layer{layer}_convnet.conv{_NORM}"
        if norms is not None and name not in tensors:
            tensors[name] = norms
    for name in (SHIFTS, SCALES):
        if name not in tensors:
            raise UnfitError(f"it has no {name}")
    return NequIPContent(architecture, tensors, names)


def _check_coupling(name: str, value: Tensor) -> None:
    """A checkpoint carries 3j symbols and a package does not, so that they are computed; they have to be the same.

    Raises:
        UnfitError: they are not.
    """
    orders = _COUPLING.search(name)
    if orders is None or max(map(int, orders.groups())) > HIGHEST_ORDER:
        raise UnfitError(f"its constant {name} is not known")
    first, second, third = map(int, orders.groups())
    if not abs(first - second) <= third <= first + second:
        raise UnfitError(f"its constant {name} couples orders that do not couple")
    expected = clebsch_gordan_3j(first, second, third)
    if value.shape != expected.shape or not torch.allclose(value.detach().double(), expected, atol=1e-5):
        raise UnfitError(f"its constant {name} has other values than a coupling of these orders")


def _as_it_is(name: str, value: Tensor, trained: frozenset[str]) -> Tensor:
    """A tensor of a state dictionary as parameter or buffer."""
    buffer = _BUFFERS.search(name) or name in (SHIFTS, SCALES, "bessel_encode.bessel_weights")
    if name in trained or not buffer:
        return nn.Parameter(value.detach())
    return value.detach()


def couplings_for(architecture: NequIPArchitecture) -> dict[str, Tensor]:
    """3j symbols of all layers, with the signs that nequip's e3nn gives them, by the names that layers ask for."""
    angular = parse_irreps(architecture.harmonics)[-1].order
    couplings: dict[str, Tensor] = {}
    for layer, (before, after) in enumerate(pairwise(architecture.features)):
        orders = [{block.order for block in parse_irreps(irreps)} for irreps in (before, after)]
        for first in orders[0]:
            for second in range(angular + 1):
                for third in orders[1]:
                    if abs(first - second) <= third <= first + second:
                        name = f"layer{layer}_convnet.conv.tp_scatter.tp._w3j_{first}_{second}_{third}"
                        couplings[name] = clebsch_gordan_3j(first, second, third)
    return couplings


class Cut:
    """Places of the tensors of a network in those of a file.

    Args:
        content: of the file.
        elements: atomic numbers that the network knows, ascending.
    """

    def __init__(self, content: NequIPContent, elements: Sequence[int]) -> None:
        self.content, self.elements = content, tuple(elements)
        table = list(content.architecture.elements)
        self.rows = torch.tensor([table.index(z) for z in self.elements])
        self.n_types = len(table)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the network: parameters where they are trained, buffers else.

        Raises:
            UnfitError: a table does not fit the types.
        """
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.content.tensors.items():
            value = tensor.detach()
            if name == EMBEDDING or (name.endswith(_NORM) and tensor.ndim == 2 and len(tensor) > 1):
                value = self._choose_rows(name, value)
            elif name in (SHIFTS, SCALES):
                value = self.per_element(name)
            elif name == _CUTOFFS and tensor.ndim:
                if tensor.shape != (self.n_types**2,):
                    raise UnfitError("its table of cutoffs does not fit its types")
                value = value.view(self.n_types, self.n_types)[self.rows][:, self.rows].flatten()
            trained = isinstance(tensor, nn.Parameter) and name not in (SHIFTS, SCALES)
            tensors[name] = nn.Parameter(value) if trained else value
        return tensors

    def _choose_rows(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim != 2 or len(tensor) != self.n_types:
            raise UnfitError(f"the shape of {name} differs from what its architecture needs: {tuple(tensor.shape)}")
        return tensor[self.rows]

    def per_element(self, name: str) -> Tensor:
        """Shifts or scales of the chosen elements, (elements,); 0 or 1 where the file has none.

        Raises:
            UnfitError: their shape is none that belongs to the types.
        """
        tensor = self.content.tensors[name].detach()
        if tensor.shape == (0,):
            return torch.full((len(self.rows),), float(name == SCALES), dtype=torch.float64)
        if tensor.ndim != 2 or tensor.shape[1] != 1 or len(tensor) not in (1, self.n_types):
            raise UnfitError(f"its {name} has shape {tuple(tensor.shape)}")
        return tensor.expand(self.n_types, 1)[self.rows, 0]

    def build(self) -> NequIPNetwork:
        """The network.

        Raises:
            UnfitError: tensors and architecture do not belong together.
        """
        source = TensorSource(self.tensors(), couplings_for(self.content.architecture))
        return NequIPNetwork(self.content.architecture, self.elements, source)

    def written_back(
        self, network: NequIPNetwork, energies: Mapping[int, float], dtype: torch.dtype | None = None
    ) -> NequIPContent:
        """The file's tensors with what the network has in their places; everything else stays as it was.

        Shifts become one for each type where reference energies have changed that their shape has no place for.

        Args:
            network: that :meth:`build` made.
            energies: of isolated atoms, eV, by atomic number.
            dtype: of the written weights; None keeps that of the file.
        """
        own = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
        stored, wanted = self.content.dtype, dtype or self.content.dtype
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.content.tensors.items():
            value = tensor.detach().cpu().clone()
            value = value.to(wanted) if value.dtype == stored and name not in (SHIFTS, SCALES) else value
            if name == EMBEDDING:
                value[self.rows] = own[name].to(value.dtype)
            elif isinstance(tensor, nn.Parameter) and name not in (SHIFTS, SCALES):
                value.copy_(own[name].view(value.shape))
            tensors[name] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
        tensors[SHIFTS] = self._shifts(energies)
        return replace(self.content, tensors=tensors)

    def _shifts(self, energies: Mapping[int, float]) -> Tensor:
        stored = self.content.tensors[SHIFTS]
        wanted = torch.tensor([energies[z] for z in self.elements], dtype=torch.float64)
        if torch.equal(self.per_element(SHIFTS).double(), wanted):
            return stored
        value = stored.detach().cpu()
        value = value.new_zeros(self.n_types, 1) if not value.numel() else value.expand(self.n_types, 1).clone()
        value[self.rows, 0] = wanted.to(value.dtype)
        return nn.Parameter(value) if isinstance(stored, nn.Parameter) else value
