"""The table of mace's options against the parsers that have them, and the page that is written from it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from cli.mmea_options import MMEA_OPTIONS
from forcetune.cli.mace_train.document import document
from forcetune.cli.mace_train.models import NAMES
from forcetune.cli.mace_train.option import Handling
from forcetune.cli.mace_train.options import BY_NAME, MACE_VERSION, OPTIONS
from forcetune.cli.mace_train.parsing import build_parser

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    None: "text",
    "str": "text",
    "int": "int",
    "float": "float",
    "str2bool": "bool",
    "check_float_or_none": "float or None",
    "read_yaml": "file",
}


def mace_actions() -> list[argparse.Action]:
    pytest.importorskip("mace")
    from mace.tools.arg_parser import build_default_arg_parser

    return [action for action in build_default_arg_parser()._actions if action.dest != "help"]


def test_every_option_of_mace_is_in_the_table() -> None:
    table = {option.flags: option for option in OPTIONS if option.origin == "mace"}
    for action in mace_actions():
        flags = tuple(action.option_strings)
        assert flags in table, f"mace {MACE_VERSION} has {flags}, which the table lacks: say what becomes of it"
        option = table.pop(flags)
        switch = {"_StoreTrueAction": "set", "_StoreFalseAction": "unset"}.get(type(action).__name__)
        kind = switch or ("texts" if action.nargs == "+" else KINDS[getattr(action.type, "__name__", None)])
        assert option.kind == kind, flags
        assert tuple(action.choices or ()) == () or set(action.choices or ()) == set(option.choices), flags
        default = int(action.default) if option.name == "plot_frequency" else action.default
        assert option.default == default, flags
    if "--config" in {flag for flags in table for flag in flags}:  # mace has it where configargparse is installed
        del table[("--config",)]
    assert not table, "options that mace does not have"


def test_every_option_of_the_mmea_code_is_in_the_table() -> None:
    for flag, choices in MMEA_OPTIONS.items():
        option = BY_NAME[flag.removeprefix("--")]
        assert set(choices) <= set(option.choices), flag
    assert {option.name for option in OPTIONS if option.origin == "MMEA"} == {"mmea_init", "mmea_std"}


def test_every_option_says_what_becomes_of_it() -> None:
    assert len(BY_NAME) == len(OPTIONS)
    for option in OPTIONS:
        assert option.explanation or option.handling is Handling.NETWORK, option.name
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert {flag for option in OPTIONS for flag in option.flags} <= flags


def test_every_foundation_model_of_mace_is_known() -> None:
    pytest.importorskip("mace")
    from mace.calculators.foundations_models import mace_mp_urls

    from forcetune.backbones.registry import find

    assert set(mace_mp_urls) - set(NAMES) == {"mh-0", "mh-1"}
    for name, url in mace_mp_urls.items():
        if name in NAMES:
            published = find(NAMES[name])
            assert published is not None
            assert published.url == url


def test_the_page_is_that_of_the_table() -> None:
    assert (ROOT / "docs" / "mace_train.md").read_text(encoding="utf-8") == document(), (
        "write it again: python -m forcetune.cli.mace_train.document > docs/mace_train.md"
    )


def test_mace_is_not_imported(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from forcetune.cli import main\n"
        "try:\n"
        "    main(['mace-train', '--name=a', '--train_file=a.xyz', '--foundation_model=mini', '--dry_run'])\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code, ended.code\n"
        "print([name for name in ('mace', 'e3nn', 'torch') if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.splitlines()[-1] == "[]"
