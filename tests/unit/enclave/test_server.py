"""Sessions over streams: weird calls are answered, and the fault of one session touches no other."""

import errno
import socket
import sys
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from signer import crypto
from signer.crypto.interface import SecretKey
from signer.enclave.sealing.local import LocalSealing
from signer.enclave.server import Server
from signer.enclave.session import Session
from signer.rpc._cbor import dumps, loads
from signer.rpc.frames import MAX_FRAME, FrameDecoder, encode_frame
from signer.rpc.messages import (
    Call,
    Created,
    Generate,
    GenerateAndImport,
    ImportUnencrypted,
    Initialize,
    ProvePossession,
    PublicKeyOf,
    RemoteError,
    Result,
    Sign,
    decode_reply,
    encode_call,
)
from signer.tezos.keys import Curve, Signature

SEALING = LocalSealing(bytes(32))
TCP_PROBES = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)


class MemoryListener(trio.abc.Listener[trio.SocketStream]):
    """Hands out the streams that `dial` makes; *faults* are raised first."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.StapledStream](100)  # type: ignore[type-arg]
        self.faults: list[OSError] = []

    def dial(self) -> "Client":
        ours, theirs = trio.testing.memory_stream_pair()
        self._send.send_nowait(theirs)
        return Client(ours)

    async def accept(self) -> trio.SocketStream:
        await trio.lowlevel.checkpoint()
        if self.faults:
            raise self.faults.pop()
        return await self._receive.receive()  # type: ignore[return-value]

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Client:
    """The host's end of one session."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._decoder = FrameDecoder()

    async def exchange(self, payload: bytes) -> bytes:
        await self.stream.send_all(encode_frame(payload))
        return await self.reply()

    async def reply(self) -> bytes:
        while (reply := self._decoder.next_payload()) is None:
            data = await self.stream.receive_some(65536)
            assert data, "the session has ended"
            self._decoder.receive_data(data)
        return reply

    async def call(self, call: Call) -> Result:
        return decode_reply(call, await self.exchange(encode_call(call)))

    async def ended(self) -> bool:
        try:
            return await self.stream.receive_some(65536) == b""
        except trio.BrokenResourceError:
            return True


@asynccontextmanager
async def serving(server: Server | None = None) -> AsyncIterator[MemoryListener]:
    listener = MemoryListener()
    async with trio.open_nursery() as nursery:
        nursery.start_soon((server or Server(lambda: Session(SEALING))).serve, listener)
        yield listener
        nursery.cancel_scope.cancel()


async def opened(listener: MemoryListener, *curves: Curve) -> Client:
    client = listener.dial()
    await client.call(Initialize())
    for curve in curves:
        await client.call(GenerateAndImport(curve))
    return client


def chain(reply: bytes) -> list[str]:
    """The messages of an error reply, after a check of its form (section 4.3)."""
    item = loads(reply)
    assert isinstance(item, dict)
    assert list(item) == ["Err"]
    messages, error = [], item["Err"]
    while error is not None:
        assert isinstance(error, dict)
        assert list(error) == ["message", "source"]
        messages.append(error["message"])
        error = error["source"]
    assert all(isinstance(message, str) and message for message in messages)
    return messages


def one(name: str, argument: object) -> bytes:
    return dumps({name: argument})


def sign(**changes: object) -> bytes:
    return one("Sign", {"handle": 0, "message": b"m", "version": 2, **changes})


