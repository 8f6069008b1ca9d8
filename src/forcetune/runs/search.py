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
from forcetune.backbones.loading import backbone_class
from forcetune.backbones.registry import resolve
from forcetune.config import LossConfig, RunConfig
from forcetune.errors import ForcetuneError, InputError
from forcetune.evaluation.metrics import Errors
from forcetune.runs.fit import run_fit
from forcetune.runs.method_defaults import choose_rate, with_run_defaults
from forcetune.training.label_weights import default_stress_weight
from forcetune.utils.option_defaults import is_given

RATE, RANK, FORCES = "training.learning_rate", "method.rank", "training.loss.forces"
"""Options that are searched."""
RANKS = (4, 8, 16, 32, 64)
RATES = (0.1, 10.0)
"""Limits of the learning rate in units of what a run without a search has."""
WEIGHTS = (0.1, 10.0)
"""Limits of the forces' weight in units of the configured one."""
SCORE = 2
"""Number of the form of :func:`score`; trials of another one are not continued."""
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
    """Sum of w RMSE² over energies, forces, stresses, moments and magnetic forces, with the configured weights w.

    Energies count in eV (for each atom where the loss has them so), the others in eV/Å, eV/Å³, μB and eV per unit of
    the magnetic state. It does not depend on the weights of a trial, so that trials with different ones can be
    compared. Without a weight of its own, or with one of virials for each atom, the stress has the default
    (:func:`forcetune.training.label_weights.default_stress_weight`); magnetic forces have 1, as in training.

    Args:
        errors: on the validation frames; those without labels do not count.
        loss: of the configuration that is searched for.
        magnetic: whether the run has a magnetic layer.
    """
    total = 0.0
    plain = loss.model_copy(update={"stress_per_atom": False})
    stress_weight = default_stress_weight(plain, magnetic)
    if loss.stress is not None and not (loss.stress_per_atom and loss.stress):
        stress_weight = loss.stress
    energy = errors.energy_rmse_mev_per_atom if loss.energy_per_atom else errors.energy_rmse_mev
    terms = (
        (loss.energy, energy),
        (loss.forces, errors.forces_rmse_mev_per_ang),
        (stress_weight, errors.stress_rmse_mev_per_ang3),
        (1.0 if loss.magforces is None else loss.magforces, errors.magforce_rmse_mev),
    )
    for weight, value in terms:
        if value is not None:
            total += weight * (value / 1000) ** 2
    if errors.moment_rmse_mub is not None:
        total += loss.moments * errors.moment_rmse_mub**2
    return total


def check_search(config: RunConfig) -> None:
    """
    Raises:
        InputError: Optuna is missing, or nothing is left to search.
    """
    if find_spec("optuna") is None:
        raise InputError("--search needs Optuna: pip install 'forcetune[tune]'.")
    _list_options(config)


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
    defaults = default_options(config)
    loss = with_run_defaults(config).training.loss
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    # another configuration, or start, is another search
    name = f"{config.method.name}-{_digest(config, defaults)}"
    journal = str(folder / f"{name}.journal")
    # Optuna's own choice of lock is a symbolic link, which Windows lets administrators make only
    lock = JournalFileOpenLock(journal)
    study = optuna.create_study(
        study_name=name,
        storage=JournalStorage(JournalFileBackend(journal, lock_obj=lock)),
        sampler=optuna.samplers.TPESampler(seed=config.training.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST),
        load_if_exists=True,
    )
    complete, pruned = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    if not study.trials:
        study.enqueue_trial(defaults)
    remaining = trials - len(study.get_trials(deepcopy=False, states=(complete, pruned)))
    if remaining > 0:

        def run_trial(trial: Any) -> float:
            return _run_trial(trial, config, loss, defaults, folder / f"{name}-{trial.number}")

        study.optimize(run_trial, n_trials=remaining)
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


def _run_trial(trial: Any, config: RunConfig, loss: LossConfig, defaults: Mapping[str, Any], run: Path) -> float:
    """Train with options that the trial suggests; returns the best score of all epochs.

    Raises:
        InputError: as :func:`forcetune.runs.fit.run_fit`.
        optuna.TrialPruned: the score is worse than that of other trials, or the training diverged.
    """
    import optuna

    settings = _suggest(trial, defaults)
    best = float("inf")

    def observe(epoch: int, errors: Errors) -> None:
        nonlocal best
        best = min(best, score(errors, loss, config.magnetism.layer != "off"))
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


def _digest(config: RunConfig, defaults: Mapping[str, Any]) -> str:
    """Of all that a search depends on."""
    content = config.model_dump(mode="json", exclude={"output": True, "training": {"threads"}})
    content["defaults"] = dict(defaults)
    content["optimizer"] = config.choose_optimizer(build_method(config.method).optimizer)
    content["score"] = SCORE
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _last(values: Mapping[int, float]) -> float | None:
    return values[max(values)] if values else None


def _list_options(config: RunConfig) -> list[str]:
    """Options to search; what the user set stays.

    Raises:
        InputError: all of them are set.
    """
    loss = config.training.loss
    names = []
    if not is_given(config, RATE):
        names.append(RATE)
    if "rank" in option_names(METHODS[config.method.name]) and "rank" not in config.method.options():
        names.append(RANK)
    if "forces" not in loss.model_fields_set and loss.energy > 0 and loss.forces > 0:
        names.append(FORCES)
    if not names:
        raise InputError(
            f"--search: learning rate, rank and weight of the forces are all set for {config.method.name}."
        )
    return names


def default_options(config: RunConfig) -> dict[str, Any]:
    """Options to search, as a run without a search has them: the first trial.

    The learning rate is the foundation model's for the method, or the method's.

    Raises:
        InputError: all of them are set, or there is no such model.
    """
    names = _list_options(config)
    defaults: dict[str, Any] = {RANK: 16, FORCES: with_run_defaults(config).training.loss.forces}
    if RATE in names:
        rates = backbone_class(resolve(config.model.model).library).learning_rates
        defaults[RATE] = choose_rate(config, build_method(config.method), rates)
    return {name: defaults[name] for name in names}


def _suggest(trial: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a trial, around the defaults."""
    values: dict[str, Any] = {}
    for name, default in defaults.items():
        if name == RANK:
            values[name] = trial.suggest_categorical(name, RANKS)
        else:
            least, most = RATES if name == RATE else WEIGHTS
            values[name] = trial.suggest_float(name, least * default, most * default, log=True)
    return _round_settings(values)


def _round_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Rounded as one would write them, so that the options that are trained are those that are reported."""
    return {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in params.items()}


def _with(config: RunConfig, settings: Mapping[str, Any], run: Path) -> RunConfig:
    """The configuration with these options, for a run in ``run`` without test frames."""
    options = with_settings(config.model_dump(exclude_unset=True), settings)
    options["data"] = {key: value for key, value in options["data"].items() if key != "test"}
    options["output"] = options.get("output", {}) | {
        "run": str(run),
        "overwrite": True,
        "forgetting": False,
        "phonons": "off",
    }
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
