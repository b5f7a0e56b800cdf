"""One scenario under load, and after it the checks of what must hold."""

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from signer.tezos.keys import Curve
from tests.drill.client import HttpSigner
from tests.drill.ledger import Ledger
from tests.drill.load import Counts, Load
from tests.drill.plan import Plan, Rates
from tests.drill.world import World, open_world

SERVES_AGAIN = 15.0  # seconds after the last fault; without help
SETTLES = 15.0  # seconds after the last request for connections to be closed
_REST = 0.3  # seconds without a change: what was to be closed is closed
_LOOK = 0.02  # seconds between two looks
_WARM_UP_CHAINS = 0x3A500000
_WARM_UP = 0.3  # seconds of load without faults: whatever is opened once is open then


class LeftOutError(Exception):
    """The scenario cannot be run on this machine; the text says why."""


@dataclass
class Drill:
    """What a scenario works with."""

    world: World
    load: Load
    chance: random.Random
    deadline: float  # Trio's clock
    faults_wanted: int
    faults: Counter[str] = field(default_factory=Counter)  # beside the relay's
    recoveries: list[float] = field(default_factory=list)  # seconds

    @property
    def faults_made(self) -> int:
        return self.faults.total() + self.world.plan.faults.total()

    @property
    def more(self) -> bool:
        """Whether there is time for more faults, and not enough of them yet."""
        return trio.current_time() < self.deadline and self.faults_made < self.faults_wanted

    async def recovered(self, within: float = SERVES_AGAIN) -> None:
        """The fault is over: measure until the next signature, which must come in time."""
        began = trio.current_time()
        with trio.move_on_after(within):
            self.recoveries.append(await self.load.next_signature() - began)
            return
        self.load.ledger.failed(f"no signature within {within:g} s after a fault")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A kind of trouble: *run* makes it for as long as `Drill.more` says."""

    name: str
    what: str
    run: Callable[[Drill], Awaitable[None]]
    prepare: Callable[[World], Awaitable[None]] | None = None  # before the signer starts
    lost_answers: bool = False  # whether the signer itself is killed
    fixed: bool = False  # whether the enclave's address is fixed, and nitro-cli not asked


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    scenario: str
    seed: int
    seconds: float
    counts: Counts
    ledger: Ledger
    faults: Counter[str]
    recoveries: list[float]
    open: tuple[int, int]  # of the signer, before and after
    leaks: str = "descriptors"  # what *open* counts


def run(
    scenario: Scenario, directory: Path, *, seed: int, faults: int, duration: float, bakers: int = 8, keys: int = 1
) -> Outcome:
    """Run *scenario* until *faults* have been made or *duration* seconds are over; violations are in the ledger.

    Raises `LeftOutError`.
    """
    try:
        return trio.run(_run, scenario, directory, seed, faults, duration, bakers, keys)
    except BaseExceptionGroup as group:
        left_out = group.subgroup(LeftOutError)
        if left_out is None:
            raise
        raise LeftOutError(str(left_out.exceptions[0])) from group


async def _run(
    scenario: Scenario, directory: Path, seed: int, faults: int, duration: float, bakers: int, keys: int
) -> Outcome:
    plan, ledger = Plan(seed, Rates()), Ledger()
    async with open_world(directory, plan, curves=list(Curve) * keys, fixed=scenario.fixed) as world:
        if scenario.prepare is not None:
            await scenario.prepare(world)
        await world.start_signer()
        signer = HttpSigner(world.setup.port)
        before = await _warm_up(world, Load(signer, world.keys, ledger, seed, vanishing=False, chains=_WARM_UP_CHAINS))
        load = Load(signer, world.keys, ledger, seed, bakers=bakers, lost_answers=scenario.lost_answers)
        tasks = await world.tasks()
        began = trio.current_time()
        chance = random.Random(f"{seed}/{scenario.name}")
        drill = Drill(world, load, chance, began + duration, faults)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await scenario.run(drill)
            plan.calm()
            await _serves_again(drill)
            load.stop()
        seconds = trio.current_time() - began
        after = await _settled(world, ledger, before, tasks)
    made = drill.faults + Counter({fault.value: number for fault, number in plan.faults.items()})
    return Outcome(scenario.name, seed, seconds, load.counts, ledger, made, drill.recoveries, (before, after))


async def _warm_up(world: World, load: Load) -> int:
    """Sign with every key side by side; returns how many descriptors are open at rest after it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(load.run)
        await trio.sleep(_WARM_UP)
        load.stop()
    return await _at_rest(world)


async def _at_rest(world: World) -> int:
    """The number of open descriptors once it has not changed for a while."""
    number, since = world.descriptors, trio.current_time()
    while trio.current_time() < since + _REST:
        await trio.sleep(_LOOK)
        if world.descriptors != number:
            number, since = world.descriptors, trio.current_time()
    return number


async def _serves_again(drill: Drill) -> None:
    """Healthy and signing, with every key, without any help."""
    ledger = drill.load.ledger
    try:
        await drill.world.ready(SERVES_AGAIN)
    except (TimeoutError, OSError) as exc:
        ledger.failed(str(exc))
        return
    await drill.recovered()


async def _settled(world: World, ledger: Ledger, before: int, tasks: dict[str, bool]) -> int:
    """Wait until nothing of the load and of lost links is left; returns how many descriptors are open then."""
    assert world.signer is not None
    if world.signer.poll() is not None:
        return 0  # said already
    await _check_tasks(world, ledger, tasks)
    with trio.move_on_after(SETTLES) as limit:
        while (after := world.descriptors) > before:
            await trio.sleep(_LOOK)
    if limit.cancelled_caught:
        ledger.failed(f"{after - before} descriptor(s) leaked: {before} before, {after} after")
    if world.children:
        ledger.failed(f"child process(es) left over: {', '.join(world.children)}")
    return after


async def _check_tasks(world: World, ledger: Ledger, before: dict[str, bool]) -> None:
    """The same tasks as before, and each does its work."""
    with trio.move_on_after(SETTLES):
        while (after := await world.tasks()) != before or not all(after.values()):
            await trio.sleep(_LOOK)
        return
    ledger.failed(f"tasks (and whether they work) before: {before}, after: {after}")
