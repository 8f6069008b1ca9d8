"""MACE models that mace itself computes, because forcetune does not know all of their parts."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.backbones.mace.content import fingerprint_tensors
from forcetune.backbones.mace.library import import_mace
from forcetune.backbones.mace.module_spec import node_from_module
from forcetune.backbones.network import NetworkBackbone, per_volume
from forcetune.backbones.protocol import ADAPTER, Base, Extension, Prediction
from forcetune.errors import ForcetuneError, InputError
from forcetune.graphs.graph import Batch, with_spin_leaf
from forcetune.irreps import parse_irreps
from forcetune.kernels.site import Site, WeightPath, numbered
from forcetune.utils.files import atomic_path


def load_pickled(file: Path) -> nn.Module:
    """Load a model by ``torch.load``, which runs code from the file.

    Raises:
        InputError: mace-torch is not installed, or the file is none that it can load.
    """
    import_mace()
    try:
        model = torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # a pickle may raise anything
        raise InputError(
            f"{file} cannot be loaded as pickled code either ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{file} holds a {type(model).__name__} and no model; pass the .model file that mace wrote.")
    return model.eval()


def library_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the class and all tensors of a module."""
    node = node_from_module(model)
    return fingerprint_tensors(f"{node.package}.{node.kind}", node.all_tensors())


