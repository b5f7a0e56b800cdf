"""The faults, one scenario each; see `runner` for what holds after all of them."""

import errno
import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import trio

from proxy.address import UnixAddress
from signer.watermark.database import FILE_NAME
from tests.drill import runner, simulation
from tests.drill.plan import Fault, Rates
from tests.drill.relay import LOST
from tests.drill.runner import Drill, LeftOutError, Outcome, Scenario
from tests.drill.world import World
from tests.integration.conftest import free_port
from tests.nitro_cli import NitroCli, enclave

_RELAY_RATES = Rates(connection=0.05, request=0.05, reply=0.2)
_GENTLE_RATES = Rates(request=0.3, reply=0.3, faults=frozenset({Fault.DELAY, Fault.BYTES}))
_PROXY_PORT = 8000
_STORE_SIZE = "2m"  # of the store that gets full; the marks need a tenth of it
_VANISHING = 20  # clients that vanish side by side
_HANGS = 20.0  # seconds that a drill must have left for a nitro-cli that hangs until the signer ends it, after 10
_LOOK = 0.05  # seconds between two looks whether it is enough


async def relay(drill: Drill) -> None:
    await _while_more(drill, _RELAY_RATES)


async def slow(drill: Drill) -> None:
    await _while_more(drill, _GENTLE_RATES)


async def _while_more(drill: Drill, rates: Rates) -> None:
    drill.world.plan.rates = rates
    while drill.more:
        await trio.sleep(_LOOK)


async def kill(drill: Drill) -> None:
    await _restarts(drill, lambda: drill.world.cid, least=0.0, most=1.0)


async def other_cid(drill: Drill) -> None:
    await _restarts(drill, lambda: drill.world.cid + 1, least=2.0, most=2.0)


async def _restarts(drill: Drill, next_cid: Callable[[], int], *, least: float, most: float) -> None:
    """Kill the enclave and have another one under the next CID, away for *least* to *most* seconds."""
    world = drill.world
    while drill.more:
        spare = await world.boot()
        await trio.sleep(drill.chance.uniform(0, 0.5))
        killed, cid = trio.current_time(), next_cid()
        await world.guest.kill()
        drill.faults["enclave killed"] += 1
        await trio.sleep_until(killed + drill.chance.uniform(least, most))
        await world.settle_in(spare, cid)
        world.show(cid)
        await drill.recovered()


async def stop(drill: Drill) -> None:
    while drill.more:
        guest = drill.world.guest
        guest.signal(signal.SIGSTOP)
        drill.faults["enclave stopped"] += 1
        await trio.sleep(drill.chance.uniform(0, 2))
        guest.signal(signal.SIGCONT)
        await drill.recovered()


async def lies(drill: Drill) -> None:
    """Each restart under another CID meets a nitro-cli that lies for a while."""
    world = drill.world
    while drill.more:
        spare, cid = await world.boot(), world.cid + 1
        await world.settle_in(spare, cid)
        hanging = {"hanging"} if drill.deadline < trio.current_time() + _HANGS else set()
        name = drill.chance.choice(sorted(_LIES.keys() - hanging))
        _LIES[name](world.cli, world.cid, cid)
        drill.faults[f"nitro-cli: {name}"] += 1
        await world.guest.kill()
        await trio.sleep(drill.chance.uniform(0, 1.5))
        world.show(cid)
        if name == "slow":
            _end_hanging(world.cli)
        await drill.recovered()


def _end_hanging(cli: NitroCli) -> None:
    """Let a nitro-cli that hangs end; it may not have been called yet, or have ended."""
    for name in ("pid", "child"):
        number = cli.process_id(name)
        if number is not None:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


_LIES: Mapping[str, Callable[[NitroCli, int, int], None]] = {  # told of the old CID and the new one
    "garbled": lambda cli, _old, _new: cli.say(b'[{"EnclaveCID": \xff'),
    "nothing": lambda cli, _old, _new: cli.say(b""),
    "no enclave": lambda cli, _old, _new: cli.show(),
    "no array": lambda cli, _old, new: cli.say(json.dumps(enclave(new)).encode()),
    "failing": lambda cli, _old, _new: cli.fail(39, "[ E39 ] Enclave process connection failure."),
    "without end": lambda cli, _old, _new: cli.babble(),
    "slow": lambda cli, _old, _new: cli.hang(),  # it is ended when the lie is over
    "hanging": lambda cli, _old, _new: cli.hang(),
    "two enclaves": lambda cli, old, new: cli.show(enclave(old, name="one"), enclave(new, name="two")),
    "wrong state": lambda cli, _old, new: cli.show(enclave(new, state="TERMINATING")),
    "debug mode": lambda cli, _old, new: cli.show(enclave(new, flags="DEBUG_MODE")),
    "stale CID": lambda cli, old, _new: cli.show(enclave(old)),
    "impossible CID": lambda cli, _old, _new: cli.show(enclave(3)),
}


