"""The command line: one thin function per command over the Python API.

PyTorch and the model libraries take seconds to import: each command imports what it needs, so that help is instant.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

# commands register in this order, which is that of the help
from forcetune.cli import training  # isort: skip  # noqa: F401
from forcetune.cli import examining  # isort: skip  # noqa: F401
from forcetune.cli import labelling  # isort: skip  # noqa: F401
from forcetune.cli import files  # isort: skip  # noqa: F401
from forcetune.cli.mace_train import command  # isort: skip  # noqa: F401
from forcetune.cli import importing  # isort: skip  # noqa: F401
from forcetune.cli import describing  # isort: skip  # noqa: F401
from forcetune.cli.app import app, errors_to
from forcetune.errors import ForcetuneError, ForcetuneNote
from forcetune.utils.parsing import printable

__all__ = ["app", "main"]


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, ForcetuneNote):
        errors_to.print(f"note: {printable(str(message))}", markup=False, highlight=False)
        return
    errors_to.print(f"warning: {printable(str(message))}", style="yellow", markup=False, highlight=False)


def _print_anything() -> None:
    """Characters that the encoding of the output lacks become question marks instead of an error.

    Windows writes to pipes and files in the encoding of its region, which knows no ω and no arrow.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="replace")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0, 2 for bad input, 1 for a failure of ours."""
    from forcetune.errors import ForcetuneWarning
    from forcetune.utils.distributed import place

    _print_anything()
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", ForcetuneWarning)
    warnings.simplefilter("always", ForcetuneNote)
    warnings.showwarning = _show_warning
    if not place().leads:  # the first process tells
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        warnings.simplefilter("ignore")
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="forcetune")
    except ForcetuneError as error:
        errors_to.print(f"error: {printable(str(error))}", style="bold red", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors_to.print("interrupted", style="bold red")
        sys.exit(130)
