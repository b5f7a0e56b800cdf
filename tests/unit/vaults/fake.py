"""A fake enclave for tests without processes: real rules and real codec over memory streams, and every way to fail."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import trio
import trio.testing

from proxy.address import parse
from signer import crypto
from signer.enclave.attestor import Attestor
from signer.enclave.sealing.local import LocalSealing
from signer.enclave.session import Session
from signer.observe.tasks import Tasks
from signer.rpc.frames import FrameDecoder, encode_frame
from signer.tezos.keys import PublicKey, PublicKeyHash, Signature
from signer.vaults.nitro.credentials import Credentials, CredentialsProvider
from signer.vaults.nitro.discovery import Locator, Place
from signer.vaults.nitro.judge import Judge
from signer.vaults.nitro.link import Connect, Timeouts
from signer.vaults.nitro.storage import KeyFile, KeyStorage
from signer.vaults.nitro.vault import NitroVault

Tamper = Callable[[bytes], Awaitable[bytes]]
"""Turns a reply's frame into the bytes that are really sent; may wait."""


async def honest(frame: bytes) -> bytes:
    return frame


class FakeEnclave:
    """Serves sessions on memory streams; `connect` takes the place of `proxy.address.connect`.

    *tamper* sees every reply from the second on: the first answers `Initialize`. `up` says whether it listens, `kill`
    ends all sessions, as a restart would.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._sealing = LocalSealing(bytes(32))
        self.attestor: Attestor | None = None
        self._scopes: list[trio.CancelScope] = []
        self.tamper: Tamper = honest
        self.tamper_new: Tamper | None = None  # what sessions that begin now do for good, in place of `tamper`
        self.up = True
        self.connections = 0
        self.calls = 0

    async def connect(self, _address: object) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if not self.up:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = trio.testing.memory_stream_pair()
        self.connections += 1
        self._nursery.start_soon(self._serve, theirs)
        return ours

    @property
    def serving(self) -> int:
        """Sessions that are open now."""
        return len(self._scopes)

    def kill_one(self) -> None:
        """End the oldest session only."""
        self._scopes[0].cancel()

    def kill(self) -> None:
        for scope in self._scopes:
            scope.cancel()

    async def _serve(self, stream: trio.abc.Stream) -> None:
        session = Session(self._sealing, attestor=self.attestor)
        decoder, answered, own = FrameDecoder(), 0, self.tamper_new
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            try:
                while chunk := await stream.receive_some(65536):
                    decoder.receive_data(chunk)
                    while (payload := decoder.next_payload()) is not None:
                        frame = encode_frame(await session.answer(payload))
                        answered += 1
                        self.calls += 1
                        await stream.send_all(frame if answered == 1 else await (own or self.tamper)(frame))
            except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
                pass
        self._scopes.remove(scope)
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)


async def credentials() -> Credentials:
    await trio.lowlevel.checkpoint()
    return Credentials("a", "b", None, "r")


class FakeLocator:
    """Says what it is told to say; *faults* are raised before that."""

    def __init__(self, *, fixed: bool = True) -> None:
        self.fixed = fixed
        self.place = Place(parse("unix:/fake:2000"))
        self.faults: list[Exception] = []
        self.asked = 0

    async def locate(self) -> Place:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if self.faults:
            raise self.faults.pop(0)
        return self.place


@asynccontextmanager
async def running(
    path: Path | KeyStorage,
    enclave: FakeEnclave,
    *,
    provider: CredentialsProvider = credentials,
    connect: Connect | None = None,
    locator: Locator | None = None,
    sessions: int = 1,
    tasks: Tasks | None = None,
    wait: float = 5,
    exchange: float = 10,
    judge: Judge | None = None,
    seal: Literal["legacy", "v1"] = "legacy",
) -> AsyncIterator[NitroVault]:
    """A vault whose first attempt to connect is over."""
    vault = NitroVault(
        name="n",
        locator=locator or FakeLocator(),
        storage=KeyFile(path) if isinstance(path, Path) else path,
        credentials=provider,
        encryption_key_id="k",
        connect=connect or enclave.connect,
        sessions=sessions,
        timeouts=Timeouts(wait=wait, exchange=exchange),
        tasks=tasks,
        judge=judge,
        seal=seal,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(vault.run)
        yield vault
        nursery.cancel_scope.cancel()


async def sign(vault: NitroVault, pkh: PublicKeyHash, message: bytes = b"m", *, version: int = 2) -> Signature:
    """Ask as the signing pipeline does."""

    async def accept(signature: Signature) -> bool:
        await trio.lowlevel.checkpoint()
        key = vault.keys()[pkh].public_key
        return signature.curve is key.curve and crypto.verify(key, message, signature, version=version)

    return await vault.sign(pkh, message, version=version, accept=accept, deadline=trio.current_time() + vault.patience)


async def prove(vault: NitroVault, key: PublicKey) -> Signature:
    async def accept(proof: Signature) -> bool:
        await trio.lowlevel.checkpoint()
        return crypto.verify_possession(key, proof)

    return await vault.prove_possession(key.hash, accept=accept)


async def signs(vault: NitroVault, pkh: PublicKeyHash, message: bytes = b"m") -> bool:
    """Whether a signature is made, and is the right one."""
    signature = await sign(vault, pkh, message)
    return crypto.verify(vault.keys()[pkh].public_key, message, signature)


async def until(condition: Callable[[], bool]) -> None:
    """Return once *condition* holds."""
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.005)
