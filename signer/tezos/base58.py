"""Base58check text with Tezos prefixes: `tz1…`, `edpk…`, `BLsig…`.

Implements section 6.1 of the signer specification; error texts are those of its section 2.7, because
operators search for them. Does no I/O.
"""

from dataclasses import dataclass
from hashlib import sha256

from signer.tezos.errors import Base58Error

_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUES = {character: value for value, character in enumerate(_ALPHABET)}
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]  # two digits by their value
_PAIRS_IN_CHUNK = 5
_CHUNK = 58 ** (2 * _PAIRS_IN_CHUNK)  # below 2^59
_CHECKSUM_LENGTH = 4  # bytes
_MAX_TEXT = 4096  # characters; the longest known text (an ML-DSA-44 signature) has 3,316


@dataclass(frozen=True, slots=True)
class Prefix:
    """One kind of Base58check text: the bytes in front of the payload, and the payload's length."""

    name: str
    leading: bytes
    length: int  # bytes of payload


ED25519_SEED = Prefix("edsk", bytes.fromhex("0d0f3a07"), 32)
ED25519_SECRET_KEY = Prefix("edsk", bytes.fromhex("2bf64e07"), 64)
SECP256K1_SECRET_KEY = Prefix("spsk", bytes.fromhex("11a2e0c9"), 32)
P256_SECRET_KEY = Prefix("p2sk", bytes.fromhex("1051eebd"), 32)
BLS_SECRET_KEY = Prefix("BLsk", bytes.fromhex("0396c028"), 32)
ED25519_ENCRYPTED_SEED = Prefix("edesk", bytes.fromhex("075a3cb329"), 56)
SECP256K1_ENCRYPTED = Prefix("spesk", bytes.fromhex("09edf1ae96"), 56)
P256_ENCRYPTED = Prefix("p2esk", bytes.fromhex("09303973ab"), 56)
BLS_ENCRYPTED = Prefix("BLesk", bytes.fromhex("02051e3519"), 56)
ED25519_PUBLIC_KEY = Prefix("edpk", bytes.fromhex("0d0f25d9"), 32)
SECP256K1_PUBLIC_KEY = Prefix("sppk", bytes.fromhex("03fee256"), 33)
P256_PUBLIC_KEY = Prefix("p2pk", bytes.fromhex("03b28b7f"), 33)
BLS_PUBLIC_KEY = Prefix("BLpk", bytes.fromhex("069587cc"), 48)
ED25519_HASH = Prefix("tz1", bytes.fromhex("06a19f"), 20)
SECP256K1_HASH = Prefix("tz2", bytes.fromhex("06a1a1"), 20)
P256_HASH = Prefix("tz3", bytes.fromhex("06a1a4"), 20)
BLS_HASH = Prefix("tz4", bytes.fromhex("06a1a6"), 20)
ML_DSA_44_HASH = Prefix("tz5", bytes.fromhex("06a1a9"), 20)
ORIGINATED_HASH = Prefix("KT1", bytes.fromhex("025a79"), 20)
SMART_ROLLUP_HASH = Prefix("sr1", bytes.fromhex("067c75"), 20)
ZK_ROLLUP_HASH = Prefix("epx1", bytes.fromhex("0117e07d"), 20)
ED25519_SIGNATURE = Prefix("edsig", bytes.fromhex("09f5cd8612"), 64)
SECP256K1_SIGNATURE = Prefix("spsig1", bytes.fromhex("0d7365133f"), 64)
P256_SIGNATURE = Prefix("p2sig", bytes.fromhex("36f02c34"), 64)
GENERIC_SIGNATURE = Prefix("sig", bytes.fromhex("04822b"), 64)
BLS_SIGNATURE = Prefix("BLsig", bytes.fromhex("28ab40cf"), 96)
AGGREGATE_SIGNATURE = Prefix("asig", bytes.fromhex("024bea65"), 96)
CHAIN_ID = Prefix("Net", bytes.fromhex("575200"), 4)
BLOCK_HASH = Prefix("B", bytes.fromhex("0134"), 32)
OPERATION_HASH = Prefix("o", bytes.fromhex("0574"), 32)
OPERATION_LIST_LIST_HASH = Prefix("LLo", bytes.fromhex("1d9f6d"), 32)
PROTOCOL_HASH = Prefix("P", bytes.fromhex("02aa"), 32)
CONTEXT_HASH = Prefix("Co", bytes.fromhex("4fc7"), 32)
PAYLOAD_HASH = Prefix("vh", bytes.fromhex("016af2"), 32)
NONCE_HASH = Prefix("nce", bytes.fromhex("45dca9"), 32)
SCRIPT_EXPRESSION_HASH = Prefix("expr", bytes.fromhex("0d2c401b"), 32)
DAL_COMMITMENT = Prefix("sh", bytes.fromhex("0274b4"), 48)

ALL_PREFIXES: tuple[Prefix, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Prefix))


def encode(prefix: Prefix, payload: bytes) -> str:
    """Return *payload* as Base58check text; a payload of another length is a programming error."""
    if len(payload) != prefix.length:
        raise ValueError(f"{prefix.name} holds {prefix.length} bytes, not {len(payload)}")
    body = prefix.leading + payload
    return _encode_raw(body + _checksum(body))


def decode(text: str, known: tuple[Prefix, ...] = ALL_PREFIXES) -> tuple[Prefix, bytes]:
    """Return which of the *known* kinds *text* is, and its payload.

    Raises `Base58Error` for a foreign character, a wrong checksum, an unknown prefix or a wrong length.
    """
    raw = _decode_raw(text)
    if len(raw) < _CHECKSUM_LENGTH:
        raise Base58Error(f"gotez: base58Check decoding error: data is too short: {len(raw)}")
    body, checksum = raw[:-_CHECKSUM_LENGTH], raw[-_CHECKSUM_LENGTH:]
    if _checksum(body) != checksum:
        raise Base58Error("gotez: base58Check decoding error: invalid checksum")
    return _match(body, known)


def _match(body: bytes, known: tuple[Prefix, ...]) -> tuple[Prefix, bytes]:
    wrong_length: Base58Error | None = None
    for prefix in known:
        if not body.startswith(prefix.leading):
            continue
        payload = body[len(prefix.leading) :]
        if len(payload) == prefix.length:
            return prefix, payload
        wrong_length = Base58Error(
            f"gotez: invalid base58 message length: expected {prefix.length}, got {len(payload)}"
        )
    raise wrong_length or Base58Error("gotez: unknown Tezos base58 prefix")


def _checksum(body: bytes) -> bytes:
    return sha256(sha256(body).digest()).digest()[:_CHECKSUM_LENGTH]


def _encode_raw(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    pairs: list[str] = []  # from the last to the first
    while number:
        number, chunk = divmod(number, _CHUNK)  # ten digits at once: a machine word is cheap to take apart
        for _ in range(_PAIRS_IN_CHUNK):
            chunk, pair = divmod(chunk, 58 * 58)
            pairs.append(_PAIRS[pair])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(pairs)).lstrip("1")


def _decode_raw(text: str) -> bytes:
    if len(text) > _MAX_TEXT:  # the conversion is quadratic: a limit before the work
        raise Base58Error(f"gotez: base58 decoding error: {len(text)} characters, limit {_MAX_TEXT}")
    number = 0
    for position, character in enumerate(text):
        value = _VALUES.get(character)
        if value is None:
            raise Base58Error(f"gotez: base58 decoding error: unexpected character at position {position}: {character}")
        number = number * 58 + value
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
