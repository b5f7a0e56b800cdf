"""The vault: keys by address, whichever enclave session serves them.

One *epoch* is one life of the link: a session, and the handle of each key in it. When the session ends the vault
connects again with back-off, for ever, and imports all blobs anew; requests hold no reference to an epoch, they wait
for the next one within a bounded time and repeat what a lost session left unanswered (signing is deterministic).
"""

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from proxy.address import Address
from signer import crypto
from signer.crypto.interface import SecretKey
from signer.errors import KeyNotFoundError, SignerError
from signer.rpc.frames import FrameError
from signer.rpc.messages import (
    Call,
    Created,
    GenerateAndImport,
    Import,
    Imported,
    ImportUnencrypted,
    Initialize,
    ProvePossession,
    RemoteError,
    Result,
    Sign,
)
from signer.tezos.errors import TezosError
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature
from signer.vaults.interface import VaultError, VaultHealth, VaultKey, VaultUnavailableError
from signer.vaults.nitro.credentials import CredentialsProvider
from signer.vaults.nitro.session import Session, SessionLostError
from signer.vaults.nitro.storage import FileStamp, FileStorage, StorageError, StoredKey

logger = structlog.get_logger(__name__)

KIND = "NitroEnclave"
FIRST_DELAY = 0.05  # seconds before the first new try: an enclave that only restarted is back soon
MAX_DELAY = 2.0  # seconds; below the 3.6 s in which the Octez client retries
STABLE_AFTER = 10.0  # seconds that a link must have been up for the delay to start over
WATCH_INTERVAL = 1.0  # seconds between two looks at the key file
DISTRUST_INTERVAL = 60.0  # seconds; a key whose signatures are always wrong must not cost the others their link
RETRY_SKIPPED = 5.0  # seconds before blobs are tried again of which none could be opened: KMS may have been away

