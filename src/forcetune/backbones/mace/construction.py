"""MACE models made by mace's own constructors."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.backbones.mace.architecture import MaceArchitecture, check_sane
from forcetune.backbones.mace.library import import_mace
from forcetune.backbones.mace.module_spec import node_from_module
from forcetune.errors import InputError
from forcetune.kernels.tensors import UnfitError

# building swaps a function of the library and torch's default dtype for a moment
_LOCK = RLock()
_DERIVED = ("output_mask", "_zeroed")


def _gate(name: str | None) -> Any:
    if name is None:
        return None
    return getattr(torch, name) if name in ("tanh", "abs", "sigmoid") else getattr(torch.nn.functional, name)


@contextmanager
def _given_couplings(couplings: Mapping[str, Tensor], architecture: MaceArchitecture) -> Iterator[None]:
    """Let mace's contractions take their coupling tensors from a model instead of computing them.

    Their basis depends on the libraries installed, and weights fit the basis that they were trained with.
    """
    library: Any = importlib.import_module("mace.modules.symmetric_contraction")

    def given() -> Iterator[Tensor]:
        for layer, order in enumerate(architecture.correlation):
            block = 0
            while f"products.{layer}.symmetric_contractions.contractions.{block}.U_matrix_1" in couplings:
                for nu in range(1, order + 1):
                    yield couplings[f"products.{layer}.symmetric_contractions.contractions.{block}.U_matrix_{nu}"]
                block += 1

    tensors = given()
    original = library.U_matrix_real
    library.U_matrix_real = lambda **_: [next(tensors)]
    try:
        yield
    finally:
        library.U_matrix_real = original


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(architecture: MaceArchitecture, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A MACE model of this architecture with random weights, on the CPU; the random state is left as it was.

    Args:
        architecture: what to build; its contractions have the full basis, whatever libraries are installed.
        dtype: precision of parameters and constants.

    Raises:
        InputError: sizes that make no sense, or that mace's constructor does not accept.
    """
    try:
        return construct(architecture, dtype=dtype)
    except UnfitError as error:
        raise InputError(f"a {architecture.kind} cannot be built: {error}.") from error


