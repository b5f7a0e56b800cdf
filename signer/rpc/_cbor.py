"""CBOR as both sides write it: one item, nothing behind it, no deep nesting, no duplicate keys."""

import io

import cbor2

MAX_DEPTH = 32  # containers inside one another; the deepest honest message (an error chain) has as many as causes


class CborError(ValueError):
    """The bytes are not one well-formed item of the kind that this protocol uses."""


def loads(data: bytes, *, text_keys: bool = True) -> object:
    """Decode exactly one item; raises `CborError` for anything else. Map keys are texts unless *text_keys* is off."""
    stream = io.BytesIO(data)
    decoder = cbor2.CBORDecoder(
        stream, read_size=1, max_depth=MAX_DEPTH, allow_duplicate_keys=False, strict_hashable_types=text_keys
    )
    try:
        item: object = decoder.decode()
    except (cbor2.CBORError, ValueError, OverflowError, TypeError, RecursionError, MemoryError) as exc:
        raise CborError(f"malformed CBOR: {exc}") from exc
    if stream.tell() != len(data):
        raise CborError(f"malformed CBOR: {len(data) - stream.tell()} byte(s) after the item")
    return item


def dumps(item: object) -> bytes:
    """Encode one item; maps keep the order of their keys."""
    return bytes(cbor2.dumps(item))
