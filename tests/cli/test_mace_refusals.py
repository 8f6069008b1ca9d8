"""``forcetune mace-train``: what it refuses names the option and the fix, and nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from terminal import Command

LEAST = ("--name", "a", "--train_file", "train.xyz", "--foundation_model", "mini")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSALS = [
    (("--loss", "dipole"), "--loss dipole", "mace_run_train"),
    (("--loss", "forces_only", "--swa"), "--swa", "leave out --swa"),
    (("--model", "PolarMACE"), "--model PolarMACE", "MACE and ScaleShiftMACE"),
    (("--field_feature_max_l", "1"), "--field_feature_max_l 1", "leave it out"),
    (("--device", "mps"), "--device mps", "cpu and cuda"),
    (("--scheduler", "ExponentialLR"), "--scheduler ExponentialLR", "ReduceLROnPlateau"),
    (("--lbfgs",), "--lbfgs", "training.refine"),
    (("--config_type_weights", '{"Default": 1.0, "bulk": 2.0}'), "--config_type_weights", "config_weight"),
    (("--lr_params_factors", '{"embedding_lr_factor": 0.0}'), "--lr_params_factors", "--freeze"),
    (("--freeze", "7"), "--freeze 7", "6 trains the readouts"),
    (("--keep_isolated_atoms", "True"), "--keep_isolated_atoms", "leave it out"),
    (("--foundation_model_readout",), "--foundation_model_readout", "leave it out"),
    (("--foundation_model", "small"), "--foundation_model small", "--multiheads_finetuning=False"),
    (("--foundation_model", "polar-1-s"), "--foundation_model polar-1-s", "PolarMACE"),
    (("--pt_train_file", "mp"), "--pt_train_file mp", "mace-foundations"),
    (("--pt_train_file", "train.xyz", "--E0s", "average"), "--E0s average", "estimated"),
    (("--heads", "{'a': {}, 'b': {}}"), "--heads: 2 heads", "keep one of them"),
    (("--optimizer", "schedulefree", "--ema"), "--ema", "leave out --ema"),
    (("--eval_interval", "9", "--max_num_epochs", "3"), "--eval_interval 9", "smaller"),
    (("--error_table", "DipoleRMSE"), "--error_table DipoleRMSE", "PerAtomRMSE"),
    (("--E0s", "isolated"), "--E0s 'isolated'", "{1: -13.6}"),
    (("--lora", "True", "--method", "mmea"), "--lora", "leave one of them out"),
    (("--lora", "True", "--lora_rank", "4", "--rank", "8"), "--rank 8, --lora_rank 4", "leave one of them out"),
    (("--atomic_numbers", "['²']"), "--atomic_numbers: there is no element '²'", "write atomic numbers"),
    (("--nonsense", "1"), "--nonsense", "--help"),
    (("--batch_size", "many"), "--batch_size", "--help"),
]


@pytest.mark.parametrize(("words", "named", "fix"), REFUSALS, ids=[" ".join(words) for words, _, _ in REFUSALS])
def test_refusals_name_option_and_fix(command: Command, here: Path, words: Sequence[str], named: str, fix: str) -> None:
    code, _, err = command("mace-train", *LEAST, *words)
    assert code == 2
    assert named in err
    assert fix in err
    assert not list(here.iterdir())


def test_what_is_missing_is_named(command: Command, here: Path) -> None:
    for words, missing in (
        (("--train_file", "a.xyz", "--foundation_model", "mini"), "--name"),
        (("--name", "a", "--foundation_model", "mini"), "--train_file"),
        (("--name", "a", "--train_file", "a.xyz"), "--foundation_model"),
    ):
        code, _, err = command("mace-train", *words)
        assert code == 2
        assert f"{missing} is missing" in err


def test_help_lists_every_option(command: Command) -> None:
    code, out, _ = command("mace-train", "--help")
    assert code == 0
    assert "--stage_two_energy_weight" in out
    assert "ignored" in out
