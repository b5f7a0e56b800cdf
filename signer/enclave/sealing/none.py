"""No sealing at all: the blob is the plaintext, as in the mock server of the reference. For tests of interoperation."""

import sys

from signer.crypto.interface import SecretKey
from signer.enclave.sealing import _plaintext
from signer.enclave.sealing.interface import SealedKey, Sealer, SealingError
from signer.rpc.messages import Initialize


class NoSealing:
    """Hands keys out in clear, and says so each time."""

    name = "none"
    takes_unencrypted = True

    def session(self, credentials: Initialize) -> Sealer:
        return self

    async def seal(self, key: SecretKey, *, marks: str | None = None) -> bytes:
        if marks is not None:
            raise SealingError("encryption error", "without sealing a key cannot be bound to its watermarks")
        _warn(f"{key.public_key.hash} is stored in clear")
        return _plaintext.encode(key)

    async def open(self, blob: bytes) -> SecretKey:
        key = _plaintext.decode(blob)
        _warn(f"{key.public_key.hash} was stored in clear")
        return key

    def marks(self, blob: bytes) -> str | None:
        return None

    async def reseal(self, blob: bytes) -> SealedKey:
        raise SealingError("encryption error", "without sealing there is no version 1")

    def update(self, credentials: Initialize) -> None:
        """Credentials are not used."""


def _warn(text: str) -> None:
    print(f"WARNING sealing is off: {text}", file=sys.stderr, flush=True)
