"""The data path over real sockets: half-close, reset, back pressure, limits, and what happens where splice can't.

The stream points also run over AF_VSOCK where the environment says PROXY_TEST_VSOCK=1 (in a guest that has it).
"""

import array
import errno
import fcntl
import hashlib
import math
import os
import random
import resource
import select
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import MockClock

from proxy import splice
from proxy.splice import Ended, Pump, Reason, Relay, Times, close
from tests.unit.proxy.sockets import FAMILIES, Rig, all_descriptors, no_descriptor_left, pair, reset, rig

MIB = 1024 * 1024
BOTH = [(client, "tcp") for client in FAMILIES] + [("tcp", "unix"), ("unix", "unix")]
both_families = pytest.mark.parametrize(("client", "target"), BOTH)


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


async def read_all(peer: trio.SocketStream) -> bytes:
    data = bytearray()
    async for chunk in peer:
        data += chunk
    return bytes(data)


async def expect_all(peer: trio.SocketStream, data: bytes) -> None:
    assert await read_all(peer) == data


async def expect_reset(peer: trio.SocketStream) -> bytes:
    """What comes before the reset."""
    data = bytearray()
    with pytest.raises(trio.BrokenResourceError) as caught:
        await collect(peer, data)
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    return bytes(data)


async def collect(peer: trio.SocketStream, data: bytearray) -> None:
    while chunk := await peer.receive_some():
        data += chunk


async def send_for_ever(peer: trio.SocketStream, size: int = 50_000) -> None:
    while True:
        await peer.send_all(bytes(size))


async def read_exactly(peer: trio.SocketStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = await peer.receive_some(size - len(data))
        assert chunk
        data += chunk
    return bytes(data)


async def echo_once(made: Rig, size: int = 1) -> None:
    """Wait until the relay works both ways."""
    await made.client.send_all(b"?" * size)
    assert await read_exactly(made.target, size) == b"?" * size
    await made.target.send_all(b"!" * size)
    assert await read_exactly(made.client, size) == b"!" * size


# -- P2.1 half-close


@both_families
async def test_p01_half_close_of_the_client_lets_the_whole_answer_through(client: str, target: str) -> None:
    answer = content(MIB)
    async with rig(client, target) as made:
        await made.client.send_all(b"request")
        await made.client.send_eof()
        assert await read_all(made.target) == b"request"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_all, made.client, answer)
            await made.target.send_all(answer)
            await made.target.aclose()
        ended = await made.ended()
    assert (ended.reason, ended.first, ended.up, ended.down) == (Reason.CLOSED, "client", 7, MIB)


@both_families
async def test_p01_half_close_of_the_target_lets_the_client_go_on(client: str, target: str) -> None:
    rest = content(MIB)
    async with rig(client, target) as made:
        await made.target.send_all(b"greeting")
        await made.target.send_eof()
        assert await read_all(made.client) == b"greeting"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_all, made.target, rest)
            await made.client.send_all(rest)
            await made.client.send_eof()
        ended = await made.ended()
    assert (ended.reason, ended.first, ended.up, ended.down) == (Reason.CLOSED, "target", MIB, 8)


@both_families
async def test_p01_end_of_file_that_is_there_at_the_start(client: str, target: str) -> None:
    async with rig(client, target, start=False) as made:
        await made.client.send_all(b"all of it")
        await made.client.send_eof()
        await made.target.send_eof()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.relay_until_end, Times(), b"early, ")
            assert await read_all(made.target) == b"early, all of it"
            assert await read_all(made.client) == b""
        ended = await made.ended()
    assert (ended.reason, ended.up, ended.down) == (Reason.CLOSED, 16, 0)


# -- P2.2 reset


@pytest.mark.parametrize("size", [0, 10_000])
async def test_p02_reset_of_the_target_reaches_the_client_as_a_reset(size: int) -> None:
    """And what came before it reaches the client before it, as it would without the proxy."""
    async with rig() as made:
        await echo_once(made)
        made.target.socket._sock.send(bytes(size))  # type: ignore[attr-defined]  # at once, without a checkpoint
        reset(made.target)
        assert await expect_reset(made.client) == bytes(size)
        ended = await made.ended()
    assert (ended.reason, ended.first, ended.down) == (Reason.RESET, "target", size + 1)
    assert ended.detail == os.strerror(errno.ECONNRESET)


