"""Keys and credentials sealed to one document of one enclave, section 7.4 of the enclave specification. No I/O.

HPKE (RFC 9180) in base mode with X25519, HKDF-SHA256 and AES-256-GCM, one shot, no additional data. `info` binds the
ciphertext to the document, the address and the marks: under any other, it does not open. Single use of a key, its ten
minutes and the limit of sixteen are the enclave's (`signer.enclave`).
"""

import hashlib
import os
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from signer.errors import SignerError

CREDENTIALS = "credentials"
"""What stands in the place of the address when credentials are sealed."""

KEY_LENGTH = 32  # bytes of a raw X25519 key, public or secret, and of `enc`
MAX_CIPHERTEXT = 4096  # bytes (section 7.2)

_LABEL = b"tezos-signer/import/1"
_PUBLIC_KEY_PREFIX = bytes.fromhex("302a300506032b656e032100")  # SubjectPublicKeyInfo of X25519, before the 32 bytes
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


class SealedError(SignerError):
    """Nothing was sealed, or nothing opened: wrong key, other document, address or marks, or damaged."""


def generate(entropy: Callable[[int], bytes] = os.urandom) -> tuple[bytearray, bytes]:
    """A fresh key for one import: the secret, to be wiped when it dies, and the SubjectPublicKeyInfo (44 bytes).

    *entropy* returns that many random bytes.
    """
    secret = bytearray(entropy(KEY_LENGTH))
    public_key = X25519PrivateKey.from_private_bytes(secret).public_key()
    return secret, _PUBLIC_KEY_PREFIX + public_key.public_bytes_raw()


def raw_public_key(subject_public_key_info: bytes | None) -> bytes:
    """The 32 bytes of an import document's `public_key`; raises `SealedError` for a key of any other kind."""
    data = subject_public_key_info or b""
    if len(data) != len(_PUBLIC_KEY_PREFIX) + KEY_LENGTH or not data.startswith(_PUBLIC_KEY_PREFIX):
        raise SealedError("the document holds no X25519 key: it was not made for an import")
    return data[len(_PUBLIC_KEY_PREFIX) :]


def info(document: bytes, address: str, marks: str | None = None) -> bytes:
    """What the ciphertext is bound to; *marks* is the ARN of a table, *address* may be `CREDENTIALS`."""
    return info_of_digest(hashlib.sha256(document).digest(), address, marks)


def info_of_digest(document_sha256: bytes, address: str, marks: str | None = None) -> bytes:
    """`info` for one who kept only the document's hash, as the enclave does."""
    if len(document_sha256) != hashlib.sha256().digest_size:
        raise ValueError("a SHA-256 has 32 bytes")
    parts = _LABEL + b"\0" + document_sha256 + _text(address)
    return parts if marks is None else parts + b"\0" + _text(marks)


def seal(public_key: bytes, info: bytes, plaintext: bytes | bytearray) -> tuple[bytes, bytes]:
    """`enc` and ciphertext of *plaintext* for the raw *public_key*; raises `SealedError` for a key that is none."""
    try:
        sealed = _SUITE.encrypt(plaintext, X25519PublicKey.from_public_bytes(public_key), info)
    except ValueError:
        raise SealedError("the enclave's import key is not a usable X25519 key") from None
    enc, ciphertext = sealed[:KEY_LENGTH], sealed[KEY_LENGTH:]
    if len(ciphertext) > MAX_CIPHERTEXT:
        raise SealedError(f"{len(plaintext)} bytes are too many to seal, the ciphertext may have {MAX_CIPHERTEXT}")
    return enc, ciphertext


def open_(secret: bytes | bytearray, enc: bytes, ciphertext: bytes, info: bytes) -> bytes:
    """The plaintext; raises `SealedError`, with one text whatever is wrong."""
    try:
        if len(enc) == KEY_LENGTH and len(ciphertext) <= MAX_CIPHERTEXT:
            return _SUITE.decrypt(enc + ciphertext, X25519PrivateKey.from_private_bytes(secret), info)
    except (InvalidTag, ValueError):
        pass
    raise SealedError("decryption failed")


def _text(text: str) -> bytes:
    """Printable ASCII: without a NUL, address and marks cannot run into one another."""
    if not text or not text.isascii() or not text.isprintable():
        raise ValueError("an address or an ARN is printable ASCII")
    return text.encode()
