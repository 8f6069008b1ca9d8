"""Fixtures of the tests of NequIP."""

from __future__ import annotations

import pytest

from nequip_oracle import NequIPs, open_folder
from oracle_install import UnavailableError
from sevennet_oracle import skip_or_raise


@pytest.fixture(scope="session")
def nequips(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> NequIPs:
    """nequip in processes of its own; tests that need it are skipped where pip cannot get it."""
    versions = open_folder(pytestconfig, tmp_path_factory.mktemp("nequip"))
    try:
        versions.install()
    except UnavailableError as error:
        skip_or_raise(error)
    return versions
