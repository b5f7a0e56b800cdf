"""The processes of a drill: enclaves under their CIDs, the relay in front of each, and the signer.

The signer reaches the enclave of CID n at the hybrid socket `<n>.sock`, which is the relay's; behind it listens the
program that lives under that CID now, or nobody. `show` says which CID the signer is to find: it asks a stand-in for
nitro-cli, or follows a link at a fixed address.
"""

import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import trio

from proxy.address import UnixAddress, connect, listen_unix
from signer.enclave.hybrid import Greeter
from signer.tezos.keys import Curve
from tests.drill import client
from tests.drill.client import HttpError
from tests.drill.keys import Key, make_keys
from tests.drill.plan import Plan
from tests.drill.relay import Relay
from tests.integration.conftest import ENVIRONMENT, Setup
from tests.nitro_cli import NitroCli, enclave

PORT = 2000  # of the enclave program
FIRST_CID = 16
KEY_FILE = "development.key"
START_WITHIN = 30.0  # seconds for a process to start, on a machine that is busy
_POLL = 0.005  # seconds between two looks at something that nobody announces
_ALLOWED = {"block": None, "attestation": None, "preattestation": None}
_TASK = re.compile(r'^task_up\{task="([^"]*)"\} (\S+)$', re.MULTILINE)

# Short times: what is lost must be noticed soon, so that the next fault finds the signer working again.
NITRO: Mapping[str, object] = {"connect_timeout": 1.0, "exchange_timeout": 0.5}


async def until(condition: Callable[[], bool], what: str, within: float = START_WITHIN) -> None:
    """Return once *condition* holds; raises `TimeoutError` that says *what* did not happen."""
    with trio.move_on_after(within):
        while not condition():
            await trio.sleep(_POLL)
        return
    raise TimeoutError(f"{what}: not within {within:g} s")


@dataclass(frozen=True, slots=True)
class Guest:
    """One life of the enclave program."""

    process: subprocess.Popen[bytes]
    socket: Path

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def kill(self) -> None:
        self.process.kill()
        await trio.to_thread.run_sync(self.process.wait)


