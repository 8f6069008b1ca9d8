"""Commands that read what other programs trained: import-lora."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forcetune.cli.app import app
from forcetune.cli.options import Trust, finite


@app.command("import-lora")
def import_lora(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint (.pt) of mace_run_train --lora True.")],
    model: Annotated[str, typer.Option("--model", help="The foundation model that the run started from.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter folder to write.")],
    alpha: Annotated[
        float,
        typer.Option(min=1e-9, callback=finite, help="--lora_alpha of that run, which the checkpoint does not have."),
    ] = 1.0,
    trust: Trust = False,
) -> None:
    """Write the LoRA factors in a checkpoint of mace as an adapter of method lora."""
    from forcetune.runs.mace_lora import convert_mace_lora

    config = convert_mace_lora(checkpoint, output, model=model, alpha=alpha, trust=trust)
    print(f"adapter  {output}: {config.trainable:,} numbers of method {config.method['name']} on {config.base.name}")
    print(f"in ASE   forcetune.calculator({model!r}, adapter={str(output)!r})")
