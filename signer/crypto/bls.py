"""BLS12-381 (tz4) over pyblst: public keys in G1, signatures in G2; section 6.6 of the signer specification.

One verification is a hash to the curve, two Miller loops and a final exponentiation, about 1.3 ms in pyblst, during
which the interpreter lock is held. `verify_many` therefore checks several signatures at once: it multiplies each by a
random coefficient and compares the sums, so that a batch needs one final exponentiation, and one Miller loop for each
*distinct* message or each distinct key, whichever are fewer (fifty delegates attest the same bytes; one delegate signs
for several chains). The random coefficients keep errors in two signatures from cancelling out: a batch with a bad
signature passes with probability 2^-63. A batch that fails is checked one by one.
"""

import hmac
import secrets
from collections.abc import Sequence
from functools import lru_cache, reduce
from hashlib import sha256
from operator import mul
from typing import ClassVar, NamedTuple, TypeVar

from pyblst import BlstFP12Element, BlstP1Element, BlstP2Element, final_verify, miller_loop

from signer.crypto._secret import SecretBytes, check_scalar
from signer.crypto.interface import LATEST_VERSION, InvalidKeyError, UnsupportedError
from signer.tezos.keys import Curve, PublicKey, Signature

ORDER = 0x73EDA753299D7D483339D80809A1D80553BDA402FFFE5BFEFFFFFFFF00000001
_PUBLIC_KEY_LENGTH = 48  # bytes, compressed G1
_SIGNATURE_LENGTH = 96  # bytes, compressed G2
_INFINITY = 0x40  # flag in the first byte of a compressed point
_COEFFICIENT_BITS = 64  # of which the lowest is always 1, so that none is zero
_WINDOW = 4  # bits of a coefficient that one addition takes care of

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


def expect(key: bytes, message: bytes, version: int) -> None:
    """Do the half of a verification that needs no signature; never raises. What is no key or version is left alone."""
    try:
        domain, hashed = _scheme(version, key, message)
        _left_side(key, hashed, domain)
    except (UnsupportedError, ValueError):
        return


def verify_possession(key: bytes, proof: bytes, subject: bytes) -> bool:
    """Whether *proof* is *key*'s signature over *subject* (48 bytes) under the proof's domain tag."""
    try:
        return _verify_one(_Prepared(key, subject, _POSSESSION, _signature_point(proof)))
    except ValueError:
        return False


def verify_many(checks: Sequence[Check]) -> list[bool]:
    """Whether each signature verifies; never raises. One pairing check for all where all are good."""
    prepared = [_prepare(check) for check in checks]
    good = [one for one in prepared if one is not None]
    if len(good) > 1 and _verify_batch(good):
        return [one is not None for one in prepared]
    return [one is not None and _verify_one(one) for one in prepared]


class _Prepared(NamedTuple):
    key: bytes
    message: bytes  # what is hashed
    domain: bytes
    signature: BlstP2Element


def _prepare(check: Check) -> _Prepared | None:
    """None for what cannot be a good signature."""
    try:
        domain, message = _scheme(check.version, check.key, check.message)
        _public_point(check.key)
        return _Prepared(check.key, message, domain, _signature_point(check.signature))
    except (UnsupportedError, ValueError):
        return None


def _scheme(version: int, key: bytes, message: bytes) -> tuple[bytes, bytes]:
    """Domain tag and hashed bytes of a signing version."""
    if version == 1:
        return _AUGMENTATION, key + message
    if version in (2, 3, 255):
        return _PROOF_OF_POSSESSION_SCHEME, message
    raise UnsupportedError(f"signing version {version} is not defined for BLS keys")


def _verify_one(check: _Prepared) -> bool:
    """e(key, H(message)) = e(generator, signature)."""
    expected = _left_side(check.key, check.message, check.domain)
    return bool(final_verify(expected, miller_loop(_GENERATOR, check.signature)))


def _verify_batch(checks: Sequence[_Prepared]) -> bool:
    """The product of e(r·key, H(message)) over all checks = e(generator, sum of r·signature).

    By bilinearity the factors of one message are one pairing with the sum of r·key, and those of one key are one
    pairing with the sum of r·H(message).
    """
    coefficients = [secrets.randbits(_COEFFICIENT_BITS) | 1 for _ in checks]
    keys: dict[bytes, list[int]] = {}  # to the places of its checks
    messages: dict[tuple[bytes, bytes], list[int]] = {}
    for place, check in enumerate(checks):
        keys.setdefault(check.key, []).append(place)
        messages.setdefault((check.message, check.domain), []).append(place)
    loops: list[BlstFP12Element] = []
    if len(messages) <= len(keys):
        for (message, domain), places in messages.items():
            summed = _combine([_public_point(checks[i].key) for i in places], [coefficients[i] for i in places])
            loops.append(miller_loop(summed, _hash(message, domain)))
    else:
        for key, places in keys.items():
            hashes = [_hash(checks[i].message, checks[i].domain) for i in places]
            loops.append(miller_loop(_public_point(key), _combine(hashes, [coefficients[i] for i in places])))
    signature = _combine([check.signature for check in checks], coefficients)
    return bool(final_verify(reduce(mul, loops), miller_loop(_GENERATOR, signature)))


_Point = TypeVar("_Point", BlstP1Element, BlstP2Element)


def _combine(points: Sequence[_Point], coefficients: Sequence[int]) -> _Point:
    """The sum of coefficient·point, by Straus' method: all points share the doublings.

    Far cheaper than a multiplication each, which pyblst does in constant time over 255 bits; nothing here is secret.
    """
    tables: list[list[_Point]] = []  # of each point, its multiples by 1 to 15
    for point in points:
        multiples = [point]
        for _ in range(2**_WINDOW - 2):
            multiples.append(multiples[-1] + point)
        tables.append(multiples)
    total: _Point | None = None
    for shift in range(_COEFFICIENT_BITS - _WINDOW, -_WINDOW, -_WINDOW):
        if total is not None:
            for _ in range(_WINDOW):
                total = total + total
        for multiples, coefficient in zip(tables, coefficients, strict=True):
            if digit := coefficient >> shift & (2**_WINDOW - 1):
                total = multiples[digit - 1] if total is None else total + multiples[digit - 1]
    assert total is not None  # coefficients are not zero
    return total


@lru_cache(maxsize=1024)  # keys of this signer, and a few of the clients'
def _public_point(key: bytes) -> BlstP1Element:
    if len(key) != _PUBLIC_KEY_LENGTH or key[0] & _INFINITY:
        raise ValueError("not a public key")
    return BlstP1Element().uncompress(key)  # checks curve and subgroup


def _signature_point(signature: bytes) -> BlstP2Element:
    if len(signature) != _SIGNATURE_LENGTH or signature[0] & _INFINITY:
        raise ValueError("not a signature")
    return BlstP2Element().uncompress(signature)  # checks curve and subgroup


@lru_cache(maxsize=64)  # of `expect`, until the signature is there
def _left_side(key: bytes, message: bytes, domain: bytes) -> BlstFP12Element:
    return miller_loop(_public_point(key), _hash(message, domain))


@lru_cache(maxsize=256)  # messages; many keys sign the same bytes within a second
def _hash(message: bytes, domain: bytes) -> BlstP2Element:
    return BlstP2Element().hash_to_group(message, domain)
