"""Point 32, the proxy in somebody's nursery; and, with a name server of our own, points 8 to 11, 13 and 14."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client import generate_latest

from proxy import daemon, forwarder, resolver
from proxy.address import TcpAddress, UnixAddress, VsockAddress
from proxy.allowlist import AllowList, Entry
from proxy.bind import BindError
from proxy.decision import Decision, decide, without_list
from proxy.dial import dial
from proxy.metrics import Metrics
from proxy.names import IpAddress
from proxy.resolver import LookupFailedError
from proxy.service import Proxy, forward_without_list
from proxy.settings import Forward, Settings
from tests.integration.conftest import DEADLINE
from tests.integration.proxy.conftest import Remote

LISTEN = TcpAddress("127.0.0.1", 0)
NAME = "kms.example"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed lookup is repeated soon: these tests run by the real clock."""
    monkeypatch.setattr(resolver, "FIRST_RETRY", 0.02)
    monkeypatch.setattr(resolver, "MAX_RETRY", 0.04)


class Names:
    """A name server that a test changes: what it *finds*, None for a failure; it waits while it is *held* up."""

    def __init__(self, *found: str) -> None:
        self.found: Sequence[str] | None = found or None
        self.asked = 0
        self.held = trio.Event()
        self.held.set()

    async def __call__(self, host: str) -> list[IpAddress]:
        self.asked += 1
        await self.held.wait()
        await trio.lowlevel.checkpoint()
        if self.found is None:
            raise LookupFailedError("DNS lookup failed!")
        return [ipaddress.ip_address(text) for text in self.found]


async def until(condition: Callable[[], bool]) -> None:
    """Return once *condition* holds."""
    with trio.fail_after(DEADLINE):
        while not condition():
            await trio.sleep(0.005)


def forward_to(remote: Remote, host: str = "127.0.0.1", **more: object) -> Forward:
    values = {"listen": LISTEN, "remote_host": host, "remote_port": remote.port}
    return Forward.model_validate(values | more)


@asynccontextmanager
async def serving(proxy: Proxy) -> AsyncIterator[None]:
    """Run *proxy* meanwhile, and then stop it."""
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.run)
        yield
        proxy.stop()


def port_of(proxy: Proxy, number: int = 0) -> int:
    return int(proxy.status()[number].addresses[0].rpartition(":")[2])


async def connected(proxy: Proxy, number: int = 0) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", port_of(proxy, number))


async def accepted(remote: Remote) -> trio.SocketStream:
    remote.listener.settimeout(0)
    with trio.fail_after(DEADLINE):
        await trio.lowlevel.wait_readable(remote.listener)
    connection, _ = remote.listener.accept()
    return trio.SocketStream(trio.socket.from_stdlib_socket(connection))


async def check_exchange(client: trio.SocketStream, far: trio.SocketStream) -> None:
    with trio.fail_after(DEADLINE):
        await client.send_all(b"ask")
        assert await far.receive_some(99) == b"ask"
        await far.send_all(b"answer")
        assert await client.receive_some(99) == b"answer"


async def is_cut(stream: trio.SocketStream) -> bool:
    """Wait for the end; whether it is a reset."""
    with trio.fail_after(DEADLINE):
        try:
            while await stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            return True
    return False


async def refuses(proxy: Proxy) -> bool:
    """Whether a new client is reset; which it may see while it still connects."""
    try:
        async with await connected(proxy) as client:
            return await is_cut(client)
    except OSError:
        return True


async def is_served(proxy: Proxy, remote: Remote) -> bool:
    """Whether a new connection gets through."""
    async with await connected(proxy) as client, await accepted(remote) as far:
        await check_exchange(client, far)
    return True


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def decision_for(host: str, port: int) -> Decision:
    """As a list with just this name decides."""
    return Decision(Entry(host, port, 1), without_list(None).accept)


# -- 32: in somebody's nursery


