"""An account at KMS without the network: who asks, with which document, and what KMS answers.

Sections 3.3 to 3.9 and 4.1 of the enclave specification. Unlike other emulators it checks what KMS checks: the
signature of the request and its date, the attestation document from its root to its age, conditions on registers and
on the encryption context, states of keys. A document is judged by `signer.attestation`, which has vectors of its own.

Secrets of keys are derived from their ids, so blobs outlive the process.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import load_der_public_key

from signer.attestation import document as attestation
from tests.attested import documents, envelope
from tests.attested.emulated import adopt, is_emulated
from tests.attested.requests import Credentials, Refusal, Request, authenticate

REGION = documents.REGION
ACCOUNT = "123456789012"
CREDENTIALS = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
MAX_DOCUMENT = 262_144  # bytes
MAX_PLAINTEXT = 4096  # bytes
MAX_BLOB = 6144  # bytes
_MAGIC = bytes.fromhex("0102020078")  # how blobs of symmetric keys begin
_NAME_LENGTH = 16  # bytes of a blob that say which key
_ARN = f"arn:aws:kms:{REGION}:{ACCOUNT}:"
_ROLE = f"arn:aws:sts::{ACCOUNT}:assumed-role/baker/i-0123456789abcdef0"
_ALGORITHM = "SYMMETRIC_DEFAULT"


class Tamper(StrEnum):
    """How an answer that is otherwise good is made wrong."""

    OTHER_KEY = "other-key"  # KeyId of another key
    OTHER_PLAINTEXT = "other-plaintext"  # what was asked for by the call before, sealed to this document
    OTHER_RECIPIENT = "other-recipient"  # sealed to another RSA key
    PLAINTEXT_TOO = "plaintext-too"  # Plaintext in clear beside the envelope
    PLAINTEXT_ONLY = "plaintext-only"  # Plaintext in clear instead of the envelope
    NO_ENVELOPE = "no-envelope"  # neither
    DAMAGED_ENVELOPE = "damaged-envelope"


class Spelling(StrEnum):
    """How an error is written; KMS itself does several of these."""

    AS_SEEN = "as-seen"  # AccessDenied with Message, InvalidCiphertext without text, others with message
    LOWER = "message"
    UPPER = "Message"
    NO_TEXT = "no-text"
    HEADER = "header"  # the name in x-amzn-ErrorType, the body empty
    PREFIX = "prefix"  # the name behind a namespace and #
    SUFFIX = "suffix"  # the name before : and an address


@dataclass(frozen=True)
class Reply:
    """What goes back over HTTP."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Key:
    """A key of the account and its policy."""

    key_id: str
    aliases: Collection[str] = ()  # with `alias/`
    state: str = "Enabled"  # KeyState: also Disabled, PendingDeletion, PendingImport, Unavailable
    spec: str = _ALGORITHM  # any other is a key that cannot decrypt
    pcrs: Mapping[int, Collection[bytes]] = field(default_factory=dict)  # conditions; each value is an alternative
    context: Mapping[str, str] = field(default_factory=dict)  # pairs that the encryption context must have
    denied: Collection[str] = ()  # operations that a statement denies to all

    @property
    def arn(self) -> str:
        return f"{_ARN}key/{self.key_id}"

    @property
    def material_id(self) -> str:
        return hashlib.sha256(b"material of " + self.key_id.encode()).hexdigest()

    @property
    def name_in_blobs(self) -> bytes:
        return hashlib.sha256(self.arn.encode()).digest()[:_NAME_LENGTH]

    def cipher(self) -> AESGCM:
        return AESGCM(hashlib.sha256(b"nitro-signer tests: " + self.key_id.encode()).digest())


@dataclass(frozen=True)
class Call:
    """One request as it was understood, for the tests to look at."""

    operation: str
    key: str  # as the request named it, "" if it named none
    context: Mapping[str, str]
    document: attestation.Document | None
    error: str  # name of the refusal, "" for an answer


