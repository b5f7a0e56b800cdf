"""HPKE written out from RFC 9180: base mode, X25519, HKDF-SHA256, AES-256-GCM, one message, no additional data.

The signer has it from `cryptography`, on both sides: this is what a stranger who reads the specification makes of it.
"""

import hmac

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_VERSION = b"HPKE-v1"
_KEM = b"KEM" + bytes.fromhex("0020")
_SUITE = b"HPKE" + bytes.fromhex("002000010002")


def seal(public_key: bytes, info: bytes, plaintext: bytes, *, ephemeral: bytes) -> tuple[bytes, bytes]:
    """`enc` and ciphertext; *ephemeral* is the secret behind `enc`."""
    ours = X25519PrivateKey.from_private_bytes(ephemeral)
    enc = ours.public_key().public_bytes_raw()
    key, nonce = _schedule(ours.exchange(X25519PublicKey.from_public_bytes(public_key)), enc + public_key, info)
    return enc, AESGCM(key).encrypt(nonce, plaintext, b"")


def open_(secret: bytes, enc: bytes, ciphertext: bytes, info: bytes) -> bytes:
    """The plaintext; raises `InvalidTag`."""
    ours = X25519PrivateKey.from_private_bytes(secret)
    public_key = ours.public_key().public_bytes_raw()
    key, nonce = _schedule(ours.exchange(X25519PublicKey.from_public_bytes(enc)), enc + public_key, info)
    return AESGCM(key).decrypt(nonce, ciphertext, b"")


def _schedule(agreed: bytes, context: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key and nonce of the first message."""
    shared = _expand(_KEM, _extract(_KEM, b"", b"eae_prk", agreed), b"shared_secret", context, 32)
    base_mode = b"\0" + _extract(_SUITE, b"", b"psk_id_hash", b"") + _extract(_SUITE, b"", b"info_hash", info)
    secret = _extract(_SUITE, shared, b"secret", b"")
    return _expand(_SUITE, secret, b"key", base_mode, 32), _expand(_SUITE, secret, b"base_nonce", base_mode, 12)


def _extract(suite: bytes, salt: bytes, label: bytes, material: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), _VERSION + suite + label + material, "sha256")


def _expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    """At most 32 bytes, so one block."""
    return hmac.digest(key, length.to_bytes(2, "big") + _VERSION + suite + label + info + b"\1", "sha256")[:length]
