"""A proxy on the vsock loopback with a client before it and a TCP server behind it, all in this process."""

import errno
import itertools
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from proxy.address import VsockAddress
from proxy.metrics import Metrics
from proxy.service import Proxy, Status, forward_without_list
from proxy.settings import Forward

LOCAL = 1  # the CID of the loopback
DEADLINE = 60.0  # seconds for anything to happen at all: the guest's processor is emulated
_ports = itertools.count(20_000)


def free_port() -> int:
    """A vsock port that nothing else in the guest uses."""
    return next(_ports)


async def until(condition: Callable[[], bool]) -> None:
    """Return once *condition* holds."""
    with trio.fail_after(DEADLINE):
        while not condition():
            await trio.sleep(0.01)


async def connect(port: int) -> trio.SocketStream:
    """A client of the vsock port."""
    client = trio.socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        with trio.fail_after(DEADLINE):
            await client.connect((LOCAL, port))
        return trio.SocketStream(client)
    except BaseException:
        client.close()
        raise


async def receive_exactly(stream: trio.SocketStream, number: int) -> bytes:
    """So many bytes of *stream*."""
    received = bytearray()
    with trio.fail_after(DEADLINE):
        while len(received) < number:
            data = await stream.receive_some(number - len(received))
            assert data, f"the end after {len(received)} of {number} bytes"
            received += data
    return bytes(received)


async def receive_all(stream: trio.SocketStream) -> bytes:
    """Everything up to the end of *stream*."""
    received = bytearray()
    with trio.fail_after(DEADLINE):
        while data := await stream.receive_some(65536):
            received += data
    return bytes(received)


def is_cut(stream: trio.SocketStream) -> bool:
    """Whether the peer has closed altogether; after a half-close an empty send succeeds.

    Without a reset on AF_VSOCK, this is what tells a client at the end of file that the answer may be incomplete.
    """
    raw = socket.fromfd(stream.socket.fileno(), socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        raw.send(b"")
    except OSError as exc:
        assert exc.errno == errno.EPIPE
        return True
    finally:
        raw.close()
    return False


def reset(stream: trio.SocketStream) -> None:
    """Close a TCP stream with a reset."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    stream.socket.close()


async def is_reset(stream: trio.SocketStream) -> bool:
    """Whether a TCP stream ends with a reset, whatever comes before."""
    try:
        await receive_all(stream)
    except trio.BrokenResourceError:
        return True
    return False


@dataclass
class Setup:
    """The proxy and its two sides."""

    port: int  # vsock
    proxy: Proxy
    metrics: Metrics
    target: trio.SocketListener
    nursery: trio.Nursery
    streams: list[trio.SocketStream] = field(default_factory=list)  # closed at the end, whatever happens

    @property
    def status(self) -> Status:
        return self.proxy.status()[0]

    async def connect(self) -> trio.SocketStream:
        self.streams.append(await connect(self.port))
        return self.streams[-1]

    async def accept(self) -> trio.SocketStream:
        """The target's side of the next connection."""
        with trio.fail_after(DEADLINE):
            self.streams.append(await self.target.accept())
        return self.streams[-1]

    async def pair(self) -> tuple[trio.SocketStream, trio.SocketStream]:
        """A connection through the proxy: client and target."""
        return await self.connect(), await self.accept()

    async def check(self) -> None:
        """Other connections are served as ever."""
        client, target = await self.pair()
        async with client, target:
            await client.send_all(b"question")
            assert await receive_exactly(target, 8) == b"question"
            await target.send_all(b"answer")
            assert await receive_exactly(client, 6) == b"answer"

    def refused(self, reason: str) -> float:
        """How many connections the metrics count as refused for *reason*, of the loopback's CID."""
        labels = {"listener": f"vsock:{LOCAL}:{self.port}", "cid": str(LOCAL), "reason": reason}
        return self.metrics.registry.get_sample_value("vsock_proxy_refused_total", labels) or 0.0


@asynccontextmanager
async def running(*, drain_timeout: float = 10.0, **limits: Any) -> AsyncIterator[Setup]:
    """A proxy that runs with these limits; every connection is reset at the end."""
    (target,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1024)
    port, metrics = free_port(), Metrics()
    forward = Forward(
        listen=VsockAddress(LOCAL, port),
        remote_host="127.0.0.1",
        remote_port=target.socket.getsockname()[1],
        **limits,
    )
    proxy = Proxy([forward_without_list(forward)], metrics=metrics, drain_timeout=drain_timeout)
    async with target, trio.open_nursery() as nursery:
        await nursery.start(proxy.run)
        setup = Setup(port, proxy, metrics, target, nursery)
        try:
            yield setup
        finally:
            for stream in setup.streams:
                stream.socket.close()
        nursery.cancel_scope.cancel(reason="the test is over")
