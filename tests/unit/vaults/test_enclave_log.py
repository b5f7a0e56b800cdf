"""The enclave's log in that of the host: whatever comes."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from structlog.testing import capture_logs
from structlog.typing import EventDict
from trio.testing import MemorySendStream, MockClock, memory_stream_pair, wait_all_tasks_blocked

from proxy.address import Address, UnixAddress, VsockAddress, parse
from signer.vaults.nitro.enclave_log import MAX_LINE, PAUSE, RATE, EnclaveLog

PLACE = UnixAddress("/run/v.sock", 2000)


class Enclave:
    """Listens, or not; `streams` are the far ends of what was connected."""

    def __init__(self) -> None:
        self.place: Address | None = PLACE
        self.refuses = False
        self.asked: list[Address] = []
        self.streams: list[trio.StapledStream[MemorySendStream, trio.testing.MemoryReceiveStream]] = []
        self.counted: list[tuple[str, str, str, float]] = []
        self.changed = trio.Event()

    async def connect(self, address: Address) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.asked.append(address)
        if self.refuses:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = memory_stream_pair()
        self.streams.append(theirs)
        return ours

    async def wait_change(self) -> None:
        await self.changed.wait()

    def enclave_counted(self, vault: str, counter: str, name: str, value: float) -> None:
        self.counted.append((vault, counter, name, value))

    async def say(self, data: bytes) -> None:
        await self.streams[-1].send_all(data)
        await wait_all_tasks_blocked()


@asynccontextmanager
async def following(enclave: Enclave) -> AsyncIterator[None]:
    log = EnclaveLog(
        "n",
        2001,
        connect=enclave.connect,
        find=lambda: enclave.place,
        wait_change=enclave.wait_change,
        observer=enclave,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.follow)
        await wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


def line(event: str, level: str = "info", **fields: object) -> bytes:
    return (
        json.dumps({"time": "2026-11-25T12:00:00.000+00:00", "level": level, "event": event, **fields}).encode() + b"\n"
    )


def told(logs: list[EventDict]) -> list[tuple[str, str]]:
    return [(one["log_level"], one["event"]) for one in logs]


async def test_lines_keep_their_level() -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            data = line("session 1: opened") + line("internal error: X", "error") + line("odd", "shouting")
            for byte in data[:50], data[50:]:
                await enclave.say(byte)
    assert enclave.asked == [UnixAddress("/run/v.sock", 2001)]
    assert told(logs) == [
        ("info", "enclave: session 1: opened"),
        ("error", "enclave: internal error: X"),
        ("info", "enclave: odd"),
    ]
    assert logs[0]["vault_name"] == "n"
    assert logs[0]["enclave_time"].startswith("2026-11-25")


async def test_counters_become_metrics() -> None:
    enclave = Enclave()
    numbers = {
        "counters": {"calls": {"Sign": 5, "\x1b[2J": 1, "bad": "x", "true": True}, "secrets": {"a": 1}, "errors": 7},
        "gauges": {"uptime": 1.5, "sessions": None, "other": 3},
    }
    async with following(enclave):
        await enclave.say(line("counters", "debug", **numbers))
        many = {"counters": {"errors": {str(number): number for number in range(200)}}, "gauges": []}
        await enclave.say(line("counters", "debug", **many))
    assert enclave.counted[:3] == [
        ("n", "calls", "Sign", 5),
        ("n", "calls", "\\x1b[2J", 1),
        ("n", "uptime", "", 1.5),
    ]
    assert len({name for _, counter, name, _ in enclave.counted if counter == "errors"}) == 64


@pytest.mark.parametrize(
    "data",
    [
        b"\n\n\n",
        b"no json\n",
        b"[1]\n",
        b'{"event": 5}\n',
        b'{"counters": 5, "event": "counters"}\n',
        b"\xff\xfe\n",
        b"[" * 5000 + b"\n",
        b'{"event": "' + b"x" * MAX_LINE + b'"}\n',
    ],
)
async def test_odd_lines_harm_nothing(data: bytes) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(data)
            await enclave.say(line("still there"))
    assert told(logs)[-1] == ("info", "enclave: still there")


async def test_text_of_others_is_shown_escaped_and_short() -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(line("\x1b[2J\nERROR all is lost" + "x" * 1000))
    ((_, event),) = told(logs)
    assert event.startswith("enclave: \\x1b[2J\\nERROR all is lost")
    assert len(event) < 420


async def test_a_flood_is_counted(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            for number in range(4 * RATE):
                await enclave.streams[-1].send_all(line(str(number)))
            await wait_all_tasks_blocked()
            await trio.sleep(1.1)
            await enclave.say(line("after it"))
    assert len(logs) == RATE + 2
    assert (logs[-2]["log_level"], logs[-2]["lines"]) == ("warning", 3 * RATE)


async def test_a_line_without_end_ends_the_stream(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            with suppress(trio.BrokenResourceError):
                for _ in range(10):
                    await enclave.streams[0].send_all(b"x" * MAX_LINE)
            await wait_all_tasks_blocked()
            assert told(logs) == [("warning", "the enclave's log stream is none")]
            await trio.sleep(PAUSE + 1)
            assert len(enclave.asked) == 2


async def test_what_was_told_is_not_told_again(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(line("one") + line("two"))
            await enclave.streams[-1].aclose()
            await trio.sleep(PAUSE + 1)
            await enclave.say(line("one") + line("two") + line("three"))
    assert [event for _, event in told(logs)] == ["enclave: one", "enclave: two", "enclave: three"]


async def test_an_enclave_without_a_stream_is_no_fault(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    enclave.refuses = True
    with capture_logs() as logs:
        async with following(enclave):
            await trio.sleep(10 * PAUSE)
    assert {level for level, _ in told(logs)} == {"debug"}
    assert len(enclave.asked) == 10


async def test_it_waits_for_an_enclave() -> None:
    enclave = Enclave()
    enclave.place = None
    async with following(enclave):
        assert not enclave.asked
        enclave.place = VsockAddress(16, 2000)
        enclave.changed.set()
        await wait_all_tasks_blocked()
        assert enclave.asked == [VsockAddress(16, 2001)]


async def test_tcp_has_none() -> None:
    enclave = Enclave()
    enclave.place = parse("tcp:127.0.0.1:2000")
    async with following(enclave):
        assert not enclave.asked
