"""The report of a run: complete, self-contained, and no worse for what a run folder lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from forcetune.config import RunConfig
from forcetune.errors import InputError
from forcetune.reports.run_page import write_report
from forcetune.reports.texts import number_text
from forcetune.runs.metrics import read_metrics

COLUMNS = (
    "epoch,step,learning_rate,stage,train_loss,valid_loss,valid_energy_mae_mev_per_atom,valid_energy_rmse_mev_per_atom,"
    "valid_forces_mae_mev_per_ang,valid_forces_rmse_mev_per_ang,seconds"
)


def errors_of(energy: float, forces: float, frames: int) -> dict[str, float | int | None]:
    return {
        "n_frames": frames,
        "energy_mae_mev": 27 * energy,
        "energy_mae_mev_per_atom": energy,
        "energy_rmse_mev": 35 * energy,
        "energy_rmse_mev_per_atom": 1.3 * energy,
        "forces_mae_mev_per_ang": forces,
        "forces_rmse_mev_per_ang": 1.4 * forces,
    }


def data_of(name: str, frames: int) -> dict[str, Any]:
    return {
        "files": [f"data/{name}.xyz"],
        "n_frames": frames,
        "sha256": "ab12" * 16,
        "keys": {"energy": "REF_energy", "forces": "REF_forces", "stress": None},
        "elements": ["H", "C", "N", "O"],
        "n_atoms": [27, 27],
    }


def results_of() -> dict[str, Any]:
    coverage = [
        ("node_embedding", "Frozen", 1, 0, 512, 0),
        ("linear", "Gate(rank=16)", 12, 198_656, 198_656, 61_824),
        ("tensor_product", "LowRank(rank=16, alpha=16)", 2, 81_920, 81_920, 20_480),
        ("contraction", "LowRank(rank=16, alpha=16) + Dense", 4, 43_008, 43_008, 9_216),
    ]
    names = ("kind", "update", "sites", "covered", "total", "trainable")
    return {
        "forcetune": "9.8.7",
        "created": "2026-03-04T15:06:07+00:00",
        "status": "finished",
        "model": {
            "name": "mace-off23-medium",
            "sha256": "0f" * 32,
            "fingerprint": "mace:2x128x0e+128x1o",
            "licence": "ASL",
            "library": "mace-torch 0.3.16",
            "head": "default",
            "elements": ["H", "C", "N", "O"],
            "cutoff_ang": 5.0,
            "dtype": "float64",
        },
        "method": {"name": "mmea", "rank": 16, "mergeable": False, "description": "gates on linears"},
        "parameters": {
            "trainable": 91_520,
            "total": 324_096,
            "share": 0.2824,
            "coverage": [dict(zip(names, row, strict=True)) for row in coverage],
        },
        "reference_energies": {
            "mode": "estimate",
            "offset_before_mev_per_atom": 4321.0,
            "offset_after_mev_per_atom": 2.4,
            "elements": [
                {"symbol": s, "before_ev": -13.5 * z, "after_ev": -13.7 * z}
                for s, z in (("H", 1), ("C", 76), ("N", 109), ("O", 150))
            ],
            "rank": 1,
            "n_elements": 4,
        },
        "data": {"train": data_of("train", 450), "valid": data_of("valid", 50), "test": data_of("test", 40)},
        "errors": {
            "train": {"before": errors_of(21.3, 181.0, 450), "after": errors_of(1.01, 9.87, 450)},
            "valid": {"before": errors_of(21.9, 183.0, 50), "after": errors_of(1.33, 12.6, 50)},
            "test": {"before": errors_of(22.4, 186.2, 40), "after": errors_of(1.47, 13.13, 40)},
        },
        "training": {
            "status": "finished",
            "epochs_done": 200,
            "steps": 18_000,
            "best_epoch": 187,
            "best_valid_loss": 0.00123456,
            "seconds": 5025.0,
            "seconds_per_step": 0.279,
            "epochs": 200,
            "optimizer": "adam",
            "learning_rate": 0.005,
            "batch_size": 5,
            "seed": 1,
            "loss": {"energy": 1.0, "forces": 1000.0},
        },
        "environment": {"python": "3.12.1", "torch": "2.6.0", "device": "NVIDIA H200"},
        "warnings": ["train.xyz, frame 17: the largest force is 31 eV/Å."],
        "adapter_bytes": 412_345,
    }


def metrics_of(epochs: int, second_stage: int | None = None, validated: bool = True) -> str:
    rng = np.random.default_rng(1)
    lines = [COLUMNS]
    for epoch in range(1, epochs + 1):
        fall = np.exp(-epoch / 35) + 0.06
        noise = np.exp(0.08 * rng.normal(size=4))
        stage = 2 if second_stage and epoch >= second_stage else 1
        valid = f"{1.2 * fall * noise[1]},{20 * fall * noise[2]},{26 * fall},{180 * fall * noise[3]},{250 * fall}"
        if not validated or epoch % 2:
            valid = ",,,,"
        rate = 5e-3 * 0.8 ** (epoch // 20) if stage == 1 else 1e-4
        lines.append(f"{epoch},{90 * epoch},{rate},{stage},{fall * noise[0]},{valid},25.1")
    return "\n".join(lines) + "\n"


def predictions_of(frames: int, splits: tuple[str, ...] = ("valid", "test")) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    arrays: dict[str, np.ndarray] = {}
    for split in splits:
        energy, forces = -310 + 0.02 * rng.normal(size=frames), 1.5 * rng.normal(size=(frames * 27, 3))
        for source, offset, spread in (("reference", 0.0, 0.0), ("before", 0.01, 1.0), ("after", 0.0, 0.07)):
            energies = energy + offset + 0.02 * spread * rng.normal(size=energy.shape)
            arrays[f"{split}/{source}/energy_per_atom"] = energies
            slope = 1 - 0.1 * spread
            arrays[f"{split}/{source}/forces"] = slope * forces + 0.2 * spread * rng.standard_t(4, size=forces.shape)
        arrays[f"{split}/forces_element"] = np.tile(np.repeat([1, 6, 7, 8], [12, 11, 3, 1]), frames)
    return arrays


def write_run(
    run: Path,
    *,
    results: dict[str, Any] | None = None,
    metrics: str | None = None,
    predictions: dict[str, np.ndarray] | None = None,
) -> Path:
    """A run folder with what is given; a new folder has at least its configuration."""
    run.mkdir(parents=True, exist_ok=True)
    config = RunConfig.model_validate({"data": {"train": ["data/train.xyz"]}, "model": {"model": "mace-off23-medium"}})
    config.save(run / "config.yaml")
    if results is not None:
        (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    if metrics is not None:
        (run / "metrics.csv").write_text(metrics, encoding="utf-8")
    if predictions is not None:
        with (run / "predictions.npz").open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **predictions)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    return write_run(tmp_path / "run", results=results_of(), metrics=metrics_of(60, 41), predictions=predictions_of(40))


class Page(HTMLParser):
    """What the tests ask of a page: balanced tags, its attributes, its text."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def report(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_shows_the_numbers(run: Path) -> None:
    page = report(run)
    for number in ("186.2", "13.1", "22.4", "1.47", "91,520 of 324,096", "412.3 kB", "4,321.0 meV/atom", "9.8.7"):
        assert number in page.text
    for text in ("fix only 1 of 4", "1 h 23 min", "4 March 2026", "ab12ab12ab12", "never trained on", "frame 17"):
        assert text in page.text
    assert page.text.index("Test 40 frames") < page.text.index("Validation 50 frames") < page.text.index("Training 450")
    assert "forcetune.calculator('mace-off23-medium', adapter='run/adapter')" in page.text
    assert page.tags.count("svg") == 4
    assert "best: epoch 187" in page.text and "second stage" in page.text
    assert str(run.parent) not in page.text


