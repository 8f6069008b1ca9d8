"""Packages that are needed for one purpose only."""

from __future__ import annotations

from forcetune.errors import InputError


def missing_package(package: str, extra: str, error: ImportError) -> InputError:
    """What to raise where an optional package cannot be imported.

    Args:
        package: as it is known.
        extra: of forcetune, which brings it.
        error: what its import said.
    """
    return InputError(f"{package} cannot be imported ({error}); install it by: pip install 'forcetune[{extra}]'")
