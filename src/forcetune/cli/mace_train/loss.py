"""The losses of mace, by name, as losses of a run.

In mace-torch 0.3.16 (``mace.modules.loss``), with means over frames, and over all components of forces and stress:

- ``weighted``: w_E (ΔE/N)² + w_F ΔF²; ``forces_only`` its second term; ``stress`` with w_S Δσ², too.
- ``virials``: ``stress`` with (V Δσ/N)² instead, V/N being the volume for each atom.
- ``huber``: Huber's function of ΔE/N, ΔF and Δσ; ``universal`` the same, but with smaller δ for atoms with forces
  above 100 eV/Å, and weights of frames inside Huber's function.
- ``l1l2energyforces``: w_E |ΔE/N| + w_F |ΔF|, the latter the length of each atom's error.
- ``ef``: any name without a loss of its own is ``weighted`` with weights 1 and 1, whatever was given. Earlier versions,
  and the MMEA code, which is one, have w_E ΔE² + w_F ΔF² for it, with the energy of the whole frame.
"""

from __future__ import annotations

from typing import Any

from forcetune.cli.mace_train.parsing import Arguments
from forcetune.errors import InputError

_REFUSED = {
    "dipole": "trains dipoles, which forcetune does not compute; take mace_run_train",
    "dipole_polar": "trains dipoles and polarisabilities, which forcetune does not compute; take mace_run_train",
    "energy_forces_dipole": "trains dipoles, which forcetune does not compute; take mace_run_train",
}
WITH_STRESS = ("stress", "virials", "huber", "universal")
_FORMS = {"huber": "huber", "universal": "universal", "l1l2energyforces": "l1l2"}
_EF = (
    "--loss ef: energies of whole frames with the weights given, as in the MMEA code; mace-torch 0.3.16 takes energies "
    "per atom and weights 1 and 1 under this name, for which write --loss weighted --energy_weight 1 --forces_weight 1"
)
_PASSED_OVER = {"huber": "all weights", "universal": "config_weight", "l1l2energyforces": "weights of forces"}
"""What mace passes over of the weights in a file, by its loss."""


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
    if name in _PASSED_OVER:
        notes.append(f"--loss {name}: weights in the file count; mace passes over {_PASSED_OVER[name]} with this loss")
    return _loss(
        name,
        energy=0.0 if name == "forces_only" else arguments["energy_weight"],
        forces=arguments["forces_weight"],
        stress=arguments["virials_weight" if name == "virials" else "stress_weight"],
        delta=arguments["huber_delta"],
    )


def _loss(name: str, *, energy: float, forces: float, stress: float, delta: float) -> dict[str, Any]:
    """The options of a loss of mace."""
    loss: dict[str, Any] = {
        "energy": energy,
        "forces": forces,
        "stress": stress if name in WITH_STRESS else 0.0,
        "form": _FORMS.get(name, "mse"),
        "energy_per_atom": name != "ef",
    }
    if name == "virials":
        loss["stress_per_atom"] = True
    if loss["form"] in ("huber", "universal"):
        loss["huber_delta"] = delta
    return loss


def translate_second_loss(arguments: Arguments, name: str, notes: list[str]) -> dict[str, Any]:
    """The loss of stage two: ``stress``, ``virials`` and ``universal`` stay, all others become ``weighted``.

    Raises:
        InputError: mace has no stage two with this loss.
    """
    if name == "forces_only":
        raise InputError("--swa: mace has no stage two with --loss forces_only; leave out --swa and --start_swa.")
    if name == "huber":
        notes.append("stage two has squares of energies per atom and forces, without stress, as in mace")
    return _loss(
        name if name in ("stress", "virials", "universal") else "weighted",
        energy=arguments["swa_energy_weight"],
        forces=arguments["swa_forces_weight"],
        stress=arguments["swa_virials_weight" if name == "virials" else "swa_stress_weight"],
        delta=arguments["huber_delta"],
    )
