"""The keys that others seal to, section 7.2 of the enclave specification: few, short-lived, used once. Does no I/O."""

import hashlib
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

MAX_KEYS = 16  # outstanding; the oldest gives way
LIFETIME = 600.0  # seconds


class ImportKey:
    """An X25519 key from 32 random bytes, and the document that vouches for it."""

    def __init__(self, secret: bytes) -> None:
        public_key = X25519PrivateKey.from_private_bytes(secret).public_key()
        self.secret = bytearray(secret)
        self.public_key = public_key.public_bytes_raw()  # 32 bytes
        self.subject_public_key_info = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.document_sha256 = b""

    def vouched_by(self, document: bytes) -> None:
        """What is sealed to the key will be bound to *document*."""
        self.document_sha256 = hashlib.sha256(document).digest()

    def wipe(self) -> None:
        """Overwrite the secret: what was sealed to the key opens no more."""
        self.secret[:] = bytes(len(self.secret))


@dataclass(frozen=True, slots=True)
class _Kept:
    key: ImportKey = field(repr=False)
    dies_at: float


class ImportKeys:
    """The outstanding keys; *now* is always seconds of a clock that nobody sets."""

    def __init__(self) -> None:
        self._kept: dict[bytes, _Kept] = {}  # by raw public key, the oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, key: ImportKey, now: float) -> None:
        """Keep *key*, at the cost of the oldest if there are too many."""
        self.expire(now)
        while len(self._kept) >= MAX_KEYS:
            self._forget(next(iter(self._kept)))
        self._kept[key.public_key] = _Kept(key, now + LIFETIME)

    def take(self, public_key: bytes, now: float) -> ImportKey | None:
        """The key, which is used up by that; the caller wipes it. None for one that is not there (any more)."""
        self.expire(now)
        kept = self._kept.pop(public_key, None)
        return None if kept is None else kept.key

    def expire(self, now: float) -> None:
        """Wipe the keys whose time is over."""
        for public_key in [public_key for public_key, kept in self._kept.items() if kept.dies_at <= now]:
            self._forget(public_key)

    def _forget(self, public_key: bytes) -> None:
        self._kept.pop(public_key).key.wipe()
