"""CiphertextForRecipient as KMS writes it, section 4.1 of the enclave specification.

Indefinite lengths outside, DER inside. A writer of its own, which shares nothing with the reader of the enclave
program: the vectors and OpenSSL are its judges.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

_ENVELOPED_DATA = bytes.fromhex("06092a864886f70d010703")
_DATA = bytes.fromhex("06092a864886f70d010701")
_OAEP_SHA256 = bytes.fromhex(
    "303c06092a864886f70d010107302fa00f300d06096086480165030402010500"
    "a11c301a06092a864886f70d010108300d06096086480165030402010500"
)
_AES_256_CBC = bytes.fromhex("060960864801650304012a")
_VERSION_2 = bytes.fromhex("020102")
_END = b"\0\0"  # of contents


def seal(public_key: bytes, plaintext: bytes, *, chunk_size: int | None = None) -> bytes:
    """*plaintext* for the RSA *public_key* (SubjectPublicKeyInfo), the content in pieces of *chunk_size* bytes."""
    key = load_der_public_key(public_key)
    assert isinstance(key, RSAPublicKey)
    content_key, iv = os.urandom(32), os.urandom(16)
    oaep = padding.OAEP(padding.MGF1(SHA256()), SHA256(), label=None)
    padded = plaintext + bytes([16 - len(plaintext) % 16]) * (16 - len(plaintext) % 16)
    encryptor = Cipher(algorithms.AES(content_key), modes.CBC(iv)).encryptor()
    content = encryptor.update(padded) + encryptor.finalize()
    size = chunk_size or len(content)
    chunks = [content[start : start + size] for start in range(0, len(content), size)]
    return write(hashlib.sha256(public_key).digest(), key.encrypt(content_key, oaep), iv, chunks)


def write(recipient: bytes, encrypted_key: bytes, iv: bytes, chunks: Sequence[bytes]) -> bytes:
    """The message around what was encrypted."""
    recipient_info = _der(0x30, _VERSION_2 + _der(0x80, recipient) + _OAEP_SHA256 + _der(0x04, encrypted_key))
    content = _open(0xA0, b"".join(_der(0x04, chunk) for chunk in chunks))
    encrypted = _open(0x30, _DATA + _der(0x30, _AES_256_CBC + _der(0x04, iv)) + content)
    enveloped = _open(0x30, _VERSION_2 + _der(0x31, recipient_info) + encrypted)
    return _open(0x30, _ENVELOPED_DATA + _open(0xA0, enveloped))


def _der(tag: int, content: bytes) -> bytes:
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    width = (length.bit_length() + 7) // 8
    return bytes([tag, 0x80 | width]) + length.to_bytes(width, "big") + content


def _open(tag: int, content: bytes) -> bytes:
    """Of indefinite length."""
    return bytes([tag, 0x80]) + content + _END
