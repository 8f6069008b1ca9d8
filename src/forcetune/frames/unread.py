"""Names in a file that look like labels and are not read, so that they are named and not passed over in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from forcetune.frames.frame import LabelKeys
from forcetune.frames.labels import CANDIDATES, MAGNETIC, NONE, Label, RawFrame

_LABEL = re.compile(r"energ|force|stress|virial|^[ef]$", re.IGNORECASE)
_STATE = re.compile(r"charge|spin|multiplicity|dipole", re.IGNORECASE)
_MAGNETIC = re.compile(r"magmom|magnetic_moment|^moments$|mag_?force|force_mag", re.IGNORECASE)
_SHOWN = 6

CHARGE_KEYS = ("charge", "total_charge", "net_charge", "Charge")
MULTIPLICITY_KEYS = ("spin", "multiplicity", "spin_multiplicity", "total_spin", "Spin")

_PASSED_OVER = frozenset({"corrected_total_energy", "uncorrected_total_energy"})
"""Names that a reader of ours adds to those of the file."""


def describe_unread(
    raws: Sequence[RawFrame], keys: LabelKeys, asked: LabelKeys, ignored: Sequence[Label] = ()
) -> str | None:
    """A sentence about what looks like a label and is not read; None where there is nothing.

    Args:
        raws: all frames.
        keys: what is read.
        asked: labels of which the user said ``none`` are not reported.
        ignored: magnetic labels that are left out on purpose, and not reported either.
    """
    known = {*CANDIDATES["energy"], *CANDIDATES["forces"], *CANDIDATES["stress"], *(key for key in keys if key)}
    for label in MAGNETIC:
        if label in ignored or getattr(asked, label) not in (None, NONE):
            known |= {*CANDIDATES[label]}
    names = sorted({name for raw in raws for name in raw.named} - known - _PASSED_OVER)
    names = [name for name in names if not name.startswith(("initial_", "config_"))]
    magnetic = [name for name in names if _MAGNETIC.search(name) or name in ("REF_spins", "spins")]
    states = [name for name in names if name not in magnetic and _STATE.search(name)]
    labels = [name for name in names if name not in (*magnetic, *states) and _LABEL.search(name)]
    parts = []
    if labels:
        parts.append(
            f"{_listed(labels)} look{_s(labels)} like {'labels' if labels[1:] else 'a label'} and "
            f"{'are' if labels[1:] else 'is'} not read; if so, set energy_key, forces_key or stress_key"
        )
    if states:
        parts.append(
            f"{_listed(states)} {'are' if states[1:] else 'is'} not read: the model does not know "
            f"{'them' if states[1:] else 'it'}, so that frames should not differ in {'them' if states[1:] else 'it'}"
        )
    if magnetic:
        are = "are" if magnetic[1:] else "is"
        has_layer = any(getattr(asked, label) not in (None, NONE) for label in MAGNETIC)
        parts.append(
            f"{_listed(magnetic)} {are} not read: no key asks for {'them' if magnetic[1:] else 'it'}"
            if has_layer
            else f"{_listed(magnetic)} {are} read only with a magnetic layer (--magnetic)"
        )
    return f"{'; '.join(parts)}." if parts else None


def scalar_under(raw: RawFrame, names: Iterable[str]) -> float | None:
    """The first number under one of these names; None where there is none, or no number."""
    for name in names:
        value = raw.named.get(name)
        if value is None:
            continue
        try:
            return float(value)
        except (TypeError, ValueError):
            continue
    return None


def _listed(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        return ", ".join([*quoted, "…"])
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else quoted[0]


def _s(names: Sequence[str]) -> str:
    return "" if len(names) > 1 else "s"
