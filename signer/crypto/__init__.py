"""Keys, signatures and import formats of the four curves. Pure: no I/O, no Trio.

Implements section 6 of the signer specification. Curve libraries: pynacl (Ed25519), coincurve (secp256k1),
cryptography (P-256), pyblst (BLS12-381).

How far secrets are wiped: each key object keeps its 32 bytes in a `bytearray` and overwrites it in `wipe`. Python and
the libraries make copies that cannot be reached: integers handed to pyblst, the key objects of pynacl, coincurve and
cryptography (freed without being overwritten, except where the library does it), and whatever the allocator has not
reused yet. So wiping shortens the time that a secret stays in memory, it does not guarantee its absence.
"""

import os
from collections.abc import Callable, Sequence

from signer.crypto import bls, ed25519, p256, secp256k1
from signer.crypto.interface import (
    LATEST_VERSION,
    CryptoError,
    InvalidKeyError,
    PassphraseNeededError,
    SecretKey,
    UnsupportedError,
    WrongPassphraseError,
)
from signer.tezos.keys import Curve, PublicKey, Signature, digest_of

__all__ = [
    "LATEST_VERSION",
    "CryptoError",
    "InvalidKeyError",
    "PassphraseNeededError",
    "SecretKey",
    "UnsupportedError",
    "WrongPassphraseError",
    "check_public_key",
    "derive_secret_key",
    "expect",
    "generate_secret_key",
    "load_secret_key",
    "verify",
    "verify_many",
    "verify_possession",
]

_LOAD: dict[Curve, Callable[[bytes | bytearray], SecretKey]] = {
    Curve.ED25519: ed25519.Ed25519SecretKey,
    Curve.SECP256K1: secp256k1.Secp256k1SecretKey,
    Curve.P256: p256.P256SecretKey,
    Curve.BLS12_381: bls.BlsSecretKey,
}
_VERIFY_DIGEST: dict[Curve, Callable[[bytes, bytes, bytes], bool]] = {
    Curve.ED25519: ed25519.verify,
    Curve.SECP256K1: secp256k1.verify,
    Curve.P256: p256.verify,
}
_CHECK: dict[Curve, Callable[[bytes], None]] = {
    Curve.ED25519: ed25519.check_public_key,
    Curve.SECP256K1: secp256k1.check_public_key,
    Curve.P256: p256.check_public_key,
    Curve.BLS12_381: bls.check_public_key,
}


def load_secret_key(curve: Curve, secret: bytes | bytearray) -> SecretKey:
    """A key from its 32 bytes in the enclave's wire form (Ed25519: seed; others: big-endian scalar).

    Raises `InvalidKeyError` for a wrong length or a scalar outside 1 … order - 1.
    """
    return _LOAD[curve](secret)


def generate_secret_key(curve: Curve, entropy: Callable[[int], bytes] = os.urandom) -> SecretKey:
    """A new key; *entropy* returns that many random bytes. Draws again where they make no key."""
    while True:
        try:
            return derive_secret_key(curve, entropy(32))
        except InvalidKeyError:
            continue


def derive_secret_key(curve: Curve, entropy: bytes) -> SecretKey:
    """The key of 32 random bytes; raises `InvalidKeyError` in the unlikely case that they are no scalar of ECDSA.

    BLS derives the scalar by the KeyGen of the IETF draft, Ed25519 takes any bytes.
    """
    if curve is Curve.BLS12_381:
        return bls.BlsSecretKey(bls.derive_scalar(entropy))
    return load_secret_key(curve, entropy)


def check_public_key(key: PublicKey) -> None:
    """Raise `InvalidKeyError` unless *key* is a point on its curve, in the right subgroup and not infinity."""
    _CHECK[key.curve](key.data)


def verify(key: PublicKey, message: bytes, signature: Signature, *, version: int = LATEST_VERSION) -> bool:
    """Whether *signature* is one of *key* over the bytes of a request (section 6.4); never raises.

    A generic signature (`sig…`) is read by the type of the key, never as BLS. A secp256k1 signature with a high s
    does not verify: the chain refuses it.
    """
    if key.curve is Curve.BLS12_381:
        if signature.curve is not Curve.BLS12_381:
            return False
        return bls.verify_many([bls.Check(key.data, message, signature.data, version)])[0]
    if signature.curve not in (None, key.curve):
        return False
    return _VERIFY_DIGEST[key.curve](key.data, digest_of(message), signature.data)


def expect(key: PublicKey, message: bytes, *, version: int = LATEST_VERSION) -> None:
    """Prepare for `verify` of a signature that is still being made; helps for BLS only, and never raises."""
    if key.curve is Curve.BLS12_381:
        bls.expect(key.data, message, version)


def verify_many(checks: Sequence[tuple[PublicKey, bytes, Signature, int]]) -> list[bool]:
    """`verify` for each (key, message, signature, version); those of BLS share one pairing check."""
    results = [False] * len(checks)
    batch: list[tuple[int, bls.Check]] = []
    for index, (key, message, signature, version) in enumerate(checks):
        if key.curve is Curve.BLS12_381 and signature.curve is Curve.BLS12_381:
            batch.append((index, bls.Check(key.data, message, signature.data, version)))
        else:
            results[index] = verify(key, message, signature, version=version)
    for (index, _), result in zip(batch, bls.verify_many([check for _, check in batch]), strict=True):
        results[index] = result
    return results


def verify_possession(key: PublicKey, proof: Signature, *, over: PublicKey | None = None) -> bool:
    """Whether *proof* is *key*'s proof of possession over *over*, by default over itself (section 6.6)."""
    subject = over or key
    if any(curve is not Curve.BLS12_381 for curve in (key.curve, subject.curve, proof.curve)):
        return False
    return bls.verify_possession(key.data, proof.data, subject.data)
