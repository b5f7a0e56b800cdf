"""A load generator for the signing API that costs little itself: one thread, epoll, requests built beforehand.

The machine's cores are shared by generator, signer and enclave, so a heavy client would measure itself. Every
response is checked to be a 200 with a signature; anything else ends the run.
"""

import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

TIMEOUT = 60.0  # seconds without any event: the server is stuck


@dataclass(frozen=True)
class Timing:
    """What one run measured; latencies in seconds, one per request."""

    latencies: list[float]
    elapsed: float

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.elapsed

    def quantile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass
class _Connection:
    requests: Iterator[bytes]
    fresh: bool  # whether each request gets a connection of its own
    stream: socket.socket | None = None
    began: float = 0.0
    pending: bytes = b""
    received: bytearray = field(default_factory=bytearray)


def post(host: str, pkh: str, message: bytes) -> bytes:
    """The bytes of one `POST /keys/<pkh>`, as the Octez client sends it."""
    body = b'"' + message.hex().encode() + b'"\n'
    head = (
        f"POST /keys/{pkh}?version=2 HTTP/1.1\r\nhost: {host}\r\naccept: application/json\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def get_authorized_keys(host: str) -> bytes:
    return f"GET /authorized_keys HTTP/1.1\r\nhost: {host}\r\naccept: application/json\r\n\r\n".encode()


def run(address: tuple[str, int], series: Sequence[Sequence[bytes]], *, fresh: bool = False) -> Timing:
    """Send each series in order on a connection of its own, all series side by side.

    With *fresh* every request opens a new connection, whose set-up counts as part of the request.
    """
    selector = selectors.DefaultSelector()
    latencies: list[float] = []
    began = time.perf_counter()
    for requests in series:
        _next(selector, address, _Connection(iter(requests), fresh), latencies)
    while selector.get_map():
        events = selector.select(TIMEOUT)
        if not events:
            raise TimeoutError("the signer did not answer")
        for key, mask in events:
            _step(selector, address, key.data, mask, latencies)
    return Timing(latencies, time.perf_counter() - began)


def _next(
    selector: selectors.BaseSelector, address: tuple[str, int], connection: _Connection, latencies: list[float]
) -> None:
    request = next(connection.requests, None)
    if connection.stream is not None and (request is None or connection.fresh):
        selector.unregister(connection.stream)
        connection.stream.close()
        connection.stream = None
    if request is None:
        return
    connection.began = time.perf_counter()
    connection.pending = request
    connection.received.clear()
    if connection.stream is None:
        connection.stream = socket.socket()
        connection.stream.setblocking(False)
        connection.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.stream.connect_ex(address)
        selector.register(connection.stream, selectors.EVENT_WRITE, connection)
    else:
        _send(selector, connection)


def _send(selector: selectors.BaseSelector, connection: _Connection) -> None:
    assert connection.stream is not None
    sent = connection.stream.send(connection.pending)
    connection.pending = connection.pending[sent:]
    wanted = selectors.EVENT_WRITE if connection.pending else selectors.EVENT_READ
    if selector.get_key(connection.stream).events != wanted:
        selector.modify(connection.stream, wanted, connection)


def _step(
    selector: selectors.BaseSelector,
    address: tuple[str, int],
    connection: _Connection,
    mask: int,
    latencies: list[float],
) -> None:
    assert connection.stream is not None
    if mask & selectors.EVENT_WRITE:
        _send(selector, connection)
        return
    data = connection.stream.recv(65536)
    if not data:
        raise ConnectionError(f"the signer closed the connection after {bytes(connection.received)!r}")
    connection.received += data
    if _complete(connection.received):
        latencies.append(time.perf_counter() - connection.began)
        _next(selector, address, connection, latencies)


def _complete(received: bytearray) -> bool:
    head, separator, body = received.partition(b"\r\n\r\n")
    if not separator:
        return False
    if not head.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(f"the signer answered {bytes(received)!r}")
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return len(body) >= int(value)
    raise ConnectionError(f"no length in {bytes(head)!r}")
