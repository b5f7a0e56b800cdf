"""The body of a signing request: a JSON string of hexadecimal digits. Error texts are those of Go's decoders."""

import binascii
import json

from signer.errors import MalformedRequestError


def parse_payload(body: bytes) -> bytes:
    """The bytes to sign; raises `MalformedRequestError`. A body `null` is read as the empty string."""
    text = body.strip(b" \t\r\n")
    if len(text) >= 2 and text[0] == text[-1] == 0x22:
        try:
            return binascii.unhexlify(text[1:-1])
        except binascii.Error:
            pass  # the exact fault is found below
    return _unhex(_json_string(body))


def _json_string(body: bytes) -> bytes:
    text = body.decode(errors="replace").strip()
    if not text:
        raise MalformedRequestError("EOF: expected a JSON string with the bytes to sign in hexadecimal")
    if text[0] in "{[":  # not parsed: nothing that could be nested is
        raise _not_a_string("object" if text[0] == "{" else "array")
    try:
        value = json.loads(text, parse_int=lambda _digits: 0)  # a number is none of ours, however long it is
    except ValueError as exc:
        raise MalformedRequestError(f"invalid JSON: {exc}; expected a string of hexadecimal digits") from None
    if value is None:
        return b""
    if not isinstance(value, str):
        raise _not_a_string("bool" if isinstance(value, bool) else "number")
    return value.encode(errors="replace")


def _not_a_string(kind: str) -> MalformedRequestError:
    return MalformedRequestError(f"json: cannot unmarshal {kind} into Go value of type string")


def _unhex(digits: bytes) -> bytes:
    for byte in digits:
        if byte not in b"0123456789abcdefABCDEF":
            shown = f" '{chr(byte)}'" if chr(byte).isprintable() else ""
            raise MalformedRequestError(f"encoding/hex: invalid byte: U+{byte:04X}{shown}")
    if len(digits) % 2:
        raise MalformedRequestError("encoding/hex: odd length hex string")
    return bytes.fromhex(digits.decode())
