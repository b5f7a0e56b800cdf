"""Secret keys as people have them: Base58 (plain, encrypted), PEM and DER (PKCS#8, SEC1, encrypted PKCS#8).

Sections 6.2, 6.5 and 6.7 of the signer specification; unlike the reference this reads DER, `EC PRIVATE KEY`, encrypted
PKCS#8, and trims whitespace. No error text holds a byte of the secret.
"""

import hashlib
import re
from collections.abc import Callable

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
    load_pem_private_key,
)
from nacl.exceptions import CryptoError as SecretBoxError
from nacl.secret import SecretBox

from signer.crypto import load_secret_key
from signer.crypto.interface import (
    CryptoError,
    InvalidKeyError,
    PassphraseNeededError,
    SecretKey,
    WrongPassphraseError,
)
from signer.tezos import base58
from signer.tezos.base58 import Prefix
from signer.tezos.errors import Base58Error
from signer.tezos.keys import Curve

Passphrase = Callable[[], str | None]
"""Asked for only when the key is encrypted; None means there is none."""

ACCEPTED = "Base58 (edsk, spsk, p2sk, BLsk and their encrypted forms edesk, spesk, p2esk, BLesk), PEM or DER"
_ACCEPTED_KEYS = "accepted: Ed25519, secp256k1 and P-256"

_PLAIN: dict[Prefix, Curve] = {
    base58.ED25519_SEED: Curve.ED25519,
    base58.ED25519_SECRET_KEY: Curve.ED25519,
    base58.SECP256K1_SECRET_KEY: Curve.SECP256K1,
    base58.P256_SECRET_KEY: Curve.P256,
    base58.BLS_SECRET_KEY: Curve.BLS12_381,
}
_ENCRYPTED: dict[Prefix, Curve] = {
    base58.ED25519_ENCRYPTED_SEED: Curve.ED25519,
    base58.SECP256K1_ENCRYPTED: Curve.SECP256K1,
    base58.P256_ENCRYPTED: Curve.P256,
    base58.BLS_ENCRYPTED: Curve.BLS12_381,
}
_SEED = {
    Curve.ED25519: base58.ED25519_SEED,
    Curve.SECP256K1: base58.SECP256K1_SECRET_KEY,
    Curve.P256: base58.P256_SECRET_KEY,
    Curve.BLS12_381: base58.BLS_SECRET_KEY,
}
_ENCRYPTED_PREFIX = {curve: prefix for prefix, curve in _ENCRYPTED.items()}
_EC_CURVES = {"secp256r1": Curve.P256, "secp256k1": Curve.SECP256K1}

_SECRET_LENGTH = 32  # bytes
_SALT_LENGTH = 8  # bytes
_ITERATIONS = 32768  # of PBKDF2-HMAC-SHA-512
_NONCE = bytes(24)  # the salt makes the key unique, so the nonce may stay zero
_DER_SEQUENCE = 0x30
# A private key in PEM, or a word in Base58 (no line of PEM can look like that by chance).
_ONE_OF_SEVERAL = re.compile(
    rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----"
    rb"|(?<![0-9A-Za-z+/=])(?:edsk|spsk|p2sk|BLsk|edesk|spesk|p2esk|BLesk)[1-9A-HJ-NP-Za-km-z]{40,}(?![0-9A-Za-z+/=])"
)
_DEK_INFO = re.compile(rb"^DEK-Info: *([A-Za-z0-9-]+),([0-9A-Fa-f]*)\r?$", re.MULTILINE)
# Hexadecimal digits of the initialization vector; the library panics at others.
_DEK_LENGTHS = {b"AES-128-CBC": 32, b"AES-192-CBC": 32, b"AES-256-CBC": 32, b"DES-EDE3-CBC": 16, b"DES-CBC": 16}
_MAX_LENGTH = 64 * 1024  # bytes of a key in any form


class UnknownFormatError(CryptoError):
    """The text is no secret key that can be read."""


def parse_secret_key(text: bytes, passphrase: Passphrase) -> SecretKey:
    """Read one secret key in any of the forms; whitespace around it is ignored.

    Raises `UnknownFormatError`, `InvalidKeyError`, `PassphraseNeededError` or `WrongPassphraseError`.
    """
    if len(text) > _MAX_LENGTH:
        raise UnknownFormatError(f"larger than any secret key; accepted: {ACCEPTED}")
    if text[:1] == bytes((_DER_SEQUENCE,)) and not text.strip().isalnum():
        return _der(text, passphrase)
    trimmed = text.removeprefix(b"\xef\xbb\xbf").strip()
    if trimmed.startswith(b"-----"):
        return _pem(trimmed, passphrase)
    try:
        words = trimmed.decode("ascii")
    except UnicodeDecodeError:
        return _der(text, passphrase)
    return _base58(words.removeprefix("unencrypted:").removeprefix("encrypted:").strip(), passphrase)


def to_base58(key: SecretKey) -> str:
    """The key in plain Base58: `edsk…` (54 characters), `spsk…`, `p2sk…` or `BLsk…`."""
    return base58.encode(_SEED[key.curve], _to_text_order(key.curve, bytes(key.secret_bytes())))


def encrypt(key: SecretKey, passphrase: str, salt: bytes) -> str:
    """The key in encrypted Base58 (`edesk…`); *salt* has 8 random bytes."""
    secret = _to_text_order(key.curve, bytes(key.secret_bytes()))
    box = SecretBox(_derive(passphrase, salt)).encrypt(secret, _NONCE).ciphertext
    return base58.encode(_ENCRYPTED_PREFIX[key.curve], salt + box)


