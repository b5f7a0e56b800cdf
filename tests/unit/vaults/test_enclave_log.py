"""The enclave's log in that of the host: whatever comes."""

import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from structlog.typing import EventDict
from trio.testing import MemorySendStream, MockClock, memory_stream_pair, wait_all_tasks_blocked

from proxy.address import Address, UnixAddress, VsockAddress, parse
from signer.enclave.log import KEPT
from signer.vaults.nitro.enclave_log import BURST, MAX_LINE, PAUSE, PENALTY, SILENCE, TELL_INTERVAL, EnclaveLog

PLACE = UnixAddress("/run/v.sock", 2000)


class Enclave:
    """Listens, or not; `streams` are the far ends of what was connected."""

    def __init__(self) -> None:
        self.place: Address | None = PLACE
        self.refuses = False
        self.asked: list[Address] = []
        self.streams: list[trio.StapledStream[MemorySendStream, trio.testing.MemoryReceiveStream]] = []
        self.counted: list[dict[tuple[str, str], float]] = []
        self.dropped = 0
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

    def enclave_counted(self, vault: str, numbers: Mapping[tuple[str, str], float]) -> None:
        assert vault == "n"
        self.counted.append(dict(numbers))

    def enclave_lines_dropped(self, vault: str, lines: int) -> None:
        assert vault == "n"
        self.dropped += lines

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


def numbered(number: int, life: str = "a") -> bytes:
    return line(str(number), n=number, life=life)


async def test_counters_become_metrics() -> None:
    enclave = Enclave()
    numbers = {
        "counters": {
            "calls": {"Sign": 5, "\x1b[2J": 1, "bad": "x", "true": True, "less": -1},
            "secrets": {"a": 1},
            "errors": 7,
        },
        "gauges": {"uptime": 1.5, "sessions": None, "other": 3, "clock_offset": -2},
    }
    async with following(enclave):
        await enclave.say(line("counters", "debug", **numbers))
        await enclave.say(line("counters", "debug", counters=[], gauges=[]))
    assert enclave.counted == [
        {("calls", "Sign"): 5, ("calls", "\\x1b[2J"): 1, ("uptime", ""): 1.5, ("clock_offset", ""): -2},
        {},
    ]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1e15", "9" * 400, "9" * 5000])
async def test_numbers_that_are_none_are_left_out(value: str) -> None:
    enclave = Enclave()
    async with following(enclave):
        told = f'{{"event": "counters", "counters": {{"calls": {{"Sign": {value}}}}}, "gauges": {{"uptime": {value}}}}}'
        await enclave.say(told.encode() + b"\n" + line("counters", counters={"calls": {"Sign": 1}}))
    assert [numbers for numbers in enclave.counted if numbers] == [{("calls", "Sign"): 1}]


async def test_names_that_never_end_are_added_up() -> None:
    """Also where each line has others: Prometheus keeps every one that it ever saw."""
    enclave = Enclave()
    async with following(enclave):
        for start in range(0, 200, 50):
            names = {str(number): 1 for number in range(start, start + 50)}
            await enclave.say(line("counters", counters={"errors": names}))
    assert len({place for numbers in enclave.counted for place in numbers}) == 65
    assert enclave.counted[-1] == {("errors", "other"): 50}


async def test_an_enclave_that_is_gone_counts_nothing(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    async with following(enclave):
        await enclave.say(line("counters", counters={"calls": {"Sign": 5}}))
        await enclave.streams[-1].aclose()
        await wait_all_tasks_blocked()
    assert enclave.counted == [{("calls", "Sign"): 5}, {}]


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
async def test_odd_lines_harm_nothing(data: bytes, autojump_clock: MockClock) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(data)
            await enclave.say(line("still there"))
            await trio.sleep(2 * PENALTY)
    assert [one for one in told(logs) if "enclave: " in one[1]] == [("info", "enclave: still there")]


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_MEMBERS = ("event", "level", "time", "n", "life", "gauges")


@given(
    st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(_MEMBERS, _ANYTHING))
        | st.fixed_dictionaries(
            {"event": st.text(max_size=5)},
            optional={
                "counters": _ANYTHING | st.dictionaries(st.just("calls"), st.dictionaries(st.text(), _ANYTHING)),
                "n": st.integers(-5, 5),
                "life": st.sampled_from(["a", "b"]),
            },
        )
        | _ANYTHING,
        max_size=20,
    ),
    st.integers(1, 200),
)
def test_whatever_comes_the_next_line_is_told(values: list[object], chunk: int) -> None:
    async def main() -> None:
        enclave = Enclave()
        data = b"".join(json.dumps(value).encode() + b"\n" for value in values) + line("the next")
        async with following(enclave):
            for start in range(0, len(data), chunk):
                await enclave.streams[-1].send_all(data[start : start + chunk])
            await trio.sleep(len(data))  # each chunk may end with a pause
        for numbers in enclave.counted:
            assert all(math.isfinite(value) and abs(value) < 1e17 for value in numbers.values())

    with capture_logs() as logs:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert ("info", "enclave: the next") in told(logs)
    for one in logs:
        assert str(one["event"]).isascii()
        assert str(one["event"]).isprintable()


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
            for number in range(3 * BURST):
                await enclave.streams[-1].send_all(line(str(number)))
            await wait_all_tasks_blocked()
            await trio.sleep(TELL_INTERVAL + PENALTY)
            await enclave.say(line("after it"))
            told_of = sum(one["lines"] for one in logs if "dropped" in one["event"])
            assert told_of == enclave.dropped, "not only at the end of the stream, which may be next year"
            await enclave.streams[-1].aclose()
            await wait_all_tasks_blocked()
    dropped = [one["lines"] for one in logs if "dropped" in one["event"]]
    assert sum(dropped) + len(logs) - len(dropped) == 3 * BURST + 1, "told, or counted"
    assert enclave.dropped == sum(dropped)
    assert len(dropped) == 2, "one warning at once, and one of the rest"
    assert told(logs)[-2] == ("info", "enclave: after it")


