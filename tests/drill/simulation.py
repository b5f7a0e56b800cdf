"""The link alone, in one process and in virtual time: tens of thousands of faults in minutes.

Between real processes most of a drill's time passes in pauses: back-off, replies overdue. Here the clock jumps over
them (`trio.testing.MockClock`). The vault, the way of the request, the API's function, the codec and the enclave's
session are the real ones, and so is the relay; memory streams take the place of sockets, and the marks are kept in
memory: the store has its own drills. The clock jumps only after a moment without work, for the key file is read in
threads.
"""

import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import structlog
import trio
import trio.testing

from proxy.address import Address, parse
from signer.enclave.sealing.local import LocalSealing
from signer.enclave.session import Session
from signer.http.api import SigningApi
from signer.http.values import ApiRequest
from signer.observe.metrics import Metrics
from signer.policy import KeyPolicy
from signer.rpc.frames import FrameDecoder, FrameError, encode_frame
from signer.signing import Signing
from signer.tezos.keys import Curve
from signer.vaults.nitro.credentials import Credentials
from signer.vaults.nitro.discovery import FixedLocator
from signer.vaults.nitro.storage import KeyFile
from signer.vaults.nitro.vault import NitroVault, Timeouts
from signer.watermark.memory import MemoryWatermarks
from tests.drill.client import Answer
from tests.drill.keys import KEY_FILE, Key, make_keys
from tests.drill.ledger import Ledger
from tests.drill.load import Load
from tests.drill.plan import Plan, Rates
from tests.drill.relay import LOST, Relay
from tests.drill.runner import SERVES_AGAIN, Outcome

JUMP_AFTER = 0.001  # seconds without work, real ones; a thread that reads the key file is done by then
_GRACE = 6  # frames: those of the handshake, so that most connections come to sign
_RATES = Rates(connection=0.1, request=0.04, reply=0.15, grace=_GRACE)
_LOOK = 1.0  # seconds between two looks whether it is enough; virtual ones
_CONSENSUS = ("block", "preattestation", "attestation")


def run(directory: Path, *, seed: int, faults: int, duration: float, bakers: int = 8, keys: int = 1) -> Outcome:
    """Make *faults* faults, or as many as *duration* seconds (of this clock, not the virtual one) allow."""
    with _quiet():
        return trio.run(
            _run,
            directory,
            seed,
            faults,
            duration,
            bakers,
            keys,
            clock=trio.testing.MockClock(rate=1, autojump_threshold=JUMP_AFTER),
        )


async def _run(directory: Path, seed: int, faults: int, duration: float, bakers: int, number: int) -> Outcome:
    plan, ledger = Plan(seed, Rates()), Ledger()
    keys = await make_keys(directory, directory / "development.key", list(Curve) * number)
    async with _signer(directory, plan, keys) as signer:
        load = Load(signer, keys, ledger, seed, bakers=bakers)
        before = trio.lowlevel.current_statistics().tasks_living
        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            plan.rates = _RATES
            while plan.faults.total() < faults and time.monotonic() < began + duration:
                await trio.sleep(_LOOK)
            plan.calm()
            recovery = await _recovered(load)
            load.stop()
        seconds = time.monotonic() - began
        after = await _tasks_at_rest(ledger, before)
    made = Counter({fault.value: count for fault, count in plan.faults.items()})
    return Outcome("link", seed, seconds, load.counts, ledger, made, recovery, (before, after), leaks="tasks")


async def _recovered(load: Load) -> list[float]:
    """Seconds, virtual ones, from the last fault to the next signature."""
    began = trio.current_time()
    with trio.move_on_after(SERVES_AGAIN):
        return [await load.next_signature() - began]
    load.ledger.failed(f"no signature within {SERVES_AGAIN:g} s after the last fault")
    return []


async def _tasks_at_rest(ledger: Ledger, before: int) -> int:
    """How many tasks live once all that were lost have ended."""
    with trio.move_on_after(SERVES_AGAIN):
        while (after := trio.lowlevel.current_statistics().tasks_living) > before:
            await trio.sleep(_LOOK)
        return after
    ledger.failed(f"{after - before} task(s) leaked: {before} before, {after} after")
    return after


@asynccontextmanager
async def _signer(directory: Path, plan: Plan, keys: list[Key]) -> AsyncIterator["DirectSigner"]:
    """The signer's parts between the API's function and the relay; they sign with every key when it yields."""
    async with trio.open_nursery() as nursery:
        enclave = _Enclave(nursery, plan, (directory / "development.key").read_bytes())
        vault = NitroVault(
            name="nitro",
            locator=FixedLocator(parse("unix:/enclave:2000")),
            storage=KeyFile(directory / KEY_FILE),
            credentials=_credentials,
            encryption_key_id="development",
            connect=enclave.connect,
            timeouts=Timeouts(),
        )
        metrics = Metrics()
        policies = {key.public_key.hash: KeyPolicy(requests=_CONSENSUS, operations=()) for key in keys}
        signing = Signing(policies=policies, vaults=[vault], marks=MemoryWatermarks(), metrics=metrics)
        await nursery.start(vault.run)
        await nursery.start(signing.run)
        yield DirectSigner(SigningApi(signing, metrics=metrics))
        nursery.cancel_scope.cancel(reason="the drill is over")


async def _credentials() -> Credentials:
    await trio.lowlevel.checkpoint()
    return Credentials("AKID", "SECRETKEY", None, "none")


class DirectSigner:
    """The signing API without its server."""

    def __init__(self, api: SigningApi) -> None:
        self._api = api

    async def post(self, address: str, message: bytes) -> Answer:
        body = f'"{message.hex()}"'.encode()
        response = await self._api.respond(ApiRequest("POST", f"/keys/{address}", "version=2", body))
        return Answer(response.status, response.body.decode())

    async def vanish(self, address: str, message: bytes, chance: random.Random) -> None:
        with trio.move_on_after(chance.choice([0, 0.002, 0.01, 1])):
            await self.post(address, message)


class _Enclave:
    """Sessions of the enclave's rules on memory streams, each behind the relay."""

    def __init__(self, nursery: trio.Nursery, plan: Plan, key: bytes) -> None:
        self._nursery = nursery
        self._relay = Relay(plan, self._dial)
        self._sealing = LocalSealing(key)

    async def connect(self, _address: Address) -> trio.abc.Stream:
        """In place of `proxy.address.connect`."""
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._relay.handle, theirs)
        return ours

    async def _dial(self) -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream: trio.abc.HalfCloseableStream) -> None:
        session, decoder = Session(self._sealing), FrameDecoder()
        try:
            async with stream:
                while chunk := await stream.receive_some():
                    decoder.receive_data(chunk)
                    while (payload := decoder.next_payload()) is not None:
                        await stream.send_all(encode_frame(await session.answer(payload)))
        except (*LOST, FrameError):
            pass
        finally:
            session.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the signer's log: a line for each fault would be most of the work."""
    processors = structlog.get_config()["processors"]
    kept = processors.copy()
    processors[:] = [_drop]
    try:
        yield
    finally:
        processors[:] = kept


def _drop(_logger: Any, _name: str, _event: MutableMapping[str, Any]) -> str:
    raise structlog.DropEvent
