"""The signature section of an image: whose certificate PCR8 is, and whether it signed this PCR0; section 6.1.

Pure. The section is CBOR, an array of one {signing_certificate: PEM, signature: COSE_Sign1}, where byte strings are
written as arrays of integers; the signed payload is {register_index: 0, register_value: PCR0}.
"""

from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from signer.image.eif import ImageError
from signer.rpc._cbor import CborError, dumps, loads

# By the key's curve: COSE's number of the algorithm, its hash, bytes of r and of s (RFC 9053, section 2.1).
_ALGORITHMS: dict[str, tuple[int, hashes.HashAlgorithm, int]] = {
    "secp256r1": (-7, hashes.SHA256(), 32),
    "secp384r1": (-35, hashes.SHA384(), 48),
    "secp521r1": (-36, hashes.SHA512(), 66),
}
_ALGORITHM = 1  # key in COSE's header map


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature section; nothing of it is believed before `verify`."""

    certificate: x509.Certificate
    signed: bytes  # COSE_Sign1

    @property
    def certificate_der(self) -> bytes:
        """What PCR8 measures."""
        return self.certificate.public_bytes(Encoding.DER)


def parse(section: bytes) -> Signature:
    """The signature in the content of a section; raises `ImageError`."""
    try:
        entries = loads(section)
    except CborError as exc:
        raise _bad(f"the section is {exc}") from None
    match entries:
        case [{"signing_certificate": certificate, "signature": signed, **rest}] if not rest:
            pem, cose = _bytes(certificate), _bytes(signed)
        case _:
            raise _bad("the section is no array of one certificate and signature")
    try:
        found = x509.load_pem_x509_certificate(pem)
        found.not_valid_after_utc.isoformat()  # who shows it shall not meet a date that Python cannot have, as year 0
        return Signature(found, cose)
    except (ValueError, x509.InvalidVersion):  # the second is no ValueError
        raise _bad("its certificate is none") from None


def verify(signature: Signature, pcr0: bytes) -> None:
    """Check that the certificate's key signed *pcr0*; raises `ImageError`. Dates and issuer are not looked at."""
    try:
        key = signature.certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise _bad("the certificate's key cannot be used") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _ALGORITHMS:
        raise _bad("the certificate's key is on none of the curves P-256, P-384, P-521")
    algorithm, digest, size = _ALGORITHMS[key.curve.name]
    protected, payload, raw = _cose(signature.signed)
    if _decoded(protected) != {_ALGORITHM: algorithm} or len(raw) != 2 * size:
        raise _bad("its algorithm is not that of the certificate's key")
    value = encode_dss_signature(int.from_bytes(raw[:size]), int.from_bytes(raw[size:]))
    try:
        key.verify(value, dumps(["Signature1", protected, b"", payload]), ec.ECDSA(digest))
    except InvalidSignature:
        raise _bad("it was not made by the certificate's key, or is damaged") from None
    match _decoded(payload):
        case {"register_index": 0, "register_value": register, **rest} if not rest and _bytes(register) == pcr0:
            return
    raise _bad("it was made for another image")


def _cose(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Protected header, payload and signature; the unprotected header is empty, or it is refused."""
    match _decoded(data):
        case [bytes(protected), dict(unprotected), bytes(payload), bytes(raw)] if not unprotected:
            return protected, payload, raw
    raise _bad("it is no COSE_Sign1")


def _decoded(data: bytes) -> object:
    try:
        return loads(data, text_keys=False)
    except CborError as exc:
        raise _bad(f"it is {exc}") from None


def _bytes(item: object) -> bytes:
    """A byte string, or the array of integers that AWS's tools write in its place."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, list) and all(type(one) is int and 0 <= one < 256 for one in item):
        return bytes(item)
    raise _bad("it has something else in the place of bytes")


def _bad(text: str) -> ImageError:
    return ImageError("signature", f"the image's signature is bad: {text}; sign the image again")
