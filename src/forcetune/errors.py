"""What can go wrong, and how it is reported.

Messages are written for the chemist: what is wrong, where (file, frame), what to do about it.
"""

from __future__ import annotations

import warnings


class ForcetuneError(Exception):
    """A failure of ours; the command line ends with exit code 1."""

    exit_code = 1


class InputError(ForcetuneError):
    """Something given to us cannot be used; the command line ends with exit code 2.

    Raised before anything is written. The message names the file, the frame where there is one, and the fix.
    """

    exit_code = 2


class ForcetuneWarning(UserWarning):
    """Something that the user should know about although the work goes on."""


def warn(message: str) -> None:
    """Show a :class:`ForcetuneWarning` once per distinct message."""
    warnings.warn(message, ForcetuneWarning, stacklevel=3)


class ForcetuneNote(UserWarning):
    """What was done to data on their way in, as it should be; shown in one line."""


def note(message: str) -> None:
    """Show a :class:`ForcetuneNote` once per distinct message."""
    warnings.warn(message, ForcetuneNote, stacklevel=3)
