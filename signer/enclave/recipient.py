"""Who KMS answers to: an RSA key that never leaves this process, and the documents that vouch for it.

Sections 1.5, 3.6 and 10.5 of the enclave specification. The key comes from the kernel's pool, which was filled from the
security module before (`signer.enclave.entropy`), and lives for a day. A document is made for each call; the call
keeps the key of its document, so an answer still opens when the key was renewed meanwhile.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from signer.enclave.nsm.interface import Nsm, NsmError
from signer.enclave.sealing.envelope import open_envelope, recipient_id

KEY_LIFE = 24 * 3600.0  # seconds
_KEY_SIZE, _EXPONENT = 2048, 65537

MakeKey = Callable[[], Awaitable[rsa.RSAPrivateKey]]


@dataclass(frozen=True, slots=True)
class Addressee:
    """A document for one call, and the key that opens the answer to it."""

    document: bytes
    _key: rsa.RSAPrivateKey = field(repr=False)
    _key_id: bytes

    def open(self, envelope: bytes) -> bytearray:
        """The plaintext that KMS put into *envelope*, for the caller to wipe; raises `EnvelopeError`."""
        return open_envelope(envelope, self._key, self._key_id)


async def make_key() -> rsa.RSAPrivateKey:
    """A new key; it takes some hundred milliseconds, so a thread makes it."""
    return await trio.to_thread.run_sync(rsa.generate_private_key, _EXPONENT, _KEY_SIZE)


class Recipient:
    """Makes documents for KMS; one object for the process."""

    def __init__(self, nsm: Nsm, *, make_key: MakeKey = make_key) -> None:
        self._nsm = nsm
        self._make_key = make_key
        self._key: _Key | None = None
        self._making = trio.Lock()
        self._pcr0: bytes | None = None

    async def addressee(self) -> Addressee:
        """A fresh document with the current key in it; raises `NsmError`."""
        key = await self._current()
        document = await self._nsm.attest(public_key=key.public)
        return Addressee(document, key.private, recipient_id(key.public))

    async def pcr0(self) -> bytes | None:
        """The measurement of this image, None where the module does not tell; for the texts of errors."""
        if self._pcr0 is None:
            try:
                self._pcr0 = (await self._nsm.describe_pcr(0)).data
            except NsmError:
                return None
        return self._pcr0

    async def _current(self) -> "_Key":
        key = self._key
        if key is not None and (trio.current_time() < key.renew_at or self._making.locked()):
            return key  # while one call renews the key, the others go on with the old one
        async with self._making:
            if self._key is key:
                self._key = _Key(await self._make_key())
            assert self._key is not None
            return self._key


class _Key:
    def __init__(self, private: rsa.RSAPrivateKey) -> None:
        self.private = private
        self.public = private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.renew_at = trio.current_time() + KEY_LIFE