async def test_p02_reset_in_the_middle_of_a_download() -> None:
    async with rig() as made:
        async with trio.open_nursery() as nursery:

            async def send_until_cut() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await send_for_ever(made.target)

            nursery.start_soon(send_until_cut)
            await read_exactly(made.client, 4 * MIB)
            made.target.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await made.target.aclose()
            await expect_reset(made.client)
        assert (await made.ended()).reason is Reason.RESET
        assert made.pump._pipes.open == 0


@pytest.mark.parametrize("half_closed", [False, True])
async def test_p02_reset_of_the_client_reaches_the_target(half_closed: bool) -> None:
    async with rig() as made:
        await echo_once(made)
        if half_closed:
            await made.client.send_eof()
            assert await read_all(made.target) == b""
            await made.target.send_all(b"more")
            assert await read_exactly(made.client, 4) == b"more"
        reset(made.client)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await send_for_ever(made.target, 1)  # after the end of file, a reset shows in what is sent only
        assert isinstance(caught.value.__cause__, ConnectionResetError | BrokenPipeError)
        ended = await made.ended()
    assert (ended.reason, ended.first) == (Reason.RESET, "client")


async def test_p02_reset_that_a_send_finds_is_ascribed_to_the_side_it_came_from() -> None:
    async with rig(start=False) as made:
        reset(made.target)
        made.client.socket._sock.send(b"x")  # type: ignore[attr-defined]
        relay = made_by_hand(made)
        assert not relay.ready(made.client_end, select.EPOLLIN, 0.0)
        assert relay.ended is not None
        assert (relay.ended.reason, relay.ended.first) == (Reason.RESET, "target")
        await expect_reset(made.client)


def made_by_hand(made: Rig) -> Relay:
    """A relay that the test drives."""
    return Relay(
        made.client_end,
        made.target_end,
        times=Times(),
        pipes=made.pump._pipes,
        scratch=made.pump._scratch,
        early=b"",
        on_end=lambda _: None,
    )


async def test_p02_both_ends_are_reset_before_the_start() -> None:
    async with rig(start=False) as made:
        reset(made.client)
        reset(made.target)
        with no_more_of(made):
            await made.relay_until_end(Times(), b"early")
        ended = await made.ended()
    assert ended.reason is Reason.RESET


@contextmanager
def no_more_of(made: Rig) -> Iterator[None]:
    """Both ends are closed in the end, and nothing is left in the pump."""
    yield
    assert made.client_end.fileno() == made.target_end.fileno() == -1
    assert made.pump._pipes.open == 0
    assert not made.pump.relays


@pytest.mark.parametrize("client", [family for family in FAMILIES if family != "tcp"])
async def test_p02_what_unix_and_vsock_can_tell_of_a_reset(client: str) -> None:
    """No ECONNRESET, but the way back is closed at the end of file; after a half-close it is open."""
    async with rig(client, "tcp") as made:
        await echo_once(made)
        reset(made.target)
        assert await read_all(made.client) == b""
        with pytest.raises(BrokenPipeError):
            made.client.socket._sock.send(b"")  # type: ignore[attr-defined]
        assert (await made.ended()).reason is Reason.RESET
    async with rig(client, "tcp") as made:
        await made.target.send_eof()
        assert await read_all(made.client) == b""
        assert made.client.socket._sock.send(b"") == 0  # type: ignore[attr-defined]


async def test_p02_unix_sees_a_reset_if_what_it_sent_was_not_read() -> None:
    async with rig("unix", "tcp") as made:
        await echo_once(made)
        await fill(made.client, made)
        reset(made.target)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await read_all(made.client)
        assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_p02_reset_of_a_vsock_socket_closes_it_though_python_takes_no_struct_for_it() -> None:
    class VsockLike(socket.socket):
        family = socket.AF_VSOCK

        def setsockopt(self, *args: object) -> None:
            if not isinstance(args[2], int):
                raise TypeError("setsockopt() argument 3 must be int, not bytes")  # as CPython does for AF_VSOCK

    near, far = socket.socketpair()
    end = VsockLike(fileno=near.detach())
    close(end, reset=True)
    assert end.fileno() == -1
    assert far.recv(1) == b""
    far.close()


