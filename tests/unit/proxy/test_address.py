"""Addresses (P3.4) and hybrid vsock as a client and as the host's listener (P3.1, P3.2), with a fake device."""

import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from proxy import address as module
from proxy.address import (
    HANDSHAKE_TIMEOUT,
    VSOCK_ANY,
    AddressError,
    TcpAddress,
    UnixAddress,
    VsockAddress,
    connect,
    listen,
    listen_unix,
    parse,
    remove,
)
from tests.unit.proxy.sockets import no_descriptor_left

UINT32 = 2**32 - 1

# -- P3.4 the text


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("vsock:16:5000", VsockAddress(16, 5000)),
        ("vsock:any:8000", VsockAddress(VSOCK_ANY, 8000)),
        ("vsock:host:8000", VsockAddress(2, 8000)),
        ("vsock:local:8000", VsockAddress(1, 8000)),
        ("vsock:4294967295:4294967295", VsockAddress(UINT32, UINT32)),
        ("vsock:003:0", VsockAddress(3, 0)),
        ("unix:/run/v.sock:5000", UnixAddress("/run/v.sock", 5000)),
        ("unix:a:b:5000", UnixAddress("a:b", 5000)),
        ("unix:\udcff:1", UnixAddress("\udcff", 1)),  # a byte that is no UTF-8, as Python gives it from argv
        ("tcp:127.0.0.1:80", TcpAddress("127.0.0.1", 80)),
        ("tcp:localhost:65535", TcpAddress("localhost", 65535)),
        ("tcp:[::1]:80", TcpAddress("::1", 80)),
        ("tcp:::1:80", TcpAddress("::1", 80)),
    ],
)
def test_what_an_address_is(text: str, address: module.Address) -> None:
    assert parse(text) == address
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "::",
        "vsock",
        "vsock:1",
        "vsock::1",
        "vsock:1:",
        "vsock:-1:1",
        "vsock:+1:1",
        "vsock:1 :1",
        "vsock:١:1",
        "vsock:ANY:1",
        "vsock:0x10:1",
        "vsock:4294967296:1",
        "vsock:1:4294967296",
        "vsock:1_0:1",
        f"vsock:{'9' * 5000}:1",
        f"vsock:1:{'9' * 5000}",
        f"tcp:a:{'9' * 5000}",
        "VSOCK:1:1",
        "http://a:80",
        "tcp:a:65536",
        "tcp::80",
        "tcp:[]:80",
        "tcp:[::1:80",
        "tcp:a b:80",
        "tcp:a\0:80",
        "tcp:127.1:80",
        f"tcp:{'a' * 300}:80",
        "unix::1",
        "unix:a\0b:1",
        "unix:\ud800:1",
        f"unix:/{'a' * 106}:1",
        "unix:/a:x",
    ],
)
def test_what_an_address_is_not(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse(text)
    assert "expected" in str(caught.value) or repr(text) in str(caught.value)


@given(st.text(max_size=30) | st.tuples(st.sampled_from(["vsock", "unix", "tcp"]), st.text(max_size=20)).map(":".join))
def test_any_text_is_an_address_or_the_documented_error(text: str) -> None:
    try:
        address = parse(text)
    except AddressError:
        return
    assert parse(str(address)) == address


def test_the_longest_path() -> None:
    longest = "a" * (module.MAX_UNIX_PATH - 2)
    assert parse(f"unix:{longest}:1") == UnixAddress(longest, 1)
    with pytest.raises(AddressError, match="at most 107 bytes"):
        parse(f"unix:{longest}:10")


# -- P3.1 the client


class FakeDevice:
    """The host's socket of a hybrid vsock device: keeps what each read gave, and answers with what the test says."""

    def __init__(self, answer: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
        self.reads: list[bytes] = []
        self._answer = answer

    async def serve(self, listener: trio.SocketListener) -> None:
        await trio.serve_listeners(self._greet, [listener])

    async def _greet(self, stream: trio.SocketStream) -> None:
        self.reads.append(bytes(await stream.receive_some(1000)))
        await self._answer(stream)
        await stream.aclose()


@asynccontextmanager
async def device(base: Path, answer: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[FakeDevice]:
    fake = FakeDevice(answer)
    async with await listen_unix(str(base), mode=0o600) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(fake.serve, listener)
        yield fake
        nursery.cancel_scope.cancel()


def saying(*pieces: bytes) -> Callable[[trio.SocketStream], Awaitable[None]]:
    async def answer(stream: trio.SocketStream) -> None:
        for piece in pieces:
            await stream.send_all(piece)
            await trio.lowlevel.checkpoint()

    return answer


@pytest.mark.parametrize(
    "pieces",
    [
        [b"OK 1073741824\n"],
        [b"OK 5000\npayload"],  # vhost-device-vsock says the port that was asked for
        [b"O", b"K", b" ", b"1", b"\n", b"payload"],
        [b"OK " + b"9" * 60 + b"\n"],  # 64 bytes
    ],
)
async def test_p3_1_connect_sends_one_line_and_reads_no_byte_too_many(tmp_path: Path, pieces: list[bytes]) -> None:
    base = tmp_path / "v.sock"
    async with device(base, saying(*pieces)) as fake, await connect(UnixAddress(str(base), 5000)) as stream:
        assert fake.reads == [b"CONNECT 5000\n"]  # in one write, and no payload with it
        assert b"".join([chunk async for chunk in stream]) == b"".join(pieces).partition(b"\n")[2]


@pytest.mark.parametrize(
    "line",
    [
        b"OK\n",
        b"OK \n",
        b"OK x\n",
        b"OK -1\n",
        b"OK 1 2\n",
        b"OK 1\r\n",
        b"ok 1\n",
        b"\n",
        b"OK  1\n",
        b"NO 1\n",
        b"OK " + b"9" * 61 + b"\n",  # 65 bytes
        b"x" * 1000,
    ],
)
async def test_p3_1_another_answer_is_an_error_that_shows_it(tmp_path: Path, line: bytes) -> None:
    base = tmp_path / "v.sock"
    with no_descriptor_left():
        async with device(base, saying(line)):
            with pytest.raises(ConnectionError, match="unexpected answer to CONNECT 7") as caught:
                await connect(UnixAddress(str(base), 7))
    assert caught.value.errno == errno.EPROTO
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("sent", [b"", b"OK", b"OK 1"])
async def test_p3_1_closed_before_the_line_is_refused(tmp_path: Path, sent: bytes) -> None:
    base = tmp_path / "v.sock"
    with no_descriptor_left():
        async with device(base, saying(sent) if sent else saying()):
            with pytest.raises(ConnectionRefusedError, match="nobody listens on port 7 of the guest"):
                await connect(UnixAddress(str(base), 7))


async def test_p3_1_closed_with_the_line_unread_is_refused(tmp_path: Path) -> None:
    """As Firecracker does when all its 1,023 connections are taken: the client sees a reset."""
    base = str(tmp_path / "v.sock")
    with no_descriptor_left():
        async with await listen_unix(base, mode=0o600) as listener, trio.open_nursery() as nursery:

            async def close_at_once() -> None:
                async with await listener.accept() as stream:
                    await trio.lowlevel.wait_readable(stream.socket)

            nursery.start_soon(close_at_once)
            with pytest.raises(ConnectionRefusedError, match="nobody listens on port 7"):
                await connect(UnixAddress(base, 7))


async def test_p3_1_no_device(tmp_path: Path) -> None:
    base = tmp_path / "v.sock"
    with pytest.raises(FileNotFoundError, match=r"v\.sock"):
        await connect(UnixAddress(str(base), 7))
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(base))
    left_behind.close()
    with pytest.raises(ConnectionRefusedError, match=r"v\.sock"):
        await connect(UnixAddress(str(base), 7))


async def test_p3_1_no_answer_within_five_seconds(tmp_path: Path, mock_clock: MockClock) -> None:
    base = tmp_path / "v.sock"

    async def wait_for_ever(_: trio.SocketStream) -> None:
        mock_clock.jump(HANDSHAKE_TIMEOUT - 0.1)
        await trio.lowlevel.checkpoint()
        mock_clock.jump(0.2)
        await trio.sleep_forever()

    with no_descriptor_left():
        async with device(base, wait_for_ever):
            with pytest.raises(TimeoutError, match="no answer to CONNECT 7 within 5 s"):
                await connect(UnixAddress(str(base), 7))


async def test_p3_1_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    """Trio's own `connect` would take the EAGAIN for success, and fail later with an odd error."""
    base = tmp_path / "v.sock"
    with no_descriptor_left(), socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(base))
        listener.listen(0)
        first.connect(str(base))
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.1):
            await connect(UnixAddress(str(base), 7))
        async with trio.open_nursery() as nursery:

            async def accept_both() -> None:
                with listener.accept()[0]:
                    listener.setblocking(False)
                    await trio.lowlevel.wait_readable(listener)
                    with listener.accept()[0] as second:
                        second.send(b"OK 1\n")

            nursery.start_soon(accept_both)
            with trio.fail_after(5):
                stream = await connect(UnixAddress(str(base), 7))
            await stream.aclose()