async def stranger(drill: Drill) -> None:
    """The CID is for a while that of an enclave that cannot open the keys."""
    world = drill.world
    while drill.more:
        spare, other = await world.boot(), await world.boot("other.key")
        strange, cid = world.cid + 1, world.cid + 2
        await world.settle_in(other, strange)
        await world.settle_in(spare, cid)
        await world.guest.kill()
        world.show(strange)
        drill.faults["nitro-cli: another enclave"] += 1
        await trio.sleep(drill.chance.uniform(0, 1.5))
        world.show(cid)
        await other.kill()
        await drill.recovered()


async def signer_killed(drill: Drill) -> None:
    while drill.more:
        await trio.sleep(drill.chance.uniform(0, 0.5))
        assert drill.world.signer is not None
        drill.world.signer.kill()
        await trio.to_thread.run_sync(drill.world.signer.wait)
        drill.faults["signer killed"] += 1
        await drill.world.start_signer()
        await drill.recovered()


async def with_proxy(world: World) -> None:
    world.setup.nitro |= {"proxy_remote_address": f"127.0.0.1:{free_port()}", "proxy_local_port": _PROXY_PORT}


async def proxy_gone(drill: Drill) -> None:
    """Connections from the enclave through the proxy, whose host does not listen."""
    path = UnixAddress(drill.world.fixed_address.base, _PROXY_PORT).listener_path
    while drill.more:
        with suppress(*LOST):
            async with await trio.open_unix_socket(path) as stream:
                drill.faults["connection to the proxy's dead host"] += 1
                await stream.send_all(b"hello")
                await stream.receive_some(64)


async def store_locked(drill: Drill) -> None:
    """Another process has the marks' database for itself for a while."""
    path = drill.world.setup.base_dir / FILE_NAME
    while drill.more:
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)) as other:
            await trio.to_thread.run_sync(other.execute, "BEGIN EXCLUSIVE")
            drill.faults["store locked"] += 1
            await trio.sleep(drill.chance.uniform(0, 1.5))
            other.execute("ROLLBACK")
        await drill.recovered()


async def on_a_small_disk(world: World) -> None:
    """Move the base directory to a file system of its own."""
    base = world.setup.base_dir
    content = {path.name: path.read_bytes() for path in base.iterdir()}
    options = f"size={_STORE_SIZE},mode=0700"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(base)], capture_output=True, check=False)
    if done.returncode != 0:
        raise LeftOutError("this user cannot mount a tmpfs")
    world.cleanup.callback(subprocess.run, ["umount", "-l", str(base)], check=False)
    for name, data in content.items():
        (base / name).write_bytes(data)


async def store_full(drill: Drill) -> None:
    filler = drill.world.setup.base_dir / "filler"
    while drill.more:
        _fill(filler)
        drill.faults["store full"] += 1
        await trio.sleep(drill.chance.uniform(0, 1))
        filler.unlink()
        await drill.recovered()


def _fill(filler: Path) -> None:
    """Write until there is no room left."""
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise


async def vanish(drill: Drill) -> None:
    """Clients that go away in every phase, many side by side."""

    async def vanishing() -> None:
        while drill.more:
            await drill.load.vanish_once(drill.chance)
            drill.faults["client vanished"] += 1

    async with trio.open_nursery() as nursery:
        for _ in range(_VANISHING):
            nursery.start_soon(vanishing)


_PROCESSES = {
    scenario.name: partial(runner.run, scenario)
    for scenario in (
        Scenario("relay", "every fault of the relay", relay),
        Scenario("slow", "delays and single bytes", slow),
        Scenario("kill", "SIGKILL of the enclave", kill),
        Scenario("stop", "SIGSTOP of the enclave", stop),
        Scenario("cid", "restarts under another CID, 2 s each", other_cid),
        Scenario("lies", "nitro-cli lying during restarts", lies),
        Scenario("stranger", "an enclave that cannot open the keys", stranger),
        Scenario("signer", "SIGKILL of the signer", signer_killed, lost_answers=True),
        Scenario("proxy", "the proxy's host is gone", proxy_gone, prepare=with_proxy, fixed=True),
        Scenario("locked", "the marks' database is locked", store_locked),
        Scenario("full", "the marks' disk is full", store_full, prepare=on_a_small_disk),
        Scenario("vanish", "clients that vanish", vanish),
    )
}

RUNS: Mapping[str, Callable[..., Outcome]] = {"link": simulation.run} | _PROCESSES
"""By name: takes the directory to work in, and `seed`, `faults`, `duration`, `bakers` and `keys`."""