class LibraryMace(NetworkBackbone):
    """A module of mace, computed by its own forward pass; adapters act on its layers all the same.

    Elements cannot be cut and heads not be selected: a model with several heads is used with the one that is asked for.
    """

    library = "mace"

    def __init__(
        self,
        model: nn.Module,
        base: Base,
        *,
        reason: str,
        head: str | None,
        elements: Sequence[int] | None,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> None:
        module: Any = model
        if not hasattr(module, "atomic_energies_fn") or not hasattr(module, "r_max"):
            raise InputError(f"{base.name} is a {type(model).__name__} and no potential of mace ({reason}).")
        heads = [str(name) for name in getattr(module, "heads", None) or ["Default"]]
        if head is None and len(heads) > 1:
            raise InputError(f"{base.name} has the heads {', '.join(heads)}; choose one with --head (model.head).")
        if head is not None and head not in heads:
            raise InputError(f"the model has no head {head!r}; it has {', '.join(heads)}.")
        self._head_index = 0 if head is None else heads.index(head)
        table = tuple(int(z) for z in module.atomic_numbers)
        unknown = sorted(set(elements or ()) - set(table))
        if unknown:
            raise InputError(f"{base.name} does not know the atomic numbers {', '.join(map(str, unknown))}.")
        self.reason = reason
        self.stored_dtype: torch.dtype = module.atomic_energies_fn.atomic_energies.dtype
        module = module.to(dtype=dtype, device=torch.device(device)).eval()
        name = heads[self._head_index]
        super().__init__(module, base, elements=table, cutoff=float(module.r_max), head=name)
        self._every_species = torch.arange(len(self.elements), device=self.device)

    @property
    def paired(self) -> bool | None:
        return None

    @property
    def dtype(self) -> torch.dtype:
        return self.model.atomic_energies_fn.atomic_energies.dtype

    @property
    def device(self) -> torch.device:
        return self.model.atomic_energies_fn.atomic_energies.device

    def _stored_references(self) -> dict[int, float]:
        stored = torch.atleast_2d(self.model.atomic_energies_fn.atomic_energies)[self._head_index].double()
        return {z: float(energy) for z, energy in zip(self.elements, stored, strict=True)}

    def _store_references(self, energies: Tensor) -> None:
        torch.atleast_2d(self.model.atomic_energies_fn.atomic_energies)[self._head_index].copy_(energies)

    def predict(self, batch: Batch, *, stress: bool = False, create_graph: bool = False) -> Prediction:
        self._check_elements(batch)
        species = self._species[batch.numbers]
        if self.extension is not None:
            prediction = self._by_library_extended(self.extension, batch, species, stress, create_graph)
        else:
            with torch.enable_grad():
                out = self.model(self._inputs(batch, species), training=create_graph, compute_stress=stress)
            own = None if create_graph else self._interaction_of_atoms(out, species)
            stresses = out["stress"] if stress else None
            prediction = Prediction(self._interaction_energy(out), out["forces"], stresses, energies=own)
        per_atom = self._energies_of_species[species]
        total = torch.zeros(batch.n_graphs, dtype=torch.float64, device=per_atom.device)
        total = total.index_add(0, batch.graph_index, per_atom)
        energies = None if prediction.energies is None else per_atom + prediction.energies
        return prediction._replace(energy=total + prediction.energy.double(), energies=energies)

    def _interaction_of_atoms(self, out: Mapping[str, Tensor], species: Tensor) -> Tensor:
        """(atoms,) share of each in the interaction energy, eV, float64."""
        stored = torch.atleast_2d(self.model.atomic_energies_fn.atomic_energies)[self._head_index]
        return out["node_energy"].double() - stored[species].double()

    @torch.enable_grad()
    def _by_library_extended(
        self, extension: Extension, batch: Batch, species: Tensor, stress: bool, create_graph: bool
    ) -> Prediction:
        """Interaction energy of the model and its extension, differentiated together."""
        positions = batch.positions.detach().clone().requires_grad_()
        leaves, moved, cell = [positions], positions, batch.cell
        strain = torch.zeros_like(batch.cell)
        if stress:
            leaves.append(strain.requires_grad_())
            symmetric = (strain + strain.transpose(1, 2)) / 2
            moved = positions + torch.einsum("ai,aij->aj", positions, symmetric[batch.graph_index])
            cell = batch.cell + batch.cell @ symmetric
        batch = with_spin_leaf(batch)
        leaves.append(batch.spins)
        data = self._inputs(batch, species, moved, cell)
        out = self.model(data, training=create_graph, compute_force=False)
        sender, receiver = batch.edge_index
        vectors = moved[receiver] - moved[sender] + data["shifts"]
        extra = extension(out["node_feats"][:, self._scalar_columns()], vectors, batch)
        energy = self._interaction_energy(out)
        if extra.energy is not None:
            energy = energy + extra.energy
        slopes = torch.autograd.grad(
            energy.sum(), leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        stresses = per_volume(slopes[1], batch.cell) if stress else None
        # an energy without moments is that of a head, which knows no spins
        fields = None if extra.energy is None or extra.moments is None else -slopes[-1]
        return Prediction(energy, -slopes[0], stresses, extra.moments, fields)

    def _scalar_columns(self) -> Tensor:
        """Columns of the node features of all layers, as the model puts them out, that hold even scalars."""
        columns: list[int] = []
        start = 0
        for product in self.model.products:
            blocks = parse_irreps(str(product.linear.irreps_out))
            for block in blocks:
                if block.is_even_scalar:
                    columns += range(start + block.start, start + block.stop)
            start += blocks[-1].stop
        return torch.tensor(columns, device=self.device)

    @property
    def n_scalars(self) -> int:
        return len(self._scalar_columns())

    @staticmethod
    def _interaction_energy(out: Mapping[str, Tensor]) -> Tensor:
        if "interaction_energy" in out:
            return out["interaction_energy"]
        return out["contributions"][:, 1:].sum(dim=-1)

    def _inputs(
        self, batch: Batch, species: Tensor, positions: Tensor | None = None, cell: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the library's forward takes; positions and cell are those of the batch unless they are given."""
        cell = batch.cell if cell is None else cell
        # the library marks positions as requiring gradients in place: give it its own tensor
        positions = batch.positions.detach().clone() if positions is None else positions
        cell_of_edge = cell[batch.graph_index[batch.edge_index[0]]]
        head = torch.full((batch.n_graphs,), self._head_index, dtype=torch.int64, device=batch.ptr.device)
        return {
            "positions": positions,
            "node_attrs": (species.unsqueeze(1) == self._every_species).to(batch.positions.dtype),
            "edge_index": batch.edge_index,
            "shifts": torch.einsum("ei,eij->ej", batch.unit_shifts, cell_of_edge),
            "unit_shifts": batch.unit_shifts,
            "cell": cell.reshape(-1, 3),
            "batch": batch.graph_index,
            "ptr": batch.ptr,
            "head": head,
        }

    def cut_to(self, elements: Sequence[int]) -> LibraryMace:
        """A copy: the elements of such a model cannot be cut.

        Raises:
            InputError: it does not know one of them.
        """
        options = {"head": self.head, "elements": elements, "dtype": self.dtype, "device": self.device}
        return LibraryMace(copy.deepcopy(self.model), self.base, reason=self.reason, **options)  # pyright: ignore[reportArgumentType]

    def fingerprint(self) -> str:
        return library_fingerprint(self.model)

    def sites(self) -> tuple[Site, ...]:
        return library_sites(self.model)

    def fresh_weights(self, seed: int | None) -> dict[str, Tensor]:
        """
        Raises:
            InputError: always: what mace would draw is not known for parts that forcetune does not know.
        """
        raise InputError(f"{self.base.name} is computed by mace ({self.reason}), so it cannot be trained from scratch.")

    def save(self, path: str | Path) -> None:
        """Write a plain model by pickling the module, atomically.

        Raises:
            ForcetuneError: an adapter is attached to it.
        """
        for name, module in self.model.named_modules():
            hooks = any(getattr(module, table) for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))
            if hooks or name.split(".")[0] == ADAPTER:
                raise ForcetuneError("the model cannot be written while an adapter is attached; merge it first.")
        with atomic_path(path) as temporary:
            torch.save(self.model if self.device.type == "cpu" else _on_cpu(self.model), temporary)

    def save_into_source(self, path: str | Path) -> bool:
        """False: :meth:`save` pickles the module, which is the file's own."""
        del path
        return False

    def read_back(self, path: str | Path) -> LibraryMace:
        """What was written by :meth:`save`."""
        options = {"head": self.head, "elements": None, "dtype": self.dtype, "device": "cpu"}
        return LibraryMace(load_pickled(Path(path)), self.base, reason=self.reason, **options)


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy; some parameters of mace cannot be copied by ``copy.deepcopy``."""
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, map_location="cpu", weights_only=False)


# ---- sites ----------------------------------------------------------------------------------------------------------


def library_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every learnable weight of a module of mace; layers are recognised by class name and by what they carry."""
    sites: list[Site] = []
    modules = [(name, module) for name, module in model.named_modules() if name.split(".")[0] != ADAPTER]
    for name, module in modules:
        sites.extend(_list_sites(name, module))
    names = {site.name for site in sites}
    for name, module in modules:
        if isinstance(module, nn.ParameterList):
            continue
        for parameter, tensor in module.named_parameters(recurse=False):
            full = f"{name}.{parameter}".lstrip(".")
            if full not in names:
                whole = WeightPath("all", 0, tuple(tensor.shape) or (1,))
                kind = "radial_basis" if "bessel" in parameter or "gaussian" in parameter else "other"
                sites.append(Site(full, name, parameter, name, kind, (whole,)))
    count = len(model.get_submodule("interactions")) if "interactions" in model._modules else 0  # pyright: ignore[reportArgumentType]
    return tuple(replace(site, layers_behind=_layers_behind(site.name, count)) for site in sites)


def _layers_behind(name: str, n_layers: int) -> int:
    """Readouts count with the last layer; what comes before the layers counts as one more."""
    first, *rest = name.split(".")
    if first in ("interactions", "products"):
        return n_layers - 1 - int(rest[0])
    return 0 if first in ("readouts", "scale_shift", "embedding_readout") else n_layers


def _list_sites(name: str, module: Any) -> Iterator[Site]:
    kind = type(module).__name__
    if kind == "Linear" and hasattr(module, "irreps_in") and "weight" in module._parameters:
        yield _equivariant_linear(name, module)
    elif kind == "FullyConnectedTensorProduct" and "weight" in module._parameters:
        yield _tensor_product(name, module)
    elif kind == "_Layer" or isinstance(module, nn.Linear):
        transposed = isinstance(module, nn.Linear)
        label = "out->in" if transposed else "in->out"
        weight: Tensor = module._parameters["weight"]  # pyright: ignore[reportAssignmentType]
        path = WeightPath(label, 0, tuple(weight.shape), transposed)
        yield Site(f"{name}.weight", name, "weight", name, "radial_mlp", (path,))
    elif kind == "Contraction":
        yield from _contraction(name, module)


def _equivariant_linear(name: str, module: Any) -> Site:
    """Blocks of equal irreps that follow one another are one path, as if the irreps were simplified.

    The weight's memory is the same either way, and so is the normalisation, which counts all inputs of an output.
    """
    labels: list[str] = []
    starts: list[int] = []
    shapes: list[tuple[int, int]] = []
    outputs: list[int] = []
    start = 0
    for instruction in module.instructions:
        if instruction.i_in < 0:
            continue
        fan_in, fan_out = instruction.path_shape
        label = f"{module.irreps_in[instruction.i_in].ir}->{module.irreps_out[instruction.i_out].ir}"
        if fan_in * fan_out == 0:
            continue
        if labels and labels[-1] == label and outputs[-1] == instruction.i_out:
            shapes[-1] = (shapes[-1][0] + fan_in, fan_out)
        else:
            labels.append(label)
            starts.append(start)
            shapes.append((fan_in, fan_out))
            outputs.append(instruction.i_out)
        start += fan_in * fan_out
    takes = name == "node_embedding.linear" or name.split(".")[-1] in ("source_embedding", "target_embedding")
    paths = tuple(
        WeightPath(*entry, by_element=(1, *entry[2]) if takes else None)
        for entry in zip(numbered(labels), starts, shapes, strict=True)
    )
    kind = "readout" if name.split(".")[0] in ("readouts", "embedding_readout") else "linear"
    return Site(f"{name}.weight", name, "weight", name, kind, paths, str(module.irreps_in), str(module.irreps_out))


def _tensor_product(name: str, module: Any) -> Site:
    labels: list[str] = []
    shapes: list[tuple[int, int, int]] = []
    for instruction in module.instructions:
        if not instruction.has_weight:
            continue
        first, second, out = instruction.path_shape
        labels.append(
            f"{module.irreps_in1[instruction.i_in1].ir}*{module.irreps_in2[instruction.i_in2].ir}"
            f"->{module.irreps_out[instruction.i_out].ir}"
        )
        shapes.append((first, second, out))
    starts = [sum(math.prod(shape) for shape in shapes[:k]) for k in range(len(shapes))]
    paths = tuple(
        WeightPath(label, start, (first * second, out), by_element=(first, second, out))
        for label, start, (first, second, out) in zip(numbered(labels), starts, shapes, strict=True)
    )
    irreps = (str(module.irreps_in1), str(module.irreps_out))
    return Site(f"{name}.weight", name, "weight", name, "tensor_product", paths, *irreps)


def _contraction(name: str, module: Any) -> Iterator[Site]:
    order = len(module.weights) + 1

    def site(owner: str, parameter: str, nu: int, kind: str, weight: Any) -> Site:
        elements, *rest = weight.shape
        path = WeightPath(f"order{nu}", 0, tuple(weight.shape), by_element=(1, elements, math.prod(rest)))
        return Site(f"{owner}.{parameter}", owner, parameter, name, kind, (path,))

    def zeroed(which: str) -> bool:
        flag = getattr(module, f"weights_{which}_zeroed", None)
        return flag is not None and bool(flag)

    if not zeroed("max"):
        yield site(name, "weights_max", order, "contraction", module.weights_max)
    for k in range(order - 1):
        if not zeroed(str(k)):
            yield site(f"{name}.weights", str(k), order - 1 - k, "contraction_lower", module.weights[k])
