"""What once broke the link to the enclave: each test is an attack that succeeded."""

from pathlib import Path

import pytest
import trio
import trio.testing

from signer.rpc.frames import encode_frame
from signer.rpc.messages import Imported, encode_reply
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
