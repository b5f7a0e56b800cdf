"""Ed25519 (tz1) over pynacl: the signed value is the BLAKE2b-256 digest of the message."""

from typing import ClassVar

from nacl import bindings
from nacl.exceptions import BadSignatureError, CryptoError
from nacl.signing import SigningKey, VerifyKey

from signer.crypto._secret import SecretBytes
from signer.crypto.interface import LATEST_VERSION, InvalidKeyError
from signer.tezos.keys import Curve, PublicKey, Signature, digest_of


class Ed25519SecretKey(SecretBytes):
    """A tz1 key; the secret is the 32-byte seed."""

    curve: ClassVar[Curve] = Curve.ED25519

    def __init__(self, secret: bytes | bytearray) -> None:
        super().__init__(secret)
        self._key: SigningKey | None = SigningKey(bytes(self._secret))
        self._public_key = PublicKey(self.curve, bytes(self._key.verify_key))

    @property
    def public_key(self) -> PublicKey:
        return self._public_key

    def sign(self, message: bytes, *, version: int = LATEST_VERSION) -> Signature:
        if self._key is None:
            raise InvalidKeyError("the key was wiped")
        return Signature(self.curve, self._key.sign(digest_of(message)).signature)

    def wipe(self) -> None:
        super().wipe()
        self._key = None


def verify(key: bytes, digest: bytes, signature: bytes) -> bool:
    """Whether the 64 bytes sign the 32-byte *digest* under the 32-byte *key*; never raises."""
    try:
        VerifyKey(key).verify(digest, signature)
    except (BadSignatureError, CryptoError, ValueError, TypeError):
        return False
    return True


def check_public_key(key: bytes) -> None:
    """Raise `InvalidKeyError` unless the 32 bytes are a point of the prime-order subgroup."""
    if len(key) != bindings.crypto_sign_PUBLICKEYBYTES or not bindings.crypto_core_ed25519_is_valid_point(key):
        raise InvalidKeyError("the Ed25519 public key is not a point on the curve")
