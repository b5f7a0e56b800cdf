"""Points 15, 16, 26 and 29: the accept loop, what it says, and the names of things."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from prometheus_client import generate_latest

from proxy.address import Address, TcpAddress, UnixAddress, VsockAddress
from proxy.listener import Listener
from proxy.metrics import Metrics
from proxy.names import IpAddress
from proxy.resolver import LookupFailedError, system_lookup
from proxy.service import forward_without_list
from proxy.settings import Forward
from proxy.sockets import Peer, is_at, is_gone, name_of, peer_of
from proxy.splice import Pump


class Listening(socket.socket):
    """Always readable; each `accept` fails with the next of *numbers*, then it has no connection for ever."""

    def __init__(self, *numbers: int) -> None:
        ours, self._other = socket.socketpair()
        super().__init__(fileno=ours.detach())
        self._other.send(b"x")
        self._numbers = list(numbers)
        self.asked: list[float] = []  # when
        self.exhausted = trio.Event()

    def accept(self) -> tuple[socket.socket, object]:
        self.asked.append(trio.current_time())
        if self._numbers:
            number = self._numbers.pop(0)
            raise OSError(number, os.strerror(number))
        self.exhausted.set()
        raise BlockingIOError

    def close(self) -> None:
        super().close()
        self._other.close()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def listener(metrics: Metrics) -> Listener:
    forward, decision = forward_without_list(
        Forward(listen=VsockAddress(3, 8000), remote_host="127.0.0.1", remote_port=9)
    )
    return Listener(forward, decision, metrics, system_lookup)


@pytest.fixture
def pump() -> Iterator[Pump]:
    made = Pump()
    yield made
    made._epoll.close()


async def accept_times(listener: Listener, pump: Pump, *numbers: int) -> list[float]:
    """When it asked for a connection, as *numbers* were the answers."""
    with Listening(*numbers) as listening:
        listener._sockets = [listening]
        async with trio.open_nursery() as nursery:
            listener.accept_in(nursery, nursery, pump, lambda: None, 1.0)
            await listening.exhausted.wait()
            nursery.cancel_scope.cancel()
        return listening.asked[: len(numbers) + 1]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
async def test_p16_exhaustion_makes_a_pause(
    autojump_clock: trio.testing.MockClock,
    listener: Listener,
    pump: Pump,
    number: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = await accept_times(listener, pump, *[number] * 5)
    assert times == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert caplog.messages == [f"Could not accept connection: {os.strerror(number)}; trying again"]


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EINTR, errno.EPROTO])
async def test_p16_a_connection_that_is_gone_makes_none(
    autojump_clock: trio.testing.MockClock,
    listener: Listener,
    pump: Pump,
    number: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert await accept_times(listener, pump, *[number] * 5) == [0.0] * 6
    assert caplog.messages == []


async def test_p26_the_accept_loop_goes_round_without_connections_and_when_full(
    autojump_clock: trio.testing.MockClock, metrics: Metrics, pump: Pump
) -> None:
    """A proxy that is full is alive: its service manager must not end it."""
    forward, decision = forward_without_list(
        Forward(listen=VsockAddress(3, 8000), remote_host="127.0.0.1", remote_port=9, num_workers=1, max_waiting=0)
    )
    listener = Listener(forward, decision, metrics, system_lookup)
    turns: list[float] = []
    with Listening() as listening:
        listener._sockets = [listening]
        listener._slots.acquire_nowait()
        async with trio.open_nursery() as nursery:
            listener.accept_in(nursery, nursery, pump, lambda: turns.append(trio.current_time()), 0.5)
            await trio.sleep(1.75)
            assert listening.asked == []  # full: accept isn't called
            listener._slots.release()
            listener._make_room()
            await listening.exhausted.wait()
            nursery.cancel_scope.cancel()
    assert turns[:4] == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert listening.asked[0] == pytest.approx(1.75)


async def test_p15_each_kind_of_refusal_is_told_at_most_once_a_second(
    autojump_clock: trio.testing.MockClock, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(25):
        listener._mention("queue", f"queue {number}", logging.WARNING)
        listener._mention("lookup", f"lookup {number}", logging.WARNING)
        await trio.sleep(0.125)  # which adds up exactly
    assert [text for text in caplog.messages if text.startswith("queue")] == [
        "queue 0",
        *(f"queue {number} (and 7 more since the last such line)" for number in (8, 16, 24)),
    ]
    assert len(caplog.messages) == 8


@pytest.mark.parametrize(
    ("family", "where", "peer"),
    [
        (socket.AF_VSOCK, (16, 2416615154), Peer(16, "cid: 16 port: 2416615154")),
        (socket.AF_UNIX, "", Peer(None, "cid: unknown port: 0")),
        (socket.AF_INET, ("127.0.0.1", 5), Peer(None, "tcp: 127.0.0.1:5")),
        (socket.AF_INET6, ("::1", 5, 0, 0), Peer(None, "tcp: [::1]:5")),
    ],
)
def test_how_peers_are_named(family: socket.AddressFamily, where: object, peer: Peer) -> None:
    assert peer_of(cast(socket.socket, SimpleNamespace(family=family)), where) == peer


@pytest.mark.parametrize(
    ("family", "name", "text", "address"),
    [
        (socket.AF_VSOCK, (3, 8000), "cid: 3 port: 8000", VsockAddress(3, 8000)),
        (socket.AF_UNIX, "/v_1", "unix: /v_1", UnixAddress("/v", 1)),
        (socket.AF_INET, ("127.0.0.1", 5), "tcp: 127.0.0.1:5", TcpAddress("127.0.0.1", 5)),
        (socket.AF_INET6, ("::1", 5, 0, 0), "tcp: [::1]:5", TcpAddress("::1", 5)),
    ],
)
def test_how_listeners_are_named_and_p26_matched(
    family: socket.AddressFamily, name: object, text: str, address: Address
) -> None:
    listening = cast(socket.socket, SimpleNamespace(family=family, getsockname=lambda: name))
    assert name_of(listening) == text
    others: list[Address] = [
        VsockAddress(3, 8000),
        UnixAddress("/v", 1),
        TcpAddress("127.0.0.1", 5),
        TcpAddress("::1", 5),
    ]
    assert [is_at(listening, one) for one in others] == [one == address for one in others]


def test_p29_a_client_with_many_cids_does_not_fill_the_metrics(metrics: Metrics) -> None:
    labels = {metrics.cid(number) for number in range(10_000)}
    assert len(labels) <= 65
    assert "other" in labels
    assert metrics.cid(None) in ("unknown", "other")
    assert metrics.cid(5) == "5"


async def test_p29_lookups_are_shown(autojump_clock: trio.testing.MockClock, metrics: Metrics) -> None:
    async def lookup(host: str) -> list[IpAddress]:
        raise LookupFailedError("DNS lookup failed!")

    forward, decision = forward_without_list(Forward(listen=VsockAddress(3, 8000), remote_host="h", remote_port=9))
    listener = Listener(forward, decision, metrics, lookup)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.forwarder.target.run)
        nursery.start_soon(listener.account)
        listener.forwarder.target.refresh()
        await trio.sleep(600)
        labels, statistics = {"listener": "vsock:3:8000"}, listener.forwarder.target.statistics
        name = "vsock_proxy_lookup_failures_total"
        with trio.fail_after(10):
            while metrics.registry.get_sample_value(name, labels) != statistics.failures:  # accounted once a second
                await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    shown = generate_latest(metrics.registry).decode()
    assert 600 / 45 <= listener.forwarder.target.statistics.failures <= 60  # back-off: 1 to 30 s, with jitter
    assert 'vsock_proxy_lookup_age_seconds{listener="vsock:3:8000"} NaN' in shown
    assert 'vsock_proxy_candidates{listener="vsock:3:8000"} 0.0' in shown


def test_a_client_that_has_gone_is_known() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        assert not is_gone(left)
        right.send(b"x")
        assert not is_gone(left)
        right.shutdown(socket.SHUT_WR)
        assert not is_gone(left)
        right.close()
        assert not is_gone(left)  # what it sent is to be delivered
        left.recv(10)
        assert is_gone(left)
