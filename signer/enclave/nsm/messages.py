"""The module's requests and answers in CBOR, sections 1.2 to 1.4 of the enclave specification. Does no I/O.

The Rust enum form: a call without arguments is a bare text, one with arguments a map of one entry from its name to a
map; answers alike. An answer comes from the hypervisor and may have been cut to the buffer: nothing in it is taken
unchecked, and all that is wrong with it is an `NsmError`.
"""

from dataclasses import dataclass, field

from signer.attestation.cbor import CborError, decode
from signer.enclave.nsm.interface import (
    INPUT_TOO_LARGE,
    INTERNAL_ERROR,
    INVALID_ARGUMENT,
    INVALID_RESPONSE,
    Description,
    NsmError,
    Register,
)
from signer.rpc._cbor import dumps

MAX_REQUEST = 0x1000  # bytes; the driver refuses more
PCR_LENGTH = 48  # bytes of SHA-384
MAX_FREE_FIELD = 1024  # bytes of user data, nonce or public key that every reader of documents accepts (1.4)
MAX_INDEX = 0xFFFF  # u16 in the module's interface


@dataclass(frozen=True, slots=True)
class DescribeNsm:
    """Answered with a `Description`."""


@dataclass(frozen=True, slots=True)
class DescribePcr:
    """Answered with a `Register`."""

    index: int


@dataclass(frozen=True, slots=True)
class ExtendPcr:
    """Answered with the register's new value."""

    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class LockPcr:
    """Answered with nothing."""

    index: int


@dataclass(frozen=True, slots=True)
class LockPcrs:
    """Answered with nothing."""

    range: int


@dataclass(frozen=True, slots=True)
class GetRandom:
    """Answered with random bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attestation:
    """Answered with a document."""

    user_data: bytes | None = field(default=None, repr=False)
    nonce: bytes | None = None
    public_key: bytes | None = None


Request = DescribeNsm | DescribePcr | ExtendPcr | LockPcr | LockPcrs | GetRandom | Attestation

_NAMES: dict[type[Request], str] = {
    DescribeNsm: "DescribeNSM",
    DescribePcr: "DescribePCR",
    ExtendPcr: "ExtendPCR",
    LockPcr: "LockPCR",
    LockPcrs: "LockPCRs",
    GetRandom: "GetRandom",
    Attestation: "Attestation",
}


def encode_request(request: Request) -> bytes:
    """The bytes of *request*. Raises `NsmError` for what the module cannot take: a number out of range, a field over
    1,024 bytes, a request over 4,096."""
    name, argument = _NAMES[type(request)], _argument(request)
    encoded = dumps(name if argument is None else {name: argument})
    if len(encoded) > MAX_REQUEST:
        raise NsmError(INPUT_TOO_LARGE, f"{name} with {len(encoded)} bytes, the limit is {MAX_REQUEST}")
    return encoded


def _argument(request: Request) -> dict[str, object] | None:
    match request:
        case DescribePcr(index) | LockPcr(index):
            return {"index": _index(index)}
        case ExtendPcr(index, data):
            return {"index": _index(index), "data": bytes(data)}
        case LockPcrs(range):
            return {"range": _index(range)}
        case Attestation():
            fields = {"user_data": request.user_data, "nonce": request.nonce, "public_key": request.public_key}
            return {name: _free_field(name, value) for name, value in fields.items()}
        case _:
            return None


def _index(value: int) -> int:
    if not 0 <= value <= MAX_INDEX:
        raise NsmError(INVALID_ARGUMENT, f"{value} is no index of a register")
    return value


def _free_field(name: str, value: bytes | None) -> bytes | None:
    """An empty value has been signed as such, and is read as if it were absent: never send one."""
    if not value:
        return None
    if len(value) > MAX_FREE_FIELD:
        raise NsmError(INPUT_TOO_LARGE, f"{name} with {len(value)} bytes, the limit is {MAX_FREE_FIELD}")
    return bytes(value)


def decode_description(answer: bytes) -> Description:
    """The answer to `DescribeNsm`."""
    fields = _fields(answer, DescribeNsm)
    major, minor, patch = (_unsigned(fields.get(f"version_{part}")) for part in ("major", "minor", "patch"))
    locked = fields.get("locked_pcrs")
    if not isinstance(locked, list):
        raise _misfit("DescribeNSM")
    return Description(
        version=(major, minor, patch),
        module_id=_text(fields.get("module_id")),
        max_pcrs=_unsigned(fields.get("max_pcrs")),
        locked_pcrs=frozenset(map(_unsigned, locked)),
        digest=_text(fields.get("digest")),
    )


def decode_register(answer: bytes) -> Register:
    """The answer to `DescribePcr`."""
    fields = _fields(answer, DescribePcr)
    locked = fields.get("lock")
    if not isinstance(locked, bool):
        raise _misfit("DescribePCR")
    return Register(locked, _pcr(fields.get("data")))


def decode_extended(answer: bytes) -> bytes:
    """The answer to `ExtendPcr`."""
    return _pcr(_fields(answer, ExtendPcr).get("data"))


def decode_locked(answer: bytes, request: LockPcr | LockPcrs) -> None:
    """The answer to *request*."""
    if _answer(answer) != _NAMES[type(request)]:
        raise _misfit(_NAMES[type(request)])


def decode_random(answer: bytes) -> bytes:
    """The answer to `GetRandom`: as many bytes as there are, but not none."""
    return _bytes(_fields(answer, GetRandom).get("random"))


def decode_document(answer: bytes) -> bytes:
    """The answer to `Attestation`."""
    return _bytes(_fields(answer, Attestation).get("document"))


def _fields(answer: bytes, request: type[Request]) -> dict[int | str, object]:
    """The map that answers a call with a result."""
    item, name = _answer(answer), _NAMES[request]
    fields = item.get(name) if isinstance(item, dict) and len(item) == 1 else None
    if not isinstance(fields, dict):
        raise _misfit(name)
    return fields


def _answer(answer: bytes) -> object:
    """The item in *answer*; raises the error that it may be."""
    try:
        item = decode(answer)
    except CborError as exc:
        raise NsmError(INTERNAL_ERROR, f"undecodable answer: {exc}") from exc
    if isinstance(item, dict) and set(item) == {"Error"}:
        value = item["Error"]
        raise NsmError(value if isinstance(value, str) else INTERNAL_ERROR)
    return item


def _misfit(name: str) -> NsmError:
    return NsmError(INVALID_RESPONSE, f"the answer to {name} has another form")


def _unsigned(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise NsmError(INVALID_RESPONSE, "a number is missing in the answer")


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise NsmError(INVALID_RESPONSE, "a text is missing in the answer")


def _bytes(value: object) -> bytes:
    if isinstance(value, bytes) and value:
        return value
    raise NsmError(INVALID_RESPONSE, "the answer holds no bytes")


def _pcr(value: object) -> bytes:
    if isinstance(value, bytes) and len(value) == PCR_LENGTH:
        return value
    raise NsmError(INVALID_RESPONSE, f"a register has {PCR_LENGTH} bytes")
