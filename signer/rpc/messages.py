"""Calls and replies between host and enclave as values, and their CBOR form; section 4.2 to 4.4 of the signer
specification, and 7.2 of the enclave specification for the calls around attestation. Does no I/O.

Byte for byte what tee-signer and Signatory write, so that either side can be exchanged. Binary fields are accepted as
byte strings and as arrays of integers; they are written as byte strings up to 4,096 bytes and as arrays above, because
the enclave's decoder (ciborium) refuses longer byte strings. An Ed25519 signature in a reply is always an array: so
the Rust library writes it.

tee-signer knows none of the calls around attestation, and ignores unknown fields of `Initialize`: it refuses the ones
by its decoder's error, see `RemoteError.unknown_call`, and does without the others.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

from signer.rpc._cbor import CborError, dumps, loads
from signer.tezos.keys import Curve, PublicKey, Signature

MAX_BYTE_STRING = 4096  # bytes; ciborium 0.2.2 refuses a longer byte string, an array has no such limit
SIGNING_VERSIONS = (0, 1, 2, 255)
MAX_HANDLE = 2**64 - 1
MAX_CAUSES = 12  # links of an error chain that are read

PURPOSES = ("session", "import")  # of `Attest`
SEAL_V1 = "v1"  # the version that `Initialize` may ask for
MIN_NONCE, MAX_NONCE = 16, 64  # bytes
MAX_USER_DATA = 256  # bytes of the caller's user data
MAX_CIPHERTEXT = 4096  # bytes; a sealed key has 39 to 45, sealed credentials a few hundred to two thousand
MAX_ADDRESS = 64  # characters; an address has 36
MAX_MARKS = 320  # characters of an ARN; that of a table with the longest name has some 310
X25519_LENGTH = 32  # bytes of a public key, and of what HPKE calls enc

CURVE_NAMES = {
    Curve.SECP256K1: "Secp256k1",
    Curve.P256: "NistP256",
    Curve.ED25519: "Ed25519",
    Curve.BLS12_381: "Bls",
}
_CURVES = {name: curve for curve, name in CURVE_NAMES.items()}


class MalformedCallError(Exception):
    """The enclave cannot decode what it was sent; the connection stays usable."""


class MalformedReplyError(Exception):
    """The host cannot make sense of a reply: it is out of step, or speaks something else."""


@dataclass(frozen=True, slots=True)
class RpcErrorChain:
    """An error with its causes, outermost first."""

    messages: tuple[str, ...]

    def __str__(self) -> str:
        return ": ".join(self.messages)


class RemoteError(Exception):
    """The enclave answered with an error: it understood the call and did nothing."""

    def __init__(self, chain: RpcErrorChain) -> None:
        super().__init__(str(chain))
        self.chain = chain

    @property
    def unknown_call(self) -> bool:
        """Whether the enclave does not know the call at all: an older program than the host, or tee-signer.

        Ours says `unknown call, expected one of …`, tee-signer (serde) ``… unknown variant `Attest`, expected …``.
        """
        outermost = self.chain.messages[0]
        return len(self.chain.messages) == 1 and any(text in outermost for text in _UNKNOWN_CALL)


_UNKNOWN_CALL = ("unknown call", "unknown variant `")


# -- calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialize:
    """Opens a session: credentials for KMS, and the key that seals. Secrets stay out of the repr.

    *seal* asks for blobs of that version, by default the legacy one. With *update* an open session takes over new
    credentials and keeps its keys; one that is not open is opened.
    """

    access_key_id: str = ""
    secret_access_key: str = field(default="", repr=False)
    session_token: str | None = field(default=None, repr=False)
    encryption_key_id: str = ""
    region: str = ""
    seal: str | None = None  # `SEAL_V1`
    update: bool = False


@dataclass(frozen=True, slots=True)
class Import:
    """Open a sealed key and keep it under a handle."""

    blob: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ImportUnencrypted:
    """Seal a key that the host has in clear, and keep it under a handle."""

    curve: Curve
    secret: bytes = field(repr=False)  # 32 bytes


@dataclass(frozen=True, slots=True)
class Generate:
    """Make a key and return it sealed."""

    curve: Curve


@dataclass(frozen=True, slots=True)
class GenerateAndImport:
    """Make a key, return it sealed and keep it under a handle."""

    curve: Curve


@dataclass(frozen=True, slots=True)
class Sign:
    """Sign the raw bytes of a request with the key of *handle*."""

    handle: int
    message: bytes = field(repr=False)
    version: int


@dataclass(frozen=True, slots=True)
class SignWith:
    """Open a sealed key, sign, forget the key."""

    blob: bytes = field(repr=False)
    message: bytes = field(repr=False)
    version: int


@dataclass(frozen=True, slots=True)
class PublicKeyOf:
    """The public key of *handle* (call name `PublicKey`)."""

    handle: int


@dataclass(frozen=True, slots=True)
class PublicKeyFrom:
    """The public key of a sealed key."""

    blob: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ProvePossession:
    """A BLS proof of possession by the key of *handle*; *over* (48 bytes) is an extension of ours."""

    handle: int
    over: bytes | None = None


@dataclass(frozen=True, slots=True)
class Attest:
    """A document that says which program answers; for *purpose* import with a fresh key to seal to."""

    purpose: str  # of `PURPOSES`
    nonce: bytes  # 16 to 64 bytes
    user_data: bytes = b""  # at most 256 bytes


@dataclass(frozen=True, slots=True)
class ImportSealed:
    """Import a key that was sealed to the key of an `Attest` for import (HPKE), and keep it under a handle."""

    key: bytes  # X25519, 32 bytes
    enc: bytes  # 32 bytes
    ciphertext: bytes = field(repr=False)
    address: str
    marks: str | None = None  # ARN of the table that the key's watermarks are bound to


@dataclass(frozen=True, slots=True)
class AttestKey:
    """A document that says that the key of *handle* is in this enclave."""

    handle: int
    nonce: bytes  # 16 to 64 bytes


@dataclass(frozen=True, slots=True)
class Reseal:
    """Open a sealed key and return it sealed in version 1."""

    blob: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class InitializeSealed:
    """`Initialize` whose map was sealed to the key of an `Attest` for import, as for `ImportSealed`."""

    key: bytes  # X25519, 32 bytes
    enc: bytes  # 32 bytes
    ciphertext: bytes = field(repr=False)


Call = (
    Initialize
    | Import
    | ImportUnencrypted
    | Generate
    | GenerateAndImport
    | Sign
    | SignWith
    | PublicKeyOf
    | PublicKeyFrom
    | ProvePossession
    | Attest
    | ImportSealed
    | AttestKey
    | Reseal
    | InitializeSealed
)


# -- results


@dataclass(frozen=True, slots=True)
class Imported:
    """Result of `Import`."""

    public_key: PublicKey
    handle: int


@dataclass(frozen=True, slots=True)
class Created:
    """Result of `ImportUnencrypted`, `GenerateAndImport`, `ImportSealed`; of `Generate`, `Reseal` without a handle."""

    encrypted_private_key: bytes = field(repr=False)
    public_key: PublicKey
    handle: int | None


@dataclass(frozen=True, slots=True)
class Attested:
    """Result of `Attest` and `AttestKey`; nothing in the document is true before it has been verified."""

    document: bytes = field(repr=False)


Result = None | Imported | Created | Signature | PublicKey | Attested


# -- encoding


def encode_call(call: Call) -> bytes:
    """The payload of a call."""
    match call:
        case Initialize():
            return dumps({"Initialize": _initialize(call)})
        case Import(blob):
            return dumps({"Import": _binary(blob)})
        case ImportUnencrypted(curve, secret):
            return dumps({"ImportUnencrypted": {CURVE_NAMES[curve]: _binary(secret)}})
        case Generate(curve):
            return dumps({"Generate": CURVE_NAMES[curve]})
        case GenerateAndImport(curve):
            return dumps({"GenerateAndImport": CURVE_NAMES[curve]})
        case Sign(handle, message, version):
            return dumps({"Sign": {"handle": handle, "message": _binary(message), "version": version}})
        case SignWith(blob, message, version):
            argument = {"encrypted_private_key": _binary(blob), "message": _binary(message), "version": version}
            return dumps({"SignWith": argument})
        case PublicKeyOf(handle):
            return dumps({"PublicKey": handle})
        case PublicKeyFrom(blob):
            return dumps({"PublicKeyFrom": _binary(blob)})
        case ProvePossession(handle, None):
            return dumps({"ProvePossession": handle})
        case ProvePossession(handle, over):
            return dumps({"ProvePossession": {"handle": handle, "public_key": {"Bls": over}}})
        case Attest(purpose, nonce, user_data):
            asked: dict[str, object] = {"purpose": purpose, "nonce": _binary(nonce)}
            return dumps({"Attest": asked | ({"user_data": _binary(user_data)} if user_data else {})})
        case ImportSealed():
            return dumps({"ImportSealed": _import_sealed(call)})
        case AttestKey(handle, nonce):
            return dumps({"AttestKey": {"handle": handle, "nonce": _binary(nonce)}})
        case Reseal(blob):
            return dumps({"Reseal": _binary(blob)})
        case InitializeSealed(key, enc, ciphertext):
            return dumps({"InitializeSealed": {"key": key, "enc": enc, "ciphertext": _binary(ciphertext)}})
        case _:
            assert_never(call)


def encode_credentials(call: Initialize) -> bytes:
    """The map of *call* alone: the plaintext of `InitializeSealed`."""
    return dumps(_initialize(call))


def encode_reply(result: Result) -> bytes:
    """The payload of a successful reply."""
    match result:
        case None:
            return dumps({"Ok": None})
        case Signature():
            return dumps({"Ok": _signature(result)})
        case PublicKey():
            return dumps({"Ok": _public_key(result)})
        case Imported(public_key, handle):
            return dumps({"Ok": {"public_key": _public_key(public_key), "handle": handle}})
        case Created(blob, public_key, handle):
            value: dict[str, object] = {"encrypted_private_key": blob, "public_key": _public_key(public_key)}
            if handle is not None:
                value["handle"] = handle
            return dumps({"Ok": value})
        case Attested(document):
            return dumps({"Ok": {"document": document}})
        case _:
            assert_never(result)


def encode_error(*messages: str) -> bytes:
    """The payload of an error reply; *messages* is the chain, outermost first."""
    source: dict[str, object] | None = None
    for message in reversed(messages):
        source = {"message": message, "source": source}
    return dumps({"Err": source})


def _initialize(call: Initialize) -> dict[str, object]:
    """Fields that say nothing are left out: so the frame of a plain session is tee-signer's to the byte."""
    argument: dict[str, object] = {"access_key_id": call.access_key_id, "secret_access_key": call.secret_access_key}
    if call.session_token is not None:
        argument["session_token"] = call.session_token
    argument |= {"encryption_key_id": call.encryption_key_id, "region": call.region}
    if call.seal is not None:
        argument["seal"] = call.seal
    if call.update:
        argument["update"] = True
    return argument


