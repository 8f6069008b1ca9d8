"""Which keys hold the labels.

Labels are looked for under these names, in this order, and one choice holds for the whole set:

- energy: ``REF_energy, dft_energy, DFT_energy, ref_energy, energy, Energy, TotEnergy, total_energy,
  free_energy``
- forces: ``REF_forces, dft_forces, DFT_forces, ref_forces, forces, Forces, force, dft_force, DFT_force``
- stress: ``REF_stress, dft_stress, DFT_stress, ref_stress, stress, Stress``, then virials
  ``REF_virials, REF_virial, dft_virials, dft_virial, DFT_virials, DFT_virial, ref_virials, ref_virial, virials,
  virial, Virials, Virial``, from which stress = −virial / volume
- moments: ``REF_magmoms, REF_magmom, dft_magmoms, dft_magmom, magmoms, magmom, moments``; one number per atom
  stands for the z component
- Hessians: ``REF_hessian, dft_hessian, DFT_hessian, ref_hessian, hessian, Hessian``
- spins (the magnetic state that a spin-aware layer is given): ``REF_spins, spins, initial_magmoms``
- magnetic forces (−∂E/∂m of each moment): ``REF_magforces, dft_magforces, magforces, mag_forces, force_mag``

Moments, spins and magnetic forces are looked for only where a run asks for them. Last come the results of an attached
ASE calculator (``calculator``). A stress and a virial that say the same are one label. ASE's extended-XYZ reader moves
``energy``, ``forces``, ``stress``, … into such a calculator; they are found under the name they have in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from ase import Atoms

from forcetune.errors import InputError, warn
from forcetune.frames.frame import SMALLEST_VOLUME, FloatArray, LabelKeys, Origin, compute_volume

Label = Literal["energy", "forces", "stress", "moments", "spins", "hessian", "magforces"]
LABELS: tuple[Label, ...] = get_args(Label)

AUTO = "auto"
NONE = "none"
CALCULATOR = "calculator"

CANDIDATES: dict[Label, tuple[str, ...]] = {
    "energy": (
        *("REF_energy", "dft_energy", "DFT_energy", "ref_energy", "energy", "Energy"),
        *("TotEnergy", "total_energy", "free_energy", CALCULATOR),
    ),
    "forces": (
        *("REF_forces", "dft_forces", "DFT_forces", "ref_forces", "forces", "Forces"),
        *("force", "dft_force", "DFT_force", CALCULATOR),
    ),
    "stress": (
        *("REF_stress", "dft_stress", "DFT_stress", "ref_stress", "stress", "Stress"),
        *("REF_virials", "REF_virial", "dft_virials", "dft_virial", "DFT_virials", "DFT_virial"),
        *("ref_virials", "ref_virial", "virials", "virial", "Virials", "Virial", CALCULATOR),
    ),
    "moments": (
        *("REF_magmoms", "REF_magmom", "dft_magmoms", "dft_magmom"),
        *("magmoms", "magmom", "moments", CALCULATOR),
    ),
    "spins": ("REF_spins", "spins", "initial_magmoms"),
    "hessian": ("REF_hessian", "dft_hessian", "DFT_hessian", "ref_hessian", "hessian", "Hessian"),
    "magforces": ("REF_magforces", "dft_magforces", "magforces", "mag_forces", "force_mag"),
}

MAGNETIC: tuple[Label, ...] = ("moments", "spins", "magforces")
"""Labels that are looked for only where there is a magnetic layer."""

_NAMES_IN_RESULTS: dict[Label, str] = {"moments": "magmoms"}
"""Where a calculator's results have another name."""

_STRUCTURE_ARRAYS = frozenset({"numbers", "positions"})

_VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])
_SAME_STRESS = 1e-4
"""Of the largest component; stress and virial that differ by less are one label, written with different digits."""


@dataclass(frozen=True, slots=True, eq=False)
class RawFrame:
    """A structure as ASE gave it, with what may hold labels.

    Attributes:
        named: what stands under a name in the file or the Atoms object (``info`` and ``arrays``).
        results: what stands in the results of the calculator, unconstrained.
        moved: the results were names in an extended-XYZ file.
        stale: the calculator has results, but of another structure.
        count: frames that this one stands for, itself included.
    """

    atoms: Atoms
    origin: Origin
    named: dict[str, Any]
    results: dict[str, Any]
    moved: bool = False
    stale: bool = False
    count: int = 1