WEIRD: list[tuple[bytes, list[str]]] = [
    (b"", ["malformed CBOR"]),
    (b"\xff", ["malformed CBOR"]),
    (b"\xf6", ["a call is a map"]),
    (b"\xa0", ["a call is a map"]),
    (b"\x9f", ["malformed CBOR"]),
    (b"\x81" * 1000, ["malformed CBOR"]),
    (b"\xa1\x64Sign", ["malformed CBOR"]),
    (b"\xd8\x1e\x82\x01\x00", ["malformed CBOR"]),
    (b"\xa1\x64Sign\xd8\x1c\x81\xd8\x1d\x00", ["malformed CBOR"]),
    (dumps({"Sign": {}, "Generate": "Bls"}), ["a call is a map with one entry"]),
    (dumps({1: 2}), ["malformed CBOR"]),
    (one("Terminate", None), ["unknown call"]),
    (one("sign", {}), ["unknown call"]),
    (one("Sign", None), ["argument of Sign is a map"]),
    (sign(handle=None), ["handle is an unsigned integer"]),
    (sign(handle=True), ["handle is an unsigned integer"]),
    (sign(handle=2**64), ["malformed CBOR"]),
    (sign(handle=2**64 - 1), ["signer error", "invalid handle"]),
    (sign(handle=99), ["signer error", "invalid handle"]),
    (sign(message=None), ["message is a byte string"]),
    (sign(message=[1, -1]), ["message is a byte string"]),
    (sign(message=[2**80]), ["malformed CBOR"]),
    (sign(message=[1.0]), ["message is a byte string"]),
    (sign(message={"a": 1}), ["message is a byte string"]),
    (sign(version=None), ["version is an unsigned integer"]),
    (sign(version=3), ["version is 0, 1, 2 or 255"]),
    (sign(version=2.0), ["version is an unsigned integer"]),
    (sign(handle=1, version=0), ["signer error", "Signing version 0"]),
    (one("SignWith", {"encrypted_private_key": b"", "message": b""}), ["version is"]),
    (one("SignWith", {"encrypted_private_key": b"", "message": b"", "version": 2}), ["encryption error", "format"]),
    (one("Import", b""), ["encryption error", "format"]),
    (one("Import", bytes(100_000)), ["encryption error", "format"]),
    (one("Import", [0] * 100_000), ["encryption error", "format"]),
    (one("Import", None), ["Import is a byte string"]),
    (one("PublicKeyFrom", "text"), ["PublicKeyFrom is a byte string"]),
    (one("PublicKeyFrom", b"TZSD\x01\xff\xff"), ["encryption error", "format"]),
    (one("PublicKey", -1), ["handle is an unsigned integer"]),
    (one("PublicKey", 7), ["signer error", "invalid handle"]),
    (one("Generate", None), ["unknown key type"]),
    (one("Generate", ["Bls"]), ["unknown key type"]),
    (one("GenerateAndImport", "ed25519"), ["unknown key type"]),
    (one("ImportUnencrypted", {"Ed25519": bytes(33)}), ["Ed25519 private key has 32 bytes"]),
    (one("ImportUnencrypted", {"Bls": b"\xff" * 32}), ["signer error", "the BLS"]),
    (one("ImportUnencrypted", {"NistP256": bytes(32)}), ["signer error", "the P256"]),
    (one("ImportUnencrypted", {}), ["a private key is a map"]),
    (one("ProvePossession", 0), ["signer error", "Proof of possession is not supported"]),
    (one("ProvePossession", True), ["handle is an unsigned integer"]),
    (one("ProvePossession", {"handle": 1}), ["a public key is a map"]),
    (one("Initialize", {}), ["already initialized"]),
    (one("Initialize", {"region": 5}), ["region is a text"]),
    (one("Initialize", None), ["credentials is a map"]),
]


async def test_weird_calls_are_answered_and_end_nothing() -> None:
    async with serving() as listener:
        client = await opened(listener, Curve.ED25519, Curve.BLS12_381)
        for payload, expected in WEIRD:
            found = chain(await client.exchange(payload))
            assert [text[: len(start)] for text, start in zip(found, expected, strict=False)] == expected, payload
            assert isinstance(await client.call(Sign(1, b"still there", 2)), Signature)


async def test_no_error_shows_a_secret() -> None:
    session = Session(SEALING)
    await session.answer(encode_call(Initialize()))
    secret = b"\xfe\xdc\xba\x98" * 8
    for payload in (
        one("ImportUnencrypted", {"Bls": secret}),
        one("ImportUnencrypted", {"Rsa": secret}),
        one("ImportUnencrypted", {"Ed25519": secret + b"\0"}),
        one("ImportUnencrypted", {"Ed25519": [*secret[:31], 256]}),
        one("ImportUnencrypted", {"Ed25519": secret.hex()}),
        one("Initialize", {"secret_access_key": secret}),
        b"\xa1\x71ImportUnencrypted\xa1\x67Ed25519\x58\x21" + secret,
        b"\xa1\x71ImportUnencrypted\xa1\x78\x20" + secret,
    ):
        text = str(chain(await session.answer(payload)))
        for form in (secret[:4].hex(), repr(secret[:4])[2:-1], str(list(secret[:4]))[1:-1]):
            assert form not in text.lower(), payload


