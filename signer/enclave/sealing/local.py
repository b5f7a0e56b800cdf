"""Development sealing: AES-256-GCM under a key file of this machine; it protects nothing from the machine's owner.

Section 5.5 of the enclave specification, with the envelope of 5.3:

    blob    = "TZSD" ‖ 01 ‖ header length u16 ‖ header ‖ sealed
    header  = CBOR map {1: 2, 2: key type, 3: public key hash, 5: nonce, 6: marks, if any}
    sealed  = AES-256-GCM(key file, nonce, plaintext, everything before)

The address is bound to the key: a blob under another address does not open.
"""

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from signer.crypto.interface import SecretKey
from signer.enclave.sealing import _plaintext
from signer.enclave.sealing.interface import SealedKey, Sealer, SealingError
from signer.rpc._cbor import CborError, dumps, loads
from signer.rpc.messages import CURVE_NAMES, Initialize

MAGIC = b"TZSD\x01"
IMAGE_MAGIC = b"TZSB\x01"  # sealed by an attested image: not ours to open
MAX_BLOB = 8192  # bytes
KEY_LENGTH = 32  # bytes
_NONCE_LENGTH = 12  # bytes
_HEADER_LENGTH = struct.Struct(">H")
_MODE, _KEY_TYPE, _ADDRESS, _NONCE, _MARKS = 1, 2, 3, 5, 6  # keys of the header map
_MODE_DATA_KEY = 2


class KeyFileError(Exception):
    """The development key file cannot be used; the text says why and what to do."""


class LocalSealing:
    """Seals under *key* (32 bytes) for every session, whatever its credentials."""

    name = "local"
    takes_unencrypted = True

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def session(self, credentials: Initialize) -> Sealer:
        return self

    async def seal(self, key: SecretKey, *, marks: str | None = None) -> bytes:
        nonce = os.urandom(_NONCE_LENGTH)
        fields: dict[int, object] = {_MODE: _MODE_DATA_KEY, _KEY_TYPE: CURVE_NAMES[key.curve]}
        fields |= {_ADDRESS: str(key.public_key.hash), _NONCE: nonce}
        header = dumps(fields if marks is None else fields | {_MARKS: marks})
        prefix = MAGIC + _HEADER_LENGTH.pack(len(header)) + header
        return prefix + self._cipher.encrypt(nonce, _plaintext.encode(key), prefix)

    async def open(self, blob: bytes) -> SecretKey:
        if blob.startswith(IMAGE_MAGIC):
            raise SealingError("encryption error", "format", "this blob was sealed by an enclave image")
        if not blob.startswith(MAGIC) or len(blob) > MAX_BLOB:
            raise SealingError("encryption error", "format", "this is not a blob of development sealing")
        header = _read_header(blob)
        try:
            plaintext = self._cipher.decrypt(header.nonce, blob[header.end :], blob[: header.end])
        except (InvalidTag, ValueError):
            raise SealingError("encryption error", "decrypt", "sealed under another key file, or damaged") from None
        key = _plaintext.decode(plaintext)
        if str(key.public_key.hash) != header.address or CURVE_NAMES[key.curve] != header.key_type:
            key.wipe()
            raise SealingError("encryption error", "address mismatch")
        return key

    def marks(self, blob: bytes) -> str | None:
        return _read_header(blob).marks

    async def reseal(self, blob: bytes) -> SealedKey:
        key = await self.open(blob)
        try:
            return SealedKey(await self.seal(key, marks=self.marks(blob)), key)
        except BaseException:
            key.wipe()
            raise

    def update(self, credentials: Initialize) -> None:
        """Credentials are not used."""


@dataclass(frozen=True, slots=True)
class _Header:
    key_type: str
    address: str
    nonce: bytes
    marks: str | None
    end: int  # where the sealed part begins


def _read_header(blob: bytes) -> _Header:
    start = len(MAGIC) + _HEADER_LENGTH.size
    if len(blob) < start:
        raise SealingError("encryption error", "format", "the blob ends in its header")
    sealed_at = start + _HEADER_LENGTH.unpack_from(blob, len(MAGIC))[0]
    try:
        header = loads(blob[start:sealed_at], text_keys=False) if sealed_at <= len(blob) else None
    except CborError:
        header = None
    if isinstance(header, dict) and header.get(_MODE) == _MODE_DATA_KEY:
        match [header.get(name) for name in (_KEY_TYPE, _ADDRESS, _NONCE, _MARKS)]:
            case [str(key_type), str(address), bytes(nonce), str() | None as marks]:
                return _Header(key_type, address, nonce, marks, sealed_at)
    raise SealingError("encryption error", "format", "the blob's header is damaged")


def load_or_create_key_file(path: Path) -> bytes:
    """The 32 bytes of the key file, made with mode 0600 where there is none yet; raises `KeyFileError`."""
    try:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return _read_key_file(path)
        with os.fdopen(descriptor, "wb") as file:
            key = os.urandom(KEY_LENGTH)
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        raise KeyFileError(f"cannot use the development key file {path}: {exc.strerror}") from exc
    return key


def _read_key_file(path: Path) -> bytes:
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise KeyFileError(f"the development key file {path} is open to others; run: chmod 600 {path}")
    key = path.read_bytes()
    if len(key) != KEY_LENGTH:
        raise KeyFileError(
            f"the development key file {path} has {len(key)} bytes instead of {KEY_LENGTH}; "
            "restore it from a copy: keys sealed under it cannot be opened with another"
        )
    return key
