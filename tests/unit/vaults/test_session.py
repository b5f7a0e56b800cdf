"""One connection: replies never reach another caller, whatever callers, wire and enclave do."""

import pytest
import trio
import trio.testing

from signer.enclave.sealing.local import LocalSealing
from signer.enclave.session import Session as EnclaveSession
from signer.rpc.frames import MAX_FRAME, FrameDecoder, FrameError, encode_frame
from signer.rpc.messages import (
    Call,
    Created,
    Generate,
    GenerateAndImport,
    Import,
    Imported,
    ImportUnencrypted,
    Initialize,
    ProvePossession,
    PublicKeyFrom,
    PublicKeyOf,
    RemoteError,
    Result,
    Sign,
    SignWith,
    encode_error,
    encode_reply,
)
from signer.tezos.keys import Curve, PublicKey, Signature
from signer.vaults.nitro.session import Session, SessionLostError

TIMEOUT = 5.0


class Peer:
    """The enclave's end of a session: collects calls, answers them when told to."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._decoder = FrameDecoder()
        self._session = EnclaveSession(LocalSealing(bytes(32)))

    async def next_reply(self) -> bytes:
        """The frame that answers the next call, not sent yet."""
        while (payload := self._decoder.next_payload()) is None:
            data = await self.stream.receive_some(65536)
            assert data
            self._decoder.receive_data(data)
        return encode_frame(await self._session.answer(payload))

    async def answer(self, number: int = 1) -> None:
        for _ in range(number):
            await self.stream.send_all(await self.next_reply())


async def pair(nursery: trio.Nursery) -> tuple[Session, Peer]:
    ours, theirs = trio.testing.memory_stream_pair()
    session = Session(ours, timeout=TIMEOUT)
    nursery.start_soon(session.run)
    return session, Peer(theirs)


async def test_calls_are_pipelined_and_answered_in_order(nursery: trio.Nursery) -> None:
    session, peer = await pair(nursery)
    results: dict[int, object] = {}

    async def ask(number: int) -> None:
        results[number] = await session.call(GenerateAndImport(list(Curve)[number]))

    nursery.start_soon(session.call, Initialize())
    await trio.testing.wait_all_tasks_blocked()
    for number in range(4):
        nursery.start_soon(ask, number)
        await trio.testing.wait_all_tasks_blocked()
    assert not results
    await peer.answer(5)
    await trio.testing.wait_all_tasks_blocked()
    assert [results[number].public_key.curve for number in range(4)] == list(Curve)  # type: ignore[attr-defined]


async def test_a_cancelled_caller_disturbs_no_other(nursery: trio.Nursery) -> None:
    """Cancelled while it waits: the late reply is dropped, and the next caller gets its own."""
    session, peer = await pair(nursery)
    async with trio.open_nursery() as inner:
        inner.start_soon(peer.answer, 3)
        await session.call(Initialize())
        first = await session.call(GenerateAndImport(Curve.ED25519))
        second = await session.call(GenerateAndImport(Curve.P256))
    for _ in range(5):
        with trio.move_on_after(0) as gone:
            await session.call(PublicKeyOf(0))
        assert gone.cancelled_caught
    asked: list[object] = []

    async def ask() -> None:
        asked.append(await session.call(PublicKeyOf(1)))

    nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    await peer.answer(6)
    await trio.testing.wait_all_tasks_blocked()
    assert asked == [second.public_key]  # type: ignore[union-attr]
    assert asked != [first.public_key]  # type: ignore[union-attr]
    assert session.alive


async def test_an_error_of_the_enclave_leaves_the_session_alive(nursery: trio.Nursery) -> None:
    session, peer = await pair(nursery)
    nursery.start_soon(peer.answer, 3)
    await session.call(Initialize())
    with pytest.raises(RemoteError, match="signer error: invalid handle"):
        await session.call(Sign(5, b"", 2))
    assert session.alive
    created = await session.call(GenerateAndImport(Curve.ED25519))
    assert created is not None


async def settle_with(nursery: trio.Nursery, sent: bytes, *, close: bool = False) -> list[str]:
    """Two calls in flight, then the peer sends *sent* (and closes): why each caller's wait ended."""
    session, peer = await pair(nursery)
    outcomes: list[str] = []

    async def ask() -> None:
        try:
            outcomes.append(str(await session.call(PublicKeyOf(0))))
        except (SessionLostError, RemoteError) as exc:
            outcomes.append(str(exc))

    nursery.start_soon(ask)
    nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    await peer.stream.send_all(sent)
    if close:
        await peer.stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    if len(outcomes) == 2:
        with pytest.raises(SessionLostError):
            await session.call(PublicKeyOf(0))
    return outcomes


