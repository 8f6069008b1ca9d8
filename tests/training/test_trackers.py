"""TensorBoard, W&B and MLflow: stand-ins record what they receive, the packages themselves offline where installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

import forcetune
from forcetune.config import RunConfig, load_config
from forcetune.config.run import OutputConfig
from forcetune.errors import ForcetuneWarning, InputError
from forcetune.runs.metrics import Metrics, read_metrics
from forcetune.training.module import FineTuning, Observer
from forcetune.training.trackers import TRACKERS, TRACKERS_NAME, check_trackers, start_trackers
from systems import write_labelled, write_model


class StandIn(ModuleType):
    """A package that records calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[tuple[str, Any]] = []


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn("wandb")

    def init(**options: Any) -> SimpleNamespace:
        module.calls.append(("init", options))
        return SimpleNamespace(
            id=options["id"] or "abc",
            define_metric=lambda name, step_metric: module.calls.append(("define_metric", (name, step_metric))),
            log=lambda values: module.calls.append(("log", values)),
            finish=lambda: module.calls.append(("finish", None)),
        )

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn("mlflow")

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> None:
            module.calls.append(("get_experiment_by_name", name))

        def create_experiment(self, name: str) -> str:
            module.calls.append(("create_experiment", name))
            return "7"

        def create_run(self, number: str, run_name: str) -> SimpleNamespace:
            module.calls.append(("create_run", (number, run_name)))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def update_run(self, run_id: str, status: str) -> None:
            module.calls.append(("update_run", (run_id, status)))

        def log_param(self, run_id: str, name: str, value: str) -> None:
            module.calls.append(("log_param", (run_id, name, value)))

        def log_metric(self, run_id: str, name: str, value: float, step: int) -> None:
            module.calls.append(("log_metric", (run_id, name, value, step)))

        def set_terminated(self, run_id: str) -> None:
            module.calls.append(("set_terminated", run_id))

    module.MlflowClient = MlflowClient  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def fit(folder: Path, trackers: str, **settings: Any) -> Path:
    """Two epochs of a small model, into ``folder / "run"``."""
    options = {"output.trackers": trackers, "output.forgetting": False, "training.batch_size": 4} | settings
    forcetune.fit(
        write_labelled(folder / "a.xyz"),
        model=write_model(folder / "m.model"),
        method="readout",
        valid=4,
        epochs=2,
        out=folder / "run",
        settings=options,
    )
    return folder / "run"


def metrics_of(run: Path) -> Metrics:
    metrics = read_metrics(run / "metrics.csv")
    assert metrics is not None
    return metrics


def test_a_fit_logs_what_its_table_has(tmp_path: Path, wandb: StandIn, mlflow: StandIn) -> None:
    run = fit(tmp_path, "wandb,mlflow", **{"output.project": "alloys"})
    rows = metrics_of(run)
    logged = [values for name, values in wandb.calls if name == "log"]
    assert [values["epoch"] for values in logged] == [1, 2]
    column = [values["valid_loss"] for values in logged]
    assert column == pytest.approx(list(rows["valid_loss"]), rel=1e-12)
    name, options = wandb.calls[0]
    assert name == "init"
    assert (options["project"], options["name"], options["id"]) == ("alloys", "run", None)
    assert options["config"]["training.epochs"] == 2
    assert wandb.calls[-1] == ("finish", None)
    losses = [call[2:] for name, call in mlflow.calls if name == "log_metric" and call[1] == "valid_loss"]
    assert losses == [(values["valid_loss"], values["epoch"]) for values in logged]
    assert ("log_param", ("r1", "training.epochs", "2")) in mlflow.calls
    assert mlflow.calls[-1] == ("set_terminated", "r1")
    assert json.loads((run / TRACKERS_NAME).read_text(encoding="utf-8")) == {"wandb": "abc", "mlflow": "r1"}


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path: Path, wandb: StandIn, mlflow: StandIn) -> None:
    for resumed in (False, True):
        for log in start_trackers(["wandb", "mlflow"], tmp_path, "forcetune", {"a": {"b": 1}}, resumed=resumed):
            log.close()
    begun = [options for name, options in wandb.calls if name == "init"]
    assert [options["id"] for options in begun] == [None, "abc"]
    assert [options["resume"] for options in begun] == [None, "allow"]
    assert ("update_run", ("r1", "RUNNING")) in mlflow.calls
    assert sum(name == "create_run" for name, _ in mlflow.calls) == 1