@pytest.mark.parametrize("moment", range(12))
async def test_p3_1_cancelled_at_any_moment_nothing_leaks(tmp_path: Path, moment: int) -> None:
    base = tmp_path / "v.sock"
    with no_descriptor_left():
        async with device(base, saying(b"OK ", b"1", b"\n")), trio.open_nursery() as nursery:

            async def connecting() -> None:
                async with await connect(UnixAddress(str(base), 7)):
                    pass

            nursery.start_soon(connecting)
            for _ in range(moment):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()


# -- P3.2 the host's listener


async def test_p3_2_the_hosts_listener_stands_at_base_and_port_with_mode_0660(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        [listener] = await listen(UnixAddress(str(tmp_path / "v.sock"), 8000))
        assert os.umask(0o022) == 0o022  # as it was
    finally:
        os.umask(before)
    path = tmp_path / "v.sock_8000"
    async with listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with socket.socket(socket.AF_UNIX) as guest:
            guest.connect(str(path))
            guest.send(b"raw bytes from the first one")
            async with await listener.accept() as stream:
                assert await stream.receive_some(100) == b"raw bytes from the first one"
    remove(str(path))
    remove(str(path))
    assert not path.exists()


async def test_p3_2_a_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    for _ in range(2):
        async with await listen_unix(path, mode=0o600):
            pass  # closed, and not removed
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


@pytest.mark.parametrize("full", [False, True])
async def test_p3_2_a_socket_that_answers_is_in_use(tmp_path: Path, full: bool) -> None:
    path = str(tmp_path / "s")
    with no_descriptor_left(), socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
        other.bind(path)
        other.listen(0)
        if full:
            client.connect(path)
        with pytest.raises(OSError, match="another process listens there") as caught:
            await listen_unix(path, mode=0o600)
        assert caught.value.errno == errno.EADDRINUSE
        assert Path(path).exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link", "link to a socket"])
async def test_p3_2_what_is_no_socket_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "link":
            path.symlink_to(tmp_path / "nowhere")
        case _:
            (await listen_unix(str(tmp_path / "real"), mode=0o600)).socket.close()
            path.symlink_to(tmp_path / "real")
    with no_descriptor_left(), pytest.raises(FileExistsError, match="not replaced"):
        await listen_unix(str(path), mode=0o600)
    assert os.path.lexists(path)


async def test_p3_2_no_such_directory_and_a_path_too_long(tmp_path: Path) -> None:
    with no_descriptor_left():
        with pytest.raises(FileNotFoundError):
            await listen_unix(str(tmp_path / "no" / "s"), mode=0o600)
        with pytest.raises(OSError, match="too long"):
            await listen_unix(str(tmp_path / ("s" * 200)), mode=0o600)


async def test_tcp_both_ways() -> None:
    [listener] = await listen(TcpAddress("127.0.0.1", 0))
    async with listener:
        port = listener.socket.getsockname()[1]
        async with await connect(TcpAddress("127.0.0.1", port)) as near, await listener.accept() as far:
            await near.send_all(b"x")
            assert await far.receive_some(1) == b"x"
    with pytest.raises(OSError, match=r"."):
        await connect(TcpAddress("127.0.0.1", port))
