"""Blobs that come together are opened side by side, and answered in their order."""

import pytest
import trio
from trio.testing import MockClock

from signer import crypto
from signer.crypto.interface import SecretKey
from signer.enclave import session as session_module
from signer.enclave.sealing.interface import SealingError
from signer.enclave.sealing.local import LocalSealing
from signer.enclave.server import Server
from signer.enclave.session import MAX_AHEAD, Session
from signer.rpc.frames import encode_frame
from signer.rpc.messages import (
    Call,
    Import,
    Imported,
    Initialize,
    InitializeSealed,
    PublicKeyOf,
    RemoteError,
    Result,
    decode_reply,
    encode_call,
)
from signer.tezos.keys import Curve, PublicKey
from tests.unit.enclave.test_server import Client, MemoryListener

LATENCY = 0.02  # seconds to open one blob
KEYS = [crypto.load_secret_key(Curve.ED25519, bytes([number]) * 32) for number in range(1, 41)]


class Slow(LocalSealing):
    """Opens blobs as KMS does: slowly, many at once; some not at all."""

    def __init__(self) -> None:
        super().__init__(bytes(32))
        self.at_once = self.most = 0
        self.opened: list[SecretKey] = []
        self.refused = b""

    async def open(self, blob: bytes) -> SecretKey:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await trio.sleep(LATENCY)
        finally:
            self.at_once -= 1
        if blob == self.refused:
            raise SealingError("encryption error", "no")
        self.opened.append(await super().open(blob))
        return self.opened[-1]


async def together(client: Client, *calls: Call) -> list[Result | RemoteError]:
    """All calls in one write; the replies in their order."""
    await client.stream.send_all(b"".join(encode_frame(encode_call(call)) for call in calls))
    results: list[Result | RemoteError] = []
    for call in calls:
        try:
            results.append(decode_reply(call, await client.reply()))
        except RemoteError as exc:
            results.append(exc)
    return results


@pytest.fixture
async def sealing() -> Slow:
    return Slow()


@pytest.fixture
async def client(sealing: Slow, nursery: trio.Nursery) -> Client:
    listener = MemoryListener()
    nursery.start_soon(Server(lambda: Session(sealing)).serve, listener)
    client = listener.dial()
    await client.call(Initialize())
    return client


async def blobs(sealing: Slow, number: int) -> list[bytes]:
    return [await sealing.seal(key) for key in KEYS[:number]]


def wiped(key: SecretKey) -> bool:
    return not any(key.secret_bytes())


async def test_side_by_side_and_in_order(client: Client, sealing: Slow, autojump_clock: MockClock) -> None:
    sealed, began = await blobs(sealing, MAX_AHEAD), trio.current_time()
    results = await together(client, *map(Import, sealed), PublicKeyOf(0))
    assert trio.current_time() - began == pytest.approx(LATENCY)
    assert results[:-1] == [Imported(key.public_key, handle) for handle, key in enumerate(KEYS[:MAX_AHEAD])]
    assert results[-1] == KEYS[0].public_key


async def test_no_more_than_so_many_at_once(client: Client, sealing: Slow, autojump_clock: MockClock) -> None:
    sealed, began = await blobs(sealing, 40), trio.current_time()
    results = await together(client, *map(Import, sealed))
    assert [one.handle for one in results if isinstance(one, Imported)] == list(range(40))
    assert sealing.most == MAX_AHEAD
    assert trio.current_time() - began == pytest.approx(3 * LATENCY), "each answer lets another one begin"


async def test_a_key_whose_caller_is_cancelled_is_wiped(sealing: Slow, autojump_clock: MockClock) -> None:
    session, frames = Session(sealing), [encode_call(Import(blob)) for blob in await blobs(sealing, 2)]
    await session.answer(encode_call(Initialize()))
    async with trio.open_nursery() as nursery:
        session.foresee(frames, nursery.start_soon)
        await trio.sleep(2 * LATENCY)
        with trio.CancelScope() as scope:
            scope.cancel(reason="the program stops")
            await session.answer(frames[0])
        session.close()
    assert len(sealing.opened) == 2
    assert all(map(wiped, sealing.opened))


async def test_one_that_fails_fails_alone(client: Client, sealing: Slow, autojump_clock: MockClock) -> None:
    sealed = await blobs(sealing, 3)
    sealing.refused = sealed[1]
    first, second, third, key = await together(client, *map(Import, sealed), PublicKeyOf(1))
    assert first == Imported(KEYS[0].public_key, 0)
    assert isinstance(second, RemoteError)
    assert str(second) == "encryption error: no"
    assert third == Imported(KEYS[2].public_key, 1)
    assert isinstance(key, PublicKey)
    assert key == KEYS[2].public_key


async def test_keys_that_nobody_waits_for_any_more_are_wiped(
    client: Client, sealing: Slow, autojump_clock: MockClock
) -> None:
    frames = b"".join(encode_frame(encode_call(Import(blob))) for blob in await blobs(sealing, 5))
    await client.stream.send_all(frames)
    await trio.sleep(LATENCY / 2)
    await client.stream.aclose()
    await trio.sleep(1)
    assert len(sealing.opened) == 5
    assert all(map(wiped, sealing.opened))


async def test_a_key_that_comes_behind_the_end_of_its_session_is_wiped(
    sealing: Slow, autojump_clock: MockClock
) -> None:
    session, frames = Session(sealing), [encode_call(Import(blob)) for blob in await blobs(sealing, 2)]
    await session.answer(encode_call(Initialize()))
    async with trio.open_nursery() as nursery:
        session.foresee(frames, nursery.start_soon)
        await trio.sleep(LATENCY / 2)
        session.close()
        assert not sealing.opened
    assert len(sealing.opened) == 2
    assert all(map(wiped, sealing.opened))


async def test_a_full_session_wipes_what_it_refuses(
    client: Client, sealing: Slow, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_KEYS", 2)
    results = await together(client, *map(Import, await blobs(sealing, 4)))
    assert [isinstance(result, Imported) for result in results] == [True, True, False, False]
    await trio.sleep(1)
    assert {key.public_key for key in sealing.opened if wiped(key)} == {key.public_key for key in KEYS[2:4]}


async def test_a_full_session_opens_no_more_than_there_was_room_for_the_first(
    client: Client, sealing: Slow, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Each refusal let another one begin, though nobody had waited for the one before."""
    monkeypatch.setattr(session_module, "MAX_KEYS", 2)
    results = await together(client, *map(Import, await blobs(sealing, 40)))
    assert [isinstance(one, Imported) for one in results] == [True] * 2 + [False] * 38
    assert len(sealing.opened) <= MAX_AHEAD + 2
    assert sealing.most == MAX_AHEAD


@pytest.mark.parametrize("credentials", [Initialize(update=True), InitializeSealed(bytes(32), bytes(32), b"sealed")])
async def test_nothing_is_opened_behind_other_credentials(
    credentials: Call, client: Client, sealing: Slow, autojump_clock: MockClock
) -> None:
    sealed, began = await blobs(sealing, 2), trio.current_time()
    await together(client, credentials, *map(Import, sealed))
    assert trio.current_time() - began == pytest.approx(2 * LATENCY), "one after the other"