CBOR = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=8) | st.sampled_from(["Bls", "Sign"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["handle", "message", "version", "Bls", "public_key"]), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(["Initialize", "Import", "ImportUnencrypted", "Generate", "Sign", "SignWith", "PublicKey"])


@settings(max_examples=300, deadline=None)
@given(name=NAMES | st.sampled_from(["PublicKeyFrom", "ProvePossession", "Other"]), argument=CBOR)
def test_any_argument_gets_one_reply(name: str, argument: object) -> None:
    async def main() -> None:
        session = Session(SEALING)
        for call in (Initialize(), GenerateAndImport(Curve.BLS12_381)):
            await session.answer(encode_call(call))
        reply = loads(await session.answer(one(name, argument)))
        assert isinstance(reply, dict)
        assert list(reply) in (["Ok"], ["Err"])
        assert isinstance(decode_reply(Sign(0, b"", 2), await session.answer(encode_call(Sign(0, b"", 2)))), Signature)

    trio.run(main)


@pytest.mark.parametrize(
    "sent",
    [
        (MAX_FRAME + 1).to_bytes(4, "big"),
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0",
        b"\0\0\0\5abc",
        encode_frame(encode_call(Initialize()))[:-1],
        b"",
    ],
)
@pytest.mark.parametrize("forcefully", [True, False])
async def test_a_session_that_breaks_ends_alone(sent: bytes, forcefully: bool) -> None:
    async with serving() as listener:
        other = await opened(listener, Curve.ED25519)
        broken = await opened(listener, Curve.ED25519)
        if sent:
            await broken.stream.send_all(sent)
        if forcefully:
            await trio.aclose_forcefully(broken.stream)
        else:
            assert isinstance(broken.stream, trio.StapledStream)
            await broken.stream.send_eof()
            assert await broken.ended()
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(await other.call(Sign(0, b"m", 2)), Signature)
        assert isinstance(await (await opened(listener, Curve.P256)).call(Sign(0, b"m", 2)), Signature)


async def test_a_bug_is_an_error_of_one_call(capsys: pytest.CaptureFixture[str]) -> None:
    class Buggy(LocalSealing):
        """A way of sealing with a bug whose text holds a secret."""

        async def seal(self, key: SecretKey, *, marks: str | None = None) -> bytes:
            if key.curve is Curve.P256:
                raise ZeroDivisionError(f"hush {bytes(key.secret_bytes()).hex()}")
            return b"blob"

        async def open(self, blob: bytes) -> SecretKey:
            raise RuntimeError("hush")

    async with serving(Server(lambda: Session(Buggy(bytes(32))))) as listener:
        other = await opened(listener, Curve.ED25519)
        client = await opened(listener, Curve.ED25519)
        assert chain(await client.exchange(one("Generate", "NistP256"))) == ["internal error", "ZeroDivisionError"]
        assert chain(await client.exchange(one("Import", b""))) == ["internal error", "RuntimeError"]
        for one_session in (client, other):
            assert isinstance(await one_session.call(Sign(0, b"m", 2)), Signature)
    err = capsys.readouterr().err
    assert "internal error: ZeroDivisionError in seal:" in err
    assert "hush" not in err


async def test_handles_belong_to_their_session() -> None:
    async with serving() as listener:
        first, second = await opened(listener, Curve.ED25519), await opened(listener)
        for call in (Sign(0, b"m", 2), PublicKeyOf(0), ProvePossession(0)):
            with pytest.raises(RemoteError, match="invalid handle"):
                await second.call(call)
        created = await second.call(GenerateAndImport(Curve.ED25519))
        assert isinstance(created, Created)
        assert created.handle == 0
        for client in (first, second):
            signature = await client.call(Sign(0, b"m", 2))
            assert isinstance(signature, Signature)
            assert crypto.verify(created.public_key, b"m", signature) is (client is second)


async def test_calls_in_one_write_and_in_single_bytes() -> None:
    async with serving() as listener:
        client = await opened(listener)
        calls = [Generate(curve) for curve in Curve]
        stream = b"".join(encode_frame(encode_call(call)) for call in calls)
        for pieces in ([stream], [stream[i : i + 1] for i in range(len(stream))]):
            for piece in pieces:
                await client.stream.send_all(piece)
            decoder, found = FrameDecoder(), list[Result]()
            while len(found) < len(calls):
                decoder.receive_data(await client.stream.receive_some(7))
                while (payload := decoder.next_payload()) is not None:
                    found.append(decode_reply(calls[len(found)], payload))
            assert [one.public_key.curve for one in found if isinstance(one, Created)] == list(Curve)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
async def test_a_lack_of_descriptors_is_waited_out(number: int, autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as listener:
        client = await opened(listener, Curve.ED25519)
        listener.faults = [OSError(number, "lacking") for _ in range(3)]
        assert isinstance(await (await opened(listener, Curve.P256)).call(Sign(0, b"m", 2)), Signature)
        assert isinstance(await (await opened(listener, Curve.P256)).call(Sign(0, b"m", 2)), Signature)
        assert not listener.faults
        assert isinstance(await client.call(Sign(0, b"m", 2)), Signature)


async def test_other_faults_of_the_listener_end_the_program() -> None:
    listener = MemoryListener()
    listener.faults = [OSError(errno.EBADF, "gone")]
    with pytest.RaisesGroup(OSError):
        await Server(lambda: Session(SEALING)).serve(listener)


async def test_told_to_stop_the_sessions_between_two_calls_end() -> None:
    server = Server(lambda: Session(SEALING))
    async with trio.open_nursery() as nursery:
        listener = MemoryListener()
        nursery.start_soon(server.serve, listener)
        client = await opened(listener, Curve.ED25519)
        server.stop()
        with trio.fail_after(5):
            assert await client.ended()


async def test_a_host_that_vanished_is_noticed() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    names = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), *((socket.IPPROTO_TCP, name) for name in TCP_PROBES))
    found: list[int] = []
    server = Server(lambda: Session(SEALING))

    async def look(stream: trio.SocketStream) -> bool:
        await trio.lowlevel.checkpoint()
        found.extend(int.from_bytes(stream.getsockopt(*name, 4), sys.byteorder) for name in names)
        server.stop()
        return False

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(server.serve, listener, greet=look))
        await (await trio.open_tcp_stream(*listener.socket.getsockname())).aclose()
    assert found == [1, 60, 15, 4]


