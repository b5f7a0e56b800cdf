"""Version 1 of the sealed blob: a data key of KMS around the private key, section 5.3 of the enclave specification.

    blob    = "TZSB" ‖ 01 ‖ header length u16 ‖ header ‖ sealed
    header  = CBOR map {1: 2, 2: key type, 3: public key hash, 4: wrapped data key, 5: nonce, 6: marks, if any}
    sealed  = AES-256-GCM(data key, nonce, plaintext of 5.1, everything before)

Does no I/O: who has the data key opened is `signer.enclave.sealing.kms`. The address is bound three times: KMS has it
in the encryption context of the data key, GCM covers the header, and the key that comes out is compared with it.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from signer.attestation.cbor import CborError, decode
from signer.crypto.interface import SecretKey
from signer.enclave.sealing import _plaintext
from signer.enclave.sealing.interface import SealingError
from signer.rpc._cbor import dumps
from signer.rpc.messages import CURVE_NAMES

MAGIC = b"TZSB\x01"
DEVELOPMENT_MAGIC = b"TZSD"  # sealed under a key file: never an image's to open, whatever its version
MAX_BLOB = 8192  # bytes
DATA_KEY_LENGTH = 32  # bytes
_FAMILY = b"TZSB"
_NONCE_LENGTH = 12  # bytes
MAX_WRAPPED = 6144  # bytes, of KMS's CiphertextBlob
_HEADER_LENGTH = struct.Struct(">H")
_MODE, _KEY_TYPE, _ADDRESS, _WRAPPED, _NONCE, _MARKS = range(1, 7)  # keys of the header map
_MODE_DATA_KEY = 2
_DAMAGED = "the blob's header is damaged"


class BlobError(SealingError):
    """The blob does not open; *reason* is `format`, `decrypt` or `address mismatch`."""

    def __init__(self, reason: str, *detail: str) -> None:
        super().__init__("encryption error", reason, *detail)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A blob that was read, not yet opened: nothing in it is proven."""

    key_type: str
    address: str
    wrapped_data_key: bytes
    nonce: bytes
    marks: str | None
    prefix: bytes = field(repr=False)  # all that GCM covers beside the plaintext
    sealed: bytes = field(repr=False)


def is_version_1(blob: bytes) -> bool:
    """Whether *blob* is ours, of whatever version; anything else is a legacy blob of KMS."""
    return blob.startswith(_FAMILY)


def encryption_context(address: str) -> Mapping[str, str]:
    """Exactly two pairs, section 5.4; KMS authenticates them with the data key."""
    return {"tezos-signer:format": "1", "tezos-signer:pkh": address}


def parse(blob: bytes) -> Blob:
    """The parts of *blob*; raises `BlobError` for anything that `seal` would not write."""
    if not blob.startswith(MAGIC):
        raise BlobError("format", "not a sealed key of version 1; a newer program may have made it")
    if len(blob) > MAX_BLOB:
        raise BlobError("format", f"a sealed key has at most {MAX_BLOB} bytes")
    start = len(MAGIC) + _HEADER_LENGTH.size
    if len(blob) < start:
        raise BlobError("format", "the blob ends in its header")
    end = start + _HEADER_LENGTH.unpack_from(blob, len(MAGIC))[0]
    if end > len(blob):
        raise BlobError("format", "the blob ends in its header")
    return _read(blob[start:end], prefix=blob[:end], sealed=blob[end:])


def _read(header: bytes, *, prefix: bytes, sealed: bytes) -> Blob:
    """The header's fields; it must be encoded as `seal` encodes it, byte for byte."""
    try:
        fields = decode(header)
    except CborError:
        fields = None
    match fields:
        case {1: 2, 2: str(key_type), 3: str(address), 4: bytes(wrapped), 5: bytes(nonce), **rest}:
            marks = rest.get(_MARKS)
        case _:
            raise BlobError("format", _DAMAGED)
    if not (marks is None or isinstance(marks, str)) or key_type not in CURVE_NAMES.values():
        raise BlobError("format", _DAMAGED)
    if len(nonce) != _NONCE_LENGTH or not 0 < len(wrapped) <= MAX_WRAPPED:
        raise BlobError("format", _DAMAGED)
    if header != _encode(key_type, address, wrapped, nonce, marks):
        raise BlobError("format", _DAMAGED)
    return Blob(
        key_type=key_type,
        address=address,
        wrapped_data_key=wrapped,
        nonce=nonce,
        marks=marks,
        prefix=prefix,
        sealed=sealed,
    )


def _encode(key_type: str, address: str, wrapped: bytes, nonce: bytes, marks: str | None) -> bytes:
    fields: dict[int, object] = {_MODE: _MODE_DATA_KEY, _KEY_TYPE: key_type, _ADDRESS: address}
    fields |= {_WRAPPED: wrapped, _NONCE: nonce}
    return dumps(fields if marks is None else fields | {_MARKS: marks})


def seal(key: SecretKey, data_key: bytearray, wrapped: bytes, *, marks: str | None = None) -> bytes:
    """The blob of *key* under *data_key* (32 bytes, of no other blob), which KMS gave together with *wrapped*."""
    if not 0 < len(wrapped) <= MAX_WRAPPED:  # `parse` would never take it back, and the key be lost
        raise BlobError("format", f"a wrapped data key has 1 to {MAX_WRAPPED} bytes, not {len(wrapped)}")
    nonce = os.urandom(_NONCE_LENGTH)
    header = _encode(CURVE_NAMES[key.curve], str(key.public_key.hash), wrapped, nonce, marks)
    prefix = MAGIC + _HEADER_LENGTH.pack(len(header)) + header
    blob = prefix + AESGCM(_checked(data_key)).encrypt(nonce, _plaintext.encode(key), prefix)
    if len(blob) > MAX_BLOB:
        raise BlobError("format", f"a sealed key has at most {MAX_BLOB} bytes, and this would have {len(blob)}")
    return blob


def open_key(blob: Blob, data_key: bytearray) -> SecretKey:
    """The key in *blob*, for the caller to wipe; raises `BlobError`, or `SealingError` for a plaintext that is none."""
    cipher = AESGCM(_checked(data_key))
    try:
        plaintext = cipher.decrypt(blob.nonce, blob.sealed, blob.prefix)
    except (InvalidTag, ValueError):
        raise BlobError("decrypt", "damaged, or put together from two blobs") from None
    key = _plaintext.decode(plaintext)
    if str(key.public_key.hash) != blob.address or CURVE_NAMES[key.curve] != blob.key_type:
        key.wipe()
        raise BlobError("address mismatch", f"the blob of {blob.address} holds another key")
    return key


def _checked(data_key: bytearray) -> bytearray:
    if len(data_key) != DATA_KEY_LENGTH:
        raise BlobError("decrypt", f"a data key has {DATA_KEY_LENGTH} bytes, not {len(data_key)}")
    return data_key
