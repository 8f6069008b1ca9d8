"""Multihead fine-tuning of mace as replay: frames of the foundation model's data beside those to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forcetune.cli.mace_train.literals import read_files
from forcetune.cli.mace_train.parsing import Arguments
from forcetune.errors import InputError

DOWNLOADED = ("mp", "omat", "matpes_pbe", "matpes_r2scan")
"""Replay data that mace downloads and selects from."""
_WITH_DATA = ("small", "medium", "large")
"""Foundation models that mace replays the Materials Project for, without being asked to."""
_LARGEST_RATIO = 100.0
LEARNING_RATE, EMA = 1e-4, 0.99999
"""What mace takes in multihead fine-tuning unless --force_mh_ft_lr is given."""


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """How often which frames come.

    Attributes:
        section: ``replay`` of the configuration.
        repeats: epochs here for one epoch of mace, which repeats few training frames beside many replay frames.
    """

    section: dict[str, Any]
    repeats: int


def is_replayed(arguments: Arguments) -> bool:
    """Whether mace would fine-tune with several heads.

    Raises:
        InputError: it would download data for that, or has nothing to replay.
    """
    replay_file = arguments["pt_train_file"]
    if not arguments["multiheads_finetuning"]:
        if replay_file is not None:
            raise InputError(
                "--pt_train_file: replay is switched off by --multiheads_finetuning=False; leave one of them out."
            )
        return False
    if replay_file is None:
        if arguments["foundation_model"] in _WITH_DATA:
            raise InputError(
                f"--foundation_model {arguments['foundation_model']}: mace would download Materials Project data to "
                "replay; write --multiheads_finetuning=False, or name a file of replay frames by --pt_train_file "
                "(github.com/ACEsuit/mace-foundations/releases has them)."
            )
        if "multiheads_finetuning" in arguments:
            raise InputError(
                "--multiheads_finetuning: there is nothing to replay; name a file of frames by --pt_train_file, or "
                "write --multiheads_finetuning=False."
            )
        return False
    if replay_file in DOWNLOADED:
        raise InputError(
            f"--pt_train_file {replay_file}: forcetune does not download and select replay data; download the file "
            "from github.com/ACEsuit/mace-foundations/releases, choose frames of it (mace.cli.fine_tuning_select), and "
            "name that file."
        )
    if str(arguments["E0s"]).lower() == "average":
        raise InputError(
            "--E0s average: mace refuses it with replay, as energies of the two sets would have different zeros; write "
            "--E0s estimated, foundation or a dictionary, or --multiheads_finetuning=False."
        )
    return True


def plan_replay(arguments: Arguments, train: Sequence[str], valid: list[str] | float, notes: list[str]) -> ReplayPlan:
    """Count frames as mace does and say how often they come.

    In an epoch of mace each replay frame comes once, and each training frame 1 + ⌊t / q⌋ times, with q the number of
    training frames for each replay frame, where that is below the threshold t, and once otherwise.

    Raises:
        InputError: files that cannot be read.
    """
    from forcetune.frames.read import read_frames
    from forcetune.frames.splits import separate_isolated

    files = read_files("pt_train_file", arguments["pt_train_file"])
    valid_fraction = 0.0 if isinstance(valid, list) else valid
    replay_fraction = arguments["valid_fraction"] if arguments["pt_valid_file"] is None else 0.0

    def count(sources: Sequence[str], excluded_fraction: float, name: str) -> int:
        frames = separate_isolated(read_frames(sources, require=(), name=name).frames)[0]
        return max(1, len(frames) - int(excluded_fraction * len(frames)))

    n_train = count(train, valid_fraction, "training data")
    n_replay = count(files, replay_fraction, "replay data")
    train_ratio, threshold = n_train / n_replay, arguments["real_pt_data_ratio_threshold"]
    repeats = 1 + int(threshold / train_ratio) if train_ratio < threshold else 1
    ratio = n_replay / (n_train * repeats)
    notes.append(
        f"replay: {n_replay} frames beside {n_train} to train on; what pt_head is in mace is an energy "
        "of replay frames alone here (replay.head), which is not kept"
        + (f"; an epoch of mace is {repeats} epochs here" if repeats > 1 else "")
    )
    if ratio > _LARGEST_RATIO:
        notes.append(f"replay: {ratio:.0f} replay frames for each training frame are cut to {_LARGEST_RATIO:.0f}")
    section = {
        "data": files,
        "labels": "base" if arguments["pseudolabel_replay"] else "file",
        "ratio": round(min(ratio, _LARGEST_RATIO), 6),
        "weight": arguments["weight_pt_head"],
    }
    return ReplayPlan(section, repeats)
