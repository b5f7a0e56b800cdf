"""The points of P2 that concern a connection's bytes, over real AF_VSOCK."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from proxy.daemon import raise_descriptor_limit
from tests.vsock.harness import (
    DEADLINE,
    LOCAL,
    is_cut,
    is_reset,
    receive_all,
    receive_exactly,
    reset,
    running,
    until,
)

MIB = 1024 * 1024
ANSWER = os.urandom(MIB)
QUIET = 0.2  # seconds in which nothing happens any more: all buffers are full


async def test_p1_the_answer_comes_after_the_clients_end() -> None:
    async with running() as setup:
        client, target = await setup.pair()
        await client.send_all(b"request")
        await client.send_eof()
        assert await receive_all(target) == b"request"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(target.send_all, ANSWER)
            assert await receive_exactly(client, len(ANSWER)) == ANSWER
        await target.aclose()
        assert await receive_all(client) == b""
        await until(lambda: setup.status.active == 0)


async def test_p1_the_client_goes_on_after_the_targets_end() -> None:
    async with running() as setup:
        client, target = await setup.pair()
        await target.send_all(b"greeting")
        await target.send_eof()
        assert await receive_all(client) == b"greeting"
        assert not is_cut(client)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, ANSWER)
            assert await receive_exactly(target, len(ANSWER)) == ANSWER
        await client.send_eof()
        assert await receive_all(target) == b""
        await until(lambda: setup.status.active == 0)


async def test_p2_the_client_can_tell_a_reset_of_the_target_from_its_end() -> None:
    async with running() as setup:
        client, target = await setup.pair()
        await target.send_all(ANSWER[:1000])
        assert await receive_exactly(client, 1000) == ANSWER[:1000]
        reset(target)
        assert await receive_all(client) == b""
        assert is_cut(client)
        await until(lambda: setup.status.active == 0)
        await setup.check()


async def test_p2_what_the_target_sent_before_its_reset_arrives() -> None:
    """As much of it as it would without the proxy: that which the kernel still has."""
    async with running() as setup:
        client, target = await setup.pair()
        await client.send_all(b"unread")
        await target.send_all(ANSWER[:1000])
        reset(target)
        received = await receive_all(client)
        assert ANSWER.startswith(received)
        assert is_cut(client)
        await setup.check()


async def test_p2_a_reset_of_the_target_while_the_client_does_not_read() -> None:
    async with running() as setup:
        client, target = await setup.pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_until_broken, target)
            await trio.testing.wait_all_tasks_blocked(QUIET)
            nursery.cancel_scope.cancel()
        reset(target)
        await until(lambda: setup.status.active == 0)
        await receive_all(client)
        assert is_cut(client)
        await setup.check()


async def send_until_broken(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(ANSWER)


async def test_p2_a_client_that_closes_resets_the_target_that_sends() -> None:
    """The end of file comes first: so far, the client may have half-closed only."""
    async with running() as setup:
        client, target = await setup.pair()
        await client.send_all(b"request")
        await client.aclose()
        assert await receive_all(target) == b"request"
        with trio.fail_after(DEADLINE), pytest.raises(trio.BrokenResourceError):
            await send_until_broken(target)
        await until(lambda: setup.status.active == 0)
        await setup.check()


CLIENT = """
import socket, sys
client = socket.socket(socket.AF_VSOCK)
client.connect((1, int(sys.argv[1])))
client.sendall(b"half of it")
sys.stdin.read()
"""


async def test_p2_a_killed_client_resets_the_target_that_sends() -> None:
    async with running() as setup:
        command = [sys.executable, "-I", "-S", "-c", CLIENT, str(setup.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            target = await setup.accept()
            assert await receive_exactly(target, 10) == b"half of it"
            process.kill()
        assert await receive_all(target) == b""
        with trio.fail_after(DEADLINE), pytest.raises(trio.BrokenResourceError):
            await send_until_broken(target)
        await until(lambda: setup.status.active == 0)
        await setup.check()


async def test_p3_a_client_that_stops_reading_blocks_only_its_own_direction() -> None:
    async with running() as setup:
        client, target = await setup.pair()
        big = bytes(24 * MIB)  # more than all buffers on the way together
        sent = trio.Event()

        async def send() -> None:
            await target.send_all(big)
            sent.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked(QUIET)
            assert not sent.is_set()
            nursery.start_soon(client.send_all, ANSWER)
            assert await receive_exactly(target, len(ANSWER)) == ANSWER
            await setup.check()
            assert not sent.is_set()
            assert await receive_exactly(client, len(big)) == big
            await sent.wait()


async def test_p3_full_windows_both_ways_do_not_deadlock() -> None:
    async with running() as setup:
        client, target = await setup.pair()
        big = bytes(12 * MIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, big)
            nursery.start_soon(target.send_all, big)
            await trio.testing.wait_all_tasks_blocked(QUIET)
            nursery.start_soon(receive_exactly, client, len(big))
            nursery.start_soon(receive_exactly, target, len(big))


@pytest.mark.parametrize("up", [True, False])
async def test_p3_the_kernel_moves_bulk_by_itself(up: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`splice` takes AF_VSOCK as a source and as a sink."""
    splice, moved = os.splice, 0

    def counting(source: int, sink: int, count: int, *, flags: int) -> int:
        nonlocal moved
        number = splice(source, sink, count, flags=flags)
        if is_vsock(source if up else sink):
            moved += number
        return number

    monkeypatch.setattr(os, "splice", counting)
    async with running() as setup:
        client, target = await setup.pair()
        source, sink = (client, target) if up else (target, client)
        with trio.fail_after(DEADLINE):
            while not moved:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(source.send_all, ANSWER)
                    assert await receive_exactly(sink, len(ANSWER)) == ANSWER


