"""A sealed import, line by line, between the operator's machine and the host; section 7.4 of the enclave specification.

    operator ── nonce ──────────────────────────▶ host ── Attest ──────▶ enclave
    operator ◀─ document ──────────────────────── host
    operator ── key, enc, ciphertext, address ──▶ host ── ImportSealed ▶ enclave
    operator ◀─ public key ────────────────────── host

Each line is one JSON object with binary as Base64. The host only passes on: it can read none of it, and what it
changes is found out by the enclave or by the operator's machine. Pure.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from signer.attestation import claims, sealed
from signer.attestation.document import Document, Expected, verify
from signer.crypto.interface import SecretKey
from signer.errors import SignerError
from signer.rpc.messages import MAX_NONCE, MIN_NONCE, ImportSealed, encode_private_key
from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKey

VERSION = "sealed-import/1"
MAX_LINE = 64 * 1024  # bytes; a document has at most 16 KiB
NONCE_SIZE = 32  # bytes


class SealedImportError(SignerError):
    """The other side said something that makes no sense here, or refused; nothing was stored."""


@dataclass(frozen=True, slots=True)
class Question:
    """The operator's first line: a nonce for the document."""

    nonce: bytes

    def line(self) -> bytes:
        return _line({"nonce": _text(self.nonce)})


@dataclass(frozen=True, slots=True)
class Answer:
    """The host's first line: the document that the enclave made for the nonce."""

    document: bytes

    def line(self) -> bytes:
        return _line({"document": _text(self.document)})


@dataclass(frozen=True, slots=True)
class Imported:
    """The host's last line: the key is stored."""

    public_key: PublicKey

    def line(self) -> bytes:
        return _line({"public_key": str(self.public_key)})


def refusal(text: str) -> bytes:
    """The line of a host that can't go on."""
    return _line({"error": text})


def order_line(order: ImportSealed) -> bytes:
    """The operator's second line."""
    fields = {
        "key": _text(order.key),
        "enc": _text(order.enc),
        "ciphertext": _text(order.ciphertext),
        "address": order.address,
    }
    return _line(fields if order.marks is None else fields | {"marks": order.marks})


# -- what the other side makes of a line; each raises `SealedImportError`


def read_question(line: bytes) -> Question:
    nonce = _binary(_fields(line), "nonce")
    if not MIN_NONCE <= len(nonce) <= MAX_NONCE:
        raise SealedImportError(f"a nonce has {MIN_NONCE} to {MAX_NONCE} bytes, this one {len(nonce)}")
    return Question(nonce)


def read_answer(line: bytes) -> Answer:
    return Answer(_binary(_fields(line), "document"))


def read_order(line: bytes) -> ImportSealed:
    fields = _fields(line)
    marks = fields.get("marks")
    if marks is not None and not isinstance(marks, str):
        raise SealedImportError("marks is a text")
    key, enc, ciphertext = (_binary(fields, name) for name in ("key", "enc", "ciphertext"))
    if len(key) != sealed.KEY_LENGTH or len(enc) != sealed.KEY_LENGTH or len(ciphertext) > sealed.MAX_CIPHERTEXT:
        raise SealedImportError("key, enc or ciphertext has another length than it can have")
    return ImportSealed(key, enc, ciphertext, _string(fields, "address"), marks)


def read_imported(line: bytes) -> Imported:
    try:
        return Imported(PublicKey.from_base58(_string(_fields(line), "public_key")))
    except TezosError as exc:
        raise SealedImportError(f"public_key: {exc}") from None


# -- the operator's machine


def seal_for(
    document: bytes, secret: SecretKey, expected: Expected, *, now: datetime, marks: str | None = None
) -> tuple[ImportSealed, Document]:
    """Judge the document, and seal *secret* for the enclave that it describes.

    *expected* has the nonce and the registers. Raises `DocumentError`, `ClaimsError`, `SealedError`,
    `SealedImportError`; nothing is sealed then.
    """
    found = verify(document, expected, now=now)
    told = claims.decode(found.user_data)
    if told.purpose != claims.IMPORT:
        raise SealedImportError("the document was made for another purpose than an import")
    key, address = sealed.raw_public_key(found.public_key), str(secret.public_key.hash)
    raw = secret.secret_bytes()
    try:
        plaintext = encode_private_key(secret.curve, raw)
    finally:
        raw[:] = bytes(len(raw))
    enc, ciphertext = sealed.seal(key, sealed.info(document, address, marks), plaintext)
    return ImportSealed(key, enc, ciphertext, address, marks), found


# -- lines


def _line(fields: Mapping[str, str]) -> bytes:
    return json.dumps({"tezos-signer": VERSION, **fields}).encode() + b"\n"


def _fields(line: bytes) -> dict[str, object]:
    if len(line) > MAX_LINE:
        raise SealedImportError(f"a line of more than {MAX_LINE} bytes: the other side is no sealed import")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or fields.get("tezos-signer") != VERSION:
        raise SealedImportError(
            f"the other side does not speak {VERSION}; it said {line[:100].decode(errors='replace').strip()!r} "
            "(nothing else may print there, such as a start-up file of the host's shell)"
        )
    if "error" in fields:
        told = "".join(character if character.isprintable() else "?" for character in str(fields["error"])[:2000])
        raise SealedImportError(f"the host says: {told}")  # on the operator's terminal: nothing that it would obey
    return fields


def _string(fields: Mapping[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise SealedImportError(f"the line has no {name}")
    return value


def _binary(fields: Mapping[str, object], name: str) -> bytes:
    try:
        return base64.b64decode(_string(fields, name), validate=True)
    except (binascii.Error, ValueError):
        raise SealedImportError(f"{name} is not Base64") from None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
