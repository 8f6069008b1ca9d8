"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests run in as many processes as there are cores: more threads would only wait for each other. Before PyTorch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from forcetune.cli import main
from loopback import Loopback
from terminal import Command


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Folder of the published DFT data (rMD17, AcAc, 3BPA), which are not part of the package."""
    named = os.environ.get("FORCETUNE_DATA")
    repository = Path(__file__).resolve().parents[1]
    places = [Path(named)] if named else [repository / "shared" / "data", repository.parent / "shared" / "data"]
    for place in places:
        if place.is_dir():
            return place
    pytest.skip(f"the reference data are not in {' or '.join(map(str, places))}; set FORCETUNE_DATA to their folder")


@pytest.fixture(scope="session")
def case_files(reference_data: Path) -> Path:
    """Folder of small inputs from users' reports, beside the published data; not part of the package either."""
    folder = reference_data.parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"the case files are not in {folder}; they lie beside the folder that FORCETUNE_DATA names")
    return folder


@pytest.fixture(autouse=True)
def _no_forgetting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits of tests that are about something else leave the checks after the training out."""
    if request.node.get_closest_marker("forgetting") is None:
        monkeypatch.setattr("forcetune.runs.measuring.Measuring._forgetting", lambda *_: None)


@pytest.fixture(autouse=True)
def _a_home_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another has kept, or leaves something in the user's cache."""
    monkeypatch.setenv("FORCETUNE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """A web server on the loopback interface, reached without a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Loopback() as loopback:
        yield loopback


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run ``forcetune`` with arguments; returns exit code, standard output and standard error."""
    # the command line sets how warnings are shown
    monkeypatch.setattr(warnings, "filters", list(warnings.filters))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return run
