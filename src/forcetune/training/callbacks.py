"""What is reported of a training: the table of metrics, checkpoints, and a bar with the time left."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from forcetune.training.module import FineTuning, Observer
from forcetune.utils.files import atomic_path

METRICS_NAME = "metrics.csv"
VALID_KEYS = (
    "energy_mae_mev_per_atom",
    "energy_rmse_mev_per_atom",
    "forces_mae_mev_per_ang",
    "forces_rmse_mev_per_ang",
    "stress_mae_mev_per_ang3",
    "stress_rmse_mev_per_ang3",
    "moment_mae_mub",
    "moment_rmse_mub",
    "magforce_mae_mev",
    "magforce_rmse_mev",
)
COLUMNS = (
    *("epoch", "step", "learning_rate", "stage", "train_loss", "train_penalty", "valid_loss"),
    *(f"valid_{key}" for key in VALID_KEYS),
    *("zeros_of_wrapped", "zeros_of_all", "seconds"),
)


def metrics_row(module: FineTuning, seconds: float) -> dict[str, Any]:
    """One row of ``metrics.csv``; validation columns are empty in epochs without validation."""
    row: dict[str, Any] = {
        "epoch": module.epoch,
        "step": module.steps_done,
        "learning_rate": module.learning_rate,
        "stage": module.stage,
        "train_loss": module.train_loss,
        "train_penalty": module.train_penalty,
        "seconds": round(seconds, 3),
    }
    if module.epoch % module.config.valid_every == 0 and module.valid_errors is not None:
        row["valid_loss"] = module.valid_loss
        if module.sparsity is not None:
            row |= {name: getattr(module.sparsity, name) for name in ("zeros_of_wrapped", "zeros_of_all")}
        row |= {f"valid_{key}": getattr(module.valid_errors, key) for key in VALID_KEYS}
    return row


class MetricsTable(Observer):
    """Appends a row to ``metrics.csv`` after every epoch, on the disk before the next begins."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_NAME
        self.began = time.monotonic()

    def on_start(self, training: FineTuning) -> None:
        rows = self._rows(training.epochs_done)
        self.began = time.monotonic() - (float(rows[-1]["seconds"]) if rows else 0.0)
        with atomic_path(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def _rows(self, epochs: int) -> list[dict[str, str]]:
        """Rows of the epochs that a resumed run does not repeat; a last line without its end is left out.

        Tables of earlier versions lack columns, which stay empty.
        """
        if epochs == 0 or not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if all(value is not None for value in row.values())]
        return [row for row in rows if int(row["epoch"]) <= epochs]

    def on_epoch(self, training: FineTuning) -> None:
        row = metrics_row(training, time.monotonic() - self.began)
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, COLUMNS).writerow(row)
            stream.flush()
            os.fsync(stream.fileno())


class Checkpoint(Observer):
    """Hands the state over after every epoch that was validated, the last step of the epoch."""

    def __init__(self, save: Callable[[dict[str, Any]], None]) -> None:
        self.save = save

    def on_epoch(self, training: FineTuning) -> None:
        if training.epoch % training.config.valid_every == 0:
            self.save(training.training_state())


class ProgressBar(Observer):
    """One bar over all epochs on standard error; without a terminal, a line at every twentieth of the run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, soft_wrap=True, emoji=False)
        self.bar: Progress | None = None

    def on_start(self, training: FineTuning) -> None:
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console)
        done, epochs = training.epochs_done, training.epochs
        self.task = self.bar.add_task("", total=epochs, completed=done, epoch=done, epochs=epochs, text="")
        self.bar.start()

    def on_step(self, training: FineTuning) -> None:
        if self.bar is not None:
            self.bar.update(
                self.task,
                total=training.epochs,
                epochs=training.epochs,
                completed=training.progress,
                epoch=training.epoch,
                text=_progress_text(training),
            )

    def on_epoch(self, training: FineTuning) -> None:
        every = max(1, math.ceil(training.config.epochs / 20))
        if self.bar is None and training.epoch % every == 0:
            text = _progress_text(training)
            self.console.print(f"epoch {training.epoch}/{training.epochs} {text}", highlight=False)

    def close(self) -> None:
        """Take the bar down, whatever ended the run."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _progress_text(module: FineTuning) -> str:
    parts = []
    errors = module.valid_errors
    if errors is not None and errors.energy_mae_mev_per_atom is not None:
        parts.append(f"valid E {errors.energy_mae_mev_per_atom:.2f} meV/atom")
    if errors is not None and errors.forces_mae_mev_per_ang is not None:
        parts.append(f"F {errors.forces_mae_mev_per_ang:.1f} meV/Å")
    if errors is not None and errors.moment_mae_mub is not None:
        parts.append(f"μ {errors.moment_mae_mub:.4f} μB")
    if errors is not None and errors.magforce_mae_mev is not None:
        parts.append(f"magnetic F {errors.magforce_mae_mev:.2f} meV/(μB or rad)")
    if module.sparsity is not None:
        parts.append(f"{100 * module.sparsity.zeros_of_wrapped:.1f} % zeros")
    return " · ".join(parts)
