"""The trainable parts of a method on one backbone, as one module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from forcetune.adapters.magnetic import MagneticPart
from forcetune.adapters.methods import Method
from forcetune.adapters.summaries import SiteCoverage, Sparsity
from forcetune.adapters.updates import ActivationUpdate, Update, WeightUpdate
from forcetune.adapters.updates.base import ParameterOptions, TrainablePart
from forcetune.adapters.updates.soft_threshold import SparseWeight
from forcetune.backbones.protocol import Backbone, Base, Site, WeightPath


class Adapter(nn.Module):
    """The trainable parts of a method on one backbone. All trainable parameters of an adapted model are its own.

    Attributes:
        method: the table it was built from.
        enabled: when False the backbone behaves as if nothing were attached.
        folded: its weight updates were written into the backbone's weights and are no longer among its parts.
        magnetic: its magnetic layer, if it has one.
        handles: of the hooks that :mod:`forcetune.adapters.attach` set.
        required_grad: which parameters of the backbone were trainable before.
        base_references: reference energies of the backbone before, eV.
        base: what it was attached to; None before.
    """

    def __init__(self, method: Method, backbone: Backbone) -> None:
        super().__init__()
        self.method = method
        self.sites = sites = backbone.sites()
        model = backbone.model
        self.enabled = True
        self.folded = False
        self.parts = nn.ModuleDict()
        for site in sites:
            weight = parameter_at(model, site)
            for update in method.updates_at(site):
                part = update.build(site, weight)
                if part is not None:
                    part.update_name = update.name
                    self.parts[part_key(site, type(part))] = part
        # after the updates, which start at the same random values with and without it
        options = method.magnetism
        self.magnetic = None if options is None else MagneticPart(options, backbone)
        self.handles: list[Any] = []
        self.required_grad: dict[str, bool] = {}
        self.base_references: dict[int, float] = {}
        self.base: Base | None = None

    def part(self, site: Site, kind: type[nn.Module]) -> Any:
        """The part of one kind at ``site``, or None."""
        return dict(self.parts.items()).get(part_key(site, kind))

    def trainable_parts(self) -> Iterator[tuple[str, TrainablePart]]:
        """Every part with its key."""
        for key, part in self.parts.items():
            assert isinstance(part, TrainablePart)
            yield key, part
        if self.magnetic is not None:
            yield "magnetism|layer", self.magnetic

    @property
    def equivariant(self) -> bool:
        """Whether everything it does keeps rotational symmetry."""
        return self.method.equivariant

    def updates_at(self, site: Site) -> tuple[Update, ...]:
        """The updates made at ``site``."""
        return self.method.updates_at(site)

    def effective_weight(self, site: Site, weight: Tensor) -> Tensor:
        """W' at ``site`` for the frozen W."""
        part = self.part(site, WeightUpdate)
        return weight if part is None else part(weight)

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def coverage(self) -> list[SiteCoverage]:
        """What is trained, by site kind, in the order in which kinds first occur."""
        rows: dict[str, list[Site]] = {}
        for site in self.sites:
            rows.setdefault(site.kind, []).append(site)
        result = []
        for kind, sites in rows.items():
            parts = {
                site.name: [p for k in (WeightUpdate, ActivationUpdate) if (p := self.part(site, k))] for site in sites
            }
            covered = [site for site in sites if parts[site.name]]
            updates = dict.fromkeys(update.describe() for site in covered for update in self.updates_at(site))
            result.append(
                SiteCoverage(
                    kind=kind,
                    update=" + ".join(updates) or "Frozen",
                    sites=len(sites),
                    covered=sum(site.numel for site in covered),
                    total=sum(site.numel for site in sites),
                    trainable=sum(
                        p.numel() for site in covered for part in parts[site.name] for p in part.parameters()
                    ),
                )
            )
        if self.magnetic is not None:
            assert self.method.magnetism is not None
            added = sum(parameter.numel() for parameter in self.magnetic.parameters())
            result.append(SiteCoverage("magnetism", self.method.magnetism.describe(), 1, 0, 0, added))
        return result

    def parameter_kinds(self) -> Iterator[tuple[str, nn.Parameter, ParameterOptions | None]]:
        """Every trainable parameter with the kind of its site and how it is trained, where it says so itself."""
        for site in self.sites:
            for kind in (WeightUpdate, ActivationUpdate):
                part = self.part(site, kind)
                if part is not None:
                    options = part.options()
                    yield from (
                        (site.kind, parameter, options.get(name)) for name, parameter in part.named_parameters()
                    )
        if self.magnetic is not None:
            options = self.magnetic.options()
            yield from (("magnetism", parameter, options[name]) for name, parameter in self.magnetic.named_parameters())

    def parameter_paths(self) -> Iterator[tuple[nn.Parameter, tuple[WeightPath, ...]]]:
        """Parameters that are laid out as a site's whole weight, with the paths of it.

        Where every entry is trained for itself, as for a sparse result, there are no paths: nothing may mix them.
        """
        for site in self.sites:
            part = self.part(site, WeightUpdate)
            if part is not None:
                yield from ((getattr(part, name), site.paths) for name in part.weight_shaped)
                yield from ((getattr(part, name), ()) for name in part.elementwise)

    def sparsity(self) -> Sparsity | None:
        """How many weights a sparse update leaves as they were; None where nothing is sparse."""
        parts = [(site, part) for site in self.sites if isinstance(part := self.part(site, WeightUpdate), SparseWeight)]
        if not parts:
            return None
        changed = sum(part.n_changed() for _, part in parts)
        wrapped = sum(site.numel for site, _ in parts)
        return Sparsity(changed=changed, wrapped=wrapped, total=sum(site.numel for site in self.sites))

    def print_trainable_parameters(self) -> None:
        """Print trainable and total counts in one line, as peft does."""
        total = sum(site.numel for site in self.sites)
        share = 100 * self.trainable / total
        print(f"trainable params: {self.trainable:,} || all params: {total:,} || trainable%: {share:.2f}")


def part_key(site: Site, kind: type[nn.Module]) -> str:
    """Name of a site's part among the parts of an adapter."""
    return f"{site.name.replace('.', '/')}|{'weight' if issubclass(kind, WeightUpdate) else 'gate'}"


def parameter_at(model: nn.Module, site: Site) -> nn.Parameter:
    """The weight of a site in the backbone's modules."""
    parameter = model.get_submodule(site.module)._parameters[site.parameter]
    assert parameter is not None
    return parameter
