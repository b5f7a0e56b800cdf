"""The server name in a TLS ClientHello; RFC 8446 section 4.1.2, RFC 6066 section 3. Pure, nothing is decrypted.

Fed with what a client sends first, as it comes; says when the name is known, and when this is no ClientHello.
"""

from collections.abc import Iterator

MAX_HELLO = 16 * 1024  # bytes
_MAX_RECORDS = 64  # that make up one ClientHello, so that a client that sends it in crumbs costs little
_MAX_RECORD = 2**14  # bytes in a record, RFC 8446 section 5.1
_CLIENT_HELLO, _SERVER_NAME, _HOST_NAME = 1, 0, 0


class NotAClientHelloError(ValueError):
    """The client does not speak TLS, or names no server."""


class _ShortError(Exception):
    """A length doesn't fit what it counts."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _ShortError
        self._at += count
        return self._data[self._at - count : self._at]

    def take_all(self) -> bytes:
        return self.take(self.left)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self, size: int) -> "_Reader":
        """What follows a length of *size* bytes."""
        return _Reader(self.take(self.number(size)))


def server_name(data: bytes) -> str | None:
    """The server name in lower case; None while more bytes are needed.

    Raises `NotAClientHelloError` as soon as it is certain that there is none within `MAX_HELLO` bytes. Calling it again
    for each byte that comes is cheap: before the message is complete, only the heads of its few records are looked at.
    """
    message = _handshake(data[:MAX_HELLO])
    if message is None:
        if len(data) >= MAX_HELLO:
            raise NotAClientHelloError(f"no ClientHello within {MAX_HELLO} bytes")
        return None
    try:
        return _name(_Reader(message))
    except (_ShortError, UnicodeDecodeError):
        raise NotAClientHelloError("the ClientHello is malformed") from None


def _handshake(data: bytes) -> bytes | None:
    """The body of the first handshake message, put together from as many records as it takes; None if it isn't all."""
    message = bytearray()
    for piece in _fragments(data):
        message += piece
        if message[0] != _CLIENT_HELLO:
            raise NotAClientHelloError("the first message is no ClientHello")
        if len(message) < 4:
            continue
        length = 4 + int.from_bytes(message[1:4], "big")
        if length > MAX_HELLO:
            raise NotAClientHelloError(f"a ClientHello of {length} bytes, limit {MAX_HELLO}")
        if len(message) >= length:  # what follows, early data for example, isn't looked at
            return bytes(message[4:length])
    return None


def _fragments(data: bytes) -> Iterator[bytes]:
    """What the handshake records carry, the last of which may have come in part."""
    at = 0
    for _ in range(_MAX_RECORDS):
        head = data[at : at + 5]
        if head[:2] != b"\x16\x03"[: len(head)]:  # handshake, version 3.x
            raise NotAClientHelloError("this is not TLS")
        if len(head) < 5:
            return
        length = int.from_bytes(head[3:], "big")
        if not 0 < length <= _MAX_RECORD:
            raise NotAClientHelloError("this is not TLS")
        if at + 5 < len(data):
            yield data[at + 5 : at + 5 + length]
        at += 5 + length
        if at > len(data):
            return
    raise NotAClientHelloError(f"a ClientHello in more than {_MAX_RECORDS} records")


def _name(hello: _Reader) -> str:
    hello.take(2 + 32)  # version, random
    for size in (1, 2, 1):  # session id, cipher suites, compression methods
        hello.block(size)
    names: list[bytes] = []
    extensions = hello.block(2) if hello.left else _Reader(b"")
    while extensions.left:
        kind, body = extensions.number(2), extensions.block(2)
        if kind == _SERVER_NAME:
            names += _host_names(body)
    if hello.left:
        raise _ShortError
    if not names:
        raise NotAClientHelloError("the ClientHello names no server")
    if len(names) > 1:  # RFC 6066 forbids it, and servers differ in which one they take
        raise NotAClientHelloError("the ClientHello names more than one server")
    return names[0].decode("ascii").lower().removesuffix(".")


def _host_names(body: _Reader) -> Iterator[bytes]:
    listed = body.block(2)
    if body.left:
        raise _ShortError
    while listed.left:
        kind, name = listed.number(1), listed.block(2)
        if kind == _HOST_NAME:
            yield name.take_all()