@dataclass
class World:
    """Everything that runs; made by `open_world`, which ends it."""

    setup: Setup
    plan: Plan
    nursery: trio.Nursery
    cli: NitroCli
    keys: list[Key] = field(default_factory=list)
    guests: dict[int, Guest] = field(default_factory=dict)  # by CID
    cid: int = FIRST_CID  # that the signer finds
    fixed: bool = False  # whether it asks nobody
    relays: dict[int, Relay] = field(default_factory=dict)  # by CID
    signer: subprocess.Popen[bytes] | None = None
    cleanup: ExitStack = field(default_factory=ExitStack)  # for what scenarios set up, once all processes have ended
    _serial: "count[int]" = field(default_factory=count)

    # -- enclaves

    async def boot(self, key_file: str = KEY_FILE) -> Guest:
        """Start the enclave program; it listens, and no CID leads to it yet. It opens what *key_file* sealed."""
        directory = self.setup.directory
        path = directory / f"e{next(self._serial)}.sock"
        command = [sys.executable, "-m", "signer.enclave", "--listen", f"unix:{path}:{PORT}", "--sealing", "local"]
        command += ["--development", "--key-file", str(directory / key_file)]
        with (directory / "enclave.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        self.setup.processes.append(process)
        await until(path.exists, "the enclave program listens")
        return Guest(process, path)

    async def settle_in(self, guest: Guest, cid: int) -> None:
        """Let *guest* live under *cid*, and the relay listen there."""
        self.guests[cid] = guest
        if cid not in self.relays:
            self.relays[cid] = Relay(self.plan, partial(self._dial, cid))
            await self.nursery.start(self._listen, cid)

    def show(self, cid: int) -> None:
        """From now on the signer finds the enclave under *cid*."""
        self.cid = cid
        self.cli.show(enclave(cid))
        new = self.setup.directory / "relay.new"
        new.symlink_to(self._socket(cid))
        new.rename(self.fixed_address.base)  # at once: there is no moment without the link

    @property
    def fixed_address(self) -> UnixAddress:
        """Where the enclave is that was shown last."""
        return UnixAddress(str(self.setup.directory / "relay.sock"), PORT)

    @property
    def guest(self) -> Guest:
        """The one that the signer finds."""
        return self.guests[self.cid]

    def _socket(self, cid: int) -> Path:
        return self.setup.directory / f"{cid}.sock"

    async def _dial(self, cid: int) -> trio.SocketStream:
        return await connect(UnixAddress(str(self.guests[cid].socket), PORT))

    async def _listen(self, cid: int, *, task_status: trio.TaskStatus[None]) -> None:
        relay, greeter = self.relays[cid], Greeter(PORT)

        async def handle(stream: trio.SocketStream) -> None:
            await relay.handle(stream, partial(greeter.greet, stream))

        listener = await listen_unix(str(self._socket(cid)), mode=0o600)
        task_status.started()
        await trio.serve_listeners(handle, [listener])

    # -- keys

    async def make_keys(self, curves: Iterable[Curve]) -> None:
        """A key of each of *curves*, sealed in the key file, and allowed to sign consensus."""
        self.setup.base_dir.mkdir(mode=0o700)
        self.keys = await make_keys(self.setup.base_dir, self.setup.directory / KEY_FILE, curves)
        self.setup.policies |= {key.address: {"allow": _ALLOWED} for key in self.keys}

    # -- the signer

    async def start_signer(self) -> None:
        """Start it, and wait until it can sign."""
        found = f"unix:{self.setup.directory}/{{cid}}.sock:{PORT}"
        self.setup.nitro["enclave_address"] = str(self.fixed_address) if self.fixed else found
        self.setup.write_config()
        with self.setup.log.open("ab") as log:
            command = self.setup.command("serve", "--no-list")
            environment = ENVIRONMENT | self.cli.path_environment()
            self.signer = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.setup.processes.append(self.signer)
        await self.ready(START_WITHIN)

    async def ready(self, within: float) -> None:
        """Return once `/healthz` says that every key can sign; raises `TimeoutError`, or `OSError` if it ended."""
        detail = ""
        with trio.move_on_after(within):
            while True:
                healthy, detail = await self._health()
                if healthy:
                    return
                await trio.sleep(_POLL)
        raise TimeoutError(f"the signer does not serve again by itself within {within:g} s: {detail}")

    async def _health(self) -> tuple[bool, str]:
        assert self.signer is not None
        if self.signer.poll() is not None:
            raise ChildProcessError(f"the signer ended with status {self.signer.returncode}: {self.log_end()}")
        try:
            answer = await client.get(self.setup.utility_port, "/healthz")
        except (OSError, HttpError) as exc:
            return False, repr(exc)
        return answer.status == 200 and '"skipped"' not in answer.body, answer.body

    async def tasks(self) -> dict[str, bool]:
        """The signer's long-lived tasks as `/metrics` lists them, and whether each does its work."""
        answer = await client.get(self.setup.utility_port, "/metrics")
        return {name: float(up) == 1 for name, up in _TASK.findall(answer.body)}

    def log_end(self) -> str:
        return self.setup.log.read_text()[-2000:]

    @property
    def descriptors(self) -> int:
        """How many files and sockets the signer has open."""
        assert self.signer is not None
        return sum(1 for _ in Path(f"/proc/{self.signer.pid}/fd").iterdir())

    @property
    def children(self) -> list[str]:
        """The ids of processes that the signer has started and not seen the end of."""
        assert self.signer is not None
        tasks = Path(f"/proc/{self.signer.pid}/task").glob("*/children")
        return [number for task in tasks for number in task.read_text().split()]


@asynccontextmanager
async def open_world(
    directory: Path, plan: Plan, *, curves: Iterable[Curve], nitro: Mapping[str, object] = NITRO, fixed: bool = False
) -> AsyncIterator[World]:
    """An enclave under the first CID and a key of each of *curves*; the signer is the caller's to start.

    *nitro* goes into the configuration of the vault.
    """
    setup, cleanup = Setup(directory), ExitStack()
    setup.nitro |= nitro
    try:
        async with trio.open_nursery() as nursery:
            world = World(setup, plan, nursery, NitroCli(directory / "bin"), fixed=fixed, cleanup=cleanup)
            await world.make_keys(curves)
            await world.settle_in(await world.boot(), FIRST_CID)
            world.show(FIRST_CID)
            yield world
            nursery.cancel_scope.cancel(reason="the drill is over")
    finally:
        for process in setup.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)  # a stopped one would never end
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(setup.stop_all)
        cleanup.close()