def construct(
    architecture: MaceArchitecture,
    *,
    couplings: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """As :func:`build`, for parts of this package.

    Args:
        architecture: what to build.
        couplings: coupling tensors ``products.….U_matrix_n`` to take; without them the full basis is computed.
        dtype: precision of parameters and constants.

    Raises:
        UnfitError: mace's constructor does not accept it.
    """
    check_sane(architecture)
    if architecture.mixed_heads > 1:
        raise UnfitError("it was written by mace 0.3.14, whose readouts of several heads today's mace does not have")
    modules = import_mace()
    with _LOCK, _default_dtype(dtype), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch on annotations in e3nn's scripted classes
        try:
            arguments = _arguments(architecture, modules)
            if couplings is None:
                model = getattr(modules, architecture.kind)(**arguments)
            else:
                with _given_couplings(couplings, architecture):
                    model = getattr(modules, architecture.kind)(**arguments)
        except (KeyError, StopIteration, RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            raise UnfitError(f"mace's constructor failed ({type(error).__name__}: {error})") from error
    parts = dict(model.named_modules(remove_duplicate=False))
    model.use_reduced_cg = architecture.use_reduced_cg
    for block, neighbours in zip(model.interactions, architecture.avg_num_neighbors, strict=True):
        if "avg_num_neighbors" not in block._buffers:
            block.avg_num_neighbors = neighbours
    for name, value in architecture.constants:
        owner, _, attribute = name.rpartition(".")
        if owner not in parts:
            raise UnfitError(f"today's mace has no place for its constant {name}")
        if attribute in ("cst", "coeff") and hasattr(parts[owner], attribute):
            setattr(parts[owner], attribute, value)
    return model.eval()


def _arguments(architecture: MaceArchitecture, modules: Any) -> dict[str, Any]:
    from e3nn import o3

    plain = architecture
    arguments: dict[str, Any] = {
        name: getattr(plain, name)
        for name in (
            "r_max",
            "num_bessel",
            "max_ell",
            "pair_repulsion",
            "distance_transform",
            "radial_type",
            "apply_cutoff",
            "use_so3",
            "use_agnostic_product",
            "use_last_readout_only",
            "use_edge_irreps_first",
            "keep_last_layer_irreps",
        )
    }
    exponent = plain.num_polynomial_cutoff
    arguments |= {
        "num_polynomial_cutoff": int(exponent) if exponent == int(exponent) else exponent,
        "interaction_cls_first": modules.interaction_classes[plain.interactions[0]],
        "interaction_cls": modules.interaction_classes[plain.interactions[-1]],
        "num_interactions": len(plain.interactions),
        "num_elements": len(plain.atomic_numbers),
        "hidden_irreps": o3.Irreps(plain.hidden_irreps),
        "MLP_irreps": o3.Irreps(plain.MLP_irreps),
        "atomic_energies": torch.zeros(len(plain.heads), len(plain.atomic_numbers)).numpy(),
        "avg_num_neighbors": plain.avg_num_neighbors[0],
        "atomic_numbers": list(plain.atomic_numbers),
        "correlation": list(plain.correlation),
        "gate": _gate(plain.gate),
        "radial_MLP": list(plain.radial_MLP),
        "heads": list(plain.heads),
        "use_reduced_cg": False,
        "readout_cls": getattr(modules.blocks, plain.readout),
        "edge_irreps": None if plain.edge_irreps is None else o3.Irreps(plain.edge_irreps),
    }
    if plain.kind == "ScaleShiftMACE":
        arguments |= {"atomic_inter_scale": [1.0] * len(plain.heads), "atomic_inter_shift": [0.0] * len(plain.heads)}
    return arguments


def assemble(
    architecture: MaceArchitecture, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Build a model of mace and give it these tensors, all of them.

    Args:
        architecture: what to build.
        tensors: parameters (as ``nn.Parameter``) and buffers by dotted name; copied, with their dtype.
        constants: 3j symbols by the name of their layer and their own; copied where they fit.

    Raises:
        UnfitError: a tensor has no place, has another shape, or one is missing.
        InputError: mace-torch is not installed.
    """
    couplings = {name: tensor.detach().cpu() for name, tensor in tensors.items() if ".U_matrix_" in name}
    model = construct(architecture, couplings=couplings, dtype=tensors["node_embedding.linear.weight"].dtype)
    places = node_from_module(model).all_tensors()
    for name, tensor in tensors.items():
        if name in places:
            _place(model, name, tensor, places[name])
        elif tensor.numel() and not name.endswith(_DERIVED):
            raise UnfitError(f"there is no place for its tensor {name}")
    missing = sorted(n for n, t in places.items() if n not in tensors and t.numel() and not n.endswith(_DERIVED))
    if missing:
        raise UnfitError(f"it has no {', '.join(missing[:5])}")
    _copy_constants(model, constants or {})
    return model


def _place(model: nn.Module, name: str, tensor: Tensor, current: Tensor) -> None:
    """Put a tensor where its name says; whether it is a parameter follows the tensor."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    value = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    owner._parameters.pop(attribute, None)
    owner._buffers.pop(attribute, None)
    if isinstance(tensor, nn.Parameter):
        # weights that the library holds at zero are parameters without gradient
        trains = current.requires_grad or not isinstance(current, nn.Parameter)
        owner.register_parameter(attribute, nn.Parameter(value, requires_grad=trains))
    else:
        owner.register_buffer(attribute, value)


def _copy_constants(model: nn.Module, constants: Mapping[str, Tensor]) -> None:
    """Carry over rounding: a model converted from float32 to float64 keeps 3j symbols of 7 digits."""
    for name, place in model.named_buffers():
        plain = ".".join(part for part in name.split(".") if not part.startswith("_compiled"))
        tensor = constants.get(plain)
        if tensor is not None and place.shape == tensor.shape:
            place.copy_(tensor.detach())
