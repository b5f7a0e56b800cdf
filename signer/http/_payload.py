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
    text = body.decode(errors="replace")
    if not text.strip():
        raise MalformedRequestError("EOF: expected a JSON string with the bytes to sign in hexadecimal")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        reason = str(exc) if isinstance(exc, ValueError) else "nested too deep"
        raise MalformedRequestError(f"invalid JSON: {reason}; expected a string of hexadecimal digits") from None
    if value is None:
        return b""
    if not isinstance(value, str):
        names = {dict: "object", list: "array", bool: "bool", int: "number", float: "number"}
        kind = names.get(type(value), "value")
        raise MalformedRequestError(f"json: cannot unmarshal {kind} into Go value of type string")
    return value.encode(errors="replace")


def _unhex(digits: bytes) -> bytes:
    for byte in digits:
        if byte not in b"0123456789abcdefABCDEF":
            shown = f" '{chr(byte)}'" if chr(byte).isprintable() else ""
            raise MalformedRequestError(f"encoding/hex: invalid byte: U+{byte:04X}{shown}")
    if len(digits) % 2:
        raise MalformedRequestError("encoding/hex: odd length hex string")
    return bytes.fromhex(digits.decode())
