"""Fixtures of the tests of SevenNet."""

from __future__ import annotations

import pytest

from oracle_install import UnavailableError
from sevennet_oracle import SevenNets, open_folder, skip_or_raise


@pytest.fixture(scope="session")
def sevennets(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> SevenNets:
    """sevenn in processes of its own; tests that need it are skipped where pip cannot get it."""
    versions = open_folder(pytestconfig, tmp_path_factory.mktemp("sevennet"))
    try:
        versions.install()
    except UnavailableError as error:
        skip_or_raise(error)
    return versions