def test_force_errors_by_element(run: Path) -> None:
    arrays = predictions_of(40)
    here = arrays["test/forces_element"] == 8
    error = 1e3 * np.abs(arrays["test/after/forces"] - arrays["test/reference/forces"])[here].mean()
    assert re.search(rf"O 40 [\d.]+ {number_text(error)} ", report(run).text)


def test_needs_nothing_but_itself(run: Path) -> None:
    page = report(run)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset"):
            assert value is not None and value.startswith(("#", "data:"))
        assert not name.startswith("on")
    assert "http" not in (run / "report.html").read_text(encoding="utf-8").replace("http-equiv", "")


def test_names_are_unique_and_references_resolve(run: Path) -> None:
    page = report(run)
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    text = (run / "report.html").read_text(encoding="utf-8")
    assert {
        actual for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text) for actual in pair if actual
    } <= set(names)


def test_same_run_same_page(run: Path) -> None:
    before = dict(mpl.rcParams)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert dict(mpl.rcParams) == before


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"&"

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return evil if isinstance(value, str) else value

    results = poison(results_of())
    results["training"][evil] = evil
    results["errors"][evil] = results["errors"].pop("test")
    page = report(write_run(tmp_path / evil.replace("/", ""), results=results, metrics=metrics_of(3)))
    assert "script" not in page.tags
    assert page.text.count(evil) > 20


