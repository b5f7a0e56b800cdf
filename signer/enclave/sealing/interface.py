"""What sealing is: a secret key goes out as a blob that only such an enclave can open again."""

from dataclasses import dataclass
from typing import Protocol

from signer.crypto.interface import SecretKey
from signer.rpc.messages import Initialize


class SealingError(Exception):
    """Sealing or opening failed; *chain* is what the host is told, outermost message first."""

    def __init__(self, *chain: str) -> None:
        super().__init__(": ".join(chain))
        self.chain = chain


@dataclass(frozen=True, slots=True)
class SealedKey:
    """A key and its blob."""

    blob: bytes
    key: SecretKey


class Sealer(Protocol):
    """Seals and opens keys for one session, with that session's credentials."""

    async def seal(self, key: SecretKey, *, marks: str | None = None) -> bytes:
        """The blob of *key*, which also holds the ARN *marks* if there is one; raises `SealingError`."""

    async def open(self, blob: bytes) -> SecretKey:
        """The key in *blob*; the caller wipes it. Raises `SealingError`."""

    def marks(self, blob: bytes) -> str | None:
        """The ARN that *blob* holds beside its key; to be asked, and believed, only after `open`."""

    async def reseal(self, blob: bytes) -> SealedKey:
        """The key of *blob* in a blob of version 1, with the marks as they were: never added, changed or dropped.

        The caller wipes the key. Raises `SealingError`.
        """

    def update(self, credentials: Initialize) -> None:
        """Go on with other credentials; raises `SealingError` for such as cannot work, and keeps the old ones."""


class Sealing(Protocol):
    """A way of sealing; one object for the process."""

    name: str
    takes_unencrypted: bool  # whether the host may hand over keys in clear; a strict image refuses them

    def session(self, credentials: Initialize) -> Sealer:
        """The sealer of one session; raises `SealingError` for credentials that cannot work."""
