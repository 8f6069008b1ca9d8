"""Learning rate, rank and weight of the forces for one method, chosen on the validation frames by Optuna."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from forcetune.adapters.methods import METHODS, build_method, option_names
from forcetune.config import LossConfig, RunConfig
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import Errors
from forcetune.runs.fit import run_fit
from forcetune.training.label_weights import default_stress_weight
from forcetune.utils.option_defaults import is_given

RANKS = (4, 8, 16, 32, 64)
RATES = (0.1, 10.0)
"""Limits of the learning rate in units of the method's own."""
WEIGHTS = (0.1, 10.0)
"""Limits of the forces' weight in units of the configured one."""
FIRST = 3
"""Trials that are never pruned, so that there is something to compare with."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a search.

    Attributes:
        method: name.
        settings: the best options by dotted name.
        score: their validation error (see :func:`score`).
        trials: every trial that ended: its options, its score (the last one if pruned) and whether it was pruned.
    """

    method: str
    settings: dict[str, Any]
    score: float
    trials: tuple[dict[str, Any], ...]


def score(errors: Errors, loss: LossConfig, magnetic: bool = False) -> float:
    """w_E RMSE_E² + w_F RMSE_F² + w_S RMSE_S² with the configured weights, eV², eV²/Å² and eV²/Å⁶.

    It does not depend on the weights of a trial, so that trials with different ones can be compared. Without a weight
    of its own the stress has that of the training (:func:`forcetune.training.label_weights.default_stress_weight`).

    Args:
        errors: on the validation frames; those without labels do not count.
        loss: of the configuration that is searched for.
        magnetic: whether the run has a magnetic layer.
    """
    total = 0.0
    stress_weight = default_stress_weight(loss, magnetic) if loss.stress is None else loss.stress
    energy = errors.energy_rmse_mev_per_atom if loss.energy_per_atom else errors.energy_rmse_mev
    terms = (
        (loss.energy, energy),
        (loss.forces, errors.forces_rmse_mev_per_ang),
        (stress_weight, errors.stress_rmse_mev_per_ang3),
    )
    for weight, value in terms:
        if value is not None:
            total += weight * (value / 1000) ** 2
    return total


def check_search(config: RunConfig) -> None:
    """
    Raises:
        InputError: Optuna is missing, or nothing is left to search.
    """
    if find_spec("optuna") is None:
        raise InputError("--search needs Optuna: pip install 'forcetune[tune]'.")
    _space(config)


def search_options(config: RunConfig, folder: Path, trials: int) -> SearchResult:
    """Try ``trials`` sets of options for a method, each with the full number of epochs unless it is pruned.

    A trial is pruned when its score is worse than the median of the others at the same epoch. Trials are kept in a
    journal in ``folder``, so that a search that died is continued.

    Args:
        config: of one run of the method; options that are set there are not searched.
        folder: for the journal and the trials' runs.
        trials: number of them, those done before included.

    Raises:
        InputError: as :func:`forcetune.runs.fit.run_fit`, or Optuna is missing.
        ForcetuneError: every training failed.
    """
    check_search(config)
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    # another configuration is another search
    name = f"{config.method.name}-{_digest(config)}"
    study = optuna.create_study(
        study_name=name,
        storage=JournalStorage(JournalFileBackend(str(folder / f"{name}.journal"))),
        sampler=optuna.samplers.TPESampler(seed=config.training.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST),
        load_if_exists=True,
    )
    complete, pruned = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    if not study.trials:
        study.enqueue_trial(_defaults(config))
    remaining = trials - len(study.get_trials(deepcopy=False, states=(complete, pruned)))
    if remaining > 0:
        study.optimize(lambda trial: _run_trial(trial, config, folder / f"{name}-{trial.number}"), n_trials=remaining)
    if not study.get_trials(deepcopy=False, states=(complete,)):
        raise ForcetuneError(f"{name}: no trial of the search ended well; see {folder}.")
    rows = tuple(
        {
            **_round_settings(trial.params),
            "score": trial.value if trial.value is not None else _last(trial.intermediate_values),
            "pruned": trial.state == pruned,
        }
        for trial in study.get_trials(states=(complete, pruned))
    )
    return SearchResult(config.method.name, _round_settings(study.best_params), float(study.best_value), rows)


def _run_trial(trial: Any, config: RunConfig, run: Path) -> float:
    """Train with options that the trial suggests; returns the best score of all epochs.

    Raises:
        InputError: as :func:`forcetune.runs.fit.run_fit`.
        optuna.TrialPruned: the score is worse than that of other trials, or the training diverged.
    """
    import optuna

    settings = _suggest(trial, config)
    best = float("inf")

    def observe(epoch: int, errors: Errors) -> None:
        nonlocal best
        best = min(best, score(errors, config.training.loss, config.magnetism.layer != "off"))
        trial.report(best, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        run_fit(_with(config, settings, run), console=Console(quiet=True), observe=observe)
    except InputError:
        raise
    except ForcetuneError as error:  # these options let the training diverge
        raise optuna.TrialPruned(str(error)) from error
    return best


def _digest(config: RunConfig) -> str:
    """Of all that a search depends on."""
    content = config.model_dump(mode="json", exclude={"output": True, "training": {"threads"}})
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _last(values: Mapping[int, float]) -> float | None:
    return values[max(values)] if values else None


def _space(config: RunConfig) -> dict[str, tuple[float, float] | tuple[int, ...]]:
    """Options to search, with their limits or choices; what the user set stays."""
    loss = config.training.loss
    space: dict[str, Any] = {}
    if not is_given(config, "training.learning_rate"):
        rate = build_method(config.method).learning_rate
        space["training.learning_rate"] = (RATES[0] * rate, RATES[1] * rate)
    known = option_names(METHODS[config.method.name])
    if "rank" in known and "rank" not in config.method.options():
        space["method.rank"] = RANKS
    if "forces" not in loss.model_fields_set and loss.energy > 0 and loss.forces > 0:
        space["training.loss.forces"] = (WEIGHTS[0] * loss.forces, WEIGHTS[1] * loss.forces)
    if not space:
        raise InputError(
            f"--search: learning rate, rank and weight of the forces are all set for {config.method.name}."
        )
    return space


def _defaults(config: RunConfig) -> dict[str, Any]:
    """The first trial: what a run without a search has."""
    defaults = {
        "training.learning_rate": build_method(config.method).learning_rate,
        "method.rank": 16,
        "training.loss.forces": config.training.loss.forces,
    }
    return {key: defaults[key] for key in _space(config)}


def _suggest(trial: Any, config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, limits in _space(config).items():
        if key == "method.rank":
            values[key] = trial.suggest_categorical(key, limits)
        else:
            values[key] = trial.suggest_float(key, *limits, log=True)
    return _round_settings(values)


def _round_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Rounded as one would write them, so that the options that are trained are those that are reported."""
    return {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in params.items()}


def _with(config: RunConfig, settings: Mapping[str, Any], run: Path) -> RunConfig:
    """The configuration with these options, for a run in ``run`` without test frames."""
    options = with_settings(config.model_dump(exclude_unset=True), settings)
    options["data"] = {key: value for key, value in options["data"].items() if key != "test"}
    options["output"] = options.get("output", {}) | {"run": str(run), "overwrite": True, "forgetting": False}
    return RunConfig.model_validate(options)


def with_settings(options: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping with options by dotted name put in; the original stays."""
    result = dict(options)
    for key, value in settings.items():
        *sections, last = key.split(".")
        place = result
        for section in sections:
            place[section] = dict(place.get(section) or {})
            place = place[section]
        place[last] = value
    return result
