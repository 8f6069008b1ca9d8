"""What a change of the foundation model costs beside the loss: L2-SP, EWC, and L2 on gates.

All terms are functions of the adapter alone, so that they are the same for every batch and need no recorded step.
They are zero for an adapter that changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forcetune.adapters.adapter import parameter_at
from forcetune.adapters.attach import require_adapter
from forcetune.adapters.methods import Method
from forcetune.adapters.updates import ActivationUpdate, Gate, Shift, Update, WeightUpdate
from forcetune.adapters.updates.gate import GateActivation
from forcetune.adapters.updates.shift import ShiftActivation
from forcetune.backbones.protocol import Backbone, Site
from forcetune.config import PenaltyConfig
from forcetune.errors import InputError
from forcetune.training.anchor import Anchor
from forcetune.training.outcome import PenaltyTerms


class Penalty:
    """The terms of a penalty for the adapter that a backbone carries now.

    - ``l2sp``: λ/2 Σ (W' − W)² over all weights with an update (Li, Grandvalet & Davoine, ICML 2018).
    - ``ewc``: λ/2 Σ F (W' − W)² (Kirkpatrick et al., PNAS 114, 3521, 2017, eq. 3), F of
      :func:`forcetune.training.anchor.estimate_fisher`.
    - ``gates``: λ/2 Σ ⟨(g − 1)²⟩ + ⟨(s / σ)²⟩ over gates and channels, with gains g, shifts s and the root mean
      square σ of what the layer puts out, averaged over atoms of the anchor as they
      enter the layer in the foundation model.
    """

    def __init__(self, config: PenaltyConfig, backbone: Backbone, anchor: Anchor) -> None:
        adapter = require_adapter(backbone)
        self.config = config
        self.anchor = anchor
        parts = [(site, adapter.part(site, WeightUpdate)) for site in adapter.sites]
        self._weights: list[tuple[Tensor, WeightUpdate]] = [
            (parameter_at(backbone.model, site), part) for site, part in parts if part is not None
        ]
        self._gates: list[tuple[str, GateActivation | ShiftActivation]] = [
            (site.name, part)
            for site in adapter.sites
            if isinstance(part := adapter.part(site, ActivationUpdate), GateActivation | ShiftActivation)
        ]
        self._fisher: Tensor | None = None
        if config.ewc:
            changed = [site.name for site, part in parts if part is not None]
            self._fisher = torch.cat([anchor.fisher[name].reshape(-1) for name in changed])

    def compute(self) -> Tensor:
        """The sum of all terms, a scalar in float64 that can be differentiated."""
        return torch.stack(list(self._terms().values())).sum()

    @torch.no_grad()
    def terms(self) -> PenaltyTerms:
        """Values of the terms."""
        values = {name: float(term) for name, term in self._terms().items()}
        return PenaltyTerms(
            l2sp=values.get("l2sp"),
            ewc=values.get("ewc"),
            gates=values.get("gates"),
            source=self.anchor.source,
            n_frames=self.anchor.n_frames,
        )

    def _terms(self) -> dict[str, Tensor]:
        config, terms = self.config, {}
        if config.l2sp or config.ewc:
            change = torch.cat([(part(weight) - weight).reshape(-1) for weight, part in self._weights]).double()
            squares = change.square()
            if config.l2sp:
                terms["l2sp"] = 0.5 * config.l2sp * squares.sum()
            if self._fisher is not None:
                terms["ewc"] = 0.5 * config.ewc * (self._fisher * squares).sum()
        if config.gates:
            deviations = [self._deviation(name, gate) for name, gate in self._gates]
            terms["gates"] = 0.5 * config.gates * torch.stack(deviations).sum()
        return terms

    def _deviation(self, name: str, gate: GateActivation | ShiftActivation) -> Tensor:
        """⟨(g − 1)²⟩ + ⟨(s / σ)²⟩ of one gate, summed over channels, float64."""
        anchor = self.anchor
        if isinstance(gate, ShiftActivation):
            return (gate.shift / anchor.scales[name]).double().square().sum()
        shifts, gains = gate.shifts_and_gains(anchor.scalars[name], anchor.species.get(name))
        squares = []
        if shifts is not None:
            squares.append((shifts / anchor.scales[name]).double().square())
        if gains is not None:
            squares.append((gains - 1).double().square())
        return torch.cat(squares, dim=-1).sum(dim=-1).mean()


def check_penalty(config: PenaltyConfig, method: Method, sites: Sequence[Site]) -> None:
    """
    Raises:
        InputError: the method has nothing that a term could act on, or starts from random values.
    """
    if not config.is_set:
        return
    if method.fresh:
        raise InputError(
            f"method {method.name} starts from random values, so there is no foundation model to stay near; leave "
            "training.penalty out."
        )
    updates = [update for site in sites for update in method.updates_at(site)]
    if config.gates and not any(map(_is_gate, updates)):
        raise InputError(
            f"training.penalty.gates: method {method.name} has no gates or shifts that it could hold back"
            + ("; use training.penalty.l2sp or training.penalty.ewc, which act on weights." if updates else ".")
        )
    for name in ("l2sp", "ewc"):
        if getattr(config, name) and not any(update.mergeable for update in updates):
            instead = "use training.penalty.gates instead" if any(map(_is_gate, updates)) else "leave it out"
            raise InputError(
                f"training.penalty.{name}: method {method.name} changes no weights, only outputs of layers; {instead}."
            )


def unpenalized_parts(config: PenaltyConfig, method: Method, sites: Sequence[Site]) -> str | None:
    """What a method trains and no term of the penalty acts on, in a sentence; None where there is nothing."""
    if not config.is_set:
        return None
    updates = [update for site in sites for update in method.updates_at(site)]
    parts = []
    if not config.gates and any(map(_is_gate, updates)):
        parts.append("gates and shifts are free to change (training.penalty.gates holds them back)")
    if not (config.l2sp or config.ewc) and any(update.mergeable for update in updates):
        parts.append("weights are free to change (training.penalty.l2sp or ewc holds them back)")
    if method.magnetism is not None:
        parts.append("the magnetic layer, which the foundation model does not have, is free")
    return "; ".join(parts) or None


def _is_gate(update: Update) -> bool:
    return isinstance(update, Gate | Shift)
