"""What once broke the link to the enclave: each test is an attack that succeeded."""

import json
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
import trio.testing

from signer.rpc.frames import encode_frame
from signer.rpc.messages import Imported, encode_reply
from signer.vaults.nitro import credentials as credentials_module
from signer.vaults.nitro.credentials import MAX_LOOKUPS, Credentials, CredentialsError
from signer.vaults.nitro.storage import FileStorage, StorageError
from tests.unit.vaults.fake import FakeEnclave, running, signs, until
from tests.unit.vaults.test_link import stored


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "enclave_keys.json"


@pytest.fixture
def enclave(nursery: trio.Nursery) -> FakeEnclave:
    return FakeEnclave(nursery)


class LastWords(trio.abc.Stream):
    """Answers `Initialize`; later one reply arrives in the very step in which the next write fails."""

    def __init__(self, reply: bytes) -> None:
        self._replies = [encode_frame(encode_reply(None)), reply]
        self._sent = 0
        self._step = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._sent += 1
        await trio.lowlevel.checkpoint()
        if self._sent > 1:
            self._step.set()
            await trio.lowlevel.checkpoint()
            raise trio.BrokenResourceError

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if len(self._replies) == 1:
            await self._step.wait()
        else:
            await trio.lowlevel.checkpoint()
        return self._replies.pop(0) if self._replies else await trio.sleep_forever()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_an_import_answered_in_the_moment_in_which_the_connection_breaks(
    path: Path, enclave: FakeEnclave
) -> None:
    """Trio wakes the importer and the end of its session in any order: neither may trip over the other."""
    (pkh,) = await stored(path, enclave)
    async with running(path, enclave) as vault:
        key = vault.keys()[pkh].public_key
    broken = 0

    async def connect(address: object) -> trio.abc.Stream:
        nonlocal broken
        await trio.lowlevel.checkpoint()
        if broken == 30:
            return await enclave.connect(address)
        broken += 1
        return LastWords(encode_frame(encode_reply(Imported(key, 0))))

    async with running(path, enclave, connect=connect) as vault:
        await until(lambda: broken == 30 and vault.ready)
        assert await signs(vault, pkh)


# -- the key file


@pytest.mark.parametrize("blob", ['"\u00e9"', '"A"', '"\\ud800"', "7", "null"])
async def test_a_blob_that_is_no_base64_costs_its_own_key_only(path: Path, enclave: FakeEnclave, blob: str) -> None:
    (pkh,) = await stored(path, enclave)
    bad = f'{{"public_key_hash": "tz1bad", "encrypted_private_key": {blob}}}'
    async with running(path, enclave) as vault:
        path.write_text(f"[{bad}, {path.read_text()[1:]}", encoding="utf-8")
        await vault.refresh()
        assert await signs(vault, pkh)
        assert list(vault.health().skipped) == ["tz1bad"]


def test_a_key_file_nested_without_end_is_damaged(path: Path) -> None:
    path.write_text("[" * 200_000)
    with pytest.raises(StorageError, match="is damaged"):
        FileStorage(path).load()


# -- credentials


@pytest.mark.parametrize("kind", ["expired", "garbage", "binary"])
async def test_whatever_a_credential_process_prints_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """The SDK lets a RuntimeError, a ValueError and more through: none of them is a reason to end the signer."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    output = tmp_path / "output"
    expired = {
        "Version": 1,
        "AccessKeyId": "A",
        "SecretAccessKey": "never-shown",
        "SessionToken": "T",
        "Expiration": (datetime.now(UTC) - timedelta(hours=1)).isoformat(),
    }
    output.write_bytes({"expired": json.dumps(expired).encode(), "garbage": b"never-shown", "binary": b"\xff"}[kind])
    (tmp_path / "config").write_text(f"[default]\nregion = r\ncredential_process = cat {output}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    resolve = credentials_module.provider(access_key_id="", secret_access_key="", session_token="", region="")
    with pytest.raises(CredentialsError, match="missing credentials: .*Error: ") as info:
        await resolve()
    assert "never-shown" not in str(info.value)


async def test_lookups_that_hang_leave_threads_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look-up that was given up keeps its thread; forty of them would stop everything that needs one."""
    release, entered = threading.Event(), 0

    def hang(_self: object) -> Credentials:
        nonlocal entered
        entered += 1
        release.wait()
        return Credentials("a", "b", None, "r")

    monkeypatch.setattr(credentials_module._Chain, "resolve", hang)
    resolve = credentials_module.provider(access_key_id="", secret_access_key="", session_token="", region="")
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_LOOKUPS + 3):
                nursery.start_soon(resolve)
            await until(lambda: entered == MAX_LOOKUPS)
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
            await trio.testing.wait_all_tasks_blocked()
            assert entered == MAX_LOOKUPS
            nursery.cancel_scope.cancel()
    finally:
        release.set()
    assert await resolve() == Credentials("a", "b", None, "r")
