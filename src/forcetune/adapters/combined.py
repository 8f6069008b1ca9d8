"""Several adapters as one: what :class:`forcetune.adapters.combine.Combination` attaches and a file keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from forcetune.adapters.adapter import part_key
from forcetune.adapters.attach import Adapter
from forcetune.adapters.methods import Method
from forcetune.adapters.updates import ActivationUpdate, Update, WeightUpdate
from forcetune.adapters.updates.base import TrainablePart
from forcetune.backbones.protocol import Backbone, Site
from forcetune.kernels.features import Features


class CombinedPart(TrainablePart):
    """What the members do at one site, each with its scale.

    Attributes:
        members: name to the part of that adapter.
    """

    def __init__(self, scales: Mapping[str, float]) -> None:
        super().__init__()
        self.members = nn.ModuleDict()
        self._scales = scales

    def parts(self) -> dict[str, Any]:
        """The parts by the names of their adapters."""
        return dict(self.members.items())

    def packed(self) -> dict[str, Tensor]:
        """What a file keeps of every member, under ``member/name``."""
        return {
            f"{member}/{name}": tensor
            for member, part in self.parts().items()
            for name, tensor in part.packed().items()
        }

    @torch.no_grad()
    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`packed` gave.

        Raises:
            ValueError: a tensor has the wrong shape or type.
        """
        for member, part in self.parts().items():
            start = f"{member}/"
            member_tensors = {
                name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)
            }
            try:
                part.unpack(member_tensors)
            except ValueError as error:
                raise ValueError(f"{start}{error}") from error


class CombinedWeight(CombinedPart, WeightUpdate):
    """W + Σ s (W′ − W) over the members, each W′ made from the base's own W."""

    def forward(self, weight: Tensor) -> Tensor:
        combined = weight
        for name, part in self.parts().items():
            scale = self._scales[name]
            if scale:
                combined = combined + scale * (part(weight) - weight)
        return combined


class CombinedActivation(CombinedPart, ActivationUpdate):
    """The members one after the other: out ← out + s (out′ − out)."""

    @property
    def reads_species(self) -> bool:
        return any(part.reads_species for part in self.parts().values())

    def forward(self, inputs: Tensor, outputs: Any, species: Tensor | None = None) -> Any:
        for name, part in self.parts().items():
            scale = self._scales[name]
            if not scale:
                continue
            changed = part(inputs, outputs, species) if part.reads_species else part(inputs, outputs)
            outputs = changed if scale == 1 else _flat(outputs) + scale * (_flat(changed) - _flat(outputs))
        return outputs


def _flat(value: Any) -> Tensor:
    return value.flat if isinstance(value, Features) else value


class CombinedAdapter(Adapter):
    """One part for each site that has any, which holds those of all members. Nothing of it is trained.

    Attributes:
        methods: of the members, by name.
        scales: how strongly each of them counts; 1 as it was trained, 0 not at all.
    """

    def __init__(self, backbone: Backbone, members: Mapping[str, Adapter], scales: Mapping[str, float]) -> None:
        """
        Args:
            backbone: what they belong to.
            members: adapters that are not attached, by name, without magnetic layers.
            scales: by name; read whenever something is predicted.
        """
        super().__init__(Method("combination", {}, " + ".join(members)), backbone)
        self.methods = {name: member.method for name, member in members.items()}
        self.scales = scales
        for kind, holder in ((WeightUpdate, CombinedWeight), (ActivationUpdate, CombinedActivation)):
            for site in self.sites:
                parts = {name: member.part(site, kind) for name, member in members.items()}
                if any(part is not None for part in parts.values()):
                    self.parts[part_key(site, kind)] = combined = holder(scales)
                    combined.members.update({name: part for name, part in parts.items() if part is not None})
        self.requires_grad_(False)

    @property
    def equivariant(self) -> bool:
        return all(method.equivariant for method in self.methods.values())

    def updates_at(self, site: Site) -> tuple[Update, ...]:
        """The updates of all members, each once."""
        return tuple(dict.fromkeys(one for method in self.methods.values() for one in method.updates_at(site)))
