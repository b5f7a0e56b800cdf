"""A KMS that keeps one key, in memory, and a security module for it: what a test wants it to say, it says.

It believes any document; whether documents are verified is the business of the fake in `tests.attested`.
"""

import base64
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import trio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.serialization import load_der_public_key

from signer.enclave.nsm.interface import Description, NsmError, Register
from signer.enclave.sealing.envelope import recipient_id
from tests.unit.enclave.kms.peer import Far

ARN = "arn:aws:kms:us-west-2:123456789012:key/0d990263-6727-4a53-a8a5-6b4a7a2f2c36"
PCR0 = bytes(range(48))
NOW = datetime(2026, 11, 20, 12, 0, 5, tzinfo=UTC)

Reply = tuple[int, Mapping[str, str], bytes]
Script = Callable[[str, dict[str, Any]], "Reply | dict[str, Any] | None"]


def fault(name: str, message: str | None = None, *, status: int = 400, **headers: str) -> Reply:
    """A refusal as KMS writes it."""
    body = {"__type": name} | ({} if message is None else {"message": message})
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode()


class Module:
    """A security module: its documents are a number and the public key."""

    def __init__(self) -> None:
        self.documents: list[bytes] = []
        self.fails = False
        self.delay = 0.0  # seconds of each document
        self.register = Register(True, PCR0)

    async def describe_pcr(self, index: int) -> Register:
        await trio.lowlevel.checkpoint()
        if self.fails:
            raise NsmError("InternalError")
        return self.register

    async def attest(
        self, *, user_data: bytes | None = None, nonce: bytes | None = None, public_key: bytes | None = None
    ) -> bytes:
        await trio.sleep(self.delay)
        assert user_data is nonce is None
        assert public_key is not None
        if self.fails:
            raise NsmError("InternalError")
        self.documents.append(b"%04d" % len(self.documents) + public_key)
        return self.documents[-1]

    async def describe(self) -> Description:
        raise NotImplementedError

    async def extend_pcr(self, index: int, data: bytes) -> bytes:
        raise NotImplementedError

    async def lock_pcr(self, index: int) -> None:
        raise NotImplementedError

    async def lock_pcrs(self, range: int) -> None:
        raise NotImplementedError

    async def get_random(self) -> bytes:
        raise NotImplementedError


@dataclass
class FixedClock:
    """A clock that stands still, *offset* seconds from its system's."""

    system: datetime = NOW
    offset: float = 0.0
    corrections: list[float] = field(default_factory=list)

    def now(self) -> datetime:
        return self.system + timedelta(seconds=self.offset)

    def correct(self, offset: float) -> None:
        self.corrections.append(offset)
        self.offset = offset


@dataclass(frozen=True)
class Request:
    """What KMS was asked."""

    operation: str
    members: dict[str, Any]
    headers: Mapping[str, str]


class Custody:
    """Serves connections with `script`; *replies* come first, each once, None being the ordinary answer."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.replies: list[Reply | Script | None] = []
        self.blobs: dict[bytes, tuple[bytes, object]] = {}
        self.delay = 0.0  # seconds per call

    def operations(self) -> list[str]:
        return [request.operation for request in self.requests]

    async def script(self, far: Far) -> None:
        while True:
            headers, body = await far.request()
            operation = headers["x-amz-target"].removeprefix("TrentService.")
            members = json.loads(body)
            self.requests.append(Request(operation, members, headers))
            await trio.sleep(self.delay)
            status, names, content = self._reply(operation, members)
            await far.respond(content, status=status, headers=names)

    def _reply(self, operation: str, members: dict[str, Any]) -> Reply:
        scripted = self.replies.pop(0) if self.replies else None
        if callable(scripted):
            answer = scripted(operation, members)
            scripted = (200, {}, json.dumps(answer).encode()) if isinstance(answer, dict) else answer
        return scripted or self.answer(operation, members)

    def answer(self, operation: str, members: dict[str, Any]) -> Reply:
        """The ordinary answer."""
        match operation:
            case "Encrypt":
                blob = self._keep(base64.b64decode(members["Plaintext"]), members)
                return _ok(CiphertextBlob=_text(blob), EncryptionAlgorithm="SYMMETRIC_DEFAULT")
            case "GenerateDataKey":
                assert members["KeySpec"] == "AES_256"
                key = os.urandom(32)
                return _ok(CiphertextBlob=_text(self._keep(key, members)), CiphertextForRecipient=_for(members, key))
            case "Decrypt":
                plaintext, context = self.blobs.get(base64.b64decode(members["CiphertextBlob"]), (b"", "none"))
                if context != members.get("EncryptionContext"):
                    return fault("InvalidCiphertextException")
                return _ok(CiphertextForRecipient=_for(members, plaintext), Plaintext=None)
        raise AssertionError(operation)

    def _keep(self, plaintext: bytes, members: dict[str, Any]) -> bytes:
        blob = b"\1\2\2\0x" + os.urandom(175)
        self.blobs[blob] = plaintext, members.get("EncryptionContext")
        return blob


def _ok(**members: object) -> Reply:
    return 200, {}, json.dumps({"KeyId": ARN} | members).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _for(members: dict[str, Any], plaintext: bytes) -> str:
    recipient = members["Recipient"]
    assert recipient["KeyEncryptionAlgorithm"] == "RSAES_OAEP_SHA_256"
    return _text(envelope(base64.b64decode(recipient["AttestationDocument"])[4:], plaintext))


def envelope(public_key: bytes, plaintext: bytes) -> bytes:
    """An EnvelopedData as KMS writes it, section 4.1, for one short plaintext."""
    key = load_der_public_key(public_key)
    assert isinstance(key, RSAPublicKey)
    content_key, vector = os.urandom(32), os.urandom(16)
    padding = 16 - len(plaintext) % 16
    encryptor = Cipher(AES256(content_key), CBC(vector)).encryptor()
    content = encryptor.update(plaintext + bytes([padding]) * padding)
    wrapped = key.encrypt(content_key, OAEP(MGF1(hashes.SHA256()), hashes.SHA256(), None))
    return b"".join(
        (
            bytes.fromhex("308006092a864886f70d010703a08030800201023182016b30820167020102" + "8020"),
            recipient_id(public_key),
            bytes.fromhex("303c06092a864886f70d010107302fa00f300d06096086480165030402010500"),
            bytes.fromhex("a11c301a06092a864886f70d010108300d0609608648016503040201050004820100"),
            wrapped,
            bytes.fromhex("308006092a864886f70d010701301d060960864801650304012a0410"),
            vector,
            b"\xa0\x80\x04" + bytes([len(content)]) + content,
            bytes(10),
        )
    )