async def test_a_flood_is_read_slowly(autojump_clock: MockClock) -> None:
    """Eight thousand lines of nothing take the processor for some ms, in which nobody signs."""
    enclave = Enclave()
    async with following(enclave):
        began = trio.current_time()
        await enclave.streams[-1].send_all(b"\n" * (10 * MAX_LINE) + line("counters", counters={"calls": {"a": 1}}))
        with trio.fail_after(60):
            while not enclave.counted:
                await trio.sleep(PENALTY)
        assert trio.current_time() - began >= 9 * PENALTY


async def test_a_line_without_end_ends_the_stream(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            with suppress(trio.BrokenResourceError):
                for _ in range(10):
                    await enclave.streams[0].send_all(b"x" * MAX_LINE)
            await wait_all_tasks_blocked()
            ((level, event),) = told(logs)
            assert (level, "is no log" in event) == ("warning", True)
            await trio.sleep(PAUSE + 1)
            assert len(enclave.asked) == 2


async def test_all_that_was_kept_is_told_at_once() -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(b"".join(numbered(number) for number in range(1000, 1000 + KEPT)))
    assert [event for _, event in told(logs)] == [f"enclave: {number}" for number in range(1000, 1000 + KEPT)]


async def test_what_was_told_is_not_told_again(autojump_clock: MockClock) -> None:
    """Not even a day of counters later."""
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(numbered(1) + numbered(2))
            for _ in range(300):
                await enclave.say(line("counters", counters={}))
                await trio.sleep(60)
            await enclave.streams[-1].aclose()
            await trio.sleep(PAUSE + 1)
            await enclave.say(numbered(1) + numbered(2) + numbered(3))
    assert [event for _, event in told(logs)] == ["enclave: 1", "enclave: 2", "enclave: 3"]


async def test_two_lines_of_one_text_and_moment_are_two() -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(line("internal error", n=1, life="a") + line("internal error", n=2, life="a"))
    assert len(logs) == 2


async def test_lines_that_are_missing_are_counted(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(numbered(5))  # older ones were said before we came
            await enclave.streams[-1].aclose()
            await trio.sleep(PAUSE + 1)
            await enclave.say(numbered(9))
            await trio.sleep(TELL_INTERVAL + 1)
            await enclave.say(numbered(3, life="b"))  # started again, and two lines are gone already
    assert [(one["event"], one.get("lines")) for one in logs] == [
        ("enclave: 5", None),
        ("lines of the enclave's log were dropped", 3),
        ("enclave: 9", None),
        ("lines of the enclave's log were dropped", 2),
        ("enclave: 3", None),
    ]


async def test_lines_that_were_dropped_are_not_missing_too(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(numbered(1) + b"x" * (MAX_LINE // 2) + b"\n" + numbered(3))
            await enclave.streams[-1].aclose()
            await trio.sleep(2 * PENALTY)
    assert [one["lines"] for one in logs if "lines" in one] == [1]


async def test_what_was_dropped_of_one_life_hides_nothing_of_the_next(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    async with following(enclave):
        await enclave.say(numbered(1) + b"\n" * 100)
        await enclave.streams[-1].aclose()
        await trio.sleep(PAUSE + 1)
        assert enclave.dropped == 100
        await enclave.say(numbered(51, life="b"))
        assert enclave.dropped == 150


async def test_a_new_life_begins_anew(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(numbered(1) + numbered(2) + numbered(1, life="b") + numbered(2, life="b"))
    assert [event for _, event in told(logs)] == ["enclave: 1", "enclave: 2"] * 2


@pytest.mark.parametrize("odd", [{"n": "1"}, {"n": True}, {"n": 0}, {"n": -5}, {"n": 1.5}, {"n": 10**300}, {"life": 1}])
async def test_a_number_that_is_none_suppresses_nothing(odd: dict[str, object]) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            await enclave.say(line("odd", "info", **({"n": 1, "life": "a"} | odd)) + numbered(1) + numbered(2))
    assert [event for _, event in told(logs)] == ["enclave: odd", "enclave: 1", "enclave: 2"]


async def test_a_stream_that_is_silent_for_long_is_dialled_again(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    async with following(enclave):
        await enclave.say(numbered(1))
        await trio.sleep(SILENCE - 1)
        assert len(enclave.asked) == 1
        await trio.sleep(PAUSE + 2)
        assert len(enclave.asked) == 2


async def test_one_reader_too_many_says_so_once(autojump_clock: MockClock) -> None:
    enclave = Enclave()
    with capture_logs() as logs:
        async with following(enclave):
            for _ in range(3):
                await enclave.streams[-1].aclose()
                await trio.sleep(PAUSE + 1)
    ((level, event),) = told(logs)
    assert (level, "do four others read it" in event) == ("warning", True)


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