def _import_sealed(call: ImportSealed) -> dict[str, object]:
    argument: dict[str, object] = {"key": call.key, "enc": call.enc, "ciphertext": _binary(call.ciphertext)}
    argument["address"] = call.address
    if call.marks is not None:
        argument["marks"] = call.marks
    return argument


def _binary(data: bytes) -> bytes | list[int]:
    return bytes(data) if len(data) <= MAX_BYTE_STRING else list(data)


def _public_key(key: PublicKey) -> dict[str, bytes]:
    return {CURVE_NAMES[key.curve]: key.data}


def _signature(signature: Signature) -> dict[str, bytes | list[int]]:
    assert signature.curve is not None
    data = list(signature.data) if signature.curve is Curve.ED25519 else signature.data
    return {CURVE_NAMES[signature.curve]: data}


# -- decoding


def decode_call(payload: bytes) -> Call:
    """The call in *payload*; raises `MalformedCallError`, whose text never shows a field's value."""
    try:
        name, argument = _single(loads(payload), "call")
        decoder = _CALLS.get(name)
        if decoder is None:
            raise _Mismatch(f"unknown call, expected one of {', '.join(_CALLS)}")
        return decoder(argument)
    except (CborError, _Mismatch) as exc:
        raise MalformedCallError(str(exc)) from exc


