"""BLS12-381 (tz4) over pyblst: public keys in G1, signatures in G2; section 6.6 of the signer specification.

One verification is two Miller loops and a final exponentiation, about 1.5 ms in pyblst, during which the interpreter
lock is held. `verify_many` therefore checks several signatures at once: it multiplies each by a random 128-bit
coefficient and compares the products, so that a batch needs one final exponentiation and one Miller loop for each
*distinct* message (fifty delegates attest the same bytes). The coefficients keep errors in two signatures from
cancelling out: a batch with a bad signature passes with probability 2^-128. A batch that fails is checked one by one.
"""

import hmac
import secrets
from collections.abc import Sequence
from functools import lru_cache, reduce
from hashlib import sha256
from operator import add, mul
from typing import ClassVar, NamedTuple

from pyblst import BlstFP12Element, BlstP1Element, BlstP2Element, final_verify, miller_loop

from signer.crypto._secret import SecretBytes, check_scalar
from signer.crypto.interface import LATEST_VERSION, InvalidKeyError, UnsupportedError
from signer.tezos.keys import Curve, PublicKey, Signature

ORDER = 0x73EDA753299D7D483339D80809A1D80553BDA402FFFE5BFEFFFFFFFF00000001
_PUBLIC_KEY_LENGTH = 48  # bytes, compressed G1
_SIGNATURE_LENGTH = 96  # bytes, compressed G2
_INFINITY = 0x40  # flag in the first byte of a compressed point
_COEFFICIENT_BITS = 128

_AUGMENTATION = b"BLS_SIG_BLS12381G2_XMD:SHA-256_SSWU_RO_AUG_"
_PROOF_OF_POSSESSION_SCHEME = b"BLS_SIG_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_"
_POSSESSION = b"BLS_POP_BLS12381G2_XMD:SHA-256_SSWU_RO_POP_"

_GENERATOR = BlstP1Element().uncompress(
    bytes.fromhex("97f1d3a73197d7942695638c4fa9ac0fc3688c4f9774b905a14e3a3f171bac586c55e83ff97a1aeffb3af00adb22c6bb")
)


class Check(NamedTuple):
    """One signature to verify, as raw bytes; *version* is the signing version."""

    key: bytes
    message: bytes
    signature: bytes
    version: int


class BlsSecretKey(SecretBytes):
    """A tz4 key; the secret is a big-endian scalar (Base58 text has it little-endian)."""

    curve: ClassVar[Curve] = Curve.BLS12_381

    def __init__(self, secret: bytes | bytearray) -> None:
        super().__init__(secret)
        check_scalar(self._secret, ORDER, self.curve)
        self._public_key = PublicKey(self.curve, bytes(_GENERATOR.scalar_mul(self._scalar()).compress()))

    @property
    def public_key(self) -> PublicKey:
        return self._public_key

    def sign(self, message: bytes, *, version: int = LATEST_VERSION) -> Signature:
        domain, augmented = _scheme(version, self._public_key.data, message)
        return self._sign(augmented, domain)

    def prove_possession(self, over: PublicKey | None = None) -> Signature:
        subject = over or self._public_key
        if subject.curve is not Curve.BLS12_381:
            raise UnsupportedError("a proof of possession is over a BLS public key")
        return self._sign(subject.data, _POSSESSION)

    def _sign(self, message: bytes, domain: bytes) -> Signature:
        return Signature(self.curve, bytes(_hash(message, domain).scalar_mul(self._scalar()).compress()))

    def _scalar(self) -> int:
        scalar = int.from_bytes(self._secret, "big")
        if scalar == 0:
            raise InvalidKeyError("the key was wiped")
        return scalar


def derive_scalar(material: bytes) -> bytes:
    """KeyGen of the IETF draft (HKDF-SHA-256, empty key info) from at least 32 random bytes; big-endian."""
    salt = b"BLS-SIG-KEYGEN-SALT-"
    length = 48  # ceil(3 * ceil(log2(order)) / 16)
    while True:
        salt = sha256(salt).digest()
        pseudorandom_key = hmac.digest(salt, material + b"\0", "sha256")
        output, block, counter = b"", b"", 0
        while len(output) < length:
            counter += 1
            info = length.to_bytes(2, "big") + bytes((counter,))
            block = hmac.digest(pseudorandom_key, block + info, "sha256")
            output += block
        scalar = int.from_bytes(output[:length], "big") % ORDER
        if scalar:
            return scalar.to_bytes(32, "big")


