"""Pairs of connected sockets of each family, and a relay between two of them, for the tests of the proxy."""

import os
import resource
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from proxy.splice import Ended, Pump, Relay, Times

# AF_VSOCK only where it is asked for: without its kernel module a connection may hang instead of failing.
FAMILIES = ["tcp", "unix"] + ["vsock"] * (os.environ.get("PROXY_TEST_VSOCK") == "1")
_LOCAL_CID, _ANY_PORT = 1, 0xFFFFFFFF
_LINGER_0 = struct.pack("ii", 1, 0)


def pair(family: str) -> tuple[socket.socket, socket.socket]:
    """Two connected, non-blocking sockets."""
    ends = socket.socketpair() if family == "unix" else _connected(family)
    for end in ends:
        end.setblocking(False)
    return ends


def _connected(family: str) -> tuple[socket.socket, socket.socket]:
    listener = socket.socket(socket.AF_INET if family == "tcp" else socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        listener.bind(("127.0.0.1", 0) if family == "tcp" else (_LOCAL_CID, _ANY_PORT))
        listener.listen()
        far = socket.socket(listener.family, socket.SOCK_STREAM)
        far.settimeout(5)
        far.connect(listener.getsockname())
        return far, listener.accept()[0]
    finally:
        listener.close()


def stream(end: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(end))


def reset(peer: trio.SocketStream) -> None:
    """End a TCP connection abortively."""
    peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
    peer.socket.close()


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    left = open_descriptors() - before
    # the descriptor with which the directory was read may have got another number
    assert not {number for number in left if os.path.lexists(f"/proc/self/fd/{number}")}


@contextmanager
def all_descriptors() -> Iterator[int]:
    """Raise the soft limit to the hard one; gives that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Rig:
    """A relay with the streams of its two peers, and what became of it."""

    def __init__(self, client: str, target: str, pump: Pump | None = None) -> None:
        client_far, self.client_end = pair(client)
        target_far, self.target_end = pair(target)
        self.client = stream(client_far)
        self.target = stream(target_far)
        self.pump = pump or Pump()
        self.relay: Relay | None = None
        self.scope = trio.CancelScope()  # around the relay
        self.run_scope = trio.CancelScope()  # around the pump
        self._over = trio.Event()
        self._ended: Ended | None = None

    def close(self) -> None:
        for end in (self.client.socket, self.target.socket, self.client_end, self.target_end):
            end.close()

    async def ended(self) -> Ended:
        with trio.fail_after(20):
            await self._over.wait()
        assert self._ended is not None
        return self._ended

    async def relay_until_end(self, times: Times, early: bytes) -> None:
        try:
            with self.scope:
                self._ended = await self.pump.relay(
                    self.client_end, self.target_end, times=times, early=early, on_start=self._started
                )
        finally:
            self._over.set()

    def _started(self, relay: Relay) -> None:
        self.relay = relay

    async def run_pump(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.run_scope:
            await self.pump.run(task_status=task_status)


@asynccontextmanager
async def rig(
    client: str = "tcp",
    target: str = "tcp",
    *,
    times: Times | None = None,
    early: bytes = b"",
    start: bool = True,
    limit: float = 30.0,
) -> AsyncIterator[Rig]:
    """A relay between a socket of each family, started unless *start* is false.

    *limit* is in seconds of Trio's clock, for a test that hangs.
    """
    made = Rig(client, target)
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(made.run_pump)
            if start:
                nursery.start_soon(made.relay_until_end, times or Times(), early)
                await trio.lowlevel.checkpoint()
            with trio.fail_after(limit):
                yield made
        finally:
            nursery.cancel_scope.cancel()
            made.close()