@pytest.mark.parametrize("missing", ["results.json", "metrics.csv", "predictions.npz"])
def test_works_without(run: Path, missing: str) -> None:
    (run / missing).unlink()
    page = report(run)
    assert "mace-off23-medium" in page.text
    expected = {"results.json": "not finished", "metrics.csv": "No epoch", "predictions.npz": "No predictions yet"}
    assert expected[missing] in page.text


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", metrics=COLUMNS + "\n"))
    assert "train.xyz" in page.text and "No epoch has been finished" in page.text


def test_without_test_split(tmp_path: Path) -> None:
    results = results_of()
    del results["errors"]["test"], results["data"]["test"]
    page = report(write_run(tmp_path / "run", results=results, predictions=predictions_of(5, ("train", "valid"))))
    assert "Valid frames" in page.text and "Test" not in page.text
    assert page.text.index("Validation 50 frames") < page.text.index("Training 450")


def test_every_test_set_is_shown(tmp_path: Path) -> None:
    """``fit --test one.xyz --test two.xyz`` names its test sets."""
    results = results_of()
    for part in ("data", "errors"):
        results[part]["test cold"], results[part]["test hot"] = results[part].pop("test"), results[part]["valid"]
    results["data"]["test cold"] = data_of("cold", 40)
    results["data"]["test hot"] = data_of("hot", 71)
    text = report(write_run(tmp_path / "run", results=results)).text
    data = text[text.index("SHA-256") - 400 :]
    places = [data.index(name) for name in ("Training", "Validation", "Test cold", "Test hot")]
    assert places == sorted(places)
    assert "data/hot.xyz" in data and "data/cold.xyz" in data and "71" in data[places[3] :]
    # and what was never trained on comes first among the errors
    heads = [text.index(f"{name} {count} frames") for name, count in (("Test cold", 40), ("Test hot", 50))]
    assert max(heads) < text.index("Validation 50 frames") < text.index("Training 450 frames")


