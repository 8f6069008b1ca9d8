"""Commands that describe forcetune itself: config, schema, cite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from forcetune.cli.app import app
from forcetune.cli.options import Json
from forcetune.errors import InputError


@app.command()
def config(
    option: Annotated[
        str | None, typer.Option("--explain", help="One option by its dotted name, such as training.ema.")
    ] = None,
    as_json: Json = False,
) -> None:
    """All options of a configuration with their defaults, or what one of them is."""
    from dataclasses import asdict

    from forcetune.runs.schema import explain_option, list_options

    if option is None:
        options = list_options()
        if as_json:
            print(json.dumps([asdict(one) for one in options]))
            return
        for one in options:
            suffix = f"  ({', '.join(one.methods)})" if one.methods else ""
            print(f"{one.name}={'' if one.required else _word(one.default)}{suffix}")
        return
    info = explain_option(option)
    commands = commands_with(info.name, info.description)
    if as_json:
        print(json.dumps(asdict(info) | {"commands": commands}))
        return
    print(f"{info.name}\n  {info.description}\n  type      {info.kind}")
    print(f"  default   {'none: it must be given' if info.required else _word(info.default)}")
    if info.methods:
        print(f"  methods   {', '.join(info.methods)}")
    for command, flag in commands.items():
        print(f"  {command:9} {flag}")


def _word(value: Any) -> str:
    if isinstance(value, dict) and value:
        return ", ".join(f"{_word(default)} ({method})" for method, default in value.items())
    return json.dumps(value, ensure_ascii=False)


def commands_with(name: str, description: str) -> dict[str, str]:
    """Commands that take an option, each with its flag; the same description marks the flag.

    Args:
        name: dotted.
        description: of the option, which the help of its flag begins with.
    """
    group = typer.main.get_command(app)
    flags: dict[str, str] = {}
    for command, details in getattr(group, "commands", {}).items():
        if name.startswith("learn.") and command != "learn":
            continue
        parameters = details.params
        flag = next((_written(one) for one in parameters if description and _is_about(one, description)), None)
        if flag is None and name in ("method.rank",):
            flag = next((_written(one) for one in parameters if f"({name})" in str(getattr(one, "help", ""))), None)
        if flag is None and any("--set" in one.opts for one in parameters):
            flag = f"--set {name}=…"
        if flag is not None:
            flags[command] = flag
    return flags


def _is_about(parameter: Any, description: str) -> bool:
    return str(getattr(parameter, "help", None) or "").startswith(description)


def _written(parameter: Any) -> str:
    """How it is written: its longest flag, or its name in capitals."""
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    return max(parameter.opts, key=len)


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of printing.")] = None,
) -> None:
    """JSON schema of a YAML configuration, for editors that check and complete it."""
    from forcetune.runs.schema import build_schema
    from forcetune.utils.files import write_text

    text = json.dumps(build_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        print(text, end="")
        return
    if output.is_dir():
        raise InputError(f"{output}: is a folder; name a file such as forcetune.schema.json.")
    write_text(output, text)
    print(
        f"schema   {output}\nin YAML  # yaml-language-server: $schema={output}   as the first line of the configuration"
    )


@app.command()
def cite(
    name: Annotated[str, typer.Argument(help="Run or adapter folder, model by name or path, or method.")],
) -> None:
    """BibTeX entries of the papers to cite for a run, a model or a method."""
    from forcetune.runs.cite import cite as entries_of

    print(entries_of(name), end="")
