"""Attestation documents: whether an enclave is what it says; section 2 of the enclave specification. Does no I/O.

`verify` takes the twenty steps of section 2.4 in their order, and the first that fails names the reason. Nothing of a
document leaves this module before its signature has been verified. The chain is walked from the pinned root: the
extensions of a certificate are read after the signature over it has been verified, so that only bytes which Amazon
signed reach that parser. There is no revocation check, and nothing is fetched: leaves live three hours.
"""

import hashlib
import hmac
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384

from signer.attestation.cbor import CborError, decode, split_tag
from signer.errors import SignerError

ROOT_SHA256 = bytes.fromhex("641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b")
"""Fingerprint of the root certificate `aws.nitro-enclaves`, as published by AWS (section 2.7)."""

MAX_DOCUMENT = 16_384  # bytes
PCR_LENGTH = 48  # bytes: SHA-384
DEBUG_PCRS = (0, 1, 2)  # all zero in debug mode; 3 and 4 keep their values

_PROTECTED = bytes.fromhex("a1013822")  # {1: -35}: ES384
_ALGORITHM_LABEL = 1  # COSE
_COSE_SIGN1_TAG = 18
_SIGNATURE_LENGTH = 96  # bytes: r and s
_MAX_PCRS = 32
_MAX_CHAIN = 8  # certificates in the bundle
_MAX_FIELD = 1024  # bytes of a certificate, or of one of the three free fields
_ECDSA_SHA384 = x509.SignatureAlgorithmOID.ECDSA_WITH_SHA384
_KNOWN_EXTENSIONS = (x509.BasicConstraints.oid, x509.KeyUsage.oid)  # others must not be critical
_PARSE_FAULTS = (  # what cryptography raises for a certificate that it cannot read
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)

_ADVICE = {
    "size": "it is empty or too long; whatever answered is not a Nitro enclave",
    "cbor": "it is damaged or cut short; whatever answered is not a Nitro enclave",
    "cose": "it is no signed document; whatever answered is not a Nitro enclave",
    "algorithm": "it is not signed by a Nitro hypervisor; an emulated enclave writes such documents",
    "payload": "a field is missing or has the wrong form; whatever answered is not a Nitro enclave",
    "root": "it comes from another root than AWS Nitro's; an emulator, or another AWS partition "
    "(whose fingerprint must be configured)",
    "chain": "its certificates do not lead to the root: treat it as forged",
    "validity": "a certificate is not valid at this time; check the clock of this machine, and use a new document",
    "signature": "its signature is wrong: treat it as forged",
    "stale": "it was not made just now; check the clock of this machine, and use a new document",
    "nonce": "it does not answer our question: it is an old one, or was made for somebody else",
    "user_data": "it says something else than was expected: it was made for another purpose",
    "module": "it comes from another enclave; expected was the one with the other module id",
    "debug": "the enclave runs in debug mode, where root on the parent can read its memory; "
    "start it without --debug-mode and --attach-console",
    "pcr": "the enclave runs another image, or runs under another role or instance, than was expected; "
    "compare the values with those of the release (`signer measure`)",
    "public_key": "it holds no public key to seal to; the enclave is of a version that gives none",
}


