"""Credentials of one component: the configuration goes first, then the SDK's chain, and nothing is exported."""

import os
from pathlib import Path

import pytest

from signer.vaults.nitro.credentials import Credentials, CredentialsError, provider

EMPTY = {"access_key_id": "", "secret_access_key": "", "session_token": "", "region": ""}


@pytest.fixture(autouse=True)
def nothing_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of this machine: no variables, no files, no instance metadata."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


async def test_the_configuration_alone() -> None:
    before = dict(os.environ)
    found = await provider(access_key_id="A", secret_access_key="S", session_token="T", region="r")()
    assert found == Credentials("A", "S", "T", "r")
    assert dict(os.environ) == before, "nothing is exported"
    assert "S" not in repr(found).replace("Credentials", "")
    assert "T" not in repr(found)


@pytest.mark.parametrize("region", ["AWS_REGION", "AWS_DEFAULT_REGION"])
async def test_the_environment_fills_what_is_empty(monkeypatch: pytest.MonkeyPatch, region: str) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", "A"), ("AWS_SECRET_ACCESS_KEY", "S"), (region, "r")):
        monkeypatch.setenv(name, value)
    assert await provider(**EMPTY)() == Credentials("A", "S", None, "r")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "T")
    assert await provider(**EMPTY | {"region": "own"})() == Credentials("A", "S", "T", "own")


async def test_keys_of_the_configuration_take_no_token_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "r")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another's")
    found = await provider(**EMPTY | {"access_key_id": "A", "secret_access_key": "S"})()
    assert found == Credentials("A", "S", None, "r")


async def test_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[baker]\naws_access_key_id = A\naws_secret_access_key = S\n")
    (tmp_path / "config").write_text("[profile baker]\nregion = r\n")
    monkeypatch.setenv("AWS_PROFILE", "baker")
    assert await provider(**EMPTY)() == Credentials("A", "S", None, "r")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(CredentialsError, match="nobody"):
        await provider(**EMPTY)()


async def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CredentialsError, match=r"\(Nitro\): missing credentials"):
        await provider(**EMPTY | {"region": "r"})()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "A")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "S")
    with pytest.raises(CredentialsError, match="set credentials.region, or AWS_REGION"):
        await provider(**EMPTY)()