async def test_p32_start_status_and_stop(remote: Remote) -> None:
    proxy = Proxy([forward_without_list(forward_to(remote))])
    proxy_status = proxy.status()[0]
    assert (proxy_status.addresses, proxy_status.accepted, proxy_status.lookup_age) == ((), 0, None)
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.run)
        async with await connected(proxy) as client, await accepted(remote) as far:
            await check_exchange(client, far)
            (now,) = proxy.status()
            assert (now.listener, now.active, now.waiting, now.accepted) == ("tcp:127.0.0.1:0", 1, 0, 1)
            assert now.candidates == ("127.0.0.1",)
            assert now.lookup_age is not None
            port = port_of(proxy)
            proxy.stop()
            await until(lambda: proxy.status()[0].addresses == ())
            with pytest.raises(OSError, match="all attempts to connect"):
                await trio.open_tcp_stream("127.0.0.1", port)
            await check_exchange(client, far)  # drained, not cut
    assert proxy.status()[0].active == 0


async def test_p32_a_crash_of_one_connection_is_contained(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = [ZeroDivisionError("a bug")]

    async def faulty(*arguments: Any, **more: Any) -> object:
        if faults:
            raise faults.pop()
        return await dial(*arguments, **more)

    proxy = Proxy([forward_without_list(forward_to(remote))])
    async with serving(proxy):
        async with await connected(proxy) as first, await accepted(remote) as far:
            await check_exchange(first, far)
            monkeypatch.setattr(forwarder, "dial", faulty)
            assert await refuses(proxy)
            await check_exchange(first, far)
            assert await is_served(proxy, remote)
        await until(lambda: proxy.status()[0].active == 0)  # the crashed one holds no slot
    assert "internal error: a connection was reset" in caplog.messages


async def test_p32_cancelled_it_ends_in_bounded_time_and_leaks_nothing(remote: Remote) -> None:
    before = descriptors()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            proxy = Proxy([forward_without_list(forward_to(remote, num_workers=2))], drain_timeout=1e9)
            await nursery.start(proxy.run)
            pairs = [(await connected(proxy), await accepted(remote)) for _ in range(2)]
            waiting = [await connected(proxy) for _ in range(3)]
            await until(lambda: proxy.status()[0].waiting == 3)
            began = trio.current_time()
            scope.cancel()
    assert trio.current_time() - began < 1
    for end in (*(end for pair in pairs for end in pair), *waiting):
        assert await is_cut(end)
        await end.aclose()
    assert (proxy.status()[0].active, proxy.status()[0].waiting) == (0, 0)
    assert descriptors() == before


async def test_p32_nothing_is_left_when_it_cannot_listen(remote: Remote, tmp_path: Path) -> None:
    forwards = [
        forward_to(remote, listen=UnixAddress(str(tmp_path / "v"), 1)),
        forward_to(remote, listen=TcpAddress("127.0.0.1", remote.port)),
    ]
    before = descriptors()
    with pytest.raises(BindError) as caught:
        await Proxy([forward_without_list(one) for one in forwards]).run()
    assert caught.value.number == errno.EADDRINUSE
    assert descriptors() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..b", "\0", "ä" * 100])
async def test_a_listening_host_that_is_no_name_is_told(remote: Remote, host: str) -> None:
    proxy = Proxy([forward_without_list(forward_to(remote, listen=TcpAddress(host, 1)))])
    with pytest.raises(BindError, match="Could not bind to tcp:"):
        await proxy.run()


async def test_p06_options_of_both_sockets(remote: Remote) -> None:
    proxy = Proxy([forward_without_list(forward_to(remote))])
    async with serving(proxy), await connected(proxy) as client, await accepted(remote) as far:
        await check_exchange(client, far)
        peers = {client.socket.getsockname(), far.socket.getsockname()}
        checked = 0
        for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
            try:
                copy = socket.socket(fileno=os.dup(number))
            except OSError:
                continue
            with copy:
                if copy.family == socket.AF_INET and is_connected_to(copy, peers):
                    checked += 1
                    assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                    assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                    assert copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
                    assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= 65536
                    assert copy.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 65536
    assert checked == 2


def is_connected_to(one: socket.socket, peers: set[object]) -> bool:
    try:
        return one.getpeername() in peers
    except OSError:
        return False


async def test_p33_a_silent_client_is_reset(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forwarder, "_HELLO_TIMEOUT", 0.1)
    proxy = Proxy([forward_without_list(forward_to(remote, check_tls_name=True))])
    async with serving(proxy):
        assert await refuses(proxy)
    assert any(text.endswith("no ClientHello in 0.1 s") for text in caplog.messages)


async def test_p15_a_waiting_client_that_has_gone_is_not_connected(remote: Remote) -> None:
    proxy = Proxy([forward_without_list(forward_to(remote, num_workers=1))])
    async with serving(proxy):
        first, far = await connected(proxy), await accepted(remote)
        gone = await connected(proxy)
        await until(lambda: proxy.status()[0].waiting == 1)
        gone.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await gone.aclose()
        late = await connected(proxy)
        await until(lambda: proxy.status()[0].waiting == 2)
        await first.aclose()
        await far.aclose()
        async with late, await accepted(remote) as next_far:
            await check_exchange(late, next_far)  # and the one that the target saw next is not the one that left


# -- peers with a CID


class VsockEnd(socket.socket):
    """A connection that says that it is AF_VSOCK; what it does is AF_UNIX."""

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_VSOCK


class VsockListener(VsockEnd):
    """A listening socket on CID 3, port 8000; its peers are those of *cids*, one after the other."""

    def __init__(self, path: Path, *cids: int) -> None:
        super().__init__(socket.AF_UNIX)
        self.bind(str(path))
        self.listen()
        self.setblocking(False)
        self._cids = list(cids)

    def getsockname(self) -> tuple[int, int]:
        return 3, 8000

    def accept(self) -> tuple[socket.socket, tuple[int, int]]:
        number, _ = self._accept()  # type: ignore[attr-defined]  # as socket.accept does it
        return VsockEnd(fileno=number), (self._cids.pop(0), 2416615154)


async def test_p18_p29_peers_are_told_apart_by_their_cid(
    remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "v"
    metrics = Metrics()
    forward = forward_to(remote, listen=VsockAddress(3, 8000), allowed_cids=[16, 17], max_connections_per_cid=1)
    inherited = VsockListener(path, 16, 16, 17, 18)
    proxy = Proxy([forward_without_list(forward)], inherited=[inherited], metrics=metrics)
    async with serving(proxy):
        first, far = await trio.open_unix_socket(path), await accepted(remote)
        await check_exchange(first, far)
        async with await trio.open_unix_socket(path) as second:
            await is_cut(second)  # 16 again
        third, third_far = await trio.open_unix_socket(path), await accepted(remote)
        await check_exchange(third, third_far)
        async with await trio.open_unix_socket(path) as fourth:
            await is_cut(fourth)  # 18
        for stream in (first, far, third, third_far):
            await stream.aclose()
        await until(lambda: sum("disconnected" in text for text in caplog.messages) == 2)
    texts = [
        "Bound to cid: 3 port: 8000",
        "Accepted connection on cid: 16 port: 2416615154",
        f"Connected client from cid: 16 port: 2416615154 to 127.0.0.1:{remote.port}",
        "refused cid: 16 port: 2416615154: its CID has as many connections as it may have",
        "refused cid: 18 port: 2416615154: its CID is not allowed",
    ]
    for text in texts:
        assert text in caplog.messages
    assert any(text.startswith("Client on cid: 17 port: 2416615154 disconnected (") for text in caplog.messages)
    shown = generate_latest(metrics.registry).decode()
    labels = 'listener="vsock:3:8000"'
    assert f'vsock_proxy_accepted_total{{cid="16",{labels}}} 2.0' in shown
    assert f'vsock_proxy_refused_total{{cid="16",{labels},reason="peer-connections"}} 1.0' in shown
    assert f'vsock_proxy_refused_total{{cid="18",{labels},reason="peer"}} 1.0' in shown
    assert f'vsock_proxy_bytes_total{{cid="17",direction="up",{labels}}} 3.0' in shown
    assert "2416615154" not in shown


# -- 8 to 14: with a name server of our own


async def test_p08_stale_addresses_are_served(remote: Remote, caplog: pytest.LogCaptureFixture) -> None:
    names = Names("127.0.0.1")
    proxy = Proxy([(forward_to(remote, NAME), decision_for(NAME, remote.port))], lookup=names)
    async with serving(proxy):
        assert await is_served(proxy, remote)
        names.found = None
        proxy.redecide([None])
        await until(lambda: names.asked >= 5)  # goes on trying in the background
        assert await is_served(proxy, remote)
        warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert "going on with 127.0.0.1" in warnings[0].getMessage()
        names.found = ["127.0.0.1"]
        await until(lambda: "kms.example is found again" in caplog.messages)
        proxy.collect()


async def test_p09_it_starts_without_the_name_and_serves_once_it_is_found(remote: Remote) -> None:
    names = Names()
    allow = AllowList((Entry(NAME, remote.port, 1),))
    decision = await decide(allow, NAME, remote.port, None, names)
    assert names.asked == 0
    proxy = Proxy([(forward_to(remote, NAME), decision)], lookup=names)
    async with serving(proxy):
        assert await refuses(proxy)
        names.found = ["127.0.0.1"]
        await until(lambda: proxy.status()[0].candidates == ("127.0.0.1",))
        assert await is_served(proxy, remote)


async def test_p09_p24_p26_the_process_starts_without_the_name(
    remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tmp_path / "allow.yaml"
    config.write_text(f"allowlist: [{{address: {NAME}, port: {remote.port}}}]")
    settings = Settings(forwards=(forward_to(remote, NAME),), allowlist=config)
    done = trio.Event()

    async def run() -> None:
        assert await daemon._Daemon(settings, {}, Names()).run() == 0
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await until(lambda: "Proxy is now in listening state" in caplog.messages)
        os.kill(os.getpid(), signal.SIGTERM)
        with trio.fail_after(DEADLINE):
            await done.wait()


async def test_p24_a_signal_while_it_decides_ends_it(
    remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tmp_path / "allow.yaml"
    config.write_text(f"allowlist: [{{address: {NAME}, port: {remote.port}}}]")
    settings = Settings(forwards=(forward_to(remote, "10.0.0.1"),), allowlist=config)
    names = Names()
    names.held = trio.Event()  # for ever
    done = trio.Event()

    async def run() -> None:
        assert await daemon._Daemon(settings, {}, names).run() == 0
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await until(lambda: names.asked == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        with trio.fail_after(DEADLINE):
            await done.wait()
    assert "SIGTERM: not started yet, stopping" in caplog.messages


async def test_p25_a_refusal_counts_though_another_decision_is_open(
    remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One target whose lookups fail must not hide that another one is not allowed any more."""
    caplog.set_level(logging.INFO)
    config = tmp_path / "allow.yaml"
    config.write_text(f"allowlist: [{{address: {NAME}, port: 1}}, {{address: 127.0.0.1, port: {remote.port}}}]")
    first = Forward(listen=LISTEN, remote_host="10.0.0.1", remote_port=1)
    settings = Settings(forwards=(first, forward_to(remote)), allowlist=config)
    names = Names("10.0.0.1")
    status: list[int] = []

    async def run() -> None:
        status.append(await daemon._Daemon(settings, {}, names).run())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await until(lambda: "Proxy is now in listening state" in caplog.messages)
        names.found = None
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: any("allow list read again" in text for text in caplog.messages))
        assert any("the decision stays as it was" in text for text in caplog.messages)
        config.write_text(f"allowlist: [{{address: {NAME}, port: 1}}]")
        os.kill(os.getpid(), signal.SIGHUP)
        with trio.fail_after(DEADLINE):
            await until(lambda: bool(status))
    assert status == [1]


async def test_p25_a_signal_is_heeded_during_a_slow_reload(
    remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tmp_path / "allow.yaml"
    config.write_text(f"allowlist: [{{address: {NAME}, port: {remote.port}}}]")
    settings = Settings(forwards=(forward_to(remote, "127.0.0.1"),), allowlist=config)
    names = Names("127.0.0.1")
    status: list[int] = []

    async def run() -> None:
        status.append(await daemon._Daemon(settings, {}, names).run())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await until(lambda: "Proxy is now in listening state" in caplog.messages)
        asked, names.held = names.asked, trio.Event()  # for ever
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: names.asked > asked)
        began = trio.current_time()
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: bool(status))
    assert status == [0]
    assert trio.current_time() - began < 5


async def test_p10_addresses_that_do_not_answer_are_passed_over(
    remote: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names = Names("127.0.0.3", "127.0.0.2", "127.0.0.1")  # only the last one listens on that port
    proxy = Proxy([(forward_to(remote, NAME), decision_for(NAME, remote.port))], lookup=names)
    async with serving(proxy):
        assert await is_served(proxy, remote)
        assert await is_served(proxy, remote)
    connections = [text for text in caplog.messages if text.startswith("Connected client from")]
    assert [text.partition(" to ")[2] for text in connections] == [f"127.0.0.1:{remote.port}"] * 2


@pytest.mark.parametrize(("family", "kept"), [(4, ("127.0.0.1",)), (6, ("::1",)), (None, ("127.0.0.1", "::1"))])
async def test_p11_families_of_a_dual_stack_name(remote: Remote, family: int | None, kept: tuple[str, ...]) -> None:
    names = Names("127.0.0.1", "::1")
    allow = AllowList((Entry(NAME, remote.port, 1),))
    decision = await decide(allow, NAME, remote.port, family, names)
    proxy = Proxy([(forward_to(remote, NAME, family=family), decision)], lookup=names)
    async with serving(proxy):
        await until(lambda: proxy.status()[0].candidates == kept)


async def test_p13_a_slow_lookup_is_shared_and_holds_up_no_accept(remote: Remote) -> None:
    names = Names("127.0.0.1")
    names.held = trio.Event()
    proxy = Proxy([(forward_to(remote, NAME), decision_for(NAME, remote.port))], lookup=names)
    async with serving(proxy):
        clients = [await connected(proxy) for _ in range(10)]
        await until(lambda: proxy.status()[0].accepted == 10)
        names.held.set()
        fars = [await accepted(remote) for _ in clients]
        assert names.asked == 1
        for stream in (*clients, *fars):
            await stream.aclose()


async def test_p14_new_addresses_are_held_to_the_list(remote: Remote, caplog: pytest.LogCaptureFixture) -> None:
    names = Names("127.0.0.1")
    allow = AllowList((Entry("127.0.0.1", remote.port, 1),))
    decision = await decide(allow, NAME, remote.port, None, names)
    proxy = Proxy([(forward_to(remote, NAME), decision)], lookup=names)
    async with serving(proxy):
        assert await is_served(proxy, remote)
        names.found = ["127.0.0.2"]
        asked = names.asked
        proxy.redecide([None])
        await until(lambda: names.asked >= asked + 2)
        assert proxy.status()[0].candidates == ("127.0.0.1",)
        assert await is_served(proxy, remote)
    assert any("resolves to 127.0.0.2 now, which is not in the allow list" in text for text in caplog.messages)