@dataclass
class Account:
    """What KMS knows. Change anything at any time; *calls* holds every request that was understood."""

    keys: list[Key] = field(default_factory=lambda: [Key("5e1f0d3c-0000-4000-8000-000000000001", ["alias/baker"])])
    credentials: list[Credentials] = field(default_factory=lambda: [replace(CREDENTIALS)])
    root_sha256: bytes = field(default_factory=lambda: documents.root().sha256)
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    region: str = REGION
    max_age: float = 300.0  # seconds; that of KMS is not published
    takes_emulated: bool = False  # unsigned documents of the emulated enclave, otherwise judged like others
    chunk_size: int | None = None  # bytes of an octet string in the envelope; None: one for all
    empty_plaintext: str = "missing"  # beside an envelope; or `null`, or `empty`
    spelling: Spelling = Spelling.AS_SEEN
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._last_plaintext = b""

    def add(self, **changes: Any) -> Key:
        """A further key; its id counts up unless given."""
        number = len(self.keys) + 1
        key = Key(**{"key_id": f"5e1f0d3c-0000-4000-8000-{number:012x}"} | changes)
        self.keys.append(key)
        return key

    def answer(self, request: Request, tamper: Tamper | None = None) -> Reply:
        """What KMS answers to *request*."""
        understood = _Understood()
        try:
            authenticate(
                request,
                {each.access_key_id: each for each in self.credentials},
                region=self.region,
                now=self.clock(),
            )
            fields = self._operate(request, understood, tamper)
        except Refusal as refusal:
            self._note(understood, refusal.name)
            return self.refuse(refusal)
        self._note(understood, "")
        return Reply(200, json.dumps(fields).encode())

    def refuse(self, refusal: Refusal) -> Reply:
        """An error in the spelling of the account."""
        name, text, spelling = refusal.name, refusal.text, self.spelling
        if spelling is Spelling.HEADER:
            return Reply(refusal.status, b"", {"x-amzn-ErrorType": f"{name}:http://internal.amazon.com/coral/"})
        if spelling is Spelling.AS_SEEN:
            upper, silent = name == "AccessDeniedException", name == "InvalidCiphertextException"
            spelling = Spelling.NO_TEXT if silent else Spelling.UPPER if upper else Spelling.LOWER
        written = {Spelling.PREFIX: f"com.amazonaws.kms#{name}", Spelling.SUFFIX: f"{name}:http://internal.amazon.com/"}
        fields = {"__type": written.get(spelling, name)}
        if text is not None and spelling is not Spelling.NO_TEXT:
            fields["Message" if spelling is Spelling.UPPER else "message"] = text
        return Reply(refusal.status, json.dumps(fields).encode())

    # -- operations

    def _operate(self, request: Request, understood: _Understood, tamper: Tamper | None) -> dict[str, Any]:
        if request.headers.get("content-type") != "application/x-amz-json-1.1":
            raise Refusal("UnknownOperationException", None, status=404)
        service, _, understood.operation = request.headers.get("x-amz-target", "").partition(".")
        operation = {
            "Encrypt": self._encrypt,
            "Decrypt": self._decrypt,
            "GenerateDataKey": self._generate_data_key,
            "GenerateRandom": self._generate_random,
            "DescribeKey": self._describe_key,
        }.get(understood.operation)
        if service != "TrentService" or operation is None:
            raise Refusal("UnknownOperationException")
        fields = _Fields(_parse(request.body))
        understood.key = fields.text("KeyId") or ""
        understood.context = fields.texts("EncryptionContext")
        if understood.operation in ("Decrypt", "GenerateDataKey", "GenerateRandom") and fields.has("Recipient"):
            understood.document = self._judge(fields)
        return operation(fields, understood, tamper)

    def _encrypt(self, fields: _Fields, understood: _Understood, _: Tamper | None) -> dict[str, Any]:
        key = self._usable(self._find(fields.needed("KeyId")), understood)
        plaintext = fields.blob("Plaintext", MAX_PLAINTEXT)
        blob = _wrap(key, plaintext, understood.context)
        return {"CiphertextBlob": _base64(blob), "KeyId": key.arn, "EncryptionAlgorithm": _ALGORITHM}

    def _decrypt(self, fields: _Fields, understood: _Understood, tamper: Tamper | None) -> dict[str, Any]:
        blob = fields.blob("CiphertextBlob", MAX_BLOB)
        named = self._find(understood.key) if understood.key else None
        key = self._key_of(blob)
        self._usable(named or key or self._nobody(), understood)
        if key is None:
            raise Refusal("InvalidCiphertextException")
        if named not in (None, key):
            raise Refusal(
                "IncorrectKeyException",
                "The key ID in the request does not identify a CMK that can perform this operation.",
            )
        plaintext = _unwrap(key, blob, understood.context)
        answer = {"KeyId": key.arn, "EncryptionAlgorithm": _ALGORITHM, "KeyMaterialId": key.material_id}
        return answer | self._hand_over(plaintext, understood, tamper)

    def _generate_data_key(self, fields: _Fields, understood: _Understood, tamper: Tamper | None) -> dict[str, Any]:
        key = self._usable(self._find(fields.needed("KeyId")), understood)
        specs = {"AES_256": 32, "AES_128": 16}
        spec, number = fields.text("KeySpec"), fields.number("NumberOfBytes", 1024)
        if (spec is None) == (number is None) or (spec is not None and spec not in specs):
            raise _invalid("Please specify either number of bytes or key spec.")
        plaintext = os.urandom(number or specs[spec or ""])
        answer = {
            "CiphertextBlob": _base64(_wrap(key, plaintext, understood.context)),
            "KeyId": key.arn,
            "KeyMaterialId": key.material_id,
        }
        return answer | self._hand_over(plaintext, understood, tamper)

    def _generate_random(self, fields: _Fields, understood: _Understood, tamper: Tamper | None) -> dict[str, Any]:
        number = fields.number("NumberOfBytes", 1024)
        if number is None:
            raise _invalid("NumberOfBytes must not be null.")
        return self._hand_over(os.urandom(number), understood, tamper)

    def _describe_key(self, fields: _Fields, understood: _Understood, _: Tamper | None) -> dict[str, Any]:
        key = self._find(fields.needed("KeyId"))
        self._authorize(key, understood)
        symmetric = key.spec == _ALGORITHM
        metadata = {
            "AWSAccountId": ACCOUNT,
            "KeyId": key.key_id,
            "Arn": key.arn,
            "CreationDate": 1_790_000_000.123,
            "Enabled": key.state == "Enabled",
            "Description": "",
            "KeyUsage": "ENCRYPT_DECRYPT" if symmetric else "SIGN_VERIFY",
            "KeyState": key.state,
            "Origin": "AWS_KMS",
            "KeyManager": "CUSTOMER",
            "KeySpec": key.spec,
            "CustomerMasterKeySpec": key.spec,
            "MultiRegion": False,
        }
        return {"KeyMetadata": metadata | ({"EncryptionAlgorithms": [_ALGORITHM]} if symmetric else {})}

    # -- checks

    def _judge(self, fields: _Fields) -> attestation.Document:
        """The document of the recipient: genuine, recent, and with an RSA key."""
        recipient = _Fields(fields.mapping("Recipient"))
        if recipient.text("KeyEncryptionAlgorithm") != "RSAES_OAEP_SHA_256":
            raise _invalid("KeyEncryptionAlgorithm must be one of: RSAES_OAEP_SHA_256")
        data, root = recipient.blob("AttestationDocument", MAX_DOCUMENT), self.root_sha256
        if self.takes_emulated and is_emulated(data):
            data, root = adopt(data, at=self.clock()), documents.root().sha256
        expected = attestation.Expected(
            nonce=None, root_sha256=root, max_age=self.max_age, allow_debug=True, needs_public_key=True
        )
        try:
            found = attestation.verify(data, expected, now=self.clock())
            key = load_der_public_key(found.public_key or b"")
        except (attestation.DocumentError, ValueError) as exc:
            raise _invalid(f"The attestation document is not valid: {exc}") from None
        if not isinstance(key, RSAPublicKey):
            raise _invalid("The public key of the attestation document is not an RSA key.")
        return found

    def _find(self, name: str) -> Key:
        """By id, ARN, alias or the ARN of an alias."""
        short = name.removeprefix(_ARN).removeprefix("key/")
        for key in self.keys:
            if short == key.key_id or short in key.aliases:
                return key
        if short.startswith("alias/"):
            raise Refusal("NotFoundException", f"Alias {_ARN}{short} is not found.")
        raise Refusal("NotFoundException", f"Key '{_ARN}key/{short}' does not exist")

    def _key_of(self, blob: bytes) -> Key | None:
        if not blob.startswith(_MAGIC):
            return None
        start = len(_MAGIC)
        name = hashlib.sha256
        return next(
            (key for key in self.keys if name(key.arn.encode()).digest()[:16] == blob[start : start + 16]), None
        )

    def _nobody(self) -> Key:
        raise Refusal("InvalidCiphertextException")

    def _usable(self, key: Key, understood: _Understood) -> Key:
        self._authorize(key, understood)
        if key.state == "Disabled":
            raise Refusal("DisabledException", f"{key.arn} is disabled.")
        if key.state != "Enabled":
            state = {"PendingDeletion": "pending deletion", "PendingImport": "pending import"}.get(key.state, key.state)
            raise Refusal("KMSInvalidStateException", f"{key.arn} is {state}.")
        if key.spec != _ALGORITHM:
            raise Refusal(
                "InvalidKeyUsageException",
                f"{key.arn} key usage is SIGN_VERIFY which is not valid for {understood.operation}.",
            )
        return key

    def _authorize(self, key: Key, understood: _Understood) -> None:
        """A key's policy: one Allow with conditions, and a Deny for some operations."""
        who = f"User: {_ROLE} is not authorized to perform: kms:{understood.operation} on resource: {key.arn}"
        if understood.operation in key.denied:
            raise Refusal("AccessDeniedException", f"{who} with an explicit deny in a resource-based policy")
        attested = understood.operation in ("Decrypt", "GenerateDataKey")  # the others take no document: no condition
        registers = understood.document.pcrs if understood.document else {}
        fits = all(registers.get(index, b"") in good for index, good in key.pcrs.items())
        fits_context = understood.operation == "DescribeKey" or key.context.items() <= understood.context.items()
        if not fits_context or (attested and not fits):
            raise Refusal(
                "AccessDeniedException",
                f"{who} because no resource-based policy allows the kms:{understood.operation} action",
            )

    # -- answers

    def _hand_over(self, plaintext: bytes, understood: _Understood, tamper: Tamper | None) -> dict[str, Any]:
        """The plaintext, or its envelope for the document that came with the request."""
        previous, self._last_plaintext = self._last_plaintext, plaintext
        if understood.document is None:
            return {"Plaintext": _base64(plaintext)}
        if tamper is Tamper.OTHER_PLAINTEXT:
            plaintext = previous
        public_key = understood.document.public_key or b""
        if tamper is Tamper.OTHER_RECIPIENT:
            public_key = _other_rsa_key()
        message = envelope.seal(public_key, plaintext, chunk_size=self.chunk_size)
        if tamper is Tamper.DAMAGED_ENVELOPE:
            message = message[:-1]
        fields: dict[str, Any] = {}
        if self.empty_plaintext != "missing":
            fields["Plaintext"] = None if self.empty_plaintext == "null" else ""
        if tamper not in (Tamper.NO_ENVELOPE, Tamper.PLAINTEXT_ONLY):
            fields["CiphertextForRecipient"] = _base64(message)
        if tamper in (Tamper.PLAINTEXT_TOO, Tamper.PLAINTEXT_ONLY):
            fields["Plaintext"] = _base64(plaintext)
        if tamper is Tamper.OTHER_KEY:
            fields["KeyId"] = f"{_ARN}key/5e1f0d3c-ffff-4000-8000-000000000000"
        return fields

    def _note(self, understood: _Understood, error: str) -> None:
        self.calls.append(
            Call(understood.operation, understood.key, dict(understood.context), understood.document, error)
        )


