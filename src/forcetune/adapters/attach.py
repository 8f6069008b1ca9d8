"""Put an adapter into a backbone in place, and take it out again without a trace.

The backbone's modules keep their class, their names and their (frozen) parameters. A weight update is seen through
a shadow: while the module that reads a weight runs, an instance attribute of the same name hides the parameter.
An activation update is a forward hook.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.adapters.magnetic import MagneticPart
from forcetune.adapters.methods import Method
from forcetune.adapters.updates import ActivationUpdate, Update, WeightUpdate
from forcetune.adapters.updates.base import ParameterOptions, TrainablePart
from forcetune.adapters.updates.dense import DenseWeight
from forcetune.adapters.updates.soft_threshold import SparseWeight
from forcetune.backbones.protocol import ADAPTER, Backbone, Base, Site
from forcetune.errors import InputError
from forcetune.kernels.features import Features, features_of
from forcetune.utils.parsing import short


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a method trains at the sites of one kind.

    Attributes:
        kind: site kind.
        update: description of the updates, or ``Frozen``.
        sites: number of sites of this kind.
        covered: weights at sites that are updated.
        total: weights at all sites of this kind.
        trainable: parameters of the updates.
    """

    kind: str
    update: str
    sites: int
    covered: int
    total: int
    trainable: int


@dataclass(frozen=True, slots=True)
class Sparsity:
    """How many weights a sparse update changes.

    Attributes:
        changed: weights that are not what they were.
        wrapped: weights that could have changed.
        total: weights of the model.
    """

    changed: int
    wrapped: int
    total: int

    @property
    def zeros_of_wrapped(self) -> float:
        """Share of the wrapped weights that did not change."""
        return 1 - self.changed / self.wrapped

    @property
    def zeros_of_all(self) -> float:
        """Share of all weights that did not change."""
        return 1 - self.changed / self.total


class Adapter(nn.Module):
    """The trainable parts of a method on one backbone. All trainable parameters of an adapted model are its own.

    Attributes:
        method: the table it was built from.
        enabled: when False the backbone behaves as if nothing were attached.
        folded: its weight updates were written into the backbone's weights and are no longer among its parts.
        magnetic: its magnetic layer, if it has one.
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
            weight = _parameter(model, site)
            for update in method.updates_at(site):
                part = update.build(site, weight)
                if part is not None:
                    part.update_name = update.name
                    self.parts[part_key(site, type(part))] = part
        # after the updates, which start at the same random values with and without it
        options = method.magnetism
        self.magnetic = None if options is None else MagneticPart(options, backbone)
        self._handles: list[Any] = []
        self._required_grad: dict[str, bool] = {}
        self._references: dict[int, float] = {}
        self._base: Base | None = None

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

    def coverage(self) -> list[Coverage]:
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
                Coverage(
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
            result.append(Coverage("magnetism", self.method.magnetism.describe(), 1, 0, 0, added))
        return result

    def parameter_kinds(self) -> Iterator[tuple[str, nn.Parameter, ParameterOptions | None]]:
        """Every trainable parameter with the kind of its site and how it is trained, where it says so itself."""
        for site in self.sites:
            for kind in (WeightUpdate, ActivationUpdate):
                part = self.part(site, kind)
                if part is not None:
                    own = part.options()
                    yield from ((site.kind, parameter, own.get(name)) for name, parameter in part.named_parameters())
        if self.magnetic is not None:
            own = self.magnetic.options()
            yield from (("magnetism", parameter, own[name]) for name, parameter in self.magnetic.named_parameters())

    def sparsity(self) -> Sparsity | None:
        """How many weights a sparse update leaves as they were; None where nothing is sparse."""
        parts = [(site, part) for site in self.sites if isinstance(part := self.part(site, WeightUpdate), SparseWeight)]
        if not parts:
            return None
        changed = sum(part.n_changed() for _, part in parts)
        wrapped = sum(site.numel for site, _ in parts)
        return Sparsity(changed, wrapped, sum(site.numel for site in self.sites))

    def print_trainable_parameters(self) -> None:
        """Print trainable and total counts in one line, as peft does."""
        total = sum(site.numel for site in self.sites)
        share = 100 * self.trainable / total
        print(f"trainable params: {self.trainable:,} || all params: {total:,} || trainable%: {share:.2f}")


def part_key(site: Site, kind: type[nn.Module]) -> str:
    """Name of a site's part among the parts of an adapter."""
    return f"{site.name.replace('.', '/')}|{'weight' if issubclass(kind, WeightUpdate) else 'gate'}"


def _parameter(model: nn.Module, site: Site) -> nn.Parameter:
    found = model.get_submodule(site.module)._parameters[site.parameter]
    assert found is not None
    return found


