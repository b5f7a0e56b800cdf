"""The vault: keys by address, whichever enclave session serves them; section 4 of the signer specification.

The blobs of the key storage (`blobs`) are offered to the link (`link`), which imports them wherever it connects; what a
caller asks for is handed to the link.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Literal

import trio

from proxy.address import Address
from signer import crypto
from signer.attestation import claims
from signer.crypto.interface import SecretKey
from signer.observe.tasks import Tasks
from signer.rpc.messages import (
    SEAL_V1,
    Attest,
    Attested,
    Created,
    GenerateAndImport,
    ImportSealed,
    ImportUnencrypted,
    ProvePossession,
    PublicKeyFrom,
    Reseal,
    Result,
    Sign,
)
from signer.tezos.errors import TezosError
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature
from signer.vaults.interface import Accept, VaultError, VaultHealth, VaultKey
from signer.vaults.nitro.blobs import Blobs
from signer.vaults.nitro.credentials import CredentialsProvider
from signer.vaults.nitro.discovery import Locator
from signer.vaults.nitro.enclave_log import CounterObserver, EnclaveLog
from signer.vaults.nitro.judge import Judge, Wanted
from signer.vaults.nitro.link import Connect, EnclaveLink, Timeouts
from signer.vaults.nitro.pace import Pace
from signer.vaults.nitro.storage import KeyStorage, StorageAwayError

KIND = "NitroEnclave"
WATCH_INTERVAL = 1.0  # seconds between two looks at the key storage
_SEALED_V1 = (b"TZSB\x01", b"TZSD\x01")  # by an enclave's image, and in development
_UNKNOWN_IMPORT_KEY = "unknown import key"  # the enclave's words
SILENCE = 1.0  # seconds without any reply, though some are due, after which the vault is not ready
_OPENING = Pace(1.0, 10.0)  # between two tries to open a key storage that is away: a key serves soon after it is back

__all__ = ["KIND", "NitroVault", "Timeouts"]


class NitroVault:
    """Keys sealed in *storage*, used through the enclave that *locator* finds.

    *name* is the configuration's name of the vault. Implements `signer.vaults.interface.Vault`.
    """

    kind = KIND

    def __init__(
        self,
        *,
        name: str,
        locator: Locator,
        storage: KeyStorage,
        credentials: CredentialsProvider,
        encryption_key_id: str,
        connect: Connect,
        sessions: int = 2,
        judge: Judge | None = None,
        seal: Literal["legacy", "v1"] = "legacy",
        log_port: int = 0,
        observer: CounterObserver | None = None,
        timeouts: Timeouts | None = None,
        tasks: Tasks | None = None,
    ) -> None:
        self.name = name
        timeouts = timeouts or Timeouts()
        self.patience = timeouts.wait
        self._seal = seal
        self._keys: dict[PublicKeyHash, VaultKey] = {}
        self._order: dict[PublicKeyHash, int] = {}  # places in the key storage
        self._sorted = True
        self._blobs = Blobs(storage, vault_name=name, served=lambda: [str(key) for key in self._keys])
        self._link = EnclaveLink(
            name=name,
            locator=locator,
            credentials=credentials,
            encryption_key_id=encryption_key_id,
            connect=connect,
            sessions=sessions,
            timeouts=timeouts,
            tasks=tasks or Tasks(),
            on_served=self._serve,
            judge=judge or Judge(name, "off", Wanted()),
            seal=SEAL_V1 if seal == SEAL_V1 else None,
        )
        self._log = EnclaveLog(
            name, log_port, connect=connect, find=self._place, wait_change=self.wait_change, observer=observer
        )
        self._log_port = log_port

    # -- the state

    @property
    def ready(self) -> bool:
        return self._link.ready

    def serves(self, key: PublicKeyHash) -> bool:
        return self._link.epochs.route(key) is not None

    async def wait_for(self, key: PublicKeyHash, deadline: float) -> None:
        await self._link.asking.wait_for(key, deadline)

    async def wait_change(self) -> None:
        await self._link.standing.changed.wait()

    @property
    def last_sign_of_life(self) -> float:
        return self._link.last_sign_of_life

    def keys(self) -> Mapping[PublicKeyHash, VaultKey]:
        if not self._sorted:
            last = len(self._order)
            self._keys = dict(sorted(self._keys.items(), key=lambda item: self._order.get(item[0], last)))
            self._sorted = True
        return self._keys

    def health(self) -> VaultHealth:
        epochs, skipped = self._link.epochs, self._link.epochs.skipped()
        usable = len({key for epoch in epochs.epochs for key in epoch.keys})
        silent = self._link.silent_for
        if not epochs.linked:
            detail = self._link.standing.failure
        elif not epochs.loaded:
            detail = f"importing keys, {usable} of {len(self._blobs.entries)} in"
        elif silent > SILENCE:
            detail = f"the enclave has not answered for {silent:.1f} s"
        else:
            assert epochs.newest is not None
            sessions = sum(1 for _ in epochs.lines())
            detail = f"connected to {epochs.newest.life.place}, {sessions} session(s), {len(self._keys)} key(s)"
        ready = self.ready and silent <= SILENCE and bool(usable or not skipped)
        return VaultHealth(ready, detail, usable, skipped)

    async def refresh(self) -> None:
        """Read the key storage if another process changed it, and import what is new."""
        if await self._blobs.follow():
            self._list()
            self._link.retry_refused()
        await self._link.wait_settled(trio.current_time() + self.patience)

    async def reload(self) -> None:
        for address in await self._blobs.reload():
            pkh = PublicKeyHash.from_base58(address)
            self._keys.pop(pkh, None)
            self._link.epochs.forget(pkh)
        self._list()
        self._link.retry_refused()
        self._link.renew_credentials()
        await self._link.wait_settled(trio.current_time() + self.patience)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        reported = await self._open(task_status)
        self._list()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            if self._log_port:
                nursery.start_soon(self._log.follow)
            await nursery.start(self._link.run)
            if not reported:
                task_status.started()

    async def _open(self, task_status: trio.TaskStatus[None]) -> bool:
        """Read the key storage, however long it is away; returns whether that had to be reported as the start."""
        began, reported = trio.current_time(), False
        while True:
            try:
                await self._blobs.open()
            except StorageAwayError as exc:
                self._link.kept_from_starting(str(exc))
                if not reported:
                    task_status.started()
                    reported = True
                await trio.sleep(_OPENING.pause(trio.current_time() - began))
            else:
                return reported

    async def _watch(self) -> None:
        """Follow what other processes do to the key storage."""
        while True:
            await trio.sleep(WATCH_INTERVAL)
            if await self._blobs.follow():
                self._list()
                self._link.retry_refused()

    def _place(self) -> Address | None:
        """Where the enclave is, while something answers there."""
        newest = self._link.epochs.newest
        return newest.life.place.address if newest is not None and self._link.epochs.linked else None

    def _list(self) -> None:
        """Offer the blobs to the link; listings follow the order of the storage."""
        self._order = {}
        for index, stored in enumerate(self._blobs.entries):
            with suppress(TezosError):  # the link says what is wrong with the entry
                self._order.setdefault(PublicKeyHash.from_base58(stored.public_key_hash), index)
        self._sorted = False
        self._link.list_blobs(self._blobs.entries)

    def _serve(self, key: PublicKey) -> None:
        if key.hash not in self._keys:
            self._keys[key.hash] = VaultKey(key)
            self._sorted = False

    # -- exchanges

    async def sign(
        self, key: PublicKeyHash, message: bytes, *, version: int, accept: Accept, deadline: float
    ) -> Signature:
        wire_version = version if version in (0, 1, 2) else 255
        result = await self._link.asking.ask(
            key, lambda handle: Sign(handle, message, wire_version), accept=_of_signature(accept), deadline=deadline
        )
        assert isinstance(result, Signature)
        return result

    async def prove_possession(self, key: PublicKeyHash, *, over: PublicKey | None = None, accept: Accept) -> Signature:
        subject = None if over is None else over.data
        result = await self._link.asking.ask(
            key,
            lambda handle: ProvePossession(handle, subject),
            accept=_of_signature(accept),
            deadline=trio.current_time() + self.patience,
        )
        assert isinstance(result, Signature)
        return result

    async def import_key(self, secret: SecretKey) -> PublicKey:
        if secret.public_key.hash in self._keys:
            raise VaultError(f"(Nitro): {secret.public_key.hash} is in the vault already")
        raw = secret.secret_bytes()
        try:
            call = ImportUnencrypted(secret.curve, bytes(raw))
            return await self._create(call, lambda key: key == secret.public_key, f"the key of {secret.public_key}")
        finally:
            raw[:] = bytes(len(raw))

    async def generate(self, curve: Curve) -> PublicKey:
        return await self._create(
            GenerateAndImport(curve), lambda key: key.curve is curve, f"a new {curve.address_prefix} key"
        )

    async def attest_import(self, nonce: bytes) -> bytes:
        """The enclave's document with a fresh key to seal a secret to, for whoever drew *nonce*; not verified here."""
        _, found = await self._link.asking.call_once(Attest(claims.IMPORT, nonce), trio.current_time() + self.patience)
        assert isinstance(found, Attested)
        return found.document

    async def import_sealed(self, order: ImportSealed) -> PublicKey:
        """Store a key that was sealed to the key of such a document; nobody but the enclave sees it."""
        if any(str(key) == order.address for key in self._keys):
            raise VaultError(f"(Nitro): {order.address} is in the vault already")
        try:
            return await self._create(order, lambda key: str(key.hash) == order.address, f"the key of {order.address}")
        except VaultError as exc:
            if not str(exc).endswith(_UNKNOWN_IMPORT_KEY):
                raise
            raise VaultError(
                f"{exc} (it was used before, is ten minutes old, or the enclave was started again); run seal-for again"
            ) from exc

    async def _create(
        self,
        call: ImportUnencrypted | GenerateAndImport | ImportSealed,
        is_wanted: Callable[[PublicKey], bool],
        wanted: str,
    ) -> PublicKey:
        """A new key: checked before it is stored, stored durably before it counts as one."""
        line, created = await self._link.asking.call_once(call, trio.current_time() + self.patience)
        assert isinstance(created, Created)
        assert created.handle is not None
        if not is_wanted(created.public_key):
            raise VaultError(f"(Nitro): the enclave returned {created.public_key} for {wanted}; nothing was stored")
        _check_usable(created.public_key)
        self._check_seal(created.encrypted_private_key)
        await self._blobs.append(created.public_key, created.encrypted_private_key)
        self._link.adopt(line, created.public_key, created.handle)
        if await self._blobs.follow():
            self._list()
        return created.public_key

    async def reseal(self, key: PublicKeyHash) -> bool:
        """Exchange a legacy blob for one of version 1; False where it is of version 1 already.

        The new one is opened once before the old one is given up. Raises `VaultError`, `StorageError`.
        """
        stored = next((one for one in self._blobs.entries if one.public_key_hash == str(key)), None)
        if stored is None:
            raise VaultError(f"(Nitro): {key} is not in the vault")
        if stored.blob.startswith(_SEALED_V1):
            return False
        deadline = trio.current_time() + self.patience
        _, created = await self._link.asking.call_once(Reseal(stored.blob), deadline)
        assert isinstance(created, Created)
        blob = created.encrypted_private_key
        if not blob.startswith(_SEALED_V1):
            raise VaultError("(Nitro): the enclave answered with another format; nothing was changed")
        _, opened = await self._link.asking.call_once(PublicKeyFrom(blob), deadline)
        if not isinstance(opened, PublicKey) or opened.hash != key or created.public_key != opened:
            raise VaultError(f"(Nitro): the enclave resealed another key than {key}; nothing was changed")
        await self._blobs.replace(stored, blob)
        if await self._blobs.follow():
            self._list()
        return True

    def _check_seal(self, blob: bytes) -> None:
        """An enclave that doesn't know the newer format ignores that it was asked for."""
        if self._seal == SEAL_V1 and not blob.startswith(_SEALED_V1):
            raise VaultError(
                "(Nitro): the enclave seals keys in the legacy format, and seal: v1 is configured; nothing was stored. "
                "Run an image of this signer, or set seal: legacy"
            )


def _of_signature(accept: Accept) -> Callable[[Result], Awaitable[bool]]:
    async def check(result: Result) -> bool:
        return isinstance(result, Signature) and await accept(result)

    return check


def _check_usable(key: PublicKey) -> None:
    """Raise `VaultError` for a public key that no secret key has."""
    try:
        crypto.check_public_key(key)
    except crypto.InvalidKeyError as exc:
        raise VaultError(f"(Nitro): malformed public key RPC response: {exc}; nothing was stored") from exc
