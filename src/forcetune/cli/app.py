"""The command-line application that every command registers with."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from forcetune._version import __version__

app = typer.Typer(
    name="forcetune",
    help="Fine-tune pretrained equivariant interatomic potentials on your own DFT data by training a small adapter.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
errors_to = Console(stderr=True, soft_wrap=True, emoji=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"forcetune {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