class _ShowWeights:
    """Before a module runs: hide its parameters behind their effective weights."""

    def __init__(self, adapter: Adapter, shadows: list[tuple[nn.Module, str, WeightUpdate]]) -> None:
        self.adapter = adapter
        self.shadows = shadows

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.adapter.enabled:
            for owner, name, part in self.shadows:
                owner.__dict__[name] = part(owner._parameters[name])


class _HideWeights:
    """After a module ran, or failed: show its parameters again."""

    def __init__(self, shadows: list[tuple[nn.Module, str, WeightUpdate]]) -> None:
        self.shadows = shadows

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for owner, name, _ in self.shadows:
            owner.__dict__.pop(name, None)


class _ChangeOutput:
    """After a module ran: apply its gate."""

    def __init__(self, adapter: Adapter, part: ActivationUpdate) -> None:
        self.adapter = adapter
        self.part = part

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.adapter.enabled:
            return None
        if self.part.reads_species:
            # a layer that knows the species is given what the layers of a step share, or by the library the species
            second = args[1]
            species = second if isinstance(second, Tensor) else second.attributes
            changed = self.part(args[0], output, species)
        else:
            changed = self.part(args[0], output)
        if isinstance(output, Features) and isinstance(changed, Tensor):
            return features_of(changed, output.layout, geometric=True, trains=True)
        return changed


def attach(backbone: Backbone, method: Method, *, seed: int | None = 1) -> Adapter:
    """Freeze ``backbone`` and put an adapter for ``method`` into it.

    A freshly attached adapter changes nothing unless the method says otherwise (``shift_init``, ``scratch``).

    Args:
        backbone: a loaded foundation model; changed in place, class and names kept.
        method: the table of updates.
        seed: of the initial values; None takes the global generator as it is.

    Returns:
        The adapter, also found as ``backbone.model.forcetune_adapter``.

    Raises:
        InputError: an adapter is attached already, or the method matches no site.
    """
    if adapter_of(backbone) is not None:
        raise InputError("this model already carries an adapter; detach it first.")
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        adapter = Adapter(method, backbone)
    if not adapter.parts and adapter.magnetic is None:
        raise InputError(_matches_nothing(method, adapter.sites))
    if method.fresh:
        _start_afresh(adapter, backbone.fresh_weights(seed))
    reattach(backbone, adapter)
    return adapter


def reattach(backbone: Backbone, adapter: Adapter) -> None:
    """Freeze a backbone and put a ready adapter into it, such as one that :func:`detach` took out.

    Reference energies stay the backbone's own.

    Raises:
        InputError: an adapter is attached already, or this one was taken out of a model with other weights.
    """
    if adapter_of(backbone) is not None:
        raise InputError("this model already carries an adapter; detach it first.")
    if adapter._base is not None and adapter._base.fingerprint != backbone.base.fingerprint:
        raise InputError(
            f"this adapter belongs to {adapter._base.name} and not to {backbone.base.name}"
            f"{folded_note(backbone.base)}; put it on its own base."
        )
    adapter._references = backbone.reference_energies
    for name, parameter in backbone.model.named_parameters():
        adapter._required_grad[name] = parameter.requires_grad
        parameter.requires_grad_(False)
    _install(adapter, backbone)


