"""Methods: named tables from site kinds to updates."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from forcetune.adapters.updates import (
    UPDATES,
    Bottleneck,
    Dense,
    Frozen,
    Gain,
    Gate,
    LowRank,
    Shift,
    SoftThreshold,
    Update,
)
from forcetune.backbones.protocol import Site
from forcetune.config import LARGEST_RANK, MethodConfig
from forcetune.errors import InputError
from forcetune.magnetism.options import Magnetism
from forcetune.utils.parsing import short

KINDS = (
    "linear",
    "tensor_product",
    "radial_mlp",
    "contraction",
    "contraction_lower",
    "radial_basis",
    "readout",
    "modality",
    "other",
)


@dataclass(frozen=True)
class Method:
    """A table from site kinds to updates, with the learning rate it trains best with.

    Attributes:
        name: as on the command line.
        table: site kind to the updates made there; kinds not named stay frozen. At most one weight update and one
            activation update share a site.
        description: one line for tables.
        learning_rate, optimizer: defaults of the optimisation.
        target: only these sites: a regular expression that must match the whole site name, or a sequence of
            endings of site names; None for all.
        last_layers: only so many interaction layers, counted from the output, with the readouts; None for all.
        fresh: weights that are trained whole start from random values instead of the foundation model's. It concerns
            the start only and is no part of the table that an adapter stores.
        budget: trained parameters that low-rank updates may use, shared among the paths by the gradient at the
            start (:func:`forcetune.adapters.gradients.within_budget`), which puts the ranks into the table.
        magnetism: a magnetic layer beside the updates, or None.
    """

    name: str
    table: Mapping[str, tuple[Update, ...]]
    description: str
    learning_rate: float = 5e-3
    target: str | tuple[str, ...] | None = None
    fresh: bool = False
    optimizer: str = "adam"
    last_layers: int | None = None
    budget: int | None = None
    magnetism: Magnetism | None = None

    def __post_init__(self) -> None:
        unknown = set(self.table) - set(KINDS)
        if unknown:
            raise InputError(
                f"method {self.name}: there is no site kind {sorted(unknown)}; kinds are {', '.join(KINDS)}."
            )
        if isinstance(self.target, str):
            try:
                re.compile(self.target)
            except re.error as error:
                raise InputError(f"method.target: {self.target!r} is not a regular expression ({error}).") from error

    @property
    def mergeable(self) -> bool:
        """Whether every update can be absorbed by the weights."""
        updates = all(update.mergeable for updates in self.table.values() for update in updates)
        return updates and self.magnetism is None

    @property
    def needs_gradients(self) -> bool:
        """Whether its start depends on the gradient of the first batches."""
        low_rank = (update for updates in self.table.values() for update in updates if isinstance(update, LowRank))
        return self.budget is not None or any(update.init == "gradient" for update in low_rank)

    @property
    def rank(self) -> int | None:
        """The rank it is known by: of its first update that has one; None with a budget."""
        updates = [u for entries in self.table.values() for u in entries if isinstance(u, Gate | LowRank)]
        return updates[0].rank if updates and self.budget is None else None

    @property
    def equivariant(self) -> bool:
        """Whether every update keeps rotational symmetry; others are baselines and are refused for deployment."""
        return all(update.equivariant for updates in self.table.values() for update in updates)

    def updates_at(self, site: Site) -> tuple[Update, ...]:
        """Updates this method makes at ``site``, those that do not apply there left out."""
        if not self._targets(site) or (self.last_layers is not None and site.layers_behind >= self.last_layers):
            return ()
        return tuple(
            update
            for update in self.table.get(site.kind, ())
            if not isinstance(update, Frozen) and update.unsupported_reason(site) is None
        )

    def reaches(self, sites: Sequence[Site]) -> bool:
        """Whether there is a site that it updates."""
        return self.magnetism is not None or any(self.updates_at(site) for site in sites)

    def _targets(self, site: Site) -> bool:
        if self.target is None:
            return True
        if isinstance(self.target, str):
            return re.fullmatch(self.target, site.name) is not None
        return any(site.name == ending or site.name.endswith("." + ending) for ending in self.target)

    def to_json(self) -> dict[str, Any]:
        """The complete table with every hyper-parameter."""
        return {
            "name": self.name,
            "description": self.description,
            "learning_rate": self.learning_rate,
            "optimizer": self.optimizer,
            "target": list(self.target) if isinstance(self.target, tuple) else self.target,
            "last_layers": self.last_layers,
            "table": {kind: [update.to_json() for update in updates] for kind, updates in self.table.items()},
        } | ({} if self.magnetism is None else {"magnetism": self.magnetism.to_json()})

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Method:
        """Inverse of :meth:`to_json`.

        Raises:
            InputError: an update or hyper-parameter this version does not know.
        """
        try:
            table = {
                str(kind): tuple(_update_from_json(entry, of_file=True) for entry in entries)
                for kind, entries in data["table"].items()
            }
            target = data.get("target")
            if isinstance(target, str):
                _check_simple(target)
            elif target is not None and not all(isinstance(name, str) for name in target):
                raise ValueError("its target is no list of names")
            return Method(
                name=str(data["name"]),
                table=table,
                description=str(data.get("description", "")),
                learning_rate=_rate(data.get("learning_rate", 5e-3)),
                target=tuple(target) if isinstance(target, list) else target,
                optimizer=str(data.get("optimizer", "adam")),
                last_layers=data.get("last_layers"),
                magnetism=Magnetism.from_json(data["magnetism"]) if data.get("magnetism") is not None else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"the method table cannot be read ({error}); was it written by a newer forcetune?"
            ) from error


def _rate(value: Any) -> float:
    """
    Raises:
        ValueError: no learning rate.
    """
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise ValueError(f"its learning rate is {short(value)}")
    return float(value)


def _update_from_json(entry: Mapping[str, Any], *, of_file: bool = False) -> Update:
    """The update of a table; that of an adapter file may be of an earlier version."""
    kind = UPDATES[entry["update"]]
    options = {key: value for key, value in entry.items() if key != "update"}
    options = kind.earlier_options(options) if of_file else options
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} of {entry['update']} is {value}")
    known = {field.name for field in fields(kind)}
    if set(options) - known:
        raise ValueError(f"{entry['update']} has no option {sorted(set(options) - known)}")
    made = kind(**options)
    for field in fields(kind):
        value, usual = getattr(made, field.name), field.default
        if usual is None:
            continue  # the update itself checks these
        if not isinstance(value, type(usual)) and not (isinstance(usual, float) and type(value) is int):
            raise ValueError(f"{field.name} of {entry['update']} is {short(value)}")
        if field.name == "rank" and not 1 <= value <= LARGEST_RANK:
            raise ValueError(f"the rank of {entry['update']} is {short(value)}, at most {LARGEST_RANK} is read")
    return made


def _check_simple(expression: str) -> None:
    """A regular expression of a file is matched only if it cannot take forever.

    Raises:
        ValueError: it repeats groups, or too much.
    """
    repeats = re.findall(r"[*+?{]", expression)
    if len(expression) > 500 or len(repeats) > 3 or re.search(r"\)[*+?{]", expression):
        raise ValueError(f"the expression {short(expression)} of its target may take too long to match")


EVERYWHERE_DENSE = {kind: (Dense(),) for kind in KINDS}


def mmea(rank: int = 16, skip: bool = False, **gate: Any) -> Method:
    """MMEA as published: gates on every equivariant linear layer, ELoRA (r = α = 16) on tensor products, radial MLPs
    and the highest-order contraction, dense lower orders and Bessel frequencies. ``skip`` adds gates to the skip
    connections, driven by the scalars and the species."""
    low_rank = LowRank(16, 16.0)
    skip_gates = (Gate(rank, species=True, **gate),) if skip else ()
    return Method(
        "mmea",
        {
            "linear": (Gate(rank, **gate),),
            "readout": (Gate(rank, **gate),),
            "tensor_product": (low_rank, *skip_gates),
            "radial_mlp": (low_rank,),
            "contraction": (low_rank,),
            "contraction_lower": (Dense(),),
            "radial_basis": (Dense(),),
            "modality": (Dense(),),
        },
        "gates on linears, low rank elsewhere, as published (AAAI 2026)",
    )


def mmea_pure(rank: int = 16, skip: bool = False, **gate: Any) -> Method:
    """Gates on every equivariant linear layer and nothing else; ``skip`` as for :func:`mmea`."""
    table: dict[str, tuple[Update, ...]] = {"linear": (Gate(rank, **gate),), "readout": (Gate(rank, **gate),)}
    if skip:
        table["tensor_product"] = (Gate(rank, species=True, **gate),)
    return Method("mmea-pure", table, "gates on linears only")


def elora(
    rank: int = 16,
    alpha: float | None = None,
    cap_rank: bool = False,
    norms: bool = False,
    init: Literal["normal", "gradient"] = "normal",
    budget: int | None = None,
) -> Method:
    """ELoRA (ICML 2025): low rank on every path, dense lower-order contractions and Bessel frequencies.

    ``norms`` and ``init`` are those of :class:`LowRank`; ``budget`` shares so many trained parameters
    among the paths instead of giving each the same rank.
    """
    low_rank = LowRank(rank, float(rank if alpha is None else alpha), cap_rank, norms, init)
    kinds = ("linear", "readout", "tensor_product", "radial_mlp", "contraction")
    return Method(
        "elora",
        {
            **dict.fromkeys(kinds, (low_rank,)),
            "contraction_lower": (Dense(),),
            "radial_basis": (Dense(),),
            "modality": (Dense(),),
        },
        "low rank on every path (ICML 2025)",
        budget=budget,
    )


def full() -> Method:
    """Every parameter is trained."""
    return Method("full", EVERYWHERE_DENSE, "every parameter", learning_rate=1e-3)


def scratch() -> Method:
    """Every parameter is trained from random values: the architecture without what the foundation model knows."""
    return Method("scratch", EVERYWHERE_DENSE, "every parameter, from random values", learning_rate=1e-2, fresh=True)


def readout() -> Method:
    """Only the readouts are trained."""
    return Method("readout", {"readout": (Dense(),)}, "readouts only")


def freeze(layers: int = 1) -> Method:
    """Every parameter of the last interaction layers and the readouts; what comes before stays frozen."""
    if layers < 1:
        raise ValueError("layers is at least 1")
    return Method(
        "freeze", EVERYWHERE_DENSE, "every parameter of the last layers", learning_rate=1e-3, last_layers=layers
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


def adapter(rank: int = 16) -> Method:
    """The conventional adapter of language models after every linear layer: a baseline that breaks symmetry."""
    return Method(
        "adapter",
        {"linear": (Bottleneck(rank),)},
        "conventional bottlenecks, NOT equivariant (baseline)",
    )


SPARSE_WRAPS = {
    "all": ("linear", "readout", "tensor_product"),
    "linears": ("linear", "readout"),
    "tensor_products": ("tensor_product",),
}


def _sparse(name: str, description: str, wrap: str, **threshold: Any) -> Method:
    if wrap not in SPARSE_WRAPS:
        raise ValueError(f"wrap is one of {', '.join(SPARSE_WRAPS)}, not {wrap!r}")
    table = dict.fromkeys(SPARSE_WRAPS[wrap], (SoftThreshold(**threshold),))
    return Method(name, table, description, learning_rate=1e-2, optimizer="schedulefree")


def sparse(wrap: str = "all", threshold_decay: float = 0.01, per_path: bool = False) -> Method:
    """Sparsity-promoting fine-tuning, preset L (ICLR 2026): soft-thresholded updates of linears and tensor products."""
    options = {"threshold_decay": threshold_decay, "per_path": per_path}
    return _sparse("sparse", "soft-thresholded updates, mostly zeros (ICLR 2026, L)", wrap, **options)


def sparse_h(wrap: str = "all", threshold_decay: float = 0.3, per_path: bool = False) -> Method:
    """Sparsity-promoting fine-tuning, preset H: fewer changed weights."""
    options = {"threshold_decay": threshold_decay, "per_path": per_path}
    return _sparse("sparse-h", "soft-thresholded updates, nearly all zeros (ICLR 2026, H)", wrap, **options)


def gain(per_element: bool = True) -> Method:
    """One static factor for each path and output channel of every weight matrix; merges, costs nothing to run."""
    kinds = ("linear", "readout", "tensor_product", "radial_mlp", "contraction", "contraction_lower")
    return Method("gain", dict.fromkeys(kinds, (Gain(per_element),)), "a static factor for each channel")


def lora(rank: int = 4, alpha: float = 1.0) -> Method:
    """The recipe of mace-torch's ``--lora``: low rank on linear layers and the radial MLP only, r = 4, α = 1."""
    kinds = ("linear", "readout", "radial_mlp")
    return Method("lora", dict.fromkeys(kinds, (LowRank(rank, alpha),)), "low rank on linears, as mace-torch --lora")


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
        InputError: no such method, or an option the method has no use for.
    """
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}; methods are {', '.join(METHODS)}.")
    make = METHODS[name]
    known = options_of(make)
    for option in options:
        if option not in known:
            can = f"its options are {', '.join(known)}" if known else "it has no options"
            raise InputError(f"method {name} has no use for {option!r}; {can}.")
    try:
        made = make(**options)
    except ValueError as error:
        raise InputError(f"method {name}: {error}.") from error
    chosen = target if target is None or isinstance(target, str) else tuple(target)
    return replace(made, target=chosen)


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
        found = {kind: tuple(_update_from_json(entry) for entry in entries) for kind, entries in table.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        known = ", ".join(UPDATES)
        raise InputError(f"method.table: {error} cannot be used; updates are {known}, with their options.") from error
    for kind, updates in found.items():
        activations = sum(isinstance(update, Gate | Shift | Bottleneck) for update in updates)
        if max(activations, len(updates) - activations) > 1:
            raise InputError(
                f"method.table: {kind} has two updates of the same sort; one may change the weight "
                "(LowRank, SoftThreshold, Gain, Dense) and one the output (Gate, Shift)."
            )
    sparse = any(isinstance(update, SoftThreshold) for updates in found.values() for update in updates)
    return Method(
        name,
        found,
        "a table of its own",
        target=target if target is None or isinstance(target, str) else tuple(target),
        optimizer="schedulefree" if sparse else "adam",
    )


def method_of(config: MethodConfig) -> Method:
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


def options_of(make: Callable[..., Method]) -> list[str]:
    """Names of the hyper-parameters of a method in :data:`METHODS`."""
    names = []
    for parameter in inspect.signature(make).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            names += [field.name for field in fields(Gate) if field.name not in (*names, "species")]
        else:
            names.append(parameter.name)
    return names