def raw_frame(atoms: Atoms, origin: Origin, *, moved: bool = False, in_memory: bool = False) -> RawFrame:
    """What a structure holds; ``moved`` for those from extended XYZ, ``in_memory`` for those not from a file."""
    # the raw results, because atoms.get_forces() zeroes the forces of constrained atoms
    results: dict[str, Any] = dict(getattr(atoms.calc, "results", {}))
    stale = bool(in_memory and results and _belongs_elsewhere(atoms))
    if stale:
        results = {}
    arrays = {key: value for key, value in atoms.arrays.items() if key not in _STRUCTURE_ARRAYS}
    named = {key: value for key, value in {**arrays, **atoms.info}.items() if isinstance(key, str)}
    if moved:
        named = {**results, **named}
    return RawFrame(atoms, origin, named, results, moved, stale)


def _belongs_elsewhere(atoms: Atoms) -> bool:
    """Whether the results are those of another structure (moved since, or one calculator for all)."""
    check = getattr(atoms.calc, "check_state", None)
    return check is not None and bool({"positions", "numbers", "cell", "pbc"} & set(check(atoms)))


def choose_keys(
    raws: Sequence[RawFrame],
    asked: LabelKeys,
    require: Sequence[Label],
    name: str,
    files: Sequence[str] | None = None,
    expect: Sequence[Label] = (),
) -> LabelKeys:
    """The key of each label for the whole set, None for a label that is not there or not wanted.

    Args:
        raws: all frames.
        asked: for each label a key, ``auto``, ``none`` or ``calculator``.
        require: labels that every frame must have.
        name: what the data are, for messages about all of them.
        files: where the frames come from, for the same; None takes those of ``raws``.
        expect: labels that some frame must have, unless ``asked`` is ``none``.

    Raises:
        InputError: a required or expected label, or a key that was asked for, is not there; or a required label is not
            in every frame.
    """
    if unknown := {*require, *expect} - set(LABELS):
        raise ValueError(f"require: {sorted(unknown)} are not among {list(LABELS)}")
    chosen: dict[str, str | None] = {}
    for label in LABELS:
        required, wanted = label in require, getattr(asked, label) or NONE
        expected = required or (label in expect and wanted != NONE)
        key = choose_key(label, wanted, raws, expected, name, files)
        if key is not None:
            _check_complete(label, key, raws, required, name)
        chosen[label] = key
    return LabelKeys(**chosen)


def label_under(raw: RawFrame, label: Label, key: str) -> Any:
    """What a frame holds under this key, or under this name in its calculator's results, or None."""
    if key == CALCULATOR:
        return raw.results.get(_NAMES_IN_RESULTS.get(label, label))
    value = raw.named.get(key)
    return raw.results.get(key) if value is None else value


def own_label(raw: RawFrame, label: Label, key: str) -> Any:
    """What a frame holds under exactly this key, or None."""
    if key == CALCULATOR:
        return None if raw.moved else raw.results.get(_NAMES_IN_RESULTS.get(label, label))
    return raw.named.get(key)


def choose_key(
    label: Label,
    key: str,
    raws: Sequence[RawFrame],
    required: bool,
    name: str,
    files: Sequence[str] | None = None,
) -> str | None:
    """As :func:`choose_keys`, of one label.

    Raises:
        InputError: the label is required, or its key was asked for, and no frame has it.
    """
    needed = required and not all(may_lack(raw, label) for raw in raws)
    if key == NONE:
        if required:
            raise InputError(f"{name}: {label}_key is 'none', but {label} labels are needed; name their key.")
        return None
    if key != AUTO:
        if any(label_under(raw, label, key) is not None for raw in raws):
            return key
        if all(may_lack(raw, label) for raw in raws):
            return None
        raise InputError(
            f"{name} ({_files(raws, files)}): no frame has {label} under '{key}'; {_listing(raws)} "
            f"Set {label}_key to the right one."
        )
    present = [c for c in CANDIDATES[label] if any(own_label(raw, label, c) is not None for raw in raws)]
    if not present:
        if not needed:
            return None
        raise InputError(
            f"{name} ({_files(raws, files)}): no {label} found under the usual keys; {_listing(raws)} "
            f"Set {label}_key to the right one, or to 'none' to do without."
        )
    first, *others = present
    different = {other: _differing_frame(label, first, other, raws) for other in others}
    if aside := [repr(other) for other, raw in different.items() if raw is not None]:
        opposed = [other for other, raw in different.items() if raw is not None and _opposed(label, first, other, raw)]
        signs = f" ({opposed[0]} has the opposite sign)" if opposed else ""
        warn(
            f"{name}: {label} taken from '{first}'; {', '.join(aside)} with other values ignored{signs}. "
            f"Set {label}_key to choose."
        )
    return first


