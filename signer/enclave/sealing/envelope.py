"""CiphertextForRecipient: what KMS answers in the place of a plaintext, section 4 of the enclave specification.

A CMS EnvelopedData with one recipient, the enclave's RSA key. The reader takes exactly the form that KMS writes (in
BER or in DER) and nothing else that CMS allows: no originator, no attributes, no other recipient, no defaults that
mean SHA-1. The bytes are hostile; they are at most 16 kB, and the time is linear in them.

The content has no authentication (CBC alone), so a plaintext from here must be judged by what it means, and it may be
believed only where it came over TLS from KMS itself (section 3.2).
"""

import hashlib
import os
from typing import NoReturn

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC

MAX_ENVELOPE = 16384  # bytes
CONTENT_KEY_LENGTH = 32  # bytes, AES-256
_MAX_DEPTH = 12  # elements inside one another; the honest form has nine
_BLOCK = 16  # bytes, of AES

TEXTS = {
    "ber": "it is not one well-formed BER element",
    "content_type": "it is not enveloped data",
    "version": "its version is not 2: it is not by AWS KMS",
    "structure": "its elements are not those that AWS KMS writes",
    "recipients": "it does not have exactly one recipient",
    "recipient_key": "it is for another RSA key than the one in the attestation document",
    "algorithm": "its algorithms are not RSAES-OAEP with SHA-256 and AES-256-CBC",
    "iv": "its initialisation vector does not have 16 bytes",
    "content": "its content is not a number of whole blocks",
    "decrypt": "it does not decrypt",
}


