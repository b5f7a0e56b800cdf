"""The points of P2 that concern who is served, and when no more, over real AF_VSOCK with its CIDs."""

import logging

import pytest
import trio
import trio.testing

from tests.vsock.harness import DEADLINE, LOCAL, connect, is_cut, is_reset, receive_all, receive_exactly, running, until


async def assert_cut(client: trio.SocketStream) -> None:
    """*client* is closed altogether, and has received nothing."""
    assert await receive_all(client) == b""
    assert is_cut(client)


async def test_p15_a_waiting_connection_is_served_when_one_ends() -> None:
    async with running(num_workers=1, max_waiting=1, queue_timeout=DEADLINE) as setup:
        first, first_target = await setup.pair()
        second = await setup.connect()
        await second.send_all(b"early")
        await until(lambda: setup.status.waiting == 1)
        third = await setup.connect()
        await trio.testing.wait_all_tasks_blocked(0.1)  # the accept loop has had its turn: the queue is full
        assert (setup.status.accepted, setup.status.active) == (2, 1)
        await first.aclose()
        await first_target.aclose()
        second_target = await setup.accept()
        assert await receive_exactly(second_target, 5) == b"early"
        await until(lambda: setup.status.accepted == 3)
        assert (setup.status.waiting, setup.status.active) == (1, 1)
        await third.aclose()


async def test_p15_a_connection_waits_no_longer_than_its_limit() -> None:
    async with running(num_workers=1, queue_timeout=0.2) as setup:
        first, first_target = await setup.pair()
        await assert_cut(await setup.connect())
        assert setup.refused("queue") == 1
        await first.send_all(b"still here")
        assert await receive_exactly(first_target, 10) == b"still here"


async def test_p18_a_listed_cid_is_served(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vsock_proxy"):
        async with running(allowed_cids=(16, LOCAL)) as setup:
            await setup.check()
    assert f"Accepted connection on cid: {LOCAL} port: " in caplog.text


async def test_p18_another_cid_is_not_served() -> None:
    async with running(allowed_cids=(16,)) as setup:
        await assert_cut(await setup.connect())
        await until(lambda: setup.refused("peer") == 1)
        assert setup.status.active == 0


async def test_p18_a_cid_has_so_many_connections() -> None:
    async with running(max_connections_per_cid=1) as setup:
        first, first_target = await setup.pair()
        await assert_cut(await setup.connect())
        await until(lambda: setup.refused("peer-connections") == 1)
        await first.aclose()
        await first_target.aclose()
        await until(lambda: setup.status.active == 0)
        await setup.check()


async def test_p18_a_cid_opens_connections_so_fast() -> None:
    async with running(max_rate_per_cid=0.001) as setup:  # one, and the next after 1,000 s
        await setup.check()
        await assert_cut(await setup.connect())
        await until(lambda: setup.refused("peer-rate") == 1)


async def test_p24_live_connections_end_by_themselves_when_it_stops() -> None:
    async with running(drain_timeout=DEADLINE) as setup:
        client, target = await setup.pair()
        setup.proxy.stop()
        await until(lambda: not setup.status.addresses)
        with pytest.raises(ConnectionResetError):
            await connect(setup.port)
        await client.send_all(b"request")
        assert await receive_exactly(target, 7) == b"request"
        await client.aclose()
        await target.aclose()
        with trio.fail_after(DEADLINE):
            await until(lambda: not setup.nursery.child_tasks)


async def test_p24_after_the_drain_time_the_rest_is_reset() -> None:
    async with running(drain_timeout=0.2) as setup:
        client, target = await setup.pair()
        setup.proxy.stop()
        assert await is_reset(target)
        await assert_cut(client)
        await until(lambda: not setup.nursery.child_tasks)
