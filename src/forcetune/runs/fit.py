"""Fit and resume, as the command line and Python call them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from forcetune.backbones.protocol import Backbone
from forcetune.config import RunConfig, load_config
from forcetune.deployment.loading import BASE_NAME
from forcetune.errors import InputError
from forcetune.evaluation.metrics import Errors
from forcetune.runs.fitting import Fitting, Run
from forcetune.runs.folder import (
    CONFIG_NAME,
    FINISHED,
    has_checkpoint,
    read_status,
)
from forcetune.runs.runtime import collected_warnings, limited_threads
from forcetune.utils import distributed


def fit(
    train: str | Path | Sequence[str | Path] | None = None,
    *,
    model: str | Path | Backbone | None = None,
    method: str | None = None,
    valid: str | Path | Sequence[str | Path] | float | int | None = None,
    test: str | Path | Sequence[str | Path] | None = None,
    epochs: int | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Fine-tune a foundation model on frames.

    Args:
        train: files or patterns of training frames.
        model: name, path, or a loaded backbone, which then carries the adapter. Its elements, head and precision are
            those of the run; one that its file does not give, as it was changed in memory or came from there, is
            stored in the run folder.
        method: ``mmea``, ``elora``, ``full`` …
        valid: files, the fraction or the number of training frames to validate on.
        test: files; evaluated before and after, never trained on.
        epochs: passes over the training frames.
        out: run folder.
        config: YAML file with any of the options; what is given here comes first.
        settings: any option by its dotted name, ``{"training.batch_size": 10}``.

    Raises:
        InputError: bad input; nothing has been written.
        ForcetuneError: the training failed; the best adapter so far stays in the run folder.
    """
    options: dict[str, Any] = {
        "data": {"train": as_texts(train), "valid": as_texts(valid), "test": as_texts(test)},
        "model": {"model": None if isinstance(model, Backbone) else _text(model)},
        "method": {"name": method},
        "training": {"epochs": epochs},
        "output": {"run": _text(out)},
    }
    resolved = load_config(config, given=options, overrides=settings)
    backbone = model if isinstance(model, Backbone) else None
    return run_fit(resolved, backbone=backbone, inputs=() if config is None else (config,))


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def as_texts(value: Any) -> Any:
    """Names of files as a configuration has them: a list of text where there are any, else the value as it is."""
    if isinstance(value, (str, Path)):
        return [str(value)]
    return [str(item) for item in value] if isinstance(value, Sequence) else value


def run_fit(
    config: RunConfig,
    *,
    backbone: Backbone | None = None,
    console: Console | None = None,
    observe: Callable[[int, Errors], None] | None = None,
    inputs: Sequence[str | Path] = (),
) -> Run:
    """Carry out a complete configuration; the command line and :func:`fit` come here.

    Args:
        config: what to do.
        backbone: a loaded model to use instead of loading the one named in ``config``.
        console: where progress is printed; standard error by default.
        observe: called with epoch and validation errors after every validation; what it raises ends the run.
        inputs: further files that the configuration came from; a run folder with one of them is not overwritten.

    Raises:
        InputError, ForcetuneError: as :func:`fit`.
    """
    config.require_no_learning()
    console = console or Console(stderr=True, soft_wrap=True, emoji=False)
    with (
        _among_others(config, console) as (config, console),
        collected_warnings() as messages,
        limited_threads(config.training.threads),
    ):
        return Fitting(config, console, messages, observe, inputs).run(backbone)


def resume(run: str | Path, *, console: Console | None = None) -> Run:
    """Go on with a run that was interrupted, to the same result as if it had not been, bit for bit on one machine.

    Args:
        run: its folder.
        console: where progress is printed; standard error by default.

    Raises:
        InputError: not a run folder, the run is finished, or its data or model changed meanwhile.
        ForcetuneError: as :func:`fit`.
    """
    folder = Path(run)
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"{folder}: is no run folder (no {CONFIG_NAME}); name the folder that `forcetune fit` wrote.")
    config = load_config(folder / CONFIG_NAME)
    # the folder may have moved since
    config = config.model_copy(update={"output": config.output.model_copy(update={"run": str(folder)})})
    if (folder / BASE_NAME).is_file():
        config = config.model_copy(update={"model": config.model.model_copy(update={"model": str(folder / BASE_NAME)})})
    if read_status(folder) in FINISHED:
        raise InputError(f"{folder}: this run is finished; nothing to resume.")
    console = console or Console(stderr=True, soft_wrap=True, emoji=False)
    with (
        _among_others(config, console, going_on=True) as (config, console),
        collected_warnings() as messages,
        limited_threads(config.training.threads),
    ):
        if not has_checkpoint(Path(config.output.run)):
            console.print("interrupted before the first checkpoint: starting from the beginning")
            again = config.model_copy(update={"output": config.output.model_copy(update={"overwrite": True})})
            return Fitting(again, console, messages).run(None, from_the_beginning=True)
        return Fitting(config, console, messages).resume()


@contextmanager
def _among_others(
    config: RunConfig, console: Console, *, going_on: bool = False
) -> Iterator[tuple[RunConfig, Console]]:
    """Under ``torchrun``: all processes do the same, and all but the first quietly in a folder that is thrown away.

    A folder of their own makes every process independent of when the others read and write.

    Args:
        config: of the run.
        console: of the first process.
        going_on: the run exists; the others take a copy of it.
    """
    with distributed.together() as here:
        if here.leads:
            if going_on:
                distributed.wait()
            yield config, console
            return
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            mine = Path(folder) / "run"
            if going_on:
                shutil.copytree(config.output.run, mine)
                distributed.wait()
            output = config.output.model_copy(update={"run": str(mine), "tensorboard": False, "trackers": []})
            yield config.model_copy(update={"output": output}), Console(quiet=True)
