"""The relay over memory streams: frames pass whole, and scripts are played to the letter."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from signer.rpc.frames import encode_frame
from tests.drill.plan import End, Fault, Plan, Rates, Send, Wait
from tests.drill.relay import FrameCutter, Relay, play

CALL, ANSWER = encode_frame(b"call"), encode_frame(b"answer")
Stream = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


@dataclass
class Between:
    """A relay with both of its ends in our hands."""

    relay: Relay
    host: Stream  # the signer's end
    enclave: Stream  # the enclave's end
    over: trio.Event


@pytest.fixture
async def between(nursery: trio.Nursery) -> AsyncIterator[Between]:
    host, to_host = trio.testing.memory_stream_pair()
    enclave, to_enclave = trio.testing.memory_stream_pair()

    async def dial() -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        return to_enclave

    relay, over = Relay(Plan(1, Rates()), dial), trio.Event()

    async def handle() -> None:
        await relay.handle(to_host)
        over.set()

    nursery.start_soon(handle)
    with trio.fail_after(5):
        yield Between(relay, host, enclave, over)
    nursery.cancel_scope.cancel()


def inject(between: Between, fault: Fault) -> None:
    between.relay.plan.rates = Rates(request=1, reply=1, faults=frozenset({fault}))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_frames_come_out_whole_however_they_come_in(size: int) -> None:
    frames = [encode_frame(bytes(length)) for length in (0, 1, 7, 300)]
    stream, cutter = b"".join(frames), FrameCutter()
    chunks = [stream[index : index + size] for index in range(0, len(stream), size)]
    assert [frame for chunk in chunks for frame in cutter.feed(chunk)] == frames


async def test_frames_pass_both_ways(between: Between) -> None:
    await between.host.send_all(CALL[:3])
    await between.host.send_all(CALL[3:] + CALL)
    received = b""
    while len(received) < 2 * len(CALL):
        received += await between.enclave.receive_some()
    assert received == CALL + CALL
    await between.enclave.send_all(ANSWER)
    assert await between.host.receive_some() == ANSWER


async def test_half_closes_pass_and_the_end_of_both_ends_the_connection(between: Between) -> None:
    await between.host.send_eof()
    assert await between.enclave.receive_some() == b""
    await between.enclave.send_all(ANSWER)
    assert await between.host.receive_some() == ANSWER
    await between.enclave.send_eof()
    assert await between.host.receive_some() == b""
    await between.over.wait()


async def test_a_cut_closes_both_sides(between: Between) -> None:
    inject(between, Fault.CUT_AFTER_REPLY)
    await between.enclave.send_all(ANSWER)
    assert await between.host.receive_some() == ANSWER
    assert await between.host.receive_some() == b""
    assert await between.enclave.receive_some() == b""
    await between.over.wait()


async def test_a_cut_after_the_request_delivers_it(between: Between) -> None:
    inject(between, Fault.CUT_AFTER_REQUEST)
    await between.host.send_all(CALL)
    assert await between.enclave.receive_some() == CALL
    assert await between.enclave.receive_some() == b""
    assert await between.host.receive_some() == b""


async def test_silence_delivers_nothing_and_closes_nothing(between: Between) -> None:
    inject(between, Fault.SILENT)
    await between.enclave.send_all(ANSWER)
    await trio.testing.wait_all_tasks_blocked()
    between.relay.plan.calm()
    await between.enclave.send_all(ANSWER)
    await between.host.send_all(CALL)
    assert await between.enclave.receive_some() == CALL, "the other way goes on"
    await trio.testing.wait_all_tasks_blocked()
    with trio.move_on_after(0) as scope:
        await between.host.receive_some()
    assert scope.cancelled_caught
    assert not between.over.is_set()


async def test_half_close_keeps_the_other_way(between: Between) -> None:
    inject(between, Fault.HALF_CLOSED)
    await between.enclave.send_all(ANSWER)
    received = b""
    while chunk := await between.host.receive_some():
        received += chunk
    assert received in (b"", ANSWER)
    between.relay.plan.calm()
    await between.host.send_all(CALL)
    assert await between.enclave.receive_some() == CALL


async def test_a_swallowed_reply_leaves_the_next_one_in_its_place(between: Between) -> None:
    inject(between, Fault.SWALLOWED)
    await between.enclave.send_all(ANSWER)
    await trio.testing.wait_all_tasks_blocked()
    between.relay.plan.calm()
    await between.enclave.send_all(CALL)
    assert await between.host.receive_some() == CALL


async def test_a_side_that_breaks_ends_the_connection(between: Between) -> None:
    between.enclave.receive_stream.close()
    await between.host.send_all(CALL)
    await between.over.wait()
    assert await between.host.receive_some() == b""


async def test_all_connections_are_cut(between: Between) -> None:
    await trio.testing.wait_all_tasks_blocked()
    between.relay.cut_all()
    await between.over.wait()
    assert await between.host.receive_some() == b""
    assert await between.enclave.receive_some() == b""


async def test_a_refused_connection_reaches_nobody() -> None:
    host, to_host = trio.testing.memory_stream_pair()

    async def dial() -> trio.abc.HalfCloseableStream:
        raise AssertionError("nobody is to be reached")

    relay = Relay(Plan(1, Rates(connection=1)), dial)
    await relay.handle(to_host)
    assert await host.receive_some() == b""


async def test_where_nobody_listens_the_signer_is_not_greeted() -> None:
    host, to_host = trio.testing.memory_stream_pair()

    async def dial() -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        raise ConnectionRefusedError

    async def greet() -> bool:
        raise AssertionError("there is nothing to greet for")

    await Relay(Plan(1, Rates()), dial).handle(to_host, greet)
    assert await host.receive_some() == b""


async def test_who_is_not_greeted_is_not_relayed() -> None:
    host, to_host = trio.testing.memory_stream_pair()
    enclave, to_enclave = trio.testing.memory_stream_pair()

    async def dial() -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        return to_enclave

    async def greet() -> bool:
        await trio.lowlevel.checkpoint()
        return False

    await host.send_all(CALL)
    await Relay(Plan(1, Rates()), dial).handle(to_host, greet)
    assert await enclave.receive_some() == b""


async def test_a_script_is_played_in_order(autojump_clock: trio.testing.MockClock) -> None:
    sink, source = trio.testing.memory_stream_one_way_pair()
    stapled = trio.StapledStream(sink, trio.testing.memory_stream_one_way_pair()[1])
    assert await play((Send(b"a"), Wait(3), Send(b"b"), End.CUT, Send(b"c")), stapled) is End.CUT
    assert trio.current_time() == pytest.approx(3)
    assert await source.receive_some() == b"ab"
    assert await play((Send(b"d"),), stapled) is None