def test_close_twice_and_close_of_a_dead_connection_are_no_error() -> None:
    for is_reset in (True, False):
        near, far = pair("tcp")
        close(far, reset=True)
        close(near, reset=is_reset)
        close(near, reset=is_reset)
        assert near.fileno() == -1


@pytest.mark.parametrize("target", [family for family in FAMILIES if family != "tcp"])
async def test_p02_a_peer_that_goes_away_while_its_window_is_full_is_noticed(target: str) -> None:
    async with rig("tcp", target) as made:
        await echo_once(made)
        await fill(made.client, made)
        assert made.relay is not None
        assert made.relay._up.pending or made.relay._up.in_pipe
        made.target.socket._sock.send(b"tail")  # type: ignore[attr-defined]  # and with something left to read
        made.target.socket.close()
        ended = await made.ended()
    assert (ended.reason, ended.first) == (Reason.RESET, "target")


# -- P2.3 back pressure


def shrink(*ends: socket.socket) -> None:
    for end in ends:
        if end.family != socket.AF_VSOCK:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)


async def fill(peer: trio.SocketStream, made: Rig) -> int:
    """Send until the relay takes no more; returns how much it took."""
    sent, idle = 0, 0
    while idle < 200:  # turns of the loop without room
        try:
            sent += peer.socket._sock.send(bytes(64 * 1024))  # type: ignore[attr-defined]
            idle = 0
        except BlockingIOError:
            idle += 1
        await trio.lowlevel.checkpoint()
    assert made.relay is not None
    return sent


@both_families
async def test_p03_a_peer_that_stops_reading_blocks_its_own_direction_only(client: str, target: str) -> None:
    download = content(3 * MIB)
    async with rig(client, target) as made:
        await echo_once(made)
        sent = await fill(made.client, made)
        assert sent < 24 * MIB  # the sockets' own buffers, and a pipe
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_exactly, made.client, len(download))
            await made.target.send_all(download)
        assert len(await read_exactly(made.target, sent)) == sent
        await echo_once(made)


@both_families
async def test_p03_memory_is_bounded_and_both_windows_full_at_once_are_no_deadlock(client: str, target: str) -> None:
    async with rig(client, target) as made:
        shrink(made.client_end, made.target_end)
        await echo_once(made)
        assert made.relay is not None
        directions, up, down = (made.relay._up, made.relay._down), 0, 0
        while not all(direction.pending or direction.in_pipe for direction in directions):
            up += await fill(made.client, made)
            down += await fill(made.target, made)
        for direction in directions:
            assert len(direction.pending) <= splice.PIECE
            assert direction.in_pipe <= splice._PIPE_SIZE
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_exactly, made.target, up)
            nursery.start_soon(read_exactly, made.client, down)
        await echo_once(made)
        for direction in directions:
            assert direction.pending.obj == b""  # nothing holds the buffer


async def send_in_pieces(peer: trio.SocketStream, data: bytes, rng: random.Random) -> None:
    at = 0
    while at < len(data):
        size = rng.choice([1, 100, 1448, 4096, 65_536, 300_000])
        await peer.send_all(data[at : at + size])
        at += size
        for _ in range(rng.choice([0, 0, 0, 3, 30])):
            await trio.lowlevel.checkpoint()
    await peer.send_eof()


async def receive_in_pieces(peer: trio.SocketStream, digest: str, rng: random.Random) -> None:
    found = hashlib.sha256()
    while chunk := await peer.receive_some(rng.choice([100, 4096, 65_536, 300_000])):
        found.update(chunk)
        for _ in range(rng.choice([0, 0, 0, 3, 30])):
            await trio.lowlevel.checkpoint()
    assert found.hexdigest() == digest


async def exchange(made: Rig, up: bytes, down: bytes, seed: int = 1) -> Ended:
    """Send both ways at once, in random pieces with random pauses, and check what arrives."""
    async with trio.open_nursery() as nursery:
        for number, (source, sink, data) in enumerate(
            ((made.client, made.target, up), (made.target, made.client, down))
        ):
            digest = hashlib.sha256(data).hexdigest()
            nursery.start_soon(send_in_pieces, source, data, random.Random(4 * seed + number))
            nursery.start_soon(receive_in_pieces, sink, digest, random.Random(4 * seed + number + 2))
    ended = await made.ended()
    assert (ended.reason, ended.up, ended.down) == (Reason.CLOSED, len(up), len(down))
    assert made.pump._pipes.open == 0
    return ended


