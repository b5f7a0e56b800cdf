"""Connecting to the first of several addresses that answers (P2.6, P2.10, P2.12), over loopback."""

import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from ipaddress import ip_address

import pytest
import trio

from proxy import dial as module
from proxy.dial import dial, prepare_tcp
from proxy.names import IpAddress
from tests.unit.proxy.sockets import no_descriptor_left, pair

V4, V6 = ip_address("127.0.0.1"), ip_address("::1")
SILENT, SECOND, THIRD = ip_address("127.0.0.2"), ip_address("127.0.0.3"), ip_address("127.0.0.4")


class Reports:
    """What `dial` reported."""

    def __init__(self) -> None:
        self.heard: list[tuple[IpAddress, type[OSError] | None]] = []

    def __call__(self, address: IpAddress, exc: OSError | None) -> None:
        self.heard.append((address, None if exc is None else type(exc)))


@pytest.fixture
def report() -> Reports:
    return Reports()


def listen(address: IpAddress, port: int = 0, backlog: int = 16) -> socket.socket:
    listener = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((str(address), port))
    listener.listen(backlog)
    return listener


@contextmanager
def silent(address: IpAddress, port: int) -> Iterator[None]:
    """A listener whose backlog is full: the kernel drops what comes, as a dead host would."""
    with ExitStack() as open_:
        listener = open_.enter_context(listen(address, port, backlog=0))
        filling = open_.enter_context(socket.socket())
        filling.connect(listener.getsockname())
        yield


@asynccontextmanager
async def no_leak() -> AsyncIterator[None]:
    with no_descriptor_left():
        yield
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("address", [V4, V6])
async def test_p10_one_address_that_answers(address: IpAddress, report: Reports) -> None:
    async with no_leak():
        with listen(address) as listener:
            connection, used = await dial([address], listener.getsockname()[1], report=report)
            with connection, listener.accept()[0] as accepted:
                assert used == address
                assert not connection.getblocking()
                assert connection.getpeername()[:2] == listener.getsockname()[:2]
                accepted.send(b"x")
                await trio.lowlevel.wait_readable(connection)
                assert connection.recv(1) == b"x"
    assert report.heard == [(address, None)]


@pytest.mark.parametrize("addresses", [[V4], [V4, V6], [V6, SECOND, V4]])
async def test_p10_all_refused(addresses: list[IpAddress], report: Reports) -> None:
    with listen(V4) as listener:
        port = listener.getsockname()[1]
    began = trio.current_time()
    async with no_leak():
        with pytest.raises(ConnectionRefusedError):
            await dial(addresses, port, report=report)
    assert report.heard == [(address, ConnectionRefusedError) for address in addresses]
    assert trio.current_time() - began < module.STAGGER  # a failure starts the next at once


async def test_p10_no_address_at_all(report: Reports) -> None:
    with pytest.raises(OSError, match="no address"):
        await dial([], 443, report=report)


async def test_p10_a_refusal_leads_to_the_next_family_at_once(report: Reports) -> None:
    async with no_leak():
        with listen(V6) as listener:
            connection, used = await dial([V4, V6], listener.getsockname()[1], report=report)
            connection.close()
    assert used == V6
    assert report.heard == [(V4, ConnectionRefusedError), (V6, None)]


async def test_p10_a_first_address_that_never_answers_is_overtaken_and_reported(report: Reports) -> None:
    async with no_leak():
        with listen(SECOND) as listener:
            port = listener.getsockname()[1]
            with silent(SILENT, port):
                began = trio.current_time()
                connection, used = await dial([SILENT, SECOND, THIRD], port, report=report)
                connection.close()
    assert used == SECOND
    assert module.STAGGER <= trio.current_time() - began < 5
    assert report.heard == [(SECOND, None), (SILENT, TimeoutError)]


