"""Put an adapter into a backbone in place, and take it out again without a trace.

The backbone's modules keep their class, their names and their (frozen) parameters. A weight update is seen through
a shadow: while the module that reads a weight runs, an instance attribute of the same name hides the parameter.
An activation update is a forward hook; on a linear layer
of ours a gate is computed together with the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.adapters.adapter import Adapter, parameter_at, part_key
from forcetune.adapters.methods import Method
from forcetune.adapters.updates import ActivationUpdate, WeightUpdate
from forcetune.adapters.updates.dense import DenseWeight
from forcetune.adapters.updates.gate import GateActivation
from forcetune.backbones.protocol import ADAPTER, Backbone, Base, Site
from forcetune.errors import InputError
from forcetune.kernels.features import Features, make_features
from forcetune.kernels.fixed_gate import FixedWeights
from forcetune.kernels.gated_linear import gated_linear
from forcetune.kernels.layers import EquivariantLinear
from forcetune.utils.parsing import short


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
            return make_features(changed, output.layout, geometric=True, trains=True)
        return changed


class _LinearGate:
    """On a linear layer of ours: the layer and its gate in few operations, where that can be done.

    Attributes:
        structure: of both together; None where they are computed one after the other.
    """

    def __init__(self, adapter: Adapter, gate: GateActivation, layer: EquivariantLinear) -> None:
        self.adapter = adapter
        self.gate = gate
        self.structure = gate.structure_on(layer)
        self.fixed = None if self.structure is None else FixedWeights(self.structure)

    def __call__(self, layer: EquivariantLinear, features: Features) -> Features:
        if not self.adapter.enabled:
            return layer.ungated(features)
        if self.structure is None or self.fixed is None or self.gate.watcher is not None:
            output = layer.ungated(features)
            changed: Any = self.gate(features, output)  # pyright: ignore[reportArgumentType]
            if isinstance(changed, Tensor):
                return make_features(changed, output.layout, geometric=True, trains=True)
            return changed
        weights = self.gate.weights()
        blocks = gated_linear(self.structure, layer.weight, weights, features.blocks, self.fixed, layer.kernels)
        return Features(blocks, geometric=features.geometric, trains=True)


class _GateHandle:
    """Takes a gate off a layer, as the handle of a hook does."""

    def __init__(self, layer: EquivariantLinear) -> None:
        self.layer = layer

    def remove(self) -> None:
        self.layer.gated_by = None


def attach(backbone: Backbone, method: Method, *, seed: int | None = 1) -> Adapter:
    """Freeze ``backbone`` and put an adapter for ``method`` into it.

    A freshly attached adapter changes nothing unless the method says otherwise (``shift_init``, ``scratch``).

    Args:
        backbone: a loaded foundation model; changed in place, class and names kept.
        method: the table of updates.
        seed: of the initial values; None takes the global generator as it is.

    Returns:
        The adapter, also ``backbone.model.forcetune_adapter``.

    Raises:
        InputError: an adapter is attached already, or the method matches no site.
    """
    if get_adapter(backbone) is not None:
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
    if get_adapter(backbone) is not None:
        raise InputError("this model already carries an adapter; detach it first.")
    if adapter.base is not None and adapter.base.fingerprint != backbone.base.fingerprint:
        raise InputError(
            f"this adapter belongs to {adapter.base.name} and not to {backbone.base.name}"
            f"{folded_note(backbone.base)}; put it on its own base."
        )
    adapter.base_references = backbone.reference_energies
    for name, parameter in backbone.model.named_parameters():
        adapter.required_grad[name] = parameter.requires_grad
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
            adapter.handles.append(_put_gate(adapter, gate, model.get_submodule(site.reader)))
    for reader, shadows in readers.items():
        module = model.get_submodule(reader)
        adapter.handles.append(module.register_forward_pre_hook(_ShowWeights(adapter, shadows)))
        adapter.handles.append(module.register_forward_hook(_HideWeights(shadows), always_call=True))
    backbone.extension = adapter.magnetic
    model.add_module(ADAPTER, adapter)


def _put_gate(adapter: Adapter, gate: ActivationUpdate, layer: nn.Module) -> Any:
    """Put a gate on a layer; returns what takes it off."""
    if isinstance(gate, GateActivation) and isinstance(layer, EquivariantLinear) and not gate.reads_species:
        layer.gated_by = _LinearGate(adapter, gate, layer)
        return _GateHandle(layer)
    return layer.register_forward_hook(_ChangeOutput(adapter, gate))


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


def get_adapter(backbone: Backbone) -> Adapter | None:
    """The attached adapter, or None.

    Raises:
        InputError: as :func:`check_loaded`.
    """
    check_loaded(backbone)
    adapter = backbone.model._modules.get(ADAPTER)
    assert adapter is None or isinstance(adapter, Adapter)
    return adapter


def require_adapter(backbone: Backbone) -> Adapter:
    """The attached adapter.

    Raises:
        InputError: none is attached.
    """
    adapter = get_adapter(backbone)
    if adapter is None:
        raise InputError("this model carries no adapter; attach one or load one first.")
    return adapter


def detach(backbone: Backbone) -> Adapter:
    """Take the adapter out; the backbone is bit for bit what it was, reference energies included."""
    adapter = require_adapter(backbone)
    _remove(adapter, backbone)
    backbone.set_reference_energies(adapter.base_references)
    adapter.base = backbone.base
    return adapter


def folded_note(base: Base) -> str:
    """For a message: that a model is no longer what was loaded, where adapters were folded into its weights."""
    if not base.folded:
        return ""
    return f", into whose weights an adapter ({', '.join(base.folded)}) is folded already"


def _remove(adapter: Adapter, backbone: Backbone) -> None:
    for handle in adapter.handles:
        handle.remove()
    adapter.handles.clear()
    backbone.extension = None
    del backbone.model._modules[ADAPTER]
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(adapter.required_grad[name])


@contextmanager
def disable_adapter(backbone: Backbone) -> Iterator[None]:
    """Within this context the backbone predicts as the untouched foundation model does."""
    adapter = require_adapter(backbone)
    tuned, was_enabled = backbone.reference_energies, adapter.enabled
    adapter.enabled = False
    backbone.extension = None
    backbone.set_reference_energies(adapter.base_references)
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
    adapter = require_adapter(backbone)
    folded = False
    with torch.no_grad():
        for site in adapter.sites:
            part = adapter.part(site, WeightUpdate)
            if part is not None:
                weight = parameter_at(backbone.model, site)
                weight.copy_(part(weight))
                del adapter.parts[part_key(site, type(part))]
                folded = True
    if folded:
        base = backbone.base
        backbone.base = replace(
            base, sha256="", fingerprint=backbone.fingerprint(), source="", folded=(*base.folded, adapter.method.name)
        )
        adapter.folded = True
    required = dict(adapter.required_grad)
    references = adapter.base_references
    _remove(adapter, backbone)
    if adapter.parts or adapter.magnetic is not None:
        for parameter in backbone.model.parameters():
            parameter.requires_grad_(False)
        adapter.required_grad, adapter.base_references = required, references
        _install(adapter, backbone)


def check_mergeable(backbone: Backbone) -> None:
    """
    Raises:
        InputError: the method has gates or other parts that depend on the input and that no weight can absorb.
    """
    adapter = require_adapter(backbone)
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