@both_families
@pytest.mark.parametrize("seed", range(4))
async def test_p03_megabytes_both_ways_through_random_back_pressure(client: str, target: str, seed: int) -> None:
    """An event lost is a hang, a byte lost or repeated another hash."""
    with no_descriptor_left():
        async with rig(client, target) as made:
            if seed % 2:
                shrink(made.client_end, made.target_end)
            await exchange(made, content(3 * MIB + seed), content(2 * MIB - seed), seed)


@pytest.fixture
def spliced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes the data path splice from the first full piece; records each call's count."""
    counts: list[int] = []
    real = os.splice

    def counting(*args: int, **options: int) -> int:
        count = real(*args, **options)
        counts.append(count)
        return count

    monkeypatch.setattr(os, "splice", counting)
    monkeypatch.setattr(splice, "_BULK", 1)
    return counts


@both_families
async def test_bulk_is_spliced(client: str, target: str, spliced: list[int]) -> None:
    async with rig(client, target) as made:
        await exchange(made, content(4 * MIB), b"", 7)
    assert sum(spliced) > 2 * MIB  # twice what goes through the pipe


async def test_small_messages_take_no_pipe(spliced: list[int]) -> None:
    async with rig() as made:
        for _ in range(50):
            await echo_once(made, 1000)
        assert made.pump._pipes.open == 0
    assert spliced == []


# -- where splice can't


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
@pytest.mark.parametrize("refused", ["source", "sink"])
@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_splice_refused_in_the_middle_of_the_stream(
    monkeypatch: pytest.MonkeyPatch, spliced: list[int], family: str, refused: str, after: int, number: int
) -> None:
    real, calls = os.splice, 0

    def refusing(source: int, sink: int, count: int, *, flags: int) -> int:
        nonlocal calls
        from_pipe = stat.S_ISFIFO(os.fstat(source).st_mode)
        if from_pipe == (refused == "sink"):
            calls += 1
            if calls > after:
                raise OSError(number, os.strerror(number))
        return real(source, sink, min(count, 100_000) if from_pipe else count, flags=flags)

    monkeypatch.setattr(os, "splice", refusing)
    async with rig(family, family) as made:
        await exchange(made, content(3 * MIB), content(2 * MIB), after)
    assert 0 < calls <= 2 * (after + 1)  # each direction asks once more than it was let, and never again


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_no_pipe_to_be_had(monkeypatch: pytest.MonkeyPatch, spliced: list[int], number: int) -> None:
    asked = 0

    def none_left(flags: int) -> tuple[int, int]:
        nonlocal asked
        asked += 1
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pipe2", none_left)
    async with rig() as made:
        await exchange(made, content(6 * MIB), content(MIB))
    assert spliced == []
    assert 1 <= asked <= 8  # not for every piece


async def test_no_large_pipe_to_be_had(monkeypatch: pytest.MonkeyPatch, spliced: list[int]) -> None:
    def refused(*_: int) -> int:
        raise PermissionError(errno.EPERM, "the user's share of pipe memory is used up")

    monkeypatch.setattr(fcntl, "fcntl", refused)
    with no_descriptor_left():
        async with rig() as made:
            await exchange(made, content(3 * MIB), content(MIB))
    assert spliced == []


async def test_p05_pipes_leave_descriptors_for_connections(monkeypatch: pytest.MonkeyPatch, spliced: list[int]) -> None:
    monkeypatch.setattr(splice, "_MAX_PIPES", 1)
    most = 0
    async with rig() as made:
        real = made.pump._pipes.take

        def watching() -> tuple[int, int] | None:
            nonlocal most
            pipe = real()
            most = max(most, made.pump._pipes.open)
            return pipe

        monkeypatch.setattr(made.pump._pipes, "take", watching)
        await exchange(made, content(4 * MIB), content(4 * MIB))
    assert most == 1
    assert spliced


def test_p05_pipes_take_an_eighth_of_the_descriptors_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    pipes = splice._Pipes()
    taken = [pipes.take() for _ in range(5)]
    assert taken[4] is None
    for pipe in taken[:4]:
        assert pipe is not None
        pipes.close(pipe)
    assert pipes.open == 0


