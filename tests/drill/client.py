"""One request to the signing API, on a connection of its own as the Octez client does it, and its rule for 502."""

import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from tests.bench import load as bench

PAUSES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Seconds between the ten attempts of the Octez client (section 7 of the remote-signer specification)."""
BAD_GATEWAY = 502
_CHUNK = 65536  # bytes of one read


class HttpError(Exception):
    """The signer's answer is no HTTP that a client could read, or it closed the connection without one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the signer said."""

    status: int
    body: str

    @property
    def signature(self) -> str:
        return str(json.loads(self.body)["signature"])


Attempt = Callable[[], Awaitable[Answer]]


class Signer(Protocol):
    """What a baker asks; deadlines are the caller's."""

    async def post(self, address: str, message: bytes) -> Answer:
        """Ask for a signature. Raises `HttpError` or `OSError`."""
        ...

    async def vanish(self, address: str, message: bytes, chance: random.Random) -> None:
        """Ask for a signature, and go away in some phase of it. Raises as `post`."""
        ...


@dataclass(frozen=True, slots=True)
class HttpSigner:
    """The signing API on *port*."""

    port: int

    async def post(self, address: str, message: bytes) -> Answer:
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            await _send(stream, self._request(address, message))
            return await read_answer(stream)

    async def vanish(self, address: str, message: bytes, chance: random.Random) -> None:
        data = self._request(address, message)
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            await _send(stream, data[: chance.choice([len(data) // 2, len(data), len(data), len(data)])])
            await trio.sleep(chance.choice([0, 0.002, 0.01]))

    def _request(self, address: str, message: bytes) -> bytes:
        return bench.post(f"127.0.0.1:{self.port}", address, message)


async def octez(attempt: Attempt) -> tuple[Answer, int]:
    """Ask until the answer is another than 502, ten times at most; returns the last answer and how many were 502."""
    answer = await attempt()
    for number, pause in enumerate(PAUSES):
        if answer.status != BAD_GATEWAY:
            return answer, number
        await trio.sleep(pause)
        answer = await attempt()
    return answer, len(PAUSES) + (answer.status == BAD_GATEWAY)


async def get(port: int, path: str) -> Answer:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await _send(stream, f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n\r\n".encode())
        return await read_answer(stream)


async def _send(stream: trio.abc.SendStream, data: bytes) -> None:
    try:
        await stream.send_all(data)
    except trio.BrokenResourceError as exc:
        raise HttpError("reset before the request was taken") from exc


async def read_answer(stream: trio.abc.ReceiveStream) -> Answer:
    """The next answer on *stream*; its length must be told."""
    received = bytearray()
    while True:
        try:
            chunk = await stream.receive_some(_CHUNK)
        except trio.BrokenResourceError as exc:
            raise HttpError(f"reset after {bytes(received)!r}") from exc
        if not chunk:
            raise HttpError(f"closed after {bytes(received)!r}")
        received += chunk
        answer = parse(bytes(received))
        if answer is not None:
            return answer


def parse(received: bytes) -> Answer | None:
    """The answer in *received*, None while it is not complete."""
    head, separator, body = received.partition(b"\r\n\r\n")
    if not separator:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if version != "HTTP/1.1" or not rest[:3].isdigit():
        raise HttpError(f"no status in {first!r}")
    fields = dict(line.lower().split(":", 1) for line in lines)
    length = int(fields["content-length"])
    return Answer(int(rest[:3]), body[:length].decode()) if len(body) >= length else None
