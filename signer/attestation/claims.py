"""What the user data of our documents says, section 7.2 of the enclave specification. Does no I/O.

A map, definite, keys ascending: 1 program, 2 version, 3 purpose, 4 the caller's own data, 5 boot id, and of a key
6 address and 7 marks. There is one way to write it, so `decode` takes no other.
"""

from dataclasses import dataclass

import cbor2

from signer.attestation.cbor import CborError
from signer.attestation.cbor import decode as decode_cbor
from signer.errors import SignerError

SESSION, IMPORT, KEY = "session", "import", "key"
PURPOSES = (SESSION, IMPORT, KEY)
MAX_CALLER_DATA = 256  # bytes
MAX_CLAIMS = 512  # bytes: one page of AWS's documentation allows no more user data (section 1.4)
BOOT_ID_LENGTH = 16  # bytes
MIN_NONCE, MAX_NONCE = 16, 64  # bytes

_PROGRAM = "tezos-signer"
_VERSION = 1
_NAME_KEY, _VERSION_KEY, _PURPOSE_KEY, _CALLER_KEY, _BOOT_KEY, _ADDRESS_KEY, _MARKS_KEY = range(1, 8)
_MAX_ADDRESS = 64  # characters; the longest is 36
_MAX_MARKS = 320  # characters; an ARN of a table with the longest name has some 310


class ClaimsError(SignerError):
    """The user data of a genuine document is not ours, or says what it may not. Nothing was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What an enclave says of itself in a document; raises `ClaimsError` where that makes no sense."""

    purpose: str  # one of `PURPOSES`
    boot_id: bytes  # drawn at start: tells one life of an enclave from the next
    caller_data: bytes = b""
    address: str | None = None  # of the key, with purpose `key` only
    marks: str | None = None  # ARN of the table that holds the key's marks, likewise

    def __post_init__(self) -> None:
        _require(self.purpose in PURPOSES, "its purpose is none that is known")
        _require(len(self.boot_id) == BOOT_ID_LENGTH, f"its boot id has not {BOOT_ID_LENGTH} bytes")
        _require(len(self.caller_data) <= MAX_CALLER_DATA, f"the caller's data is over {MAX_CALLER_DATA} bytes")
        _require((self.address is not None) == (self.purpose == KEY), "an address goes with the purpose key only")
        _require(self.marks is None or self.address is not None, "marks go with an address only")
        _require(_is_plain(self.address, _MAX_ADDRESS), "its address is not one")
        _require(_is_plain(self.marks, _MAX_MARKS), "its marks are not an ARN")


def encode(claims: Claims) -> bytes:
    """The user data; raises `ClaimsError` when it is longer than a document may carry."""
    data = _write(claims)
    _require(len(data) <= MAX_CLAIMS, f"it would have {len(data)} bytes, at most {MAX_CLAIMS} are allowed")
    return data


def decode(data: bytes | None) -> Claims:
    """The claims in the user data of a verified document; raises `ClaimsError`, also when there is none."""
    if not data:
        raise ClaimsError(
            "user data of an attestation document: there is none, so no enclave of this signer made it for us"
        )
    try:
        fields = decode_cbor(data)
    except CborError as exc:
        raise ClaimsError(f"user data of an attestation document: {exc}") from None
    _require(isinstance(fields, dict) and fields.get(_NAME_KEY) == _PROGRAM, f"it is not that of {_PROGRAM}")
    assert isinstance(fields, dict)
    _require(
        fields.get(_VERSION_KEY) == _VERSION,
        f"its version is not {_VERSION}; the enclave's image and this program do not fit together",
    )
    claims = _from_fields(fields)
    _require(_write(claims) == data, "it is not written as it should be")
    return claims


def _from_fields(fields: dict[int | str, object]) -> Claims:
    values = [fields.get(key) for key in range(_PURPOSE_KEY, _MARKS_KEY + 1)]
    match values:
        case [str(purpose), bytes(caller), bytes(boot), (str() | None) as address, (str() | None) as marks]:
            return Claims(purpose=purpose, caller_data=caller, boot_id=boot, address=address, marks=marks)
    raise ClaimsError("user data of an attestation document: a field is missing or of the wrong type")


def _write(claims: Claims) -> bytes:
    fields: dict[int, object] = {
        _NAME_KEY: _PROGRAM,
        _VERSION_KEY: _VERSION,
        _PURPOSE_KEY: claims.purpose,
        _CALLER_KEY: claims.caller_data,
        _BOOT_KEY: claims.boot_id,
    }
    if claims.address is not None:
        fields[_ADDRESS_KEY] = claims.address
    if claims.marks is not None:
        fields[_MARKS_KEY] = claims.marks
    return bytes(cbor2.dumps(fields))


def _is_plain(text: str | None, limit: int) -> bool:
    """Absent, or short, printable ASCII: it is shown to people."""
    return text is None or (0 < len(text) <= limit and text.isascii() and text.isprintable())


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise ClaimsError(f"user data of an attestation document: {fault}")