async def test_a_pipe_is_given_back_when_the_bulk_is_over(mock_clock: MockClock, spliced: list[int]) -> None:
    async with rig(limit=math.inf) as made:
        data = content(4 * MIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_exactly, made.target, len(data))
            await made.client.send_all(data)
        assert made.pump._pipes.open == 1
        mock_clock.jump(2.5)
        while made.pump._pipes.open:
            await trio.lowlevel.checkpoint()
        await echo_once(made, 3000)


# -- what stops a read before its time


async def test_urgent_data_of_tcp_holds_nothing_up(spliced: list[int]) -> None:
    """The urgent byte itself is out of band and lost, as with every proxy; `splice` would never get past it."""
    data = content(2 * MIB)
    async with rig() as made, trio.open_nursery() as nursery:
        nursery.start_soon(expect_all, made.target, 2 * data + b"end")
        await made.client.send_all(data)
        while True:
            try:
                made.client.socket._sock.send(b"!", socket.MSG_OOB)  # type: ignore[attr-defined]
                break
            except BlockingIOError:
                await trio.lowlevel.checkpoint()
        await made.client.send_all(data)
        await made.client.send_all(b"end")
        await made.client.send_eof()


async def test_urgent_data_between_two_small_messages() -> None:
    async with rig(start=False) as made:
        raw = made.client.socket._sock  # type: ignore[attr-defined]
        raw.send(b"before")
        raw.send(b"!", socket.MSG_OOB)
        raw.send(b"after")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.relay_until_end, Times(), b"")
            assert await read_exactly(made.target, 11) == b"beforeafter"
            nursery.cancel_scope.cancel()


async def test_descriptors_passed_along_hold_nothing_up_and_are_not_kept() -> None:
    with no_descriptor_left():
        async with rig("unix", "tcp", start=False) as made:
            raw = made.client.socket._sock  # type: ignore[attr-defined]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
            raw.sendmsg([b"with"], rights)
            raw.send(b"without")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(made.relay_until_end, Times(), b"")
                assert await read_exactly(made.target, 11) == b"withwithout"
                nursery.cancel_scope.cancel()


# -- P2.4 and P2.17 limits


async def after(clock: MockClock, seconds: float, made: Rig) -> bool:
    """Whether the relay has ended *seconds* later."""
    clock.jump(seconds)
    for _ in range(20):
        await trio.lowlevel.checkpoint()
    assert made.relay is not None
    return made.relay.ended is not None


async def test_p04_a_half_closed_connection_has_a_limit_of_its_own(mock_clock: MockClock) -> None:
    async with rig(times=Times(idle=600, half_closed=60), limit=math.inf) as made:
        await echo_once(made)
        assert not await after(mock_clock, 300, made)
        await made.client.send_eof()
        assert await read_all(made.target) == b""
        assert not await after(mock_clock, 59, made)
        await made.target.send_all(b"x")
        assert await read_exactly(made.client, 1) == b"x"
        assert not await after(mock_clock, 59, made)
        assert await after(mock_clock, 3, made)
        ended = await made.ended()
        await expect_reset(made.client)
    assert (ended.reason, ended.first) == (Reason.HALF_CLOSED, "client")


async def test_p17_a_connection_without_bytes_ends(mock_clock: MockClock) -> None:
    async with rig(times=Times(idle=600), limit=math.inf) as made:
        await echo_once(made)
        assert not await after(mock_clock, 599, made)
        await echo_once(made)
        assert not await after(mock_clock, 599, made)
        assert await after(mock_clock, 3, made)
        assert (await made.ended()).reason is Reason.IDLE
        await expect_reset(made.client)
        await expect_reset(made.target)


async def test_p17_the_idle_time_holds_for_a_half_closed_connection_too(mock_clock: MockClock) -> None:
    async with rig(times=Times(idle=30, half_closed=0), limit=math.inf) as made:
        await made.client.send_eof()
        assert await read_all(made.target) == b""
        assert await after(mock_clock, 32, made)
        assert (await made.ended()).reason is Reason.IDLE


async def test_p17_lifetime(mock_clock: MockClock) -> None:
    async with rig(times=Times(lifetime=100), limit=math.inf) as made:
        for _ in range(5):
            await echo_once(made)
            assert not await after(mock_clock, 19, made)
        await echo_once(made)
        assert await after(mock_clock, 8, made)
        ended = await made.ended()
        await expect_reset(made.client)
    assert (ended.reason, ended.first) == (Reason.LIFETIME, "")
    assert ended.seconds == pytest.approx(103)