def _differing_frame(label: Label, chosen: str, other: str, raws: Sequence[RawFrame]) -> RawFrame | None:
    """The first frame that holds both keys with different values, so that the choice matters."""
    for raw in raws:
        ours, theirs = label_under(raw, label, chosen), own_label(raw, label, other)
        if ours is None or theirs is None or ours is theirs:
            continue
        try:
            same = np.array_equal(np.asarray(ours), np.asarray(theirs))
        except ValueError:
            same = False  # ragged lists are no labels
        if not same and not (label == "stress" and _is_same_stress(raw, chosen, other)):
            return raw
    return None


def _is_same_stress(raw: RawFrame, one: str, other: str, sign: float = 1.0) -> bool:
    """Whether a stress or virial under one key is that under another, in whatever form, times a sign."""
    try:
        first, second = (stress_tensor(raw, key, label_under(raw, "stress", key)) for key in (one, other))
    except (InputError, TypeError, ValueError):
        return False
    size = max(float(np.abs(first).max()), float(np.abs(second).max()))
    return bool(np.abs(first - sign * second).max() <= _SAME_STRESS * size)


def _opposed(label: Label, one: str, other: str, raw: RawFrame) -> bool:
    return label == "stress" and _is_same_stress(raw, one, other, sign=-1.0)


def stress_tensor(raw: RawFrame, key: str, values: Any) -> FloatArray:
    """(3, 3) stress, eV/Å³, from Voigt order (xx, yy, zz, yz, xz, xy), nine numbers or a matrix; or from a virial, eV.

    Raises:
        InputError: it has another shape, or a virial belongs to no cell; names file and frame.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape == (6,):
        matrix = numbers[_VOIGT]
    elif numbers.shape in {(9,), (3, 3)}:
        matrix = numbers.reshape(3, 3)
    else:
        raise InputError(
            f"{raw.origin}: the stress under '{key}' should be 6 or 9 numbers but has shape {numbers.shape}; fix it."
        )
    if "virial" not in key.lower():
        return matrix
    volume = compute_volume(raw.atoms.cell.array)
    if volume < SMALLEST_VOLUME:
        raise InputError(
            f"{raw.origin}: the virial under '{key}' cannot become a stress because the cell has no volume; "
            "give the frame a cell or set stress_key to 'none'."
        )
    return -matrix / volume


def differing(label: Label, keys: Sequence[str], raw: RawFrame) -> frozenset[tuple[str, str]]:
    """The pairs of these keys under which a frame holds different values."""
    pairs = [(one, other) for index, one in enumerate(keys) for other in keys[index + 1 :]]
    return frozenset(pair for pair in pairs if _differing_frame(label, *pair, [raw]) is not None)


def may_lack(raw: RawFrame, label: Label) -> bool:
    """Forces of an isolated atom are zero and stress of a molecule is undefined: data leave them out."""
    if label == "forces":
        config_type = str(raw.named.get("config_type", "")).replace("_", "").lower()
        return len(raw.atoms) == 1 or config_type == "isolatedatom"
    return label == "stress" and not raw.atoms.pbc.any()


def lacking(label: Label, key: str, raws: Sequence[RawFrame]) -> list[RawFrame]:
    """The frames that should have a label and do not; Hessians are those of a few chosen frames."""
    if label == "hessian":
        return []
    return [raw for raw in raws if label_under(raw, label, key) is None and not may_lack(raw, label)]


def _check_complete(label: Label, key: str, raws: Sequence[RawFrame], required: bool, name: str) -> None:
    missing = lacking(label, key, raws)
    if not missing:
        return
    lack, total = (sum(raw.count for raw in some) for some in (missing, raws))
    if required:
        raise InputError(
            f"{missing[0].origin} has no {label} under '{key}' ({lack} of {total} frames lack "
            f"it); {_listing(missing[:1])} Remove the frame or set {label}_key."
        )
    warn(
        f"{name}: {lack} of {total} frames have no {label} under '{key}', first {missing[0].origin}; they count by the "
        "labels that they have."
    )


def _listing(raws: Sequence[RawFrame]) -> str:
    """A sentence with the keys that are there, for a message about one that is not."""
    names = sorted({key for raw in raws for key in raw.named} - {"initial_magmoms", "initial_charges", "tags"})
    results = sorted({key for raw in raws if not raw.moved for key in raw.results})
    listed = ", ".join(f"'{key}'" for key in names[:16]) + (", …" if len(names) > 16 else "")
    parts = [f"the keys there are {listed}"] if names else []
    if results:
        parts.append(f"the calculator has {', '.join(results)}")
    if any(raw.stale for raw in raws):
        parts.append("the results of the calculator belong to another structure")
    return (" and ".join(parts) if parts else "there are no labels at all") + "."


def _files(raws: Sequence[RawFrame], files: Sequence[str] | None) -> str:
    files = list(dict.fromkeys(raw.origin.file for raw in raws)) if files is None else files
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
