"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback import Loopback


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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """A web server on the loopback interface, reached without a proxy."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Loopback() as loopback:
        yield loopback