async def test_p17_zero_stands_for_no_limit(mock_clock: MockClock) -> None:
    async with rig(times=Times(idle=0, half_closed=0, lifetime=0), limit=math.inf) as made:
        await made.client.send_eof()
        assert await read_all(made.target) == b""
        assert not await after(mock_clock, 1e9, made)


# -- the life of a relay


async def test_early_bytes_come_first() -> None:
    early = content(16_000)
    async with rig(early=early) as made:
        await made.client.send_all(b"later")
        assert await read_exactly(made.target, 16_005) == early + b"later"
        assert made.relay is not None
        assert made.relay.bytes == (16_005, 0)
        assert made.relay.first_answer_after is None
        await made.target.send_all(b"answer")
        assert await read_exactly(made.client, 6) == b"answer"
        assert made.relay.first_answer_after is not None


@pytest.mark.parametrize("moment", [*range(12), 30, 100, 300])
@pytest.mark.parametrize("what", ["relay", "run", "both"])
async def test_cancelled_at_any_moment_both_sides_are_reset_and_nothing_leaks(moment: int, what: str) -> None:
    with no_descriptor_left():
        async with rig(start=False) as made, trio.open_nursery() as nursery:
            nursery.start_soon(made.relay_until_end, Times(), b"early")
            nursery.start_soon(keep_busy, made.client)
            nursery.start_soon(keep_busy, made.target)
            for _ in range(moment):
                await trio.lowlevel.checkpoint()
            with no_more_of(made):
                if what != "run":
                    made.scope.cancel()
                if what != "relay":
                    made.run_scope.cancel()
                with trio.fail_after(5):
                    await made._over.wait()
            assert made._ended is None or made._ended.reason is Reason.CANCELLED


async def keep_busy(peer: trio.SocketStream) -> None:
    """Send until reset."""
    with pytest.raises(trio.BrokenResourceError) as caught:
        await send_for_ever(peer)
    assert isinstance(caught.value.__cause__, ConnectionResetError | BrokenPipeError)


async def test_a_relay_after_the_pump_has_ended_is_reset_at_once() -> None:
    with no_descriptor_left():
        async with rig(start=False) as made:
            made.run_scope.cancel()
            while not made.pump._epoll.closed:
                await trio.lowlevel.checkpoint()
            with no_more_of(made):
                await made.relay_until_end(Times(), b"")
            assert (await made.ended()).reason is Reason.CANCELLED
            await expect_reset(made.client)


class FullEpoll:
    """An epoll that watches nothing new."""

    def __init__(self, real: object) -> None:
        self._real = real

    def register(self, number: int, interest: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


async def test_an_epoll_that_takes_no_more_ends_that_relay_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig() as made:
        await echo_once(made)
        other = Rig("tcp", "tcp", made.pump)
        with monkeypatch.context() as patch:
            patch.setattr(made.pump, "_epoll", FullEpoll(made.pump._epoll))
            ended = await made.pump.relay(other.client_end, other.target_end, times=Times())
        assert (ended.reason, ended.detail) == (Reason.ERROR, "No space left on device")
        await expect_reset(other.client)
        await expect_reset(other.target)
        other.close()
        await echo_once(made)


async def test_a_fault_at_the_start_closes_both_sides() -> None:
    async with rig(start=False) as made:

        def fault(_: Relay) -> None:
            raise RuntimeError("at the start")

        with no_more_of(made), pytest.raises(RuntimeError, match="at the start"):
            await made.pump.relay(made.client_end, made.target_end, times=Times(), on_start=fault)


@pytest.mark.parametrize("method", ["ready", "sweep"])
async def test_p32_a_bug_in_one_relay_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mock_clock: MockClock, method: str
) -> None:
    async with rig(limit=math.inf) as made, trio.open_nursery() as nursery:
        await echo_once(made)
        bad: set[Relay] = set()
        real: Callable[..., object] = getattr(Relay, method)

        def buggy(relay: Relay, *args: object) -> object:
            if relay in bad:
                raise RuntimeError("a bug")
            return real(relay, *args)

        monkeypatch.setattr(Relay, method, buggy)
        other = Rig("tcp", "tcp", made.pump)
        outcome: list[Ended] = []

        async def second() -> None:
            outcome.append(await made.pump.relay(other.client_end, other.target_end, times=Times(), on_start=bad.add))

        nursery.start_soon(second)
        while other.relay is None and not bad:
            await trio.lowlevel.checkpoint()
        mock_clock.jump(1.5)
        await expect_reset(other.client)
        await expect_reset(other.target)
        other.close()
        while not outcome:
            await trio.lowlevel.checkpoint()
        assert outcome[0].reason is Reason.ERROR
        await echo_once(made)
    assert "internal error" in caplog.text


