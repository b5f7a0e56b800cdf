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

    async def seal(self, key: SecretKey) -> bytes:
        """The blob of *key*; raises `SealingError`."""

    async def open(self, blob: bytes) -> SecretKey:
        """The key in *blob*; the caller wipes it. Raises `SealingError`."""


class Sealing(Protocol):
    """A way of sealing; one object for the process."""

    name: str

    def session(self, credentials: Initialize) -> Sealer:
        """The sealer of one session; raises `SealingError` for credentials that cannot work."""