class DocumentError(SignerError):
    """A document was refused. *reason* is the word of section 2.4; the text says what to do. Nothing was done."""

    def __init__(self, reason: str, detail: str = "") -> None:
        found = f" ({detail})" if detail else ""
        super().__init__(f"attestation document refused, {reason}{found}: {_ADVICE[reason]}")
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What a verified document says."""

    module_id: str
    timestamp: int  # milliseconds since 1970, UTC
    pcrs: Mapping[int, bytes]  # locked registers only
    public_key: bytes | None
    user_data: bytes | None
    nonce: bytes | None

    @property
    def is_debug(self) -> bool:
        """Whether the enclave runs in debug mode: anybody who is root on the parent may read its memory."""
        return not any(any(self.pcrs[index]) for index in DEBUG_PCRS)

    @property
    def made_at(self) -> datetime:
        """The hypervisor's time when it signed; raises `OverflowError` beyond the year 9999."""
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=self.timestamp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a document must say to be accepted; None and no entry mean: anything.

    The nonce has no default, so that nobody leaves it out by mistake: without one, any document of the last minutes
    will do. *pcrs* gives for each register the values that are good; in debug mode, if allowed, they are not compared.
    """

    nonce: bytes | None
    user_data: bytes | None = None
    module_id: str | None = None
    pcrs: Mapping[int, Collection[bytes]] = field(default_factory=dict)
    allow_debug: bool = False
    needs_public_key: bool = False
    root_sha256: bytes = ROOT_SHA256
    max_age: float = 300.0  # seconds
    max_skew: float = 60.0  # seconds that the document may be ahead of our clock


@dataclass(frozen=True, slots=True)
class _Envelope:
    """A COSE_Sign1 with its byte strings as they came."""

    protected: bytes
    payload: bytes
    signature: bytes

    def signed_bytes(self) -> bytes:
        """Sig_structure of RFC 9052: ["Signature1", protected, b"", payload]."""
        return b"\x84\x6aSignature1" + _byte_string(self.protected) + b"\x40" + _byte_string(self.payload)


@dataclass(frozen=True, slots=True)
class _Payload:
    document: Document
    bundle: Sequence[bytes]  # DER, root first
    certificate: bytes  # DER


def verify(document: bytes, expected: Expected, *, now: datetime) -> Document:
    """What *document* says, if it is genuine, recent and as *expected*; raises `DocumentError`.

    *now* has a time zone: it is compared with the certificates and the document's own time.
    """
    if now.tzinfo is None:
        raise ValueError("now needs a time zone")
    if not 1 <= len(document) <= MAX_DOCUMENT:
        raise DocumentError("size", f"{len(document)} bytes")
    envelope = _read_envelope(document)
    payload = _read_payload(envelope.payload)
    leaf_key = _verify_chain(payload, expected.root_sha256, now)
    _verify_signature(envelope, leaf_key)
    _compare(payload.document, expected, now)
    return payload.document


# -- steps 2 to 4: the envelope


def _read_envelope(document: bytes) -> _Envelope:
    try:
        tag, rest = split_tag(document)
        item = decode(rest)
    except CborError as exc:
        raise DocumentError("cbor", f"unverified: {exc}") from None
    if tag not in (None, _COSE_SIGN1_TAG):
        raise DocumentError("cose", f"unverified: tag {tag}")
    match item:
        case [bytes(protected), dict(unprotected), bytes(payload), bytes(signature)] if not unprotected:
            _check_algorithm(protected)
            return _Envelope(protected, payload, signature)
    raise DocumentError("cose")


def _check_algorithm(protected: bytes) -> None:
    """The algorithm is ours to know, never the document's to choose: any other header is refused."""
    if protected == _PROTECTED:
        return
    try:
        header = decode(protected)
    except CborError:
        header = None
    if isinstance(header, dict) and header.keys() == {_ALGORITHM_LABEL}:
        algorithm = header[_ALGORITHM_LABEL]
        if type(algorithm) is int and algorithm != -35:
            raise DocumentError("algorithm", f"unverified: COSE algorithm {algorithm} instead of -35")
    raise DocumentError("cose")


# -- steps 5 and 6: the payload


def _read_payload(data: bytes) -> _Payload:
    try:
        fields = decode(data)
    except CborError as exc:
        raise DocumentError("cbor", f"unverified: in the payload, {exc}") from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise DocumentError("payload")
    _require(fields.get("digest") == "SHA384", "digest")
    return _Payload(
        document=Document(
            module_id=_module_id(fields.get("module_id")),
            timestamp=_timestamp(fields.get("timestamp")),
            pcrs=_registers(fields.get("pcrs")),
            public_key=_free_field(fields, "public_key") or None,  # an empty one has been seen, and is none
            user_data=_free_field(fields, "user_data"),
            nonce=_free_field(fields, "nonce"),
        ),
        bundle=_bundle(fields.get("cabundle")),
        certificate=_certificate(fields.get("certificate"), "certificate"),
    )


def _require(condition: bool, name: str) -> None:
    if not condition:
        raise DocumentError("payload", f"field {name}")