async def test_sixty_four_sessions_and_the_next_waits_for_a_place() -> None:
    async with serving() as listener:
        clients = [await opened(listener) for _ in range(64)]
        last = listener.dial()
        await last.stream.send_all(encode_frame(encode_call(Initialize())))
        answered = trio.Event()

        async def wait() -> None:
            assert decode_reply(Initialize(), await last.reply()) is None
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not answered.is_set()
            assert isinstance(await clients[0].call(GenerateAndImport(Curve.ED25519)), Created)
            await clients[1].stream.aclose()
            await answered.wait()


async def test_a_session_holds_1024_keys() -> None:
    async with serving() as listener:
        client = await opened(listener)
        for number in range(1024):
            created = await client.call(ImportUnencrypted(Curve.ED25519, number.to_bytes(32, "big")))
            assert isinstance(created, Created)
            assert created.handle == number
        with pytest.raises(RemoteError, match="^signer error: a session holds at most 1024 keys"):
            await client.call(ImportUnencrypted(Curve.ED25519, bytes(32)))
        assert isinstance(await client.call(Sign(1023, b"message", 2)), Signature)


async def test_calls_that_were_answered_are_not_kept() -> None:
    """Else 64 sessions that wait would keep a frame of a megabyte each, and keys that came in clear."""
    async with serving() as listener:
        client = await opened(listener)
        tracemalloc.start()
        try:
            await client.exchange(bytes(MAX_FRAME - 1))
            await trio.testing.wait_all_tasks_blocked()
            assert tracemalloc.get_traced_memory()[0] < MAX_FRAME // 4
        finally:
            tracemalloc.stop()
