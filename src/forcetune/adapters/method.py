"""What a method is: a named table from site kinds to updates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from forcetune.adapters.updates import UPDATES, Frozen, Gate, LowRank, Update
from forcetune.backbones.protocol import Site
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
        optimizer, learning_rate: defaults of the optimisation.
        target: only these sites: a regular expression that must match the whole site name, or a sequence of
            endings of site names; None for all.
        last_layers: only so many interaction layers, counted from the output, with the readouts; None for all.
        fresh: weights that are trained whole start from random values instead of the foundation model's. It concerns
            the start only and is no part of the table that an adapter stores.
        budget: trained parameters that low-rank updates may use, shared among the paths by the gradient at the
            start (:func:`forcetune.adapters.gradients.within_budget`), which puts the ranks into the table.
        magnetism: a magnetic layer beside the updates, or None.
        soap_rate: default of the learning rate with schedule-free SOAP, where it is another one than with the other
            optimizers. A default of runs only: adapters do not keep it.
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
    soap_rate: float | None = field(default=None, compare=False)

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

    def default_rate(self, optimizer: str | None, of_base: Mapping[str, float] | None = None) -> float:
        """The learning rate of a run that names none.

        Args:
            optimizer: of the run; None for the method's own. Schedule-free SOAP has the same rates on every base.
            of_base: rates of methods, by name, that a foundation model wants with the other optimizers.
        """
        if (optimizer or self.optimizer) == "soap":
            return self.learning_rate if self.soap_rate is None else self.soap_rate
        return (of_base or {}).get(self.name, self.learning_rate)

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
                str(kind): tuple(update_from_json(entry, of_file=True) for entry in entries)
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


def update_from_json(entry: Mapping[str, Any], *, of_file: bool = False) -> Update:
    """The update of an entry of a table.

    Args:
        entry: ``update``, its name, and its options.
        of_file: of an adapter file, which may be of an earlier version.

    Raises:
        KeyError: there is no such update.
        ValueError: an option is unknown, has the wrong type or lies out of range.
    """
    update = UPDATES[entry["update"]]
    options = {name: value for name, value in entry.items() if name != "update"}
    return update.from_options(update.earlier_options(options) if of_file else options)


def _check_simple(expression: str) -> None:
    """A regular expression of a file is matched only if it cannot take forever.

    Raises:
        ValueError: it repeats groups, or too much.
    """
    repeats = re.findall(r"[*+?{]", expression)
    if len(expression) > 500 or len(repeats) > 3 or re.search(r"\)[*+?{]", expression):
        raise ValueError(f"the expression {short(expression)} of its target may take too long to match")