GOOD = encode_frame(encode_error("first"))
KEY = PublicKey(Curve.ED25519, bytes(32))


@pytest.mark.parametrize(
    ("sent", "close", "outcomes"),
    [
        (b"", True, ["the enclave closed the connection"] * 2),
        (GOOD[:2], True, ["the enclave is out of step: the peer closed the connection inside a frame"] * 2),
        (GOOD[:9], True, ["the enclave is out of step: the peer closed the connection inside a frame"] * 2),
        (GOOD + GOOD[:5], True, ["first", "the enclave is out of step: the peer closed the connection inside a frame"]),
        (encode_frame(b"junk"), False, ["the enclave is out of step: malformed CBOR"] * 2),
        (encode_frame(b"\xf6"), False, ["the enclave is out of step: a reply is a map"] * 2),
        (
            (MAX_FRAME + 1).to_bytes(4, "big"),
            False,
            ["the enclave is out of step: a frame of 1048577 bytes is announced"] * 2,
        ),
        (GOOD * 3, False, ["first", "first"]),
        (GOOD, False, ["first"]),
    ],
)
async def test_whatever_is_doubtful_ends_the_session(
    nursery: trio.Nursery, sent: bytes, close: bool, outcomes: list[str]
) -> None:
    found = await settle_with(nursery, sent, close=close)
    assert len(found) == len(outcomes)
    for one, expected in zip(found, outcomes, strict=True):
        assert one.startswith(expected)


async def test_a_reply_that_nobody_asked_for(nursery: trio.Nursery) -> None:
    session, peer = await pair(nursery)
    await peer.stream.send_all(GOOD)
    await trio.testing.wait_all_tasks_blocked()
    assert not session.alive
    assert "nobody asked for" in session.failure


async def test_a_reply_of_another_kind(nursery: trio.Nursery) -> None:
    found = await settle_with(nursery, encode_frame(encode_reply(Signature(Curve.P256, bytes(64)))))
    assert all("out of step" in one for one in found)


