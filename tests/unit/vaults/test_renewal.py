"""When credentials are looked for, and who hears of what was found."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
import trio.testing

from signer.observe.tasks import Tasks
from signer.vaults.nitro.credentials import Credentials, CredentialsError
from signer.vaults.nitro.renewal import LOOKUP_INTERVAL, REFRESH_INTERVAL, RESOLVE_TIMEOUT, Renewal

FIRST, SECOND = (Credentials(name, "secret", None, "r") for name in ("first", "second"))


class Source:
    """Gives *found*, or raises it, after *takes* seconds; keeps the times at which it was asked."""

    def __init__(self, found: Credentials | Exception = FIRST) -> None:
        self.found = found
        self.takes = 0.0
        self.asked: list[float] = []

    async def __call__(self) -> Credentials:
        self.asked.append(round(trio.current_time(), 6))
        await trio.sleep(self.takes)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class Heard:
    """What the link is told, by name."""

    def __init__(self) -> None:
        self.attempts = 0
        self.news = 0
        self.none: list[str] = []

    def attempt(self) -> None:
        self.attempts += 1

    def new(self) -> None:
        self.news += 1


@asynccontextmanager
async def renewing(source: Callable[[], Awaitable[Credentials]]) -> AsyncIterator[tuple[Renewal, Heard]]:
    renewal, heard = Renewal(source), Heard()

    async def run() -> None:
        await renewal.run(
            Tasks().add("credentials"), on_attempt=heard.attempt, on_new=heard.new, on_none=heard.none.append
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        yield renewal, heard
        nursery.cancel_scope.cancel()


async def test_only_others_than_before_are_news(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with renewing(source) as (renewal, heard):
        await trio.sleep(2 * REFRESH_INTERVAL + 1)
        assert source.asked == [0, REFRESH_INTERVAL, 2 * REFRESH_INTERVAL]
        assert (heard.attempts, heard.news) == (3, 1)
        source.found = SECOND
        await trio.sleep(REFRESH_INTERVAL)
        assert renewal.current == SECOND
        assert heard.news == 2


async def test_a_failure_is_the_link_s_only_while_there_are_none(autojump_clock: trio.testing.MockClock) -> None:
    """Later the old ones stay in use: the link is not down for that."""
    source = Source(CredentialsError("nowhere"))
    async with renewing(source) as (renewal, heard):
        assert heard.none == ["nowhere"]
        source.found = FIRST
        await trio.sleep(5)
        assert renewal.current == FIRST
        heard.none.clear()
        source.found = CredentialsError("nowhere")
        await trio.sleep(REFRESH_INTERVAL + 10)
        assert source.asked[-1] > REFRESH_INTERVAL
        assert heard.none == []
        assert renewal.current == FIRST


async def test_each_outage_begins_with_short_pauses(autojump_clock: trio.testing.MockClock) -> None:
    source = Source(CredentialsError("nowhere"))
    async with renewing(source) as (renewal, _):
        await trio.sleep(600)
        assert source.asked[1] < 2
        assert source.asked[-1] - source.asked[-2] > 20
        source.found = FIRST
        await trio.sleep(100)
        source.found = CredentialsError("nowhere")
        renewal.look_now()
        await trio.testing.wait_all_tasks_blocked()
        failed = source.asked[-1]
        await trio.sleep(2)
        assert failed < source.asked[-1] < failed + 2


async def test_a_lookup_that_hangs_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    source.takes = 10 * RESOLVE_TIMEOUT
    async with renewing(source) as (_, heard):
        await trio.sleep(RESOLVE_TIMEOUT + 0.5)
        assert heard.none == ["(Nitro): no credentials within 30 s"]


async def test_one_wish_is_one_lookup(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with renewing(source) as (renewal, _):
        for wishes in (1, 3):
            source.asked.clear()
            for _ in range(wishes):
                renewal.look_now()
            await trio.sleep(REFRESH_INTERVAL / 2)
            assert len(source.asked) == 1


async def test_what_kms_takes_no_more_is_looked_for_once(autojump_clock: trio.testing.MockClock) -> None:
    """The news comes with each blob, and late ones speak of credentials that are replaced already."""
    source = Source()
    async with renewing(source) as (renewal, _):
        renewal.expired(FIRST)
        await trio.sleep(LOOKUP_INTERVAL - 0.1)
        renewal.expired(FIRST)
        assert source.asked == [0], "they were just found"
        await trio.sleep(1)
        source.found = SECOND
        for _ in range(3):
            renewal.expired(FIRST)
        await trio.sleep(LOOKUP_INTERVAL + 1)
        assert len(source.asked) == 2
        renewal.expired(FIRST)
        await trio.sleep(1)
        assert len(source.asked) == 2, "that is known"
        renewal.expired(SECOND)
        await trio.sleep(1)
        assert len(source.asked) == 3
