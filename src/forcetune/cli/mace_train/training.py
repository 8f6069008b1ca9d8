"""Loss, optimizer, schedule and stages of a command line of mace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forcetune.cli.mace_train.literals import read_literal
from forcetune.cli.mace_train.loss import translate_loss, translate_second_loss
from forcetune.cli.mace_train.parsing import Arguments
from forcetune.cli.mace_train.replay import EMA, LEARNING_RATE
from forcetune.errors import InputError
from forcetune.utils.parsing import short

_BETA2 = 0.999


def translate_training(
    arguments: Arguments, loss: str, replayed: bool, repeats: int, notes: list[str]
) -> dict[str, Any]:
    """Section ``training``.

    Args:
        arguments: of the command line.
        loss: name of mace's loss.
        replayed: with replay, where mace sets learning rate and average itself.
        repeats: epochs here for one epoch of mace.
        notes: takes what differs.

    Raises:
        InputError: an option or a combination without a counterpart.
    """
    _check_type_weights(arguments)
    epochs, interval = arguments["max_num_epochs"], arguments["eval_interval"]
    if interval > epochs:
        raise InputError(
            f"--eval_interval {interval}: is more than --max_num_epochs {epochs}, so that no adapter could be chosen; "
            "write a smaller one."
        )
    rate, ema = arguments["lr"], arguments["ema_decay"] if arguments["ema"] else None
    if replayed and not arguments["force_mh_ft_lr"]:
        rate, ema = LEARNING_RATE, EMA
        notes.append(
            f"--lr {rate:g} and --ema_decay {ema:g}: with replay, as in mace; --force_mh_ft_lr True for others"
        )
    training: dict[str, Any] = {
        "epochs": epochs * repeats,
        "batch_size": arguments["batch_size"],
        "optimizer": arguments["optimizer"],
        "learning_rate": rate,
        "weight_decay": arguments["weight_decay"],
        "loss": translate_loss(arguments, loss, notes),
        "ema": ema,
        "clip": arguments["clip_grad"],
        "valid_every": interval * repeats,
        "seed": arguments["seed"],
    }
    if arguments["patience"] < epochs:
        training["early_stopping"] = arguments["patience"]
    if arguments["optimizer"] == "schedulefree":
        _check_schedulefree(arguments, notes)
        training["ema"] = None
    else:
        training["schedule"] = _schedule(arguments, notes)
    if arguments["optimizer"] == "adamw":
        notes.append("--optimizer adamw: without amsgrad here")
    start = _start_of_stage_two(arguments, notes)
    if start is not None:
        training["second_stage"] = {
            "start": start * repeats + 1,
            "learning_rate": arguments["swa_lr"],
            "loss": translate_second_loss(arguments, loss, notes),
        }
    return training


def _check_type_weights(arguments: Arguments) -> None:
    weights = read_literal("config_type_weights", arguments["config_type_weights"])
    if not isinstance(weights, Mapping) or any(weight != 1 for weight in weights.values()):
        raise InputError(
            f"--config_type_weights {short(arguments['config_type_weights'])}: weights by config_type are not read; "
            "write config_weight=… into the comment lines of those frames, which mace reads, too, and leave it out."
        )


def _check_schedulefree(arguments: Arguments, notes: list[str]) -> None:
    if arguments["ema"]:
        raise InputError("--ema: schedule-free AdamW averages by itself; leave out --ema, or take another --optimizer.")
    if "beta2_schedulefree" not in arguments:
        notes.append(f"--optimizer schedulefree: with β₂ = {_BETA2}, where mace has 0.98")
    elif arguments["beta2_schedulefree"] != _BETA2:
        raise InputError(f"--beta2_schedulefree: β₂ is {_BETA2} here; write that, or leave it out.")


def _schedule(arguments: Arguments, notes: list[str]) -> dict[str, Any]:
    name = arguments["scheduler"]
    if name == "ExponentialLR":
        if arguments["lr_scheduler_gamma"] == 1:
            return {"name": "constant"}
        raise InputError(
            "--scheduler ExponentialLR: the learning rate falls by plateau or cosine here; write --scheduler "
            "ReduceLROnPlateau, or --lr_scheduler_gamma 1 and --set training.schedule.name=cosine."
        )
    if name != "ReduceLROnPlateau":
        raise InputError(f"--scheduler {short(name)}: mace has ReduceLROnPlateau and ExponentialLR.")
    factor, interval = arguments["lr_factor"], arguments["eval_interval"]
    if factor >= 1:
        raise InputError(f"--lr_factor {factor:g}: write a number between 0 and 1; it multiplies the learning rate.")
    patience = arguments["scheduler_patience"]
    if interval > 1:
        notes.append(
            f"--scheduler_patience {patience}: {patience // interval} validations, as mace counts epochs, also those "
            "between validations"
        )
    return {"name": "plateau", "factor": factor, "patience": patience // interval, "minimum": 0.0}


def _start_of_stage_two(arguments: Arguments, notes: list[str]) -> int | None:
    """Epochs before stage two; None without one."""
    epochs, start = arguments["max_num_epochs"], arguments["start_swa"]
    if start is None:
        return max(1, epochs // 4 * 3) if arguments["swa"] and epochs > 1 else None
    if not arguments["swa"]:
        notes.append("--start_swa: switches stage two on, as in mace 0.3.16")
    if start >= epochs:
        notes.append(f"--start_swa {start}: stage two does not begin within {epochs} epochs, as in mace")
        return None
    return start
