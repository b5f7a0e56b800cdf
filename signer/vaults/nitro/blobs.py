"""The blobs as this process knows them: the key file, followed while others change it; section 4.6, weakness 14.

A file that is damaged or lost never costs a key that serves: what was read last stays in force, and that is said.
"""

from collections.abc import Callable, Collection, Sequence

import structlog
import trio

from signer.tezos.keys import PublicKey
from signer.vaults.nitro.storage import FileStamp, FileStorage, StorageError, StoredKey

logger = structlog.get_logger(__name__)


class Blobs:
    """The entries of *storage*; *served* tells the addresses that are in use."""

    def __init__(self, storage: FileStorage, *, vault_name: str, served: Callable[[], Collection[str]]) -> None:
        self._storage = storage
        self._vault_name = vault_name
        self._served = served
        self._stamp: FileStamp | bool = False  # False: never read
        self._lost: set[str] = set()  # addresses in use that the key file has no more
        self._reading = trio.Lock()
        self.entries: Sequence[StoredKey] = ()
        self.failure = ""  # why the file cannot be read now

    async def open(self) -> None:
        """Read the file for the first time; raises `StorageError` where it cannot be read, or never written."""
        await trio.to_thread.run_sync(self._storage.check_writable)
        await self._read()

    async def follow(self) -> bool:
        """Read the file if it is another than the one read before; returns whether it was read."""
        async with self._reading:
            try:
                if await trio.to_thread.run_sync(self._storage.stamp) == self._stamp:
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
        """Read the file as the operator wants it: keys in use that it lacks are dropped, and their addresses returned.

        Raises `StorageError` where it is damaged or absent; then nothing changes.
        """
        async with self._reading:
            stamp, found = await self._load()
            if stamp is None and self.entries:
                raise StorageError(
                    f"(Nitro/file storage): {self._storage.path} is gone; the keys known stay in use. Restore it, "
                    "or leave [] in it if no key is wanted any more"
                )
            listed = {stored.public_key_hash for stored in found}
            dropped = sorted(set(self._served()) - listed)
            self.entries, self._stamp, self._lost, self.failure = tuple(found), stamp, set(), ""
            return dropped

    async def append(self, key: PublicKey, blob: bytes) -> None:
        """Store a new key durably; raises `KeyExistsError`, `StorageError`."""
        await trio.to_thread.run_sync(self._storage.append, key.hash, blob)

    async def _load(self) -> tuple[FileStamp, list[StoredKey]]:
        stamp = await trio.to_thread.run_sync(self._storage.stamp)  # before the text: a later change is seen later
        return stamp, await trio.to_thread.run_sync(self._storage.load)

    async def _read(self) -> None:
        stamp, found = await self._load()
        self.entries, self._stamp = (*found, *self._vanished(found)), stamp

    def _vanished(self, found: list[StoredKey]) -> list[StoredKey]:
        """The entries of keys in use that the file has lost: an emptied file must not cost the next slot."""
        listed = {stored.public_key_hash for stored in found}
        served = set(self._served())
        lost = [one for one in self.entries if one.public_key_hash in served - listed]
        known, self._lost = self._lost, {one.public_key_hash for one in lost}
        if self._lost - known:
            logger.error(
                "keys in use are gone from the key file; they serve until this process ends or is told to reload "
                "(SIGHUP), and not after that",
                vault_name=self._vault_name,
                file=str(self._storage.path),
                keys=[one.public_key_hash for one in lost],
            )
        return lost