def _module_id(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise DocumentError("payload", "field module_id")


def _timestamp(value: object) -> int:
    if type(value) is int and value > 0:
        return value
    raise DocumentError("payload", "field timestamp")


def _registers(value: object) -> Mapping[int, bytes]:
    if not isinstance(value, dict):
        raise DocumentError("payload", "field pcrs")
    registers: dict[int, bytes] = {}
    for index, data in value.items():
        in_range = isinstance(index, int) and 0 <= index < _MAX_PCRS
        _require(in_range and isinstance(data, bytes) and len(data) == PCR_LENGTH, "pcrs")
        registers[index] = data
    _require(all(index in registers for index in DEBUG_PCRS), "pcrs")
    return registers


def _bundle(value: object) -> Sequence[bytes]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_CHAIN:
        raise DocumentError("payload", "field cabundle")
    return [_certificate(entry, "cabundle") for entry in value]


def _certificate(value: object, name: str) -> bytes:
    if isinstance(value, bytes) and 1 <= len(value) <= _MAX_FIELD:
        return value
    raise DocumentError("payload", f"field {name}")


def _free_field(fields: Mapping[object, object], name: str) -> bytes | None:
    value = fields.get(name)
    if value is None or (isinstance(value, bytes) and len(value) <= _MAX_FIELD):
        return value
    raise DocumentError("payload", f"field {name}")


# -- steps 7 to 13: the chain and the signature


def _verify_chain(payload: _Payload, root_sha256: bytes, now: datetime) -> ec.EllipticCurvePublicKey:
    """The leaf's key, once its chain leads to the pinned root and is valid *now*."""
    if hashlib.sha256(payload.bundle[0]).digest() != root_sha256:
        raise DocumentError("root")
    chain: list[x509.Certificate] = []
    key: ec.EllipticCurvePublicKey | None = None
    last = len(payload.bundle)
    for place, data in enumerate([*payload.bundle, payload.certificate]):
        try:
            certificate = _parse(data)
            if chain:
                _check_issued(certificate, chain[-1])
            _check_extensions(certificate, authorities_below=None if place == last else last - 1 - place)
            key = _p384_key(certificate)
        except (*_PARSE_FAULTS, InvalidSignature):
            raise DocumentError("chain", f"certificate {place + 1} of {last + 1}") from None
        chain.append(certificate)
    _check_validity(chain, now)
    assert key is not None  # the chain has two certificates at least
    return key


def _parse(data: bytes) -> x509.Certificate:
    """Raises one of `_PARSE_FAULTS`; what the library warns of is no word to the operator, who can't change it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return x509.load_der_x509_certificate(data)


def _check_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    """Raise `ValueError` or `InvalidSignature` unless *issuer*, whose key is of P-384, signed *certificate*."""
    if certificate.signature_algorithm_oid != _ECDSA_SHA384:
        raise ValueError("signature algorithm")
    certificate.verify_directly_issued_by(issuer)  # the names too, as they are encoded, and both algorithm fields


def _p384_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return key
    raise ValueError("key")


def _check_extensions(certificate: x509.Certificate, *, authorities_below: int | None) -> None:
    """Raise `ValueError` unless the extensions fit its place: CAs that stand behind it, None for the leaf."""
    extensions = certificate.extensions
    if any(extension.critical and extension.oid not in _KNOWN_EXTENSIONS for extension in extensions):
        raise ValueError("critical extension")
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        raise ValueError("missing extension") from None
    if authorities_below is None:
        if constraints.ca or not usage.digital_signature:
            raise ValueError("not a leaf")
        return
    limit = constraints.path_length
    if not (constraints.ca and usage.key_cert_sign) or (limit is not None and authorities_below > limit):
        raise ValueError("not an authority here")


def _check_validity(chain: Sequence[x509.Certificate], now: datetime) -> None:
    for place, certificate in enumerate(chain):
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise DocumentError("validity", f"certificate {place + 1} of {len(chain)}, at {now:%Y-%m-%d %H:%M:%S %Z}")


def _verify_signature(envelope: _Envelope, key: ec.EllipticCurvePublicKey) -> None:
    signature = envelope.signature
    if len(signature) != _SIGNATURE_LENGTH:
        raise DocumentError("signature", f"{len(signature)} bytes")
    half = _SIGNATURE_LENGTH // 2
    r, s = int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
    try:
        key.verify(encode_dss_signature(r, s), envelope.signed_bytes(), ec.ECDSA(SHA384()))
    except InvalidSignature:
        raise DocumentError("signature") from None


def _byte_string(data: bytes) -> bytes:
    """CBOR with the length in its shortest form; no payload is longer than `MAX_DOCUMENT`."""
    if len(data) < 24:
        return bytes([0x40 | len(data)]) + data
    if len(data) < 256:
        return b"\x58" + bytes([len(data)]) + data
    return b"\x59" + len(data).to_bytes(2, "big") + data


# -- steps 14 to 20: what it says


def _compare(document: Document, expected: Expected, now: datetime) -> None:
    _check_age(document, expected, now)
    if expected.nonce is not None and not _equal(document.nonce, expected.nonce):
        raise DocumentError("nonce", "it has none" if document.nonce is None else "")
    if expected.user_data is not None and not _equal(document.user_data, expected.user_data):
        raise DocumentError("user_data", "it has none" if document.user_data is None else "")
    if expected.module_id is not None and document.module_id != expected.module_id:
        raise DocumentError("module", f"{document.module_id!r:.80} instead of {expected.module_id}")
    if document.is_debug and not expected.allow_debug:
        raise DocumentError("debug")
    if not document.is_debug:
        _check_registers(document.pcrs, expected.pcrs)
    if expected.needs_public_key and document.public_key is None:
        raise DocumentError("public_key")


def _check_age(document: Document, expected: Expected, now: datetime) -> None:
    age = round(now.timestamp() * 1000) - document.timestamp  # ms
    if age > expected.max_age * 1000:
        raise DocumentError("stale", f"{age / 1000} s old, at most {expected.max_age:g}")
    if -age > expected.max_skew * 1000:
        raise DocumentError("stale", f"{-age / 1000} s ahead of this clock, at most {expected.max_skew:g}")


def _equal(found: bytes | None, expected: bytes) -> bool:
    return found is not None and hmac.compare_digest(found, expected)


def _check_registers(found: Mapping[int, bytes], expected: Mapping[int, Collection[bytes]]) -> None:
    for index, good in sorted(expected.items()):
        value = found.get(index)
        if value is None or value not in good:
            raise DocumentError("pcr", f"PCR{index} is {'absent' if value is None else value.hex()}")
