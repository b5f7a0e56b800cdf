"""What the tests of the vault share."""

from pathlib import Path

import pytest
import trio

from tests.unit.vaults.fake import FakeEnclave


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the key file will be."""
    return tmp_path / "enclave_keys.json"


@pytest.fixture
def enclave(nursery: trio.Nursery) -> FakeEnclave:
    return FakeEnclave(nursery)
