"""The losses of mace, by name, as losses of a run.

In mace-torch 0.3.16 (``mace.modules.loss``), with means over frames, and over all components of forces and stress:

- ``weighted``: w_E (ΔE/N)² + w_F ΔF²; ``forces_only`` its second term; ``stress`` with w_S Δσ², too.
- ``huber``: Huber's function of ΔE/N, ΔF and Δσ; ``universal`` the same, but with smaller δ for atoms with forces
  above 100 eV/Å.
- ``ef``: any name without a loss of its own is ``weighted`` with weights 1 and 1, whatever was given. Earlier versions,
  and the MMEA code, which is one, have w_E ΔE² + w_F ΔF² for it, with the energy of the whole frame.
"""

from __future__ import annotations

from typing import Any

from forcetune.cli.mace_train.parsing import Arguments
from forcetune.errors import InputError

_REFUSED = {
    "virials": "weighs virials divided by the number of atoms; take --loss stress (or universal), whose stress is "
    "virial / volume, with a --stress_weight of about the virials weight times (volume per atom)²",
    "l1l2energyforces": "has the length of each atom's force error; take --loss universal or huber",
    "dipole": "trains dipoles, which forcetune does not compute; take mace_run_train",
    "dipole_polar": "trains dipoles and polarisabilities, which forcetune does not compute; take mace_run_train",
    "energy_forces_dipole": "trains dipoles, which forcetune does not compute; take mace_run_train",
}
WITH_STRESS = ("stress", "huber", "universal")
_EF = (
    "--loss ef: energies of whole frames with the weights given, as in the MMEA code; mace-torch 0.3.16 takes energies "
    "per atom and weights 1 and 1 under this name, for which write --loss weighted --energy_weight 1 --forces_weight 1"
)
_UNIVERSAL = (
    "--loss universal: Huber of energies per atom, forces and stress; mace has a smaller delta where forces are above "
    "100 eV/Å, and weights of frames inside Huber"
)


def translate_loss(arguments: Arguments, name: str, notes: list[str]) -> dict[str, Any]:
    """The loss of the first stage.

    Args:
        arguments: of the command line.
        name: of the loss; with replay mace takes ``universal``.
        notes: takes what differs.

    Raises:
        InputError: a loss without a counterpart.
    """
    if name in _REFUSED:
        raise InputError(f"--loss {name}: {_REFUSED[name]}.")
    if name == "ef":
        notes.append(_EF)
    if name == "universal":
        notes.append(_UNIVERSAL)
    loss: dict[str, Any] = {
        "energy": 0.0 if name == "forces_only" else arguments["energy_weight"],
        "forces": arguments["forces_weight"],
        "stress": arguments["stress_weight"] if name in WITH_STRESS else 0.0,
        "form": "huber" if name in ("huber", "universal") else "mse",
        "energy_per_atom": name != "ef",
    }
    if loss["form"] == "huber":
        loss["huber_delta"] = arguments["huber_delta"]
    return loss


def translate_second_loss(arguments: Arguments, name: str, notes: list[str]) -> dict[str, Any]:
    """The loss of stage two: ``stress`` and ``universal`` stay what they are, all others become ``weighted``.

    Raises:
        InputError: mace has no stage two with this loss.
    """
    if name == "forces_only":
        raise InputError("--swa: mace has no stage two with --loss forces_only; leave out --swa and --start_swa.")
    loss: dict[str, Any] = {
        "energy": arguments["swa_energy_weight"],
        "forces": arguments["swa_forces_weight"],
        "stress": arguments["swa_stress_weight"] if name in ("stress", "universal") else 0.0,
        "form": "huber" if name == "universal" else "mse",
        "energy_per_atom": True,
    }
    if name == "universal":
        loss["huber_delta"] = arguments["huber_delta"]
    if name == "huber":
        notes.append("stage two has squares of energies per atom and forces, without stress, as in mace")
    return loss
