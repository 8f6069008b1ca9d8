"""Running many small independent computations whose results are kept, so that a rerun does what is missing."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from forcetune.errors import InputError
from forcetune.utils.files import write_text


class Kept(Protocol):
    """A computation whose result is the file ``path``."""

    @property
    def path(self) -> Path: ...


Item = TypeVar("Item", bound=Kept)


def run_missing(
    items: Sequence[Item], run: Callable[[Item], None], *, processes: int, console: Console, title: str
) -> None:
    """Call ``run`` on every item whose file is not there yet, with a bar that shows the time left.

    Args:
        items: the computations; ``run`` writes their files atomically.
        run: a function of a module, so that another process finds it.
        processes: how many run at the same time.
        console: where the bar is drawn.
        title: what is counted.
    """
    missing = [item for item in items if not item.path.exists()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(title, total=len(items), completed=len(items) - len(missing))
        if processes == 1 or len(missing) < 2:
            for item in missing:
                run(item)
                progress.advance(bar)
            return
        # spawned, not forked: PySCF and tblite hold thread pools that do not survive a fork
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for _ in pool.imap_unordered(run, missing):
                progress.advance(bar)


def guard_settings(out: Path, settings: Mapping[str, object]) -> None:
    """Note the settings in ``out``, and refuse a folder whose files were made with others.

    Raises:
        InputError: the settings in the folder differ.
    """
    path = out / "settings.json"
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{path}: this folder holds data of other settings; choose another --out.")
    write_text(path, text)
