"""MACE models made by mace's own constructors."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.backbones.mace.architecture import GATES, READOUTS, MaceArchitecture
from forcetune.backbones.mace.library import import_mace
from forcetune.backbones.mace.tree import UnfitError
from forcetune.errors import InputError

# building swaps a function of the library and torch's default dtype for a moment
_LOCK = RLock()


def _check_covered(plain: MaceArchitecture, elements: int) -> None:
    """Refuse layers that are larger than all tensors of a file together: its constructor would exhaust memory.

    Args:
        plain: a sane architecture.
        elements: of all tensors of the file.

    Raises:
        UnfitError: there are such layers.
    """
    parts = [part.partition("x") for part in plain.hidden_irreps.split("+")]
    channels = max(int(count) for count, _, _ in parts)
    widths = (plain.num_bessel, *plain.radial_MLP)
    # every block joins channels of the same kind with each other; the species join them in at least one
    needed = max(channels**2, len(plain.atomic_numbers) * channels, *map(math.prod, pairwise(widths)))
    if needed > max(elements, 1 << 16) or len(widths) > 32:
        raise UnfitError(f"its architecture does not fit its tensors ({needed:,} weights of {elements:,})")


def _check_sane(plain: MaceArchitecture) -> None:
    """Refuse what would exhaust time or memory before the tensors are compared, and names that are no choices.

    Raises:
        UnfitError: there is such a number or name.
    """
    try:
        for irreps in (plain.hidden_irreps, plain.MLP_irreps, plain.edge_irreps or "1x0e"):
            parts = [part.partition("x") for part in irreps.split("+")]
            if sum(int(count) for count, _, _ in parts) > 16384 or any(int(irrep[:-1]) > 12 for _, _, irrep in parts):
                raise UnfitError(f"its architecture makes no sense (irreps {irreps})")
        layers = len(plain.interactions)
        sane = (
            plain.kind in ("MACE", "ScaleShiftMACE")
            and plain.readout in READOUTS
            and (plain.gate is None or plain.gate in GATES)
            and 0 < plain.r_max < 100
            and 0 < plain.num_bessel <= 1024
            and 0 <= plain.max_ell <= 8
            and 0 < layers <= 16
            and layers == len(plain.correlation) == len(plain.avg_num_neighbors)
            and len(set(plain.interactions[1:])) <= 1
            and all(0 < order <= 5 for order in plain.correlation)
            and 0 < len(plain.heads) <= 1024
            and all(0 < width <= 16384 for width in plain.radial_MLP)
            and len(set(plain.atomic_numbers)) == len(plain.atomic_numbers) > 0
            and all(0 < z < 119 for z in plain.atomic_numbers)
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise UnfitError(f"its architecture makes no sense ({error})") from error
    if not sane:
        raise UnfitError("its architecture makes no sense (a size or name is out of any range in use)")


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

    def next_or_computed(**arguments: Any) -> list[Tensor]:
        tensor = next(tensors, None)
        if tensor is not None:
            return [tensor]
        if arguments["correlation"] != 1:  # nothing else is asked for by the layer that is left out again
            raise StopIteration
        return original(**arguments)

    library.U_matrix_real = next_or_computed
    try:
        yield
    finally:
        library.U_matrix_real = original


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within this context torch makes real tensors of this precision where none is named."""
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
    elements: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """As :func:`build`, for parts of this package.

    Args:
        architecture: what to build.
        couplings: coupling tensors ``products.….U_matrix_n`` to take; without them the full basis is computed.
        elements: of all tensors that it is to have, where they come from a file; nothing larger is built.
        dtype: precision of parameters and constants.

    Raises:
        UnfitError: mace's constructor does not accept it.
    """
    _check_sane(architecture)
    if elements is not None:
        _check_covered(architecture, elements)
    modules = import_mace()
    with _LOCK, default_dtype(dtype), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch on annotations in e3nn's scripted classes
        try:
            model = _made(architecture, couplings, modules)
        except (KeyError, StopIteration, RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            raise UnfitError(f"mace's constructor failed ({type(error).__name__}: {error})") from error
    parts = dict(model.named_modules())
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


def _made(architecture: MaceArchitecture, couplings: Mapping[str, Tensor] | None, modules: Any) -> Any:
    """The model as mace's constructor makes it.

    A model of one layer keeps no vectors since 0.3.15, which no energy depends on. Older ones have them, and have them
    still as the first layer of a model of two.
    """
    arguments = _arguments(architecture, modules)
    first_of_two = len(architecture.interactions) == 1 and "+" in architecture.hidden_irreps
    if first_of_two:
        arguments |= {"num_interactions": 2, "correlation": [*architecture.correlation, 1]}
    with nullcontext() if couplings is None else _given_couplings(couplings, architecture):
        model = getattr(modules, architecture.kind)(**arguments)
    if first_of_two:
        for name in ("interactions", "products", "readouts"):
            setattr(model, name, getattr(model, name)[:1])
        model.num_interactions.fill_(1)
    return model


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
