"""From the arguments of ``mace_run_train`` to the configuration of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forcetune.cli.mace_train.heads import expand_heads
from forcetune.cli.mace_train.literals import read_files, read_literal
from forcetune.cli.mace_train.loss import WITH_STRESS
from forcetune.cli.mace_train.models import translate_model
from forcetune.cli.mace_train.option import Handling, MaceOption
from forcetune.cli.mace_train.options import MACE_VERSION, OPTIONS
from forcetune.cli.mace_train.parsing import Arguments
from forcetune.cli.mace_train.references import translate_elements, translate_references
from forcetune.cli.mace_train.replay import is_replayed, plan_replay
from forcetune.cli.mace_train.training import translate_training
from forcetune.config import DataConfig, RunConfig, load_config, parse_setting
from forcetune.errors import InputError
from forcetune.utils.option_defaults import get_value, leaf_names, set_value
from forcetune.utils.parsing import short

GATED = ("mmea", "mmea-pure")
_DIPOLE_TABLES = ("DipoleRMSE", "DipoleMAE", "DipolePolarRMSE", "EnergyDipoleRMSE")
_MMEA_VARIABLES = {"MMEA_RANK": "method.rank", "MMEA_STD": "method.shift_init", "MMEA_PHI": "method.gain"}
"""Environment variables of the MMEA code, and the options that they are."""
_FROZEN = {1: "interactions|products|readouts", 5: "products|readouts", 6: "readouts"}
"""Trained parts from a value of --freeze on."""


@dataclass(frozen=True, slots=True)
class Translation:
    """A command line of mace, understood.

    Attributes:
        options: the configuration, nested, with what follows from the command line.
        config: the same, checked.
        notes: what is done otherwise than in mace, and what is ignored.
        error_table: the kind of table to print at the end.
        model_file: the plain model that a method which merges also writes.
        resume, dry_run: as asked for.
    """

    options: dict[str, Any]
    config: RunConfig
    notes: tuple[str, ...]
    error_table: str
    model_file: Path
    resume: bool
    dry_run: bool


def translate(arguments: Arguments) -> Translation:
    """Say in options of forcetune what a command line of mace asks for.

    Raises:
        InputError: an option without a counterpart, or a value that cannot be used; names the option and the fix.
    """
    notes: list[str] = []
    arguments = expand_heads(arguments, notes)
    _check_refused(arguments)
    notes += _list_ignored(arguments)
    if arguments["name"] is None:
        raise InputError("--name is missing: it names the run folder and the model.")
    if arguments["train_file"] is None:
        raise InputError("--train_file is missing: name the file of training frames.")
    model = translate_model(arguments)
    replayed = is_replayed(arguments)
    loss = "universal" if replayed else arguments["loss"]
    if replayed and arguments["loss"] != loss:
        notes.append(f"--loss {arguments['loss']}: with replay it is universal, as in mace")
    data = _data(arguments, loss, notes)
    options: dict[str, Any] = {
        "data": data,
        "model": _model(arguments, model, notes),
        "references": translate_references(arguments, data["train"], notes),
        "method": _method(arguments, notes),
    }
    repeats = 1
    if replayed:
        plan = plan_replay(arguments, data["train"], data["valid"], notes)
        options["replay"], repeats = plan.section, plan.repeats
    elif arguments["pt_valid_file"] is not None:
        notes.append("--pt_valid_file: ignored without replay, as in mace")
    options["training"] = translate_training(arguments, loss, replayed, repeats, notes)
    if loss in WITH_STRESS and not _may_have_stress(data):
        notes.append(f"--loss {loss}: no training frame has stress, which leaves its terms out")
        for section in (options["training"], options["training"].get("second_stage", {})):
            if "loss" in section:
                section["loss"]["stress"] = 0.0
    folder = Path(arguments["work_dir"])
    run = arguments.forcetune.out or str(folder / f"{arguments['name']}_run-{arguments['seed']}")
    options["output"] = {"run": run} | ({"overwrite": True} if arguments.forcetune.overwrite else {})
    options["output"] |= _tracking(arguments, notes)
    for keys, value in map(parse_setting, arguments.forcetune.settings):
        set_value(options, ".".join(keys), value)
    config = load_config(overrides={name: get_value(options, name) for name in leaf_names(options)})
    return Translation(
        options=options,
        config=config,
        notes=tuple(dict.fromkeys(notes)),
        error_table=_error_table(arguments, loss),
        model_file=Path(arguments["model_dir"] or folder) / f"{arguments['name']}.model",
        resume=arguments["restart_latest"],
        dry_run=arguments["dry_run"],
    )


def _may_have_stress(data: dict[str, Any]) -> bool:
    """Whether some training frame has stress; of files that are missing, or too large for memory, it is assumed."""
    from forcetune.frames.dataset import is_streamed
    from forcetune.frames.read import read_frames

    config = DataConfig.model_validate(data)
    if not all(Path(file).exists() for file in config.train) or is_streamed(config):
        return True
    frames = read_frames(config.train, stress_key=config.stress_key, require=()).frames
    return any(frame.stress is not None for frame in frames)


def _options_in(arguments: Arguments, handling: Handling) -> list[MaceOption]:
    """The options of a command line that are handled so."""
    return [option for option in OPTIONS if option.handling is handling and option.name in arguments]


def _check_refused(arguments: Arguments) -> None:
    """
    Raises:
        InputError: an option that would change the result and has no counterpart.
    """
    for option in _options_in(arguments, Handling.REFUSED):
        if arguments[option.name] != option.default:
            try:
                same = read_literal(option.name, arguments[option.name]) == read_literal(option.name, option.default)
            except InputError:
                same = False
            if not same:
                raise InputError(f"{option.flags[0]} {short(arguments[option.name])}: {option.explanation}.")


def _list_ignored(arguments: Arguments) -> list[str]:
    """Sentences about options that change nothing, one for each reason."""
    notes: list[str] = []
    network = [option.flags[0] for option in _options_in(arguments, Handling.NETWORK)]
    if network:
        notes.append(f"{', '.join(network)}: ignored, as the architecture is the foundation model's, in mace, too")
    by_reason: dict[str, list[str]] = {}
    for option in _options_in(arguments, Handling.IGNORED):
        by_reason.setdefault(option.explanation, []).append(option.flags[0])
    return notes + [f"{', '.join(flags)}: ignored; {reason}" for reason, flags in by_reason.items()]


def _data(arguments: Arguments, loss: str, notes: list[str]) -> dict[str, Any]:
    data: dict[str, Any] = {"train": read_files("train_file", arguments["train_file"])}
    if arguments["valid_file"] is not None:
        data["valid"] = read_files("valid_file", arguments["valid_file"])
    else:
        data["valid"] = arguments["valid_fraction"]
        if not 0 < data["valid"] < 1:
            raise InputError(f"--valid_fraction {data['valid']}: write one between 0 and 1, or name --valid_file.")
        data["split_seed"] = arguments["seed"]
    tests = read_files("test_file", arguments["test_file"]) if arguments["test_file"] is not None else []
    if arguments["test_dir"] is not None:
        pattern = "*/*.h5" if arguments["multi_processed_test"] else "*_test.h5"
        files = sorted(str(path) for path in Path(arguments["test_dir"]).glob(pattern))
        if not files:
            raise InputError(f"--test_dir {arguments['test_dir']}: has no files {pattern}.")
        tests += files
    if tests:
        data["test"] = tests
    data |= {name: arguments[name] for name in ("energy_key", "forces_key", "stress_key") if name in arguments}
    return data | _virials(arguments, loss, notes)


def _virials(arguments: Arguments, loss: str, notes: list[str]) -> dict[str, Any]:
    """The key of virials, from which stress is computed, where the loss has them.

    Raises:
        InputError: the name does not say that they are virials.
    """
    if "virials_key" not in arguments:
        return {}
    if loss != "virials":
        notes.append("--virials_key: ignored without --loss virials, as in mace")
        return {}
    key = arguments["virials_key"]
    if "virial" not in key.lower():
        raise InputError(
            f"--virials_key {short(key)}: virials are recognised by `virial` in their name; rename them in the file."
        )
    if "stress_key" in arguments:
        notes.append("--stress_key: ignored with --loss virials, as in mace")
    return {"stress_key": key}


def _model(arguments: Arguments, model: str, notes: list[str]) -> dict[str, Any]:
    section: dict[str, Any] = {
        "model": model,
        "elements": translate_elements(arguments),
        "dtype": arguments["default_dtype"],
        "device": _device(arguments["device"], notes),
    }
    if arguments["foundation_head"] is not None:
        section["head"] = arguments["foundation_head"]
    if arguments.forcetune.trust:
        section["trust"] = True
    return section


def _device(device: str, notes: list[str]) -> str:
    if device in ("mps", "xpu"):
        raise InputError(f"--device {device}: models run on cpu and cuda only; write one of them.")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            notes.append("--device cuda: there is no GPU that PyTorch can use; the run is on the CPU")
            return "cpu"
    return device


def _tracking(arguments: Arguments, notes: list[str]) -> dict[str, Any]:
    """Of ``output``: wandb and its project, where --wandb asks for it."""
    if not arguments["wandb"]:
        if arguments["wandb_project"]:
            notes.append("--wandb_project: ignored without --wandb, as in mace")
        return {}
    return {"trackers": ["wandb"]} | ({"project": project} if (project := arguments["wandb_project"]) else {})


def _method(arguments: Arguments, notes: list[str]) -> dict[str, Any]:
    chosen = arguments.forcetune
    if arguments["lora"] and chosen.method not in (None, "lora"):
        raise InputError(f"--lora asks for method lora, --method for {chosen.method}; leave one of them out.")
    name = chosen.method or ("lora" if arguments["lora"] else "full" if (arguments["freeze"] or 0) > 0 else "mmea")
    method: dict[str, Any] = {"name": name}
    if name in GATED:
        method |= _gate_options(arguments, notes)
    elif "mmea_init" in arguments or "mmea_std" in arguments:
        raise InputError(f"--mmea_init, --mmea_std: set gates, which method {name} does not have; leave them out.")
    if arguments["lora"]:
        method |= {"rank": arguments["lora_rank"], "alpha": arguments["lora_alpha"]}
    elif "lora_rank" in arguments or "lora_alpha" in arguments:
        notes.append("--lora_rank, --lora_alpha: ignored without --lora True, as in mace")
    if chosen.rank is not None:
        if arguments["lora"] and "lora_rank" in arguments:
            raise InputError(
                f"--rank {chosen.rank}, --lora_rank {arguments['lora_rank']}: both set method.rank; leave one of them "
                "out."
            )
        method["rank"] = chosen.rank
    if arguments["freeze"] is not None:
        if arguments["freeze"] >= 7:
            raise InputError(f"--freeze {arguments['freeze']}: leaves nothing to train; 6 trains the readouts.")
        if arguments["freeze"] <= 0:
            notes.append(f"--freeze {arguments['freeze']}: freezes nothing, as in mace {MACE_VERSION}")
        else:
            parts = _FROZEN[max(key for key in _FROZEN if key <= arguments["freeze"])]
            method["target"] = rf"({parts})\..*" if "|" in parts else rf"{parts}\..*"
    return method


def _gate_options(arguments: Arguments, notes: list[str]) -> dict[str, Any]:
    """Of the MMEA code, which reads most of them from the environment."""
    options: dict[str, Any] = {}
    environment = _mmea_environment(arguments, notes)
    try:
        if "MMEA_RANK" in environment:
            options["rank"] = int(environment["MMEA_RANK"])
        if "MMEA_STD" in environment:
            options["shift_init"] = max(0.0, float(environment["MMEA_STD"]))
    except ValueError as error:
        raise InputError("MMEA_RANK and MMEA_STD in the environment are numbers; correct or unset them.") from error
    if "MMEA_PHI" in environment:
        if environment["MMEA_PHI"] not in ("exp", "res"):
            raise InputError("MMEA_PHI in the environment is exp or res; correct or unset it.")
        options["gain"] = "exp" if environment["MMEA_PHI"] == "exp" else "linear"
    if environment:
        settings = ", ".join(f"{name}={value}" for name, value in environment.items())
        notes.append(f"{settings}: taken from the environment, as the MMEA code does")
    if arguments["mmea_init"] is not None:
        options["shift_init"] = arguments["mmea_std"] if arguments["mmea_init"] == "normal" else 0.0
    elif "mmea_std" in arguments:
        notes.append("--mmea_std: ignored without --mmea_init normal, as in the MMEA code")
    return options


def _mmea_environment(arguments: Arguments, notes: list[str]) -> dict[str, str]:
    """Variables of the MMEA code that count, which are those that no option of the command line overrides."""
    environment = {name: os.environ[name] for name in _MMEA_VARIABLES if os.environ.get(name)}
    winners = {
        "MMEA_RANK": f"--rank {arguments.forcetune.rank}" if arguments.forcetune.rank is not None else "",
        "MMEA_STD": f"--mmea_init {arguments['mmea_init']}" if arguments["mmea_init"] is not None else "",
    }
    for keys, _ in map(parse_setting, arguments.forcetune.settings):
        for name, option in _MMEA_VARIABLES.items():
            if f"{option}.".startswith(".".join(keys) + "."):
                winners[name] = f"--set {'.'.join(keys)}=…"
    for name, winner in winners.items():
        if winner and name in environment:
            notes.append(f"{name}={environment.pop(name)} in the environment: ignored, as {winner} wins")
    return environment


def _error_table(arguments: Arguments, loss: str) -> str:
    """The kind of table; with stress in the loss it has stress, too, as in mace."""
    kind = arguments["error_table"]
    if kind in _DIPOLE_TABLES:
        raise InputError(f"--error_table {kind}: forcetune computes no dipoles; write PerAtomRMSE or TotalMAE.")
    if loss in WITH_STRESS and kind in ("PerAtomRMSE", "PerAtomMAE", "TotalRMSE", "TotalMAE"):
        return "PerAtomRMSEstressvirials" if "RMSE" in kind else "PerAtomMAEstressvirials"
    return kind
