"""The methods: functions that make the table of each, and the options they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BaseModel, Field, ValidationError, create_model

from forcetune.adapters.method import KINDS, Method, update_from_json
from forcetune.adapters.updates import (
    UPDATES,
    Bottleneck,
    Dense,
    Gain,
    Gate,
    LowRank,
    Shift,
    SoftThreshold,
    Update,
)
from forcetune.adapters.updates.base import OPTION_RULES
from forcetune.config import MethodConfig, explain
from forcetune.errors import InputError

__all__ = ["KINDS", "METHODS", "Method", "build_method", "custom_method", "method", "option_names"]

# Options of the update that a method makes pass through it: ``**gate: Annotated[Any, Gate]`` takes those of Gate.
EVERYWHERE_DENSE = {kind: (Dense(),) for kind in KINDS}


def mmea(skip: bool = False, **gate: Annotated[Any, Gate]) -> Method:
    """MMEA as published: gates on every equivariant linear layer, ELoRA (r = α = 16) on tensor products, radial MLPs
    and the highest-order contraction, dense lower orders and Bessel frequencies.

    Args:
        skip: gates on the skip connections, too, driven by the scalars and the species.
        **gate: options of :class:`Gate`.
    """
    low_rank = LowRank(16, 16.0)
    skip_gates = (Gate(species=True, **gate),) if skip else ()
    return Method(
        "mmea",
        {
            "linear": (Gate(**gate),),
            "readout": (Gate(**gate),),
            "tensor_product": (low_rank, *skip_gates),
            "radial_mlp": (low_rank,),
            "contraction": (low_rank,),
            "contraction_lower": (Dense(),),
            "radial_basis": (Dense(),),
            "modality": (Dense(),),
        },
        "gates on linears, low rank elsewhere, as published (AAAI 2026)",
        optimizer="soap",
    )


def mmea_pure(skip: bool = False, **gate: Annotated[Any, Gate]) -> Method:
    """Gates on every equivariant linear layer and nothing else.

    Args:
        skip: gates on the skip connections, too.
        **gate: options of :class:`Gate`.
    """
    table: dict[str, tuple[Update, ...]] = {"linear": (Gate(**gate),), "readout": (Gate(**gate),)}
    if skip:
        table["tensor_product"] = (Gate(species=True, **gate),)
    return Method("mmea-pure", table, "gates on linears only", optimizer="soap")


def elora(budget: Annotated[int, Field(ge=1)] | None = None, **low_rank: Annotated[Any, LowRank]) -> Method:
    """ELoRA (ICML 2025): low rank on every path, dense lower-order contractions and Bessel frequencies.

    Args:
        budget: share so many trained parameters among the paths by their gradient, instead of giving each the same
            rank.
        **low_rank: options of :class:`LowRank`; without ``alpha`` it is the rank.
    """
    update = LowRank(**low_rank)
    if "alpha" not in low_rank:
        update = replace(update, alpha=float(update.rank))
    kinds = ("linear", "readout", "tensor_product", "radial_mlp", "contraction")
    return Method(
        "elora",
        {
            **dict.fromkeys(kinds, (update,)),
            "contraction_lower": (Dense(),),
            "radial_basis": (Dense(),),
            "modality": (Dense(),),
        },
        "low rank on every path (ICML 2025)",
        budget=budget,
        optimizer="soap",
    )


def full() -> Method:
    """Every parameter is trained."""
    return Method("full", EVERYWHERE_DENSE, "every parameter", learning_rate=1e-3, optimizer="soap", soap_rate=2e-2)


def scratch() -> Method:
    """Every parameter is trained from random values: the architecture without what the foundation model knows."""
    return Method("scratch", EVERYWHERE_DENSE, "every parameter, from random values", learning_rate=1e-2, fresh=True)


def readout() -> Method:
    """Only the readouts are trained."""
    return Method("readout", {"readout": (Dense(),)}, "readouts only")


def freeze(layers: Annotated[int, Field(ge=1)] = 1) -> Method:
    """Every parameter of the last interaction layers and the readouts; what comes before stays frozen.

    Args:
        layers: how many interaction layers.
    """
    return Method(
        "freeze",
        EVERYWHERE_DENSE,
        "every parameter of the last layers",
        learning_rate=1e-3,
        optimizer="soap",
        soap_rate=2e-2,
        last_layers=layers,
    )


def modality() -> Method:
    """Only the rows of a modality and reference energies: a new level of theory for a multi-modal SevenNet model.

    They are some thousand numbers beside the features that all modalities share; merged they become a modality of
    their own, and the others stay what they were.
    """
    return Method("modality", {"modality": (Dense(),)}, "rows of a modality (multi-modal models)", learning_rate=3e-2)


def bias() -> Method:
    """A constant shift of the even scalars of every linear layer."""
    return Method("bias", {"linear": (Shift(),), "readout": (Shift(),)}, "a bias for each scalar channel")


def adapter(**bottleneck: Annotated[Any, Bottleneck]) -> Method:
    """The conventional adapter of language models after every linear layer: a baseline that breaks symmetry.

    Args:
        **bottleneck: options of :class:`Bottleneck`.
    """
    return Method(
        "adapter",
        {"linear": (Bottleneck(**bottleneck),)},
        "conventional bottlenecks, NOT equivariant (baseline)",
    )


SPARSE_WRAPS = {
    "all": ("linear", "readout", "tensor_product"),
    "linears": ("linear", "readout"),
    "tensor_products": ("tensor_product",),
}
Wrap = Literal["all", "linears", "tensor_products"]
"""Layers that a sparse update acts on."""


def sparse(wrap: Wrap = "all", **threshold: Annotated[Any, SoftThreshold]) -> Method:
    """Sparsity-promoting fine-tuning, preset L (ICLR 2026): soft-thresholded updates of linears and tensor products.

    Args:
        wrap: layers that it acts on.
        **threshold: options of :class:`SoftThreshold`.
    """
    return _sparse("sparse", "soft-thresholded updates, mostly zeros (ICLR 2026, L)", wrap, **threshold)


def sparse_h(wrap: Wrap = "all", **threshold: Annotated[Any, SoftThreshold]) -> Method:
    """Sparsity-promoting fine-tuning, preset H: fewer changed weights, by a larger decay of the thresholds.

    Args:
        wrap, **threshold: as of :func:`sparse`.
    """
    options = {"threshold_decay": 0.3} | threshold
    return _sparse("sparse-h", "soft-thresholded updates, nearly all zeros (ICLR 2026, H)", wrap, **options)


def _sparse(name: str, description: str, wrap: str, **threshold: Any) -> Method:
    table = dict.fromkeys(SPARSE_WRAPS[wrap], (SoftThreshold(**threshold),))
    return Method(name, table, description, learning_rate=1e-2, optimizer="schedulefree")


def gain(**gain: Annotated[Any, Gain]) -> Method:
    """One static factor for each path and output channel of every weight matrix; merges, costs nothing to run.

    Args:
        **gain: options of :class:`Gain`.
    """
    kinds = ("linear", "readout", "tensor_product", "radial_mlp", "contraction", "contraction_lower")
    return Method("gain", dict.fromkeys(kinds, (Gain(**gain),)), "a static factor for each channel")


def lora(**low_rank: Annotated[Any, LowRank]) -> Method:
    """The recipe of mace-torch's ``--lora``: low rank on linear layers and the radial MLP only, r = 4, α = 1.

    Args:
        **low_rank: options of :class:`LowRank`.
    """
    update = LowRank(**{"rank": 4, "alpha": 1.0} | low_rank)
    kinds = ("linear", "readout", "radial_mlp")
    return Method("lora", dict.fromkeys(kinds, (update,)), "low rank on linears, as mace-torch --lora")


METHODS: dict[str, Callable[..., Method]] = {
    "mmea": mmea,
    "mmea-pure": mmea_pure,
    "elora": elora,
    "full": full,
    "sparse": sparse,
    "sparse-h": sparse_h,
    "gain": gain,
    "lora": lora,
    "adapter": adapter,
    "freeze": freeze,
    "bias": bias,
    "modality": modality,
    "readout": readout,
    "scratch": scratch,
}


def method(name: str, *, target: str | Sequence[str] | None = None, **options: Any) -> Method:
    """Make a method by name.

    Args:
        name: a key of :data:`METHODS`.
        target: restrict it to some sites, as in :class:`Method`.
        **options: hyper-parameters of the method, such as ``rank=32`` or ``gain="linear"``.

    Raises:
        InputError: no such method, or an option the method has no use for or that it cannot take.
    """
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}; methods are {', '.join(METHODS)}.")
    make = METHODS[name]
    names = option_names(make)
    for option in options:
        if option not in names:
            can = f"its options are {', '.join(names)}" if names else "it has no options"
            raise InputError(f"method {name} has no use for {option!r}; {can}.")
    parameters = _parameters(make)
    try:
        parameters.model_validate({k: v for k, v in options.items() if k in parameters.model_fields}, strict=True)
        chosen = make(**options)
    except ValidationError as error:
        raise InputError(f"method {name}: {explain(error)}") from error
    except ValueError as error:
        raise InputError(f"method {name}: {error}.") from error
    return replace(chosen, target=_as_target(target))


def _as_target(target: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return target if target is None or isinstance(target, str) else tuple(target)


def option_names(make: Callable[..., Method]) -> list[str]:
    """Names of the options of a method in :data:`METHODS`: of the update that it makes, and its own."""
    hints = get_type_hints(make, include_extras=True)
    names: list[str] = []
    for parameter in inspect.signature(make).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            _, update = get_args(hints[parameter.name])
            names += update.option_names()
    return names + list(_parameters(make).model_fields)


@cache
def _parameters(make: Callable[..., Method]) -> type[BaseModel]:
    """What checks the options that are a method's own."""
    hints = get_type_hints(make, include_extras=True)
    parameters: dict[str, Any] = {
        parameter.name: (hints[parameter.name], parameter.default)
        for parameter in inspect.signature(make).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    return create_model(f"{make.__name__}_options", __config__=OPTION_RULES, **parameters)


def custom_method(
    name: str, table: Mapping[str, Sequence[Mapping[str, Any]]], *, target: str | Sequence[str] | None = None
) -> Method:
    """A method of one's own.

    Args:
        name: a label.
        table: site kind to updates, each a mapping with ``update`` (a key of :data:`UPDATES`) and its options.
        target: as in :class:`Method`.

    Raises:
        InputError: an unknown kind, update or option, or two updates that cannot share a site.
    """
    try:
        updates_by_kind = {kind: tuple(update_from_json(entry) for entry in entries) for kind, entries in table.items()}
    except KeyError as error:
        raise InputError(f"method.table: there is no update {error}; updates are {', '.join(UPDATES)}.") from error
    except (TypeError, AttributeError) as error:
        raise InputError(
            "method.table: write it as kinds of sites with lists of updates, such as {linear: [{update: Gate}]}."
        ) from error
    except ValueError as error:
        raise InputError(f"method.table: {error}.") from error
    for kind, updates in updates_by_kind.items():
        activations = sum(isinstance(update, Gate | Shift | Bottleneck) for update in updates)
        if max(activations, len(updates) - activations) > 1:
            raise InputError(
                f"method.table: {kind} has two updates of the same type; one may change the weight "
                "(LowRank, SoftThreshold, Gain, Dense) and one the output (Gate, Shift)."
            )
    sparse = any(isinstance(update, SoftThreshold) for updates in updates_by_kind.values() for update in updates)
    return Method(
        name,
        updates_by_kind,
        "a table of its own",
        target=_as_target(target),
        optimizer="schedulefree" if sparse else "adam",
    )


def build_method(config: MethodConfig) -> Method:
    """The method a configuration asks for.

    Raises:
        InputError: unknown method, an option it has no use for, or a table under the name of a method.
    """
    if config.table is None:
        return method(config.name, target=config.target, **config.options())
    if config.options():
        raise InputError(f"method.{next(iter(config.options()))}: has no meaning beside method.table; put it in there.")
    named = "name" in config.model_fields_set
    if named and config.name in METHODS:
        raise InputError(
            f"method.name is {config.name}, but method.table is a method of its own: leave the table out "
            "(--set method.table=null), or give it another name."
        )
    name = config.name if named else "custom"
    return custom_method(name, config.table, target=config.target)