def check_public_key(key: bytes) -> None:
    """Raise `InvalidKeyError` unless the 48 bytes are a point of the subgroup other than infinity."""
    try:
        _public_point(key)
    except ValueError as exc:
        raise InvalidKeyError("the BLS public key is not a point of the group") from exc


def verify_possession(key: bytes, proof: bytes, subject: bytes) -> bool:
    """Whether *proof* is *key*'s signature over *subject* (48 bytes) under the proof's domain tag."""
    return _verify_one(_Prepared.of(key, subject, proof, _POSSESSION))


def verify_many(checks: Sequence[Check]) -> list[bool]:
    """Whether each signature verifies; never raises. One pairing check for all where all are good."""
    prepared = [_prepare(check) for check in checks]
    good = [one for one in prepared if one is not None]
    if len(good) > 1 and _verify_batch(good):
        return [one is not None for one in prepared]
    return [one is not None and _verify_one(one) for one in prepared]


class _Prepared(NamedTuple):
    key: BlstP1Element
    message: BlstP2Element
    signature: BlstP2Element
    message_id: tuple[bytes, bytes]  # what was hashed, and under which tag

    @classmethod
    def of(cls, key: bytes, message: bytes, signature: bytes, domain: bytes) -> "_Prepared | None":
        try:
            return cls(_public_point(key), _hash(message, domain), _signature_point(signature), (message, domain))
        except ValueError:
            return None


def _prepare(check: Check) -> _Prepared | None:
    try:
        domain, message = _scheme(check.version, check.key, check.message)
    except UnsupportedError:
        return None
    return _Prepared.of(check.key, message, check.signature, domain)


def _scheme(version: int, key: bytes, message: bytes) -> tuple[bytes, bytes]:
    """Domain tag and hashed bytes of a signing version."""
    if version == 1:
        return _AUGMENTATION, key + message
    if version in (2, 3, 255):
        return _PROOF_OF_POSSESSION_SCHEME, message
    raise UnsupportedError(f"signing version {version} is not defined for BLS keys")


def _verify_one(check: _Prepared | None) -> bool:
    """e(key, H(message)) = e(generator, signature)."""
    if check is None:
        return False
    return bool(final_verify(miller_loop(check.key, check.message), miller_loop(_GENERATOR, check.signature)))


def _verify_batch(checks: Sequence[_Prepared]) -> bool:
    """The product over messages of e(sum of r·key, H(message)) = e(generator, sum of r·signature)."""
    signatures: list[BlstP2Element] = []
    keys: dict[tuple[bytes, bytes], list[BlstP1Element]] = {}
    messages: dict[tuple[bytes, bytes], BlstP2Element] = {}
    for check in checks:
        coefficient = secrets.randbits(_COEFFICIENT_BITS) | 1
        signatures.append(check.signature.scalar_mul(coefficient))
        keys.setdefault(check.message_id, []).append(check.key.scalar_mul(coefficient))
        messages[check.message_id] = check.message
    loops: list[BlstFP12Element] = [miller_loop(reduce(add, keys[name]), point) for name, point in messages.items()]
    return bool(final_verify(reduce(mul, loops), miller_loop(_GENERATOR, reduce(add, signatures))))


@lru_cache(maxsize=1024)  # keys of this signer, and a few of the clients'
def _public_point(key: bytes) -> BlstP1Element:
    if len(key) != _PUBLIC_KEY_LENGTH or key[0] & _INFINITY:
        raise ValueError("not a public key")
    return BlstP1Element().uncompress(key)  # checks curve and subgroup


def _signature_point(signature: bytes) -> BlstP2Element:
    if len(signature) != _SIGNATURE_LENGTH or signature[0] & _INFINITY:
        raise ValueError("not a signature")
    return BlstP2Element().uncompress(signature)  # checks curve and subgroup


@lru_cache(maxsize=256)  # messages; many keys sign the same bytes within a second
def _hash(message: bytes, domain: bytes) -> BlstP2Element:
    return BlstP2Element().hash_to_group(message, domain)
