"""secp256k1 (tz2) over coincurve: deterministic ECDSA over the BLAKE2b-256 digest, low s only.

The chain refuses the other s (section 10 of the signer specification tells of half of all signatures rejected), so
signing produces the low one and verification accepts nothing else.
"""

from typing import ClassVar

from coincurve import PrivateKey
from coincurve import PublicKey as CurvePublicKey
from coincurve.ecdsa import cdata_to_der, deserialize_compact, serialize_compact
from coincurve.ecdsa import der_to_cdata as _der_to_cdata

from signer.crypto._secret import SecretBytes, check_scalar
from signer.crypto.interface import LATEST_VERSION, InvalidKeyError
from signer.tezos.keys import Curve, PublicKey, Signature, digest_of

ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_SCALAR = 32  # bytes


class Secp256k1SecretKey(SecretBytes):
    """A tz2 key; the secret is a big-endian scalar."""

    curve: ClassVar[Curve] = Curve.SECP256K1

    def __init__(self, secret: bytes | bytearray) -> None:
        super().__init__(secret)
        check_scalar(self._secret, ORDER, self.curve)
        self._key: PrivateKey | None = PrivateKey(bytes(self._secret))
        self._public_key = PublicKey(self.curve, self._key.public_key.format(compressed=True))

    @property
    def public_key(self) -> PublicKey:
        return self._public_key

    def sign(self, message: bytes, *, version: int = LATEST_VERSION) -> Signature:
        if self._key is None:
            raise InvalidKeyError("the key was wiped")
        der = self._key.sign(digest_of(message), hasher=None)  # RFC 6979; libsecp256k1 returns the low s
        return Signature(self.curve, serialize_compact(_der_to_cdata(der)))

    def wipe(self) -> None:
        super().wipe()
        self._key = None


def normalise_low_s(signature: bytes) -> bytes:
    """r‖s with s replaced by order - s where s is in the upper half."""
    s = int.from_bytes(signature[_SCALAR:], "big")
    if s <= ORDER // 2:
        return signature
    return signature[:_SCALAR] + (ORDER - s).to_bytes(_SCALAR, "big")


def verify(key: bytes, digest: bytes, signature: bytes) -> bool:
    """Whether the 64 bytes r‖s, s low, sign the 32-byte *digest* under the compressed *key*; never raises."""
    try:
        der = cdata_to_der(deserialize_compact(signature))
        return CurvePublicKey(key).verify(der, digest, hasher=None)  # refuses a high s by itself
    except (ValueError, TypeError):
        return False


def check_public_key(key: bytes) -> None:
    """Raise `InvalidKeyError` unless the 33 bytes are a compressed point on the curve."""
    try:
        point = CurvePublicKey(key)
    except (ValueError, TypeError) as exc:
        raise InvalidKeyError("the secp256k1 public key is not a point on the curve") from exc
    if point.format(compressed=True) != key:
        raise InvalidKeyError("the secp256k1 public key is not in compressed form")