def _base58(text: str, passphrase: Passphrase) -> SecretKey:
    try:
        prefix, payload = base58.decode(text)
    except Base58Error as exc:
        # The decoder's text may quote a character: of a secret, that is one too many.
        reason = str(exc).partition(" at position")[0]
        raise UnknownFormatError(f"{reason}; accepted: {ACCEPTED}") from None
    if prefix in _PLAIN:
        return _load(_PLAIN[prefix], payload[:_SECRET_LENGTH])
    if prefix in _ENCRYPTED:
        return _load(_ENCRYPTED[prefix], _decrypt(payload, passphrase))
    raise UnknownFormatError(f"gotez: unknown private key prefix; accepted: {ACCEPTED}")


def _load(curve: Curve, secret: bytes) -> SecretKey:
    if curve is not Curve.ED25519 and not any(secret):  # a seed of Ed25519 is no number
        raise InvalidKeyError(f"the {curve.name} secret key is zero, which is no key")
    return load_secret_key(curve, _to_text_order(curve, secret))


def _to_text_order(curve: Curve, secret: bytes) -> bytes:
    """Base58 has BLS scalars little-endian, the wire big-endian; the way is the same in both directions."""
    return secret[::-1] if curve is Curve.BLS12_381 else secret


def _decrypt(payload: bytes, passphrase: Passphrase) -> bytes:
    words = passphrase()
    if words is None:
        raise PassphraseNeededError("the secret key is encrypted and no passphrase was given")
    try:
        return SecretBox(_derive(words, payload[:_SALT_LENGTH])).decrypt(payload[_SALT_LENGTH:], _NONCE)
    except SecretBoxError:
        raise WrongPassphraseError("gotez: unable to decrypt the private key") from None


def _derive(passphrase: str, salt: bytes) -> bytes:
    return hashlib.pbkdf2_hmac("sha512", _bytes(passphrase), salt, _ITERATIONS, SecretBox.KEY_SIZE)


def _bytes(passphrase: str) -> bytes:
    """A passphrase that came from a file or an argument need not be UTF-8."""
    return passphrase.encode("utf-8", "surrogateescape")


def _pem(text: bytes, passphrase: Passphrase) -> SecretKey:
    number = len(_ONE_OF_SEVERAL.findall(text))
    if number > 1:  # the library would read the first, and say nothing of the others
        raise UnknownFormatError(f"the text holds {number} secret keys; give each by itself")
    label, _, headers = text.partition(b"\n")
    encrypted = b"ENCRYPTED" in label or headers.lstrip().startswith(b"Proc-Type:")
    initialization = _DEK_INFO.search(text)
    if initialization is not None and len(initialization[2]) != _DEK_LENGTHS.get(initialization[1].upper()):
        raise UnknownFormatError("failed to decode PEM block: DEK-Info is damaged, or its cipher is not supported")
    return _foreign(
        lambda words: load_pem_private_key(text, words), passphrase, encrypted, "failed to decode PEM block"
    )


def _der(text: bytes, passphrase: Passphrase) -> SecretKey:
    try:
        return _foreign(lambda words: load_der_private_key(text, words), passphrase, False, "failed to decode DER")
    except _PasswordMissingError:
        return _foreign(lambda words: load_der_private_key(text, words), passphrase, True, "failed to decode DER")


class _PasswordMissingError(Exception):
    """The library wants a password."""


def _foreign(
    load: Callable[[bytes | None], object], passphrase: Passphrase, encrypted: bool, failure: str
) -> SecretKey:
    words = passphrase() if encrypted else None
    if encrypted and words is None:
        raise PassphraseNeededError("the secret key is encrypted and no passphrase was given")
    try:
        key = load(None if words is None else _bytes(words))
    except TypeError:  # a password was needed and not given, or given and not needed; an empty one is none
        if encrypted:
            raise WrongPassphraseError("gotez: unable to decrypt the private key") from None
        raise _PasswordMissingError from None
    except UnsupportedAlgorithm as exc:
        raise _unsupported_curve(exc) from None
    except ValueError:
        if encrypted:
            raise WrongPassphraseError("gotez: unable to decrypt the private key") from None
        raise UnknownFormatError(f"{failure}; accepted: {ACCEPTED}") from None
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return load_secret_key(Curve.ED25519, key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _EC_CURVES:
        scalar = key.private_numbers().private_value.to_bytes(_SECRET_LENGTH, "big")
        return load_secret_key(_EC_CURVES[key.curve.name], scalar)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidKeyError(f"crypt: unsupported key type; {_ACCEPTED_KEYS}")
    algorithm = type(key).__name__.removesuffix("PrivateKey")
    raise InvalidKeyError(f"x509: unsupported algorithm: {algorithm}; {_ACCEPTED_KEYS}")


def _unsupported_curve(exc: UnsupportedAlgorithm) -> InvalidKeyError:
    if "explicit" in str(exc):
        return InvalidKeyError(
            "crypt: unsupported key type: the curve's parameters are written out, and a named curve is needed; "
            "rewrite the key with: openssl ec -param_enc named_curve"
        )
    return InvalidKeyError(f"crypt: unsupported key type; {_ACCEPTED_KEYS}")