def decode_credentials(plaintext: bytes) -> Initialize:
    """The inverse of `encode_credentials`; raises `MalformedCallError`, whose text never shows a field's value."""
    try:
        return _decode_initialize(loads(plaintext))
    except CborError:  # its text may quote what it met
        raise MalformedCallError("malformed CBOR") from None
    except _Mismatch as exc:
        raise MalformedCallError(str(exc)) from exc


def decode_reply(call: Call, payload: bytes) -> Result:
    """What the enclave answered to *call*.

    Raises `RemoteError` for an error reply, `MalformedReplyError` for anything that does not fit the call.
    """
    try:
        status, value = _single(loads(payload), "reply")
        if status == "Err":
            raise RemoteError(_chain(value))
        if status != "Ok":
            raise _Mismatch("a reply is Ok or Err")
        return _result(call, value)
    except (CborError, _Mismatch) as exc:
        raise MalformedReplyError(str(exc)) from exc


class _Mismatch(Exception):  # noqa: N818
    """A value has another shape than the protocol says; becomes one of the public errors."""


def _result(call: Call, value: object) -> Result:
    match call:
        case Initialize() | InitializeSealed():
            if value is not None:
                raise _Mismatch(f"the result of {type(call).__name__} is null")
            return None
        case Import():
            fields = _map(value, "result")
            return Imported(_decode_public_key(fields.get("public_key")), _handle(fields.get("handle")))
        case Attest() | AttestKey():
            return Attested(_bytes(_map(value, "result").get("document"), "document"))
        case ImportUnencrypted() | GenerateAndImport() | ImportSealed() | Generate() | Reseal():
            fields = _map(value, "result")
            handle = None if isinstance(call, Generate | Reseal) else _handle(fields.get("handle"))
            blob = _bytes(fields.get("encrypted_private_key"), "encrypted_private_key")
            return Created(blob, _decode_public_key(fields.get("public_key")), handle)
        case Sign() | SignWith() | ProvePossession():
            return _decode_signature(value)
        case PublicKeyOf() | PublicKeyFrom():
            return _decode_public_key(value)
        case _:
            assert_never(call)


