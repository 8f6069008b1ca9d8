"""``--heads``: one head to tune and ``pt_head`` for replay, written out as the options that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forcetune.cli.mace_train.literals import read_literal
from forcetune.cli.mace_train.parsing import Arguments
from forcetune.errors import InputError
from forcetune.utils.parsing import short

REPLAY_HEAD = "pt_head"
_DIRECT = (
    *("train_file", "valid_file", "test_file", "test_dir", "E0s", "statistics_file", "valid_fraction"),
    *("config_type_weights", "keep_isolated_atoms", "atomic_numbers", "energy_key", "forces_key", "stress_key"),
)
_NETWORK = ("compute_avg_num_neighbors", "avg_num_neighbors", "mean", "std")
_UNUSED_KEYS = (*("virials", "dipole", "polarizability", "charges", "head", "elec_temp", "total_spin", "total_charge"),)


def expand_heads(arguments: Arguments, notes: list[str]) -> Arguments:
    """The same options without ``--heads``.

    Raises:
        InputError: no dictionary of heads, more than one head to tune, or an option of a head without a counterpart.
    """
    if "heads" not in arguments:
        return arguments
    heads = read_literal("heads", arguments["heads"])
    if not isinstance(heads, Mapping) or not heads or not all(isinstance(head, Mapping) for head in heads.values()):
        raise InputError("--heads: write names of heads with their options, such as {'dft': {'train_file': 'a.xyz'}}.")
    tuned = [name for name in heads if name != REPLAY_HEAD]
    if len(tuned) != 1:
        raise InputError(
            f"--heads: {len(tuned)} heads to tune ({short(tuned)}); forcetune tunes one: keep one of them, and fit the "
            "others in runs of their own."
        )
    options = {name: value for name, value in arguments.values.items() if name != "heads"}
    options |= _head_options(tuned[0], heads[tuned[0]], notes)
    if REPLAY_HEAD in heads:
        options |= _replay_options(heads[REPLAY_HEAD], options)
    return Arguments(options, arguments.forcetune)


def _head_options(head: str, content: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in content.items():
        if key in ("info_keys", "arrays_keys") and isinstance(value, Mapping):
            for label, name in value.items():
                if label in ("energy", "forces", "stress"):
                    options[f"{label}_key"] = name
                elif label in _UNUSED_KEYS:
                    notes.append(f"--heads: {label} of head {head} is ignored, as no loss here uses it")
                else:
                    raise InputError(f"--heads: head {head} has a key of {short(label)}, which mace does not read.")
        elif key in _DIRECT:
            options[key] = value
        elif key in _NETWORK or key.removesuffix("_key") in _UNUSED_KEYS:
            notes.append(f"--heads: {key} of head {head} is ignored, as the same option without --heads is")
        else:
            raise InputError(f"--heads: option {short(key)} of head {head} has no counterpart; leave it out.")
    return options


def _replay_options(content: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the head that replays."""
    for key, value in content.items():
        if key not in ("train_file", "valid_file", "valid_fraction", "E0s"):
            raise InputError(
                f"--heads: option {short(key)} of {REPLAY_HEAD} has no counterpart: labels of replay frames are "
                "detected; leave it out."
            )
        if key == "E0s" and str(value).lower() != "foundation":
            raise InputError(f"--heads: E0s of {REPLAY_HEAD} follow from the replay frames; write 'foundation'.")
    if "train_file" not in content and "pt_train_file" not in options:
        raise InputError(f"--heads: {REPLAY_HEAD} has no train_file.")
    return {f"pt_{key}": content[key] for key in ("train_file", "valid_file") if key in content}
