"""Credentials of one component: the configuration goes first, then the SDK's chain, and nothing is exported."""

import http.server
import json
import os
import threading
from datetime import UTC, datetime, timedelta
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


async def test_the_region_of_the_key_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = EMPTY | {"access_key_id": "A", "secret_access_key": "S", "kms_region": "key's"}
    assert await provider(**keys)() == Credentials("A", "S", None, "key's")
    monkeypatch.setenv("AWS_REGION", "r")
    assert await provider(**keys)() == Credentials("A", "S", None, "r")
    assert await provider(**keys | {"region": "own"})() == Credentials("A", "S", None, "own")


async def test_shared_files_that_change_are_read_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_REGION", "r")
    resolve = provider(**EMPTY)
    with pytest.raises(CredentialsError, match="missing credentials"):
        await resolve()
    for name in ("A", "B"):
        fresh = tmp_path / "fresh"
        fresh.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = S\n")
        fresh.rename(tmp_path / "credentials")
        assert await resolve() == Credentials(name, "S", None, "r")


class Source:
    """An endpoint as containers have it, whose credentials live for *seconds*."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.given = 0
        self.failing = False
        source = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                source.given += not source.failing
                until = datetime.now(UTC) + timedelta(seconds=source.seconds)
                body = {"AccessKeyId": f"A{source.given}", "SecretAccessKey": "S", "Token": "T"}
                body["Expiration"] = until.strftime("%Y-%m-%dT%H:%M:%SZ")
                self.send_response(500 if source.failing else 200)
                self.end_headers()
                self.wfile.write(b"<html>\n" * 1000 if source.failing else json.dumps(body).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.mark.parametrize(("seconds", "fetched"), [(6 * 3600, 1), (700, 4)])
async def test_temporary_credentials_are_renewed_before_they_expire(
    monkeypatch: pytest.MonkeyPatch, seconds: float, fetched: int
) -> None:
    source = Source(seconds)
    try:
        port = source.server.server_address[1]
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{port}/")
        resolve = provider(**EMPTY | {"region": "r"})
        found = [await resolve() for _ in range(3)]
        assert source.given == fetched
        assert found[-1] == Credentials(f"A{fetched}", "S", "T", "r")
        source.failing = True
        if fetched == 1:
            assert await resolve() == found[-1], "nobody is asked"
        else:
            with pytest.raises(CredentialsError, match="expire within a quarter of an hour"):
                await resolve()
    finally:
        source.close()


async def test_a_source_that_answers_with_a_page_is_told_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
    source = Source(300)  # the SDK has to renew them at once
    try:
        port = source.server.server_address[1]
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{port}/")
        resolve = provider(**EMPTY | {"region": "r"})
        await resolve()
        source.failing = True
        with pytest.raises(CredentialsError, match=r"missing credentials: .* non 200 response 500 .*\.\.\.$") as caught:
            await resolve()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
    finally:
        source.close()