@dataclass
class _Understood:
    """As much of a request as was understood before it was answered or refused."""

    operation: str = ""
    key: str = ""
    context: Mapping[str, str] = field(default_factory=dict)
    document: attestation.Document | None = None


@dataclass(frozen=True)
class _Fields:
    """The members of a request; each reader raises KMS's ValidationException or SerializationException."""

    values: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise Refusal("SerializationException")
        return value

    def needed(self, name: str) -> str:
        value = self.text(name)
        if not value:
            raise _invalid(f"1 validation error detected: Value null at '{name}' failed to satisfy constraint")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise Refusal("SerializationException")
        return value

    def texts(self, name: str) -> Mapping[str, str]:
        pairs = self.mapping(name)
        if not all(isinstance(value, str) for value in pairs.values()):
            raise Refusal("SerializationException")
        return pairs

    def number(self, name: str, limit: int) -> int | None:
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not int:
            raise Refusal("SerializationException")
        if not 1 <= value <= limit:
            raise _invalid(f"1 validation error detected: Value at '{name}' must be between 1 and {limit}")
        return value

    def blob(self, name: str, limit: int) -> bytes:
        try:
            data = base64.b64decode(self.needed(name), validate=True)
        except (binascii.Error, ValueError):
            raise Refusal("SerializationException") from None
        if not 1 <= len(data) <= limit:
            raise _invalid(f"1 validation error detected: Value at '{name}' must have length between 1 and {limit}")
        return data