def test_a_tracker_that_fails_leaves_the_training_alone(
    tmp_path: Path, wandb: StandIn, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = wandb.init

    def init(**options: Any) -> SimpleNamespace:
        run = begin(**options)
        run.log = lambda values: (_ for _ in ()).throw(RuntimeError("disk full"))
        return run

    wandb.init = init  # type: ignore[attr-defined]
    run = fit(tmp_path, "wandb")
    assert (run / "results.json").is_file()
    assert [name for name, _ in wandb.calls].count("finish") == 1, "it is closed all the same"
    output = capfd.readouterr().err.replace("\n", " ")
    assert output.count("warning: wandb failed (disk full); from epoch 1 on it is left out.") == 1


def test_a_tracker_that_cannot_start_is_named(tmp_path: Path, wandb: StandIn) -> None:
    def init(**options: Any) -> SimpleNamespace:
        raise RuntimeError("no key")

    wandb.init = init  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"wandb cannot be started \(no key\)"):
        fit(tmp_path, "wandb")


def test_a_missing_package_is_named_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(InputError, match=rf"{name} cannot be imported .*forcetune\[{name}\]"):
            check_trackers([name])
    with pytest.raises(InputError, match="wandb cannot be imported"):
        fit(tmp_path, "wandb")
    assert not (tmp_path / "run").exists()


def test_trackers_are_off_by_default_and_older_configurations_go_on(tmp_path: Path) -> None:
    assert OutputConfig().all_trackers == []
    assert OutputConfig(tensorboard=True).all_trackers == ["tensorboard"]
    assert OutputConfig(tensorboard=True, trackers=["mlflow", "tensorboard"]).all_trackers == ["mlflow", "tensorboard"]
    with pytest.raises(ValidationError, match="wandb"):
        OutputConfig(trackers=["neptune"])  # type: ignore[list-item]
    old = tmp_path / "run.yaml"
    old.write_text("data: {train: [a.xyz]}\noutput: {run: r, tensorboard: true}\n", encoding="utf-8")
    config = load_config(old)
    assert config.output.all_trackers == ["tensorboard"]
    config.save(tmp_path / "again.yaml")
    again: RunConfig = load_config(tmp_path / "again.yaml")
    assert again.output.all_trackers == ["tensorboard"]


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(tmp_path, "tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2]
    losses = [event.value for event in events.Scalars("valid_loss")]
    assert losses == pytest.approx(list(metrics_of(run)["valid_loss"]), rel=1e-6)


def test_a_tracker_that_fails_at_the_end_leaves_the_results_alone(tmp_path: Path, wandb: StandIn) -> None:
    begin = wandb.init

    def init(**options: Any) -> SimpleNamespace:
        run = begin(**options)
        run.finish = lambda: (_ for _ in ()).throw(RuntimeError("no network"))
        return run

    wandb.init = init  # type: ignore[attr-defined]
    with pytest.warns(ForcetuneWarning, match=r"wandb failed at the end \(no network\)"):
        run = fit(tmp_path, "wandb")
    assert json.loads((run / "results.json").read_text(encoding="utf-8"))["status"] == "finished"


class Recorder(Observer):
    """Notes that it was closed, and raises what it is made with."""

    def __init__(self, closed: list[str], name: str, error: Exception | None = None) -> None:
        self.closed, self.name, self.error = closed, name, error

    def close(self) -> None:
        self.closed.append(self.name)
        if self.error is not None:
            raise self.error


def test_an_observer_that_cannot_be_closed_keeps_no_other_open_and_hides_no_error() -> None:
    closed: list[str] = []
    observers = [Recorder(closed, "a", OSError("full")), Recorder(closed, "b", OSError("gone")), Recorder(closed, "c")]
    training = FineTuning.__new__(FineTuning)
    training._trained = list  # type: ignore[method-assign]
    training.stopped = True
    with pytest.warns(ForcetuneWarning, match="gone"), pytest.raises(OSError, match="full"):
        training.run((), observers)
    assert closed == ["a", "b", "c"]

    class Failing(Recorder):
        def on_start(self, training: FineTuning) -> None:
            raise KeyboardInterrupt

    with pytest.warns(ForcetuneWarning, match="full"), pytest.raises(KeyboardInterrupt):
        training.run((), [observers[0], observers[2], Failing(closed, "d")])
    assert closed == ["a", "b", "c", "a", "c", "d"]


def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("GIT_PYTHON_REFRESH", "quiet")
    run = fit(tmp_path, "mlflow")
    client = package.MlflowClient()
    experiment = client.get_experiment_by_name("forcetune")
    stored = client.search_runs([experiment.experiment_id])[0]
    assert stored.info.run_name == "run"
    assert stored.info.status == "FINISHED"
    assert stored.data.params["method.name"] == "readout"
    history = [(metric.step, metric.value) for metric in client.get_metric_history(stored.info.run_id, "valid_loss")]
    assert history == [(1, metrics_of(run)["valid_loss"][0]), (2, metrics_of(run)["valid_loss"][1])]


def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = fit(tmp_path, "wandb")
    identity = json.loads((run / TRACKERS_NAME).read_text(encoding="utf-8"))["wandb"]
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 1
    assert b"valid_loss" in files[0].read_bytes()
