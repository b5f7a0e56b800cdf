"""SIGHUP without a process: what is taken over, what is refused, and that no two reloads run at once."""

import threading
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import wait_all_tasks_blocked

from signer.config import Settings
from signer.config.models import PolicyHook, Server, Watermark
from signer.errors import ConfigurationError, SignerError
from signer.observe.tasks import Tasks, TaskState
from signer.reload import Reloader
from signer.tezos.keys import PublicKeyHash
from tests.unit.test_announce import Manager
from tests.unit.test_signing import FakeVault

KEY = PublicKeyHash.from_base58("tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q")


class World:
    """A reloader whose file is *file*: settings, or what reading them raises."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self.file: Settings | Exception = Settings(tezos={KEY: None})
        self.loads = 0
        self.let = threading.Event()  # lets `load` go on
        self.let.set()
        self.applied: list[Settings] = []
        self.told_after: list[list[int]] = []  # reloads of the vaults, each time that all is applied
        self.vaults = {"a": FakeVault(name="a"), "b": FakeVault(name="b")}
        self.task = Tasks().add("configuration", quiet=True)
        self.ready = True
        self.reloader = Reloader(
            self.load,
            running=Settings(),
            apply=self.applied.append,
            applied=lambda: self.told_after.append([vault.refreshed for vault in self.vaults.values()]),
            vaults=self.vaults,
            task=self.task,
            notifier=manager.notifier(),
            is_ready=lambda: self.ready,
        )

    def load(self) -> Settings:
        self.loads += 1
        self.let.wait()
        if isinstance(self.file, Exception):
            raise self.file
        return self.file

    async def once(self) -> list[MutableMapping[str, Any]]:
        """One reload; returns the log's lines from info on."""
        before = self.loads
        with capture_logs() as logs:
            self.reloader.ask()
            await self.until(lambda: self.loads > before)
            await self.settle()
        return [line for line in logs if line["log_level"] != "debug"]

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(10):
            while not condition():
                await trio.sleep(0.001)

    async def settle(self) -> None:
        """Until the reloader waits again, and not for a thread."""
        limiter = trio.to_thread.current_default_thread_limiter()
        await self.until(lambda: not limiter.borrowed_tokens)
        await wait_all_tasks_blocked(0.01)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    manager = Manager(tmp_path / "notify")
    with manager.socket:
        yield World(manager)


async def test_good_settings_are_applied_and_every_vault_reloads(world: World, nursery: trio.Nursery) -> None:
    await nursery.start(world.reloader.run)
    (line,) = await world.once()
    assert (line["log_level"], line["event"]) == ("info", "SIGHUP: the configuration was read again")
    assert world.applied == [world.file]
    assert world.told_after == [[1, 1]], "what is missing is known when the vaults have their keys"
    assert world.task.state is TaskState.RUNNING
    told = world.manager.heard()
    assert [text.partition("\n")[0] for text in told] == ["RELOADING=1", "READY=1"]


@pytest.mark.parametrize(
    ("file", "faults"),
    [
        (ConfigurationError("f:1: tezos: bad\nf:2: server: worse"), ["f:1: tezos: bad", "f:2: server: worse"]),
        (Settings(policy_hook=PolicyHook(address="http://a/")), ["configuration: policy_hook: "]),
        (Settings(server=Server(jwt={"users": {}})), ["configuration: server.jwt: "]),
    ],
)
async def test_bad_settings_change_nothing_and_every_fault_is_told(
    world: World, nursery: trio.Nursery, file: Settings | Exception, faults: list[str]
) -> None:
    await nursery.start(world.reloader.run)
    good, world.file = world.file, file
    for _ in range(2):  # each SIGHUP gets its answer
        lines = await world.once()
        assert {line["log_level"] for line in lines} == {"error"}
        *told, verdict = [line["event"] for line in lines]
        assert len(told) == len(faults)
        assert all(text.startswith(f"SIGHUP: {fault}") for text, fault in zip(told, faults, strict=True))
        assert "the old settings stay in force" in verdict
    assert world.applied == []
    assert [vault.refreshed for vault in world.vaults.values()] == [0, 0]
    assert world.task.state is TaskState.FAILING
    assert world.task.fault.startswith(faults[0])
    assert world.manager.heard()[-1] == "READY=1"
    world.file = good
    await world.once()
    assert (world.applied, world.task.state) == ([good], TaskState.RUNNING)


async def test_a_bug_in_reading_ends_nothing(world: World, nursery: trio.Nursery) -> None:
    await nursery.start(world.reloader.run)
    world.file = KeyError("bug")
    lines = await world.once()
    assert lines[0]["event"] == "internal error while the configuration was read"
    assert world.task.state is TaskState.FAILING


async def test_what_needs_a_restart_is_named(world: World, nursery: trio.Nursery) -> None:
    await nursery.start(world.reloader.run)
    world.file = Settings(base_dir=Path("/elsewhere"), watermark=Watermark(driver="mem"))
    lines = await world.once()
    (named,) = [line["keys"] for line in lines if "need a restart" in line["event"]]
    assert named == "watermark.driver, base_dir"
    assert any("forgets every mark" in line["event"] for line in lines), "warnings as at start"
    assert world.applied == [world.file]


async def test_a_bad_key_file_of_one_vault_stops_no_other(world: World, nursery: trio.Nursery) -> None:
    class BadVault(FakeVault):
        async def reload(self) -> None:
            raise SignerError("no JSON")

    world.vaults["a"] = BadVault(name="a")
    await nursery.start(world.reloader.run)
    lines = await world.once()
    assert [(line["event"], line["vault_name"]) for line in lines if line["log_level"] == "error"] == [
        ("SIGHUP: the keys of the vault stay as they were: no JSON", "a")
    ]
    assert world.vaults["b"].refreshed == 1


async def test_several_at_once_are_one_and_none_runs_beside_another(world: World, nursery: trio.Nursery) -> None:
    for _ in range(3):
        world.reloader.ask()  # before it runs: none is lost
    world.let.clear()
    await nursery.start(world.reloader.run)
    await world.until(lambda: world.loads == 1)
    for _ in range(3):
        world.reloader.ask()
    await wait_all_tasks_blocked(0.01)
    assert world.loads == 1
    world.let.set()
    await world.until(lambda: len(world.applied) == 2)
    await world.settle()
    assert world.loads == 2


async def test_who_is_not_ready_yet_tells_of_no_reload(world: World, nursery: trio.Nursery) -> None:
    world.ready = False
    await nursery.start(world.reloader.run)
    await world.once()
    assert len(world.applied) == 1
    assert world.manager.heard() == []
