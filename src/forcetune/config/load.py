"""Reading a configuration: a YAML file, options of the command line and settings by dotted name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from forcetune.config.run import RunConfig, plain_defaults
from forcetune.config.section import explain
from forcetune.errors import InputError
from forcetune.utils.option_defaults import get_value, leaf_names, remove_value, set_value, take_record, with_unset
from forcetune.utils.parsing import parse_yaml, read_number, short


def parse_setting(text: str) -> tuple[list[str], Any]:
    """Parse ``section.key=value``; the value is read as YAML 1.2.

    Raises:
        InputError: no ``=``, or a value that is no YAML.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise InputError(
            f"--set {short(text)}: write it as section.key=value, for example training.learning_rate=1e-3."
        )
    try:
        number = read_number(value.strip())
        return _section_and_key(name), parse_yaml(value) if number is None else number
    except yaml.YAMLError as error:
        raise InputError(f"--set {short(text)}: the value is not valid YAML.") from error


def _section_and_key(name: str) -> list[str]:
    """The parts of a dotted name.

    Raises:
        InputError: so many of them that it names nothing.
    """
    keys = name.strip().split(".")
    if len(keys) > 8:
        raise InputError(f"setting {short(name)}: name a section and a key, as in training.epochs.")
    return keys


def load_config(
    path: str | Path | None = None,
    settings: Sequence[str] = (),
    given: dict[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Merge a YAML file, command-line options and ``--set`` settings, in rising priority, and check the result.

    Where the file is that of a run, a default that stands in it gives way when an option that it follows from changes
    (:mod:`forcetune.utils.option_defaults`).

    Args:
        path: YAML file, or None.
        settings: ``section.key=value`` texts.
        given: nested options from the command line; None values are left out.
        overrides: dotted name to value, as ``settings`` but from Python.

    Raises:
        InputError: unreadable file, unknown key or value out of range; names the key.
    """
    merged: dict[str, Any] = _read_yaml(path) if path is not None else {}
    source = f"{path}: " if path is not None else ""
    try:
        record = take_record(merged)
    except ValueError as error:
        raise InputError(f"{source}{error}.") from error
    _merge(merged, given or {})
    changes = [_nested(text, *parse_setting(text)) for text in settings]
    changes += [_nested(name, _section_and_key(name), value) for name, value in (overrides or {}).items()]
    for change in changes:
        _merge(merged, change, keep_none=True)
    unset: set[str] = set()
    if record is not None:
        now = {name for change in changes for name in leaf_names(change)}
        now |= {name for name in leaf_names(given or {}) if get_value(given or {}, name) is not None}
        for name in record.outdated(merged, now):
            whole, alone = plain_defaults(name)
            if whole == alone:
                remove_value(merged, name)
            else:  # what is left of the section would not have the default
                set_value(merged, name, whole)
        unset = set(record.names) - now
    try:
        return with_unset(RunConfig.model_validate(merged), unset)
    except ValidationError as error:
        raise InputError(source + explain(error)) from error


def _nested(text: str, keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A setting as nested mappings.

    Raises:
        InputError: it names no key of a section.
    """
    nested: Any = value
    for key in reversed(keys):
        nested = {key: nested}
    if not isinstance(nested, dict):
        raise InputError(f"setting {short(text)}: name a section and a key, as in training.epochs.")
    return nested


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else f" ({error})"
        raise InputError(f"{path}: is not valid YAML{where}.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: a run configuration is a mapping with sections data, model, method, training, output."
        )
    return content


def _merge(target: dict[str, Any], source: dict[str, Any], keep_none: bool = False) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value, keep_none)
        elif isinstance(value, dict):
            target[key] = {}
            _merge(target[key], value, keep_none)
            if not target[key] and not keep_none:
                del target[key]
        elif value is not None or keep_none:
            target[key] = value