def _start_afresh(adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for site in adapter.sites:
            part = adapter.part(site, WeightUpdate)
            # weights that a file has trained but the constructor does not draw (Bessel frequencies) keep their start
            if isinstance(part, DenseWeight) and site.name in weights:
                part.value.copy_(weights[site.name])


def _install(adapter: Adapter, backbone: Backbone) -> None:
    model = backbone.model
    readers: dict[str, list[tuple[nn.Module, str, WeightUpdate]]] = {}
    for site in adapter.sites:
        part = adapter.part(site, WeightUpdate)
        if part is not None:
            readers.setdefault(site.reader, []).append((model.get_submodule(site.module), site.parameter, part))
        gate = adapter.part(site, ActivationUpdate)
        if gate is not None:
            handle = model.get_submodule(site.reader).register_forward_hook(_ChangeOutput(adapter, gate))
            adapter._handles.append(handle)
    for reader, shadows in readers.items():
        module = model.get_submodule(reader)
        adapter._handles.append(module.register_forward_pre_hook(_ShowWeights(adapter, shadows)))
        adapter._handles.append(module.register_forward_hook(_HideWeights(shadows), always_call=True))
    backbone.extension = adapter.magnetic
    model.add_module(ADAPTER, adapter)


def _matches_nothing(method: Method, sites: tuple[Site, ...]) -> str:
    if method.target is not None:
        return (
            f"method {method.name} with target {method.target!r} matches none of the model's {len(sites)} sites, "
            f"such as {sites[0].name}; a text must match a whole name as a regular expression, a list gives endings."
        )
    if set(method.table) == {"modality"}:
        return (
            f"method {method.name} trains the rows of a modality, and this model has no modalities: only multi-modal "
            "SevenNet models have some, such as sevennet-mf-0. Choose such a model, or another method."
        )
    kinds = ", ".join(dict.fromkeys(site.kind for site in sites))
    acts = ", ".join(method.table)
    return f"method {method.name} matches none of the model's sites; it acts on {acts}, the model has {kinds}."


def check_loaded(backbone: Backbone) -> None:
    """
    Raises:
        InputError: a name or a path was given instead of a loaded backbone.
    """
    if isinstance(backbone, str | Path):
        raise InputError(f"{short(str(backbone))}: load the model first, as in forcetune.load({short(str(backbone))}).")


def adapter_of(backbone: Backbone) -> Adapter | None:
    """The attached adapter, or None.

    Raises:
        InputError: as :func:`check_loaded`.
    """
    check_loaded(backbone)
    found = backbone.model._modules.get(ADAPTER)
    assert found is None or isinstance(found, Adapter)
    return found


def attached(backbone: Backbone) -> Adapter:
    """The attached adapter.

    Raises:
        InputError: none is attached.
    """
    adapter = adapter_of(backbone)
    if adapter is None:
        raise InputError("this model carries no adapter; attach one or load one first.")
    return adapter


def detach(backbone: Backbone) -> Adapter:
    """Take the adapter out; the backbone is bit for bit what it was, reference energies included."""
    adapter = attached(backbone)
    _remove(adapter, backbone)
    backbone.set_reference_energies(adapter._references)
    adapter._base = backbone.base
    return adapter


def folded_note(base: Base) -> str:
    """For a message: that a model is no longer what was loaded, where adapters were folded into its weights."""
    if not base.folded:
        return ""
    return f", into whose weights an adapter ({', '.join(base.folded)}) is folded already"


def _remove(adapter: Adapter, backbone: Backbone) -> None:
    for handle in adapter._handles:
        handle.remove()
    adapter._handles.clear()
    backbone.extension = None
    del backbone.model._modules[ADAPTER]
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(adapter._required_grad[name])


@contextmanager
def disable_adapter(backbone: Backbone) -> Iterator[None]:
    """Within this context the backbone predicts as the untouched foundation model does."""
    adapter = attached(backbone)
    tuned, was_enabled = backbone.reference_energies, adapter.enabled
    adapter.enabled = False
    backbone.extension = None
    backbone.set_reference_energies(adapter._references)
    try:
        yield
    finally:
        adapter.enabled = was_enabled
        backbone.extension = adapter.magnetic if was_enabled else None
        backbone.set_reference_energies(tuned)


def fold_weights(backbone: Backbone) -> None:
    """Write W' into the backbone's own weights, so that weight updates cost nothing any more; gates stay.

    There is no way back: :func:`detach` afterwards leaves the folded weights. The model is then another base, which
    adapters of the one it was do not fit.
    """
    adapter = attached(backbone)
    folded = False
    with torch.no_grad():
        for site in adapter.sites:
            part = adapter.part(site, WeightUpdate)
            if part is not None:
                weight = _parameter(backbone.model, site)
                weight.copy_(part(weight))
                del adapter.parts[part_key(site, type(part))]
                folded = True
    if folded:
        base = backbone.base
        backbone.base = replace(
            base, sha256="", fingerprint=backbone.fingerprint(), source="", folded=(*base.folded, adapter.method.name)
        )
        adapter.folded = True
    required = dict(adapter._required_grad)
    references = adapter._references
    _remove(adapter, backbone)
    if adapter.parts or adapter.magnetic is not None:
        for parameter in backbone.model.parameters():
            parameter.requires_grad_(False)
        adapter._required_grad, adapter._references = required, references
        _install(adapter, backbone)


def check_mergeable(backbone: Backbone) -> None:
    """
    Raises:
        InputError: the method has gates or other parts that depend on the input and that no weight can absorb.
    """
    adapter = attached(backbone)
    if adapter.magnetic is not None:
        raise InputError(
            "this adapter has a magnetic layer, which no plain model of the library has. Use base and adapter together "
            "(forcetune.calculator(model, adapter=...))."
        )
    if any(isinstance(part, ActivationUpdate) for part in adapter.parts.values()):
        names = sorted({type(p).__name__ for p in adapter.parts.values() if isinstance(p, ActivationUpdate)})
        raise InputError(
            f"method {adapter.method.name} has parts that depend on the input of their layer ({', '.join(names)}), so "
            "no weights can absorb them. Use base and adapter together (forcetune.calculator(model, "
            "adapter=...)), take the nearest plain model (forcetune merge --approximate), or train with a method that "
            "merges, as elora does."
        )


def merge_weights(backbone: Backbone) -> None:
    """Write W' into the backbone's own weights and take the adapter out; reference energies stay as tuned.

    Raises:
        InputError: as :func:`check_mergeable`.
    """
    check_mergeable(backbone)
    fold_weights(backbone)