async def test_events_of_an_ended_relay_never_reach_the_next_with_its_descriptors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Events of two relays are in one list. The first ends the second, whose numbers go to a third at once."""
    pump = Pump()
    first, second, third = (Rig("unix", "unix", pump) for _ in range(3))
    relays = [made_by_hand(first), made_by_hand(second)]
    for relay in relays:
        pump._watch(relay)
    numbers = second.client_end.fileno(), second.target_end.fileno()
    real, told = Relay.ready, []

    def swapping(relay: Relay, end: socket.socket, events: int, now: float) -> bool:
        told.append(relay)
        if len(relays) == 2:
            assert relay is relays[0]
            relays[1].abort()
            third.client_end = moved(third.client_end, numbers[0])
            third.target_end = moved(third.target_end, numbers[1])
            relays.append(made_by_hand(third))
            pump._watch(relays[2])
        return real(relay, end, events, now)

    monkeypatch.setattr(Relay, "ready", swapping)
    pump._turn()
    assert relays[2] not in told
    pump._turn()
    assert relays[2] in told  # of its own events
    pump._epoll.close()
    for one in (first, second, third):
        one.close()


async def test_a_relay_that_ends_leaves_the_next_with_its_descriptors_alone() -> None:
    """Between the end of one and the moment when its task goes on, another gets the same numbers."""
    async with rig("unix", "unix") as made:
        await echo_once(made)
        assert made.relay is not None
        numbers = made.client_end.fileno(), made.target_end.fileno()
        other = Rig("unix", "unix", made.pump)
        made.relay.abort()
        other.client_end = moved(other.client_end, numbers[0])
        other.target_end = moved(other.target_end, numbers[1])
        relay = made_by_hand(other)
        made.pump._watch(relay)
        await made.ended()
        assert made.pump.relays == {relay}
        await echo_once(other)
        relay.abort()
        other.close()


def moved(end: socket.socket, number: int) -> socket.socket:
    """The same socket with another descriptor."""
    os.dup2(end.fileno(), number)
    end.close()
    return socket.socket(fileno=number)


async def test_a_turn_gives_way_and_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the list of events: other tasks run after a few milliseconds, here after each relay."""
    monkeypatch.setattr(splice, "_TURN_TIME", -1.0)
    monkeypatch.setattr(splice, "_TURN", 1000)
    monkeypatch.setattr(splice, "_MAX_EVENTS", 2)
    async with rig() as made, trio.open_nursery() as nursery:
        others = [Rig("unix", "unix", made.pump) for _ in range(10)]
        for other in others:
            nursery.start_soon(other.relay_until_end, Times(), b"")
        async with trio.open_nursery() as traffic:
            for number, one in enumerate([made, *others]):
                traffic.start_soon(exchange, one, content(200_000), content(100_000), number)
        assert not made.pump._unfinished
        for other in others:
            other.close()


async def test_p05_two_thousand_relays_at_once() -> None:
    with all_descriptors() as limit, no_descriptor_left():
        count = min(2000, (limit - 500) // 4)
        async with rig(start=False) as made, trio.open_nursery() as nursery:
            others = [Rig("unix", "unix", made.pump) for _ in range(count)]
            for other in others:
                nursery.start_soon(other.relay_until_end, Times(), b"")
            for _ in range(2):
                for number, other in enumerate(others):
                    await other.client.send_all(b"%d" % number)
                for number, other in enumerate(others):
                    assert await read_exactly(other.target, len(b"%d" % number)) == b"%d" % number
                    await other.target.send_all(b"-%d" % number)
                for number, other in enumerate(others):
                    assert await read_exactly(other.client, len(b"-%d" % number)) == b"-%d" % number
            assert len(made.pump.relays) == count
            for other in others:
                await other.client.aclose()
                await other.target.aclose()
                assert (await other.ended()).reason is Reason.CLOSED
