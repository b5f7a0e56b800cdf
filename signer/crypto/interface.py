"""One small interface for four curves: a secret key that signs, and the errors of this package."""

from typing import Protocol

from signer.tezos.keys import Curve, PublicKey, Signature

LATEST_VERSION = 2  # signing version: the proof-of-possession scheme for BLS


class CryptoError(Exception):
    """Base of the errors of this package."""


class InvalidKeyError(CryptoError):
    """The bytes are not a key of that curve: wrong length, scalar out of range, point not on the curve."""


class WrongPassphraseError(CryptoError):
    """The passphrase does not open the encrypted key."""


class PassphraseNeededError(CryptoError):
    """The key is encrypted and no passphrase was given."""


class UnsupportedError(CryptoError):
    """The curve cannot do that: a proof of possession without BLS, signing version 0 with BLS."""


class SecretKey(Protocol):
    """A secret key in memory. Its repr never shows the secret."""

    @property
    def curve(self) -> Curve: ...

    @property
    def public_key(self) -> PublicKey: ...

    def sign(self, message: bytes, *, version: int = LATEST_VERSION) -> Signature:
        """Sign the bytes of a request (section 6.4: hashing is done here). Deterministic.

        *version* matters for BLS only: 1 is message augmentation, 2, 3 and 255 the proof-of-possession scheme, 0
        raises `UnsupportedError`.
        """

    def prove_possession(self, over: PublicKey | None = None) -> Signature:
        """BLS: sign *over*'s 48 bytes (by default the key's own) under the proof's domain tag.

        Raises `UnsupportedError` for other curves.
        """

    def secret_bytes(self) -> bytearray:
        """A copy of the 32 bytes as the enclave's wire has them (BLS: big-endian); the caller wipes it."""

    def wipe(self) -> None:
        """Overwrite the secret as far as Python allows; the key cannot be used afterwards."""
