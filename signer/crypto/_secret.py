"""What the four kinds of secret key share: 32 bytes that can be wiped and are never shown."""

from typing import ClassVar, NoReturn

from signer.crypto.interface import InvalidKeyError, UnsupportedError
from signer.tezos.keys import Curve, PublicKey, Signature

SECRET_LENGTH = 32  # bytes, on every curve


class SecretBytes:
    """Keeps a secret key's 32 bytes; base of the curves' key classes."""

    curve: ClassVar[Curve]

    def __init__(self, secret: bytes | bytearray) -> None:
        if len(secret) != SECRET_LENGTH:
            raise InvalidKeyError(f"a {self.curve.name} secret key has {SECRET_LENGTH} bytes, not {len(secret)}")
        self._secret = bytearray(secret)

    @property
    def public_key(self) -> PublicKey:
        raise NotImplementedError

    def prove_possession(self, over: PublicKey | None = None) -> Signature:
        raise UnsupportedError("proof of possession is not supported")

    def secret_bytes(self) -> bytearray:
        return bytearray(self._secret)

    def wipe(self) -> None:
        self._secret[:] = bytes(len(self._secret))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.public_key.hash}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key is not pickled")


def check_scalar(secret: bytes | bytearray, order: int, curve: Curve) -> None:
    """Raise `InvalidKeyError` unless the big-endian number is in 1 … *order* - 1."""
    if not 0 < int.from_bytes(secret, "big") < order:
        raise InvalidKeyError(f"the {curve.name} secret key is not below the order of the group")
