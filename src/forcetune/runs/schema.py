"""What a configuration may hold: a JSON schema for editors, and one option at a time for people."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from forcetune.adapters.methods import METHODS, Method, option_names
from forcetune.adapters.updates.base import Update
from forcetune.config import MethodConfig, RunConfig
from forcetune.errors import InputError
from forcetune.utils.option_defaults import RECORD
from forcetune.utils.parsing import short

DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True, slots=True)
class OptionInfo:
    """One option of the configuration.

    Attributes:
        name: dotted.
        kind: its type, in words.
        default: of the option, or of each method that has another; None where there is none.
        description: one or two sentences.
        methods: that take it; empty of an option of every run.
        required: it has no default.
    """

    name: str
    kind: str
    default: Any
    description: str
    methods: tuple[str, ...] = ()
    required: bool = False


@cache
def method_options() -> dict[str, dict[str, tuple[Any, Any, str]]]:
    """Method → option → annotation, default and description, as the method's function and its updates have them."""
    return {name: dict(_list_method_options(make)) for name, make in METHODS.items()}


def _list_method_options(make: Callable[..., Method]) -> Iterator[tuple[str, tuple[Any, Any, str]]]:
    hints = get_type_hints(make, include_extras=True)
    texts = _parse_descriptions(make.__doc__ or "", "Args")
    update_fields = {field.name for updates in make().table.values() for update in updates for field in fields(update)}
    for parameter in inspect.signature(make).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            yield parameter.name, (hints[parameter.name], parameter.default, texts.get(parameter.name, ""))
            continue
        _, update = get_args(hints[parameter.name])
        examples = (example for updates in make().table.values() for example in updates if isinstance(example, update))
        yield from _list_update_options(update, next(examples, update()))
    assert set(option_names(make)) <= {*update_fields, *inspect.signature(make).parameters}


def _list_update_options(update: type[Update], example: Update) -> Iterator[tuple[str, tuple[Any, Any, str]]]:
    """The options of an update, with the values that a method gives them."""
    hints = get_type_hints(update, include_extras=True)
    texts = _parse_descriptions(update.__doc__ or "", "Attributes")
    for name in update.option_names():
        yield name, (hints[name], getattr(example, name), texts.get(name, ""))


def _parse_descriptions(docstring: str, heading: str) -> dict[str, str]:
    """Names and descriptions under a heading of a docstring."""
    text = inspect.cleandoc(docstring)
    block = re.search(rf"^{heading}:\n(.*?)(?=^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    if block is None:
        return {}
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", block[1], flags=re.MULTILINE | re.DOTALL)
    return {name: _sentence(" ".join(description.split())) for name, description in entries}


def _sentence(text: str) -> str:
    plain = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "`")
    # a symbol of an equation stays as it is
    return plain if re.match(r"\w\b", plain) else plain[:1].upper() + plain[1:]


def build_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a YAML configuration, each method with its options."""
    schema = RunConfig.model_json_schema()
    method = schema["$defs"]["MethodConfig"]
    shared = {name: dict(entry) for name, entry in method["properties"].items()}
    branches = []
    for name, options in method_options().items():
        parameters: dict[str, Any] = {key: (annotation, None) for key, (annotation, _, _) in options.items()}
        model = create_model(f"{name}_options", __config__=ConfigDict(protected_namespaces=()), **parameters)
        properties = model.model_json_schema().get("properties", {})
        for key, (_, default, description) in options.items():
            # null stands for an option that is not set
            entry = {rule: value for rule, value in properties[key].items() if rule not in ("title", "default")}
            properties[key] = {"anyOf": [entry, {"type": "null"}], "description": description, "default": default}
        # a table that the user writes has a name that the user chooses, or the default of the name
        condition: dict[str, Any] = {"properties": {"name": {"const": name}, "table": {"type": "null"}}}
        if name != MethodConfig.model_fields["name"].default:
            condition["required"] = ["name"]
        allowed = {"properties": {**dict.fromkeys(shared, True), **properties}, "additionalProperties": False}
        branches.append({"if": condition, "then": allowed})
    method["allOf"] = branches
    # the file that a run writes records which options were not set
    schema["properties"][RECORD] = {"type": "object", "description": "Written by forcetune."}
    return {
        "$schema": DIALECT,
        "title": "Configuration of forcetune",
        **{k: v for k, v in schema.items() if k != "title"},
    }


def list_options() -> list[OptionInfo]:
    """All options, in the order of the sections; those of methods after ``method.table``."""
    options: list[OptionInfo] = []
    for section in RunConfig.model_fields:
        options += _list_section(RunConfig, section, "")
    return options


def _list_section(model: type[BaseModel], name: str, prefix: str) -> list[OptionInfo]:
    field, dotted = model.model_fields[name], f"{prefix}{name}"
    inner = field.annotation
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        options = [option for key in inner.model_fields for option in _list_section(inner, key, f"{dotted}.")]
        return options + (_describe_method_options() if dotted == "method" else [])
    required = field.is_required()
    properties = model.model_json_schema()
    kind = _describe_type(properties["properties"][name], properties.get("$defs", {}))
    return [OptionInfo(dotted, kind, None if required else field.default, field.description or "", (), required)]


def _describe_method_options() -> list[OptionInfo]:
    """Each option of a method once, with the methods that take it."""
    by_option: dict[str, list[tuple[str, Any, Any, str]]] = {}
    for method, options in method_options().items():
        for name, (annotation, default, description) in options.items():
            by_option.setdefault(name, []).append((method, annotation, default, description))
    infos = []
    for name, uses in by_option.items():
        model = create_model("Option", __config__=ConfigDict(protected_namespaces=()), value=(uses[0][1], None))
        schema = model.model_json_schema()
        defaults = {method: default for method, _, default, _ in uses}
        same = len({repr(value) for value in defaults.values()}) == 1
        infos.append(
            OptionInfo(
                f"method.{name}",
                _describe_type(schema["properties"]["value"], schema.get("$defs", {})),
                next(iter(defaults.values())) if same else defaults,
                " / ".join(dict.fromkeys(description for *_, description in uses if description)),
                tuple(defaults),
            )
        )
    return infos


_WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "null": "null"}


def _describe_type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A type in words: ``number, at least 0``, ``one of: a, b``."""
    if "$ref" in schema:
        return _describe_type(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_describe_type(part, definitions) for part in schema["anyOf"]))
    if "enum" in schema:
        return f"one of: {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_describe_type(schema.get('items', {}), definitions)}"
    if schema.get("type") == "object":
        return "mapping"
    limits = [
        f"{word} {schema[rule]}"
        for rule, word in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "more than"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "less than"),
        )
        if rule in schema
    ]
    return ", ".join([_WORDS.get(str(schema.get("type")), "any value"), *limits])


def explain_option(name: str) -> OptionInfo:
    """One option by its dotted name.

    Raises:
        InputError: there is no such option; names those of its section.
    """
    options = {option.name: option for option in list_options()}
    if name in options:
        return options[name]
    parts = name.split(".")
    while parts:
        beginning = ".".join(parts)
        inside = [option for option in options if option.startswith(f"{beginning}.")]
        if inside:
            raise InputError(f"{short(name)}: is no option; those of {beginning} are {', '.join(inside)}.")
        parts.pop()
    raise InputError(f"{short(name)}: is no option; sections are {', '.join(RunConfig.model_fields)}.")
