"""The blobs as this process knows them: the key storage, followed while others change it; section 4.6, weakness 14.

A storage that is damaged or lost never costs a key that serves: what was read last stays in force, and that is said.
"""

from collections.abc import Callable, Collection, Sequence

import structlog
import trio

from signer.tezos.keys import PublicKey
from signer.vaults.nitro.storage import KeyStorage, StorageError, StoredKey

logger = structlog.get_logger(__name__)


class Blobs:
    """The entries of *storage*; *served* tells the addresses that are in use."""

    def __init__(self, storage: KeyStorage, *, vault_name: str, served: Callable[[], Collection[str]]) -> None:
        self._storage = storage
        self._vault_name = vault_name
        self._served = served
        self._stamp: object = False  # False: never read
        self._lost: set[str] = set()  # addresses in use that the storage has no more
        self._reading = trio.Lock()
        self.entries: Sequence[StoredKey] = ()
        self.failure = ""  # why the storage cannot be read now

    async def open(self) -> None:
        """Read the storage for the first time; raises `StorageError` where it cannot be read, or never written."""
        await self._storage.open()
        await self._read()

    async def follow(self) -> bool:
        """Read the storage if it is another than when it was read; returns whether it was read."""
        async with self._reading:
            try:
                if await self._storage.stamp() == self._stamp:
                    return False
                await self._read()
            except StorageError as exc:
                if str(exc) != self.failure:
                    logger.error("going on with the keys known", vault_name=self._vault_name, error=str(exc))
                self.failure = str(exc)
                return False
        self.failure = ""
        return True

    async def reload(self) -> Sequence[str]:
        """Read the storage as the operator wants it: keys in use that it lacks are dropped and returned.

        Raises `StorageError` where it is damaged or absent; then nothing changes.
        """
        async with self._reading:
            stamp, found = await self._load(fresh=True)
            if stamp is None and self.entries:
                raise self._storage.gone()
            listed = {stored.public_key_hash for stored in found}
            dropped = sorted(set(self._served()) - listed)
            self.entries, self._stamp, self._lost, self.failure = tuple(found), stamp, set(), ""
            return dropped

    async def append(self, key: PublicKey, blob: bytes) -> None:
        """Store a new key durably; raises `KeyExistsError`, `StorageError`."""
        await self._storage.append(key.hash, blob)

    async def replace(self, old: StoredKey, blob: bytes) -> None:
        """Exchange the blob of an entry; raises `StorageError`."""
        await self._storage.replace(old, blob)

    async def _load(self, *, fresh: bool = False) -> tuple[object, list[StoredKey]]:
        stamp = await self._storage.stamp(fresh=fresh)  # before the content: a later change is seen later
        return stamp, await self._storage.load()

    async def _read(self) -> None:
        stamp, found = await self._load()
        self.entries, self._stamp = (*found, *self._vanished(found)), stamp

    def _vanished(self, found: list[StoredKey]) -> list[StoredKey]:
        """The entries of keys in use that the storage has lost: an emptied one must not cost the next slot."""
        listed = {stored.public_key_hash for stored in found}
        served = set(self._served())
        lost = [one for one in self.entries if one.public_key_hash in served - listed]
        known, self._lost = self._lost, {one.public_key_hash for one in lost}
        if self._lost - known:
            logger.error(
                "keys in use are gone from the key storage; they serve until this process ends or is told to reload "
                "(SIGHUP), and not after that",
                vault_name=self._vault_name,
                storage=self._storage.name,
                keys=[one.public_key_hash for one in lost],
            )
        return lost
