"""Numbers, errors and names as people read them, for the terminal and for pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SPLITS = ("test", "valid", "train")
"""The order in which splits are shown: what was never trained on comes first."""

QUANTITIES = (
    ("Energy", "meV/atom", "energy_{}_mev_per_atom"),
    ("Energy", "meV", "energy_{}_mev"),
    ("Forces", "meV/Å", "forces_{}_mev_per_ang"),
    ("Stress", "meV/Å³", "stress_{}_mev_per_ang3"),
    ("Moments", "μB", "moment_{}_mub"),
    ("Magnetic forces", "meV/μB or meV/rad", "magforce_{}_mev"),
    ("Hessian", "eV/Å²", "hessian_{}_ev_per_ang2"),
)
"""Name, unit, and key of an error with ``mae`` or ``rmse`` to be filled in."""

MISSING = "–"


def finite(value: object) -> float | None:
    """``value`` as a float, or None where it is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        return None
    return float(value) if math.isfinite(value) else None


def number_text(value: object) -> str:
    """Three significant digits, but one decimal at most digits: 0.0123, 1.23, 123.4, 1,234.5."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0:
        return "0"
    if abs(number) < 1e-4:
        return f"{number:.2e}"
    decimals = max(1, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{decimals}f}".replace("-", "−")


def count_text(value: object) -> str:
    """A count with thousands separators."""
    number = finite(value)
    return MISSING if number is None else f"{number:,.0f}"


def share_text(part: object, whole: object) -> str:
    """``part`` of ``whole`` in percent."""
    share = ratio(whole, part)
    if share is None:
        return MISSING
    percent = 100 * share
    return f"{percent:.0f} %" if percent in (0, 100) or 10 <= percent < 99.5 else f"{percent:.2f} %"


def ratio(before: object, after: object) -> float | None:
    """after / before, or None where either is missing or ``before`` is zero."""
    first, second = finite(before), finite(after)
    return None if first is None or second is None or first == 0 else second / first


def ratio_text(value: float | None) -> str:
    """A ratio with two decimals, small ones with two significant digits."""
    if value is None:
        return MISSING
    if 0 < value < 0.0995:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def change_text(value: float | None) -> str:
    """A ratio after / before in words: ``7.1× smaller``, ``12 % larger``."""
    if value is None or value <= 0:
        return ""
    factor = max(value, 1 / value)
    if factor < 1.02:
        return "unchanged"
    if factor < 2:
        return f"{100 * abs(1 - value):.0f} % {'smaller' if value < 1 else 'larger'}"
    return f"{factor:.2g}× {'smaller' if value < 1 else 'larger'}" if factor < 10 else _big_change(factor, value < 1)


def _big_change(factor: float, smaller: bool) -> str:
    return f"{factor:,.0f}× {'smaller' if smaller else 'larger'}"


def duration_text(seconds: float) -> str:
    """Seconds in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for unit, size, below, rest in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min"), ("min", 60, 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {rest}"
    return f"{whole} s"


def bytes_text(size: int) -> str:
    """A file size in kB or MB (thousands)."""
    return f"{number_text(size / 1e6)} MB" if size >= 1_000_000 else f"{number_text(size / 1e3)} kB"


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested settings as names and values, in the order they come in."""
    pairs: list[tuple[str, object]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, dict):
            pairs += flat(value, f"{name}: ")
        else:
            pairs.append((name, _setting_text(key, value)))
    return pairs


def _setting_text(key: str, value: object) -> object:
    if value is None or isinstance(value, bool):
        return {None: None, True: "yes", False: "no"}[value]
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if key == "seconds" and (seconds := finite(value)) is not None:
        return duration_text(seconds)
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int) and key != "seed"
        else value
    )


def error_rows(pair: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, object, object]]:
    """(quantity, unit, before, after) of every error a split has: ``("Forces MAE", "meV/Å", 80.1, 9.3)``."""
    before, after = pair.get("before") or {}, pair.get("after") or {}
    rows = []
    for name, unit, key in QUANTITIES:
        for measure in ("mae", "rmse"):
            values = before.get(key.format(measure)), after.get(key.format(measure))
            if any(finite(value) is not None for value in values):
                rows.append((f"{name} {measure.upper()}", unit, *values))
    return rows


def sort_splits(errors: Mapping[str, Any]) -> list[str]:
    """Names of the splits, all test sets first."""

    def place(split: str) -> int:
        kind = "test" if split.startswith("test") else split
        return SPLITS.index(kind) if kind in SPLITS else len(SPLITS)

    return sorted(errors, key=place)


def layer_text(site: str) -> str:
    """A site's name without what every weight's name ends in."""
    return site.removesuffix(".weight").replace("symmetric_contractions.contractions", "contraction")


def files_text(files: Sequence[str]) -> str:
    """The name of the first file, and how many more there are."""
    names = [Path(file).name or file for file in files]
    return "data" if not names else names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def signed_text(value: float) -> str:
    """Two significant digits with their sign."""
    return f"{value:+.2g}".replace("-", "−")