class EnvelopeError(Exception):
    """The envelope is refused; *reason* is a word of section 4.3. The text tells nothing about the plaintext."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the envelope of AWS KMS is refused ({reason}): {TEXTS[reason]}")
        self.reason = reason


def recipient_id(public_key: bytes) -> bytes:
    """How KMS names the recipient with this SubjectPublicKeyInfo (DER): all 32 bytes of its SHA-256."""
    return hashlib.sha256(public_key).digest()


def open_envelope(envelope: bytes, key: RSAPrivateKey, key_id: bytes) -> bytearray:
    """The plaintext, for the caller to wipe; *key_id* is the `recipient_id` of *key*. Raises `EnvelopeError`."""
    return _decrypt(key, *_read(envelope, key_id))


# -- BER

_INTEGER, _OCTETS, _NULL, _OID, _SEQUENCE, _SET = 0x02, 0x04, 0x05, 0x06, 0x30, 0x31
_TAG_0, _TAG_1, _PRIMITIVE_TAG_0 = 0xA0, 0xA1, 0x80
_CONSTRUCTED = 0x20
_INDEFINITE = 0x80

_Element = tuple[int, "bytes | tuple[_Element, ...]"]
"""Identifier octet, then the content octets (primitive) or the elements inside (constructed)."""


def _refuse(reason: str) -> NoReturn:
    raise EnvelopeError(reason)


def _one(data: bytes) -> _Element:
    """The one element in *data*, with nothing behind it."""
    if not 0 < len(data) <= MAX_ENVELOPE:
        _refuse("ber")
    element, end = _element(data, 0, len(data), 1)
    if end != len(data):
        _refuse("ber")
    return element


def _element(data: bytes, start: int, end: int, depth: int) -> tuple[_Element, int]:
    """The element at *start*, and where the next one begins."""
    if end - start < 2 or depth > _MAX_DEPTH:
        _refuse("ber")
    tag = data[start]
    if tag == 0 or tag & 0x1F == 0x1F:  # end of contents out of place; a tag number that no element here has
        _refuse("ber")
    length, at = _length(data, start + 1, end)
    if length is None:
        if not tag & _CONSTRUCTED:
            _refuse("ber")
        inside, at = _elements(data, at, end, depth + 1, closed=True)
        return (tag, inside), at
    if length > end - at:
        _refuse("ber")
    if not tag & _CONSTRUCTED:
        return (tag, data[at : at + length]), at + length
    inside, at = _elements(data, at, at + length, depth + 1, closed=False)
    return (tag, inside), at


def _elements(data: bytes, at: int, end: int, depth: int, *, closed: bool) -> tuple[tuple[_Element, ...], int]:
    """The elements up to *end*, or *closed* by the two zero bytes of the indefinite form."""
    found: list[_Element] = []
    while closed or at < end:
        if closed and data[at : min(at + 2, end)] == b"\0\0":
            return tuple(found), at + 2
        element, at = _element(data, at, end, depth)
        found.append(element)
    return tuple(found), at


def _length(data: bytes, at: int, end: int) -> tuple[int | None, int]:
    """The length of one to five octets at *at* (None: indefinite), and where the content begins."""
    first = data[at]
    at += 1
    if first < _INDEFINITE:
        return first, at
    if first == _INDEFINITE:
        return None, at
    octets = first - _INDEFINITE
    if octets > 4 or octets > end - at:
        _refuse("ber")
    return int.from_bytes(data[at : at + octets], "big"), at + octets


# -- the form

_ENVELOPED_DATA = (_OID, bytes.fromhex("2a864886f70d010703"))
_DATA = (_OID, bytes.fromhex("2a864886f70d010701"))
_RSAES_OAEP = (_OID, bytes.fromhex("2a864886f70d010107"))
_MGF1 = (_OID, bytes.fromhex("2a864886f70d010108"))
_SHA256 = (_OID, bytes.fromhex("608648016503040201"))
_AES256_CBC = (_OID, bytes.fromhex("60864801650304012a"))
_VERSION_2 = (_INTEGER, b"\x02")

_SHA256_FORMS: tuple[_Element, ...] = ((_SEQUENCE, (_SHA256, (_NULL, b""))), (_SEQUENCE, (_SHA256,)))
_OAEP_FORMS: tuple[_Element, ...] = tuple(
    (_SEQUENCE, (_RSAES_OAEP, (_SEQUENCE, ((_TAG_0, (of_label,)), (_TAG_1, ((_SEQUENCE, (_MGF1, of_mask)),))))))
    for of_label in _SHA256_FORMS
    for of_mask in _SHA256_FORMS
)


def _inside(element: _Element, *tags: int) -> tuple[_Element, ...]:
    """The elements inside a constructed one; they must have exactly these *tags* (0: judged by the caller)."""
    _, content = element
    if isinstance(content, bytes) or len(content) != len(tags):
        _refuse("structure")
    if any(tag not in (0, found) for (found, _), tag in zip(content, tags, strict=True)):
        _refuse("structure")
    return content


def _octets(element: _Element) -> bytes:
    _, content = element
    if not isinstance(content, bytes):
        _refuse("structure")
    return content


def _read(envelope: bytes, key_id: bytes) -> tuple[bytes, bytes, bytes]:
    """The encrypted content key, the initialisation vector and the encrypted content."""
    root = _one(envelope)
    if root[0] != _SEQUENCE:
        _refuse("structure")
    content_type, wrapped = _inside(root, _OID, _TAG_0)
    if content_type != _ENVELOPED_DATA:
        _refuse("content_type")
    (enveloped,) = _inside(wrapped, _SEQUENCE)
    version, recipients, content = _inside(enveloped, _INTEGER, _SET, _SEQUENCE)
    if version != _VERSION_2:
        _refuse("version")
    return _recipient(recipients, key_id), *_content(content)


def _recipient(recipients: _Element, key_id: bytes) -> bytes:
    _, found = recipients
    if len(found) != 1:
        _refuse("recipients")
    (recipient,) = _inside(recipients, _SEQUENCE)
    version, identifier, algorithm, encrypted_key = _inside(recipient, _INTEGER, 0, _SEQUENCE, _OCTETS)
    if version != _VERSION_2:
        _refuse("version")
    if identifier[0] != _PRIMITIVE_TAG_0:
        _refuse("structure")
    if _octets(identifier) != key_id:
        _refuse("recipient_key")
    if algorithm not in _OAEP_FORMS:
        _refuse("algorithm")
    return _octets(encrypted_key)


def _content(content: _Element) -> tuple[bytes, bytes]:
    content_type, algorithm, encrypted = _inside(content, _OID, _SEQUENCE, 0)
    if content_type != _DATA:
        _refuse("content_type")
    match algorithm:
        case (_, ((_, _) as name, (tag, bytes(iv)))) if name == _AES256_CBC and tag == _OCTETS:
            pass
        case _:
            _refuse("algorithm")
    if len(iv) != _BLOCK:
        _refuse("iv")
    match encrypted:
        case (0x80, bytes(data)):
            pass
        case (0xA0, tuple(chunks)):
            data = b"".join(_chunk(chunk) for chunk in chunks)
        case _:
            _refuse("structure")
    if not data or len(data) % _BLOCK:
        _refuse("content")
    return iv, data


def _chunk(element: _Element) -> bytes:
    tag, content = element
    if tag != _OCTETS or not isinstance(content, bytes):
        _refuse("content")
    return content


# -- the secret


def _decrypt(key: RSAPrivateKey, encrypted_key: bytes, iv: bytes, encrypted: bytes) -> bytearray:
    """One reason for whatever fails here, known only after all the work is done: no oracle for who sent the bytes."""
    oaep = OAEP(MGF1(hashes.SHA256()), hashes.SHA256(), None)
    try:
        content_key = key.decrypt(encrypted_key, oaep)
    except ValueError:
        content_key = b""
    is_key = len(content_key) == CONTENT_KEY_LENGTH
    decryptor = Cipher(AES256(content_key if is_key else os.urandom(CONTENT_KEY_LENGTH)), CBC(iv)).decryptor()
    buffer = bytearray(len(encrypted) + _BLOCK - 1)
    decryptor.update_into(encrypted, buffer)
    decryptor.finalize()
    del buffer[len(encrypted) :]
    padding = buffer[-1]
    if not is_key & _is_padded(buffer):
        buffer[:] = bytes(len(buffer))
        _refuse("decrypt")
    buffer[-padding:] = bytes(padding)
    del buffer[-padding:]
    return buffer


def _is_padded(data: bytearray) -> bool:
    """PKCS#7, looking at all sixteen bytes whatever they are."""
    padding = data[-1]
    wrong = int(not 1 <= padding <= _BLOCK)
    for back in range(1, _BLOCK + 1):
        wrong |= (back <= padding) & (data[-back] != padding)
    return not wrong
