"""Several trained adapters on one base at once: add, switch, scale, average, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from forcetune.adapters.attach import Adapter, detach, get_adapter, reattach
from forcetune.adapters.combined import CombinedAdapter
from forcetune.adapters.file import is_member_name, load_adapter
from forcetune.adapters.hub import locate_adapter
from forcetune.backbones.protocol import Backbone
from forcetune.errors import InputError


class Combination:
    """Trained adapters, by name, on one backbone, each with a scale.

    Weights become W + Σ s (W′ − W); what gates and the like do to an output is blended the same way, one after the
    other in the order in which they were added; reference energies become E0 + Σ s (E0′ − E0). A scale of 1 for one
    and 0 for the others is that one adapter exactly. The backbone predicts, deploys and merges
    (:func:`forcetune.adapters.attach.merge_weights`) as with a single adapter, and the combination is saved and loaded
    as one, with the scales that it has then.
    """

    def __init__(self, backbone: Backbone) -> None:
        """
        Raises:
            InputError: the backbone carries an adapter already.
        """
        if get_adapter(backbone) is not None:
            raise InputError("this model already carries an adapter; detach it first.")
        self.backbone = backbone
        self._scales: dict[str, float] = {}
        self._members: dict[str, Adapter] = {}
        self._references: dict[str, dict[int, float]] = {}
        self._own = backbone.reference_energies

    @property
    def scales(self) -> dict[str, float]:
        """Scale of every adapter, in the order in which they were added."""
        return dict(self._scales)

    def add(self, name: str, folder: str | Path, *, scale: float = 1.0) -> None:
        """Load one more adapter.

        Args:
            name: to call it by; without dots and slashes.
            folder: adapter folder, run folder or ``hub:owner/name``.
            scale: 1 as trained, 0 off.

        Raises:
            InputError: a name twice, an adapter of another base or one with a magnetic layer; the combination stays as
                it was.
        """
        if name in self._members or not is_member_name(name):
            raise InputError(f"adapter name {name!r}: take another one, without dots and slashes and not yet in use.")
        path = locate_adapter(folder)
        self._lift()
        path = path / "adapter" if (path / "adapter").is_dir() else path
        try:
            loaded = load_adapter(self.backbone, path)
            if loaded.magnetic is not None or isinstance(loaded, CombinedAdapter):
                detach(self.backbone)
                what = "has a magnetic layer" if loaded.magnetic is not None else "is a combination itself"
                raise InputError(f"{path}: {what}, which cannot be combined with others; use it alone.")
            self._references[name] = self.backbone.reference_energies
            self._members[name] = detach(self.backbone)
            self._scales[name] = float(scale)
        finally:
            self._put()

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self._known(name)
        self._lift()
        for table in (self._members, self._scales, self._references):
            del table[name]
        self._put()

    def set_scale(self, name: str, scale: float) -> None:
        """Change how strongly an adapter counts; 0 disables it."""
        self._known(name)
        self._scales[name] = float(scale)
        self._set_references()

    def switch(self, name: str) -> None:
        """This adapter as it was trained, and no other."""
        self._known(name)
        for other in self._scales:
            self._scales[other] = float(other == name)
        self._set_references()

    def average(self) -> None:
        """All adapters with equal shares that sum to 1."""
        for name in self._scales:
            self._scales[name] = 1 / len(self._scales)
        self._set_references()

    def detach(self) -> None:
        """Take everything out; the backbone is what it was."""
        self._lift()

    def _known(self, name: str) -> None:
        if name not in self._members:
            raise InputError(f"there is no adapter {name!r} here; there are {', '.join(self._members) or 'none'}.")

    def _lift(self) -> None:
        if get_adapter(self.backbone) is not None:
            detach(self.backbone)

    def _put(self) -> None:
        """Attach one part for each site that has any, which holds those of all members."""
        if not self._members:
            return
        reattach(self.backbone, CombinedAdapter(self.backbone, self._members, self._scales))
        self._set_references()

    def _set_references(self) -> None:
        self.backbone.set_reference_energies(
            {
                z: energy + sum(s * (self._references[name][z] - energy) for name, s in self._scales.items())
                for z, energy in self._own.items()
            }
        )


def combine(backbone: Backbone, adapters: Mapping[str, str | Path], *, average: bool = False) -> Combination:
    """Put several trained adapters on one base.

    Args:
        backbone: their base, cut to the elements they were trained for (``forcetune.load(model, elements=…)``).
        adapters: name → adapter folder or run folder.
        average: equal shares that sum to 1 instead of all as trained.

    Raises:
        InputError: an adapter of another base.
    """
    combination = Combination(backbone)
    try:
        for name, folder in adapters.items():
            combination.add(name, folder)
    except BaseException:
        combination.detach()
        raise
    if average:
        combination.average()
    return combination