async def test_p10_a_slow_first_address_wins_if_it_answers_first(
    report: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It isn't given up when the second is started, and those behind it are not blamed."""
    real, started = module._connect, []

    async def slow(address: IpAddress, port: int) -> socket.socket:
        started.append(address)
        if address == V4:
            while len(started) < 2:
                await trio.lowlevel.checkpoint()
        return await real(address, port)

    monkeypatch.setattr(module, "_connect", slow)
    async with no_leak():
        with listen(V4) as listener:
            port = listener.getsockname()[1]
            with silent(SILENT, port):
                connection, used = await dial([V4, SILENT], port, report=report)
                connection.close()
    assert (used, started) == (V4, [V4, SILENT])
    assert report.heard == [(V4, None)]


async def test_p10_of_two_that_answer_at_once_one_is_kept(report: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ready = module._connect, trio.Event()

    async def together(address: IpAddress, port: int) -> socket.socket:
        with trio.CancelScope(shield=True):
            connection = await real(address, port)
            if address == SECOND:
                ready.set()
            await ready.wait()
            for _ in range(5 * (address == V4)):  # so that it is the later of the two
                await trio.lowlevel.checkpoint()
        return connection

    monkeypatch.setattr(module, "_connect", together)
    async with no_leak():
        with listen(V4) as listener, listen(SECOND, listener.getsockname()[1]):
            connection, used = await dial([V4, SECOND], listener.getsockname()[1], report=report)
            connection.close()
    assert used == SECOND
    assert sorted(report.heard, key=str) == [(V4, None), (SECOND, None)]


@pytest.mark.parametrize("addresses", [[SILENT], [SILENT, SECOND], [V4, SILENT]])
async def test_p12_the_deadline_is_the_callers(addresses: list[IpAddress], report: Reports) -> None:
    with listen(THIRD) as listener:
        port = listener.getsockname()[1]
    async with no_leak():
        with silent(SILENT, port), silent(SECOND, port), pytest.raises(trio.TooSlowError), trio.fail_after(0.6):
            await dial(addresses, port, report=report)
    assert [address for address, _ in report.heard] == [address for address in addresses if address == V4]


@pytest.mark.parametrize("moment", range(12))
@pytest.mark.parametrize("addresses", [[V4], [V4, SECOND], [SILENT, V4], [V6, V4]])
async def test_cancelled_at_any_moment_no_socket_leaks(
    addresses: list[IpAddress], moment: int, report: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STAGGER", 0.001)
    async with no_leak():
        with listen(V4) as listener, listen(SECOND, listener.getsockname()[1]):
            port = listener.getsockname()[1]
            found: list[socket.socket] = []

            async def dialling() -> None:
                with scope:
                    found.append((await dial(addresses, port, report=report))[0])

            with silent(SILENT, port):
                async with trio.open_nursery() as nursery:
                    scope = trio.CancelScope()
                    nursery.start_soon(dialling)
                    for _ in range(moment):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            for connection in found:
                connection.close()


async def test_cancelled_in_the_moment_of_success_the_socket_is_closed(
    report: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._connect
    scope = trio.CancelScope()

    async def connect_and_cancel(address: IpAddress, port: int) -> socket.socket:
        connection = await real(address, port)
        scope.cancel()
        return connection

    monkeypatch.setattr(module, "_connect", connect_and_cancel)
    async with no_leak():
        with listen(V4) as listener, scope:
            await dial([V4, V6], listener.getsockname()[1], report=report)
    assert scope.cancelled_caught


async def test_p16_no_descriptor_is_an_error_that_says_so(report: Reports, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socket", none_left)
    with pytest.raises(OSError, match="Too many open files") as caught:
        await dial([V4, V6], 443, report=report)
    assert caught.value.errno == errno.EMFILE


def test_p06_tcp_options() -> None:
    ends = pair("tcp")
    for end in ends:
        prepare_tcp(end)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        prepare_tcp(end)
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 64 * 1024
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= 64 * 1024
        end.close()


async def test_p06_what_is_dialled_is_prepared(report: Reports) -> None:
    with listen(V4) as listener:
        connection, _ = await dial([V4], listener.getsockname()[1], report=report)
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_prepare_tcp_leaves_other_sockets_alone_and_dead_ones_too() -> None:
    for end in pair("unix"):
        prepare_tcp(end)
        end.close()
    near, far = pair("tcp")
    far.close()
    near.close()
    prepare_tcp(near)
