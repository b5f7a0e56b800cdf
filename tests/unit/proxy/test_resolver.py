"""Names to addresses, with a fake lookup and Trio's clock that jumps: P2.7 to P2.11, P2.13, P2.14."""

import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import ip_address

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from proxy import resolver
from proxy.names import IpAddress
from proxy.resolver import (
    FAILURE_MEMORY,
    MAX_RETRY,
    REFRESH,
    LookupFailedError,
    Target,
    interleaved,
    of_family,
    system_lookup,
)

HOST = "kms.example"
A, B, C, V6 = (ip_address(text) for text in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "2001:db8::1"))
ADDRESSES = st.lists(st.ip_addresses(), max_size=12)


class FakeLookup:
    """Answers with what the test puts into `answer`, when `gate` is open; says when it was asked."""

    def __init__(self, *answer: IpAddress) -> None:
        self.answer: Sequence[IpAddress] | Exception = answer
        self.gate = trio.Event()
        self.gate.set()
        self.asked: list[float] = []
        self.running = self.most = 0

    async def __call__(self, host: str) -> list[IpAddress]:
        self.asked.append(trio.current_time())
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return list(self.answer)


NOT_FOUND = LookupFailedError("DNS lookup failed! (no answer)")


@pytest.fixture
def lookup() -> FakeLookup:
    return FakeLookup(A, B)


@pytest.fixture
def target(lookup: FakeLookup) -> Target:
    return Target(HOST, list, lookup)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_p13_looked_up_when_first_wanted_and_not_before(
    autojump_clock: MockClock, nursery: trio.Nursery, target: Target, lookup: FakeLookup
) -> None:
    await nursery.start(target.run)
    await trio.sleep(100)
    assert lookup.asked == []
    assert target.known() is None
    assert await target.candidates() == [A, B]
    assert target.addresses == target.known() == [A, B]
    assert len(lookup.asked) == 1


async def test_p13_refreshed_every_five_seconds_while_in_use_only(
    autojump_clock: MockClock, nursery: trio.Nursery, target: Target, lookup: FakeLookup
) -> None:
    await nursery.start(target.run)
    for _ in range(200):  # twenty seconds of use
        assert await target.candidates() == [A, B]
        await trio.sleep(0.1)
    assert len(lookup.asked) == 4
    assert all(later - earlier >= REFRESH for earlier, later in zip(lookup.asked, lookup.asked[1:], strict=False))
    await trio.sleep(3600)
    assert len(lookup.asked) <= 5
    target.known()
    await trio.sleep(1)
    assert lookup.asked[-1] > 3600


async def test_p13_nobody_with_addresses_waits_for_a_lookup(
    autojump_clock: MockClock, nursery: trio.Nursery, target: Target, lookup: FakeLookup
) -> None:
    await nursery.start(target.run)
    await target.candidates()
    await trio.sleep(REFRESH)
    lookup.gate = trio.Event()  # the next hangs
    began = trio.current_time()
    for _ in range(10):
        assert await target.candidates() == target.known() == [A, B]
    assert trio.current_time() == began
    await wait_all_tasks_blocked()
    assert lookup.running == 1


async def test_p13_one_lookup_is_shared_by_all_who_wait(
    autojump_clock: MockClock, nursery: trio.Nursery, target: Target, lookup: FakeLookup
) -> None:
    lookup.gate = trio.Event()
    found: list[list[IpAddress]] = []

    async def want() -> None:
        found.append(await target.candidates())

    await nursery.start(target.run)
    for _ in range(50):
        nursery.start_soon(want)
    await wait_all_tasks_blocked()
    nursery.start_soon(want)  # in the middle of the lookup
    await wait_all_tasks_blocked()
    lookup.gate.set()
    await wait_all_tasks_blocked()
    assert found == [[A, B]] * 51
    await trio.sleep(100)
    assert len(lookup.asked) == lookup.most == 1  # what was wanted meanwhile needs no second