async def test_an_overdue_reply_ends_the_session(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    session, _ = await pair(nursery)
    began = trio.current_time()
    with pytest.raises(SessionLostError, match="did not answer within 5 s"):
        await session.call(PublicKeyOf(0))
    assert trio.current_time() - began == pytest.approx(TIMEOUT)
    assert not session.alive


async def test_each_exchange_has_its_own_time(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    """A slow enclave that answers each call within its time is no reason to give up on it."""
    session, peer = await pair(nursery)
    nursery.start_soon(session.call, Initialize())
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(4):
        nursery.start_soon(session.call, GenerateAndImport(Curve.ED25519))
    for _ in range(5):
        reply = await peer.next_reply()
        await trio.sleep(4)
        await peer.stream.send_all(reply)
        await trio.testing.wait_all_tasks_blocked()
    assert session.alive


async def test_a_peer_that_does_not_read(autojump_clock: trio.testing.MockClock) -> None:
    """A write that cannot finish ends the session, even though its caller was cancelled before."""
    from trio.testing import lockstep_stream_pair

    ours, _theirs = lockstep_stream_pair()
    session = Session(ours, timeout=TIMEOUT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        with trio.move_on_after(1):
            await session.call(PublicKeyOf(0))
        with pytest.raises(SessionLostError, match="did not answer within"):
            await session.call(PublicKeyOf(0))
        assert trio.current_time() == pytest.approx(TIMEOUT)
        assert not session.alive


# -- replies cut, scattered, foreign


async def asked(nursery: trio.Nursery, calls: list[Call]) -> tuple[Session, Peer, dict[int, object]]:
    """A session with *calls* on the wire in this order, and how each of them ends."""
    session, peer = await pair(nursery)
    outcomes: dict[int, object] = {}

    async def ask(number: int, call: Call) -> None:
        try:
            outcomes[number] = await session.call(call)
        except (SessionLostError, RemoteError) as exc:
            outcomes[number] = exc

    for number, call in enumerate(calls):
        nursery.start_soon(ask, number, call)
        await trio.testing.wait_all_tasks_blocked()
    return session, peer, outcomes


RIGHT = Signature(Curve.ED25519, bytes(range(64)))


async def test_a_reply_cut_anywhere_reaches_nobody(nursery: trio.Nursery) -> None:
    frame = encode_frame(encode_reply(RIGHT))
    for end in range(len(frame) * 2):
        session, peer, outcomes = await asked(nursery, [Sign(0, b"a", 2), Sign(0, b"b", 2)])
        await peer.stream.send_all((frame * 2)[:end])
        await peer.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        whole = end // len(frame)
        assert [outcomes[number] == RIGHT for number in range(2)] == [number < whole for number in range(2)]
        assert all(isinstance(outcomes[number], SessionLostError) for number in range(whole, 2))
        assert not session.alive


async def test_a_reply_in_single_bytes(nursery: trio.Nursery) -> None:
    session, peer, outcomes = await asked(nursery, [Sign(0, b"a", 2)])
    for byte in encode_frame(encode_reply(RIGHT)):
        assert not outcomes
        await peer.stream.send_all(bytes([byte]))
        await trio.testing.wait_all_tasks_blocked()
    assert outcomes == {0: RIGHT}
    assert session.alive


RESULTS: dict[str, Result] = {
    "null": None,
    "signature": RIGHT,
    "key": KEY,
    "imported": Imported(KEY, 0),
    "created": Created(b"blob", KEY, 0),
    "generated": Created(b"blob", KEY, None),
}
FITTING: list[tuple[Call, set[str]]] = [
    (Initialize(), {"null"}),
    (Import(b"blob"), {"imported", "created"}),  # whose fields contain those of the other
    (ImportUnencrypted(Curve.ED25519, bytes(32)), {"created"}),
    (GenerateAndImport(Curve.ED25519), {"created"}),
    (Generate(Curve.ED25519), {"generated", "created"}),
    (Sign(0, b"", 2), {"signature"}),
    (SignWith(b"blob", b"", 2), {"signature"}),
    (PublicKeyOf(0), {"key"}),
    (PublicKeyFrom(b"blob"), {"key"}),
    (ProvePossession(0), {"signature"}),
]


@pytest.mark.parametrize(("call", "fitting"), FITTING, ids=lambda value: type(value).__name__)
async def test_a_reply_that_belongs_to_another_call(nursery: trio.Nursery, call: Call, fitting: set[str]) -> None:
    """It ends the session: whatever comes next would be somebody else's too."""
    for name, result in RESULTS.items():
        session, peer, outcomes = await asked(nursery, [call, Sign(0, b"next", 2)])
        await peer.stream.send_all(encode_frame(encode_reply(result)))
        await trio.testing.wait_all_tasks_blocked()
        assert session.alive is (name in fitting)
        assert len(outcomes) == (1 if name in fitting else 2)
        if name not in fitting:
            assert all(isinstance(one, SessionLostError) and "out of step" in str(one) for one in outcomes.values())


async def test_a_frame_over_the_limit_is_refused_from_its_length(nursery: trio.Nursery) -> None:
    """Not a byte of it is waited for, nor kept."""
    for length in (MAX_FRAME + 1, 2**31, 2**32 - 1):
        session, peer, outcomes = await asked(nursery, [Sign(0, b"a", 2)])
        await peer.stream.send_all(length.to_bytes(4, "big"))
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(outcomes[0], SessionLostError)
        assert f"a frame of {length} bytes is announced" in session.failure


async def test_a_call_too_large_is_the_callers_own_fault(nursery: trio.Nursery) -> None:
    session, peer, outcomes = await asked(nursery, [Sign(0, b"a", 2)])
    with pytest.raises(FrameError, match="over the limit"):
        await session.call(Sign(0, b"\xff" * MAX_FRAME, 2))
    await peer.stream.send_all(encode_frame(encode_reply(RIGHT)))
    await trio.testing.wait_all_tasks_blocked()
    assert outcomes == {0: RIGHT}
    assert session.alive


async def test_all_thirty_callers_hear_of_the_loss(nursery: trio.Nursery) -> None:
    session, peer, outcomes = await asked(nursery, [Sign(0, bytes([number]), 2) for number in range(30)])
    await peer.stream.send_all(encode_frame(encode_reply(RIGHT)) * 7)
    await trio.aclose_forcefully(peer.stream)
    await trio.testing.wait_all_tasks_blocked()
    assert [outcomes[number] == RIGHT for number in range(30)] == [True] * 7 + [False] * 23
    assert not session.alive


async def test_a_session_that_is_cancelled_settles_its_callers() -> None:
    ours, _theirs = trio.testing.memory_stream_pair()
    session = Session(ours, timeout=TIMEOUT)
    async with trio.open_nursery() as callers, trio.open_nursery() as nursery:
        nursery.start_soon(session.run)

        async def ask() -> None:
            with pytest.raises(SessionLostError, match="the session was closed"):
                await session.call(PublicKeyOf(0))

        callers.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with pytest.raises(SessionLostError, match="the session was closed"):
        await session.call(PublicKeyOf(0))