Connect = Callable[[Address], Awaitable[trio.abc.Stream]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Limits in seconds, each from the configuration."""

    connect: float = 5.0
    exchange: float = 10.0
    wait: float = 2.5  # for the link to be rebuilt, before a caller is told to ask again


class _Epoch:
    """A session that is initialized, and the handles of the keys in it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.handles: dict[PublicKeyHash, int] = {}


class NitroVault:
    """Keys sealed in the file at *storage*, used through the enclave at *address*.

    *name* is the configuration's name of the vault. Implements `signer.vaults.interface.Vault`.
    """

    kind = KIND

    def __init__(
        self,
        *,
        name: str,
        address: Address,
        storage: Path,
        credentials: CredentialsProvider,
        encryption_key_id: str,
        connect: Connect,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.name = name
        self._address = address
        self._storage = FileStorage(storage)
        self._credentials = credentials
        self._encryption_key_id = encryption_key_id
        self._connect = connect
        self._timeouts = timeouts or Timeouts()
        self._keys: dict[PublicKeyHash, VaultKey] = {}
        self._skipped: dict[str, str] = {}
        self._lost: set[str] = set()  # addresses in use that the key file has no more
        self._stored: list[StoredKey] = []
        self._stamp: FileStamp | bool = False  # False: never read
        self._imported = False  # whether all of _stored was tried in this epoch
        self._retry_at = 0.0  # Trio's clock
        self._distrusted_at = float("-inf")  # Trio's clock
        self._epoch: _Epoch | None = None
        self._loaded = False  # whether all blobs of this epoch were tried
        self._changed = trio.Event()
        self._failure = "not connected yet"
        self._storage_failure = ""
        self._restarts = -1
        self._refreshing = trio.Lock()

    # -- what the interface asks for

    @property
    def ready(self) -> bool:
        return self._linked and self._loaded

    @property
    def _linked(self) -> bool:
        return self._epoch is not None and self._epoch.session.alive

    def keys(self) -> Mapping[PublicKeyHash, VaultKey]:
        return self._keys

    async def wait_ready(self) -> bool:
        with trio.move_on_after(self._timeouts.wait):
            while not self.ready:
                await self._changed.wait()
        return self.ready

    def health(self) -> VaultHealth:
        if not self._linked:
            detail = self._failure
        elif not self._loaded:
            detail = "importing keys"
        else:
            detail = f"connected to {self._address}, {len(self._keys)} key(s)"
        usable = len(self._epoch.handles) if self._epoch is not None and self._linked else 0
        return VaultHealth(self.ready and bool(usable or not self._skipped), detail, usable, dict(self._skipped))

    async def sign(self, key: PublicKeyHash, message: bytes, *, version: int) -> Signature:
        wire_version = version if version in (0, 1, 2) else 255
        result = await self._ask(key, lambda handle: Sign(handle, message, wire_version))
        return _signature(result)

    def distrust(self, reason: str) -> bool:
        """End the session: if its replies are out of step, every further one belongs to somebody else too."""
        now = trio.current_time()
        if self._epoch is None or now < self._distrusted_at + DISTRUST_INTERVAL:
            return False
        self._distrusted_at = now
        self._epoch.session.close(reason)
        return True

    async def prove_possession(self, key: PublicKeyHash, *, over: PublicKey | None = None) -> Signature:
        subject = None if over is None else over.data
        return _signature(await self._ask(key, lambda handle: ProvePossession(handle, subject)))

    async def import_key(self, secret: SecretKey) -> PublicKey:
        if secret.public_key.hash in self._keys:
            raise VaultError(f"(Nitro): {secret.public_key.hash} is in the vault already")
        raw = secret.secret_bytes()
        try:
            return await self._create(ImportUnencrypted(secret.curve, bytes(raw)), expected=secret.public_key)
        finally:
            raw[:] = bytes(len(raw))

    async def generate(self, curve: Curve) -> PublicKey:
        return await self._create(GenerateAndImport(curve))

    async def refresh(self) -> None:
        """Read the key file if another process changed it, and import what is new."""
        async with self._refreshing:
            epoch = self._epoch
            await self._follow_storage()
            if epoch is not None and epoch.session.alive and (not self._imported or self._worth_a_retry(epoch)):
                await self._import_all(epoch)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await trio.to_thread.run_sync(self._storage.check_writable)
        await self._read_storage()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            await nursery.start(self._stay_connected)
            task_status.started()

    # -- the link

    async def _stay_connected(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        delay, announced, log = FIRST_DELAY, False, logger.info

        def announce() -> None:
            nonlocal announced
            if not announced:
                announced = True
                task_status.started()

        while True:
            began = trio.current_time()
            log(f"(Nitro): connecting to the enclave signer on {self._address}...", vault_name=self.name)
            failure = await self._live(announce)
            if failure != self._failure or self._loaded:
                logger.error("the enclave link is down", vault_name=self.name, error=failure)
            log = logger.info if self._loaded else logger.debug  # while it stays away, once is enough
            self._failure, self._loaded, self._epoch = failure, False, None
            self._notify()
            announce()
            if trio.current_time() - began >= STABLE_AFTER:
                delay = FIRST_DELAY
            await trio.sleep(delay * random.uniform(0.8, 1.2))  # noqa: S311  # jitter, not a secret
            delay = min(2 * delay, MAX_DELAY)

    async def _live(self, announce: Callable[[], None]) -> str:
        """One epoch: connect, initialize, import, serve until the session ends; returns why it ended."""
        try:
            with trio.fail_after(self._timeouts.connect):
                credentials = await self._credentials()
                stream = await self._connect(self._address)
        except trio.TooSlowError:
            return f"(Nitro): dial {self._address}: no answer within {self._timeouts.connect:g} s"
        except OSError as exc:
            return f"(Nitro): dial {self._address}: {_reason(exc)}"
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:  # reset within a hybrid handshake
            return f"(Nitro): dial {self._address}: connection lost: {exc.__cause__ or type(exc).__name__}"
        except SignerError as exc:
            return str(exc)
        session = Session(stream, timeout=self._timeouts.exchange)
        failure = ""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            try:
                await session.call(
                    Initialize(
                        access_key_id=credentials.access_key_id,
                        secret_access_key=credentials.secret_access_key,
                        session_token=credentials.session_token,
                        encryption_key_id=self._encryption_key_id,
                        region=credentials.region,
                    )
                )
                epoch = self._epoch = _Epoch(session)
                self._restarts += 1
                self._notify()
                async with self._refreshing:
                    await self._follow_storage()
                    await self._import_all(epoch)
                if session.alive:
                    self._loaded = True
                    self._keys = {pkh: key for pkh, key in self._keys.items() if pkh in epoch.handles}
                    self._notify()
                    logger.info("the enclave link is up", vault_name=self.name, keys=len(self._keys))
                    announce()
            except RemoteError as exc:
                failure = f"(Nitro): RPC Error: {exc}"
                nursery.cancel_scope.cancel(reason=failure)
            except FrameError as exc:
                failure = f"(Nitro): Initialize: {exc}"
                nursery.cancel_scope.cancel(reason=failure)
            except SessionLostError as exc:
                failure = str(exc)
        return failure or session.failure

    async def _watch(self) -> None:
        while True:
            await trio.sleep(WATCH_INTERVAL)
            await self.refresh()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # -- keys

    async def _read_storage(self) -> None:
        stamp = await trio.to_thread.run_sync(self._storage.stamp)
        found = await trio.to_thread.run_sync(self._storage.load)
        self._stored = [*found, *self._vanished(found)]
        self._stamp, self._imported = stamp, False
        listed = {stored.public_key_hash for stored in self._stored}
        self._skipped = {address: why for address, why in self._skipped.items() if address in listed}

    def _vanished(self, found: list[StoredKey]) -> list[StoredKey]:
        """The entries of keys in use that the file has lost: an emptied file must not cost the next slot."""
        listed = {stored.public_key_hash for stored in found}
        served = {str(pkh) for pkh in self._keys}
        lost = [one for one in self._stored if one.public_key_hash in served - listed]
        known, self._lost = self._lost, {one.public_key_hash for one in lost}
        if self._lost - known:
            logger.error(
                "keys in use are gone from the key file; they serve until this process ends, and not after that",
                vault_name=self.name,
                file=str(self._storage.path),
                keys=[one.public_key_hash for one in lost],
            )
        return lost

    async def _follow_storage(self) -> None:
        """Read the key file if it is another than the one read before; a damaged one leaves the keys known."""
        try:
            if await trio.to_thread.run_sync(self._storage.stamp) == self._stamp:
                return
            await self._read_storage()
        except StorageError as exc:
            if str(exc) != self._storage_failure:
                logger.error("going on with the keys known", vault_name=self.name, error=str(exc))
            self._storage_failure = str(exc)
            return
        self._storage_failure = ""

    async def _import_all(self, epoch: _Epoch) -> None:
        """Import every stored blob that has no handle yet, all on the wire at once."""
        async with trio.open_nursery() as nursery:
            for stored in self._stored:
                nursery.start_soon(self._import_one, epoch, stored)
        self._retry_at = trio.current_time() + RETRY_SKIPPED
        self._imported = True  # not reached by a caller that went away on the way: the next one goes on
        order = {stored.public_key_hash: index for index, stored in enumerate(self._stored)}
        self._keys = dict(sorted(self._keys.items(), key=lambda item: order.get(str(item[0]), len(order))))

    def _worth_a_retry(self, epoch: _Epoch) -> bool:
        """Only while no key serves: an import that hangs in KMS holds up the signatures behind it."""
        return not epoch.handles and bool(self._skipped) and trio.current_time() >= self._retry_at

    async def _import_one(self, epoch: _Epoch, stored: StoredKey) -> None:
        try:
            pkh = PublicKeyHash.from_base58(stored.public_key_hash)
            if pkh in epoch.handles:
                return
            if not stored.blob:
                raise VaultError("the entry has no encrypted_private_key in Base64")
            result = await epoch.session.call(Import(stored.blob))
            assert isinstance(result, Imported)
            if result.public_key.hash != pkh:
                raise VaultError(f"the blob holds the key of {result.public_key.hash}")
            crypto.check_public_key(result.public_key)
        except SessionLostError:
            return  # the next epoch tries again
        except (RemoteError, TezosError, VaultError, crypto.InvalidKeyError, FrameError) as exc:
            if any(str(served) == stored.public_key_hash for served in epoch.handles):
                return  # a second entry of the same key, which another one serves
            if self._skipped.get(stored.public_key_hash) != str(exc):
                logger.error(
                    "key skipped: its blob cannot be used",
                    vault_name=self.name,
                    pkh=stored.public_key_hash,
                    error=str(exc),
                )
            self._skipped[stored.public_key_hash] = str(exc)
            return
        if self._skipped.pop(stored.public_key_hash, None) is not None:
            logger.info("a key that was skipped can be used", vault_name=self.name, pkh=stored.public_key_hash)
        self._serve(epoch, result.public_key, result.handle)

    def _serve(self, epoch: _Epoch, public_key: PublicKey, handle: int) -> None:
        epoch.handles[public_key.hash] = handle
        self._keys[public_key.hash] = VaultKey(public_key)
        self._notify()

    async def _create(
        self, call: ImportUnencrypted | GenerateAndImport, *, expected: PublicKey | None = None
    ) -> PublicKey:
        """A new key: checked before it is stored, stored durably before it counts as one."""
        with trio.move_on_after(self._timeouts.wait):
            while not self._linked:
                await self._changed.wait()
        epoch = self._epoch
        if epoch is None or not epoch.session.alive:
            raise self._unavailable(self._failure)
        try:
            created = await epoch.session.call(call)
        except RemoteError as exc:
            raise VaultError(f"(Nitro): RPC Error: {exc}") from exc
        except SessionLostError as exc:
            raise self._unavailable(str(exc)) from exc
        assert isinstance(created, Created)
        assert created.handle is not None
        _check_created(call.curve, created.public_key, expected)
        await trio.to_thread.run_sync(self._storage.append, created.public_key.hash, created.encrypted_private_key)
        self._serve(epoch, created.public_key, created.handle)
        return created.public_key

    # -- one exchange

    async def _ask(self, key: PublicKeyHash, make: Callable[[int], Call]) -> Result:
        """Have the enclave answer about *key*, over as many sessions as it takes within the waiting time."""
        deadline = trio.current_time() + self._timeouts.wait
        while True:
            epoch, handle = await self._handle(key, deadline)
            try:
                return await epoch.session.call(make(handle))
            except RemoteError as exc:
                raise VaultError(f"(Nitro): RPC Error: {exc}") from exc
            except FrameError as exc:
                raise VaultError(f"(Nitro): {exc}") from exc
            except SessionLostError as exc:
                if trio.current_time() >= deadline:
                    raise self._unavailable(str(exc)) from exc
                await trio.lowlevel.checkpoint()  # the link notices the loss in its own task

    async def _handle(self, key: PublicKeyHash, deadline: float) -> tuple[_Epoch, int]:
        """The session and handle that serve *key* now, waiting for the link until *deadline*."""
        while True:
            epoch = self._epoch
            if epoch is not None and epoch.session.alive:
                handle = epoch.handles.get(key)
                if handle is not None:
                    return epoch, handle
                if self._loaded:
                    if str(key) in self._skipped:
                        raise self._unavailable(self._skipped[str(key)])
                    raise KeyNotFoundError("this key not found in any vault")
            with trio.move_on_at(deadline) as limit:
                await self._changed.wait()
            if limit.cancelled_caught:
                raise self._unavailable(self._failure)

    def _unavailable(self, reason: str) -> VaultUnavailableError:
        return VaultUnavailableError(
            f"(Nitro): the enclave cannot be asked now, try again: {reason.removeprefix('(Nitro): ')}"
        )


def _reason(exc: OSError) -> str:
    """What the system said; Trio puts the errors of a host's several addresses into a group behind its own."""
    cause: BaseException | None = exc.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[-1]
    told = cause if isinstance(cause, OSError) else exc
    return told.strerror or str(told)


def _signature(result: Result) -> Signature:
    """Of whatever curve: the caller verifies it, and distrusts the link where it is another's."""
    assert isinstance(result, Signature)
    return result


def _check_created(curve: Curve, created: PublicKey, expected: PublicKey | None) -> None:
    """Raise `VaultError` unless the enclave made the key that it was asked for."""
    if expected is not None and created != expected:
        raise VaultError(f"(Nitro): the enclave returned {created} for the key of {expected}; nothing was stored")
    if created.curve is not curve:
        raise VaultError(f"(Nitro): the enclave made the key {created}, which is of another curve; nothing was stored")
    try:
        crypto.check_public_key(created)
    except crypto.InvalidKeyError as exc:
        raise VaultError(f"(Nitro): malformed public key RPC response: {exc}; nothing was stored") from exc
