"""The server name in a ClientHello (P2.33): a real one, every truncation, crumbs, lies and garbage."""

import ssl
import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.clienthello import MAX_HELLO, NotAClientHelloError, server_name

HOST = "kms.eu-west-1.amazonaws.com"


@cache
def real_hello(host: str | None = HOST) -> bytes:
    """What Python's ssl sends first."""
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=host)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def block(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size, "big") + data


def record(payload: bytes, kind: int = 22) -> bytes:
    return bytes([kind, 3, 1]) + block(2, payload)


def records(message: bytes, size: int) -> bytes:
    return b"".join(record(message[at : at + size]) for at in range(0, len(message), size))


def extension(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2, "big") + block(2, data)


def sni(*names: bytes, kind: int = 0) -> bytes:
    return extension(0, block(2, b"".join(bytes([kind]) + block(2, name) for name in names)))


def message(extensions: bytes | None, *, kind: int = 1, session: bytes = b"") -> bytes:
    body = b"\x03\x03" + bytes(32) + block(1, session) + block(2, b"\x13\x01") + block(1, b"\0")
    return bytes([kind]) + block(3, body if extensions is None else body + block(2, extensions))


def refused(data: bytes) -> str:
    with pytest.raises(NotAClientHelloError) as caught:
        server_name(data)
    return str(caught.value)


def test_p33_a_real_client_hello() -> None:
    assert server_name(real_hello()) == HOST
    assert server_name(real_hello(HOST.upper())) == HOST


def test_p33_every_truncation_needs_more() -> None:
    hello = real_hello()
    assert [server_name(hello[:size]) for size in range(len(hello))] == [None] * len(hello)


@pytest.mark.parametrize("size", [9, 10, 50, 300])
def test_p33_split_into_many_records_and_cut_anywhere(size: int) -> None:
    split = records(real_hello()[5:], size)
    assert server_name(split) == HOST
    assert [server_name(split[:cut]) for cut in range(len(split))] == [None] * len(split)


def test_p33_what_follows_the_hello_is_not_looked_at() -> None:
    """Early data, for example, comes in records of other kinds."""
    assert server_name(real_hello() + record(b"\1", kind=20) + record(bytes(50), kind=23)) == HOST
    assert server_name(real_hello() + bytes(2 * MAX_HELLO)) == HOST
    assert server_name(record(message(sni(b"a")) + b"next message")) == "a"


def test_p33_other_extensions_around_the_name() -> None:
    assert server_name(record(message(extension(43, b"x") + sni(b"A.Example.") + extension(5, b"")))) == "a.example"


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (message(None), "names no server"),
        (message(b""), "names no server"),
        (message(extension(43, b"\0")), "names no server"),
        (message(sni(b"a", kind=7)), "names no server"),
        (message(sni(b"a", b"b")), "more than one"),
        (message(sni(b"a") + sni(b"b")), "more than one"),
        (message(sni(b"\xff")), "malformed"),
        (message(extension(0, b"")), "malformed"),
        (message(extension(0, b"\0\4\0\0\1")), "malformed"),
        (message(extension(0, b"\0\4\0\0\1aX")), "malformed"),
        (message(b"\0\0\0\x09"), "malformed"),
        (message(b"\0"), "malformed"),
        (b"\1\0\0\0", "malformed"),
        (message(sni(b"a"))[:3] + b"\xff" + message(sni(b"a"))[4:] + bytes(300), "malformed"),
        (message(sni(b"a"), kind=2), "no ClientHello"),
    ],
)
def test_p33_lies_and_omissions(payload: bytes, text: str) -> None:
    assert text in refused(record(payload))


def test_p33_a_client_without_a_name() -> None:
    assert "names no server" in refused(real_hello(None))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0",
        b"\x16\x02",
        b"\x15\x03\x01\0\2\2\x28",
        b"\x16\x03\x01\0\0",  # no fragment of a handshake is empty
        b"\x16\x03\x01\x40\x01",  # a record is not as large as that
        b"\x16\x03\x01\0\1\2",
        b"\x16\x03\x01\x10\0\2",  # the type of the message is wrong, and no need to wait for its end
        record(b"\1") + b"\x17",
        bytes(100_000),
    ],
)
def test_p33_garbage_is_refused_at_its_first_wrong_byte(data: bytes) -> None:
    refused(data)
    right = next(size for size in range(len(data)) if size == len(data) - 1 or _is_refused(data[: size + 1]))
    assert server_name(data[:right]) is None


def _is_refused(data: bytes) -> bool:
    try:
        server_name(data)
    except NotAClientHelloError:
        return True
    return False


def test_p33_at_most_16_kib() -> None:
    fits = message(extension(21, bytes(MAX_HELLO - 100)) + sni(b"a"))
    framed = record(fits[:8000]) + record(fits[8000:])
    assert len(framed) <= MAX_HELLO
    assert server_name(framed) == "a"
    assert "limit 16384" in refused(record(b"\1\0\x40\x00"))
    padded = records(message(extension(21, bytes(MAX_HELLO - 70)) + sni(b"a")), 1000)  # fits without its 17 heads
    assert len(padded) > MAX_HELLO
    assert server_name(padded[: MAX_HELLO - 1]) is None
    assert "within 16384" in refused(padded[:MAX_HELLO])
    assert "within 16384" in refused(padded)


def test_p33_crumbs_are_refused_and_cost_little() -> None:
    """A hostile client that sends byte by byte is checked anew for each."""
    crumbs = records(message(extension(21, bytes(MAX_HELLO - 100)) + sni(b"a"))[:62], 1)
    worst = crumbs + record(bytes(MAX_HELLO - len(crumbs) - 5))
    began = time.process_time()
    for size in range(len(worst)):
        assert server_name(worst[:size]) is None
    assert time.process_time() - began < 30  # seconds for 16,384 calls; without the limit on records it takes minutes
    assert "more than 64 records" in refused(records(message(sni(b"a" * 100)), 1))


@given(st.binary(max_size=200))
def test_p33_any_bytes_give_none_or_the_documented_error(data: bytes) -> None:
    for candidate in (data, b"\x16\x03\x01" + data, record(b"\1" + block(3, data)), record(message(data))):
        try:
            name = server_name(candidate)
        except NotAClientHelloError:
            continue
        assert name is None or candidate != data


@given(st.data())
def test_p33_one_wrong_byte_never_ends_in_another_error(data: st.DataObject) -> None:
    hello = bytearray(real_hello())
    hello[data.draw(st.integers(0, len(hello) - 1))] = data.draw(st.integers(0, 255))
    try:
        server_name(bytes(hello))
    except NotAClientHelloError as exc:
        assert str(exc)
