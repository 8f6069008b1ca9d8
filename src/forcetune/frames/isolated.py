"""What isolated atoms in a file say about reference energies, and whether it fits the other frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols

from forcetune.frames.frame import FloatArray, Frame

DISAGREES = 2.0
"""eV an atom; levels of theory differ by less in the energy that binds an atom (GFN2-xTB and DFT by 1)."""


@dataclass(frozen=True, slots=True)
class IsolatedAtoms:
    """Energies of isolated atoms against those of the frames.

    Attributes:
        energies: atomic number → energy of the isolated atom, eV.
        model: atomic number → the model's own E0, eV.
        offset_mev_per_atom: mean over frames of |E_label − E_model| / atoms with the isolated atoms as E0, meV; None
            where no frame has only such elements.
    """

    energies: dict[int, float]
    model: dict[int, float]
    offset_mev_per_atom: float | None

    @property
    def disagree(self) -> bool:
        """Whether frames and isolated atoms cannot be of one level of theory that the model is near to."""
        return self.offset_mev_per_atom is not None and self.offset_mev_per_atom > 1e3 * DISAGREES

    def sentence(self, mode: str, offset: float | None = None) -> str:
        """What they say, and what to do.

        Args:
            mode: of the run's reference energies.
            offset: mean offset that these leave, meV/atom.
        """
        text = f"Isolated atoms have {self.listed()}"
        if self.offset_mev_per_atom is None:
            return f"{text}; --references isolated takes them as reference energies, once each element has one."
        text += f"; as reference energies they leave a mean offset of {self.offset_mev_per_atom:,.1f} meV/atom"
        if mode == "isolated":
            advice = "--references estimate fits the frames"
        else:
            if offset is not None:
                text += f" instead of {offset:,.1f} (--references {mode})"
            advice = "they are left aside; --references isolated takes them all the same"
        if self.disagree:
            return (
                f"{text}: they are of other settings, spin or level of theory than the frames or the model; {advice}."
            )
        return f"{text}." if mode == "isolated" else f"{text}; --references isolated takes them."

    def listed(self) -> str:
        """``H −13.60 (model −10.71), …`` in eV."""
        return (
            ", ".join(
                f"{chemical_symbols[z]} {energy:.2f} (model {self.model[z]:.2f})".replace("-", "−")
                for z, energy in sorted(self.energies.items())
            )
            + " eV"
        )


def compare_isolated(
    isolated: Sequence[Frame],
    frames: Sequence[Frame],
    model_energies: Sequence[float] | FloatArray,
    model_references: Mapping[int, float],
) -> IsolatedAtoms | None:
    """Compare isolated atoms with the frames; None where there are none of the model's elements.

    Args:
        isolated: frames of one atom, see :func:`forcetune.frames.splits.separate_isolated`.
        frames: the others.
        model_energies: (frames,), eV, with the model's own E0.
        model_references: atomic number → the model's E0, eV.
    """
    if not len(isolated):
        return None
    energies: dict[int, float] = {}
    for frame in isolated:
        z = int(frame.numbers[0])
        if frame.energy is not None and z in model_references:
            energies.setdefault(z, frame.energy)
    if not energies:
        return None
    offsets = []
    for frame, predicted in zip(frames, model_energies, strict=True):
        if frame.energy is None or not set(frame.numbers.tolist()) <= set(energies):
            continue
        shift = sum(energies[int(z)] - model_references[int(z)] for z in frame.numbers)
        offsets.append(abs(frame.energy - float(predicted) - shift) / len(frame))
    offset = 1e3 * float(np.mean(offsets)) if offsets else None
    return IsolatedAtoms(energies, {z: float(model_references[z]) for z in energies}, offset)
