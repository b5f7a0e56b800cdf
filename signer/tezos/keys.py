"""Public keys, their hashes, signatures and chain ids as values.

Implements sections 6.1 to 6.3 of the signer specification. The values are checked for length only; whether a
point lies on its curve is `signer.crypto`'s business. Does no I/O.
"""

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from typing import Self

from signer.tezos import base58
from signer.tezos.base58 import Prefix
from signer.tezos.errors import Base58Error

HASH_LENGTH = 20  # bytes, BLAKE2b-160
DIGEST_LENGTH = 32  # bytes, BLAKE2b-256


class Curve(Enum):
    """The four kinds of key; the value is the tag that Tezos writes in front of hashes and keys."""

    ED25519 = 0
    SECP256K1 = 1
    P256 = 2
    BLS12_381 = 3

    @property
    def address_prefix(self) -> str:
        """`tz1`, `tz2`, `tz3` or `tz4`."""
        return _HASH[self].name


_HASH = {
    Curve.ED25519: base58.ED25519_HASH,
    Curve.SECP256K1: base58.SECP256K1_HASH,
    Curve.P256: base58.P256_HASH,
    Curve.BLS12_381: base58.BLS_HASH,
}
_PUBLIC_KEY = {
    Curve.ED25519: base58.ED25519_PUBLIC_KEY,
    Curve.SECP256K1: base58.SECP256K1_PUBLIC_KEY,
    Curve.P256: base58.P256_PUBLIC_KEY,
    Curve.BLS12_381: base58.BLS_PUBLIC_KEY,
}
_SIGNATURE = {
    Curve.ED25519: base58.ED25519_SIGNATURE,
    Curve.SECP256K1: base58.SECP256K1_SIGNATURE,
    Curve.P256: base58.P256_SIGNATURE,
    Curve.BLS12_381: base58.BLS_SIGNATURE,
}
_CURVE_OF_HASH = {prefix: curve for curve, prefix in _HASH.items()}
_CURVE_OF_PUBLIC_KEY = {prefix: curve for curve, prefix in _PUBLIC_KEY.items()}
_CURVE_OF_SIGNATURE: dict[Prefix, Curve | None] = {
    **{prefix: curve for curve, prefix in _SIGNATURE.items()},
    base58.GENERIC_SIGNATURE: None,
}


def digest_of(message: bytes) -> bytes:
    """BLAKE2b-256: what the curves other than BLS sign, and what a watermark stores."""
    return blake2b(message, digest_size=DIGEST_LENGTH).digest()


# The same few addresses and chains are converted for every request; Base58 is quadratic in pure Python.
@lru_cache(maxsize=4096)
def _decode_hash(text: str) -> tuple[Curve, bytes]:
    prefix, payload = base58.decode(text)
    curve = _CURVE_OF_HASH.get(prefix)
    if curve is None:
        raise Base58Error("gotez: unknown public key prefix")
    return curve, payload


@lru_cache(maxsize=4096)
def _hash_text(curve: Curve, digest: bytes) -> str:
    return base58.encode(_HASH[curve], digest)


@dataclass(frozen=True, slots=True)
class PublicKeyHash:
    """An address of an implicit account: `tz1…` to `tz4…`."""

    curve: Curve
    digest: bytes  # 20 bytes

    def __post_init__(self) -> None:
        if len(self.digest) != HASH_LENGTH:
            raise ValueError(f"a public key hash has {HASH_LENGTH} bytes, not {len(self.digest)}")

    @classmethod
    def from_base58(cls, text: str) -> Self:
        """Parse `tz1…`; raises `Base58Error`."""
        return cls(*_decode_hash(text))

    def tagged(self) -> bytes:
        """The 21 bytes of the wire: curve tag, then the hash."""
        return bytes((self.curve.value,)) + self.digest

    def __str__(self) -> str:
        return _hash_text(self.curve, self.digest)

    def __repr__(self) -> str:
        return f"PublicKeyHash({self})"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key in compressed form: `edpk…`, `sppk…`, `p2pk…`, `BLpk…`."""

    curve: Curve
    data: bytes  # 32, 33, 33 or 48 bytes

    def __post_init__(self) -> None:
        if len(self.data) != _PUBLIC_KEY[self.curve].length:
            raise ValueError(f"invalid {self.curve.name} public key length {len(self.data)}")

    @classmethod
    def from_base58(cls, text: str) -> Self:
        """Parse `edpk…`; raises `Base58Error`."""
        prefix, payload = base58.decode(text)
        curve = _CURVE_OF_PUBLIC_KEY.get(prefix)
        if curve is None:
            raise Base58Error("gotez: unknown public key prefix")
        return cls(curve, payload)

    @property
    def hash(self) -> PublicKeyHash:
        """BLAKE2b-160 of the key (section 6.3)."""
        return PublicKeyHash(self.curve, blake2b(self.data, digest_size=HASH_LENGTH).digest())

    def __str__(self) -> str:
        return base58.encode(_PUBLIC_KEY[self.curve], self.data)

    def __repr__(self) -> str:
        return f"PublicKey({self})"


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature; *curve* is None for the generic form `sig…`, which fits any curve but BLS."""

    curve: Curve | None
    data: bytes  # 64 bytes, 96 for BLS

    def __post_init__(self) -> None:
        if len(self.data) != self._prefix.length:
            raise ValueError(f"invalid {self._prefix.name} length {len(self.data)}")

    @property
    def _prefix(self) -> Prefix:
        return base58.GENERIC_SIGNATURE if self.curve is None else _SIGNATURE[self.curve]

    @classmethod
    def from_base58(cls, text: str) -> Self:
        """Parse `edsig…`, `spsig1…`, `p2sig…`, `BLsig…` or `sig…`; raises `Base58Error`."""
        prefix, payload = base58.decode(text)
        if prefix not in _CURVE_OF_SIGNATURE:
            raise Base58Error("gotez: unknown signature prefix")
        return cls(_CURVE_OF_SIGNATURE[prefix], payload)

    def __str__(self) -> str:
        return base58.encode(self._prefix, self.data)


@lru_cache(maxsize=256)
def chain_id_text(chain_id: bytes) -> str:
    """`Net…` for the four bytes of a chain id."""
    return base58.encode(base58.CHAIN_ID, chain_id)


def parse_chain_id(text: str) -> bytes:
    """The four bytes of `Net…`; raises `Base58Error`."""
    prefix, payload = base58.decode(text)
    if prefix is not base58.CHAIN_ID:
        raise Base58Error("gotez: unknown chain id prefix")
    return payload


def digest_text(digest: bytes) -> str:
    """`vh…`: how the reference prints the digest of a request."""
    return base58.encode(base58.PAYLOAD_HASH, digest)


def parse_digest(text: str) -> bytes:
    """The 32 bytes of `vh…`; raises `Base58Error`."""
    prefix, payload = base58.decode(text)
    if prefix is not base58.PAYLOAD_HASH:
        raise Base58Error("gotez: unknown block payload hash prefix")
    return payload
