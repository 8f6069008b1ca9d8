"""Models that mace converted to the layers of an accelerator: recognised, in a file or in memory, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from forcetune.backbones.safe_unpickle.reader import Record
from forcetune.errors import InputError

# package of the layers → its name, and mace's way back at the command line and in Python
_CUEQ = ("cuEquivariance", "mace_cueq_to_e3nn", "mace.cli.convert_cueq_e3nn")
_ACCELERATORS = {
    "cuequivariance": _CUEQ,
    "cuequivariance_torch": _CUEQ,
    "openequivariance": ("OpenEquivariance", "python -m mace.cli.convert_oeq_e3nn", "mace.cli.convert_oeq_e3nn"),
}
# settings of mace that are kept beside the layers
_SETTINGS = {"CuEquivarianceConfig": "cuequivariance", "OEQConfig": "openequivariance"}


def check_not_converted(model: Record | nn.Module, source: Path | str) -> None:
    """
    Args:
        model: as it is in a file, or in memory.
        source: the file, or the name of the model in memory.

    Raises:
        InputError: layers of it belong to an accelerator; says which, and how to convert them back.
    """
    package = next(_accelerators(model), None)
    if package is None:
        return
    name, command, module = _ACCELERATORS[package]
    if isinstance(source, Path):
        plain = source.with_suffix(".plain.model")
        way = f"`{command} {source} --return_model --output_model plain.model`, which writes {plain}, and use that file"
    else:
        way = f"`{module}.run(model, return_model=True)`, and use that model"
    raise InputError(
        f"{source}: this model was converted to {name}, whose layers forcetune does not train; convert it back by "
        f"{way}."
    )


def _accelerators(model: Record | nn.Module) -> Iterator[str]:
    for owner, name, state in _objects(model):
        package = owner.split(".")[0]
        if package in _ACCELERATORS:
            yield package
        elif package == "mace" and name in _SETTINGS and isinstance(state, dict) and state.get("enabled") is True:
            yield _SETTINGS[name]


def _objects(model: Record | nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(module of the class, class, attributes) of every object that a model consists of."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            for one in (module, *(value for value in vars(module).values() if type(value).__name__ in _SETTINGS)):
                yield type(one).__module__, type(one).__name__, vars(one)
        return
    seen: set[int] = set()
    queue: list[Any] = [model]
    while queue:
        value = queue.pop()
        if id(value) in seen or not isinstance(value, Record | dict | list | tuple):
            continue
        seen.add(id(value))
        if isinstance(value, Record):
            yield value.module, value.name, value.state
            queue += [value.state, value.items, value.entries, value.args]
        else:
            queue += value.values() if isinstance(value, dict) else value