def _parse(body: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(body)
    except ValueError:
        raise Refusal("SerializationException") from None
    if not isinstance(fields, dict):
        raise Refusal("SerializationException")
    return fields


def _invalid(text: str) -> Refusal:
    return Refusal("ValidationException", text)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _associated(context: Mapping[str, str]) -> bytes:
    return json.dumps(sorted(context.items())).encode()


def _wrap(key: Key, plaintext: bytes, context: Mapping[str, str]) -> bytes:
    """A blob as KMS makes it, to the eye: it names its key, and keeps the context."""
    head = _MAGIC + key.name_in_blobs
    nonce = os.urandom(12)
    return head + nonce + key.cipher().encrypt(nonce, plaintext, head + _associated(context))


def _unwrap(key: Key, blob: bytes, context: Mapping[str, str]) -> bytes:
    end = len(_MAGIC) + _NAME_LENGTH
    head, nonce, sealed = blob[:end], blob[end : end + 12], blob[end + 12 :]
    try:
        return key.cipher().decrypt(nonce, sealed, head + _associated(context))
    except (InvalidTag, ValueError):
        raise Refusal("InvalidCiphertextException") from None


def _other_rsa_key() -> bytes:
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = generate_private_key(public_exponent=65537, key_size=2048).public_key()
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
