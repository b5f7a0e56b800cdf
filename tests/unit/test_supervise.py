"""Faults restart, bugs propagate; every pause is the fake clock's."""

from functools import partial

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from signer.observe.tasks import Task, TaskState
from signer.supervise import FAULTS, Backoff, open_nursery, supervise

STEADY = Backoff(first_delay=1, max_delay=8, stable_after=60, jitter=0)


class Shop:
    """A service that ends as *ends* says, after *lasts* seconds each; an end of None is one as it was told to."""

    def __init__(self, *ends: BaseException | None, lasts: float = 0, failed_starts: int = 0) -> None:
        self._ends = list(ends)
        self._lasts = lasts
        self._failed_starts = failed_starts  # restarts that end before they have started
        self.started: list[float] = []

    async def run(self, *, task_status: trio.TaskStatus[str]) -> None:
        self.started.append(trio.current_time())
        if not 1 < len(self.started) <= 1 + self._failed_starts:
            task_status.started("address")
        await trio.sleep(self._lasts)
        end = self._ends.pop(0)
        if end is not None:
            raise end


async def test_faults_restart_with_growing_pauses(autojump_clock: MockClock) -> None:
    shop = Shop(*(OSError(f"fault {n}") for n in range(6)), None)
    task = Task("shop")
    with capture_logs() as logs:
        await supervise(task, shop.run, backoff=STEADY)
    assert shop.started == [0, 1, 3, 7, 15, 23, 31]
    assert (task.state, task.restarts, task.fault) == (TaskState.STOPPED, 6, "fault 5")
    assert [line["event"] for line in logs][:2] == ["shop: fault 0", "shop: works again"]


async def test_a_service_that_ran_well_begins_anew(autojump_clock: MockClock) -> None:
    shop = Shop(OSError(), OSError(), trio.BrokenResourceError(), None, lasts=60)
    await supervise(Task("shop"), shop.run, backoff=STEADY)
    assert shop.started == [0, 61, 122, 183]


async def test_a_restart_that_fails_before_it_serves_waits_longer_and_longer(autojump_clock: MockClock) -> None:
    """And however long each try takes: only serving counts as mended."""
    shop = Shop(OSError("gone"), OSError("in use"), OSError("in use"), None, lasts=100, failed_starts=2)
    task = Task("shop")
    await supervise(task, shop.run, backoff=Backoff(first_delay=1, max_delay=8, stable_after=100, jitter=0))
    assert shop.started == [0, 101, 203, 307]
    assert task.restarts == 1


async def test_the_pause_has_jitter(autojump_clock: MockClock) -> None:
    pauses = {Backoff(first_delay=1, jitter=0.2).pause(1) for _ in range(50)}
    assert len(pauses) > 10
    assert min(pauses) >= 0.8
    assert max(pauses) <= 1.2
    assert Backoff(jitter=0).pause(10_000) == 10


async def test_the_first_start_fails_for_its_caller() -> None:
    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        raise OSError("in use")

    with pytest.raises(OSError, match="in use"), trio.fail_after(5):
        async with open_nursery() as nursery:
            await nursery.start(supervise, Task("shop"), run)


async def test_what_need_not_start_is_tried_again(autojump_clock: MockClock) -> None:
    shop, task, tries = Shop(None), Task("shop"), []

    async def run(*, task_status: trio.TaskStatus[str]) -> None:
        tries.append(trio.current_time())
        if len(tries) < 3:
            raise OSError("in the way")
        await shop.run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        start = partial(supervise, task, run, backoff=STEADY, must_start=False)
        assert await nursery.start(start) == "address"
    assert tries == [0, 1, 3]
    assert (task.restarts, task.fault) == (0, "in the way")


async def test_it_starts_once_with_the_services_value(autojump_clock: MockClock) -> None:
    shop = Shop(OSError(), None)
    async with trio.open_nursery() as nursery:
        assert await nursery.start(supervise, Task("shop"), shop.run) == "address"
    assert len(shop.started) == 2


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bug"),
        ExceptionGroup("both", [OSError("fault"), ValueError("bug")]),
        ExceptionGroup("deep", [OSError("fault"), ExceptionGroup("in", [ValueError("bug")])]),
    ],
)
async def test_a_bug_propagates_also_beside_a_fault(error: Exception) -> None:
    shop, task = Shop(error), Task("shop")
    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="bug"), flatten_subgroups=True):
        await supervise(task, shop.run)
    assert len(shop.started) == 1
    assert task.state is TaskState.STOPPED


async def test_faults_in_a_group_are_faults(autojump_clock: MockClock) -> None:
    shop = Shop(ExceptionGroup("", [OSError("one"), ExceptionGroup("", [OSError("two"), OSError("one")])]), None)
    task = Task("shop")
    await supervise(task, shop.run)
    assert task.fault == "one; two"


async def test_a_fault_without_a_text_has_a_name(autojump_clock: MockClock) -> None:
    task = Task("shop")
    await supervise(task, Shop(trio.BrokenResourceError(), None).run)
    assert task.fault == "BrokenResourceError"


async def test_other_faults_can_be_named(autojump_clock: MockClock) -> None:
    shop = Shop(KeyError("x"), None)
    await supervise(Task("shop"), shop.run, faults=(*FAULTS, KeyError))
    assert len(shop.started) == 2


async def test_told_to_stop_in_a_pause_it_stops(autojump_clock: MockClock) -> None:
    stop, shop, task = trio.Event(), Shop(OSError("fault")), Task("shop")
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(supervise, task, shop.run, stop=stop))
        await trio.sleep(0.01)
        assert task.state is TaskState.FAILING
        stop.set()
    assert trio.current_time() < 0.02
    assert (len(shop.started), task.state) == (1, TaskState.STOPPED)


async def test_cancelled_in_a_pause_or_while_it_runs_it_ends(autojump_clock: MockClock) -> None:
    for shop in (Shop(OSError("fault")), Shop(None, lasts=1000)):
        task = Task("shop")
        with trio.move_on_after(0.01) as scope:
            await supervise(task, shop.run)
        assert scope.cancelled_caught
        assert task.state is TaskState.STOPPED