def _single(value: object, what: str) -> tuple[str, object]:
    """A one-entry map with a text key."""
    if isinstance(value, dict) and len(value) == 1:
        ((name, argument),) = value.items()
        if isinstance(name, str):
            return name, argument
    raise _Mismatch(f"a {what} is a map with one entry under a text key")


def _map(value: object, what: str) -> dict[str, object]:
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    raise _Mismatch(f"{what} is a map with text keys")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise _Mismatch(f"{what} is a text")
    return value


def _bytes(value: object, what: str, lengths: tuple[int, ...] | None = None) -> bytes:
    """A byte string, or an array of integers 0 to 255."""
    if isinstance(value, list):
        try:
            data = bytes(value)  # refuses what is not an integer or out of range
        except (TypeError, ValueError) as exc:
            raise _Mismatch(f"{what} is a byte string or an array of integers 0 to 255") from exc
    elif isinstance(value, bytes):
        data = value
    else:
        raise _Mismatch(f"{what} is a byte string or an array of integers 0 to 255")
    if lengths is not None and len(data) not in lengths:
        raise _Mismatch(f"{what} has {' or '.join(map(str, lengths))} bytes, not {len(data)}")
    return data


def _unsigned(value: object, what: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_HANDLE:
        return value
    raise _Mismatch(f"{what} is an unsigned integer")


def _handle(value: object) -> int:
    return _unsigned(value, "handle")


def _version(value: object) -> int:
    version = _unsigned(value, "version")
    if version not in SIGNING_VERSIONS:
        raise _Mismatch("version is 0, 1, 2 or 255")
    return version


def _curve(value: object) -> Curve:
    curve = _CURVES.get(value) if isinstance(value, str) else None
    if curve is None:
        raise _Mismatch(f"unknown key type, expected one of {', '.join(_CURVES)}")
    return curve


_PUBLIC_KEY_LENGTH = {Curve.ED25519: 32, Curve.SECP256K1: 33, Curve.P256: 33, Curve.BLS12_381: 48}
_SIGNATURE_LENGTH = {Curve.ED25519: 64, Curve.SECP256K1: 64, Curve.P256: 64, Curve.BLS12_381: 96}


def _decode_public_key(value: object) -> PublicKey:
    name, data = _single(value, "public key")
    curve = _curve(name)
    return PublicKey(curve, _bytes(data, f"{name} public key", (_PUBLIC_KEY_LENGTH[curve],)))


def _decode_signature(value: object) -> Signature:
    name, data = _single(value, "signature")
    curve = _curve(name)
    return Signature(curve, _bytes(data, f"{name} signature", (_SIGNATURE_LENGTH[curve],)))


def encode_private_key(curve: Curve, secret: bytes | bytearray) -> bytes:
    """The private key map: the plaintext of sealed keys and sealed imports."""
    return dumps({CURVE_NAMES[curve]: bytes(secret)})


def decode_private_key(value: object) -> ImportUnencrypted:
    """A private key map (`{"Ed25519": seed}`); raises `MalformedCallError`."""
    try:
        return _private_key(value)
    except _Mismatch as exc:
        raise MalformedCallError(str(exc)) from exc


def _private_key(value: object) -> ImportUnencrypted:
    name, data = _single(value, "private key")
    return ImportUnencrypted(_curve(name), _bytes(data, f"{name} private key", (32,)))


def _chain(value: object) -> RpcErrorChain:
    messages: list[str] = []
    while value is not None and len(messages) < MAX_CAUSES:
        error = _map(value, "error")
        messages.append(_text(error.get("message"), "message"))
        value = error.get("source")
    if not messages:
        raise _Mismatch("an error has a message")
    return RpcErrorChain(tuple(messages))


def _limited(value: object, what: str, limit: int) -> bytes:
    data = _bytes(value, what)
    if len(data) > limit:
        raise _Mismatch(f"{what} must have at most {limit} bytes")
    return data


def _short_text(value: object, what: str, limit: int) -> str:
    """Printable ASCII: it becomes part of what a sealed message is bound to, and is shown to people."""
    text = _text(value, what)
    if not (0 < len(text) <= limit and text.isascii() and text.isprintable()):
        raise _Mismatch(f"{what} must have 1 to {limit} printable ASCII characters")
    return text


def _nonce(value: object) -> bytes:
    nonce = _bytes(value, "nonce")
    if not MIN_NONCE <= len(nonce) <= MAX_NONCE:
        raise _Mismatch(f"nonce must have {MIN_NONCE} to {MAX_NONCE} bytes")
    return nonce


def _decode_initialize(argument: object) -> Initialize:
    fields = _map(argument, "credentials")
    token, seal, update = fields.get("session_token"), fields.get("seal"), fields.get("update", False)
    if seal not in (None, SEAL_V1):
        raise _Mismatch(f"seal is {SEAL_V1} or absent")
    if not isinstance(update, bool):
        raise _Mismatch("update is true or false")
    return Initialize(
        access_key_id=_text(fields.get("access_key_id", ""), "access_key_id"),
        secret_access_key=_text(fields.get("secret_access_key", ""), "secret_access_key"),
        session_token=None if token is None else _text(token, "session_token"),
        encryption_key_id=_text(fields.get("encryption_key_id", ""), "encryption_key_id"),
        region=_text(fields.get("region", ""), "region"),
        seal=None if seal is None else SEAL_V1,
        update=update,
    )


def _decode_sign(argument: object) -> Sign:
    fields = _map(argument, "argument of Sign")
    return Sign(
        _handle(fields.get("handle")), _bytes(fields.get("message"), "message"), _version(fields.get("version"))
    )


def _decode_sign_with(argument: object) -> SignWith:
    fields = _map(argument, "argument of SignWith")
    return SignWith(
        _bytes(fields.get("encrypted_private_key"), "encrypted_private_key"),
        _bytes(fields.get("message"), "message"),
        _version(fields.get("version")),
    )


def _decode_prove_possession(argument: object) -> ProvePossession:
    if isinstance(argument, int):
        return ProvePossession(_handle(argument))
    fields = _map(argument, "argument of ProvePossession")
    subject = _decode_public_key(fields.get("public_key"))
    if subject.curve is not Curve.BLS12_381:
        raise _Mismatch("a proof of possession is over a BLS public key")
    return ProvePossession(_handle(fields.get("handle")), subject.data)


def _decode_attest(argument: object) -> Attest:
    fields = _map(argument, "argument of Attest")
    purpose, user_data = fields.get("purpose"), fields.get("user_data")
    if not isinstance(purpose, str) or purpose not in PURPOSES:
        raise _Mismatch(f"purpose is {' or '.join(PURPOSES)}")
    nonce = _nonce(fields.get("nonce"))
    return Attest(purpose, nonce, b"" if user_data is None else _limited(user_data, "user_data", MAX_USER_DATA))


def _sealed(fields: dict[str, object]) -> tuple[bytes, bytes, bytes]:
    """Key, enc and ciphertext of a sealed message."""
    key, enc = (_bytes(fields.get(name), name, (X25519_LENGTH,)) for name in ("key", "enc"))
    return key, enc, _limited(fields.get("ciphertext"), "ciphertext", MAX_CIPHERTEXT)


def _decode_import_sealed(argument: object) -> ImportSealed:
    fields = _map(argument, "argument of ImportSealed")
    marks = fields.get("marks")
    return ImportSealed(
        *_sealed(fields),
        _short_text(fields.get("address"), "address", MAX_ADDRESS),
        None if marks is None else _short_text(marks, "marks", MAX_MARKS),
    )


def _decode_attest_key(argument: object) -> AttestKey:
    fields = _map(argument, "argument of AttestKey")
    return AttestKey(_handle(fields.get("handle")), _nonce(fields.get("nonce")))


_CALLS: dict[str, Callable[[object], Call]] = {
    "Initialize": _decode_initialize,
    "Import": lambda argument: Import(_bytes(argument, "Import")),
    "ImportUnencrypted": _private_key,
    "Generate": lambda argument: Generate(_curve(argument)),
    "GenerateAndImport": lambda argument: GenerateAndImport(_curve(argument)),
    "Sign": _decode_sign,
    "SignWith": _decode_sign_with,
    "PublicKey": lambda argument: PublicKeyOf(_handle(argument)),
    "PublicKeyFrom": lambda argument: PublicKeyFrom(_bytes(argument, "PublicKeyFrom")),
    "ProvePossession": _decode_prove_possession,
    "Attest": _decode_attest,
    "ImportSealed": _decode_import_sealed,
    "AttestKey": _decode_attest_key,
    "Reseal": lambda argument: Reseal(_bytes(argument, "Reseal")),
    "InitializeSealed": lambda argument: InitializeSealed(*_sealed(_map(argument, "argument of InitializeSealed"))),
}
