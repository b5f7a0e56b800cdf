"""READY, STATUS and WATCHDOG, over a real datagram socket, of vaults whose state a test sets; the clock is a fake."""

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from proxy.notify import Notifier
from signer.announce import LEAST_SILENCE, LONGEST_ATTEMPT, Announcer
from signer.crypto import generate_secret_key
from signer.policy import KeyPolicy
from signer.tezos.keys import Curve, PublicKeyHash
from tests.unit.test_signing import FakeVault

POLICY = KeyPolicy(requests=("block",), operations=())


class StatedVault(FakeVault):
    """A vault that says when it changed, and how long it has shown no life."""

    def __init__(self, number: int = 1, name: str = "a") -> None:
        super().__init__(*(generate_secret_key(Curve.ED25519) for _ in range(number)), name=name)
        self.changed = trio.Event()
        self.seen = 0.0  # Trio's clock; stays while *lives* is False
        self.lives = True
        self.ready = False

    async def wait_change(self) -> None:
        await self.changed.wait()

    @property
    def last_sign_of_life(self) -> float:
        if self.lives:
            self.seen = trio.current_time()
        return self.seen

    def become(self, *, ready: bool) -> None:
        self.ready = ready
        self.changed.set()
        self.changed = trio.Event()


class Manager:
    """The service manager's side."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)

    def notifier(self, watchdog: float = 0) -> Notifier:
        return Notifier({"NOTIFY_SOCKET": self.socket.getsockname(), "WATCHDOG_USEC": str(int(watchdog * 1_000_000))})

    def heard(self) -> list[str]:
        found = []
        with suppress(BlockingIOError):
            while True:
                found.append(self.socket.recv(5000).decode())
        return found


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    one = Manager(tmp_path / "notify")
    with one.socket:
        yield one


def policies(*vaults: FakeVault, only: str | None = None) -> dict[PublicKeyHash, KeyPolicy]:
    policy = KeyPolicy(requests=("block",), operations=(), vault=only)
    return {pkh: policy for vault in vaults for pkh in vault.secrets}


def announcer(
    notifier: Notifier,
    *vaults: StatedVault,
    of: Mapping[PublicKeyHash, KeyPolicy] | None = None,
    stopping: trio.Event | None = None,
) -> Announcer:
    return Announcer(
        notifier,
        {vault.name: vault for vault in vaults},
        lambda: policies(*vaults) if of is None else of,
        stopping=trio.Event() if stopping is None else stopping,
    )


async def rest() -> None:
    """Until everything that is due now was told."""
    await trio.sleep(1)
    await wait_all_tasks_blocked()


async def fed(manager: Manager, seconds: float) -> list[float]:
    """When the watchdog was fed from now on."""
    times = []
    for _ in range(int(seconds * 4) + 1):
        await wait_all_tasks_blocked()  # whoever is due now has told
        times += [trio.current_time()] * manager.heard().count("WATCHDOG=1")
        await trio.sleep(0.25)
    return times


@pytest.mark.parametrize("listens_first", [True, False])
async def test_ready_when_it_listens_and_a_key_can_sign(
    manager: Manager, autojump_clock: MockClock, nursery: trio.Nursery, listens_first: bool
) -> None:
    vault = StatedVault(2)
    announce = announcer(manager.notifier(), vault)
    await nursery.start(announce.run)
    await rest()
    assert manager.heard() == ["STATUS=waiting: none of 2 configured key(s) can sign; vault a: away"]
    steps: list[Callable[[], None]] = [announce.listening, lambda: vault.become(ready=True)]
    first, second = steps if listens_first else reversed(steps)
    first()
    await rest()
    assert not any("READY" in text for text in manager.heard())
    assert not announce.is_ready
    second()
    await rest()
    assert manager.heard() == ["READY=1\nSTATUS=signing with 2 of 2 key(s); vault a: up"]
    vault.become(ready=False)
    await rest()
    vault.become(ready=True)
    await rest()
    assert manager.heard() == [
        "STATUS=waiting: none of 2 configured key(s) can sign; vault a: away",
        "STATUS=signing with 2 of 2 key(s); vault a: up",
    ], "READY=1 once; the status at changes"


async def test_a_key_that_another_vault_only_may_use_cannot_sign(
    manager: Manager, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    here, other = StatedVault(), StatedVault(name="b")
    rules = policies(here, only="b")
    announce = announcer(manager.notifier(), here, other, of=rules)
    await nursery.start(announce.run)
    announce.listening()
    here.become(ready=True)
    await rest()
    assert not announce.is_ready
    rules |= policies(here)
    announce.look_again()
    await rest()
    assert manager.heard()[-1].startswith("READY=1\nSTATUS=signing with 1 of 1 key(s); vault a: up; vault b: away")


async def test_many_changes_are_told_as_one(manager: Manager, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    vault = StatedVault()
    await nursery.start(announcer(manager.notifier(), vault).run)
    await rest()
    manager.heard()
    for number in range(100):
        vault.detail = f"importing keys, {number} of 100 in"
        vault.become(ready=False)
        await trio.sleep(0.001)
    await rest()
    heard = manager.heard()
    assert heard[-1].endswith("99 of 100 in")
    assert len(heard) <= 2


async def test_nothing_but_the_watchdog_once_it_stops(
    manager: Manager, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    vault, stopping = StatedVault(), trio.Event()
    announce = announcer(manager.notifier(watchdog=2), vault, stopping=stopping)
    await nursery.start(announce.run)
    announce.listening()
    await rest()
    manager.heard()
    stopping.set()
    vault.become(ready=True)
    await rest()
    assert set(manager.heard()) == {"WATCHDOG=1"}
    assert not announce.is_ready


async def test_the_watchdog_is_fed_in_time(manager: Manager, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    await nursery.start(announcer(manager.notifier(watchdog=30), StatedVault()).run)
    assert await fed(manager, 60) == [0, 7.5, 15, 22.5, 30, 37.5, 45, 52.5, 60], "each quarter of WatchdogSec"


async def test_without_a_watchdog_none_is_fed(
    manager: Manager, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    await nursery.start(announcer(manager.notifier(), StatedVault()).run)
    assert await fed(manager, 100) == []


@pytest.mark.parametrize(
    ("ready", "watchdog", "limit"),
    [(True, 2, LEAST_SILENCE), (True, 30, 22.5), (False, 30, LONGEST_ATTEMPT), (False, 2, LONGEST_ATTEMPT)],
)
async def test_one_vault_without_a_sign_of_life_starves_the_watchdog(
    manager: Manager, autojump_clock: MockClock, nursery: trio.Nursery, ready: bool, watchdog: float, limit: float
) -> None:
    lively, ill = StatedVault(), StatedVault(name="b")
    ill.become(ready=ready)
    with capture_logs() as logs:
        await nursery.start(announcer(manager.notifier(watchdog=watchdog), lively, ill).run)
        await fed(manager, 50)
        ill.lives = False
        times = await fed(manager, 400)
        assert limit - watchdog / 4 <= max(times) - ill.seen < limit
        said = [line["event"] for line in logs if "watchdog" in line["event"]]
        assert said == ["the service manager's watchdog is not fed: vault b shows no sign of life"]
        ill.lives = True
        assert await fed(manager, watchdog)


async def test_a_vault_that_has_not_been_tried_yet_has_its_time(
    manager: Manager, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    await trio.sleep(10_000)
    vault = StatedVault()
    vault.lives, vault.seen = False, float("-inf")
    await nursery.start(announcer(manager.notifier(watchdog=30), vault).run)
    assert max(await fed(manager, 400)) - 10_000 == pytest.approx(LONGEST_ATTEMPT, abs=7.5)