def is_vsock(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as one:
            return one.family == socket.AF_VSOCK
    except OSError:
        return False


@pytest.mark.parametrize("by_client", [True, False])
async def test_p4_a_half_closed_connection_has_a_limit_of_its_own(by_client: bool) -> None:
    async with running(half_closed_timeout=0.3) as setup:
        client, target = await setup.pair()
        await (client if by_client else target).send_eof()
        await until(lambda: is_cut(client))
        with trio.fail_after(DEADLINE), pytest.raises(trio.BrokenResourceError):
            await send_until_broken(target) if by_client else await receive_all(target)
        await setup.check()


async def test_p5_descriptors_beyond_1024_work() -> None:
    raise_descriptor_limit()
    async with running(num_workers=1000) as setup:
        pairs = [await setup.pair() for _ in range(270)]  # with four descriptors each
        assert max(stream.socket.fileno() for pair in pairs for stream in pair) > 1024
        for client, target in pairs:
            await client.send_all(b"1")
            assert await receive_exactly(target, 1) == b"1"
            await target.send_all(b"2")
            assert await receive_exactly(client, 1) == b"2"
        for client, target in pairs:
            await client.aclose()
            await target.aclose()
        await until(lambda: setup.status.active == 0)


async def test_p6_the_connection_to_the_target_has_no_delay_and_is_kept_alive() -> None:
    async with running() as setup:
        client, target = await setup.pair()
        await client.send_all(b"?")
        assert await target.receive_some() == b"?"  # past the handshake, which the target sees before the proxy does
        with own_socket(target.socket.getpeername()) as ours:
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                assert ours.getsockopt(socket.SOL_SOCKET, option) >= 64 * 1024


def own_socket(name: tuple[str, int]) -> socket.socket:
    """The socket of this process that is bound to *name*: the proxy's."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            one = socket.socket(fileno=os.dup(int(entry.name)))
            if one.family == socket.AF_INET and one.getsockname() == name:
                return one
            one.close()
        except OSError:
            continue
    raise AssertionError(f"no socket at {name}")


@pytest.mark.parametrize("limits", [{"idle_timeout": 0.3}, {"max_lifetime": 0.3}])
async def test_p17_a_connection_ends_at_its_limit(limits: dict[str, float]) -> None:
    async with running(**limits) as setup:
        client, target = await setup.pair()
        assert await is_reset(target)
        assert await receive_all(client) == b""
        assert is_cut(client)
        await until(lambda: setup.status.active == 0)


def test_the_loopback_is_what_these_tests_believe() -> None:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as one:
        one.bind((LOCAL, socket.VMADDR_PORT_ANY))
        assert one.getsockname()[0] == LOCAL
