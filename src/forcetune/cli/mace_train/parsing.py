"""Reading a command line of ``mace_run_train``, and its YAML file, as mace's own parser does."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from forcetune.cli.mace_train.option import Handling, MaceOption
from forcetune.cli.mace_train.options import BY_NAME, MACE_VERSION, OPTIONS
from forcetune.errors import InputError
from forcetune.utils.parsing import parse_yaml, short

DOCUMENT = "docs/mace_train.md"
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


@dataclass(frozen=True, slots=True)
class ForcetuneOptions:
    """Options of ``forcetune mace-train`` that mace does not have.

    Attributes:
        method: of the fine-tuning; None where it is not set.
        rank: of the method's updates.
        out: run folder.
        overwrite: replace an existing run folder.
        trust: as of ``forcetune fit``.
        settings: ``section.key=value``, which win over everything else.
    """

    method: str | None
    rank: int | None
    out: str | None
    overwrite: bool
    trust: bool
    settings: tuple[str, ...]


class Arguments:
    """The options of a command line of mace.

    Attributes:
        values: of the options of mace that are set on the command line or in the YAML file.
        forcetune: the options that mace does not have.
    """

    def __init__(self, values: Mapping[str, Any], forcetune: ForcetuneOptions) -> None:
        self.values = dict(values)
        self.forcetune = forcetune

    def __getitem__(self, name: str) -> Any:
        """The value of an option, mace's default where it was not given."""
        return self.values.get(name, BY_NAME[name].default)

    def __contains__(self, name: str) -> bool:
        return name in self.values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message = f"mace {MACE_VERSION} has no such option: {message.partition(': ')[2]}"
        raise InputError(f"{message}; `forcetune mace-train --help` and {DOCUMENT} list all options.")


def _bool(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"write True or False instead of {short(text)}")


def _float_or_none(text: str) -> float | None:
    return None if text == "None" else float(text)


_READ: dict[str, Any] = {
    "text": str,
    "int": int,
    "float": float,
    "float or None": _float_or_none,
    "bool": _bool,
    "file": str,
    "texts": str,
}


def _help(option: MaceOption) -> str:
    text = {
        Handling.MAPPED: option.explanation,
        Handling.NETWORK: "that of the foundation model, as in mace",
        Handling.IGNORED: f"ignored: {option.explanation}",
        Handling.REFUSED: f"refused: {option.explanation}",
    }[option.handling]
    return text.replace("%", "%%")


def build_parser() -> argparse.ArgumentParser:
    """A parser of mace's options; what is not given is not in its result."""
    parser = _Parser(
        prog="forcetune mace-train",
        description=f"Fine-tune with the arguments of mace_run_train (mace-torch {MACE_VERSION}, and the MMEA code); "
        f"{DOCUMENT} has a table of them.",
        usage="%(prog)s [ARGUMENTS OF mace_run_train] [OPTIONS OF forcetune]",
        argument_default=argparse.SUPPRESS,
    )
    group = parser.add_argument_group("options of forcetune")
    group.add_argument("--method", help="method of the fine-tuning; mmea if not given")
    group.add_argument("--rank", type=int, help="rank of the method's updates")
    group.add_argument("--out", help="run folder instead of work_dir/name_run-seed")
    group.add_argument("--overwrite", action="store_true", help="replace an existing run folder")
    group.add_argument("--trust", action="store_true", help="as of `forcetune fit`")
    group.add_argument(
        "--set", action="append", metavar="SECTION.KEY=VALUE", help="any option of `forcetune fit`; wins"
    )
    group = parser.add_argument_group("options of mace_run_train")
    for option in OPTIONS:
        keywords: dict[str, Any] = {"dest": option.name, "help": _help(option)}
        if option.kind in ("set", "unset"):
            keywords["action"] = "store_true" if option.kind == "set" else "store_false"
        else:
            keywords["type"] = _READ[option.kind]
            keywords["choices"] = option.choices or None
            keywords["metavar"] = option.name.upper() if option.choices == () else None
            keywords["nargs"] = "+" if option.kind == "texts" else None
        group.add_argument(*option.flags, **keywords)
    return parser


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Read a command line; options may be abbreviated as in mace, and ``--config`` names a YAML file of them.

    Raises:
        InputError: an unknown option, a value that is not of its kind, or an unreadable YAML file.
    """
    parser = build_parser()
    values = vars(parser.parse_args(list(words)))
    if "config" in values:
        # what comes later wins
        values = vars(parser.parse_args([*_yaml_words(values["config"]), *words]))
    forcetune = ForcetuneOptions(
        method=values.pop("method", None),
        rank=values.pop("rank", None),
        out=values.pop("out", None),
        overwrite=values.pop("overwrite", False),
        trust=values.pop("trust", False),
        settings=tuple(values.pop("set", ())),
    )
    return Arguments(values, forcetune)


def _yaml_words(path: str) -> list[str]:
    """The options of a YAML file as words of a command line.

    Raises:
        InputError: it cannot be read, is no mapping, or has a key that is no option.
    """
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', 'no UTF-8')}).") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else str(error)
        raise InputError(f"{path}: is not valid YAML ({where}); write options as `name: value`, one a line.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: write options of mace_run_train as `name: value`.")
    by_flag = {flag.removeprefix("--"): option for option in OPTIONS for flag in option.flags}
    words: list[str] = []
    for key, value in content.items():
        name = str(key).removeprefix("--")
        option = by_flag.get(name)
        if option is None or option.name == "config":
            raise InputError(f"{path}: mace {MACE_VERSION} has no option {short(name)}; {DOCUMENT} lists them.")
        if value is None:
            continue
        words += _option_words(path, name, option, value)
    return words


def _option_words(path: str, name: str, option: MaceOption, value: Any) -> list[str]:
    if option.kind in ("set", "unset"):
        if str(value).lower() not in _TRUE + _FALSE:
            raise InputError(f"{path}: {name} is a switch; write true or false.")
        return [f"--{name}"] if str(value).lower() in _TRUE else []
    if option.kind == "texts":
        return [f"--{name}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return [f"--{name}={value}"]