async def test_p08_stale_addresses_are_served_with_one_warning_per_change(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    target: Target,
    lookup: FakeLookup,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await nursery.start(target.run)
    await target.candidates()
    assert warnings(caplog) == []
    lookup.answer = NOT_FOUND
    for _ in range(600):
        assert await target.candidates() == [A, B]
        await trio.sleep(1)
    assert warnings(caplog) == [f"{HOST}: {NOT_FOUND}; going on with {A}, {B}"]
    assert target.age == pytest.approx(600)
    assert target.statistics.failures == len(lookup.asked) - 1
    lookup.answer = [C]
    await trio.sleep(2 * MAX_RETRY)
    assert await target.candidates() == [C]
    assert warnings(caplog)[1:] == [f"{HOST} is found again"]
    assert target.age is not None
    assert target.age < 2 * MAX_RETRY


async def test_p08_retries_back_off_from_1_to_30_seconds_with_jitter(
    autojump_clock: MockClock, nursery: trio.Nursery, target: Target, lookup: FakeLookup
) -> None:
    await nursery.start(target.run)
    await target.candidates()
    lookup.answer = NOT_FOUND
    await trio.sleep(REFRESH)
    target.known()  # used once more, and never again
    await trio.sleep(600)
    pauses = [later - earlier for earlier, later in zip(lookup.asked[1:], lookup.asked[2:], strict=False)]
    assert 600 / MAX_RETRY <= len(pauses) <= 600 / (MAX_RETRY / 2) + 8
    assert all(0.999 <= pause <= 30.001 for pause in pauses)
    assert pauses[0] <= 1.5
    assert min(pauses[5:]) >= 14.999
    assert len({round(pause, 3) for pause in pauses}) > len(pauses) / 2  # no two proxies keep step
    lookup.answer = [A]
    await trio.sleep(31)
    count = len(lookup.asked)
    await trio.sleep(600)
    assert len(lookup.asked) == count  # found, and not in use


async def test_p09_without_addresses_the_reason_is_given_and_the_next_lookup_is_near(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    target: Target,
    lookup: FakeLookup,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lookup.answer = NOT_FOUND
    await nursery.start(target.run)
    with pytest.raises(LookupFailedError, match="no answer"):
        await target.candidates()
    await trio.sleep(300)  # the back-off has come to its longest
    lookup.answer = [A]
    began = trio.current_time()
    assert await target.candidates() == [A]
    assert trio.current_time() - began <= 1
    assert warnings(caplog) == [
        f"{HOST}: {NOT_FOUND}; connections to it fail until it is found",
        f"{HOST} is found again",
    ]


async def test_p09_many_who_want_a_name_that_is_not_there_do_not_hurry_the_resolver(
    autojump_clock: MockClock, nursery: trio.Nursery, target: Target, lookup: FakeLookup
) -> None:
    lookup.answer = NOT_FOUND
    await nursery.start(target.run)

    async def insist() -> None:
        with trio.move_on_after(60):
            while True:
                with pytest.raises(LookupFailedError):
                    await target.candidates()

    async with trio.open_nursery() as many:
        for _ in range(20):
            many.start_soon(insist)
    assert 30 <= len(lookup.asked) <= 61


async def test_p07_a_waiter_whose_time_is_up_leaves_the_lookup_alone(
    autojump_clock: MockClock, nursery: trio.Nursery, target: Target, lookup: FakeLookup
) -> None:
    lookup.gate = trio.Event()
    await nursery.start(target.run)
    with pytest.raises(trio.TooSlowError), trio.fail_after(10):
        await target.candidates()
    lookup.gate.set()
    assert await target.candidates() == [A, B]
    assert len(lookup.asked) == 1


async def test_run_cancelled_in_a_lookup_wakes_who_waits(autojump_clock: MockClock, target: Target) -> None:
    hanging = FakeLookup()
    hanging.gate = trio.Event()
    target.lookup = hanging
    async with trio.open_nursery() as nursery:
        await nursery.start(target.run)

        async def want() -> None:
            with trio.CancelScope(shield=True), pytest.raises(LookupFailedError, match="not looked up yet"):
                await target.candidates()

        nursery.start_soon(want)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert hanging.running == 0


async def test_p25_refresh_cuts_a_back_off_short_and_stands_over_a_lookup_that_runs(
    autojump_clock: MockClock, nursery: trio.Nursery, target: Target, lookup: FakeLookup
) -> None:
    await nursery.start(target.run)
    await target.candidates()
    lookup.answer = NOT_FOUND
    target.refresh()
    await trio.sleep(300)
    lookup.answer = [C]
    target.refresh()
    await trio.sleep(1.1)
    assert target.addresses == [C]
    lookup.gate = trio.Event()
    target.refresh()
    await wait_all_tasks_blocked()
    count = len(lookup.asked)
    target.refresh()  # the decision has changed since that lookup began
    lookup.gate.set()
    await wait_all_tasks_blocked()
    assert len(lookup.asked) == count + 1


async def test_p25_refresh_in_the_middle_of_a_lookup_that_fails_cuts_the_back_off_short(
    autojump_clock: MockClock, nursery: trio.Nursery, target: Target, lookup: FakeLookup
) -> None:
    await nursery.start(target.run)
    await target.candidates()
    lookup.answer = NOT_FOUND
    target.refresh()
    await trio.sleep(300)  # the back-off has come to its longest
    lookup.gate = trio.Event()
    target.refresh()
    await trio.sleep(1.1)
    assert lookup.running == 1
    target.refresh()
    lookup.gate.set()
    await wait_all_tasks_blocked()
    lookup.answer = [C]
    await trio.sleep(1.1)
    assert target.addresses == [C]


async def test_p10_an_address_that_failed_comes_last_for_30_seconds(
    autojump_clock: MockClock, nursery: trio.Nursery, target: Target, lookup: FakeLookup
) -> None:
    lookup.answer = [A, B, C]
    await nursery.start(target.run)
    assert await target.candidates() == [A, B, C]
    target.failed(A)
    assert await target.candidates() == [B, C, A]
    await trio.sleep(FAILURE_MEMORY / 2)
    target.failed(B)
    assert target.known() == [C, A, B]  # the latest failure last
    await trio.sleep(FAILURE_MEMORY / 2)
    assert await target.candidates() == [A, C, B]
    target.worked(B)
    assert await target.candidates() == [A, B, C]
    for address in (A, B, C):
        target.failed(address)
    assert sorted(await target.candidates()) == [A, B, C]  # never none
    await trio.sleep(FAILURE_MEMORY)
    assert await target.candidates() == [A, B, C]
    assert target._failed == {}


async def test_p14_a_refresh_that_is_not_allowed_keeps_the_old_addresses(
    autojump_clock: MockClock, nursery: trio.Nursery, lookup: FakeLookup, caplog: pytest.LogCaptureFixture
) -> None:
    def only_a(addresses: Sequence[IpAddress]) -> list[IpAddress]:
        if A not in addresses:
            raise LookupFailedError(f"{addresses[0]} is not in the allow list")
        return [A]

    target = Target(HOST, only_a, lookup)
    await nursery.start(target.run)
    assert await target.candidates() == [A]
    lookup.answer = [C]
    await trio.sleep(REFRESH)
    for _ in range(100):
        assert await target.candidates() == [A]
        await trio.sleep(1)
    assert warnings(caplog) == [f"{HOST}: {C} is not in the allow list; going on with {A}"]


@pytest.mark.parametrize("refuses", ["lookup", "accept"])
async def test_p07_an_empty_answer_is_a_failure_like_another(
    autojump_clock: MockClock, nursery: trio.Nursery, lookup: FakeLookup, refuses: str
) -> None:
    accept: Callable[[Sequence[IpAddress]], list[IpAddress]] = list if refuses == "lookup" else lambda _: []
    if refuses == "lookup":
        lookup.answer = []
    target = Target(HOST, accept, lookup)
    await nursery.start(target.run)
    with pytest.raises(LookupFailedError, match="DNS lookup returned no IP addresses!"):
        await target.candidates()
    with pytest.raises(LookupFailedError, match="DNS lookup returned no IP addresses!"):
        target.use([])
    target.accept, lookup.answer = list, [A]
    assert await target.candidates() == [A]


async def test_addresses_found_elsewhere_are_used_at_the_start(
    autojump_clock: MockClock, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert [target.age, target.known()] == [None, None]
    target.use([V6, A, B])
    assert [target.age, target.known()] == [0, [A, V6, B]]
    assert f'Using IP "{A}" for the given server "{HOST}". (TTL: 5 secs)' in caplog.text


async def test_a_literal_is_looked_up_once_with_a_day_to_live(
    autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    target = Target(str(A), list)
    await nursery.start(target.run)
    for _ in range(10):
        assert await target.candidates() == [A]
        await trio.sleep(100_000)
    assert target.statistics.lookups == 1
    assert f'Using IP "{A}" for the given server "{A}". (TTL: 86400 secs)' in caplog.text


# -- pure


@given(ADDRESSES)
def test_p10_interleaved_keeps_every_address_and_the_order_of_each_family(addresses: list[IpAddress]) -> None:
    found = interleaved(addresses)
    assert len(found) == len(addresses)
    for version in (4, 6):
        assert [a for a in found if a.version == version] == [a for a in addresses if a.version == version]
    versions = [address.version for address in found]
    both = 2 * min(versions.count(4), versions.count(6))
    assert versions[:both] == [4, 6] * (both // 2)


@given(ADDRESSES, st.sampled_from([None, 4, 6]))
def test_p11_family_filter(addresses: list[IpAddress], version: int | None) -> None:
    wanted = [address for address in addresses if version is None or address.version == version]
    if wanted:
        assert of_family(addresses, version) == wanted
    else:
        with pytest.raises(LookupFailedError, match=r"^No accepted IP was found\.$"):
            of_family(addresses, version)


async def test_p11_a_family_works_for_a_name_that_has_both(
    autojump_clock: MockClock, nursery: trio.Nursery, lookup: FakeLookup
) -> None:
    lookup.answer = [A, V6, B]
    target = Target(HOST, partial(of_family, version=6), lookup)
    await nursery.start(target.run)
    assert await target.candidates() == [V6]


# -- the system's resolver


async def test_system_lookup_of_literals_and_bad_names_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert await system_lookup("10.0.0.1") == [A]
    assert await system_lookup("[2001:DB8::1]") == [V6]
    for bad in ("", "a b", "-", "127.1", "a\0"):
        with pytest.raises(LookupFailedError, match=r"^Could not parse domain name$"):
            await system_lookup(bad)


async def test_system_lookup_asks_for_both_families_by_the_canonical_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def answer(*args: object, **options: object) -> list[tuple[object, ...]]:
        asked.append((*args, options))
        inet = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (str(a), 0)) for a in (A, B, A)]
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1%lo", 0, 0, 1)), *inet]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    assert await system_lookup("BÜCHER.example.") == [ip_address("fe80::1"), A, B]
    assert asked == [("xn--bcher-kva.example", None, {"type": socket.SOCK_STREAM})]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (socket.gaierror(-2, "Name or service not known"), r"^DNS lookup failed! \(kms.example: Name or service not"),
        (OSError("odd"), r"^DNS lookup failed! \(kms.example: odd\)$"),
        (UnicodeError("label too long"), r"^DNS lookup failed! \(kms.example: label too long\)$"),
        (RuntimeError("can't start new thread"), r"^DNS lookup failed! \(kms.example: can't start new thread\)$"),
        ([], "^DNS lookup returned no IP addresses!$"),
    ],
)
async def test_p07_system_lookup_that_fails(
    monkeypatch: pytest.MonkeyPatch, answer: Exception | list[object], text: str
) -> None:
    def fail(*_: object, **__: object) -> list[object]:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(LookupFailedError, match=text):
        await system_lookup(HOST)


async def test_system_lookup_finds_the_hosts_file() -> None:
    assert ip_address("127.0.0.1") in await system_lookup("localhost")


def test_lookups_of_another_event_loop_work_too() -> None:
    for _ in range(2):
        assert trio.run(system_lookup, "localhost")
    assert resolver._limiter is not None