def test_the_date_is_written_without_what_windows_lacks(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", results=results_of()))
    assert "4 March 2026, 15:06" in page.text
    results = results_of() | {"created": "some day"}
    assert "some day" in report(write_run(tmp_path / "run", results=results)).text


def test_without_validation(tmp_path: Path) -> None:
    results = results_of()
    del results["errors"]["valid"], results["data"]["valid"]
    page = report(write_run(tmp_path / "run", results=results, metrics=metrics_of(1, validated=False)))
    assert "No validation errors" in page.text
    assert page.tags.count("svg") == 1


def test_missing_labels_are_left_out(tmp_path: Path) -> None:
    arrays = predictions_of(6, ("test",))
    arrays["test/reference/energy_per_atom"][:] = np.nan
    arrays["test/reference/forces"][: 27 * 4] = np.nan
    arrays["test/reference/forces"][arrays["test/forces_element"] == 7] = np.nan
    results = results_of()
    for pair in results["errors"].values():
        for side in pair.values():
            side["energy_mae_mev_per_atom"] = None
            side["energy_rmse_mev_per_atom"] = float("nan")
            del side["energy_mae_mev"]
    page = report(write_run(tmp_path / "run", results=results, predictions=arrays))
    assert page.tags.count("svg") == 1
    assert "nan" not in page.text.lower()
    assert re.search(r"\bO 2 ", page.text) and not re.search(r"\bN \d+ \d", page.text)
    arrays["test/reference/forces"][:] = np.nan
    assert "have no labels" in report(write_run(tmp_path / "run", predictions=arrays)).text


def test_stress_is_shown_where_there_is_some(tmp_path: Path) -> None:
    results, arrays = results_of(), predictions_of(6)
    results["errors"]["test"]["after"] |= {"stress_mae_mev_per_ang3": 0.123, "stress_rmse_mev_per_ang3": 0.456}
    for number, source in enumerate(("reference", "before", "after")):
        arrays[f"test/{source}/stress"] = np.full((6, 3, 3), 0.01 * number)
    page = report(write_run(tmp_path / "run", results=results, predictions=arrays))
    assert "Stress MAE meV/Å³ – 0.123" in page.text
    assert page.tags.count("svg") == 3


def test_many_points_stay_a_small_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", results=results_of(), predictions=predictions_of(1000, ("test",)))
    page = report(run)
    assert "20,000 of 81,000 points drawn" in page.text
    assert (run / "report.html").stat().st_size < 1_500_000


def test_reference_energies_that_are_off_do_not_hide_the_rest(tmp_path: Path) -> None:
    arrays = predictions_of(40, ("test",))
    arrays["test/before/energy_per_atom"] += 50
    assert "40 grey points lie outside the frame." in report(write_run(tmp_path / "run", predictions=arrays)).text


def test_a_line_being_written_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics=metrics_of(4) + "5,450,0.0")
    metrics = read_metrics(run / "metrics.csv")
    assert metrics is not None and metrics["epoch"].tolist() == [1, 2, 3, 4]
    report(run)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def wrong_type(path: Path) -> None:
    path.write_text('{"errors": {"test": {"after": {"energy_mae_mev": "many"}}}}', encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("results.json", cut_short, "not valid JSON"),
        ("results.json", wrong_type, "errors.test.after.energy_mae_mev"),
        ("results.json", lambda path: path.write_text("[]"), "results.json"),
        ("results.json", lambda path: path.write_bytes(b"\xff\xfe"), "not valid JSON"),
        ("predictions.npz", cut_short, "NPZ"),
        ("predictions.npz", lambda path: path.write_bytes(b""), "NPZ"),
        ("metrics.csv", lambda path: path.write_text("epoch,step\n1,2\n3\n"), "line 3"),
        ("metrics.csv", lambda path: path.write_text("epoch,step\n1,two\n"), "'step'"),
        ("metrics.csv", lambda path: path.write_text("step\n1\n"), "'epoch'"),
        ("config.yaml", lambda path: path.write_text("data: ["), "YAML"),
    ],
)
def test_damaged_files_are_named(run: Path, name: str, damage: Callable[[Path], object], says: str) -> None:
    damage(run / name)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        write_report(run)
    assert str(run / name) in str(caught.value)
    assert not (run / "report.html").exists()


def test_predictions_that_do_not_fit_together(run: Path) -> None:
    arrays = predictions_of(4)
    arrays["test/after/forces"] = arrays["test/after/forces"][:-1]
    write_run(run, predictions=arrays)
    with pytest.raises(InputError, match=r"test/after/forces has shape \(107, 3\)"):
        write_report(run)


@pytest.mark.parametrize("name", ["", "absent"])
def test_not_a_run_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        write_report(tmp_path / name)
    assert not list(tmp_path.iterdir())
