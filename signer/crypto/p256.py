"""P-256 (tz3) over cryptography: deterministic ECDSA (RFC 6979) over the BLAKE2b-256 digest.

Either s is valid on chain. Like the reference's enclave this module leaves s as RFC 6979 gives it, so that the same
bytes have the same signature with both enclave programs.
"""

from functools import lru_cache
from typing import ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    Prehashed,
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from signer.crypto._secret import SecretBytes, check_scalar
from signer.crypto.interface import LATEST_VERSION, InvalidKeyError
from signer.tezos.keys import Curve, PublicKey, Signature, digest_of

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_SCALAR = 32  # bytes
# The digest is BLAKE2b-256; SHA-256 only tells the library its length and RFC 6979's HMAC.
_SIGN = ec.ECDSA(Prehashed(SHA256()), deterministic_signing=True)
_VERIFY = ec.ECDSA(Prehashed(SHA256()))


class P256SecretKey(SecretBytes):
    """A tz3 key; the secret is a big-endian scalar."""

    curve: ClassVar[Curve] = Curve.P256

    def __init__(self, secret: bytes | bytearray) -> None:
        super().__init__(secret)
        check_scalar(self._secret, ORDER, self.curve)
        self._key: ec.EllipticCurvePrivateKey | None = ec.derive_private_key(
            int.from_bytes(self._secret, "big"), ec.SECP256R1()
        )
        point = self._key.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        self._public_key = PublicKey(self.curve, point)

    @property
    def public_key(self) -> PublicKey:
        return self._public_key

    def sign(self, message: bytes, *, version: int = LATEST_VERSION) -> Signature:
        if self._key is None:
            raise InvalidKeyError("the key was wiped")
        r, s = decode_dss_signature(self._key.sign(digest_of(message), _SIGN))
        return Signature(self.curve, r.to_bytes(_SCALAR, "big") + s.to_bytes(_SCALAR, "big"))

    def wipe(self) -> None:
        super().wipe()
        self._key = None


@lru_cache(maxsize=256)
def _point(key: bytes) -> ec.EllipticCurvePublicKey:
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), key)


def verify(key: bytes, digest: bytes, signature: bytes) -> bool:
    """Whether the 64 bytes r‖s sign the 32-byte *digest* under the compressed *key*; never raises."""
    if len(signature) != 2 * _SCALAR:
        return False
    r, s = int.from_bytes(signature[:_SCALAR], "big"), int.from_bytes(signature[_SCALAR:], "big")
    try:
        _point(key).verify(encode_dss_signature(r, s), digest, _VERIFY)
    except (InvalidSignature, ValueError):
        return False
    return True


def check_public_key(key: bytes) -> None:
    """Raise `InvalidKeyError` unless the 33 bytes are a compressed point on the curve."""
    try:
        point = _point(key)
    except ValueError as exc:
        raise InvalidKeyError("the P-256 public key is not a point on the curve") from exc
    if point.public_bytes(Encoding.X962, PublicFormat.CompressedPoint) != key:
        raise InvalidKeyError("the P-256 public key is not in compressed form")
