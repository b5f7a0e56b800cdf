"""What the program tells of itself, and to whom."""

import json
from typing import Any

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from signer.enclave import log
from signer.enclave import stream as stream_module
from signer.enclave.log import KEPT, Journal
from signer.enclave.stream import INTERVAL, LogStream
from signer.vaults.nitro.enclave_log import MAX_LINE


class Reader:
    """The other end of a stream."""

    def __init__(self, logs: LogStream, nursery: trio.Nursery) -> None:
        self.stream, theirs = memory_stream_pair()
        self._buffer = b""
        nursery.start_soon(logs.serve, theirs)

    async def line(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            chunk = await self.stream.receive_some()
            if not chunk:
                raise EOFError
            self._buffer += bytes(chunk)
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


async def test_what_was_kept_then_counters_then_what_comes(nursery: trio.Nursery) -> None:
    journal = Journal()
    journal.say("first")
    journal.say("second", "error")
    journal.count("calls", "Sign")
    journal.count("calls", "Sign")
    journal.gauge("sessions", lambda: 3)
    reader = Reader(LogStream(journal), nursery)
    lines = [await reader.line() for _ in range(3)]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("first", "info"),
        ("second", "error"),
        ("counters", "debug"),
    ]
    assert lines[2]["counters"] == {"calls": {"Sign": 2}}
    assert lines[2]["gauges"]["sessions"] == 3
    assert lines[2]["gauges"]["uptime"] >= 0
    journal.say("third")
    assert (await reader.line())["event"] == "third"
    await reader.stream.aclose()


async def test_counters_every_minute(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    reader = Reader(LogStream(Journal()), nursery)
    for minute in range(3):
        assert (await reader.line())["event"] == "counters"
        assert trio.current_time() == minute * INTERVAL
    await reader.stream.aclose()


async def test_counters_are_those_of_the_moment(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    journal = Journal()
    reader = Reader(LogStream(journal), nursery)
    assert (await reader.line())["counters"] == {}
    await wait_all_tasks_blocked()
    journal.count("calls", "Sign")
    assert (await reader.line())["counters"] == {"calls": {"Sign": 1}}
    await reader.stream.aclose()


def test_lines_are_numbered_and_belong_to_a_life() -> None:
    lives = set()
    for _ in range(2):
        journal = Journal()
        for _ in range(KEPT + 5):
            journal.say("line")
        with journal.reading() as (kept, _):
            lines = [json.loads(line) for line in kept]
        assert [line["n"] for line in lines] == list(range(6, KEPT + 6))
        (life,) = {line["life"] for line in lines}
        counters = json.loads(journal.counters())
        assert (counters["life"], "n" in counters) == (life, False)
        lives.add(life)
    assert len(lives) == 2


def test_no_line_is_longer_than_the_host_takes() -> None:
    """It hangs up on one that is, as of a recursion without end, and again each time while that is kept."""
    journal = Journal()
    journal.say("\0" * 20000, "warning")
    with journal.reading() as (kept, _):
        assert len(kept[0]) < MAX_LINE
    assert json.loads(kept[0])["event"] == "\0" * 1000


async def test_so_many_lines_are_kept(nursery: trio.Nursery) -> None:
    journal = Journal()
    for number in range(KEPT + 10):
        journal.say(str(number))
    reader = Reader(LogStream(journal), nursery)
    assert (await reader.line())["event"] == "10"
    await reader.stream.aclose()


async def test_a_reader_that_does_not_read_is_left(autojump_clock: MockClock) -> None:
    journal = Journal()
    logs = LogStream(journal)
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(logs.serve, theirs)
        await wait_all_tasks_blocked()
        for _ in range(1000):
            journal.say("line")  # never waits
        with trio.fail_after(stream_module._SEND_TIMEOUT + 1):
            while logs._readers:
                await trio.sleep(0.1)
    assert not journal._readers
    await ours.aclose()


async def test_a_reader_that_is_too_far_behind_is_hung_up_on(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """It takes what it is sent, but too late: it learns by the end that lines are missing, and comes again."""
    journal = Journal()
    ours, theirs = trio.testing.lockstep_stream_pair()
    nursery.start_soon(LogStream(journal).serve, theirs)
    await wait_all_tasks_blocked()  # in the line of counters
    for _ in range(2 * KEPT):
        journal.say("line")
    told = b""
    with trio.fail_after(INTERVAL / 2):
        while chunk := await ours.receive_some():
            told += bytes(chunk)
    lines = [json.loads(line) for line in told.splitlines()]
    assert [line.get("n") for line in lines] == [None, *range(1, KEPT + 1)]


@pytest.mark.parametrize("fault", [OSError, ValueError])
def test_a_line_that_standard_error_does_not_take_is_kept(
    fault: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def write(self, _text: str) -> None:
            raise fault

    journal = Journal()
    monkeypatch.setattr(log, "journal", journal)
    monkeypatch.setattr("sys.stderr", Broken())
    log.say("line", "error")
    with journal.reading() as (kept, _):
        assert [json.loads(line)["event"] for line in kept] == ["line"]


async def test_so_many_readers_and_no_more(nursery: trio.Nursery) -> None:
    logs = LogStream(Journal())
    readers = [Reader(logs, nursery) for _ in range(stream_module.MAX_READERS)]
    for reader in readers:
        await reader.line()
    late = Reader(logs, nursery)
    assert await late.stream.receive_some() == b""
    await readers[0].stream.aclose()
    await wait_all_tasks_blocked()
    again = Reader(logs, nursery)
    assert (await again.line())["event"] == "counters"
    for reader in (*readers[1:], again):
        await reader.stream.aclose()


def test_a_counter_has_so_many_names() -> None:
    journal = Journal()
    for number in range(100):
        journal.count("errors", str(number))
    counted = json.loads(journal.counters())["counters"]["errors"]
    assert len(counted) == 65
    assert counted["other"] == 36
