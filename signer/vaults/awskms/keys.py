"""A key of KMS as one of Tezos; pure, section 5.1 of the signer specification.

Which keys fit is told by their KeySpec, before anything of theirs is parsed: RSA, ML-DSA and the other curves are
passed over (weaknesses 28 and 29 of the reference).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from signer import crypto
from signer.tezos.keys import Curve, PublicKey


class UnfitKeyError(Exception):
    """The key is none that Tezos has, or none that signs; the text says why."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How KMS is asked to sign a digest of 32 bytes with a key of that spec."""

    curve: Curve
    algorithm: str  # SigningAlgorithm
    message_type: str  # MessageType


SCHEMES = {
    "ECC_SECG_P256K1": Scheme(Curve.SECP256K1, "ECDSA_SHA_256", "DIGEST"),
    "ECC_NIST_P256": Scheme(Curve.P256, "ECDSA_SHA_256", "DIGEST"),
    # Tezos signs the digest as if it were the message: ED25519_SHA_512, which takes RAW alone (KMS API reference,
    # Sign). ED25519_PH_SHA_512, which goes with DIGEST, is Ed25519ph: another scheme, that the chain doesn't accept.
    "ECC_NIST_EDWARDS25519": Scheme(Curve.ED25519, "ED25519_SHA_512", "RAW"),
}
_CURVES = {"secp256k1": Curve.SECP256K1, "secp256r1": Curve.P256}


@dataclass(frozen=True, slots=True)
class KmsKey:
    """A key that KMS can sign with. Its ARN never changes hands; an alias may."""

    arn: str
    public_key: PublicKey
    scheme: Scheme


def read_key(answer: Mapping[str, Any]) -> KmsKey:
    """The key in an answer to `GetPublicKey`. Raises `UnfitKeyError`."""
    usage, spec = answer.get("KeyUsage"), answer.get("KeySpec") or answer.get("CustomerMasterKeySpec")
    if usage != "SIGN_VERIFY":
        raise UnfitKeyError(f"KeyUsage {usage}: it does not sign")
    scheme = SCHEMES.get(str(spec))
    if scheme is None:
        raise UnfitKeyError(f"KeySpec {spec}: Tezos has no such keys")
    arn, der = answer.get("KeyId"), answer.get("PublicKey")
    if not isinstance(arn, str) or not arn or not isinstance(der, bytes):
        raise UnfitKeyError("KMS told no public key")
    key = _parse(der)
    if key.curve is not scheme.curve:
        raise UnfitKeyError(f"KeySpec {spec}, but the public key is of {key.curve.name}")
    return KmsKey(arn, key, scheme)


def _parse(der: bytes) -> PublicKey:
    """A SubjectPublicKeyInfo."""
    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise UnfitKeyError(f"the public key cannot be read: {exc}") from exc
    if isinstance(key, ed25519.Ed25519PublicKey):
        found = PublicKey(Curve.ED25519, key.public_bytes(Encoding.Raw, PublicFormat.Raw))
    elif isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        point = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        found = PublicKey(_CURVES[key.curve.name], point)
    else:
        raise UnfitKeyError("the public key is of no curve of Tezos")
    try:
        crypto.check_public_key(found)
    except crypto.InvalidKeyError as exc:
        raise UnfitKeyError(str(exc)) from exc
    return found
