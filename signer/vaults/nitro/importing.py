"""Brings the sealed keys into the enclave, over each session anew: the enclave keeps all state per connection.

A blob that cannot be used is skipped, said once, and tried again by the link. Section 4 of the signer specification;
weakness 5 of the reference.
"""

from collections.abc import Callable

import structlog

from signer import crypto
from signer.rpc.frames import FrameError
from signer.rpc.messages import Import, Imported, RemoteError
from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKey, PublicKeyHash
from signer.vaults.interface import VaultError
from signer.vaults.nitro.credentials import Credentials
from signer.vaults.nitro.session import SessionLostError
from signer.vaults.nitro.standing import SessionLine, Standing, in_step
from signer.vaults.nitro.storage import StoredKey

logger = structlog.get_logger(__name__)

_EXPIRED = "ExpiredToken"  # KMS's name for it, in the enclave's error


class Importing:
    """Imports for the vault *name*.

    *on_served* hears of each key that a session can sign with now, *on_expired* of credentials that KMS takes no more.
    """

    def __init__(
        self,
        standing: Standing,
        name: str,
        *,
        on_served: Callable[[PublicKey], None],
        on_expired: Callable[[Credentials], None],
    ) -> None:
        self._standing = standing
        self._name = name
        self._on_served = on_served
        self._on_expired = on_expired
        self._told: dict[str, str] = {}  # address of each skipped key, and what was last said of it

    async def run(self, line: SessionLine, on_progress: Callable[[SessionLine], None]) -> None:
        """Import one blob after the other over *line*; several of these keep the wire busy. Ends with the session."""
        while True:
            stored = self._standing.epochs.take(line, self._standing.wanted)
            if stored is None:
                await self._standing.changed.wait()
                continue
            if not await self._import(line, stored):
                return
            on_progress(line)

    def blame(self, line: SessionLine) -> None:
        """*line* was lost: if a blob was what the enclave did not come back from, the other keys go first now."""
        overdue = line.channel.overdue
        if isinstance(overdue, Import):
            why = f"{line.channel.failure} when it was to open the blob"
            for stored in self._standing.epochs.suspect(line, overdue.blob, why):
                self._tell_skipped(stored, why)

    async def _import(self, line: SessionLine, stored: StoredKey) -> bool:
        """Returns False if the session was lost over it."""
        try:
            pkh = PublicKeyHash.from_base58(stored.public_key_hash)
            if not stored.blob:
                raise VaultError("the entry has no encrypted_private_key in Base64")
            try:
                imported = await _imported(line, stored, pkh)
            except (RemoteError, VaultError):  # it may be a reply that belongs to another blob
                imported = await _imported(line, stored, pkh)
            crypto.check_public_key(imported.public_key)
        except SessionLostError:
            return False  # the next session tries again
        except (RemoteError, TezosError, VaultError, crypto.InvalidKeyError, FrameError) as exc:
            self._refuse(line, stored, str(exc))
            return True
        if self._standing.epochs.serve(line, stored, pkh, imported.handle):
            if self._told.pop(stored.public_key_hash, None) is not None:
                logger.info("a key that was skipped can be used", vault_name=self._name, pkh=stored.public_key_hash)
            self._on_served(imported.public_key)
        return True

    def _refuse(self, line: SessionLine, stored: StoredKey, why: str) -> None:
        if _EXPIRED in why:
            self._on_expired(line.epoch.life.credentials)
        self._standing.epochs.refuse(line, stored, why)
        self._tell_skipped(stored, why)

    def _tell_skipped(self, stored: StoredKey, why: str) -> None:
        skipped = self._standing.epochs.skipped().get(stored.public_key_hash)
        if skipped == why != self._told.get(stored.public_key_hash):
            self._told[stored.public_key_hash] = why
            logger.error(
                "key skipped: its blob cannot be used",
                vault_name=self._name,
                pkh=stored.public_key_hash,
                error=why,
            )


async def _imported(line: SessionLine, stored: StoredKey, pkh: PublicKeyHash) -> Imported:
    result = await line.channel.call(Import(stored.blob))
    assert isinstance(result, Imported)
    if result.public_key.hash != pkh:
        if not await in_step(line, result.public_key.hash, result.handle):
            raise SessionLostError(line.channel.failure)
        raise VaultError(f"the blob holds the key of {result.public_key.hash}")
    return result
